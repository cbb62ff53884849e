"""Entropy: a superpatch may be one token where its grey values tell little (APT, arXiv 2510.18091).

No network looks at the picture. The grey values of a superpatch fall into bins of half a level of
255, and the entropy of that histogram, in bits, is held against a threshold. Its authors take
patches of 32 px below 5.5 bits and of 64 px below 4.0 as one token each. What hangs over the grid
of patches is filled up with the border (theirs never merge it).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenstep.config import HALF, Channels
from tokenstep.core.partition import Grid, grid_of, level_of
from tokenstep.errors import TokenstepError
from tokenstep.policies.base import Policy

BINS = 511  # of half a level, from 0 to 255
BITS = math.log2(BINS)  # the entropy of a histogram that is even
GREY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


@dataclass(frozen=True, slots=True)
class Histograms:
    """Grey values of the superpatches of the finest size."""

    grid: Grid  # (H, W) patches of the pictures
    counts: Tensor  # (B, H // finest, W // finest, BINS) int64


@dataclass(frozen=True, slots=True)
class Entropy:
    """The policy by name: superpatches of each of ``sizes`` merge below so many ``bits``.

    ``sizes`` are in patches, ``bits`` one number for each; the defaults are the paper's for
    patches of 16 px.

    Raises:
        TokenstepError: there is not one number of bits, 0 to 64, for each size, or a size is no
            power of two, 2 to 1024, or comes twice.
    """

    bits: tuple[float, ...] = (5.5, 4.0)
    sizes: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        sound = len(self.bits) == len(self.sizes) > 0
        sound = sound and all(0 <= bits <= 64 for bits in self.bits)
        known = {1 << level for level in range(1, 11)}
        if not (sound and len({*self.sizes} & known) == len(self.sizes)):
            raise TokenstepError(
                "policy entropy: give bits, 0 to 64, for each of sizes, which are powers of two "
                f"(2 to 1024), got bits {self.bits!s:.80} and sizes {self.sizes!s:.80}"
            )

    @property
    def merge(self) -> tuple[float, ...]:
        """The thresholds of its scores."""
        return tuple(threshold_of(bits) for bits in self.bits)

    def build(self, patch: int, mean: Channels, std: Channels) -> "EntropyPolicy":
        """The policy for patches of so many pixels, of pictures normalised by ``mean``, ``std``.

        Raises:
            ValueError: a size is no power of two.
        """
        return EntropyPolicy(patch, self.sizes, mean=mean, std=std)


class EntropyPolicy(Policy):
    """Scores superpatches by the entropy of their grey values: 1 - bits / :data:`BITS`.

    :func:`threshold_of` ``(bits)`` is the threshold that merges what has fewer bits. The policy
    learns nothing and tells the tokens nothing. ``mean`` and ``std`` are those that pictures were
    normalised by.

    Raises:
        ValueError: a size is no power of two, or there is none.
    """

    def __init__(
        self,
        patch: int,
        sizes: Sequence[int] = (2, 4),
        *,
        mean: Channels = HALF,
        std: Channels = HALF,
    ) -> None:
        super().__init__()
        if not sizes:
            raise ValueError("the policy needs at least one superpatch size")
        for size in sizes:
            level_of(size)
        self.patch = patch
        self.sizes = tuple(sizes)
        # A normalised channel's share of the grey value, and what the means add to it.
        self.shares = tuple(share * one for share, one in zip(GREY, std, strict=True))
        self.shift = sum(share * one for share, one in zip(GREY, mean, strict=True))

    def features(self, images: Tensor) -> Histograms:
        """Count the grey values of ``images (B, 3, h, w)``, normalised."""
        batch, _, height, width = images.shape
        grid = grid_of((height, width), self.patch)
        side = min(self.sizes) * self.patch
        rows, columns = (count // min(self.sizes) for count in grid)
        channels = zip(images.float().unbind(1), self.shares, strict=True)
        grey = sum((channel * share for channel, share in channels), start=images.new_zeros(()))
        grey = grey + self.shift
        # To the nearest, so that whole levels lie in the middle of a bin.
        bins = (grey * (BINS - 1)).round().long().clamp(0, BINS - 1)
        padding = (0, max(0, columns * side - width), 0, max(0, rows * side - height))
        padded = F.pad(bins[:, None].float(), padding, mode="replicate")[:, 0].long()
        # (B, rows, columns, pixels of a superpatch)
        pixels = padded[:, : rows * side, : columns * side]
        pixels = pixels.reshape(batch, rows, side, columns, side).transpose(2, 3)
        pixels = pixels.reshape(batch, rows, columns, side * side)
        counts = pixels.new_zeros(batch, rows, columns, BINS)
        return Histograms(grid, counts.scatter_add_(-1, pixels, torch.ones_like(pixels)))

    def score(self, features: Histograms) -> list[Tensor]:
        """Logits ``(B, H // s, W // s)``: of 1 for a single grey value, of 0 for all alike."""
        return [torch.logit(1 - bits / BITS, eps=1e-6) for bits in self.bits(features)]

    def bits(self, features: Histograms) -> list[Tensor]:
        """Entropy of each superpatch in bits, ``(B, H // s, W // s)`` for each size."""
        found = []
        for size in self.sizes:
            ratio = size // min(self.sizes)
            rows, columns = (side // size for side in features.grid)
            own = features.counts[:, : rows * ratio, : columns * ratio]
            own = own.reshape(len(own), rows, ratio, columns, ratio, BINS).sum((2, 4))
            share = own.float() / (size * self.patch) ** 2
            found.append(torch.special.entr(share).sum(-1) / math.log(2))
        return found

    @property
    def channels(self) -> int:
        """None."""
        return 0

    def on_grid(self, features: Histograms) -> Tensor:
        """Nothing, ``(B, 0, H, W)``."""
        counts = features.counts
        return counts.new_zeros(len(counts), 0, *features.grid, dtype=torch.float32)

    def macs(self, size: tuple[int, int], *, scores: bool = True) -> int:
        """Three for the grey value of a pixel, and one for each bin of a superpatch."""
        pixels = 3 * size[0] * size[1]
        if not scores:
            return pixels
        grid = grid_of(size, self.patch)
        return pixels + sum(BINS * (grid[0] // side) * (grid[1] // side) for side in self.sizes)


def threshold_of(bits: float) -> float:
    """The threshold, 0 to 1, that merges superpatches of less than ``bits`` of entropy."""
    return min(1.0, max(0.0, 1 - bits / BITS))


def bits_of(threshold: float) -> float:
    """The bits of entropy, 0 to :data:`BITS`, that a threshold stands for."""
    return BITS * (1 - threshold)
