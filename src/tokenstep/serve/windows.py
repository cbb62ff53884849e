"""Large pictures in overlapping windows: one result, joined from theirs.

Windows begin, and hand over to one another, at whole superpatches of the largest size. So the
joined partition is one of the whole picture's grid, and what is seen of a pixel reaches at least
one such superpatch further on all sides.
"""

from collections.abc import Sequence
from dataclasses import fields
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenstep.config import Spending
from tokenstep.core.attention import pick_backend
from tokenstep.core.partition import grid_of
from tokenstep.errors import TokenstepError
from tokenstep.measure.machine import available_bytes
from tokenstep.model.any_segmenter import AnySegmenter
from tokenstep.model.cost import Cost
from tokenstep.model.dataflow import flow_for
from tokenstep.model.grid import PIXEL_FLOATS
from tokenstep.model.result import Result
from tokenstep.model.segmented import TokenUse, first_cells
from tokenstep.model.segmenter import Segmenter
from tokenstep.model.spending import as_keyword

WINDOW = 2048  # px, side of the windows of a picture that does not fit in memory
# What a dense batch holds at its peak, from above (measured: docs/performance.md): floats of each
# token's features, and bytes of each pixel.
FEATURES_PER_TOKEN, BYTES_PER_PIXEL = 14, 200
# The same of each cell of the grid that all pictures of a batch are numbered on, and floats of each
# row, as wide as a token's features, that the attention back end "padded" fills up with.
BYTES_PER_CELL, FEATURES_PADDED = 64, 4


class Span(NamedTuple):
    """Pixels of a window along one axis, and those of them whose result is kept."""

    start: int
    end: int
    first: int
    last: int  # exclusive, as ``end``


def unit_of(model: AnySegmenter) -> int:
    """Pixels a side of the largest superpatch, in whose multiples windows are laid."""
    return model.patch * max(model.config.policy.sizes, default=1)


def require_side(model: AnySegmenter, side: int) -> None:
    """Refuse windows too small for a model.

    Raises:
        TokenstepError: ``side`` is less than four of the largest superpatches, or the model brings
            whatever it is given to a size of its own.
    """
    if model.resizes:
        raise TokenstepError(f"tile {side}: this model has windows of its own; leave --tile out")
    unit = unit_of(model)
    if side < 4 * unit:
        raise TokenstepError(
            f"tile {side}: windows of this model overlap by {2 * unit} px, give {4 * unit} or more"
        )


def spans(length: int, side: int, unit: int) -> list[Span]:
    """Cover ``length`` pixels by windows of ``side`` at most that overlap by two units or more.

    ``side`` is four units or more.
    """
    side -= side % unit
    stride = side - 2 * unit
    beyond = max(0, length - side)
    count = 1 + -(-beyond // stride)
    # The last begins early enough to be whole, but at a whole superpatch.
    starts = [min(number * stride, -(-beyond // unit) * unit) for number in range(count)]
    ends = [min(start + side, length) for start in starts]
    cuts = [
        (start + end) // 2 // unit * unit for start, end in zip(starts[1:], ends[:-1], strict=True)
    ]
    return [Span(*one) for one in zip(starts, ends, [0, *cuts], [*cuts, length], strict=True)]


def fits(model: AnySegmenter, pictures: Sequence[Tensor]) -> bool:
    """Whether a batch ``(3, h, w)`` fits into the memory that is free, where that is known.

    A single picture within one window is always tried as it is, and so is whatever a model brings
    to a size of its own.
    """
    if not isinstance(model, Segmenter):
        return True
    if len(pictures) == 1 and max(pictures[0].shape) <= WINDOW:
        return True
    free = available_bytes(model.device)
    return free is None or needed_bytes(model, pictures) < free


def needed_bytes(model: Segmenter, pictures: Sequence[Tensor]) -> int:
    """What a dense batch ``(3, h, w)`` holds at its peak, estimated from above."""
    grids = [grid_of(picture.shape[-2:], model.patch) for picture in pictures]
    cells = [rows * columns for rows, columns in grids]
    numbered = len(grids) * max(rows for rows, _ in grids) * max(columns for _, columns in grids)
    dim = model.encoder.host.dim
    logits = len(model.config.classes) * model.config.vit.cells**2
    floats = (FEATURES_PER_TOKEN * dim + logits) * sum(cells)
    if pick_backend(model.encoder.settings.backend, next(model.parameters())) == "padded":
        floats += FEATURES_PADDED * dim * (len(cells) * max(cells) - sum(cells))
    pixels = sum(cells) * model.patch**2
    if flow_for(model.dataflow, model.device) == "grid":  # logits of pixels, and scaled up
        floats += 2 * min(PIXEL_FLOATS, len(model.config.classes) * pixels)
    return BYTES_PER_PIXEL * pixels + BYTES_PER_CELL * numbered + 4 * floats


@torch.inference_mode()
def segment_tiled(
    model: AnySegmenter, picture: Tensor, *, side: int, spending: Spending, batch: int = 1
) -> Result:
    """Segment ``picture (3, h, w)`` in windows of at most ``side`` pixels, ``batch`` at a time.

    A picture that fits into one window gives what :meth:`Segmenter.segment` gives. Tokens,
    GMAC (the dense ones too) and milliseconds are sums over all windows, overlaps included.

    Raises:
        TokenstepError: ``side`` is less than four of the largest superpatches, or the logits are
            not finite.
    """
    require_side(model, side)
    height, width = picture.shape[-2:]
    unit = unit_of(model)
    places = list(product(spans(height, side, unit), spans(width, side, unit)))
    results: list[Result] = []
    for number in range(0, len(places), batch):
        windows = [
            picture[:, rows.start : rows.end, columns.start : columns.end]
            for rows, columns in places[number : number + batch]
        ]
        results += model.segment_batch(windows, **as_keyword(spending))
    return _joined(places, results, (height, width))


def _joined(
    places: Sequence[tuple[Span, Span]], results: Sequence[Result], size: tuple[int, int]
) -> Result:
    first = results[0]
    patch = first.patch
    grid = grid_of(size, patch)
    labels = np.empty(size, first.labels.dtype)
    level = np.empty(grid, first.tokens.level.dtype)
    layer = np.empty(grid, first.tokens.layer.dtype)
    dropped = np.empty(grid, first.tokens.dropped.dtype)
    owner = np.empty(grid, first.tokens.owner.dtype)
    for number, ((rows, columns), result) in enumerate(zip(places, results, strict=True)):
        # Each window counts its cells from 0: names of their own until all are in place.
        own = result.tokens.owner + number * owner.size
        for whole, part, scale in (
            (labels, result.labels, 1),
            (level, result.tokens.level, patch),
            (layer, result.tokens.layer, patch),
            (dropped, result.tokens.dropped, patch),
            (owner, own, patch),
        ):
            kept, source = zip(*(_slices(span, scale) for span in (rows, columns)), strict=True)
            whole[kept] = part[source]
    uses = [result.tokens for result in results]
    return Result(
        labels=labels,
        class_names=first.class_names,
        palette=first.palette,
        tokens=TokenUse(
            grid=grid[0] * grid[1],
            start=sum(use.start for use in uses),
            end=sum(use.end for use in uses),
            halted={after: sum(use.halted[after] for use in uses) for after in uses[0].halted},
            level=level,
            layer=layer,
            dropped=dropped,
            depth=uses[0].depth,
            owner=first_cells(owner),
            live=tuple(map(sum, zip(*(use.live for use in uses), strict=True))),
        ),
        cost=_sum([result.cost for result in results]),
        dense_cost=_sum([result.dense_cost for result in results]),
        patch=patch,
        milliseconds={
            stage: sum(result.milliseconds[stage] for result in results)
            for stage in first.milliseconds
        },
        windows=len(results),
    )


def _slices(span: Span, scale: int) -> tuple[slice, slice]:
    """Where the kept part of a window lies in the whole and in the window, ``scale`` px a step."""
    whole = slice(span.first // scale, -(-span.last // scale))
    begin = span.start // scale
    return whole, slice(whole.start - begin, whole.stop - begin)


def _sum(costs: Sequence[Cost]) -> Cost:
    return Cost(*(sum(getattr(cost, one.name) for cost in costs) for one in fields(Cost)))
