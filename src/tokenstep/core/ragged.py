"""Index arithmetic on packed rows: pictures of different lengths in one flat tensor.

Picture ``b`` has rows ``offsets[b]:offsets[b + 1]``. Nothing here knows what a row means.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Where each picture's rows lie, on the device and as Python ints.

    The ints cost one host sync on a GPU, so they are read once per shrink and handed on.
    """

    offsets: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, offsets: Tensor) -> "Segments":
        """Read the lengths of ``offsets (B + 1,)`` to the host."""
        return cls(offsets, tuple(offsets.diff().tolist()))

    def plus(self, more: "Segments") -> "Segments":
        """Room for the rows of both in each picture."""
        lengths = (own + other for own, other in zip(self.lengths, more.lengths, strict=True))
        return Segments(self.offsets + more.offsets, tuple(lengths))

    def minus(self, fewer: "Segments") -> "Segments":
        """Room for the rows of these that ``fewer`` has not, in each picture."""
        lengths = (own - other for own, other in zip(self.lengths, fewer.lengths, strict=True))
        return Segments(self.offsets - fewer.offsets, tuple(lengths))

    @property
    def longest(self) -> int:
        """Rows of the longest picture."""
        return max(self.lengths, default=0)

    @property
    def total(self) -> int:
        """Rows of all pictures."""
        return sum(self.lengths)


def offsets_of(lengths: Tensor) -> Tensor:
    """Turn ``lengths (B,)`` into ``offsets (B + 1,)``, int64."""
    return torch.nn.functional.pad(lengths.to(torch.int64).cumsum(0), (1, 0))


def picture_of(offsets: Tensor, rows: int) -> Tensor:
    """Say for each of ``rows`` packed rows which picture it belongs to, ``(rows,)`` int64."""
    pictures = torch.arange(len(offsets) - 1, device=offsets.device)
    return pictures.repeat_interleave(offsets.diff(), output_size=rows)


def padded_index(offsets: Tensor, longest: int, rows: int) -> Tensor:
    """Slot of each packed row in a padded ``(B, longest)`` layout, flattened, ``(rows,)``."""
    picture = picture_of(offsets, rows)
    return torch.arange(rows, device=offsets.device) - offsets[picture] + picture * longest


def pad(x: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Lay packed rows ``(T, ...)`` out as ``(B, longest, ...)``, zeros behind each picture."""
    pictures = len(offsets) - 1
    padded = x.new_zeros(pictures * longest, *x.shape[1:])
    padded = padded.index_copy(0, padded_index(offsets, longest, len(x)), x)
    return padded.view(pictures, longest, *x.shape[1:])


def unpad(padded: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Undo :func:`pad`: ``(B, longest, ...)`` to the ``rows`` packed rows ``(T, ...)``."""
    return padded.flatten(0, 1)[padded_index(offsets, padded.shape[1], rows)]


def kept_offsets(keep: Tensor, offsets: Tensor) -> Tensor:
    """Offsets ``(B + 1,)`` that remain when only the rows of the mask ``keep (T,)`` stay."""
    return torch.nn.functional.pad(keep.cumsum(0), (1, 0))[offsets]


def kept_segments(keep: Tensor, offsets: Tensor, wrong: Tensor) -> tuple[Segments, int]:
    """Where the rows of the mask ``keep (T,)`` lie without the others, in one trip to the host.

    It brings along how many rows of the mask ``wrong (T,)`` hold.
    """
    left = kept_offsets(keep, offsets)
    *lengths, faults = torch.cat([left.diff(), wrong.sum().unsqueeze(0)]).tolist()
    return Segments(left, tuple(lengths)), faults


def rows_of(mask: Tensor, count: int) -> Tensor:
    """Rows of the mask ``(T,)`` that hold, ``(count,)`` int64, of which the host knows the number.

    So a GPU need not tell it, as ``nonzero`` would have it do.
    """
    return torch.nonzero_static(mask, size=count).squeeze(1)


def rank_within(score: Tensor, group: Tensor) -> Tensor:
    """Rank each row by falling ``score`` among the rows of its ``group``, 0 = highest.

    Both are ``(N,)``; ties go to the earlier row. Two stable sorts do for all groups at once.
    """
    by_score = torch.argsort(score, descending=True, stable=True)
    order = by_score[torch.argsort(group[by_score], stable=True)]
    ordered = group[order]
    place = torch.arange(len(order), device=score.device)
    first = torch.searchsorted(ordered, ordered)  # where each row's group begins
    return torch.empty_like(order).index_copy_(0, order, place - first)
