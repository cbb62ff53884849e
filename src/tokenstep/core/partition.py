"""Stage 1b of 6: homogeneity scores -> a partition of the grid into superpatches.

A partition is ``level (B, H, W)`` int8: the cell lies in a superpatch of side ``2 ** level``
patches, aligned at multiples of its side; 0 is a single patch, -1 lies outside the picture.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]

# Scores of each size and the partition without merging -> a partition, of pictures of one grid.
Plan = Callable[[Sequence[Tensor], Tensor], Tensor]


def grid_of(size: Sequence[int], patch: int) -> Grid:
    """Patch grid ``(H, W)`` of a picture of ``size`` (h, w), rounded up."""
    height, width = size
    return -(-height // patch), -(-width // patch)


def uniform(grids: Sequence[Grid], device: torch.device | None = None) -> Tensor:
    """The partition without merging: every cell of every picture is a single patch."""
    height, width = (max(side) for side in zip(*grids, strict=True))
    if all(grid == (height, width) for grid in grids):
        return torch.zeros(len(grids), height, width, dtype=torch.int8, device=device)
    rows = torch.arange(height, device=device).view(1, -1, 1)
    columns = torch.arange(width, device=device).view(1, 1, -1)
    bounds = torch.tensor(grids, device=device)
    inside = (rows < bounds[:, 0].view(-1, 1, 1)) & (columns < bounds[:, 1].view(-1, 1, 1))
    return inside.to(torch.int8) - 1


def by_threshold(
    scores: Sequence[Tensor], empty: Tensor, *, sizes: Sequence[int], thresholds: Sequence[float]
) -> Tensor:
    """Take superpatches coarse to fine where their score passes and no larger one covers them.

    ``scores[k]`` is ``(B, H // sizes[k], W // sizes[k])`` in 0..1 and is taken where it is
    greater than ``thresholds[k]``; ``empty`` is the partition without merging (:func:`uniform`) of
    pictures that fill the whole grid. A superpatch that would hang over the border is not formed.

    Raises:
        ValueError: the three sequences differ in length, or a size is no power of two above 1.
    """
    if not len(scores) == len(sizes) == len(thresholds):
        raise ValueError(
            f"scores, sizes and thresholds must have one entry per size, "
            f"got {len(scores)}, {len(sizes)} and {len(thresholds)}"
        )
    level = empty.clone()
    # Fine to coarse, so that a larger superpatch overwrites those that it covers.
    for size, score, threshold in sorted(
        zip(sizes, scores, thresholds, strict=True), key=lambda entry: entry[0]
    ):
        _place(level, size, score > threshold)
    return level


def level_of(size: int) -> int:
    """Level of a superpatch side: 2 -> 1, 4 -> 2, 8 -> 3, 16 -> 4."""
    if size < 2 or size & (size - 1):
        raise ValueError(f"a superpatch side must be a power of two above 1, got {size}")
    return size.bit_length() - 1


def halved(maps: Tensor) -> Tensor:
    """Mean of each 2x2 square of ``maps (B, C, H, W)``: ``(B, C, H // 2, W // 2)``.

    On a CPU several times as fast as the pooling of torch.
    """
    height, width = maps.shape[2] // 2 * 2, maps.shape[3] // 2 * 2
    upper, lower = maps[:, :, 0:height:2, :width], maps[:, :, 1:height:2, :width]
    rows = upper + lower
    return (rows[..., ::2] + rows[..., 1::2]).div_(4)


def purity(labels: Tensor, side: int, classes: int, ignore: int = 255) -> Tensor:
    """Share of each square's valid pixels that its most frequent class holds.

    ``labels`` is ``(B, h, w)``; squares are ``side`` pixels wide, those that hang over the border
    are left out: ``(B, h // side, w // side)`` float in 0..1. All-ignore squares count as 1.
    """
    counts = class_counts(labels, side, classes, ignore)
    valid = counts.sum(dim=1)
    return torch.where(valid > 0, counts.amax(dim=1) / valid.clamp(min=1), 1.0)


def purity_bar(tolerance: float) -> float:
    """What a :func:`purity` must be greater than for a square to count as pure.

    "At least ``1 - tolerance``", safe against rounding, since the share is a quotient of floats.
    """
    return 1.0 - tolerance - 1e-6


def class_counts(labels: Tensor, side: int, classes: int, ignore: int = 255) -> Tensor:
    """Valid pixels of each class in each square, ``(B, C, h // side, w // side)`` float."""
    batch = len(labels)
    height, width = (length // side for length in labels.shape[1:])
    cut = labels[:, : height * side, : width * side].long()
    row = torch.arange(height, device=labels.device).repeat_interleave(side).view(1, -1, 1)
    column = torch.arange(width, device=labels.device).repeat_interleave(side)
    picture = torch.arange(batch, device=labels.device).view(-1, 1, 1)
    square = (picture * height + row) * width + column
    # One count per square and class: one-hot labels would take as much memory per pixel.
    key = square * (classes + 1) + cut.where(cut != ignore, classes)
    counts = torch.bincount(key.flatten(), minlength=batch * height * width * (classes + 1))
    counts = counts.view(batch, height, width, classes + 1)[..., :classes]
    return counts.movedim(-1, 1).float()


def padded_labels(labels: Tensor, patch: int) -> Tensor:
    """Fill ``labels (B, h, w)`` up to whole patches with ignored pixels."""
    return F.pad(labels, (0, -labels.shape[2] % patch, 0, -labels.shape[1] % patch), value=255)


def oracle(
    labels: Tensor,
    *,
    patch: int,
    sizes: Sequence[int],
    classes: int,
    tolerance: float = 0.0,
) -> Tensor:
    """The partition that merges exactly the superpatches of one class, from ``labels (B, h, w)``.

    A superpatch counts as pure where its most frequent class holds at least ``1 - tolerance`` of
    its valid pixels. The pictures must fill the batch: ``h`` and ``w`` are those of each.
    """
    batch = len(labels)
    full = padded_labels(labels, patch)
    grid = (full.shape[1] // patch, full.shape[2] // patch)
    scores = [purity(full, size * patch, classes) for size in sizes]
    bars = [purity_bar(tolerance)] * len(sizes)
    empty = uniform([grid] * batch, labels.device)
    return by_threshold(scores, empty, sizes=sizes, thresholds=bars)


def by_share(
    scores: Sequence[Tensor], empty: Tensor, *, sizes: Sequence[int], shares: Mapping[int, float]
) -> Tensor:
    """Cover the same share of each grid with superpatches of a size, the best first.

    ``shares`` are by size, rounded to counts by :func:`superpatch_counts`; a size without one is
    not formed. ``empty`` is the partition without merging of pictures that fill the whole grid.
    """
    _, height, width = empty.shape
    counts = superpatch_counts(shares, (height, width))
    level = empty.clone()
    for size, score in sorted(zip(sizes, scores, strict=True), key=lambda entry: -entry[0]):
        if counts.get(size):
            _place_best(level, size, score, counts[size])
    return level


def tokens_of(shares: Mapping[int, float], grid: Grid) -> int:
    """Tokens that :func:`by_share` leaves of a grid."""
    counts = superpatch_counts(shares, grid)
    return grid[0] * grid[1] - sum(count * (size**2 - 1) for size, count in counts.items())


def superpatch_counts(shares: Mapping[int, float], grid: Grid) -> dict[int, int]:
    """How many superpatches of each size cover ``shares`` of a grid, as near as there is room.

    Large ones are placed first, as :func:`by_count` does.
    """
    height, width = grid
    counts: dict[int, int] = {}
    for size in sorted(shares, reverse=True):
        taken = sum(count * (larger // size) ** 2 for larger, count in counts.items())
        room = (height // size) * (width // size) - taken
        counts[size] = min(round(shares[size] * height * width / size**2), room)
    return counts


def by_count(
    scores: Sequence[Tensor], empty: Tensor, *, sizes: Sequence[int], counts: Sequence[Tensor]
) -> Tensor:
    """Take exactly so many superpatches of each size, the best first, coarse to fine.

    ``scores[k]`` is ``(B, H // sizes[k], W // sizes[k])`` and ``counts[k]``, ``(B,)`` int64, is how
    many superpatches of that size each picture gets; ``empty`` is the partition without merging.
    Ties go to the earlier place. Wherever a large superpatch lies, it takes the same number of
    aligned places from the small ones, so whether there is room does not depend on the scores.

    Raises:
        ValueError: the three sequences differ in length, a size is no power of two above 1, or a
            picture has no room for so many.
    """
    level = empty.clone()
    for size, score, count in sorted(
        zip(sizes, scores, counts, strict=True), key=lambda entry: -entry[0]
    ):
        if bool((_uncovered(level, size).flatten(1).sum(1) < count).any()):
            raise ValueError(f"a picture has no room for so many superpatches of {size} patches")
        _place_best(level, size, score, count.unsqueeze(1))
    return level


def _place_best(level: Tensor, size: int, score: Tensor, count: int | Tensor) -> None:
    """Lay the ``count`` best superpatches of a size that larger ones left room for, in place.

    ``count`` is of every picture, or ``(B, 1)``.
    """
    best = score.masked_fill(~_uncovered(level, size), -torch.inf).flatten(1)
    order = best.argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(order.shape[1], device=order.device) < count
    take = torch.zeros_like(best, dtype=torch.bool).scatter_(1, order, chosen.expand_as(order))
    _place(level, size, take.view(score.shape))


def counts_of(partition: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """How many superpatches of each size each picture has, ``(B,)`` int64 per size."""
    return [(partition == level_of(size)).flatten(1).sum(1) // size**2 for size in sizes]


def shuffled(partition: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    """A random partition with as many superpatches of each size as ``partition``, per picture."""
    empty = torch.where(partition < 0, -1, 0).to(partition.dtype)
    drawn = {
        size: -torch.rand(_uncovered(empty, size).shape, generator=generator).to(empty.device)
        for size in sorted(sizes, reverse=True)
    }
    scores = [drawn[size] for size in sizes]
    return by_count(scores, empty, sizes=sizes, counts=counts_of(partition, sizes))


def token_counts(partition: Tensor) -> Tensor:
    """Tokens (superpatches and single patches) of each picture, ``(B,)`` int64."""
    weight = torch.where(partition < 0, 0.0, 0.25 ** partition.clamp(min=0).double())
    return weight.flatten(1).sum(1).round().long()


def _uncovered(level: Tensor, size: int) -> Tensor:
    """Where an aligned superpatch fits: inside, and no larger one there, ``(B, H // s, W // s)``.

    Its last cell tells: pictures begin at the top left, and larger superpatches cover it whole.
    """
    return level[:, size - 1 :: size, size - 1 :: size] == 0


def _place(level: Tensor, size: int, chosen: Tensor) -> None:
    """Lay the chosen superpatches ``(B, H // s, W // s)`` of a size into ``level``, in place."""
    _, height, width = chosen.shape
    squares = level[:, : height * size, : width * size]
    # (B, H // s, s, W // s, s), a view
    squares = torch.unflatten(torch.unflatten(squares, 2, (width, size)), 1, (height, size))
    squares.masked_fill_(chosen[:, :, None, :, None], level_of(size))
