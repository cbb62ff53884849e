"""What a policy is: it looks at a picture and scores its superpatches, before any token exists."""

from abc import ABC, abstractmethod
from typing import Any, Protocol

from torch import Tensor, nn

from tokenstep.core.partition import Grid


class Seen(Protocol):
    """What a policy made of pictures of one size; all else in it is the policy's own."""

    @property
    def grid(self) -> Grid:
        """Patches (H, W) of each picture, rounded up."""
        ...


class Policy(nn.Module, ABC):
    """Scores how surely each superpatch may be one token. A segmenter keeps it in eval mode.

    ``patch`` is the side of a patch in pixels, that of the ViT.
    """

    patch: int

    @abstractmethod
    def features(self, images: Tensor) -> Seen:
        """Look at ``images (B, 3, h, w)``, normalised; each picture on its own."""

    def for_use(self) -> "Policy":
        """The same for inference alone, as lean as it gets: itself, if it is that already."""
        return self

    @abstractmethod
    def score(self, features: Any) -> list[Tensor]:
        """Logits ``(B, H // s, W // s)`` of superpatches, one map for each size of the config."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of :meth:`on_grid`; 0 if it has nothing to tell the tokens."""

    @abstractmethod
    def on_grid(self, features: Any) -> Tensor:
        """What it saw of each patch, ``(B, channels, H, W)``, for models that give it to tokens."""

    @abstractmethod
    def macs(self, size: tuple[int, int], *, scores: bool = True) -> int:
        """Multiply-adds on a picture of ``size`` (h, w); without ``scores``, of the features."""
