"""One block of a timm ViT over packed tokens, and which timm ViTs can run so."""

from collections.abc import Mapping
from typing import cast

from timm.layers import (  # type: ignore[attr-defined]  # timm re-exports without saying so
    Attention,
    DropPath,
    GluMlp,
    LayerNorm,
    Mlp,
    PatchEmbed,
    SwiGLU,
)
from timm.models.vision_transformer import (  # type: ignore[attr-defined]  # likewise
    Block,
    LayerScale,
    VisionTransformer,
)
from torch import Tensor, nn

from tokenstep.core.attention import Attend, biased_width
from tokenstep.core.macs import linear_macs
from tokenstep.core.ragged import Segments
from tokenstep.core.tokens import PackedTokens
from tokenstep.hosts.base import BlockSettings, kept_by_chance


class TimmBlock:
    """One timm block over packed tokens, in two halves, so that a reducer may act between them.

    Stochastic depth is drawn per picture; timm's own would draw per row, that is per token.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = cast(Block, block)

    @property
    def heads(self) -> int:
        """Heads of its attention."""
        return int(cast(Attention, self.block.attn).num_heads)

    @property
    def first(self) -> nn.Module:
        """The module that it runs first."""
        return self.block.norm1

    def attention(self, x: Tensor, attend: Attend, rotary: Tensor | None = None) -> Tensor:
        """Features ``(T, D)`` after attention."""
        block = self.block
        attended = attention_of(cast(Attention, block.attn), block.norm1(x), attend)
        return x + drop_path(block.drop_path1, block.ls1(attended), attend.segments)

    def mlp(self, x: Tensor, segments: Segments) -> Tensor:
        """Features ``(T, D)`` after the MLP."""
        block = self.block
        return x + drop_path(block.drop_path2, block.ls2(block.mlp(block.norm2(x))), segments)

    def macs(self, rows: int, left: int, *, size_bias: bool) -> int:
        """Multiply-adds where attention sees ``rows`` rows of a picture and the MLP ``left``.

        The size bias widens every head by the channel that carries it, and its padding.
        """
        attention = cast(Attention, self.block.attn)
        channels = biased_width(attention.head_dim) if size_bias else attention.head_dim
        products = 2 * rows * rows * int(attention.num_heads * channels)
        return linear_macs(attention) * rows + products + linear_macs(self.block.mlp) * left


def run_block(block: nn.Module, tokens: PackedTokens, settings: BlockSettings) -> Tensor:
    """Features ``(T, D)`` after one timm block over packed tokens, both halves."""
    cells = tokens.size if settings.size_bias else None
    attend = Attend(tokens.segments, cells=cells, backend=settings.backend)
    x = settings.run(TimmBlock(block).attention, tokens.x, attend)
    return settings.run(TimmBlock(block).mlp, x, tokens.segments)


def attention_of(attn: Attention, x: Tensor, attend: Attend) -> Tensor:
    """Run timm's attention on packed rows ``(T, D)``, with its own projections and norms."""
    # (T, 3, heads, d)
    qkv = attn.qkv(x).unflatten(1, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.unbind(1)
    out = attend(attn.q_norm(q), attn.k_norm(k), v, scale=attn.scale).flatten(1)
    out = attn.norm(out)
    gate = getattr(attn, "gate", None)  # older timm has none
    if gate is not None:
        out = out * gate(x).sigmoid()
    return cast(Tensor, attn.proj_drop(attn.proj(out)))


def drop_path(drop: nn.Module, branch: Tensor, segments: Segments) -> Tensor:
    """Keep or drop a branch, picture by picture."""
    if not (isinstance(drop, DropPath) and drop.training and drop.drop_prob > 0):
        return branch
    return kept_by_chance(branch, segments, drop.drop_prob, scale=drop.scale_by_keep)


# Exact types: a subclass may override forward, and running its parts would be silently wrong.
BLOCK_PARTS: dict[str, tuple[type, ...]] = {
    "attn": (Attention,),
    "mlp": (Mlp, GluMlp, SwiGLU),
    "norm1": (nn.LayerNorm, LayerNorm),
    "norm2": (nn.LayerNorm, LayerNorm),
    "ls1": (nn.Identity, LayerScale),
    "ls2": (nn.Identity, LayerScale),
    "drop_path1": (nn.Identity, DropPath),
    "drop_path2": (nn.Identity, DropPath),
}


def require_supported(vit: nn.Module) -> None:
    """Refuse a model that packed tokens cannot run.

    Raises:
        ValueError: names the first part that is not supported.
    """
    if type(vit) is not VisionTransformer:
        raise ValueError(
            f"{type(vit).__name__} is not timm's VisionTransformer: choose a plain ViT, DeiT-3 or "
            "DINOv2 model"
        )
    require_embedding(vit)
    for index, block in enumerate(vit.blocks):
        if type(block) is not Block:
            raise ValueError(f"blocks.{index}: {type(block).__name__} is not supported")
        require_parts(block, BLOCK_PARTS, f"blocks.{index}")
        if cast(Attention, block.attn).attn_drop.p > 0:
            raise ValueError(f"blocks.{index}.attn: attention dropout is not supported")


def require_embedding(vit: nn.Module) -> None:
    """Refuse a ViT that does not embed each patch by itself.

    Raises:
        ValueError: names the part.
    """
    if type(vit.patch_embed) is not PatchEmbed:
        raise ValueError(f"patch embedding {type(vit.patch_embed).__name__} is not supported")
    proj = vit.patch_embed.proj
    if type(proj) is not nn.Conv2d or proj.in_channels != 3:
        raise ValueError(
            f"patch_embed.proj: {type(proj).__name__} of {proj.in_channels} channels is not "
            "supported, only nn.Conv2d of 3"
        )
    if not isinstance(vit.patch_drop, nn.Identity | None):
        raise ValueError("patch dropout (patch_drop_rate > 0) is not supported")


def require_parts(block: nn.Module, allowed: Mapping[str, tuple[type, ...]], path: str) -> None:
    """Refuse a block with a part of a type that is not among those ``allowed``.

    Raises:
        ValueError: names the part.
    """
    for name, types in allowed.items():
        part = getattr(block, name)
        if type(part) not in types:
            raise ValueError(f"{path}.{name}: {type(part).__name__} is not supported")


def plain_block(dim: int, heads: int) -> Block:
    """A new timm block of ``dim`` features, as a mask decoder has two of."""
    return Block(dim, heads, qkv_bias=True)
