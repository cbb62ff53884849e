"""Stage 6 of 6: live tokens -> class scores; cells -> label map at picture size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tokenstep.core import ragged
from tokenstep.core.ragged import Segments
from tokenstep.core.tokens import PackedTokens
from tokenstep.core.unmerge import sub_cell_index
from tokenstep.model.encoder import BlockSettings, run_block


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
        self, dim: int, classes: int, side: int, *, heads: int, thresholds: BlockSettings
    ) -> None:
        super().__init__()
        self.classes = classes
        self.sub_cells = side**2
        self.thresholds = thresholds
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
                run_block(cast(Block, block), joined, segments, self.thresholds)
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


BAND_FLOATS = 4 * 2**20  # logits of the pixels looked at together: 16 MiB in fp32


def label_map(
    values: Sequence[Tensor], rows: Tensor, level: Tensor, *, patch: int, size: tuple[int, int]
) -> Tensor:
    """Class of every pixel of one picture, ``(h, w)`` uint8.

    ``values`` are the logits ``(T, S, C)`` of the live tokens and, if any halted, theirs;
    ``rows (H, W)``, which counts through both, and ``level (H, W)`` say which one speaks for each
    cell. The result is the argmax of the sub-cells' logits scaled up bilinearly. Where the four
    sub-cells around a pixel agree on a class, so does every mixture of them: only the squares
    between four that do not, a few in a hundred, are interpolated.
    """
    parts = [part.flatten(0, 1) for part in values]
    index = sub_cell_index(rows, level, round(values[0].shape[1] ** 0.5))
    best = torch.cat([part.max(dim=1).indices.to(torch.uint8) for part in parts])
    down = _Axis.of(rows.shape[0] * patch, index.shape[0], rows.device)
    across = _Axis.of(rows.shape[1] * patch, index.shape[1], rows.device)
    # A border of sub-cells all round, as bilinear scaling repeats them.
    index = index[down.cells][:, across.cells]
    fine = best[index]
    labels = fine.index_select(1, across.square).index_select(0, down.square)

    beside = fine[:, 1:] != fine[:, :-1]
    mixed = (fine[1:] != fine[:-1])[:, 1:] | beside[1:] | beside[:-1]
    mixed &= (down.count > 0)[:, None] & (across.count > 0)
    tops, lefts = mixed.nonzero(as_tuple=True)
    classes = parts[0].shape[1]
    band = max(1, BAND_FLOATS // (down.most * across.most * classes))
    for top, left in zip(torch.split(tops, band), torch.split(lefts, band), strict=True):
        corners = [index[top + below, left + right] for below in (0, 1) for right in (0, 1)]
        picked = _rows_of(parts, torch.cat(corners)).float()
        # The squares last in memory, since there are many more of them than classes.
        picked = picked.view(2, 2, len(top), classes).permute(3, 0, 1, 2).contiguous()
        y, x = down.pixels(top), across.pixels(left)
        scaled = torch.lerp(picked[:, :, :1], picked[:, :, 1:], across.weight[x])
        scaled = torch.lerp(scaled[:, :1], scaled[:, 1:], down.weight[y][:, None])
        labels[y[:, None], x] = scaled.max(0).indices.to(torch.uint8)
    return labels[: size[0], : size[1]]


@dataclass(frozen=True, slots=True)
class _Axis:
    """How bilinear scaling lays pixels between sub-cells along one axis.

    Square ``k`` lies between the centres of sub-cells ``k - 1`` and ``k``; the first and the last
    have one on both sides.
    """

    cells: Tensor  # the sub-cells with the first and the last one twice
    square: Tensor  # of each pixel
    weight: Tensor  # of each pixel: how near it is to the second of its square's sub-cells
    start: Tensor  # first pixel of each square
    count: Tensor  # pixels of each square
    most: int  # the largest count

    @classmethod
    def of(cls, pixels: int, cells: int, device: torch.device) -> "_Axis":
        centre = (torch.arange(pixels, device=device) + 0.5) * (cells / pixels) + 0.5
        square = centre.long()
        count = torch.bincount(square, minlength=cells + 1)
        return cls(
            torch.arange(-1, cells + 1, device=device).clamp(0, cells - 1),
            square,
            centre - square,
            count.cumsum(0) - count,
            count,
            -(-pixels // cells),
        )

    def pixels(self, squares: Tensor) -> Tensor:
        """Pixels of ``squares (n,)``, ``(most, n)``; one with fewer repeats its last."""
        steps = torch.arange(self.most, device=squares.device)[:, None]
        return self.start[squares] + torch.minimum(steps, self.count[squares] - 1)


def _rows_of(parts: Sequence[Tensor], index: Tensor) -> Tensor:
    """Rows ``index`` of ``cat(parts)``, without making that copy of all logits."""
    live = parts[0]
    if len(parts) == 1:
        return live[index]
    halted = parts[1]
    beyond = index - len(live)
    if not len(live):
        return halted[beyond]
    picked = live[index.clamp(max=len(live) - 1)]
    where = (beyond >= 0).nonzero(as_tuple=True)
    picked[where] = halted[beyond[where]].to(live.dtype)
    return picked
