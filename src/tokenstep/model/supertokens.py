"""Stage 2 of 6: picture + partition -> PackedTokens.

A supertoken is the same patch embedding on the picture scaled down by its superpatch's side, at
the position embedding pooled over the superpatch (as CTS does for 2x2, CVPR 2023). How they are
embedded is the dataflow's business: :mod:`tokenstep.model.dataflow`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tokenstep.core.partition import Grid, grid_of, level_of, uniform
from tokenstep.core.ragged import Segments, offsets_of, rows_of
from tokenstep.core.same_size import SameSize, sizes_of
from tokenstep.core.tokens import PackedTokens
from tokenstep.hosts.base import Host
from tokenstep.model.dataflow import DATAFLOWS, Flow
from tokenstep.model.superpatches import Superpatches
from tokenstep.policies.batch import require_finite


class Tokeniser(nn.Module):
    """Embeds the superpatches of a partition, adds positions and prefix tokens, and packs them.

    ``sides`` are those that superpatches may have, in patches.
    """

    def __init__(
        self, host: Host, *, sides: Sequence[int], sub_patches: bool, context: int = 0
    ) -> None:
        super().__init__()
        self.host = host
        for name, part in host.before().items():
            setattr(self, name, part)
        self.patch, self.margin, self.prefix_count = host.patch, host.margin, host.prefix
        self.highest = max((level_of(side) for side in sides), default=0)
        # In whole fours, so that half of it, less what a last odd row takes, is still a border.
        self.edge = -(-self.margin // 4) * 4
        # Zero at the start, so that switching it on changes nothing until it is trained (APT).
        self.sub_patches = nn.Linear(host.dim, host.dim) if sub_patches else None
        if self.sub_patches is not None:
            nn.init.zeros_(self.sub_patches.weight)
            nn.init.zeros_(self.sub_patches.bias)

        self.context = None
        if context:
            self.context = nn.Sequential(
                nn.LayerNorm(context),
                nn.Linear(context, host.dim),
                nn.GELU(),
                nn.Linear(host.dim, host.dim),
            )

    @torch.no_grad()
    def begin_without_context(self) -> None:
        """Let what the policy saw add nothing until it is trained, as pretrained blocks expect."""
        if self.context is not None:
            last = cast(nn.Linear, self.context[-1])
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self,
        groups: Sequence[SameSize],
        level: Tensor,
        context: Sequence[Tensor] | None = None,
        finite: Tensor | None = None,
        counts: Sequence[int] | None = None,
        flow: str = "windows",
    ) -> PackedTokens:
        """Tokens of normalised pictures under ``level (B, H, W)``.

        ``context`` is what the policy saw, ``(n, channels, H, W)`` of each group, for a model that
        uses it; ``finite``, ``()`` bool, says whether the scores that made ``level`` are.
        ``counts`` are the tokens of each picture, if they are known without looking: then no trip
        to the host is made, and neither ``finite`` nor ``level`` is checked.

        Raises:
            ValueError: ``level`` does not cover just the pictures' cells or has larger
                superpatches than the model, or ``context`` is missing or not wanted.
            TokenstepError: the scores are not finite.
        """
        if (context is None) != (self.context is None):
            raise ValueError("context must be given just where the model uses policy features")
        grids = [grid_of(size, self.patch) for size in sizes_of(groups)]
        if level.shape != uniform(grids, torch.device("meta")).shape:
            raise self._misfit(level, grids)
        level, prefix = level.long(), self.prefix_count
        owner = owners(level)
        cells = torch.arange(owner.numel(), device=owner.device).view_as(owner)
        # (B, prefix + H * W): whether a prefix row or a cell has a token of its own
        speaks = nn.functional.pad((owner == cells).flatten(1), (prefix, 0), value=True)
        rows = speaks.sum(1)
        cells_of = tuple(height * width for height, width in grids)
        if counts is None:
            sound = self._fits(level, owner, speaks, grids) if finite is None else finite
            lengths = self._lengths(rows, sound)
            require_finite(finite is None or bool(lengths))
            if not lengths:
                raise self._misfit(level, grids)
        else:
            lengths = [prefix + count for count in counts]
        segments = Segments(offsets_of(rows), tuple(lengths))
        index, picture = rows_of(speaks.flatten(), segments.total), segments.picture
        # (T,) each: the cell of a row in its picture, below 0 that of a prefix row
        cell = torch.add(index - prefix, picture, alpha=-speaks.shape[1])
        is_prefix = cell < 0
        anchor = torch.where(is_prefix, -1, torch.add(cell, picture, alpha=owner[0].numel()))
        rank = level.flatten()[anchor]  # of a prefix row what the last cell has
        merges = counts is None or tuple(counts) != cells_of
        speaker, highest = torch.where(is_prefix, -1, picture), self.highest if merges else 0
        every = _Rows(segments, speaker, cell, rank, level.shape[2], highest)
        return PackedTokens(
            x=self.host.enter(self, self._features(every, groups, context, DATAFLOWS[flow])),
            segments=segments,
            size=torch.where(is_prefix, 1, 1 << 2 * rank),
            anchor=anchor,
            owner=owner,
            prefix=prefix,
            grids=tuple(grids),
        )

    def _features(
        self,
        rows: "_Rows",
        groups: Sequence[SameSize],
        context: Sequence[Tensor] | None,
        flow: Flow,
    ) -> Tensor:
        """Features ``(T, D)`` of all rows, before the first block."""
        prefix = self.prefix_count
        table = [self.host.prefix_rows(self)] if prefix else []
        source = rows.cell + prefix  # where a row's features are: those of prefix rows come first
        begin = prefix
        for number, group in enumerate(groups):
            own, where = rows.of(group.places, prefix, grid_of(group.size, self.patch))
            seen = None if context is None else context[number]
            table.append(flow.embed(self, group.pixels, where, seen))
            source[own] = torch.arange(begin, begin + len(own), device=own.device)
            begin += len(own)
        return torch.cat([part.to(table[-1].dtype) for part in table])[source]

    def _lengths(self, counts: Tensor, sound: Tensor) -> list[int]:
        """Rows of each picture, in one trip to the host; none if it says that all is not sound."""
        lengths: list[int]
        *lengths, good = torch.cat([counts, sound.unsqueeze(0)]).tolist()
        return lengths if good else []

    def _fits(self, level: Tensor, owner: Tensor, speaks: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Whether a partition is one of these grids, as ``()`` bool where it lies.

        Superpatches are whole, and cover the cells of each picture and no others.
        """
        inside = uniform(grids, level.device) >= 0
        first = speaks[:, self.prefix_count :].view_as(level)
        area = torch.where(first & inside, 1 << 2 * level.clamp(min=0), 0).sum()
        torn = inside & (level.flatten()[owner] != level)
        misfit = ((level >= 0) != inside) | torn | (level > self.highest)
        return ~misfit.any() & (area == inside.sum())

    def _misfit(self, level: Tensor, grids: Sequence[Grid]) -> ValueError:
        return ValueError(
            f"the partition {tuple(level.shape)} does not fit pictures of {grids} patches, or has "
            f"superpatches that are torn or larger than {1 << self.highest} patches a side"
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a batch before they have features, ``(T,)`` int64 each."""

    segments: Segments
    picture: Tensor  # -1 for a prefix row
    cell: Tensor  # in the picture, on the grid of the batch
    level: Tensor
    width: int  # of that grid
    highest: int  # level that any of them may have

    def of(self, places: Sequence[int], prefix: int, grid: Grid) -> tuple[Tensor, Superpatches]:
        """Rows ``(n,)`` of the superpatches of the pictures at ``places``, all of one ``grid``."""
        lengths, picture = self.segments.lengths, self.picture
        if len(places) < len(lengths):
            number = picture.new_full((len(lengths) + 1,), -1)  # the last place is that of -1
            number[torch.tensor(places, device=picture.device)] = torch.arange(
                len(places), device=picture.device
            )
            picture = number[picture]
        rows = rows_of(picture >= 0, sum(lengths[place] - prefix for place in places))
        cell = self.cell[rows]
        if grid[1] < self.width:
            cell = cell // self.width * grid[1] + cell % self.width
        return rows, Superpatches(picture[rows], cell, self.level[rows], self.highest, grid)


def owners(level: Tensor) -> Tensor:
    """Anchor of each cell of a partition ``level (B, H, W)``: the top left cell, -1 outside."""
    batch, height, width = level.shape
    rows = torch.arange(height, device=level.device).view(1, -1, 1)
    columns = torch.arange(width, device=level.device).view(1, 1, -1)
    begin = torch.arange(0, batch * height * width, height * width, device=level.device)
    mask = -1 << level.clamp(min=0).long()  # of the bits that count superpatches of that side
    first = torch.add(columns & mask, rows & mask, alpha=width) + begin.view(-1, 1, 1)
    return torch.where(level < 0, -1, first)
