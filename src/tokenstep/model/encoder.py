"""Stage 3 of 6: PackedTokens -> PackedTokens through timm's blocks, reducers in between."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
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
from torch.utils.checkpoint import checkpoint

from tokenstep.core import ragged
from tokenstep.core.attention import Backend, packed_attention, with_size_bias
from tokenstep.core.ragged import Segments
from tokenstep.core.tokens import PackedTokens
from tokenstep.reducers.base import Reducer, apply


@dataclass(frozen=True, slots=True)
class BlockSettings:
    """How the encoder runs; none of it changes a weight."""

    backend: Backend = "auto"
    size_bias: bool = False  # a supertoken weighs as much in attention as its patches
    checkpointing: bool = False  # recompute each block in the backward pass to save memory


class Encoder(nn.Module):
    """The blocks and final norm of a timm ViT, over packed tokens of any lengths.

    Raises:
        ValueError: the ViT has a part that packed tokens cannot run, by name.
    """

    def __init__(self, vit: VisionTransformer, settings: BlockSettings) -> None:
        super().__init__()
        require_supported(vit)
        self.blocks = vit.blocks
        self.norm = vit.norm
        self.dim = int(vit.embed_dim)
        self.settings = settings

    def forward(
        self, tokens: PackedTokens, reducers: Sequence[Reducer] = ()
    ) -> tuple[PackedTokens, list[tuple[int, ...]]]:
        """Run all blocks; also return the rows of each picture that entered each block.

        After a block every reducer is asked in turn; the final norm is applied to what is left.
        """
        segments = Segments.of(tokens.offsets)
        live: list[tuple[int, ...]] = []
        for blocks_run, block in enumerate(self.blocks, start=1):
            live.append(segments.lengths)
            tokens = tokens.with_features(
                run_block(cast(Block, block), tokens, segments, self.settings)
            )
            for reducer in reducers:
                decision = reducer(tokens, blocks_run)
                if decision is not None:
                    tokens = apply(decision, tokens, blocks_run)
                    segments = Segments.of(tokens.offsets)
        return tokens.with_features(self.norm(tokens.x)), live


def run_block(
    block: Block, tokens: PackedTokens, segments: Segments, settings: BlockSettings
) -> Tensor:
    """Features ``(T, D)`` after one timm block over packed tokens."""
    size = tokens.size if settings.size_bias else None
    attn = cast(Attention, block.attn)

    def forward(x: Tensor) -> Tensor:
        attended = attend(attn, block.norm1(x), segments, size=size, backend=settings.backend)
        x = x + _drop_path(block.drop_path1, block.ls1(attended), segments)
        return x + _drop_path(block.drop_path2, block.ls2(block.mlp(block.norm2(x))), segments)

    if settings.checkpointing and torch.is_grad_enabled():
        recomputed: Tensor = checkpoint(forward, tokens.x, use_reentrant=False)
        return recomputed
    return forward(tokens.x)


def attend(
    attn: Attention, x: Tensor, segments: Segments, *, size: Tensor | None, backend: Backend
) -> Tensor:
    """Run timm's attention on packed rows ``(T, D)``, with its own projections and norms."""
    # (T, 3, heads, d)
    qkv = attn.qkv(x).unflatten(1, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.unbind(1)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if size is not None:
        q, k, v = with_size_bias(q, k, v, size=size, scale=attn.scale)
    out = packed_attention(q, k, v, segments=segments, scale=attn.scale, backend=backend)
    out = out[..., : attn.head_dim].flatten(1)
    out = attn.norm(out)
    gate = getattr(attn, "gate", None)  # older timm has none
    if gate is not None:
        out = out * gate(x).sigmoid()
    return cast(Tensor, attn.proj_drop(attn.proj(out)))


def _drop_path(drop: nn.Module, branch: Tensor, segments: Segments) -> Tensor:
    """Stochastic depth per picture; timm's own would draw per row, that is per token."""
    if not (isinstance(drop, DropPath) and drop.training and drop.drop_prob > 0):
        return branch
    keep = 1.0 - drop.drop_prob
    kept = branch.new_empty(len(segments.lengths)).bernoulli_(keep)
    if drop.scale_by_keep:
        kept = kept / keep
    return branch * kept[ragged.picture_of(segments.offsets, len(branch))].unsqueeze(1)


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
    if type(vit.patch_embed) is not PatchEmbed:
        raise ValueError(f"patch embedding {type(vit.patch_embed).__name__} is not supported")
    if not isinstance(vit.patch_drop, nn.Identity):
        raise ValueError("patch dropout (patch_drop_rate > 0) is not supported")
    for index, block in enumerate(vit.blocks):
        if type(block) is not Block:
            raise ValueError(f"blocks.{index}: {type(block).__name__} is not supported")
        for name, allowed in BLOCK_PARTS.items():
            part = getattr(block, name)
            if type(part) not in allowed:
                raise ValueError(f"blocks.{index}.{name}: {type(part).__name__} is not supported")
        if cast(Attention, block.attn).attn_drop.p > 0:
            raise ValueError(f"blocks.{index}.attn: attention dropout is not supported")
