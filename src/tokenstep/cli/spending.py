"""What the options of a command ask to spend: thresholds, reducers or a budget of a model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tokenstep.config import DENSE, Budget, OperatingPoint, Spending, Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.from_dict import from_dict

if TYPE_CHECKING:
    from tokenstep.model.any_segmenter import AnySegmenter


def choose(
    model: "AnySegmenter",
    *,
    dense: bool = False,
    max_loss: float | None = None,
    merge: str | None = None,
    exits: str | None = None,
    reducer: list[str] | None = None,
) -> tuple[Thresholds, OperatingPoint | None]:
    """The settings that the options ask for, and the operating point that they are, if one.

    Reducers stand in the place of the exits and of other reducers; merging by the policy stays.

    Raises:
        TokenstepError: the options contradict each other or do not fit the model.
    """
    if reducer:
        if dense or exits is not None:
            wrong = "--dense" if dense else "--exits"
            raise TokenstepError(f"--reducer: stands in the place of the exits; leave out {wrong}")
        thresholds, _ = choose(model, max_loss=max_loss, merge=merge)
        require_reducers(model, reducer)
        return replace(thresholds.without_exits(), reducers=tuple(reducer)), None
    by_hand = merge is not None or exits is not None
    if dense and (by_hand or max_loss is not None):
        raise TokenstepError("--dense: leave out --max-loss, --merge and --exits")
    if max_loss is not None and by_hand:
        raise TokenstepError("--max-loss: chooses the thresholds; leave out --merge and --exits")
    if dense:
        return DENSE, None
    if max_loss is not None:
        require_points(model, "--max-loss")
        return model.config.at(max_loss)
    thresholds = _by_hand(model, merge, exits)
    known = (point for point in model.config.points if point.thresholds == thresholds)
    return thresholds, next(known, None)


def require_points(model: "AnySegmenter", option: str) -> None:
    """Refuse to choose among the points of somebody else's model that has none.

    Raises:
        TokenstepError: says what to give instead, since calibrate does not take it.
    """
    if model.resizes and not model.config.points:
        raise TokenstepError(
            f"{option}: no points were measured of this model; give --policy and --reducer, or an "
            "--accelerator that holds points"
        )


def _by_hand(model: "AnySegmenter", merge: str | None, exits: str | None) -> Thresholds:
    """The model's own settings with what the command line changes."""
    thresholds = model.config.thresholds
    if merge is not None:
        sizes = model.config.policy.sizes
        thresholds = replace(
            thresholds, merge=_thresholds("--merge", merge, sizes, "superpatch size")
        )
    if exits is not None:
        after = model.config.vit.exits
        of_exits = _thresholds("--exits", exits, after, "exit")
        thresholds = replace(thresholds, exits=of_exits, reducers=())
    model.config.check(thresholds)
    return thresholds


def _thresholds(option: str, text: str, of: tuple[int, ...], what: str) -> tuple[float, ...]:
    if text == "off":
        return ()
    values = numbers(option, text, "numbers such as 0.6,0.6, or off")
    if not of:
        raise TokenstepError(f"{option} {text}: the model has no {what}; leave {option} out")
    if len(values) != len(of):
        raise TokenstepError(f"{option} {text}: give {len(of)} values, one per {what} {of}")
    return values


def numbers(option: str, text: str, wanted: str = "numbers such as 0.6,0.6") -> tuple[float, ...]:
    """The numbers of a list such as 0.6,0.6.

    Raises:
        TokenstepError: the text is no such list; says what is ``wanted``.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise TokenstepError(f"{option} {text}: give {wanted}") from error


def require_reducers(model: "AnySegmenter", texts: Sequence[str]) -> None:
    """Refuse what ``--reducer`` asks for if there is no such reducer, or it does not fit.

    Raises:
        TokenstepError: names the option and the remedy.
    """
    from tokenstep.model.spending import require_reducers

    named = Thresholds(reducers=tuple(texts))
    try:
        require_reducers([named], model.exits, model.depth)
    except TokenstepError as fault:
        raise TokenstepError(f"--{fault}") from fault


@dataclass(frozen=True)
class Asked:
    """What the options of a command that segments ask to spend."""

    dense: bool = False
    max_loss: float | None = None
    merge: str | None = None
    exits: str | None = None
    reducer: list[str] | None = None
    budget: str | None = None

    def of(self, model: "AnySegmenter") -> tuple[Spending, OperatingPoint | None]:
        """The same for a model, and the operating point that it is, if one.

        Raises:
            TokenstepError: the options contradict each other or do not fit the model.
        """
        thresholds, point = choose(
            model,
            dense=self.dense,
            max_loss=self.max_loss,
            merge=self.merge,
            exits=self.exits,
            reducer=self.reducer,
        )
        by_hand = self.dense or bool(self.merge or self.exits or self.reducer)
        return spending_of(
            model, self.budget, thresholds, point, max_loss=self.max_loss, by_hand=by_hand
        )


def spending_of(
    model: "AnySegmenter",
    budget: str | None,
    thresholds: Thresholds,
    point: OperatingPoint | None,
    *,
    max_loss: float | None = None,
    by_hand: bool = False,
) -> tuple[Spending, OperatingPoint | None]:
    """What ``--budget`` asks for, and its operating point; without it what was chosen before.

    That are ``thresholds`` of ``point``. ``by_hand`` says that --dense, --merge, --exits or
    --reducer chose them. With ``max_loss`` the budget itself loses at most so much.

    Raises:
        TokenstepError: there is no such budget, it does not fit the model, or other options
            contradict it.
    """
    if budget is None:
        return thresholds, point
    if by_hand:
        raise TokenstepError(
            "--budget: leave out --dense, --merge, --exits and --reducer; a file may name reducers"
        )
    if budget == "point":
        return _budget_of_point(model, point, max_loss)
    if max_loss is not None:
        raise TokenstepError("--budget FILE: says what is spent; leave out --max-loss")
    try:
        read = json.loads(Path(budget).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise TokenstepError(
            f"--budget {budget}: is no JSON file of a budget, such as "
            '{"merge": {"2": 0.4}, "exits": {"3": 0.2}}; or give point'
        ) from error
    given = from_dict(Budget, read, budget)
    model.config.check(given)
    require_reducers(model, given.reducers)
    return given, None


def _budget_of_point(
    model: "AnySegmenter", point: OperatingPoint | None, max_loss: float | None
) -> tuple[Budget, OperatingPoint | None]:
    if max_loss is not None:
        point = model.config.point_within(max_loss, by_budget=True)
        if point is None:  # dense
            return Budget(), None
    if point is None or point.fixed is None:
        raise TokenstepError(
            "--budget point: no calibrated budget belongs to these settings; choose by "
            "--max-loss, run tokenstep calibrate on the model, or give a JSON file"
        )
    return point.fixed.budget, point
