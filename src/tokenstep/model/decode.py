"""Stage 6 of 6: live tokens -> class scores; cells -> label map at picture size."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tokenstep import ragged
from tokenstep.model.encoder import EncoderSettings, run_block
from tokenstep.model.unmerge import sub_cell_index
from tokenstep.ragged import Segments
from tokenstep.tokens import PackedTokens


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
        self, dim: int, classes: int, side: int, *, heads: int, settings: EncoderSettings
    ) -> None:
        super().__init__()
        self.classes = classes
        self.sub_cells = side**2
        self.settings = settings
        self.class_embedding = nn.Parameter(torch.randn(classes, dim) * 0.02)
        self.project = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.token_project = nn.Linear(dim, dim * self.sub_cells, bias=False)
        self.class_project = nn.Linear(dim, dim, bias=False)
        self.mask_norm = nn.LayerNorm(classes)

    def forward(self, tokens: PackedTokens) -> Tensor:
        """Logits ``(T, S, C)`` of the live tokens."""
        batch, rows = len(tokens.offsets) - 1, len(tokens.x)
        # Class rows go behind each picture's own rows.
        place = torch.arange(rows, device=tokens.x.device) + self.classes * tokens.picture()
        behind = torch.arange(self.classes * batch, device=tokens.x.device)
        behind = behind + tokens.offsets[1:].repeat_interleave(self.classes)
        projected = cast(Tensor, self.project(tokens.x))  # its dtype differs under autocast
        x = projected.new_empty(rows + len(behind), projected.shape[1])
        x = x.index_copy(0, place, projected)
        x = x.index_copy(0, behind, self.class_embedding.to(x.dtype).repeat(batch, 1))
        joined = self._joined(tokens, x, place)
        segments = Segments.of(joined.offsets)
        for block in self.blocks:
            joined = joined.with_features(
                run_block(cast(Block, block), joined, segments, self.settings)
            )
        x = self.norm(joined.x)
        own = torch.unflatten(self.token_project(x[place]), 1, (self.sub_cells, -1))
        own = F.normalize(own, dim=-1)
        classes = F.normalize(self.class_project(x[behind]), dim=-1)
        # Per picture, since one copy of the class embeddings per token would not fit in memory.
        lengths = [length - self.classes for length in segments.lengths]
        pairs = zip(torch.split(own, lengths), torch.split(classes, self.classes), strict=True)
        masks = torch.cat([of_tokens @ of_classes.T for of_tokens, of_classes in pairs])
        return cast(Tensor, self.mask_norm(masks))

    def _joined(self, tokens: PackedTokens, x: Tensor, place: Tensor) -> PackedTokens:
        """Tokens and class rows as one packed sequence; class rows count as prefix rows."""
        lengths = tokens.offsets.diff() + self.classes
        anchor = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        return PackedTokens(
            x=x,
            offsets=ragged.offsets_of(lengths),
            size=torch.ones_like(anchor).index_copy(0, place, tokens.size),
            anchor=anchor.index_copy(0, place, tokens.anchor),
            owner=tokens.owner,
        )


BAND_FLOATS = 24 * 2**20  # 96 MiB of fp32 logits at picture resolution at a time


def label_map(
    values: Sequence[Tensor], rows: Tensor, level: Tensor, *, patch: int, size: tuple[int, int]
) -> Tensor:
    """Class of every pixel of one picture, ``(h, w)`` uint8.

    ``values`` are the logits ``(T, S, C)`` of the live tokens and, if any halted, theirs;
    ``rows (H, W)``, which counts through both, and ``level (H, W)`` say which one speaks for each
    cell. Sub-cell logits are scaled up bilinearly and the argmax is taken band by band, so that
    logits at picture resolution never exist as a whole.
    """
    side = round(values[0].shape[1] ** 0.5)
    parts = [part.flatten(0, 1) for part in values]
    height, width = rows.shape
    band = max(1, BAND_FLOATS // (patch * patch * width * parts[0].shape[1]))
    labels = torch.empty(height * patch, width * patch, dtype=torch.uint8, device=rows.device)
    index = sub_cell_index(rows, level, side)
    for first in range(0, height, band):
        last = min(first + band, height)
        # One cell more on either side, so that a band's edge is interpolated as its middle is.
        above, below = max(first - 1, 0), min(last + 1, height)
        fine = _rows_of(parts, index[above * side : below * side]).permute(2, 0, 1)[None].float()
        # Class by class in memory, and max instead of argmax: on a CPU several times as fast.
        fine = fine.contiguous()
        target = ((below - above) * patch, width * patch)
        full = F.interpolate(fine, target, mode="bilinear", align_corners=False)[0]
        inner = full[:, (first - above) * patch : (last - above) * patch]
        labels[first * patch : last * patch] = inner.max(dim=0).indices
    return labels[: size[0], : size[1]]


def _rows_of(parts: Sequence[Tensor], index: Tensor) -> Tensor:
    """Rows ``index`` of ``cat(parts)``, without making that copy of all logits."""
    live = parts[0]
    if len(parts) == 1:
        return live[index]
    halted = parts[1]
    picked = live.new_empty(*index.shape, live.shape[1])
    lives = index < len(live)
    picked[lives] = live[index[lives]]
    picked[~lives] = halted[index[~lives] - len(live)].to(live.dtype)
    return picked
