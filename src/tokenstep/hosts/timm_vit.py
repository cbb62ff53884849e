"""A timm ViT with global attention as a host."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenstep.core.partition import Grid
from tokenstep.core.tokens import PackedTokens
from tokenstep.hosts.base import Learned, by_windows
from tokenstep.hosts.positions import resampled
from tokenstep.hosts.timm_block import TimmBlock, require_supported
from tokenstep.hosts.timm_embed import LinearEmbed


class TimmViT:
    """A timm ViT as a host, with ``embedding`` in the place of its own patch embedding if given.

    Raises:
        ValueError: the ViT has a part that packed tokens cannot run, by name.
    """

    def __init__(self, vit: Any, embedding: nn.Module | None = None) -> None:
        self.require(vit)
        if embedding is None:
            embedding = LinearEmbed(vit.patch_embed.proj, vit.patch_embed.norm)
        self.patch = int(vit.patch_embed.patch_size[0])
        self.margin = cast(int, embedding.margin)
        self.prefix = int(vit.num_prefix_tokens)
        self.dim = int(vit.embed_dim)
        self.table_grid: Grid = tuple(vit.patch_embed.grid_size)
        self.prefix_has_position = vit.pos_embed is not None and not vit.no_embed_class
        self.parts: tuple[dict[str, Learned], dict[str, Learned]] = (
            {
                "embed": embedding,
                "cls_token": vit.cls_token,
                "reg_token": vit.reg_token,
                "pos_embed": vit.pos_embed,
                "pos_drop": vit.pos_drop,
                "norm_pre": vit.norm_pre,
            },
            {"blocks": vit.blocks, "norm": vit.norm},
        )

    @staticmethod
    def require(vit: nn.Module) -> None:
        """Refuse a model that it cannot stand for; raises as above."""
        require_supported(vit)

    def before(self) -> Mapping[str, Learned]:
        """What it learned for use before its blocks, by name."""
        return self.parts[0]

    def behind(self) -> Mapping[str, Learned]:
        """Its blocks and the norm behind them, by name."""
        return self.parts[1]

    def embed(self, stem: Any, windows: Tensor) -> Tensor:
        """Windows ``(n, 3, k, k)``, a patch and its margin -> ``(n, D)``."""
        return cast(Tensor, stem.embed(windows))

    def embed_grid(self, stem: Any, canvas: Tensor) -> Tensor:
        """All patches of ``canvas`` with margins around -> ``(B, H, W, D)``."""
        if stem.embed.convolves:
            return cast(Tensor, stem.embed.on_grid(canvas))
        return by_windows(self, stem, canvas)

    def prefix_rows(self, stem: Any) -> Tensor:
        """CLS and register rows with their positions, ``(prefix, D)``."""
        parts = [part[0] for part in (stem.cls_token, stem.reg_token) if part is not None]
        rows = torch.cat(parts)
        return rows + stem.pos_embed[0, : self.prefix] if self.prefix_has_position else rows

    def positions(self, stem: Any, grid: Grid) -> Tensor | None:
        """Position embedding of the cells of a grid, ``(1, D, H, W)``, resampled as timm does."""
        if stem.pos_embed is None:
            return None
        prefix = self.prefix if self.prefix_has_position else 0
        table = stem.pos_embed[:, prefix:].transpose(1, 2)
        return resampled(torch.unflatten(table, 2, self.table_grid), grid)

    def rotary(self, trunk: Any, tokens: PackedTokens) -> Tensor | None:
        """It turns nothing."""
        return None

    def enter(self, stem: Any, x: Tensor) -> Tensor:
        """Dropout and norm of rows ``(..., D)`` before the first block."""
        return cast(Tensor, stem.norm_pre(stem.pos_drop(x)))

    def blocks(self, trunk: Any) -> list[TimmBlock]:
        """Its blocks, first to last."""
        return [TimmBlock(block) for block in trunk.blocks]

    def norm(self, trunk: Any, x: Tensor) -> Tensor:
        """The norm behind the last block."""
        return cast(Tensor, trunk.norm(x))
