"""ToMe: in every block the tokens that are most alike merge (arXiv 2210.09461, ICLR 2023).

Tokens are split in two halves by turns, each of the first half draws an edge to its likest of the
second by the cosine of their mean keys, and the likest edges merge, weighed by size. Its authors
let a merged token weigh as its patches in attention: that is ``size_bias`` of the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenstep.core.attention import Attended
from tokenstep.core.tokens import PackedTokens
from tokenstep.errors import TokenstepError
from tokenstep.reducers.base import Merge, Site, Turn
from tokenstep.reducers.matching import directions, likest, two_halves


@dataclass(frozen=True, slots=True)
class ToMe:
    """Merges ``r`` tokens of each picture in each block, as the paper does, or a ``share`` of them.

    ``share`` is of the live tokens, 0 to 0.5 (ours: pictures differ in size); just one is given.
    No more than half of the tokens merge in a block.

    Raises:
        TokenstepError: neither or both are given, or one is out of range.
    """

    share: float | None = None
    r: int | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.r is None):
            raise TokenstepError("give share, 0 to 0.5, or r, a number of tokens")
        if not (0 <= (self.share or 0) <= 0.5 and (self.r or 0) >= 0):
            raise TokenstepError(f"share is 0 to 0.5 and r 0 or more, got {self}")

    @property
    def site(self) -> Site:
        """Between attention and MLP."""
        return "attention"

    def __call__(self, tokens: PackedTokens, block: int, seen: Attended | None) -> Merge | None:
        """Merge the likest pairs of each picture."""
        if seen is None:
            raise ValueError("ToMe judges by keys: ask it at the site of attention")
        # (T, d): keys, mean over heads
        keys = directions(seen.k.float().mean(dim=1))
        into = torch.arange(len(keys), device=keys.device)
        start = 0
        for length in seen.segments.lengths:
            own = slice(start, start + length)
            speaks = tokens.anchor[own] >= 0
            into[own] = start + self._merged(keys[own], speaks)
            start += length
        return Merge(into)

    def count(self, tokens: int) -> int:
        """How many of a picture's tokens merge in a block."""
        return self.r if self.r is not None else round((self.share or 0.0) * tokens)

    def _merged(self, keys: Tensor, speaks: Tensor) -> Tensor:
        """The row that takes each of a picture's rows in, by ``keys (n, d)``; ``(n,)``."""
        into = torch.arange(len(keys), device=keys.device)
        first, second = into[::2], into[1::2]
        if not len(second):
            return into
        alike = two_halves(keys[::2] @ keys[1::2].T, speaks)
        merging, partner = likest(alike, self.count(int(speaks.sum())))
        into[first[merging]] = second[partner]
        return into

    def macs(self, turn: Turn) -> int:
        """Each row of one half is held against each of the other, by keys as wide as a head."""
        first, second = -(-turn.before // 2), turn.before // 2
        return first * second * (turn.dim // turn.heads)
