"""Stage 2 of 6: picture + partition -> PackedTokens.

A supertoken is the same patch embedding on the picture scaled down by its superpatch's side, at
the position embedding pooled over the superpatch (as CTS does for 2x2, CVPR 2023). Only the
selected superpatches are embedded.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tokenstep.core import ragged
from tokenstep.core.partition import Grid, grid_of, halved, uniform
from tokenstep.core.tokens import PackedTokens
from tokenstep.hosts.base import Host

Places = tuple[Tensor, Tensor, Tensor]  # picture, row and column of superpatches of one side

BAND_WINDOWS = 128  # windows cut out at a time, 1.5 MiB of 32 x 32 px: all would leave the caches


class Tokeniser(nn.Module):
    """Embeds the superpatches of a partition, adds positions and prefix tokens, and packs them."""

    def __init__(self, host: Host, *, sub_patches: bool, context: int = 0) -> None:
        super().__init__()
        self.host = host
        for name, part in host.before().items():
            setattr(self, name, part)
        self.patch, self.margin, self.prefix_count = host.patch, host.margin, host.prefix
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
        pictures: Sequence[Tensor],
        level: Tensor,
        context: Mapping[Grid, Tensor] | None = None,
    ) -> PackedTokens:
        """Tokens of ``pictures`` (each ``(3, h, w)``, normalised) under ``level (B, H, W)``.

        ``context`` is what the policy saw, ``(n, channels, H, W)`` of the pictures of each grid
        in their order, for a model that uses it.

        Raises:
            ValueError: ``level`` does not cover just the pictures' cells, or ``context`` is
                missing or not wanted.
        """
        if (context is None) != (self.context is None):
            raise ValueError("context must be given just where the model uses policy features")
        grids = [grid_of(picture.shape[-2:], self.patch) for picture in pictures]
        if not torch.equal(level >= 0, uniform(grids, level.device) >= 0):
            raise ValueError(
                f"the partition {tuple(level.shape)} does not fit pictures of {grids} patches"
            )
        _, height, width = level.shape
        features, anchors, sizes = [], [], []
        # Pictures of one grid share a canvas. One for all would be as high as the tallest and as
        # wide as the widest: many times their pixels.
        for grid in dict.fromkeys(grids):
            alike = [index for index, other in enumerate(grids) if other == grid]
            which = torch.tensor(alike, device=level.device)
            own = level if len(alike) == len(grids) else level[which, : grid[0], : grid[1]]
            seen = None if context is None else context[grid]
            for side, x, place in self._by_side([pictures[index] for index in alike], own, seen):
                picture, row, column = place
                features.append(x)
                anchors.append((which[picture] * height + row * side) * width + column * side)
                sizes.append(torch.full_like(picture, side * side))
        anchor, size = torch.cat(anchors), torch.cat(sizes)
        order = anchor.argsort()
        x = torch.cat(features)
        packed = self._pack(x, anchor[order], size[order], order=order, level=level)
        return packed.with_features(self.host.enter(self, packed.x))

    def _by_side(
        self, pictures: Sequence[Tensor], level: Tensor, seen: Tensor | None
    ) -> Iterator[tuple[int, Tensor, Places]]:
        """Superpatches of pictures of one grid, by side: the side, features ``(n, D)``, places."""
        _, height, width = level.shape
        positions = self.host.positions(self, (height, width))
        canvas = bordered(pictures, height * self.patch, width * self.patch, self.edge)
        scaled, reached = canvas, 0
        for rank in torch.unique(level).tolist():
            side = 1 << rank
            for _ in range(rank - reached):
                scaled = self._halved(scaled)
                seen = None if seen is None else halved(seen)
                positions = None if positions is None else halved(positions)
            reached = rank
            # Aligned squares: the top left cell of each superpatch lies on this stride.
            picture, row, column = (level[:, ::side, ::side] == rank).nonzero(as_tuple=True)
            place = (picture, row, column)
            x = self._embedded(self._windows(scaled), place)
            if self.sub_patches is not None and rank > 0:
                x = x + self.sub_patches(self._sub_patch_mean(canvas, side, place))
            if self.context is not None and seen is not None:
                x = x + self.context(seen[picture, :, row, column].to(x.dtype))
            if positions is not None:
                x = x + positions[0].permute(1, 2, 0)[row, column]
            yield side, x, place

    def _halved(self, canvas: Tensor) -> Tensor:
        """A canvas of half the size, whose border is as wide as before."""
        smaller = halved(canvas)
        height, width = smaller.shape[2:]
        return bordered(smaller.unbind(), height, width, self.edge // 2) if self.edge else smaller

    def _embedded(self, windows: Tensor, where: Places) -> Tensor:
        """Embed the ``windows (B, rows, columns, k, k, 3)`` at ``where``, ``(n, D)``, in bands."""
        bands = zip(*(torch.split(index, BAND_WINDOWS) for index in where), strict=True)
        found = [self.host.embed(self, windows[band].movedim(-1, 1)) for band in bands]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _windows(self, canvas: Tensor) -> Tensor:
        """View of every patch of a canvas with its margin: ``(B, rows, columns, k, k, 3)``."""
        start = self.edge - self.margin
        cut = canvas.movedim(1, -1)[:, start:, start:]
        extent = self.patch + 2 * self.margin
        windows = cut.unfold(1, extent, self.patch).unfold(2, extent, self.patch)
        return windows.movedim(3, -1)

    def _sub_patch_mean(self, canvas: Tensor, side: int, where: Places) -> Tensor:
        """Mean embedding of the single patches within each superpatch, ``(n, D)``."""
        picture, row, column = where
        inner = torch.arange(side, device=row.device)
        rows = (row[:, None] * side + inner)[:, :, None]
        columns = (column[:, None] * side + inner)[:, None, :]
        patches = self._windows(canvas)[picture[:, None, None], rows, columns]
        embedded = self.host.embed(self, patches.flatten(0, 2).movedim(-1, 1))
        return torch.unflatten(embedded, 0, (len(row), side**2)).mean(1)

    def _pack(
        self, x: Tensor, anchor: Tensor, size: Tensor, *, order: Tensor, level: Tensor
    ) -> PackedTokens:
        """Put the prefix rows before each picture's tokens, and say who owns which cell."""
        batch, height, width = level.shape
        count = self.prefix_count
        picture = anchor // (height * width)
        lengths = torch.bincount(picture, minlength=batch) + count
        offsets = ragged.offsets_of(lengths)
        place = torch.arange(len(anchor), device=x.device) + count * (picture + 1)
        rows = len(anchor) + count * batch
        prefix = offsets[:-1, None] + torch.arange(count, device=x.device)
        source = torch.empty(rows, dtype=torch.int64, device=x.device)
        source[place] = order + count
        source[prefix] = torch.arange(count, device=x.device).expand(batch, count)
        table = torch.cat([self.host.prefix_rows(self).to(x.dtype), x]) if count else x
        return PackedTokens(
            x=table[source],
            offsets=offsets,
            size=torch.ones_like(source).index_copy(0, place, size),
            anchor=torch.full_like(source, -1).index_copy(0, place, anchor),
            owner=owners(level),
        )


def bordered(pictures: Sequence[Tensor], height: int, width: int, edge: int) -> Tensor:
    """Lay pictures ``(3, h, w)`` on a canvas ``(B, 3, height + 2 edge, width + 2 edge)``.

    Beyond its own border a picture goes on as its border pixel for as far as the canvas goes: so
    what a window sees there does not depend on the other pictures. Channels are last in memory,
    so that windows are cut in long runs and as the stem's convolutions want them.
    """
    canvas = pictures[0].new_empty(len(pictures), height + 2 * edge, width + 2 * edge, 3)
    for index, picture in enumerate(pictures):
        sheet = canvas[index]
        bottom, right = edge + picture.shape[1], edge + picture.shape[2]
        sheet[edge:bottom, edge:right] = picture.movedim(0, -1)
        sheet[edge:bottom, :edge] = sheet[edge:bottom, edge : edge + 1]
        sheet[edge:bottom, right:] = sheet[edge:bottom, right - 1 : right]
        sheet[:edge] = sheet[edge]
        sheet[bottom:] = sheet[bottom - 1]
    return canvas.movedim(-1, 1)


def owners(level: Tensor) -> Tensor:
    """Anchor of each cell of a partition ``level (B, H, W)``: the top left cell, -1 outside."""
    batch, height, width = level.shape
    side = 1 << level.clamp(min=0).long()
    rows = torch.arange(height, device=level.device).view(1, -1, 1)
    columns = torch.arange(width, device=level.device).view(1, 1, -1)
    pictures = torch.arange(batch, device=level.device).view(-1, 1, 1)
    top, left = rows - rows % side, columns - columns % side
    return torch.where(level < 0, -1, (pictures * height + top) * width + left)
