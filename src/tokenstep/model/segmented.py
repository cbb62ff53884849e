"""What a forward returns, and where each picture's tokens went."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenstep.core.partition import Grid, grid_of
from tokenstep.core.tokens import PackedTokens
from tokenstep.core.unmerge import rows_of_cells
from tokenstep.model.encoder import Rows, Trace
from tokenstep.reducers.base import Drop, Halt


@dataclass(frozen=True, eq=False)
class Encoded:
    """What the blocks made of a batch, and where each of its tokens lies."""

    tokens: PackedTokens  # after the last block
    partition: Tensor  # (B, H, W) int8: the cell lies in a superpatch of side 2 ** level
    trace: Trace  # rows of each picture in each block, and where reducers were asked
    sizes: tuple[tuple[int, int], ...]  # (h, w) of each picture
    patch: int  # pixels a side
    scored: bool  # whether the policy's scores made the partition

    def grid(self, index: int) -> Grid:
        """Patch grid (H, W) of picture ``index``."""
        return grid_of(self.sizes[index], self.patch)

    @property
    def alike(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """Places of the pictures of each size (h, w)."""
        places = range(len(self.sizes))
        return {
            size: tuple(place for place in places if self.sizes[place] == size)
            for size in dict.fromkeys(self.sizes)
        }

    @cached_property
    def rows(self) -> Tensor:
        """Row that speaks for each cell, ``(B, H, W)`` int64, the halted last; -1 outside."""
        return rows_of_cells(self.tokens)

    @property
    def live(self) -> tuple[Rows, ...]:
        """Rows of each picture that entered each block, prefix rows too."""
        return tuple(self.trace.attention)

    def end(self, index: int) -> int:
        """Rows of picture ``index`` that the decoder sees: live or dropped, prefix rows too."""
        return self.tokens.segments.lengths[index]


@dataclass(frozen=True, eq=False)
class Segmented(Encoded):
    """What a forward returns: logits of the live tokens, and where each token speaks."""

    logits: Tensor  # (T, S, C) of the live rows; halted ones keep theirs in tokens.halted
    flow: str  # the dataflow that it came by
    finite: Tensor | None  # () bool, whether the policy's scores are, where nobody looked yet

    @property
    def values(self) -> list[Tensor]:
        """Logits ``(T, S, C)`` of the live tokens and, if any halted, of these."""
        halted = self.tokens.halted
        return [self.logits] if halted is None else [self.logits, halted.logits]

    @property
    def side(self) -> int:
        """Sub-cells of a token, a side."""
        return int(self.logits.shape[1] ** 0.5 + 0.5)


@dataclass(frozen=True, slots=True, eq=False)
class TokenUse:
    """Where one picture's tokens went. Prefix tokens (CLS, registers) are not counted."""

    grid: int  # patches of the picture: the tokens of the dense model
    start: int  # tokens that entered the first block
    end: int  # tokens that were live after the last block: not halted, not dropped
    halted: dict[int, int]  # blocks run -> tokens that halted there, one entry per exit
    level: NDArray[np.int8]  # (H, W): the cell lies in a superpatch of side 2 ** level
    layer: NDArray[np.int16]  # (H, W): blocks that the cell's token ran through, if in part
    dropped: NDArray[np.bool_]  # (H, W): the cell's token was dropped, in block ``layer``
    depth: int  # blocks of the model
    owner: NDArray[np.int64]  # (H, W): flat index of the first cell that the cell's token has
    live: tuple[int, ...]  # tokens that entered each block


@dataclass(frozen=True, slots=True, eq=False)
class CellMaps:
    """What is to be told of the cells of a batch, on the host; each is ``(B, H, W)``."""

    level: NDArray[np.int8]  # the cell lies in a superpatch of side 2 ** level
    end: NDArray[np.int16]  # twice the blocks that the cell's token ran, plus 1 if it was dropped
    owner: NDArray[np.int32]  # any name of the cell's token


def first_cells(owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Name each token by the flat index of its first cell; ``owner (H, W)`` has any names."""
    _, first, token = np.unique(owner, return_index=True, return_inverse=True)
    return first[token].reshape(owner.shape)


def token_uses(encoded: Encoded, exits: Sequence[int], maps: CellMaps) -> list[TokenUse]:
    """Where the tokens of each picture of a batch went; ``exits`` are those of the model."""
    return [_token_use(encoded, maps, place, exits) for place in range(len(encoded.sizes))]


def _token_use(encoded: Encoded, maps: CellMaps, place: int, exits: Sequence[int]) -> TokenUse:
    height, width = encoded.grid(place)
    own = (place, slice(height), slice(width))
    end = maps.end[own]
    trace = encoded.trace
    live = [
        rows[place] - prefix for rows, prefix in zip(trace.attention, trace.prefix, strict=True)
    ]
    halted = dict.fromkeys(exits, 0)
    dropped = 0
    for asked in trace.asked:
        gone = asked.before[place] - asked.after[place]
        if asked.decision is Halt and asked.block in halted:
            halted[asked.block] += gone
        elif asked.decision is Drop:
            dropped += gone
    return TokenUse(
        grid=height * width,
        start=live[0],
        end=encoded.end(place) - encoded.tokens.prefix - dropped,
        halted=halted,
        level=maps.level[own].copy(),
        layer=end >> 1,
        dropped=end % 2 > 0,
        depth=len(live),
        owner=first_cells(maps.owner[own].astype(np.int64)),
        live=tuple(live),
    )
