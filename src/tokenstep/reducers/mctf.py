"""MCTF: tokens merge that are alike, little attended to and small (arXiv 2403.10030, CVPR 2024).

In every block the tokens are split in two halves by turns. A pair counts more the more alike its
features are, the less attention its tokens get, and the fewer patches they speak for. The best
pairs merge from the first half into the second, and as many from the second into what is left of
the first; means are weighed by attention and size.

Its authors take the attention of the block that comes next, made one step ahead and merged along
with the tokens. Here it is that of the block in which tokens merge, behind its attention as ToMe
merges: so attention sees all rows of a block, where theirs sees fewer values.
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
class MCTF:
    """Merges ``r`` tokens of each picture in each block, as the paper does, or a ``share`` of them.

    ``share`` is of the live tokens, 0 to 0.5 (ours: pictures differ in size); just one is given.
    No more than half of the tokens merge in a block. ``similarity``, ``information`` and ``cells``
    are the powers of the three criteria, 0 or more, by default the paper's.

    Raises:
        TokenstepError: neither or both of share and r are given, or one is out of range.
    """

    share: float | None = None
    r: int | None = None
    similarity: float = 1.0
    information: float = 1 / 20
    cells: float = 1 / 40

    def __post_init__(self) -> None:
        if (self.share is None) == (self.r is None):
            raise TokenstepError("give share, 0 to 0.5, or r, a number of tokens")
        powers = min(self.similarity, self.information, self.cells)
        if not (0 <= (self.share or 0) <= 0.5 and (self.r or 0) >= 0 and powers >= 0):
            raise TokenstepError(f"share is 0 to 0.5, r and the powers 0 or more, got {self}")

    @property
    def site(self) -> Site:
        """Between attention and MLP."""
        return "attention"

    def __call__(self, tokens: PackedTokens, block: int, seen: Attended | None) -> Merge | None:
        """Merge the best pairs of each picture, there and back."""
        if seen is None:
            raise ValueError("MCTF judges by attention: ask it at the site of attention")
        speaks = ~tokens.is_prefix
        attention = seen.received(torch.ones_like(speaks))
        attention = attention.clamp(min=torch.finfo(attention.dtype).tiny)
        unit, size = directions(tokens.x.detach()), tokens.size.float()
        slight = attention**-self.information * size**-self.cells
        into = torch.arange(len(unit), device=unit.device)
        start = 0
        for length in tokens.segments.lengths:
            own = slice(start, start + length)
            into[own] = start + self._merged(unit[own], slight[own], speaks[own])
            start += length
        return Merge(into, attention * size)

    def count(self, tokens: int) -> int:
        """How many of a picture's tokens merge in a block."""
        wanted = self.r if self.r is not None else round((self.share or 0.0) * tokens)
        return min(wanted, tokens // 2)

    def _merged(self, unit: Tensor, slight: Tensor, speaks: Tensor) -> Tensor:
        """The row that takes each of a picture's rows in, by ``unit (n, d)``; ``(n,)``."""
        into = torch.arange(len(unit), device=unit.device)
        first, second = into[::2], into[1::2]
        if not len(second):
            return into
        alike = ((unit[::2] @ unit[1::2].T).clamp(min=-1) + 1) / 2
        alike = alike**self.similarity * slight[::2, None] * slight[None, 1::2]
        alike = two_halves(alike, speaks)
        count = self.count(int(speaks.sum()))
        rows, partner = likest(alike, count // 2)
        into[first[rows]] = second[partner]
        # Those that left take nobody in any more.
        back, partner = likest(alike.index_fill(0, rows, -torch.inf).T, count - len(rows))
        into[second[back]] = first[partner]
        return into[into]

    def macs(self, turn: Turn) -> int:
        """Attention is made again, which a fused kernel does not hand out; halves are compared."""
        first, second = -(-turn.before // 2), turn.before // 2
        return (turn.before * turn.before + first * second) * turn.dim
