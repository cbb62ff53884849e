"""What a token reducer is: it decides, and the tokens act on its decision."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tokenstep.core.tokens import PackedTokens


@dataclass(frozen=True, slots=True)
class Merge:
    """Decision to merge: ``into (T,)`` int64, for :meth:`PackedTokens.merge`."""

    into: Tensor


@dataclass(frozen=True, slots=True)
class Halt:
    """Decision to halt: mask ``done (T,)`` and the final ``logits (A, S, C)`` of its rows."""

    done: Tensor
    logits: Tensor


class Reducer(Protocol):
    """Called after each block with the live tokens and the number of blocks run (1 = first).

    It returns what to do, or None to leave the tokens as they are. It must treat each picture on
    its own, leave prefix rows alone, and never change features or owners itself.
    """

    def __call__(self, tokens: PackedTokens, blocks_run: int) -> Merge | Halt | None:
        """Decide which of ``tokens`` merge or halt."""
        ...


def apply(decision: Merge | Halt | None, tokens: PackedTokens, blocks_run: int) -> PackedTokens:
    """Carry a reducer's decision out."""
    match decision:
        case Merge(into):
            return tokens.merge(into)
        case Halt(done, logits):
            return tokens.halt(done, logits, blocks_run)
        case None:
            return tokens
