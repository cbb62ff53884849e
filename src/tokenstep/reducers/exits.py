"""Stage 4 of 6: early pruning. Exit heads halt the tokens that are already sure.

STEP (arXiv 2509.14165) and DToP (ICCV 2023) halt tokens whose confidence passes a threshold and
keep the few surest of each class as context. Their heads are attention modules; these are a norm
and a linear layer on purpose, since their cost is what ate STEP's speed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenstep.core import ragged
from tokenstep.core.attention import Attended
from tokenstep.core.macs import linear_macs
from tokenstep.core.tokens import PackedTokens
from tokenstep.reducers.base import Halt, Site, Turn

BAND_ROWS = 2048  # rows classified at a time: 19 MiB of fp32 logits with 16 x 150 of them a row


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


class EarlyPruning:
    """The reducer of STEP's second half: halts sure tokens at the exits.

    ``thresholds`` holds one confidence per exit; ``spare`` is how many of the surest tokens of
    each predicted class stay in each picture as context although they passed. ``temperatures``
    (one per exit, or none) make the confidence honest.
    """

    site: Site = "block"

    def __init__(
        self,
        exits: ExitHeads,
        thresholds: Sequence[float],
        spare: int,
        *,
        temperatures: Sequence[float] = (),
    ) -> None:
        if len(thresholds) != len(exits.after):
            raise ValueError(
                f"one threshold per exit: the model has exits after blocks {exits.after}, "
                f"got {len(thresholds)} thresholds"
            )
        self.exits = exits
        self.thresholds = tuple(thresholds)
        self.spare = spare
        self.temperatures = tuple(temperatures) or (1.0,) * len(self.thresholds)

    def __call__(
        self, tokens: PackedTokens, block: int, seen: Attended | None = None
    ) -> Halt | None:
        """Halt what is sure after a block, if there is an exit."""
        if block not in self.exits.after:
            return None
        index = self.exits.after.index(block)
        confidence, predicted = self.judged(tokens.x, index)
        # "not below" rather than "above": NaN halts, so that it is found in the final logits.
        passed = ~(confidence <= self.thresholds[index]) & ~tokens.is_prefix
        done = passed & ~self.spared(tokens, confidence, predicted, passed)
        return Halt(done, self.exits(tokens.x[done], index))

    @torch.no_grad()
    def judged(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Confidence and class of the rows ``x (T, D)`` at exit ``index``, in bands of rows.

        The logits of all rows at once can take more memory than the encoder, so they are made
        anew for the few that halt.
        """
        found = [
            confidence_of(self.exits(rows, index) / self.temperatures[index])
            for rows in torch.split(x, BAND_ROWS)
        ]
        confidence, predicted = zip(*found, strict=True)
        return torch.cat(confidence), torch.cat(predicted)

    def macs(self, turn: Turn) -> int:
        """The exit judges all rows, and classifies those that halt again."""
        head = self.exits.heads[self.exits.after.index(turn.block)]
        return linear_macs(head) * (2 * turn.before - turn.after)

    def spared(
        self, tokens: PackedTokens, confidence: Tensor, predicted: Tensor, passed: Tensor
    ) -> Tensor:
        """Mask ``(T,)`` of the ``spare`` surest passing tokens of each class in each picture."""
        classes = self.exits.classes
        # Rows that did not pass form a group of their own behind every picture's classes.
        group = tokens.picture() * (classes + 1) + torch.where(passed, predicted, classes)
        return passed & (ragged.rank_within(confidence, group) < self.spare)


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
        """Record the tokens and logits of the exit after a block, if there is one."""
        if block in self.exits.after:
            index = self.exits.after.index(block)
            self.seen.append((tokens, self.exits(tokens.x, index)))

    def macs(self, turn: Turn) -> int:
        """Looking on is no part of the model's compute."""
        return 0
