"""Plain ViT segmenters made cheap: superpatch merging by a small CNN policy, and early exits."""

from importlib import import_module
from typing import TYPE_CHECKING
from warnings import warn

if TYPE_CHECKING:
    from tokenstep.accelerated.accelerate import accelerate
    from tokenstep.config import DENSE, Budget, PolicyConfig, Thresholds, VitConfig
    from tokenstep.core.tokens import PackedTokens
    from tokenstep.errors import TokenstepError
    from tokenstep.hub import load, shipped_models
    from tokenstep.model.config import ModelConfig
    from tokenstep.model.dense import dense
    from tokenstep.model.result import Result
    from tokenstep.model.segmented import TokenUse
    from tokenstep.model.segmenter import Segmenter

__version__ = "0.1.0"

__all__ = [
    "DENSE",
    "Budget",
    "ModelConfig",
    "PackedTokens",
    "PolicyConfig",
    "Result",
    "Segmenter",
    "Thresholds",
    "TokenUse",
    "TokenstepError",
    "VitConfig",
    "__version__",
    "accelerate",
    "dense",
    "load",
    "shipped_models",
]

# torch takes seconds to import, which `tokenstep --help` must not: a name is fetched from its
# module when it is first asked for (PEP 562).
_MODULES = {
    "accelerated.accelerate": ("accelerate",),
    "config": ("DENSE", "Budget", "PolicyConfig", "Thresholds", "VitConfig"),
    "errors": ("TokenstepError",),
    "hub": ("load", "shipped_models"),
    "model.config": ("ModelConfig",),
    "model.dense": ("dense",),
    "model.result": ("Result",),
    "model.segmented": ("TokenUse",),
    "model.segmenter": ("Segmenter",),
    "core.tokens": ("PackedTokens",),
}
# Names of earlier versions: what each is called now, and where the old name still lies.
_FORMER = {
    "Settings": ("Thresholds(...)", "config", "Thresholds"),
    "StepSegmenter": (
        "Segmenter, built by Segmenter.build(config)",
        "model.deprecated",
        "StepSegmenter",
    ),
}

if not TYPE_CHECKING:  # to a type checker a name that is none must be one

    def __getattr__(name):
        if name in _MODULES:  # such as tokenstep.config after a bare import
            return import_module(f"{__name__}.{name}")
        for module, names in _MODULES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
                return value
        if name in _FORMER:
            now, module, there = _FORMER[name]
            warn(f"tokenstep.{name}: use tokenstep.{now}", DeprecationWarning, stacklevel=2)
            return getattr(import_module(f"{__name__}.{module}"), there)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
