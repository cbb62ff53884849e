"""transformers' ViT, DINOv2 (with registers or not) and DINOv3 as hosts, and those of EoMTs."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3
from transformers.models.eomt import modeling_eomt as eomt
from transformers.models.eomt_dinov3 import modeling_eomt_dinov3 as eomt_dinov3
from transformers.models.vit import modeling_vit as vit

from tokenstep.core.partition import Grid
from tokenstep.core.tokens import PackedTokens
from tokenstep.errors import TokenstepError
from tokenstep.hosts.base import Learned
from tokenstep.hosts.hf_block import HFBlock, require_layer, require_walked
from tokenstep.hosts.positions import resampled
from tokenstep.hosts.rotary import FULL_TURN, centred, turns
from tokenstep.hosts.timm_embed import LinearEmbed

# Exact types: a subclass may override forward, and walking its parts would be silently wrong.
WITH_REGISTERS = (registers.Dinov2WithRegistersModel, registers.Dinov2WithRegistersBackbone)
DINO_V3 = (dinov3.DINOv3ViTModel, dinov3.DINOv3ViTBackbone)
EOMT = (eomt.EomtForUniversalSegmentation, eomt_dinov3.EomtDinov3ForUniversalSegmentation)
VITS = (vit.ViTModel, dinov2.Dinov2Model, dinov2.Dinov2Backbone, *WITH_REGISTERS, *DINO_V3)
MODELS = (*VITS, *EOMT)
WALKED = (  # stems, and what turns queries and keys
    vit.ViTEmbeddings,
    vit.ViTPatchEmbeddings,
    dinov2.Dinov2Embeddings,
    dinov2.Dinov2PatchEmbeddings,
    registers.Dinov2WithRegistersEmbeddings,
    registers.Dinov2WithRegistersPatchEmbeddings,
    dinov3.DINOv3ViTEmbeddings,
    dinov3.DINOv3ViTRopePositionEmbedding,
    eomt.EomtEmbeddings,
    eomt.EomtPatchEmbeddings,
    eomt_dinov3.EomtDinov3Embeddings,
    eomt_dinov3.EomtDinov3RotaryEmbedding,
    nn.Conv2d,
    type(None),
)


class HFViT:
    """A ViT of transformers as a host.

    Raises:
        ValueError: the model or one of its parts is not supported, by name.
    """

    margin = 0

    def __init__(self, model: nn.Module) -> None:
        if type(model) not in MODELS:
            known = ", ".join(kind.__name__ for kind in MODELS)
            raise ValueError(f"{type(model).__name__} is not supported: choose from {known}")
        config, stem = cast(Any, model).config, cast(Any, model).embeddings
        embeddings = stem.patch_embeddings
        proj = embeddings if isinstance(embeddings, nn.Conv2d) else embeddings.projection
        rope = getattr(model, "rope_embeddings", None)
        encoder = getattr(model, "encoder", None)
        for path, part in (("embeddings", stem), ("patch_embeddings", embeddings)):
            require_walked(part, path, WALKED)
        require_walked(proj, "patch_embeddings.projection", (nn.Conv2d,))
        require_walked(rope, "rope_embeddings", WALKED)
        for path, part in (("the model", model), ("encoder", encoder)):
            require_walked(part, path, (type(part),))
        self.patch = int(proj.kernel_size[0])
        if proj.kernel_size != (self.patch, self.patch) or proj.stride != proj.kernel_size:
            raise ValueError(
                f"patches of {proj.kernel_size} px are not supported, only square ones"
            )
        if proj.in_channels != 3 or any(proj.padding):
            raise ValueError("patch_embeddings: only 3 channels without padding are supported")
        layers = layers_of(model)
        if len(layers) != config.num_hidden_layers:
            raise ValueError("the model has other layers than its config says")
        self.dim = int(config.hidden_size)
        extra = getattr(stem, "register_tokens", None)
        self.prefix = 1 + (0 if extra is None else int(extra.shape[1]))
        self.antialias = isinstance(model, WITH_REGISTERS)
        table = getattr(stem, "position_embeddings", None)
        patches = 0 if table is None else _patch_table(table).shape[1]
        side = math.isqrt(patches)
        self.table_grid: Grid = (side, side)
        size = config.image_size
        square = isinstance(size, int) or len(set(size)) == 1
        if side * side != patches or not (table is None or square):
            raise ValueError("positions of pictures that are not square are not supported")
        for index, layer in enumerate(layers):
            require_layer(layer, f"layer.{index}")
        norm = cast(Any, model).norm if isinstance(model, DINO_V3) else cast(Any, model).layernorm
        self.parts: tuple[dict[str, Learned], dict[str, Learned]] = (
            {
                "embed": LinearEmbed(proj),
                "cls_token": stem.cls_token,
                "register_tokens": extra,
                "position_embeddings": table,
                "dropout": getattr(stem, "dropout", getattr(model, "dropout", None)),
            },
            {"layer": layers, "norm": norm, "rope": rope},
        )

    def before(self) -> Mapping[str, Learned]:
        """What it learned for use before its blocks, by name."""
        return self.parts[0]

    def behind(self) -> Mapping[str, Learned]:
        """Its layers and the norm behind them, by name."""
        return self.parts[1]

    def embed(self, stem: Any, windows: Tensor) -> Tensor:
        """Windows ``(n, 3, p, p)`` -> ``(n, D)``."""
        return cast(Tensor, stem.embed(windows))

    def embed_grid(self, stem: Any, canvas: Tensor) -> Tensor:
        """All patches of ``canvas`` at once -> ``(B, H, W, D)``."""
        return cast(Tensor, stem.embed.on_grid(canvas))

    def prefix_rows(self, stem: Any) -> Tensor:
        """CLS and register rows, ``(prefix, D)``; of them CLS alone has a position."""
        first, table = stem.cls_token[0], stem.position_embeddings
        if table is not None and not isinstance(table, nn.Embedding):
            first = first + table[0, :1]
        return first if self.prefix == 1 else torch.cat([first, stem.register_tokens[0]])

    def positions(self, stem: Any, grid: Grid) -> Tensor | None:
        """Position embedding of the cells of a grid, ``(1, D, H, W)``."""
        if stem.position_embeddings is None:
            return None
        table = _patch_table(stem.position_embeddings).transpose(1, 2)
        return resampled(torch.unflatten(table, 2, self.table_grid), grid, antialias=self.antialias)

    def rotary(self, trunk: Any, tokens: PackedTokens) -> Tensor | None:
        """DINOv3's sine and cosine by the mean place of each row's patches; else nothing."""
        if trunk.rope is None:
            return None
        moved = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
        if trunk.rope.training and any(getattr(trunk.rope.config, one) for one in moved):
            raise TokenstepError(
                "accelerate: places that are moved in training are not supported: call eval(), or "
                "set pos_embed_rescale and its like to None"
            )
        bands = FULL_TURN * trunk.rope.inv_freq
        return turns(centred(tokens), bands, tokens.is_prefix, halves=True)

    def enter(self, stem: Any, x: Tensor) -> Tensor:
        """Dropout before the first layer, if there is any."""
        return x if stem.dropout is None else cast(Tensor, stem.dropout(x))

    def blocks(self, trunk: Any) -> list[HFBlock]:
        """Its layers, first to last."""
        return [HFBlock(layer) for layer in trunk.layer]

    def norm(self, trunk: Any, x: Tensor) -> Tensor:
        """The norm behind the last layer."""
        return cast(Tensor, trunk.norm(x))


def _patch_table(table: Any) -> Tensor:
    """Positions of patches, ``(1, N, D)``; EoMT's table has none of CLS."""
    own = table.weight[None] if isinstance(table, nn.Embedding) else table[:, 1:]
    return cast(Tensor, own)


def layers_of(model: Any) -> nn.ModuleList:
    """The layers of a model of :data:`MODELS`."""
    if isinstance(model, (vit.ViTModel, *EOMT)):
        return model.layers
    encoder = model.model if isinstance(model, DINO_V3) else model.encoder
    return cast(nn.ModuleList, encoder.layer)
