"""Early pruning by a budget (ours): at each exit a fixed number of tokens halts, the surest."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tokenstep.core.tokens import PackedTokens
from tokenstep.reducers.exit_heads import ExitHeads
from tokenstep.reducers.exits import Pruning


class BudgetPruning(Pruning):
    """Halts equally many tokens in each picture of a size, the surest.

    ``shares`` has by exit, named by the blocks run, how many tokens halt there over the patches
    of a picture's grid, so all shapes are known beforehand. The spared tokens come last.
    """

    def __init__(
        self,
        exits: ExitHeads,
        shares: Mapping[int, float],
        spare: int,
        *,
        temperatures: Sequence[float] = (),
        whole: bool = False,
    ) -> None:
        super().__init__(exits, spare, temperatures, whole=whole)
        self.shares = dict(shares)

    def done(
        self, tokens: PackedTokens, confidence: Tensor, predicted: Tensor, index: int
    ) -> Tensor:
        """Mask ``(T,)`` of the rows that halt at exit ``index``."""
        judged = ~tokens.is_prefix
        spared = judged & (self.rank(tokens, confidence, predicted, judged) < self.spare)
        # Confidences are 0 to 1, so what is spared comes behind all others.
        rank = tokens.ranked(confidence - 2.0 * spared)
        counts = self.counts(tokens, index)
        if len(set(counts)) == 1:
            return judged & (rank < counts[0])
        count = torch.tensor(counts, device=rank.device)
        return judged & (rank < count[tokens.picture()])

    def counts(self, tokens: PackedTokens, index: int) -> tuple[int, ...]:
        """The share of each picture's grid, or all that is left."""
        share = self.shares.get(self.exits.after[index], 0.0)
        live = (length - tokens.prefix for length in tokens.segments.lengths)
        pairs = zip(tokens.cells, live, strict=True)
        return tuple(min(round(cells * share), left) for cells, left in pairs)
