"""Index arithmetic on packed rows: pictures of different lengths in one flat tensor.

Picture ``b`` has rows ``offsets[b]:offsets[b + 1]``. Nothing here knows what a row means.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Where each picture's rows lie, on the device and as Python ints.

    The ints cost one host sync on a GPU, so they are read once per shrink and handed on; and what
    is made of them for one block serves the next.
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

    @property
    def even(self) -> bool:
        """Whether all pictures have as many rows."""
        return len(set(self.lengths)) == 1

    @cached_property
    def counts(self) -> Tensor:
        """Rows of each picture, ``(B,)`` int64, where the offsets are."""
        return self.offsets.diff()

    @cached_property
    def picture(self) -> Tensor:
        """Picture of each row, ``(T,)`` int64."""
        pictures = torch.arange(len(self.lengths), device=self.offsets.device)
        return pictures.repeat_interleave(self.counts, output_size=self.total)

    @cached_property
    def padding(self) -> "Padding":
        """How the rows are laid out as ``(B, longest)``."""
        slot = torch.arange(self.longest, device=self.offsets.device)
        # (B, longest): behind a picture's own rows come those of the next, which are not real
        rows = (self.offsets[:-1, None] + slot).clamp(max=max(0, self.total - 1))
        real = slot < self.counts[:, None]
        return Padding(rows, real, rows_of(real.flatten(), self.total))


@dataclass(frozen=True, slots=True)
class Padding:
    """Packed rows as a rectangle, one picture a line."""

    rows: Tensor  # (B, longest) int64: the row in each slot
    real: Tensor  # (B, longest) bool: whether it is one of the picture's own
    slots: Tensor  # (T,) int64: the slot of each row, flat

    def pad(self, x: Tensor) -> Tensor:
        """Packed rows ``(T, ...)`` as ``(B, longest, ...)``; slots that are not real hold any."""
        return x[self.rows]

    def unpad(self, padded: Tensor) -> Tensor:
        """Undo :meth:`pad`: ``(B, longest, ...)`` to the packed rows ``(T, ...)``."""
        return padded.flatten(0, 1)[self.slots]


def offsets_of(lengths: Tensor) -> Tensor:
    """Turn ``lengths (B,)`` into ``offsets (B + 1,)``, int64."""
    return torch.nn.functional.pad(lengths.to(torch.int64).cumsum(0), (1, 0))


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
    ordered, places = group[by_score].sort(stable=True)
    order = by_score[places]
    place = torch.arange(len(order), device=score.device)
    first = torch.searchsorted(ordered, ordered)  # where each row's group begins
    return torch.empty_like(order).index_copy_(0, order, place - first)
