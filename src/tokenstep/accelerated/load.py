"""Somebody else's model by its name: a folder that transformers saved, or a repository."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import transformers
from transformers.utils import logging

from tokenstep.errors import TokenstepError


def load_foreign(source: str) -> tuple[Any, Any]:
    """A model of transformers and its processor, by the architecture that its config names.

    Weights are safetensors, and no code of a repository is run.

    Raises:
        TokenstepError: transformers has no such architecture, or a file is missing or damaged.
    """
    named = transformers.PretrainedConfig.get_config_dict(source)[0].get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise TokenstepError(
            f"{source}: its config.json names the architectures {named}; transformers "
            f"{transformers.__version__} has to know it by one name"
        )
    try:
        with _without_bars():
            model = cast(Any, kind).from_pretrained(source, use_safetensors=True)
            processor = cast(Any, transformers.AutoImageProcessor).from_pretrained(source)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TokenstepError(f"model {source}: cannot be loaded ({reason})") from error
    return model.eval(), processor


@contextmanager
def _without_bars() -> Iterator[None]:
    """No bar of progress for what takes a second; afterwards as before."""
    bars: Any = logging  # without types
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
