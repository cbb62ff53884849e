"""What the dataflows share: the superpatches to embed, and what they read of a model's stem."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from tokenstep.core.partition import Grid
from tokenstep.hosts.base import Host


@dataclass(frozen=True, slots=True)
class Superpatches:
    """Superpatches of pictures of one size, in their order: picture after picture, rows first."""

    picture: Tensor  # (n,) int64, of the stack
    cell: Tensor  # (n,) int64, the top left one, flat on the picture's grid
    level: Tensor  # (n,) int64: the side is 2 ** level patches
    highest: int  # level that any of them may have
    grid: Grid  # (H, W) patches of each picture


class Stem(Protocol):
    """What a model embeds superpatches with, that of :class:`Tokeniser`."""

    host: Host
    patch: int
    margin: int
    edge: int  # pixels around a canvas, at least the margin

    @property
    def sub_patches(self) -> nn.Module | None:
        """Projects the mean of the patches within a superpatch, if the model has that."""
        ...

    @property
    def context(self) -> nn.Module | None:
        """Projects what the policy saw, if the model has that."""
        ...
