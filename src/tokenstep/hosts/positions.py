"""Position embeddings for any grid."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenstep.core.partition import Grid


def resampled(maps: Tensor, grid: Grid, *, antialias: bool = True) -> Tensor:
    """Scale ``maps (1, D, H0, W0)`` to ``grid`` as timm does: bicubic, antialiased, in fp32.

    As two matrix products with torch's own weights: on a CPU in half of the time, and the
    features of a position lie side by side in memory.
    """
    height, width = maps.shape[2:]
    if (height, width) == grid:
        return maps
    table = maps[0].permute(1, 2, 0).float()
    # What a tracer makes is not kept: it has no numbers.
    weights = _weights if torch.compiler.is_compiling() else _kept_weights
    rows: Tensor = torch.tensordot(weights(height, grid[0], antialias, maps.device), table, 1)
    scaled = weights(width, grid[1], antialias, maps.device) @ rows
    return scaled.permute(2, 0, 1)[None].to(maps.dtype)


def _weights(old: int, new: int, antialias: bool, device: torch.device) -> Tensor:
    """How resampling mixes ``old`` places into ``new`` ones along an axis, ``(new, old)``.

    Of two equal columns, since torch's kernel (2.15, CPU) repeats the first row of a single one.
    """
    places = torch.eye(old, device=device).view(1, old, old, 1).expand(1, old, old, 2)
    mixed: Tensor = F.interpolate(
        places.contiguous(), (new, 2), mode="bicubic", antialias=antialias
    )
    return mixed[0, :, :, 0].t()


_kept_weights = lru_cache(maxsize=32)(torch.inference_mode(False)(_weights))
