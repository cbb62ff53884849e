"""Compute of one picture in GMAC, from the tokens that it really had.

All of it is counted by formula. What convolutions cost, torch's counter says once per model: of one
window of the embedding here, of the policy's CNN in :mod:`tokenstep.policies.cnn_cost`. Norms,
softmax, activations and interpolation (of positions too, though that runs as products) are not
counted, as in the literature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from torch import nn

from tokenstep.core.macs import linear_macs
from tokenstep.core.partition import grid_of, token_counts
from tokenstep.hosts.base import HostBlock
from tokenstep.hosts.timm_block import TimmBlock
from tokenstep.model.build import Parts
from tokenstep.model.decoder import LinearDecoder, MaskDecoder
from tokenstep.model.encoder import Trace
from tokenstep.model.segmented import Segmented
from tokenstep.model.supertokens import Tokeniser
from tokenstep.policies.cnn_cost import count_macs
from tokenstep.reducers.base import Turn
from tokenstep.reducers.exits import Pruning

GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Cost:
    """GMAC of each stage for one picture."""

    policy: float
    embed: float
    blocks: float
    exits: float
    decoder: float
    reducers: float = 0.0  # what reducers other than the exits take to decide

    @property
    def total(self) -> float:
        """GMAC of all stages together."""
        stages = self.policy + self.embed + self.blocks + self.exits + self.decoder
        return stages + self.reducers


def decoder_macs(decoder: nn.Module, rows: int) -> int:
    """Multiply-adds of a decoder over the ``rows`` rows that are left."""
    if isinstance(decoder, MaskDecoder):
        joined = rows + decoder.classes
        project, tokens = linear_macs(decoder.project), linear_macs(decoder.token_project)
        own = linear_macs(decoder.class_project) * decoder.classes
        products = decoder.token_project.weight.shape[0] * decoder.classes * rows
        biased = decoder.settings.size_bias
        blocks = sum(
            TimmBlock(block).macs(joined, joined, size_bias=biased) for block in decoder.blocks
        )
        return (project + tokens) * rows + own + products + blocks
    if isinstance(decoder, LinearDecoder):
        return linear_macs(decoder) * rows
    raise TypeError(f"no cost is known for a decoder of type {type(decoder).__name__}")


def embed_macs(tokenise: Tokeniser) -> int:
    """Multiply-adds of embedding one window."""
    extent = tokenise.patch + 2 * tokenise.margin
    window = next(tokenise.parameters()).new_zeros(1, 3, extent, extent)
    return count_macs(partial(tokenise.host.embed, tokenise), window)


def asked_macs(
    trace: Trace, index: int, blocks: Sequence[HostBlock], *, dim: int
) -> tuple[int, int]:
    """Multiply-adds of the exits, and of all other reducers, where picture ``index`` was asked."""
    exits = reducers = 0
    for asked in trace.asked:
        macs = asked.reducer.macs(
            Turn(
                asked.block,
                asked.before[index],
                asked.after[index],
                dim=dim,
                heads=blocks[asked.block - 1].heads,
                prefix=trace.prefix[asked.block - 1],
            )
        )
        if isinstance(asked.reducer, Pruning):
            exits += macs
        else:
            reducers += macs
    return exits, reducers


class CostCounter:
    """Counts the compute of pictures, from the parts of a segmenter."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.host = parts.encoder.host
        self.size_bias = parts.encoder.settings.size_bias

    def of(self, segmented: Segmented, index: int) -> Cost:
        """Compute of picture ``index`` of a batch, from the rows that each block really saw."""
        trace = segmented.trace
        halves = zip(trace.attention, trace.mlp, strict=True)
        total = self._of_rows(
            segmented.sizes[index],
            [(before[index], left[index]) for before, left in halves],
            segmented.end(index),
            scored=segmented.scored,
        )
        exits, reducers = asked_macs(
            trace, index, self.parts.encoder.host_blocks(), dim=self.host.dim
        )
        total = replace(total, exits=exits / GIGA, reducers=reducers / GIGA)
        sub_patches = self.parts.tokenise.sub_patches
        if sub_patches is None:
            return total
        # The side path embeds every patch inside a superpatch, and projects their mean.
        merged = segmented.partition[index].clamp(min=0)
        patches, supertokens = int((merged > 0).sum()), int(token_counts(merged[merged > 0][None]))
        aside = self._embed_macs * patches + linear_macs(sub_patches) * supertokens
        return replace(total, embed=total.embed + aside / GIGA)

    def dense(self, size: tuple[int, int]) -> Cost:
        """Compute of a picture of ``size`` (h, w) without scores and reducers."""
        height, width = grid_of(size, self.host.patch)
        rows = height * width + self.host.prefix
        return self._of_rows(
            size, [(rows, rows)] * len(self.parts.encoder.host_blocks()), rows, scored=False
        )

    def _of_rows(
        self, size: tuple[int, int], rows: Sequence[tuple[int, int]], end: int, *, scored: bool
    ) -> Cost:
        """Compute of a picture but for its reducers.

        ``rows`` are those that each block's attention and MLP saw, ``end`` those of the decoder.
        """
        parts, context = self.parts, self.parts.tokenise.context
        seen = scored or context is not None
        embed = self._embed_macs + (0 if context is None else linear_macs(context))
        blocks = sum(
            block.macs(*counts, size_bias=self.size_bias)
            for block, counts in zip(parts.encoder.host_blocks(), rows, strict=True)
        )
        return Cost(
            policy=(parts.policy.macs(size, scores=scored) if seen else 0) / GIGA,
            embed=embed * (rows[0][0] - self.host.prefix) / GIGA,
            blocks=blocks / GIGA,
            exits=0.0,
            decoder=decoder_macs(parts.decoder, end) / GIGA,
        )

    @cached_property
    def _embed_macs(self) -> int:
        return embed_macs(self.parts.tokenise)
