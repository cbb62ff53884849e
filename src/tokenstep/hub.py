"""Find a model by name: shipped with the package, in a folder, or on the Hugging Face hub."""

import os
from pathlib import Path

from tokenstep.errors import TokenstepError
from tokenstep.segmenter import CONFIG, StepSegmenter

SHIPPED = Path(__file__).parent / "weights"


def shipped_models() -> list[str]:
    """Names of the models in the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def load(name: str | os.PathLike[str]) -> StepSegmenter:
    """Load a model by a shipped name, a folder, or a Hugging Face repository id.

    Raises:
        TokenstepError: there is no such model, or its files are damaged.
    """
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
        return StepSegmenter.from_pretrained(source)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TokenstepError(f"model {source}: cannot be loaded ({reason})") from error
