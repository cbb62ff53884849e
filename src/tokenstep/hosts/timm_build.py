"""The timm ViT that a model is built around."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from tokenstep.config import HALF, Channels, VitConfig
from tokenstep.core.partition import Grid
from tokenstep.data.pretrained import Published, WeightFile, load_into
from tokenstep.hosts.timm_block import require_supported

# Parts behind the encoder, which a segmenter does without.
BEHIND = ("head.", "fc_norm.", "attn_pool.")


def build_vit(
    config: VitConfig,
    weights: WeightFile | None = None,
    *,
    require: Callable[[nn.Module], None] = require_supported,
) -> Any:
    """Build timm's ViT, from ``weights`` if there are any.

    timm resamples their positions and patch embedding to the grid and patch size of ``config``.
    An untrained ViT's position table starts as sine and cosine. ``require`` refuses what has no
    host, by a ValueError.

    Raises:
        ValueError: timm knows no such model, it does not take the given overrides, or it has a
            part that packed tokens cannot run, by name.
        TokenstepError: the weights lack a part that is used, or do not fit.
    """
    _require_known(config.name)
    overrides: dict[str, Any] = {
        "patch_size": config.patch,
        "depth": config.depth,
        "img_size": config.image_size,
        "drop_path_rate": config.drop_path,
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    create = partial(timm.create_model, config.name, num_classes=0, **given)
    try:
        vit: Any = create(pretrained=False)
    except (TypeError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"backbone {config.name!r} cannot be built with {', '.join(given)} ({reason}): choose "
            "a plain ViT, see timm.list_models('vit_*')"
        ) from error
    require(vit)
    if vit.patch_embed.num_patches < 1:
        patch = vit.patch_embed.patch_size
        raise ValueError(f"image_size {config.image_size} is smaller than a patch of {patch}")
    if weights is not None:
        unused = (*BEHIND, "patch_embed.") if config.stem == "conv" else BEHIND
        return load_into(
            lambda overlay: create(pretrained=True, pretrained_cfg_overlay=overlay),
            weights,
            unused,
        )
    _start_positions(vit)
    return vit


def published_vit(name: str) -> Published:
    """What timm says of the weights of a ViT, those of the tag in ``name`` if it has one.

    Raises:
        ValueError: timm knows no such model or no such tag.
    """
    _require_known(name)
    try:
        said = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the part of the name behind the point
        raise ValueError(f"backbone {name!r} is not known: {error}") from error
    if said is None:  # a model of somebody else's, registered without weights
        return Published(None, HALF, HALF)
    mean, std = cast(Channels, said.mean), cast(Channels, said.std)
    return Published(said.hf_hub_id, mean, std)


def _require_known(name: str) -> None:
    if not timm.is_model(name):
        raise ValueError(f"backbone {name!r} is not a timm model, see timm.list_models('vit_*')")


@torch.no_grad()
def _start_positions(vit: Any) -> None:
    """Start the position table of an untrained ViT."""
    table = vit.pos_embed
    if table is not None and table.shape[-1] % 4 == 0:
        cells = vit.patch_embed.num_patches
        # As strong as timm's random start is wide, times the few that a pattern needs.
        table[:, -cells:] = 0.1 * sincos_positions(vit.patch_embed.grid_size, table.shape[-1])


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
