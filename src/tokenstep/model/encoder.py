"""Stage 3 of 6: PackedTokens -> PackedTokens through a ViT's blocks, reducers in between."""

from collections.abc import Sequence

from torch import nn

from tokenstep.core.ragged import Segments
from tokenstep.core.tokens import PackedTokens
from tokenstep.hosts.timm_block import BlockSettings, PlainViT, require_supported, run_block
from tokenstep.reducers.base import Reducer, apply


class Encoder(nn.Module):
    """The blocks and final norm of a timm ViT, over packed tokens of any lengths.

    Raises:
        ValueError: the ViT has a part that packed tokens cannot run, by name.
    """

    def __init__(self, vit: PlainViT, settings: BlockSettings) -> None:
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
            tokens = tokens.with_features(run_block(block, tokens, segments, self.settings))
            for reducer in reducers:
                decision = reducer(tokens, blocks_run)
                if decision is not None:
                    tokens = apply(decision, tokens, blocks_run)
                    segments = Segments.of(tokens.offsets)
        return tokens.with_features(self.norm(tokens.x)), live
