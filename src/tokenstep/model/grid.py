"""The dataflow of GPUs: the whole grid at every level, a few large operations, then one gather.

To embed the whole grid at every level is a third more than to embed it once, which a GPU does not
notice; to cut out what stays, as :mod:`tokenstep.model.windows` does, takes it many small steps.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenstep.core.partition import Grid
from tokenstep.core.same_size import SameSize, rows_at
from tokenstep.core.unmerge import sub_cell_index
from tokenstep.model import squares
from tokenstep.model.segmented import Segmented
from tokenstep.model.superpatches import Stem, Superpatches

PIXEL_FLOATS = 2**28  # logits of pixels at a time, in fp32 1 GiB


def embed(stem: Stem, pixels: Tensor, where: Superpatches, seen: Tensor | None) -> Tensor:
    """Features ``(n, D)`` of superpatches of ``pixels (B, 3, h, w)``, with their positions.

    ``seen (B, channels, H, W)`` is what the policy made of the pictures, if the tokens get it.
    """
    levels = min(where.highest, min(where.grid).bit_length() - 1) + 1
    # What a tracer makes is not kept: it has no numbers.
    make = pyramid_places if torch.compiler.is_compiling() else _kept_places
    places, count = make(where.grid, levels, pixels.device)
    # (n,) each: the place in the pyramid of a picture, and in those of all
    place = places[where.level, where.cell]
    row = torch.add(place, where.picture, alpha=count)
    maps = [stem.host.embed_grid(stem, canvas) for canvas in _canvases(stem, pixels, where, levels)]
    x = _flat(maps)[row]
    if stem.sub_patches is not None:
        within = _flat(_pooled(maps[0].movedim(-1, 1), levels))[row]
        x = torch.where(where.level.unsqueeze(1) > 0, x + stem.sub_patches(within), x)
    if stem.context is not None and seen is not None:
        x = x + stem.context(_flat(_pooled(seen, levels))[row].to(x.dtype))
    positions = stem.host.positions(stem, where.grid)
    return x if positions is None else x + _flat(_pooled(positions, levels))[place]


def pyramid_places(grid: Grid, levels: int, device: torch.device) -> tuple[Tensor, int]:
    """Place of the superpatch of each level over each cell, ``(levels, H * W)``; their number.

    A pyramid has its levels one after the other, from single patches up, each row by row.
    """
    rows, columns = (torch.arange(side, device=device) for side in grid)
    places, count = [], 0
    for level in range(levels):
        height, width = grid[0] >> level, grid[1] >> level
        places.append(count + (rows[:, None] >> level) * width + (columns >> level))
        count += height * width
    return torch.stack(places).flatten(1), count


_kept_places = lru_cache(maxsize=16)(torch.inference_mode(False)(pyramid_places))


def _canvases(stem: Stem, pixels: Tensor, where: Superpatches, levels: int) -> Iterator[Tensor]:
    """The pictures at each level, ``(B, 3, H * patch + 2 margin, ...)`` of its grid."""
    edge, patch, margin = stem.edge, stem.patch, stem.margin
    height, width = where.grid
    below, right = height * patch - pixels.shape[2], width * patch - pixels.shape[3]
    canvas = _padded(pixels, (edge, right + edge, edge, below + edge))
    for level in range(levels):
        if level:
            # Its border is as wide as before, and goes on as its own outermost pixels.
            canvas = _padded(F.avg_pool2d(canvas, 2), (edge // 2,) * 4)
        first = edge - margin
        last_row = first + (height >> level) * patch + 2 * margin
        last_column = first + (width >> level) * patch + 2 * margin
        yield canvas[:, :, first:last_row, first:last_column]


def _padded(pixels: Tensor, edges: tuple[int, ...]) -> Tensor:
    return F.pad(pixels, edges, mode="replicate") if any(edges) else pixels


def _pooled(maps: Tensor, levels: int) -> list[Tensor]:
    """Mean over each superpatch of each level of ``maps (B, C, H, W)``: ``(B, h, w, C)`` each."""
    every = [maps]
    for _ in range(1, levels):
        every.append(F.avg_pool2d(every[-1], 2))
    return [one.movedim(1, -1) for one in every]


def _flat(maps: Sequence[Tensor]) -> Tensor:
    """Maps ``(B, h, w, D)`` of all levels as the rows of pyramids, ``(B * places, D)``."""
    return torch.cat([one.flatten(1, 2) for one in maps], dim=1).flatten(0, 1)


def class_maps(segmented: Segmented) -> list[SameSize]:
    """Class of every pixel, ``(n, h, w)`` uint8 of the pictures of each size."""
    # (N * S, C): the logits of every token's sub-cells
    values = torch.cat([part.flatten(0, 1) for part in segmented.values])
    stacks = []
    for size, places in segmented.alike.items():
        height, width = segmented.grid(places[0])
        floats = height * width * segmented.patch**2 * values.shape[1]
        if floats > PIXEL_FLOATS:  # of one picture; squares bound their memory
            stacks.append(squares.stack_of(segmented, places))
            continue
        together = PIXEL_FLOATS // floats
        some = [places[first : first + together] for first in range(0, len(places), together)]
        maps = [_class_maps(segmented, values, few, size) for few in some]
        stacks.append(SameSize(places, maps[0] if len(maps) == 1 else torch.cat(maps)))
    return stacks


def _class_maps(
    segmented: Segmented, values: Tensor, places: Sequence[int], size: tuple[int, int]
) -> Tensor:
    """Class maps ``(n, h, w)`` of pictures of one ``size``, from ``values (N * S, C)``."""
    (height, width), patch = segmented.grid(places[0]), segmented.patch
    rows, level = (
        rows_at(cells, places)[:, :height, :width]
        for cells in (segmented.rows, segmented.partition)
    )
    # (n, C, H * side, W * side)
    picked = values[sub_cell_index(rows, level, segmented.side)].movedim(-1, 1).float()
    target = (height * patch, width * patch)
    scaled = F.interpolate(picked, target, mode="bilinear", align_corners=False)
    return scaled.argmax(1).to(torch.uint8)[:, : size[0], : size[1]]
