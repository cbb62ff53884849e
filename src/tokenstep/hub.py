"""Find a model by name: shipped with the package, in a folder, or on the Hugging Face hub.

It is one of ours, or one of transformers that somebody else trained.
"""

import json
import os
from pathlib import Path
from typing import Any, overload

import torch
from huggingface_hub import hf_hub_download

from tokenstep.accelerated.accelerate import accelerate, vit_of
from tokenstep.accelerated.accelerator import FILE as ACCELERATOR
from tokenstep.accelerated.accelerator import read_accelerator
from tokenstep.errors import TokenstepError
from tokenstep.model.any_segmenter import AnySegmenter
from tokenstep.model.dense import with_policy
from tokenstep.model.folder import CONFIG
from tokenstep.model.segmenter import Segmenter
from tokenstep.policies.entropy import Entropy

NOT_FOR_OURS = "is one of tokenstep, which an accelerator is not for: it holds points of its own"
SHIPPED = Path(__file__).parent / "weights"


def shipped_models() -> list[str]:
    """Names of the models in the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


Name = str | os.PathLike[str]


@overload
def load(name: Name, *, device: str | torch.device = "cpu") -> Segmenter: ...


@overload
def load(
    name: Name,
    *,
    device: str | torch.device = "cpu",
    accelerator: Name,
    max_loss: float | None = None,
) -> Any: ...


def load(
    name: Name,
    *,
    device: str | torch.device = "cpu",
    accelerator: Name | None = None,
    max_loss: float | None = None,
) -> Any:
    """Load a model by a shipped name, a folder, or a Hugging Face repository id.

    ``device`` is "cpu", "cuda", "cuda:N" or "auto": a GPU if torch finds one, else the CPU. A model
    of transformers is loaded with an ``accelerator``, a folder or repository too, on top of its
    unchanged weights, and has its own call and outputs; see :func:`tokenstep.accelerate`, also for
    ``max_loss``.

    Raises:
        TokenstepError: there is no such model, accelerator or device, or files are damaged.
    """
    chosen, source = device_of(str(device)), source_of(name)
    if not is_foreign(source):
        if accelerator is not None or max_loss is not None:
            raise TokenstepError(f"model {source}: {NOT_FOR_OURS}")
        return _ours(source).to(chosen)
    if accelerator is None:
        raise TokenstepError(
            f"model {source}: is one of transformers: give accelerator=FOLDER, or load it there "
            "and give it to tokenstep.accelerate"
        )
    model, processor = _foreign(source)
    return accelerate(model, processor, accelerator=accelerator, max_loss=max_loss).to(chosen)


def load_segmenter(
    name: Name,
    *,
    device: str | torch.device = "cpu",
    accelerator: Name | None = None,
    policy: Entropy | None = None,
) -> AnySegmenter:
    """Load a model as commands take it, be it ours or one of transformers.

    ``accelerator`` and ``policy`` say what makes the latter cheap; with neither it is dense until
    it is told otherwise. For ours a ``policy`` stands in the place of the model's own.

    Raises:
        TokenstepError: as :func:`load`; or the model cannot have such a policy.
    """
    chosen, source = device_of(str(device)), source_of(name)
    if accelerator is not None and policy is not None:
        raise TokenstepError("an accelerator has its own policy: give one of both")
    if not is_foreign(source):
        if accelerator is not None:
            raise TokenstepError(f"model {source}: {NOT_FOR_OURS}")
        ours = _ours(source).to(chosen)
        return ours if policy is None else with_policy(ours, policy)
    model, processor = _foreign(source)
    known = None if accelerator is None else read_accelerator(accelerator)
    if known is not None:
        known.require_for(vit_of(model), str(accelerator))
    from tokenstep.accelerated.segmenter import AcceleratedSegmenter

    return AcceleratedSegmenter(model.to(chosen), processor, policy=policy, accelerator=known)


def source_of(name: Name) -> str:
    """The folder or repository that a name stands for.

    Raises:
        TokenstepError: it is neither, nor a shipped model.
    """
    path = Path(name)
    # A folder of pictures may be called as a model is; a model in a folder goes first.
    if str(name) in shipped_models() and not (path / CONFIG).is_file():
        path = SHIPPED / str(name)
    if path.is_dir():
        if (path / ACCELERATOR).is_file() and not (path / CONFIG).is_file():
            raise TokenstepError(
                f"{path}: is an accelerator, not a model; give it beside the model that it is for, "
                "as --accelerator or accelerator="
            )
        if not (path / CONFIG).is_file():
            raise TokenstepError(f"{path}: holds no model ({CONFIG} is missing)")
    elif str(name).count("/") != 1 or str(name).startswith((".", "/")):
        known = ", ".join(shipped_models())
        raise TokenstepError(
            f"model {str(name)!r} is not known: choose a shipped one ({known}), a folder that "
            "holds config.json and model.safetensors, or a Hugging Face id OWNER/NAME"
        )
    return str(path) if path.is_dir() else str(name)


def is_foreign(source: str) -> bool:
    """Whether a folder or repository holds a model of transformers; what cannot be read is not."""
    try:
        path = Path(source) / CONFIG
        if not Path(source).is_dir():
            path = Path(hf_hub_download(source, CONFIG))
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "model_type" in data


def _foreign(source: str) -> tuple[Any, Any]:
    try:
        from tokenstep.accelerated.load import load_foreign
    except ModuleNotFoundError as error:
        raise TokenstepError(
            f"model {source}: is one of transformers: pip install 'tokenstep[hf]'"
        ) from error
    return load_foreign(source)


def _ours(source: str) -> Segmenter:
    try:
        return Segmenter.from_pretrained(source)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TokenstepError(f"model {source}: cannot be loaded ({reason})") from error


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
