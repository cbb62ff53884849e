"""What a forward returns, and where each picture's tokens went."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenstep.core.partition import Grid, grid_of
from tokenstep.core.tokens import PackedTokens
from tokenstep.core.unmerge import dropped_cells, layer_of_cells
from tokenstep.model.encoder import Rows, Trace


@dataclass(frozen=True, slots=True, eq=False)
class Segmented:
    """What a forward returns: logits of the live tokens, and where each token speaks."""

    tokens: PackedTokens  # after the last block
    logits: Tensor  # (T, S, C) of the live rows; halted ones keep theirs in tokens.halted
    partition: Tensor  # (B, H, W) int8: the cell lies in a superpatch of side 2 ** level
    trace: Trace  # rows of each picture in each block, and where reducers were asked
    sizes: tuple[tuple[int, int], ...]  # (h, w) of each picture
    patch: int  # pixels a side
    prefix: int  # CLS and register rows of each picture
    scored: bool  # whether the policy's scores made the partition

    def grid(self, index: int) -> Grid:
        """Patch grid (H, W) of picture ``index``."""
        return grid_of(self.sizes[index], self.patch)

    @property
    def live(self) -> tuple[Rows, ...]:
        """Rows of each picture that entered each block, prefix rows too."""
        return tuple(self.trace.attention)

    def end(self, index: int) -> int:
        """Rows of picture ``index`` that the decoder sees: live or dropped, prefix rows too."""
        return int(self.tokens.offsets.diff()[index])


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


def first_cells(owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Name each token by the flat index of its first cell; ``owner (H, W)`` has any names."""
    _, first, token = np.unique(owner, return_index=True, return_inverse=True)
    return first[token].reshape(owner.shape)


def token_uses(segmented: Segmented, exits: Sequence[int]) -> list[TokenUse]:
    """Where the tokens of each picture of a batch went; ``exits`` are those of the model."""
    depth, tokens = len(segmented.live), segmented.tokens
    layers, gone = layer_of_cells(tokens, depth), dropped_cells(tokens)
    return [
        _token_use(segmented, layers, gone, index=index, exits=exits)
        for index in range(len(segmented.sizes))
    ]


def _token_use(
    segmented: Segmented, layers: Tensor, gone: Tensor, *, index: int, exits: Sequence[int]
) -> TokenUse:
    depth, tokens = len(segmented.live), segmented.tokens
    height, width = segmented.grid(index)
    halted = dict.fromkeys(exits, 0)
    if tokens.halted is not None:
        own = tokens.halted.anchor // tokens.owner[0].numel() == index
        counts = torch.bincount(tokens.halted.layer[own], minlength=depth).tolist()
        halted = {after: counts[after] for after in exits}
    dropped = 0
    if tokens.dropped is not None:
        own = tokens.dropped.anchor // tokens.owner[0].numel() == index
        dropped = int(own.sum())
    return TokenUse(
        grid=height * width,
        start=segmented.live[0][index] - segmented.prefix,
        end=segmented.end(index) - segmented.prefix - dropped,
        halted=halted,
        level=segmented.partition[index, :height, :width].cpu().numpy(),
        layer=layers[index, :height, :width].to(torch.int16).cpu().numpy(),
        dropped=gone[index, :height, :width].cpu().numpy(),
        depth=depth,
        owner=first_cells(tokens.owner[index, :height, :width].cpu().numpy()),
        live=tuple(rows[index] - segmented.prefix for rows in segmented.live),
    )
