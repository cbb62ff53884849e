"""Position embeddings for any grid, and pooled over superpatches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenstep.model.superpatches import Grid, halved


@dataclass(frozen=True, slots=True)
class PooledPositions:
    """Positions of the superpatches of one side, for all pictures of a batch."""

    maps: tuple[Tensor, ...]  # (1, D, rows, columns) of each distinct grid, in superpatches
    which: Tensor  # (B,) int64: the map of each picture

    @classmethod
    def of(cls, maps: Tensor, grids: Sequence[Grid]) -> "PooledPositions":
        """Those of single patches: ``maps (1, D, H0, W0)`` resampled to each picture's grid."""
        distinct = list(dict.fromkeys(grids))
        which = torch.tensor([distinct.index(grid) for grid in grids], device=maps.device)
        return cls(tuple(resampled(maps, grid) for grid in distinct), which)

    def halved(self) -> "PooledPositions":
        """Those of superpatches of twice the side."""
        return PooledPositions(tuple(halved(one) for one in self.maps), self.which)

    def at(self, picture: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Positions ``(n, D)`` of superpatches ``(row, column)``, counted in superpatches."""
        shapes = torch.tensor([one.shape[2:] for one in self.maps], device=row.device)
        start = (shapes.prod(1).cumsum(0) - shapes.prod(1))[self.which]
        columns = shapes[:, 1][self.which]
        table = torch.cat([one[0].flatten(1).T for one in self.maps])
        return table[start[picture] + row * columns[picture] + column]


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
