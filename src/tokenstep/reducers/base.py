"""What a token reducer is: it decides, and the tokens act on its decision."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tokenstep.core.attention import Attended
from tokenstep.core.tokens import PackedTokens

Site = Literal["attention", "block"]


@dataclass(frozen=True, slots=True)
class Merge:
    """Decision to merge: ``into (T,)`` int64, for :meth:`PackedTokens.merge`.

    ``weight (T,)`` is what a row counts in the mean of those that merge, its cells if not given.
    """

    into: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """Decision to drop: mask ``gone (T,)`` of rows that no later block sees.

    In a segmenter they keep the features that they have now and wait for the decoder.
    """

    gone: Tensor


@dataclass(frozen=True, slots=True)
class Halt:
    """Decision to halt: mask ``done (T,)`` of rows that leave with their final logits.

    ``classify`` makes the logits ``(A, S, C)`` of their features ``(A, D)``. ``counts`` says how
    many rows of each picture these are, where that is known without looking.
    """

    done: Tensor
    classify: Callable[[Tensor], Tensor]
    counts: tuple[int, ...] | None = None


Decision = Merge | Drop | Halt


class Reducer(Protocol):
    """Asked in each block with the live tokens and the block's number (1 = first).

    ``site`` says when: "attention", between the block's attention and its MLP, with what the
    attention saw; or "block", after the block, with nothing seen. It returns what to do, or None to
    leave the tokens as they are. It must treat each picture on its own, leave prefix rows alone,
    and never change features or owners itself.
    """

    @property
    def site(self) -> Site:
        """When it is asked."""
        ...

    def __call__(self, tokens: PackedTokens, block: int, seen: Attended | None) -> Decision | None:
        """Decide which of ``tokens`` merge, drop or halt."""
        ...

    def macs(self, turn: "Turn") -> int:
        """Multiply-adds of deciding, of one picture."""
        ...


@dataclass(frozen=True, slots=True)
class Turn:
    """One asking of a reducer about one picture; rows are counted with prefix rows."""

    block: int
    before: int  # rows that it judged
    after: int  # rows that its decision left
    dim: int  # features of a row
    heads: int  # of the block's attention
    prefix: int  # CLS and register rows among these


def apply(decision: Decision | None, tokens: PackedTokens, block: int) -> PackedTokens:
    """Carry out what a reducer decided in a block."""
    match decision:
        case Merge(into, weight):
            return tokens.merge(into, weight)
        case Drop(gone):
            return tokens.drop(gone, block)
        case Halt(done, classify, counts):
            return tokens.halt(done, classify, block, counts)
        case None:
            return tokens


def staying(decision: Decision) -> Tensor:
    """Mask ``(T,)`` of the rows that are live after a decision; they keep their order."""
    match decision:
        case Merge(into):
            return into == torch.arange(len(into), device=into.device)
        case Drop(gone):
            return ~gone
        case Halt(done):
            return ~done
