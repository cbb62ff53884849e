"""Tokens leave by chance: what a reducer that judges has to beat."""

from dataclasses import dataclass

import torch

from tokenstep.core.attention import Attended
from tokenstep.core.tokens import PackedTokens
from tokenstep.errors import TokenstepError
from tokenstep.reducers.base import Drop, Site, Turn
from tokenstep.require import require


@dataclass(frozen=True, slots=True)
class RandomDrop:
    """Drops a ``share`` of each picture's tokens, 0 to below 1, after each of ``blocks``.

    ``blocks`` count from 1; without any it is after each. Which go depends on ``seed``, the block
    and the place in the sequence alone, so that a picture's result does not depend on its batch.

    Raises:
        TokenstepError: a setting is out of range.
    """

    share: float = 0.1
    blocks: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.share < 1 and min(self.blocks, default=1) >= 1):
            raise TokenstepError(f"share is 0 to below 1 and blocks count from 1, got {self}")
        require(abs(self.seed) < 2**32, "seed", "below 2 ** 32", self.seed)

    @property
    def site(self) -> Site:
        """After a block."""
        return "block"

    def __call__(self, tokens: PackedTokens, block: int, seen: Attended | None) -> Drop | None:
        """Drop what is drawn."""
        if self.blocks and block not in self.blocks:
            return None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
        longest = tokens.segments.longest
        drawn = torch.rand(longest, generator=generator).to(tokens.x.device)
        picture = tokens.picture()
        place = torch.arange(len(picture), device=picture.device) - tokens.offsets[picture]
        gone = (tokens.counts() * self.share).round().long()
        return Drop(~tokens.is_prefix & (tokens.ranked(drawn[place]) < gone[picture]))

    def macs(self, turn: Turn) -> int:
        """None."""
        return 0
