"""MPM: tokens that are each other's nearest merge (Mutual Pair Merging, arXiv 2604.05718).

Behind a few blocks each token looks for the one that is most like it, by the cosine of their
features. Where two tokens choose each other, their plain mean goes on for both. How many do is the
picture's affair: the method has no strength but its schedule of blocks.
"""

from dataclasses import dataclass

import torch

from tokenstep.core.attention import Attended
from tokenstep.core.tokens import PackedTokens
from tokenstep.errors import TokenstepError
from tokenstep.reducers.base import Merge, Site, Turn
from tokenstep.reducers.matching import directions, nearest


@dataclass(frozen=True, slots=True)
class MPM:
    """Merges mutual nearest tokens after each of ``blocks``, which count from 1; none: never.

    The paper puts it before the blocks 2 and 5, which is behind 1 and 4.

    Raises:
        TokenstepError: a block is out of range.
    """

    blocks: tuple[int, ...] = (1, 4)

    def __post_init__(self) -> None:
        if min(self.blocks, default=1) < 1:
            raise TokenstepError(f"blocks count from 1, got {self}")

    @property
    def site(self) -> Site:
        """After a block."""
        return "block"

    def __call__(self, tokens: PackedTokens, block: int, seen: Attended | None) -> Merge | None:
        """Merge the pairs of each picture, the later token into the earlier one."""
        if block not in self.blocks:
            return None
        unit = directions(tokens.x.detach())
        into = torch.arange(len(unit), device=unit.device)
        start = 0
        for length in tokens.segments.lengths:
            first, end = start + tokens.prefix, start + length
            start = end
            if end - first < 2:
                continue
            chosen = nearest(unit[first:end])
            own = torch.arange(len(chosen), device=unit.device)
            mutual = chosen[chosen] == own
            into[first:end] = first + torch.where(mutual, torch.minimum(own, chosen), own)
        return Merge(into, torch.ones_like(into))

    def macs(self, turn: Turn) -> int:
        """Each row is held against each other one of its picture."""
        rows = turn.before - turn.prefix
        return rows * rows * turn.dim
