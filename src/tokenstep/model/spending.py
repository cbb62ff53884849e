"""Thresholds or a budget -> how superpatches are chosen, and which reducers are asked."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from tokenstep.config import Budget, Spending, Thresholds
from tokenstep.core.partition import Grid, Plan, by_share, by_threshold, tokens_of
from tokenstep.errors import TokenstepError
from tokenstep.model.config import ModelConfig
from tokenstep.reducers.base import Reducer
from tokenstep.reducers.budget_exits import BudgetPruning
from tokenstep.reducers.exit_heads import ExitHeads
from tokenstep.reducers.exits import EarlyPruning, Exits, Pruning
from tokenstep.reducers.named import reducer_of


def spending_of(
    config: ModelConfig, thresholds: Thresholds | None, budget: Budget | None
) -> Spending:
    """What is asked for, the model's own thresholds if nothing is.

    Raises:
        TokenstepError: both are given, or the budget does not fit the model.
    """
    if budget is None:
        return config.thresholds if thresholds is None else thresholds
    if thresholds is not None:
        raise TokenstepError("give one of thresholds, budget and max_loss")
    if not isinstance(budget, Budget):
        raise TokenstepError(f"budget is {budget!r}: give tokenstep.Budget(...)")
    config.check(budget)
    return budget


def plan_of(spending: Spending, sizes: Sequence[int]) -> Plan | None:
    """How superpatches of ``sizes`` are chosen by their scores; None where nothing merges."""
    if isinstance(spending, Budget):
        merges = any(spending.merge.values())
        return partial(by_share, sizes=sizes, shares=spending.merge) if merges else None
    if not spending.merge:
        return None
    return partial(by_threshold, sizes=sizes, thresholds=spending.merge)


def tokens_known(spending: Spending, grids: Sequence[Grid]) -> list[int] | None:
    """Tokens of pictures of these grids at the start, where no picture has to be looked at."""
    if isinstance(spending, Budget):
        return [tokens_of(spending.merge, grid) for grid in grids]
    return None if spending.merge else [height * width for height, width in grids]


def reducers_of(
    spending: Spending, exits: ExitHeads, temperatures: Sequence[float], *, whole: bool = False
) -> list[Reducer]:
    """The reducers in the order in which they are asked, the one of the exits last.

    ``whole`` is how exits judge, see :class:`tokenstep.reducers.exits.Pruning`.

    Raises:
        TokenstepError: a reducer's text names none, or a setting of it is out of range.
        ValueError: exits have not one threshold per exit of the model.
    """
    found: list[Reducer] = []
    for text in spending.reducers:
        named = reducer_of(text)
        # What exits have learned lies in the model, under their name.
        if isinstance(named, Exits):
            named = named.with_parts(exits, temperatures, whole=whole)
        found.append(named)
    return [*found, *pruning_of(spending, exits, temperatures, whole=whole)]


def require_reducers(spendings: Iterable[Spending], exits: ExitHeads, depth: int) -> None:
    """Refuse spending whose reducers do not fit a model of ``depth`` blocks with these exits.

    Raises:
        TokenstepError: a reducer's text names none, a setting of it is out of range, it has not
            one threshold per exit, or it names a block that the model has not.
    """
    for spending in spendings:
        for text in spending.reducers:
            try:
                (reducer,) = reducers_of(Thresholds(reducers=(text,)), exits, ())
            except ValueError as fault:
                raise TokenstepError(f"reducer {text}: {fault}") from fault
            blocks = getattr(reducer, "blocks", ())
            if any(block > depth for block in blocks):
                raise TokenstepError(
                    f"reducer {text}: acts in the blocks {blocks} of a model that has {depth}: "
                    "name some of these, as blocks=[1,2]"
                )


def pruning_of(
    spending: Spending, exits: ExitHeads, temperatures: Sequence[float], *, whole: bool = False
) -> list[Pruning]:
    """The reducer that halts tokens at the exits; none where they are off."""
    spare = spending.spare
    if isinstance(spending, Budget):
        if not any(spending.exits.values()):
            return []
        budget = BudgetPruning(exits, spending.exits, spare, temperatures=temperatures, whole=whole)
        return [budget]
    if not spending.exits:
        return []
    return [EarlyPruning(exits, spending.exits, spare, temperatures=temperatures, whole=whole)]


def as_keyword(spending: Spending) -> dict[str, Any]:
    """The keyword argument of :meth:`Segmenter.segment_batch` that says so."""
    return {"budget" if isinstance(spending, Budget) else "thresholds": spending}
