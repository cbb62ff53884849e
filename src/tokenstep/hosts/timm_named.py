"""timm's ViTs by their names: which host stands for which of timm's classes."""

from typing import Any

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenstep.config import VitConfig
from tokenstep.data.pretrained import WeightFile
from tokenstep.hosts.timm_build import build_vit
from tokenstep.hosts.timm_embed import ConvEmbed
from tokenstep.hosts.timm_eva import TimmEva
from tokenstep.hosts.timm_vit import TimmViT

HOSTS: dict[type[nn.Module], type[TimmViT]] = {VisionTransformer: TimmViT, Eva: TimmEva}


def host_type(vit: nn.Module) -> type[TimmViT]:
    """The host that stands for a timm model; the plain ViT's refuses what is none by name."""
    return HOSTS.get(type(vit), TimmViT)


def build_host(config: VitConfig, weights: WeightFile | None = None) -> TimmViT:
    """The timm ViT that ``config`` names, with the stem that it names, as a host.

    Raises:
        ValueError: as :func:`tokenstep.hosts.timm_build.build_vit`; or the stem does not fit the
            patches.
        TokenstepError: the weights lack a part that is used, or do not fit.
    """
    vit = named_vit(config, weights)
    host = host_type(vit)
    if config.stem == "linear":
        return host(vit)
    return host(vit, ConvEmbed(int(vit.patch_embed.patch_size[0]), int(vit.embed_dim)))


def named_vit(config: VitConfig, weights: WeightFile | None = None) -> Any:
    """The timm ViT that ``config`` names, of any kind that has a host; raises as the above."""
    return build_vit(config, weights, require=lambda vit: host_type(vit).require(vit))
