"""Stage 5 of 6: live tokens -> logits of each sub-cell."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenstep.core.ragged import Segments
from tokenstep.core.tokens import PackedTokens
from tokenstep.hosts.base import BlockSettings
from tokenstep.hosts.timm_block import plain_block, run_block


class LinearDecoder(nn.Module):
    """One linear layer per token (Segmenter's linear decoder, arXiv 2105.05633)."""

    def __init__(self, dim: int, classes: int, side: int) -> None:
        super().__init__()
        self.sub_cells = side**2
        self.linear = nn.Linear(dim, self.sub_cells * classes)

    def forward(self, tokens: PackedTokens) -> Tensor:
        """Logits ``(T, S, C)`` of the live tokens."""
        logits: Tensor = self.linear(tokens.x)
        return torch.unflatten(logits, -1, (self.sub_cells, -1))


class MaskDecoder(nn.Module):
    """Segmenter's mask transformer on packed tokens (arXiv 2105.05633).

    Class embeddings join each picture's tokens for two blocks; the logits are dot products of
    normalised tokens and class embeddings.
    """

    def __init__(
        self, dim: int, classes: int, side: int, *, heads: int, settings: BlockSettings
    ) -> None:
        super().__init__()
        self.classes = classes
        self.sub_cells = side**2
        self.settings = settings
        self.class_embedding = nn.Parameter(torch.randn(classes, dim) * 0.02)
        self.project = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(plain_block(dim, heads) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.token_project = nn.Linear(dim, dim * self.sub_cells, bias=False)
        self.class_project = nn.Linear(dim, dim, bias=False)
        self.mask_norm = nn.LayerNorm(classes)

    def forward(self, tokens: PackedTokens) -> Tensor:
        """Logits ``(T, S, C)`` of the live tokens."""
        batch, rows = tokens.pictures, len(tokens.x)
        # Class rows go behind each picture's own rows.
        place = torch.arange(rows, device=tokens.x.device) + self.classes * tokens.picture()
        behind = torch.arange(self.classes * batch, device=tokens.x.device)
        behind = behind + tokens.offsets[1:].repeat_interleave(
            self.classes, output_size=len(behind)
        )
        projected = cast(Tensor, self.project(tokens.x))  # its dtype differs under autocast
        x = projected.new_empty(rows + len(behind), projected.shape[1])
        x = x.index_copy(0, place, projected)
        x = x.index_copy(0, behind, self.class_embedding.to(x.dtype).repeat(batch, 1))
        joined = self._joined(tokens, x, place)
        for block in self.blocks:
            joined = joined.with_features(run_block(block, joined, self.settings))
        x = self.norm(joined.x)
        own = torch.unflatten(self.token_project(x[place]), 1, (self.sub_cells, -1))
        own = F.normalize(own, dim=-1)
        classes = F.normalize(self.class_project(x[behind]), dim=-1)
        # Per picture, since one copy of the class embeddings per token would not fit in memory.
        lengths = [length - self.classes for length in joined.segments.lengths]
        pairs = zip(torch.split(own, lengths), torch.split(classes, self.classes), strict=True)
        masks = torch.cat([of_tokens @ of_classes.T for of_tokens, of_classes in pairs])
        return cast(Tensor, self.mask_norm(masks))

    def _joined(self, tokens: PackedTokens, x: Tensor, place: Tensor) -> PackedTokens:
        """Tokens and class rows as one packed sequence; class rows count as prefix rows."""
        more = torch.arange(tokens.pictures + 1, device=x.device) * self.classes
        segments = tokens.segments.plus(Segments(more, (self.classes,) * tokens.pictures))
        anchor = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        return PackedTokens(
            x=x,
            segments=segments,
            size=torch.ones_like(anchor).index_copy(0, place, tokens.size),
            anchor=anchor.index_copy(0, place, tokens.anchor),
            owner=tokens.owner,
            prefix=tokens.prefix + self.classes,
            grids=tokens.grids,
        )
