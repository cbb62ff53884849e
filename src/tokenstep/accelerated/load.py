"""Somebody else's model by its name: a folder that transformers saved, or a repository."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import transformers
from transformers.utils import logging
from transformers.utils.hub import cached_file

from tokenstep.errors import TokenstepError

INDEX = "model.safetensors.index.json"


def load_foreign(source: str) -> tuple[Any, Any]:
    """A model of transformers and its processor, by the architecture that its config names.

    Weights are safetensors, and no code of a repository is run.

    Raises:
        TokenstepError: transformers has no such architecture, or a file is missing or damaged.
    """
    try:
        named = transformers.PretrainedConfig.get_config_dict(source)[0].get("architectures")
    except OSError as error:
        raise _broken(source, error) from error
    name = named[0] if isinstance(named, list) and len(named) == 1 else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise TokenstepError(
            f"{source}: its config.json names the architectures {named}; transformers "
            f"{transformers.__version__} has to know it by one name"
        )
    auto = cast(Any, transformers.AutoImageProcessor)
    try:
        _require_safetensors(source)
        with _without_bars():
            model, found = cast(Any, kind).from_pretrained(
                source, use_safetensors=True, output_loading_info=True
            )
            processor = auto.from_pretrained(source, trust_remote_code=False)
    except TokenstepError:
        raise
    except Exception as error:  # a damaged folder makes transformers raise whatever comes
        raise _broken(source, error) from error
    lacking = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
    if lacking:
        raise TokenstepError(
            f"model {source}: its weights lack {len(lacking)} of the model's, or have other shapes "
            f"({lacking[0]} first), which would be random; give the folder of a trained {name}"
        )
    return model.eval(), processor


def _require_safetensors(source: str) -> None:
    """Refuse an index that names other files: transformers would unpickle them.

    Raises:
        TokenstepError: names the file.
    """
    path = cached_file(source, INDEX, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return
    files = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values()
    others = sorted({file for file in files if not str(file).endswith(".safetensors")})
    if others:
        raise TokenstepError(
            f"model {source}: {INDEX} names {others[0]}, which is no safetensors file and is not "
            "read; save it again by save_pretrained"
        )


def _broken(source: str, error: Exception) -> TokenstepError:
    reason = " ".join(str(error).split())[:200]
    return TokenstepError(
        f"model {source}: cannot be loaded ({type(error).__name__}: {reason}); give a folder as "
        "save_pretrained of a model and of its image processor write it"
    )


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
