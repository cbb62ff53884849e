"""timm's Eva as a host: EVA, EVA-02 and DINOv3, with rotary positions."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import (  # type: ignore[attr-defined]  # timm re-exports without saying so
    AttentionRope,
    DropPath,
    GluMlp,
    LayerNorm,
    Mlp,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    SwiGLU,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from tokenstep.core.attention import Attend, biased_width
from tokenstep.core.macs import linear_macs
from tokenstep.core.ragged import Segments
from tokenstep.core.tokens import PackedTokens
from tokenstep.hosts.rotary import FULL_TURN, centred, turned, turns
from tokenstep.hosts.timm_block import drop_path, require_embedding, require_parts
from tokenstep.hosts.timm_vit import TimmViT

NORMS = (nn.Identity, nn.LayerNorm, LayerNorm)
BLOCK_PARTS: dict[str, tuple[type, ...]] = {
    "attn": (EvaAttention, AttentionRope),
    "mlp": (Mlp, GluMlp, SwiGLU),
    "norm1": NORMS,
    "norm2": NORMS,
    "drop_path1": (nn.Identity, DropPath),
    "drop_path2": (nn.Identity, DropPath),
}


def require_eva(vit: nn.Module) -> None:
    """Refuse a model that packed tokens cannot run.

    Raises:
        ValueError: names the first part that is not supported.
    """
    if type(vit) is not Eva:
        raise ValueError(f"{type(vit).__name__} is not timm's Eva")
    require_embedding(vit)
    rope = vit.rope
    if type(rope) not in (type(None), RotaryEmbeddingCat, RotaryEmbeddingDinoV3):
        raise ValueError(f"rope: {type(rope).__name__} is not supported")
    if rope is not None and rope.aug_active:
        raise ValueError("rope: coordinates that are moved in training are not supported")
    kind = getattr(rope, "normalize_coords", "separate")
    if kind != "separate" or getattr(rope, "grid_type", "index") != "index":
        raise ValueError(f"rope: coordinates by {kind!r} are not supported")
    for index, block in enumerate(vit.blocks):
        if type(block) is not EvaBlock:
            raise ValueError(f"blocks.{index}: {type(block).__name__} is not supported")
        require_parts(block, BLOCK_PARTS, f"blocks.{index}")
        attn = cast(Any, block.attn)
        if attn.attn_drop.p > 0:
            raise ValueError(f"blocks.{index}.attn: attention dropout is not supported")
        if getattr(attn, "num_kv_groups", 1) > 1:
            raise ValueError(f"blocks.{index}.attn: shared keys and values are not supported")


class TimmEva(TimmViT):
    """timm's Eva as a host: embedded as a plain ViT, with rotary positions if it has them.

    Raises:
        ValueError: the model has a part that packed tokens cannot run, by name.
    """

    def __init__(self, vit: Eva, embedding: nn.Module | None = None) -> None:
        super().__init__(vit, embedding)
        self.parts[1]["rope"] = vit.rope

    @staticmethod
    def require(vit: nn.Module) -> None:
        """Refuse a model that it cannot stand for; raises as above."""
        require_eva(vit)

    def rotary(self, trunk: Any, tokens: PackedTokens) -> Tensor | None:
        """Sine and cosine by the mean place of each row's patches, ``(T, 1, 2 * d)``."""
        rope = trunk.rope
        if rope is None:
            return None
        if isinstance(rope, RotaryEmbeddingDinoV3):
            bands = FULL_TURN / cast(Tensor, rope.periods)
            offset = 2 * rope.grid_offset / tokens.sides()
            places = centred(tokens) + offset
        else:
            bands = cast(Tensor, rope.bands)
            places = tokens.middles() - 0.5 + rope.grid_offset
            if rope.ref_feat_shape is not None:
                reference = torch.tensor(rope.ref_feat_shape, device=places.device)
                places = places / tokens.sides() * reference
        if rope.grid_indexing == "xy":
            places = places.flip(1)
        return turns(places, bands, tokens.is_prefix, halves=rope.rotate_half)

    def blocks(self, trunk: Any) -> list["EvaHostBlock"]:  # type: ignore[override]
        """Its blocks, first to last."""
        return [EvaHostBlock(block) for block in trunk.blocks]


class EvaHostBlock:
    """One block of an Eva over packed tokens; stochastic depth is drawn per picture."""

    def __init__(self, block: nn.Module) -> None:
        self.block = cast(Any, block)

    @property
    def heads(self) -> int:
        """Heads of its attention."""
        return int(self.block.attn.num_heads)

    @property
    def first(self) -> nn.Module:
        """The module that it runs first."""
        return cast(nn.Module, self.block.norm1)

    def attention(self, x: Tensor, attend: Attend, rotary: Tensor | None) -> Tensor:
        """Features ``(T, D)`` after attention."""
        block, attn = self.block, self.block.attn
        rows = block.norm1(x)
        q, k, v = _projected(attn, rows)
        q, k = attn.q_norm(q), attn.k_norm(k)
        q, k = (turned(side, rotary, halves=attn.rotate_half) for side in (q, k))
        out = attn.norm(attend(q.type_as(v), k.type_as(v), v, scale=attn.scale).flatten(1))
        if attn.gate is not None:
            out = out * attn.gate(rows).sigmoid()
        out = attn.proj_drop(attn.proj(out))
        if block.gamma_1 is not None:
            out = block.gamma_1 * out
        return x + drop_path(block.drop_path1, out, attend.segments)

    def mlp(self, x: Tensor, segments: Segments) -> Tensor:
        """Features ``(T, D)`` after the MLP."""
        block = self.block
        out = block.mlp(block.norm2(x))
        if block.gamma_2 is not None:
            out = block.gamma_2 * out
        return x + drop_path(block.drop_path2, out, segments)

    def macs(self, rows: int, left: int, *, size_bias: bool) -> int:
        """Multiply-adds where attention sees ``rows`` rows of a picture and the MLP ``left``."""
        attn = self.block.attn
        channels = biased_width(attn.head_dim) if size_bias else attn.head_dim
        products = 2 * rows * rows * int(attn.num_heads * channels)
        return linear_macs(attn) * rows + products + linear_macs(self.block.mlp) * left


def _projected(attn: Any, x: Tensor) -> list[Tensor]:
    """Queries, keys and values of rows ``x (T, D)``, ``(T, heads, d)`` each."""
    if attn.qkv is None:
        apart = [attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)]
    elif getattr(attn, "q_bias", None) is None:
        apart = list(attn.qkv(x).chunk(3, dim=-1))
    else:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        apart = list(F.linear(x, attn.qkv.weight, bias).chunk(3, dim=-1))
    return [side.unflatten(-1, (attn.num_heads, attn.head_dim)) for side in apart]
