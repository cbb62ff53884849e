"""Stage 4 of 6: early pruning. Exit heads halt the tokens that are already sure.

STEP (arXiv 2509.14165) and DToP (ICCV 2023) halt tokens whose confidence passes a threshold and
keep the few surest of each class as context.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokenstep.core import ragged
from tokenstep.core.attention import Attended
from tokenstep.core.macs import linear_macs
from tokenstep.core.tokens import PackedTokens
from tokenstep.errors import TokenstepError
from tokenstep.reducers.base import Halt, Site, Turn
from tokenstep.reducers.exit_heads import ExitHeads, confidence_of

BAND_ROWS = 2048  # rows classified at a time: 19 MiB of fp32 logits with 16 x 150 of them a row


class Pruning(ABC):
    """Halts tokens at the exits; which ones, :meth:`done` says.

    ``spare`` is how many of the surest tokens of each predicted class stay in each picture as
    context. ``temperatures`` (one per exit, or none) make the confidence honest. ``whole`` judges
    all rows at once, as a GPU wants it, instead of as many as a CPU's caches hold.
    """

    site: Site = "block"

    def __init__(
        self, exits: ExitHeads, spare: int, temperatures: Sequence[float], *, whole: bool
    ) -> None:
        self.exits = exits
        self.whole = whole
        self.spare = spare
        self.temperatures = tuple(temperatures) or (1.0,) * len(exits.after)

    def __call__(
        self, tokens: PackedTokens, block: int, seen: Attended | None = None
    ) -> Halt | None:
        """Halt what is sure after a block, if there is an exit."""
        if block not in self.exits.after:
            return None
        index = self.exits.after.index(block)
        confidence, predicted = self.judged(tokens.x, index)
        done = self.done(tokens, confidence, predicted, index)
        return Halt(done, partial(self.exits, exit_index=index), self.counts(tokens, index))

    @abstractmethod
    def done(
        self, tokens: PackedTokens, confidence: Tensor, predicted: Tensor, index: int
    ) -> Tensor:
        """Mask ``(T,)`` of the rows that halt at exit ``index``."""

    def counts(self, tokens: PackedTokens, index: int) -> tuple[int, ...] | None:
        """How many tokens of each picture halt at exit ``index``, if it does not depend on them."""
        return None

    @torch.no_grad()
    def judged(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Confidence and class of the rows ``x (T, D)`` at exit ``index``, in bands of rows.

        The logits of all rows at once can take more memory than the encoder, so they are made
        anew for the few that halt.
        """
        found = [
            confidence_of(self.exits(rows, index) / self.temperatures[index])
            for rows in torch.split(x, max(1, len(x)) if self.whole else BAND_ROWS)
        ]
        if len(found) == 1:
            return found[0]
        confidence, predicted = zip(*found, strict=True)
        return torch.cat(confidence), torch.cat(predicted)

    def macs(self, turn: Turn) -> int:
        """The exit judges all rows, and classifies those that halt again."""
        head = self.exits.heads[self.exits.after.index(turn.block)]
        return linear_macs(head) * (2 * turn.before - turn.after)

    def rank(
        self, tokens: PackedTokens, confidence: Tensor, predicted: Tensor, passed: Tensor
    ) -> Tensor:
        """How many passing tokens of its picture and class are surer than each that passes.

        ``(T,)`` int64; those of a rank below ``spare`` stay as context.
        """
        classes = self.exits.classes
        # Rows that did not pass form a group of their own behind every picture's classes.
        group = tokens.picture() * (classes + 1) + torch.where(passed, predicted, classes)
        return ragged.rank_within(confidence, group)


class EarlyPruning(Pruning):
    """The reducer of STEP's second half: halts tokens whose confidence passes a threshold.

    ``thresholds`` holds one confidence per exit.

    Raises:
        ValueError: there is not one threshold per exit.
    """

    def __init__(
        self,
        exits: ExitHeads,
        thresholds: Sequence[float],
        spare: int,
        *,
        temperatures: Sequence[float] = (),
        whole: bool = False,
    ) -> None:
        super().__init__(exits, spare, temperatures, whole=whole)
        if len(thresholds) != len(exits.after):
            raise ValueError(
                f"one threshold per exit: the model has exits after blocks {exits.after}, "
                f"got {len(thresholds)} thresholds"
            )
        self.thresholds = tuple(thresholds)

    def done(
        self, tokens: PackedTokens, confidence: Tensor, predicted: Tensor, index: int
    ) -> Tensor:
        """Mask ``(T,)`` of the rows that halt at exit ``index``."""
        # "not below" rather than "above": NaN halts, so that it is found in the final logits.
        passed = ~((confidence <= self.thresholds[index]) | tokens.is_prefix)
        return passed & (self.rank(tokens, confidence, predicted, passed) >= self.spare)


@dataclass(frozen=True, slots=True)
class Exits:
    """Early pruning by name, as other reducers are: what it learns is with the model.

    ``thresholds`` holds one confidence per exit of the model.

    Raises:
        TokenstepError: a setting is out of range.
    """

    thresholds: tuple[float, ...]
    spare: int = 5

    def __post_init__(self) -> None:
        if not (all(0 <= threshold <= 1 for threshold in self.thresholds) and self.spare >= 0):
            raise TokenstepError(f"thresholds are 0 to 1 and spare 0 or more, got {self}")

    def with_parts(
        self, exits: ExitHeads, temperatures: Sequence[float], *, whole: bool
    ) -> EarlyPruning:
        """The reducer of a model's exits.

        Raises:
            ValueError: there is not one threshold per exit.
        """
        return EarlyPruning(
            exits, self.thresholds, self.spare, temperatures=temperatures, whole=whole
        )
