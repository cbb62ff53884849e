"""Stage 2 of 6: picture + partition -> PackedTokens.

A supertoken is the same patch embedding on the picture scaled down by its superpatch's side, at
the position embedding pooled over the superpatch (as CTS does for 2x2, CVPR 2023). How they are
embedded is the dataflow's business: :mod:`tokenstep.model.dataflow`.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tokenstep.core.partition import grid_of, level_of, uniform
from tokenstep.core.ragged import Segments, offsets_of, rows_of
from tokenstep.core.same_size import SameSize, sizes_of
from tokenstep.core.tokens import PackedTokens
from tokenstep.hosts.base import Host
from tokenstep.model.dataflow import DATAFLOWS
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
        flow: str = "windows",
    ) -> PackedTokens:
        """Tokens of normalised pictures under ``level (B, H, W)``.

        ``context`` is what the policy saw, ``(n, channels, H, W)`` of each group, for a model that
        uses it; ``finite``, ``()`` bool, says whether the scores that made ``level`` are.

        Raises:
            ValueError: ``level`` does not cover just the pictures' cells or has larger
                superpatches than the model, or ``context`` is missing or not wanted.
            TokenstepError: the scores are not finite.
        """
        if (context is None) != (self.context is None):
            raise ValueError("context must be given just where the model uses policy features")
        owner, prefix = owners(level), self.prefix_count
        # (B, prefix + H * W): whether a prefix row or a cell has a token of its own
        first = owner.flatten(1) == torch.arange(owner.numel(), device=owner.device).view(
            len(owner), -1
        )
        speaks = nn.functional.pad(first, (prefix, 0), value=True)
        segments = self._segments(speaks, groups, level, finite)
        index = rows_of(speaks.flatten(), segments.total)
        # (T,) each: the picture, and its cell or, below 0, its prefix row
        picture, cell = index // speaks.shape[1], index % speaks.shape[1] - prefix
        is_prefix = cell < 0
        anchor = torch.where(is_prefix, -1, index - (picture + 1) * prefix)
        rank = level.flatten()[anchor].long()  # of a prefix row what the last cell has
        width = level.shape[2]
        tokens = [length - prefix for length in segments.lengths]
        speaker = torch.where(is_prefix, -1, picture)
        # The rows of a table, prefix rows first, and of it the one that each token gets.
        table, source = [self.host.prefix_rows(self)] if prefix else [], cell + prefix
        begin = prefix
        for number, group in enumerate(groups):
            rows, stack = _rows_of(group.places, speaker, tokens)
            own, grid = cell[rows], grid_of(group.size, self.patch)
            where = Superpatches(stack, own // width, own % width, rank[rows], grid)
            seen = None if context is None else context[number]
            table.append(DATAFLOWS[flow].embed(self, group.pixels, where, seen))
            source[rows] = torch.arange(begin, begin + len(rows), device=rows.device)
            begin += len(rows)
        x = torch.cat([part.to(table[-1].dtype) for part in table])[source]
        return PackedTokens(
            x=self.host.enter(self, x),
            segments=segments,
            size=torch.where(is_prefix, 1, 1 << 2 * rank),
            anchor=anchor,
            owner=owner,
        )

    def _segments(
        self, speaks: Tensor, groups: Sequence[SameSize], level: Tensor, finite: Tensor | None
    ) -> Segments:
        """Where each picture's rows will lie; one trip to the host brings back any fault too."""
        counts = speaks.sum(1)
        grids = [grid_of(size, self.patch) for size in sizes_of(groups)]
        fault = ValueError(
            f"the partition {tuple(level.shape)} does not fit pictures of {grids} patches, or has "
            f"larger superpatches than {1 << self.highest} patches a side"
        )
        if finite is None:
            inside = uniform(grids, level.device) >= 0
            if inside.shape != level.shape:
                raise fault
            wrong = (((level >= 0) != inside) | (level > self.highest)).any()
        else:
            wrong = ~finite
        *lengths, faults = torch.cat([counts, wrong.unsqueeze(0)]).tolist()
        require_finite(finite is None or not faults)
        if faults:
            raise fault
        return Segments(offsets_of(counts), tuple(lengths))


def _rows_of(
    places: Sequence[int], picture: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Rows of the tokens of some pictures, ``(n,)``, and which of these each belongs to.

    ``picture (T,)`` is that of each row, -1 of a prefix row; ``counts`` are the pictures' tokens.
    """
    if len(places) < len(counts):
        number = picture.new_full((len(counts) + 1,), -1)  # the last place is that of -1
        number[torch.tensor(places, device=picture.device)] = torch.arange(
            len(places), device=picture.device
        )
        picture = number[picture]
    rows = rows_of(picture >= 0, sum(counts[place] for place in places))
    return rows, picture[rows]


def owners(level: Tensor) -> Tensor:
    """Anchor of each cell of a partition ``level (B, H, W)``: the top left cell, -1 outside."""
    batch, height, width = level.shape
    side = 1 << level.clamp(min=0).long()
    rows = torch.arange(height, device=level.device).view(1, -1, 1)
    columns = torch.arange(width, device=level.device).view(1, 1, -1)
    pictures = torch.arange(batch, device=level.device).view(-1, 1, 1)
    top, left = rows & -side, columns & -side
    return torch.where(level < 0, -1, (pictures * height + top) * width + left)
