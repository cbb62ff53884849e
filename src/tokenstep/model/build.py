"""The parts of a STEP segmenter, built from its settings: sizes live here, and nowhere else."""

from dataclasses import dataclass

from torch import nn

from tokenstep.hosts.base import BlockSettings
from tokenstep.hosts.timm_block import PlainViT
from tokenstep.hosts.timm_build import build_vit
from tokenstep.hosts.timm_embed import ConvEmbed
from tokenstep.hosts.timm_vit import TimmViT
from tokenstep.model.config import ModelConfig
from tokenstep.model.decoder import LinearDecoder, MaskDecoder
from tokenstep.model.encoder import Encoder
from tokenstep.model.supertokens import Tokeniser
from tokenstep.policies.dcts import Policy
from tokenstep.reducers.exit_heads import ExitHeads


@dataclass(frozen=True, slots=True)
class Parts:
    """What a segmenter is made of, one part per stage."""

    policy: Policy  # picture -> scores of superpatches
    tokenise: Tokeniser  # picture and partition -> supertokens
    encoder: Encoder  # supertokens through the ViT's blocks
    exits: ExitHeads  # heads between the blocks, for early pruning
    decoder: nn.Module  # tokens -> logits


def step_parts(config: ModelConfig, vit: PlainViT | None = None) -> Parts:
    """Build the parts of a plain ViT segmenter with dCTS and early pruning, untrained.

    ``vit`` is the ViT to build around, as :func:`tokenstep.hosts.timm_build.build_vit` makes it of
    ``config.vit``, which is done here if none is given.

    Raises:
        ValueError: the ViT has a part that packed tokens cannot run, by name; or the exits do not
            lie between its blocks.
    """
    vit = build_vit(config.vit) if vit is None else vit
    depth = len(vit.blocks)
    if list(config.vit.exits) != sorted({*config.vit.exits} & {*range(1, depth)}):
        raise ValueError(
            f"exits must be rising counts of blocks from 1 to {depth - 1}, "
            f"got {config.vit.exits} for {depth} blocks"
        )
    patch, dim = int(vit.patch_embed.patch_size[0]), int(vit.embed_dim)
    host = TimmViT(vit, ConvEmbed(patch, dim) if config.vit.stem == "conv" else None)
    classes, cells = len(config.classes), config.vit.cells
    settings = BlockSettings(size_bias=config.vit.size_bias)
    policy = Policy(config.policy, patch)
    tokenise = Tokeniser(
        host,
        sub_patches=config.vit.sub_patches,
        context=policy.channels if config.vit.policy_features else 0,
    )
    encoder = Encoder(host, settings)
    exits = ExitHeads(config.vit.exits, dim, classes, cells)
    decoder: nn.Module = LinearDecoder(dim, classes, cells)
    if config.vit.decoder == "mask":
        heads = host.blocks[0].heads
        decoder = MaskDecoder(dim, classes, cells, heads=heads, settings=settings)
    return Parts(policy, tokenise, encoder, exits, decoder)
