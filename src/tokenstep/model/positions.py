"""Position embeddings for any grid, and pooled over superpatches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenstep.model.superpatches import Grid


@dataclass(frozen=True, slots=True)
class PooledPositions:
    """Positions of the superpatches of one side, for all grids of a batch in one table."""

    table: Tensor  # (sum of rows * columns over the distinct grids, D)
    start: Tensor  # (B,) int64, row of the table at which the picture's grid starts
    columns: Tensor  # (B,) int64, superpatches in a row of the picture's grid

    def at(self, picture: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Positions ``(n, D)`` of superpatches ``(row, column)``, counted in superpatches."""
        return self.table[self.start[picture] + row * self.columns[picture] + column]


def pooled_positions(maps: Tensor, grids: Sequence[Grid], side: int) -> PooledPositions:
    """Resample ``maps (1, D, H0, W0)`` to each picture's grid and average over superpatches."""
    tables: list[Tensor] = []
    starts: dict[Grid, int] = {}
    total = 0
    for grid in dict.fromkeys(grids):
        starts[grid] = total
        if min(grid) < side:
            continue  # no superpatch of this side fits into this picture
        table = F.avg_pool2d(resampled(maps, grid), side)[0].flatten(1).T
        tables.append(table)
        total += len(table)
    start = torch.tensor([starts[grid] for grid in grids], device=maps.device)
    columns = torch.tensor([grid[1] // side for grid in grids], device=maps.device)
    return PooledPositions(torch.cat(tables), start, columns)


def resampled(maps: Tensor, grid: Grid) -> Tensor:
    """Scale ``maps (1, D, H0, W0)`` to ``grid`` as timm does: bicubic, antialiased, in fp32."""
    if tuple(maps.shape[2:]) == grid:
        return maps
    if grid[1] == 1 < grid[0]:
        # One column as one row: torch's kernel (2.15, CPU) repeats the first row of a column.
        return resampled(maps.transpose(2, 3), (1, grid[0])).transpose(2, 3)
    scaled = F.interpolate(maps.float(), grid, mode="bicubic", antialias=True)
    return scaled.to(maps.dtype)


def sincos_positions(grid: Grid, dim: int) -> Tensor:
    """Fixed sine and cosine positions ``(1, H * W, D)`` to start a position table from.

    Half of the channels code the row and half the column (MAE, arXiv 2111.06377).

    Raises:
        ValueError: ``dim`` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine and cosine positions need a width divisible by 4, got {dim}")
    frequency = torch.exp(-math.log(10000.0) * torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (rows, columns)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)[None]
