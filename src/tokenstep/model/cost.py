"""Compute of one picture in GMAC, from the tokens that it really had.

All of it is counted by formula. What convolutions cost, torch's counter says once per model: of one
window of the embedding here, of the policy's CNN in :mod:`tokenstep.policies.cnn_cost`. Norms,
softmax, activations and interpolation (of positions too, though that runs as products) are not
counted, as in the literature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from tokenstep.core.attention import biased_width
from tokenstep.core.partition import grid_of, token_counts
from tokenstep.model.build import Parts
from tokenstep.model.decoder import LinearDecoder, MaskDecoder
from tokenstep.model.segmented import Segmented
from tokenstep.policies.cnn_cost import count_macs
from tokenstep.reducers.exits import ExitHeads

GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Cost:
    """GMAC of each stage for one picture."""

    policy: float
    embed: float
    blocks: float
    exits: float
    decoder: float

    @property
    def total(self) -> float:
        """GMAC of all stages together."""
        return self.policy + self.embed + self.blocks + self.exits + self.decoder


def block_macs(block: nn.Module, rows: int, *, size_bias: bool = False) -> int:
    """Multiply-adds of a timm block over ``rows`` rows: its linear layers and attention.

    The size bias widens every head by the channel that carries it, and its padding.
    """
    attention = cast(Any, block.attn)
    channels = biased_width(attention.head_dim) if size_bias else attention.head_dim
    width = int(attention.num_heads * channels)
    return linear_macs(block) * rows + 2 * rows * rows * width


def linear_macs(module: nn.Module) -> int:
    """Multiply-adds of all linear layers of a module for one row."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def blocks_macs(blocks: Sequence[nn.Module], rows: Sequence[int], *, size_bias: bool) -> int:
    """Multiply-adds of all blocks, of which block k saw ``rows[k]`` rows."""
    return sum(
        block_macs(block, count, size_bias=size_bias)
        for block, count in zip(blocks, rows, strict=True)
    )


def exits_macs(exits: ExitHeads, rows: Sequence[int]) -> int:
    """Multiply-adds of the exits, of which block k saw ``rows[k]`` rows.

    The exit after block k judges all rows that ran block k, and classifies those that halt again.
    """
    heads = zip(exits.after, exits.heads, strict=True)
    return sum(linear_macs(head) * (2 * rows[after - 1] - rows[after]) for after, head in heads)


def decoder_macs(decoder: nn.Module, rows: int) -> int:
    """Multiply-adds of a decoder over the ``rows`` rows that are left."""
    if isinstance(decoder, MaskDecoder):
        joined = rows + decoder.classes
        project, tokens = linear_macs(decoder.project), linear_macs(decoder.token_project)
        own = linear_macs(decoder.class_project) * decoder.classes
        products = decoder.token_project.weight.shape[0] * decoder.classes * rows
        biased = decoder.settings.size_bias
        blocks = sum(block_macs(block, joined, size_bias=biased) for block in decoder.blocks)
        return (project + tokens) * rows + own + products + blocks
    if isinstance(decoder, LinearDecoder):
        return linear_macs(decoder) * rows
    raise TypeError(f"no cost is known for a decoder of type {type(decoder).__name__}")


def embed_macs(embed: nn.Module, extent: int) -> int:
    """Multiply-adds of embedding one window of ``extent`` pixels a side."""
    weight = next(embed.parameters())
    return count_macs(
        embed, torch.zeros(1, 3, extent, extent, device=weight.device, dtype=weight.dtype)
    )


class CostCounter:
    """Counts the compute of pictures, from the parts of a segmenter."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.size_bias = parts.encoder.settings.size_bias

    def of(self, segmented: Segmented, index: int) -> Cost:
        """Compute of picture ``index`` of a batch, from the rows that each block really saw."""
        rows = [rows[index] for rows in segmented.live]
        size, halted = segmented.sizes[index], segmented.tokens.halted is not None
        total = self._of_rows(
            size, rows, segmented.end(index), scored=segmented.scored, exits=halted
        )
        sub_patches = self.parts.tokenise.sub_patches
        if sub_patches is None:
            return total
        # The side path embeds every patch inside a superpatch, and projects their mean.
        merged = segmented.partition[index].clamp(min=0)
        patches, supertokens = int((merged > 0).sum()), int(token_counts(merged[merged > 0][None]))
        aside = self._embed_macs * patches + linear_macs(sub_patches) * supertokens
        return replace(total, embed=total.embed + aside / GIGA)

    def dense(self, size: tuple[int, int]) -> Cost:
        """Compute of a picture of ``size`` (h, w) without scores, merging and exits."""
        tokenise, blocks = self.parts.tokenise, self.parts.encoder.blocks
        height, width = grid_of(size, tokenise.patch)
        rows = height * width + tokenise.prefix_count
        return self._of_rows(size, [rows] * len(blocks), rows, scored=False, exits=False)

    def _of_rows(
        self, size: tuple[int, int], rows: Sequence[int], end: int, *, scored: bool, exits: bool
    ) -> Cost:
        """Compute of a picture of which block k saw ``rows[k]`` rows and the decoder ``end``."""
        parts, context = self.parts, self.parts.tokenise.context
        seen = scored or context is not None
        embed = self._embed_macs + (0 if context is None else linear_macs(context))
        blocks = list(parts.encoder.blocks)
        return Cost(
            policy=(parts.policy.macs(size, scores=scored) if seen else 0) / GIGA,
            embed=embed * (rows[0] - parts.tokenise.prefix_count) / GIGA,
            blocks=blocks_macs(blocks, rows, size_bias=self.size_bias) / GIGA,
            exits=(exits_macs(parts.exits, rows) if exits else 0) / GIGA,
            decoder=decoder_macs(parts.decoder, end) / GIGA,
        )

    @cached_property
    def _embed_macs(self) -> int:
        tokenise = self.parts.tokenise
        return embed_macs(tokenise.embed, tokenise.patch + 2 * tokenise.margin)
