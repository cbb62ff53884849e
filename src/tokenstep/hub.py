"""Find a model by name: shipped with the package, in a folder, or on the Hugging Face hub."""

import os
from pathlib import Path

import torch

from tokenstep.errors import TokenstepError
from tokenstep.model.folder import CONFIG
from tokenstep.model.segmenter import Segmenter

SHIPPED = Path(__file__).parent / "weights"


def shipped_models() -> list[str]:
    """Names of the models in the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def load(name: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Segmenter:
    """Load a model by a shipped name, a folder, or a Hugging Face repository id.

    ``device`` is "cpu", "cuda", "cuda:N" or "auto": a GPU if torch finds one, else the CPU.

    Raises:
        TokenstepError: there is no such model or device, or the model's files are damaged.
    """
    chosen = device_of(str(device))
    path = Path(name)
    # A folder of pictures may be called as a model is; a model in a folder goes first.
    if str(name) in shipped_models() and not (path / CONFIG).is_file():
        path = SHIPPED / str(name)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise TokenstepError(f"{path}: holds no model ({CONFIG} is missing)")
    elif str(name).count("/") != 1 or str(name).startswith((".", "/")):
        known = ", ".join(shipped_models())
        raise TokenstepError(
            f"model {str(name)!r} is not known: choose a shipped one ({known}), a folder that "
            "holds config.json and model.safetensors, or a Hugging Face id OWNER/NAME"
        )
    source = str(path) if path.is_dir() else str(name)
    try:
        model = Segmenter.from_pretrained(source)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TokenstepError(f"model {source}: cannot be loaded ({reason})") from error
    return model.to(chosen)


def device_of(name: str) -> str:
    """The device that a name stands for.

    Raises:
        TokenstepError: models do not run on such a device, or it is not there.
    """
    cards = range(torch.cuda.device_count())
    known = ["cpu", *(["cuda"] if cards else []), *(f"cuda:{number}" for number in cards)]
    if name == "auto":
        return "cuda" if cards else "cpu"
    if name not in known:
        reason = "models run on CPUs and CUDA GPUs only; " if name.startswith("mps") else ""
        raise TokenstepError(f"device {name}: {reason}choose from auto, {', '.join(known)}")
    return name
