"""EViT: the tokens that the CLS token attends to least leave (arXiv 2202.07800, ICLR 2022).

In a few blocks the share ``keep`` of the tokens stays, those that get the most attention from the
CLS token, mean over heads. Its authors fuse those that leave into one token, weighed by that
attention; a classifier needs no more of them. A segmenter wants a class for each, so here they may
be dropped instead, and keep what they knew. Where a model has no prefix tokens, the attention that
all rows pay decides, and where it has registers alone, that of the first (both ours).
"""

import math
from dataclasses import dataclass

import torch

from tokenstep.core.attention import Attended
from tokenstep.core.tokens import PackedTokens
from tokenstep.errors import TokenstepError
from tokenstep.reducers.base import Drop, Merge, Site, Turn


@dataclass(frozen=True, slots=True)
class EViT:
    """Keeps the share ``keep`` of each picture's tokens, above 0 to 1, in each of ``blocks``.

    ``blocks`` are counted from 1; the defaults are the paper's for 12 blocks. ``fuse`` merges those
    that leave into one token, as in the paper; without it they are dropped.

    Raises:
        TokenstepError: a setting is out of range.
    """

    keep: float = 0.7
    blocks: tuple[int, ...] = (4, 7, 10)
    fuse: bool = True

    def __post_init__(self) -> None:
        if not (0 < self.keep <= 1 and min(self.blocks, default=0) >= 1):
            raise TokenstepError(f"keep is above 0 to 1 and blocks count from 1, got {self}")

    @property
    def site(self) -> Site:
        """Between attention and MLP."""
        return "attention"

    def __call__(
        self, tokens: PackedTokens, block: int, seen: Attended | None
    ) -> Merge | Drop | None:
        """Part with the tokens that get the least attention."""
        if block not in self.blocks or self.keep == 1:
            return None
        if seen is None:
            raise ValueError("EViT judges by attention: ask it at the site of attention")
        prefix = tokens.is_prefix
        picture = tokens.picture()
        # The CLS token is the first row of a picture; without prefix rows all ask.
        first = torch.zeros_like(prefix)
        first[tokens.offsets[:-1][tokens.offsets.diff() > 0]] = True
        attention = seen.received(first & prefix if bool(prefix.any()) else ~prefix)
        rank, counts = tokens.ranked(attention), tokens.counts()
        kept = (counts.double() * self.keep).ceil().long()
        gone = ~prefix & (rank >= kept[picture])
        if not self.fuse:
            return Drop(gone)
        # The surest of those that leave takes the others in.
        target = gone & (rank == kept[picture])
        taker = kept.new_full((len(counts),), -1)
        taker[picture[target]] = target.nonzero().squeeze(1)
        rows = torch.arange(len(rank), device=rank.device)
        weight = attention.clamp(min=torch.finfo(attention.dtype).tiny)
        return Merge(torch.where(gone, taker[picture], rows), weight)

    def macs(self, turn: Turn) -> int:
        """The weights of those that ask, which a fused kernel does not hand out, are made again."""
        return turn.dim * turn.before * (1 if turn.prefix else turn.before)

    def kept(self, tokens: int) -> int:
        """How many of ``tokens`` stay in one of its blocks, the fused one not counted."""
        return math.ceil(self.keep * tokens)
