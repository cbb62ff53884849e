"""ALGM: tokens merge first with their neighbours, later with any (arXiv 2406.09936, CVPR 2024).

In an early block the four tokens of a 2x2 window merge where they are alike on average (the paper's
CLAP). Half-way through the network the tokens are split in two halves by turns, and each token of
the first half merges into its likest of the second where they are alike (GBM). Alike means that the
cosine of their features is above a threshold, so a plain picture loses more tokens than a busy one.

Its authors take the threshold from the statistics of a trained model; here it is given. Their code
merges equally many tokens in all pictures of a batch; here each picture is on its own. A window of
tokens that have merged before, or over the border of the grid, is left alone (ours).
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
class ALGM:
    """Merges windows in block ``near`` and pairs in block ``far``, if alike beyond ``threshold``.

    ``threshold`` is a cosine, -1 to 1; at 1 nothing merges. Its default is ours. Blocks count from
    1; the defaults are for a network of 12, and 0 leaves that step out.

    Raises:
        TokenstepError: a setting is out of range.
    """

    threshold: float = 0.9
    near: int = 1
    far: int = 6

    def __post_init__(self) -> None:
        if not (-1 <= self.threshold <= 1 and self.near >= 0 and self.far >= 0):
            raise TokenstepError(f"threshold is -1 to 1 and blocks count from 1, got {self}")

    @property
    def site(self) -> Site:
        """Between attention and MLP."""
        return "attention"

    def __call__(self, tokens: PackedTokens, block: int, seen: Attended | None) -> Merge | None:
        """Merge what is alike in one of its two blocks."""
        if block not in (self.near, self.far):
            return None
        unit = directions(tokens.x.detach())
        into = self._windows(tokens, unit) if block == self.near else self._pairs(tokens, unit)
        return Merge(into)

    def _windows(self, tokens: PackedTokens, unit: Tensor) -> Tensor:
        """The row that takes each row in, ``(T,)``: the first of its window."""
        into = torch.arange(len(unit), device=unit.device)
        # The row that speaks for each cell alone, (B, H, W); -1 where there is none.
        row = into.new_full((tokens.owner.numel() + 1,), -1)
        row[tokens.anchor] = torch.where(tokens.size == 1, into, -1)
        row[-1] = -1
        cells = row[:-1].view_as(tokens.owner)
        height, width = (side // 2 for side in cells.shape[1:])
        even = cells[:, : 2 * height, : 2 * width].reshape(len(cells), height, 2, width, 2)
        # (B, H // 2, W // 2, 2, 2) -> (windows, 4)
        windows = even.transpose(2, 3).reshape(-1, 4)
        whole = (windows >= 0).all(dim=1)
        # Four vectors of length 1: their sum's square is 4, and twice each of their six products.
        mean = (unit[windows.clamp(min=0)].sum(1).square().sum(-1) - 4) / 12
        merging = windows[whole & (mean.clamp(max=1) > self.threshold)]
        into[merging.flatten()] = merging[:, :1].expand_as(merging).flatten()
        return into

    def _pairs(self, tokens: PackedTokens, unit: Tensor) -> Tensor:
        """The row that takes each row in, ``(T,)``: its likest of the other half, if alike."""
        into = torch.arange(len(unit), device=unit.device)
        speaks, start = ~tokens.is_prefix, 0
        for length in tokens.segments.lengths:
            own = into[start : start + length]
            first, second = own[::2], own[1::2]
            if len(second):
                alike = two_halves(unit[first] @ unit[second].T, speaks[own])
                rows, partner = likest(alike, len(first))
                beyond = alike[rows, partner].clamp(max=1) > self.threshold
                into[first[rows[beyond]]] = second[partner[beyond]]
            start += length
        return into

    def macs(self, turn: Turn) -> int:
        """Windows cost a product for each row; pairs one for each row with half of the others."""
        if turn.block == self.near:
            return turn.before * turn.dim
        first, second = -(-turn.before // 2), turn.before // 2
        return first * second * turn.dim
