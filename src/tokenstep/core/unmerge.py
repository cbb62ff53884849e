"""Stage 6 of 6, its first half: one value per token -> one value per cell, or per sub-cell.

A token predicts ``side x side`` sub-cells, spread over each superpatch that it speaks for: a
single patch is cut into ``side ** 2`` parts, and a superpatch of 4x4 patches into as many larger
ones, so that a supertoken can carry a boundary.
"""

import torch
from torch import Tensor

from tokenstep.core.tokens import PackedTokens


def rows_of_cells(tokens: PackedTokens) -> Tensor:
    """Row that speaks for each cell, ``(B, H, W)`` int64; -1 outside the picture.

    Rows count through the live tokens and then the halted ones, as :func:`token_values` lays them.
    """
    anchor = tokens.anchor
    if tokens.halted is not None:
        anchor = torch.cat([anchor, tokens.halted.anchor])
    return _rows_of_anchors(anchor, tokens.owner)[tokens.owner]


def _rows_of_anchors(anchor: Tensor, owner: Tensor) -> Tensor:
    """Row that each cell names, flat over ``owner (B, H, W)``; -1 where it names none.

    One place more is that of -1: of prefix rows, and of cells outside.
    """
    row = anchor.new_full((owner.numel() + 1,), -1)
    row[anchor] = torch.arange(len(anchor), device=anchor.device)
    row[-1] = -1
    return row


def token_values(live: Tensor, halted: Tensor | None) -> Tensor:
    """Values of all tokens ``(T + A, ...)``: live rows first, then halted ones."""
    return live if halted is None else torch.cat([live, halted])


def sub_cell_index(rows: Tensor, level: Tensor, side: int) -> Tensor:
    """Index of each sub-cell's value in ``(rows * side ** 2)`` flat values.

    ``rows`` and ``level`` are ``(..., H, W)`` (:func:`rows_of_cells` and the partition); the
    result is ``(..., H * side, W * side)``, -1 where ``rows`` is.
    """
    fine, rank = (_repeated(cells, side) for cells in (rows, level.clamp(min=0).long()))
    height, width = fine.shape[-2:]
    part_row = (torch.arange(height, device=rows.device)[:, None] >> rank) % side
    part_column = (torch.arange(width, device=rows.device) >> rank) % side
    return torch.where(fine < 0, -1, fine * side**2 + part_row * side + part_column)


def _repeated(cells: Tensor, side: int) -> Tensor:
    """Each cell of ``(..., H, W)`` as ``side x side`` of them."""
    wide = cells[..., :, None, :, None].expand(*cells.shape[:-1], side, cells.shape[-1], side)
    return wide.flatten(-4, -3).flatten(-2)


def unmerge(tokens: PackedTokens, live: Tensor, level: Tensor) -> Tensor:
    """Spread logits over the grid: ``live (T, S, C)`` -> ``(B, H * side, W * side, C)``.

    ``S = side ** 2``; halted cells take their exit's logits; cells outside a picture get 0.

    Raises:
        ValueError: tokens are dropped and have not rejoined the others.
    """
    _rows_of_dropped(tokens)  # none may wait aside
    halted = tokens.halted.logits if tokens.halted is not None else None
    values = token_values(live, halted)
    side = round(values.shape[1] ** 0.5)
    index = sub_cell_index(rows_of_cells(tokens), level, side)
    spread = values.flatten(0, 1)[index.clamp(min=0)]
    return torch.where((index < 0).unsqueeze(-1), 0.0, spread)


def features_of_cells(tokens: PackedTokens) -> Tensor:
    """What each cell's token has, ``(B, H, W, D)``; of one that was dropped, what it had then.

    Cells outside a picture hold anything.

    Raises:
        ValueError: tokens have halted, which keeps logits and no features.
    """
    if tokens.halted is not None:
        raise ValueError("some tokens have halted: they have no features any more")
    anchor, x = tokens.anchor, tokens.x
    if tokens.dropped is not None and tokens.dropped.aside:
        anchor, x = torch.cat([anchor, tokens.dropped.anchor]), torch.cat([x, tokens.dropped.x])
    return x[_rows_of_anchors(anchor, tokens.owner)[tokens.owner]]


def _rows_of_dropped(tokens: PackedTokens) -> Tensor:
    """Row of each dropped token, ``(A,)``; refuses those that wait aside, who speak for no cell."""
    if tokens.dropped is None:
        return tokens.anchor[:0]
    if tokens.dropped.aside:
        raise ValueError("some tokens are dropped: bring them back with rejoined() first")
    return _rows_of_anchors(tokens.anchor, tokens.owner)[tokens.dropped.anchor]


def ends_of_tokens(tokens: PackedTokens, depth: int) -> Tensor:
    """Where each token ended, ``(T + A,)`` int64: twice the blocks that it ran through.

    A dropped one has 1 more than twice the block that dropped it; ``depth`` is that of the model.
    """
    live = torch.full_like(tokens.anchor, 2 * depth)
    if tokens.dropped is not None:
        live[_rows_of_dropped(tokens)] = 2 * tokens.dropped.layer + 1
    return live if tokens.halted is None else torch.cat([live, 2 * tokens.halted.layer])


def layer_of_cells(tokens: PackedTokens, depth: int) -> Tensor:
    """Blocks that ran for each cell's token, ``(B, H, W)`` int64; ``depth`` if it never halted."""
    rows = rows_of_cells(tokens)
    return torch.where(rows < 0, -1, ends_of_tokens(tokens, depth)[rows] >> 1)
