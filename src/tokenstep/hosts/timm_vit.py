"""The timm ViT that a model is built around."""

import math
from typing import Any

import timm
import torch
from torch import Tensor

from tokenstep.config import VitConfig
from tokenstep.core.partition import Grid
from tokenstep.hosts.timm_block import require_supported


def build_vit(config: VitConfig) -> Any:
    """Build timm's ViT, untrained; its position table starts as sine and cosine.

    Raises:
        ValueError: timm knows no such model, it does not take the given overrides, or it has a
            part that packed tokens cannot run, by name.
    """
    if not timm.is_model(config.name):
        raise ValueError(
            f"backbone {config.name!r} is not a timm model, see timm.list_models('vit_*')"
        )
    overrides: dict[str, Any] = {
        "patch_size": config.patch,
        "depth": config.depth,
        "img_size": config.image_size,
        "drop_path_rate": config.drop_path,
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        vit: Any = timm.create_model(config.name, pretrained=False, num_classes=0, **given)
    except (TypeError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"backbone {config.name!r} cannot be built with {', '.join(given)} ({reason}): choose "
            "a plain ViT, see timm.list_models('vit_*')"
        ) from error
    require_supported(vit)
    if vit.patch_embed.num_patches < 1:
        patch = vit.patch_embed.patch_size
        raise ValueError(f"image_size {config.image_size} is smaller than a patch of {patch}")
    table = vit.pos_embed
    if table is not None and table.shape[-1] % 4 == 0:
        cells = vit.patch_embed.num_patches
        with torch.no_grad():
            # As strong as timm's random start is wide, times the few that a pattern needs.
            table[:, -cells:] = 0.1 * sincos_positions(vit.patch_embed.grid_size, table.shape[-1])
    return vit


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
