"""Plain ViT segmenters made cheap: superpatch merging by a small CNN policy, and early exits."""

from tokenstep.config import DENSE, ModelConfig, PolicyConfig, Settings, VitConfig
from tokenstep.errors import TokenstepError
from tokenstep.hub import load, shipped_models
from tokenstep.result import Result, TokenUse
from tokenstep.segmenter import StepSegmenter
from tokenstep.tokens import PackedTokens

__version__ = "0.1.0"

__all__ = [
    "DENSE",
    "ModelConfig",
    "PackedTokens",
    "PolicyConfig",
    "Result",
    "Settings",
    "StepSegmenter",
    "TokenUse",
    "TokenstepError",
    "VitConfig",
    "__version__",
    "load",
    "shipped_models",
]
