"""The timm ViT that a model is built around."""

from typing import Any

import timm
import torch

from tokenstep.config import VitConfig
from tokenstep.model.encoder import require_supported
from tokenstep.model.positions import sincos_positions


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
