"""The dataflow of CPUs, its first half: only the superpatches that stay are cut out and embedded.

A picture is scaled down level by level, and windows of it are cut where superpatches of that level
lie. The second half is :mod:`tokenstep.model.squares`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tokenstep.core.partition import halved
from tokenstep.model.superpatches import Stem, Superpatches

BAND_WINDOWS = 128  # windows cut out at a time, 1.5 MiB of 32 x 32 px: all would leave the caches

Places = tuple[Tensor, Tensor, Tensor]  # picture, row and column of superpatches of one side


def embed(stem: Stem, pixels: Tensor, where: Superpatches, seen: Tensor | None) -> Tensor:
    """Features ``(n, D)`` of superpatches of ``pixels (B, 3, h, w)``, with their positions.

    ``seen (B, channels, H, W)`` is what the policy made of the pictures, if the tokens get it.
    """
    found: Tensor | None = None
    for rows, features in _by_level(stem, pixels, where, seen):
        if len(rows) == len(where.level):
            return features
        if found is None:
            found = features.new_empty(len(where.level), features.shape[1])
        found.index_copy_(0, rows, features)
    assert found is not None
    return found


def _by_level(
    stem: Stem, pixels: Tensor, where: Superpatches, seen: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the superpatches of each level, and their features."""
    height, width = where.grid
    positions = stem.host.positions(stem, where.grid)
    canvas = bordered(pixels, height * stem.patch, width * stem.patch, stem.edge)
    scaled, reached = canvas, 0
    for level in torch.unique(where.level).tolist():
        for _ in range(level - reached):
            scaled = _halved(stem, scaled)
            seen = None if seen is None else halved(seen)
            positions = None if positions is None else halved(positions)
        reached = level
        rows = (where.level == level).nonzero().squeeze(1)
        cell = where.cell[rows]
        place = (where.picture[rows], cell // width >> level, cell % width >> level)
        x = _embedded(stem, _windows(stem, scaled), place)
        if stem.sub_patches is not None and level > 0:
            x = x + stem.sub_patches(_sub_patch_mean(stem, canvas, 1 << level, place))
        if stem.context is not None and seen is not None:
            x = x + stem.context(seen[place[0], :, place[1], place[2]].to(x.dtype))
        if positions is not None:
            x = x + positions[0].permute(1, 2, 0)[place[1], place[2]]
        yield rows, x


def _halved(stem: Stem, canvas: Tensor) -> Tensor:
    """A canvas of half the size, whose border is as wide as before."""
    smaller = halved(canvas)
    height, width = smaller.shape[2:]
    return bordered(smaller, height, width, stem.edge // 2) if stem.edge else smaller


def _embedded(stem: Stem, windows: Tensor, where: Places) -> Tensor:
    """Embed the ``windows (B, rows, columns, k, k, 3)`` at ``where``, ``(n, D)``, in bands."""
    bands = zip(*(torch.split(index, BAND_WINDOWS) for index in where), strict=True)
    found = [stem.host.embed(stem, windows[band].movedim(-1, 1)) for band in bands]
    return found[0] if len(found) == 1 else torch.cat(found)


def _windows(stem: Stem, canvas: Tensor) -> Tensor:
    """View of every patch of a canvas with its margin: ``(B, rows, columns, k, k, 3)``."""
    start = stem.edge - stem.margin
    cut = canvas.movedim(1, -1)[:, start:, start:]
    extent = stem.patch + 2 * stem.margin
    windows = cut.unfold(1, extent, stem.patch).unfold(2, extent, stem.patch)
    return windows.movedim(3, -1)


def _sub_patch_mean(stem: Stem, canvas: Tensor, side: int, where: Places) -> Tensor:
    """Mean embedding of the single patches within each superpatch, ``(n, D)``."""
    picture, row, column = where
    inner = torch.arange(side, device=row.device)
    rows = (row[:, None] * side + inner)[:, :, None]
    columns = (column[:, None] * side + inner)[:, None, :]
    patches = _windows(stem, canvas)[picture[:, None, None], rows, columns]
    embedded = stem.host.embed(stem, patches.flatten(0, 2).movedim(-1, 1))
    return torch.unflatten(embedded, 0, (len(row), side**2)).mean(1)


def bordered(pictures: Tensor | Sequence[Tensor], height: int, width: int, edge: int) -> Tensor:
    """Lay pictures ``(3, h, w)`` on a canvas ``(B, 3, height + 2 edge, width + 2 edge)``.

    Beyond its own border a picture goes on as its border pixel for as far as the canvas goes.
    Channels are last in memory, so that windows are cut in long runs and as the stem's
    convolutions want them.
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
