"""A host back in timm's own model: what its user would run, with no code of ours in it."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenstep.config import VitConfig
from tokenstep.core.partition import Grid
from tokenstep.hosts.timm_build import BEHIND
from tokenstep.hosts.timm_embed import LinearEmbed
from tokenstep.hosts.timm_named import named_vit
from tokenstep.hosts.timm_vit import TimmViT


def plain_vit(config: VitConfig, stem: Any, trunk: nn.Module, grid: Grid) -> nn.Module | None:
    """Timm's model of ``config`` with the weights of two stages, for pictures of ``grid`` patches.

    None where there is none: the host is another one's, or has a stem in the place of timm's patch
    embedding.
    """
    host = stem.host
    if not isinstance(host, TimmViT) or not isinstance(stem.embed, LinearEmbed):
        return None
    size = (grid[0] * host.patch, grid[1] * host.patch)
    vit = cast(nn.Module, named_vit(replace(config, image_size=size, drop_path=0.0)))
    state = {name: value for name, value in trunk.state_dict().items() if name in vit.state_dict()}
    for name, value in stem.state_dict().items():
        own = name.replace("embed.proj.", "patch_embed.proj.") if name[:5] == "embed" else name
        if own in vit.state_dict() and own != "pos_embed":
            state[own] = value
    positions = host.positions(stem, grid)
    if positions is not None:
        table = positions.flatten(2).transpose(1, 2)
        if host.prefix_has_position:
            table = torch.cat([cast(Tensor, stem.pos_embed)[:, : host.prefix], table], dim=1)
        state["pos_embed"] = table.detach()
    # What lies behind the encoder is not used: features are read before it.
    missing = vit.load_state_dict(state, strict=False).missing_keys
    if any(not name.startswith(BEHIND) for name in missing):
        raise RuntimeError(f"timm's model has parts that the host lacks: {missing}")
    return vit.to(next(trunk.parameters())).eval()
