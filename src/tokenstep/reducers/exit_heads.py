"""Classifiers between a ViT's blocks, how sure they are, and a reducer that only listens to them.

The heads of STEP (arXiv 2509.14165) and DToP (ICCV 2023) are attention modules. These are a norm
and a linear layer on purpose, since their cost is what ate STEP's speed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenstep.core.attention import Attended
from tokenstep.core.tokens import PackedTokens
from tokenstep.reducers.base import Site, Turn


class TokenHead(nn.Module):
    """Norm and linear layer: features ``(T, D)`` -> logits ``(T, S, C)``."""

    def __init__(self, dim: int, classes: int, side: int) -> None:
        super().__init__()
        self.sub_cells = side**2
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, self.sub_cells * classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify every row, each sub-cell on its own."""
        logits: Tensor = self.linear(self.norm(x))
        return torch.unflatten(logits, -1, (self.sub_cells, -1))


class ExitHeads(nn.Module):
    """One :class:`TokenHead` after each of the blocks ``after`` (1 = the first block)."""

    def __init__(self, after: Sequence[int], dim: int, classes: int, side: int) -> None:
        super().__init__()
        self.after = tuple(after)
        self.classes = classes
        self.heads = nn.ModuleList(TokenHead(dim, classes, side) for _ in after)

    def forward(self, x: Tensor, exit_index: int) -> Tensor:
        """Logits ``(T, S, C)`` of exit number ``exit_index``."""
        logits: Tensor = self.heads[exit_index](x)
        return logits


def confidence_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence ``(T,)`` in 0..1 and class ``(T,)`` of each token from ``logits (T, S, C)``.

    The confidence is the mean over sub-cells of the top probability, so that a token across a
    boundary may halt when both of its sides are sure; its class is the one with the most mass.
    """
    # Classes first in memory, since there are few: on a CPU a fifth of the time.
    probabilities = logits.detach().float().movedim(-1, 0).contiguous().softmax(dim=0)
    return probabilities.amax(dim=0).mean(dim=-1), probabilities.mean(dim=-1).argmax(dim=0)


class DeepSupervision:
    """A reducer that halts nothing and keeps each exit's logits, for training with all heads."""

    site: Site = "block"

    def __init__(self, exits: ExitHeads) -> None:
        self.exits = exits
        self.seen: list[tuple[PackedTokens, Tensor]] = []

    def __call__(self, tokens: PackedTokens, block: int, seen: Attended | None = None) -> None:
        """Record the tokens and logits of the exit after a block, if there is one.

        Tokens that were dropped are among them, with the features that they wait with.
        """
        if block in self.exits.after:
            index, tokens = self.exits.after.index(block), tokens.rejoined()
            self.seen.append((tokens, self.exits(tokens.x, index)))

    def macs(self, turn: Turn) -> int:
        """Looking on is no part of the model's compute."""
        return 0
