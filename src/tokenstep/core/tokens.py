"""The one central type: all live tokens of a batch, packed, and what has halted.

Axis letters, here and everywhere: ``B`` pictures, ``T`` live rows, ``A`` halted rows,
``D`` features, ``C`` classes, ``S`` sub-cells of logits per token, ``H x W`` the patch grid,
``h x w`` pixels. A *cell* is one patch of the grid; cells are numbered flat over ``(B, H, W)``.

A token is named by one cell that it speaks for (its *anchor*), and every cell knows its speaker
(its *owner*). Merging renames cells, halting and dropping remove rows, no cell ever moves: so going
back to the grid is one gather at any depth, whatever was merged, dropped or halted on the way.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tokenstep.core import ragged
from tokenstep.core.ragged import Segments


@dataclass(frozen=True, slots=True)
class Halted:
    """Tokens that left the sequence; their logits are final."""

    anchor: Tensor  # (A,) int64
    logits: Tensor  # (A, S, C)
    layer: Tensor  # (A,) int64, number of blocks that the token ran through


@dataclass(frozen=True, slots=True)
class Dropped:
    """Tokens that no block sees any more; what they had when they were dropped waits here."""

    x: Tensor  # (A, D)
    size: Tensor  # (A,) int64
    anchor: Tensor  # (A,) int64
    layer: Tensor  # (A,) int64, number of the block in which the token was dropped
    segments: Segments  # how many of them each picture has; the rows are in no order
    aside: bool = True  # until they have rejoined the others


@dataclass(frozen=True)
class PackedTokens:
    """All live tokens of a batch in one flat tensor, picture after picture.

    Raises:
        ValueError: the fields' lengths disagree.
    """

    x: Tensor  # (T, D) features; prefix rows (CLS, registers) first in every picture
    segments: Segments  # which rows are whose
    size: Tensor  # (T,) int64, grid cells that the row speaks for; 1 for a prefix row
    anchor: Tensor  # (T,) int64, flat index of the cell that names the row; -1 for a prefix row
    owner: Tensor  # (B, H, W) int64, anchor of the token that speaks for the cell; -1 outside
    prefix: int  # prefix rows of each picture
    grids: tuple[tuple[int, int], ...]  # (H, W) cells of each picture
    halted: Halted | None = None
    dropped: Dropped | None = None

    def __post_init__(self) -> None:
        rows = {len(self.x), len(self.size), len(self.anchor)}
        if len(rows) != 1:
            raise ValueError(f"x, size and anchor must have one length, got {sorted(rows)}")
        if self.owner.ndim != 3 or len(self.owner) != self.pictures:
            raise ValueError(
                f"owner must be (B, H, W) with B = {self.pictures}, got {tuple(self.owner.shape)}"
            )

    @property
    def pictures(self) -> int:
        """Pictures of the batch."""
        return len(self.segments.lengths)

    @property
    def offsets(self) -> Tensor:
        """``(B + 1,)`` int64: picture ``b`` has the rows ``offsets[b]:offsets[b + 1]``."""
        return self.segments.offsets

    @property
    def cells(self) -> tuple[int, ...]:
        """Grid cells of each picture."""
        return tuple(height * width for height, width in self.grids)

    @cached_property
    def is_prefix(self) -> Tensor:
        """Mask ``(T,)`` of CLS and register rows."""
        return self.anchor < 0

    def picture(self) -> Tensor:
        """Picture of each row, ``(T,)`` int64."""
        return self.segments.picture

    def counts(self) -> Tensor:
        """Tokens of each picture, ``(B,)`` int64; prefix rows are none."""
        return self.segments.counts - self.prefix

    def middles(self) -> Tensor:
        """Mean place of the cells that each row speaks for, ``(T, 2)`` fp32, 0 for a prefix row.

        It counts rows and columns in cells, and the middle of the first is 0.5.
        """
        _, height, width = self.owner.shape
        sides = (torch.arange(side, device=self.x.device) + 0.5 for side in (height, width))
        places = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1)
        return self.mean_of_cells(places.expand(self.pictures, -1, -1, -1))

    def mean_of_cells(self, values: Tensor) -> Tensor:
        """Mean of ``values (B, H, W, K)`` over each row's cells, ``(T, K)``; 0 of a prefix row."""
        # The last place is that of -1: of prefix rows, and of cells outside.
        total = values.new_zeros(self.owner.numel() + 1, values.shape[-1])
        owner = torch.where(self.owner < 0, self.owner.numel(), self.owner).flatten()
        total = total.index_add(0, owner, values.reshape(-1, values.shape[-1]))
        mean = total[self.anchor] / self.size.unsqueeze(1)
        return torch.where(self.is_prefix.unsqueeze(1), 0.0, mean)

    def sides(self) -> Tensor:
        """Cells down and across of each row's picture, ``(T, 2)`` int64."""
        return torch.tensor(self.grids, device=self.x.device)[self.picture()]

    def ranked(self, score: Tensor) -> Tensor:
        """Rank each token by falling ``score (T,)`` in its picture, ``(T,)`` int64, 0 = highest.

        Ties go to the earlier row. Prefix rows are ranked among themselves.
        """
        return ragged.rank_within(score, self.picture() * 2 + self.is_prefix)

    def with_features(self, x: Tensor) -> "PackedTokens":
        """The same tokens with new features ``x (T, D)``."""
        return replace(self, x=x)

    def join(self, rows: Tensor) -> "PackedTokens":
        """Let ``rows (n, D)`` that speak for no cell join each picture, behind its prefix rows.

        They are prefix rows from now on.
        """
        count, batch = len(rows), self.pictures
        more = torch.arange(batch + 1, device=self.x.device) * count
        segments = self.segments.plus(Segments(more, (count,) * batch))
        # Where each old row lies now: those behind the prefix make room for one picture more.
        old = torch.arange(len(self.x), device=self.x.device)
        room = self.picture() + ~self.is_prefix
        place = old + count * room
        new = segments.offsets[:-1, None] + self.prefix + torch.arange(count, device=old.device)
        x = self.x.new_empty(segments.total, self.x.shape[1]).index_copy(0, place, self.x)
        x = x.index_copy(0, new.flatten(), rows.to(x.dtype).repeat(batch, 1))
        size = self.size.new_ones(segments.total).index_copy(0, place, self.size)
        anchor = self.anchor.new_full((segments.total,), -1).index_copy(0, place, self.anchor)
        return replace(
            self, x=x, segments=segments, size=size, anchor=anchor, prefix=self.prefix + count
        )

    def merge(self, into: Tensor, weight: Tensor | None = None) -> "PackedTokens":
        """Merge each row ``r`` into row ``into[r]``; a row with ``into[r] == r`` survives.

        Features become the mean by ``weight (T,)``, above 0, or by size; the survivor speaks for
        all cells. ``into`` is ``(T,)`` int64.

        Raises:
            ValueError: ``into`` has another length than the rows, or a row would merge into one
                that does not survive, lies in another picture, or is a prefix row; or the reverse.
        """
        if into.shape != self.anchor.shape:
            raise ValueError(f"into must be ({len(self.x)},), got {tuple(into.shape)}")
        keep = into == torch.arange(len(into), device=into.device)
        picture, speaks = self.picture(), ~self.is_prefix
        legal = keep | (speaks & speaks[into] & keep[into] & (picture[into] == picture))
        segments, faults = ragged.kept_segments(keep, self.offsets, ~legal)
        if faults:
            raise ValueError(
                f"{faults} rows would merge into a row that does not survive, lies in another "
                "picture or is a prefix row"
            )
        target = (keep.cumsum(0) - 1)[into]
        # In fp32, since the sum over a large superpatch leaves the range of fp16.
        survivors = segments.total
        exact = torch.promote_types(self.x.dtype, torch.float32)
        share = (self.size if weight is None else weight).to(exact).unsqueeze(1)
        total = share.new_zeros(survivors, 1).index_add(0, target, share)
        mixed = share.new_zeros(survivors, self.x.shape[1])
        mixed = mixed.index_add(0, target, self.x.to(exact) * share) / total
        size = self.size.new_zeros(survivors).index_add(0, target, self.size)

        # The last place is that of -1: of prefix rows, and of cells outside.
        renamed = torch.arange(self.owner.numel() + 1, device=into.device)
        renamed[-1] = -1
        renamed[self.anchor] = self.anchor[into]
        owner = renamed[self.owner]
        return replace(
            self,
            x=mixed.to(self.x.dtype),
            segments=segments,
            size=size,
            anchor=self.anchor[ragged.rows_of(keep, survivors)],
            owner=owner,
        )

    def halt(
        self,
        done: Tensor,
        classify: Callable[[Tensor], Tensor],
        layer: int,
        counts: tuple[int, ...] | None = None,
    ) -> "PackedTokens":
        """Take the rows of the mask ``done (T,)`` out of the sequence with their final logits.

        ``classify`` makes the logits ``(A, S, C)`` of the features ``(A, D)`` of those that leave;
        ``layer`` is the number of blocks run. ``counts`` says how many leave of each picture, if
        that is known beforehand: then no trip to the host is made, and nothing is checked.

        Raises:
            ValueError: ``done`` has another length than the rows, or the logits than those that
                leave; or a prefix row would halt.
        """
        leave, left = self._cut(done, "done", counts)
        logits = classify(self.x[leave])
        if len(logits) != len(leave):
            raise ValueError(f"{len(leave)} rows halt but logits are given for {len(logits)}")
        new = Halted(self.anchor[leave], logits, torch.full_like(leave, layer))
        if self.halted is not None:
            old = self.halted
            new = Halted(
                torch.cat([old.anchor, new.anchor]),
                torch.cat([old.logits, new.logits]),
                torch.cat([old.layer, new.layer]),
            )
        return replace(left, halted=new)

    def drop(self, gone: Tensor, layer: int) -> "PackedTokens":
        """Take the rows of the mask ``gone (T,)`` out of the sequence, with what they have now.

        ``layer`` is the number of the block. :meth:`rejoined` brings them back.

        Raises:
            ValueError: ``gone`` has another length than the rows, or a prefix row would go.
        """
        leave, left = self._cut(gone, "gone")
        x, size, anchor = self.x[leave], self.size[leave], self.anchor[leave]
        block = torch.full_like(leave, layer)
        taken = self.segments.minus(left.segments)
        if self.dropped is not None:
            old = self.dropped
            x, size = torch.cat([old.x, x]), torch.cat([old.size, size])
            anchor, block = torch.cat([old.anchor, anchor]), torch.cat([old.layer, block])
            taken = old.segments.plus(taken)
        return replace(left, dropped=Dropped(x, size, anchor, block, taken))

    def _cut(
        self, gone: Tensor, name: str, counts: tuple[int, ...] | None = None
    ) -> tuple[Tensor, "PackedTokens"]:
        """Rows ``(A,)`` of the mask ``gone (T,)``, and the tokens without them.

        The cells of those that leave have no live speaker then.
        """
        if gone.shape != self.anchor.shape:
            raise ValueError(f"{name} must be ({len(self.x)},), got {tuple(gone.shape)}")
        keep = ~gone
        if counts is not None:
            left = (own - less for own, less in zip(self.segments.lengths, counts, strict=True))
            segments = Segments(ragged.kept_offsets(keep, self.offsets), tuple(left))
        else:
            segments, faults = ragged.kept_segments(keep, self.offsets, gone & self.is_prefix)
            if faults:
                raise ValueError(f"{name} holds {faults} prefix rows, which never leave")
        stay = ragged.rows_of(keep, segments.total)
        leave = ragged.rows_of(gone, len(gone) - segments.total)
        rest = replace(
            self,
            x=self.x[stay],
            segments=segments,
            size=self.size[stay],
            anchor=self.anchor[stay],
        )
        return leave, rest

    def without_features(self) -> "PackedTokens":
        """The same with rows of no features, to tell where tokens are: neither memory nor graph."""
        dropped = self.dropped
        if dropped is not None:
            dropped = replace(dropped, x=dropped.x.new_empty(len(dropped.x), 0))
        return replace(self, x=self.x.new_empty(len(self.x), 0), dropped=dropped)

    def rejoined(self) -> "PackedTokens":
        """Bring dropped tokens back as live rows, each behind the others of its picture.

        ``dropped`` goes on saying which they are, and in which block they left.
        """
        if self.dropped is None or not self.dropped.aside:
            return self
        cells = self.owner[0].numel()
        picture = torch.cat([self.picture(), self.dropped.anchor // cells])
        order = picture.argsort(stable=True)
        return replace(
            self,
            x=torch.cat([self.x, self.dropped.x])[order],
            segments=self.segments.plus(self.dropped.segments),
            size=torch.cat([self.size, self.dropped.size])[order],
            anchor=torch.cat([self.anchor, self.dropped.anchor])[order],
            dropped=replace(self.dropped, aside=False),
        )
