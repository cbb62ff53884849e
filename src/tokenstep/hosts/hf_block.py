"""One layer of a transformers ViT over packed tokens, and which layers can run so."""

from typing import Any, cast

from torch import Tensor, nn
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3
from transformers.models.eomt import modeling_eomt as eomt
from transformers.models.eomt_dinov3 import modeling_eomt_dinov3 as eomt_dinov3
from transformers.models.vit import modeling_vit as vit

from tokenstep.core.attention import Attend, biased_width
from tokenstep.core.macs import linear_macs
from tokenstep.core.ragged import Segments
from tokenstep.hosts.base import kept_by_chance
from tokenstep.hosts.rotary import turned

# Layers, and the parts that are walked by hand.
PARTS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    vit.ViTLayer: (vit.ViTAttention,),
    dinov2.Dinov2Layer: (dinov2.Dinov2Attention,),
    registers.Dinov2WithRegistersLayer: (registers.Dinov2WithRegistersAttention,),
    dinov3.DINOv3ViTLayer: (dinov3.DINOv3ViTAttention,),
    eomt.EomtLayer: (eomt.EomtAttention,),
    eomt_dinov3.EomtDinov3Layer: (eomt_dinov3.EomtDinov3Attention,),
}
DROPS = (
    dinov2.Dinov2DropPath,
    registers.Dinov2WithRegistersDropPath,
    dinov3.Dinov3ViTDropPath,
    eomt.EomtDropPath,
    eomt_dinov3.EomtDinov3DropPath,
)


def require_layer(layer: nn.Module, path: str) -> None:
    """Refuse a layer that packed tokens cannot run.

    Raises:
        ValueError: names the part.
    """
    allowed = PARTS.get(type(layer))
    if allowed is None:
        raise ValueError(f"{path}: {type(layer).__name__} is not supported")
    require_walked(layer, path, (type(layer),))
    attention = cast(Any, layer).attention
    require_walked(attention, f"{path}.attention", allowed)
    if _either(attention, "attention_dropout", "dropout") > 0:
        raise ValueError(f"{path}.attention: attention dropout is not supported")
    drop = getattr(layer, "drop_path", None)
    require_walked(drop, f"{path}.drop_path", (nn.Identity, *DROPS, type(None)))


def require_walked(part: Any, path: str, allowed: tuple[type, ...]) -> None:
    """Refuse a part that is walked by hand where calling it would do something else.

    Raises:
        ValueError: it is of another type, a forward of its own was set on it, or somebody listens
            to it by a hook; what transformers itself listens by does not count.
    """
    if type(part) not in allowed:
        raise ValueError(f"{path}: {type(part).__name__} is not supported")
    if part is None:
        return
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    own = [hook for hook in hooks if not str(hook.__module__).startswith("transformers.")]
    if own or "forward" in vars(part):
        raise ValueError(f"{path}: has a hook or a forward of its own, which would not be called")


def _either(attention: Any, name: str, other: str) -> Any:
    """What the attention of one family calls ``name`` and that of another ``other``."""
    return getattr(attention, name) if hasattr(attention, name) else getattr(attention, other)


class HFBlock:
    """One layer over packed tokens, in two halves; stochastic depth is drawn per picture."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = cast(Any, layer)
        self.is_vit = isinstance(layer, vit.ViTLayer)
        self.attn = self.layer.attention

    @property
    def heads(self) -> int:
        """Heads of its attention."""
        return int(_either(self.attn, "num_attention_heads", "num_heads"))

    @property
    def first(self) -> nn.Module:
        """The module that it runs first."""
        layer = self.layer
        return cast(nn.Module, layer.layernorm_before if self.is_vit else layer.norm1)

    def attention(self, x: Tensor, attend: Attend, rotary: Tensor | None) -> Tensor:
        """Features ``(T, D)`` after attention."""
        attn, rows = self.attn, self.first(x)
        shape = (self.heads, attn.head_dim)
        q, k, v = (
            proj(rows).unflatten(-1, shape) for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = (turned(side, rotary, halves=True) for side in (q, k))
        attended = attend(q, k, v, scale=_either(attn, "scaling", "scale")).flatten(1)
        out = _either(attn, "o_proj", "out_proj")(attended)
        return x + self._branch(out, attend.segments, "layer_scale1")

    def mlp(self, x: Tensor, segments: Segments) -> Tensor:
        """Features ``(T, D)`` after the MLP."""
        layer = self.layer
        norm = layer.layernorm_after if self.is_vit else layer.norm2
        return x + self._branch(layer.mlp(norm(x)), segments, "layer_scale2")

    def _branch(self, out: Tensor, segments: Segments, scale: str) -> Tensor:
        """A branch as it is added to its input: dropped out, or scaled and kept by chance."""
        if self.is_vit:
            return cast(Tensor, self.layer.dropout(out))
        out = getattr(self.layer, scale)(out)
        drop = self.layer.drop_path
        if not drop.training or isinstance(drop, nn.Identity) or drop.drop_prob == 0:
            return out
        return kept_by_chance(out, segments, drop.drop_prob)

    def macs(self, rows: int, left: int, *, size_bias: bool) -> int:
        """Multiply-adds where attention sees ``rows`` rows of a picture and the MLP ``left``."""
        width = self.attn.head_dim
        channels = biased_width(width) if size_bias else width
        products = 2 * rows * rows * self.heads * channels
        return linear_macs(self.attn) * rows + products + linear_macs(self.layer.mlp) * left
