"""The dataflow of CPUs, its second half: logits of tokens -> the class of every pixel, by squares.

Only the few squares of pixels between sub-cells of different classes are interpolated. The first
half is :mod:`tokenstep.model.windows`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenstep.core.same_size import SameSize
from tokenstep.core.unmerge import sub_cell_index
from tokenstep.model.segmented import Segmented

BAND_FLOATS = 4 * 2**20  # logits of the pixels looked at together: 16 MiB in fp32


def class_maps(segmented: Segmented) -> list[SameSize]:
    """Class of every pixel, ``(n, h, w)`` uint8 of the pictures of each size."""
    return [stack_of(segmented, places) for places in segmented.alike.values()]


def stack_of(segmented: Segmented, places: Sequence[int]) -> SameSize:
    """Class of every pixel of pictures of one size."""
    height, width = segmented.grid(places[0])
    maps = []
    for place in places:
        rows, level = (
            cells[place, :height, :width] for cells in (segmented.rows, segmented.partition)
        )
        size = segmented.sizes[place]
        maps.append(label_map(segmented.values, rows, level, patch=segmented.patch, size=size))
    return SameSize(tuple(places), torch.stack(maps))


def label_map(
    values: Sequence[Tensor], rows: Tensor, level: Tensor, *, patch: int, size: tuple[int, int]
) -> Tensor:
    """Class of every pixel of one picture, ``(h, w)`` uint8.

    ``values`` are the logits ``(T, S, C)`` of the live tokens and, if any halted, theirs;
    ``rows (H, W)``, which counts through both, and ``level (H, W)`` say which one speaks for each
    cell. The result is the argmax of the sub-cells' logits scaled up bilinearly. Where the four
    sub-cells around a pixel agree on a class, so does every mixture of them: only the squares
    between four that do not, a few in a hundred, are interpolated.
    """
    parts = [part.flatten(0, 1) for part in values]
    index = sub_cell_index(rows, level, round(values[0].shape[1] ** 0.5))
    best = torch.cat([part.max(dim=1).indices.to(torch.uint8) for part in parts])
    down = _Axis.of(rows.shape[0] * patch, index.shape[0], rows.device)
    across = _Axis.of(rows.shape[1] * patch, index.shape[1], rows.device)
    # A border of sub-cells all round, as bilinear scaling repeats them.
    index = index[down.cells][:, across.cells]
    fine = best[index]
    labels = fine.index_select(1, across.square).index_select(0, down.square)

    beside = fine[:, 1:] != fine[:, :-1]
    mixed = (fine[1:] != fine[:-1])[:, 1:] | beside[1:] | beside[:-1]
    mixed &= (down.count > 0)[:, None] & (across.count > 0)
    tops, lefts = mixed.nonzero(as_tuple=True)
    classes = parts[0].shape[1]
    band = max(1, BAND_FLOATS // (down.most * across.most * classes))
    for top, left in zip(torch.split(tops, band), torch.split(lefts, band), strict=True):
        corners = [index[top + below, left + right] for below in (0, 1) for right in (0, 1)]
        picked = _rows_of(parts, torch.cat(corners)).float()
        # The squares last in memory, since there are many more of them than classes.
        picked = picked.view(2, 2, len(top), classes).permute(3, 0, 1, 2).contiguous()
        y, x = down.pixels(top), across.pixels(left)
        scaled = torch.lerp(picked[:, :, :1], picked[:, :, 1:], across.weight[x])
        scaled = torch.lerp(scaled[:, :1], scaled[:, 1:], down.weight[y][:, None])
        labels[y[:, None], x] = scaled.max(0).indices.to(torch.uint8)
    return labels[: size[0], : size[1]]


@dataclass(frozen=True, slots=True)
class _Axis:
    """How bilinear scaling lays pixels between sub-cells along one axis.

    Square ``k`` lies between the centres of sub-cells ``k - 1`` and ``k``; the first and the last
    have one on both sides.
    """

    cells: Tensor  # the sub-cells with the first and the last one twice
    square: Tensor  # of each pixel
    weight: Tensor  # of each pixel: how near it is to the second of its square's sub-cells
    start: Tensor  # first pixel of each square
    count: Tensor  # pixels of each square
    most: int  # the largest count

    @classmethod
    def of(cls, pixels: int, cells: int, device: torch.device) -> "_Axis":
        centre = (torch.arange(pixels, device=device) + 0.5) * (cells / pixels) + 0.5
        square = centre.long()
        count = torch.bincount(square, minlength=cells + 1)
        return cls(
            torch.arange(-1, cells + 1, device=device).clamp(0, cells - 1),
            square,
            centre - square,
            count.cumsum(0) - count,
            count,
            -(-pixels // cells),
        )

    def pixels(self, squares: Tensor) -> Tensor:
        """Pixels of ``squares (n,)``, ``(most, n)``; one with fewer repeats its last."""
        steps = torch.arange(self.most, device=squares.device)[:, None]
        return self.start[squares] + torch.minimum(steps, self.count[squares] - 1)


def _rows_of(parts: Sequence[Tensor], index: Tensor) -> Tensor:
    """Rows ``index`` of ``cat(parts)``, without making that copy of all logits."""
    live = parts[0]
    if len(parts) == 1:
        return live[index]
    halted = parts[1]
    beyond = index - len(live)
    if not len(live):
        return halted[beyond]
    picked = live[index.clamp(max=len(live) - 1)]
    where = (beyond >= 0).nonzero(as_tuple=True)
    picked[where] = halted[beyond[where]].to(live.dtype)
    return picked
