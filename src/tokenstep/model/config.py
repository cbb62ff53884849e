"""Everything that a segmenter is built from, and how it runs."""

from dataclasses import dataclass, field
from numbers import Real
from warnings import warn

from tokenstep.config import (
    DENSE,
    HALF,
    RGB,
    Budget,
    Channels,
    InitialWeights,
    OperatingPoint,
    PolicyConfig,
    Spending,
    Thresholds,
    VitConfig,
    cheapest_within,
    require_normal,
)
from tokenstep.errors import TokenstepError
from tokenstep.require import require, require_classes


@dataclass(frozen=True)
class ModelConfig:
    """Everything that a Segmenter is built from.

    Pictures are normalised by ``mean`` and ``std`` after scaling to 0..1. ``thresholds`` are what
    the model runs at unless it is told otherwise; ``points`` are what calibration measured, cheap
    to dear, and ``temperatures`` (one per exit, or none) what it divides the exits' logits by
    before their confidence is taken. ``long_side`` is the scale that it was trained at, in pixels:
    larger pictures of a user are scaled down to it unless told otherwise. None: a pixel has a
    meaning of its own, as a length on a map, or the scale is not known. ``initial`` says what its
    parts started from in training.
    """

    classes: tuple[str, ...]
    palette: tuple[RGB, ...]
    vit: VitConfig = field(default_factory=VitConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    thresholds: Thresholds = DENSE
    points: tuple[OperatingPoint, ...] = ()
    temperatures: tuple[float, ...] = ()
    mean: Channels = HALF
    std: Channels = HALF
    long_side: int | None = None
    initial: tuple[InitialWeights, ...] = ()

    def __post_init__(self) -> None:
        require_classes(self.classes, self.palette)
        require_normal(self.mean, self.std)
        for part, pretrained in (("vit", self.vit.pretrained), ("policy", self.policy.pretrained)):
            # A model has its own weights, and loads on machines without that file.
            require(pretrained is False, f"{part}.pretrained", "left to recipes", pretrained)
        side = self.long_side
        require(side is None or side >= 1, "long_side", "1 or more pixels", side)
        wanted = (0, len(self.vit.exits))
        if len(self.temperatures) not in wanted or min(self.temperatures, default=1) <= 0:
            raise TokenstepError(
                f"model: give no temperature or one above 0 per exit {self.vit.exits}, got "
                f"{self.temperatures}"
            )
        self.check(self.thresholds)
        for point in self.points:
            self.check(point.thresholds)
            if point.fixed is not None:
                self.check(point.fixed.budget)

    @property
    def settings(self) -> Thresholds:
        """The former name of ``thresholds``."""
        warn("config.settings is now config.thresholds", DeprecationWarning, stacklevel=2)
        return self.thresholds

    def point_within(self, max_loss: float, *, by_budget: bool = False) -> OperatingPoint | None:
        """The cheapest operating point that loses at most ``max_loss`` points; None for dense.

        ``by_budget`` counts what the points' budgets lose and cost instead of their thresholds.
        0 always means dense, even where a reduced point happened to measure better.

        Raises:
            TokenstepError: the model was not calibrated, or ``max_loss`` is negative or no number.
        """
        number = isinstance(max_loss, Real) and not isinstance(max_loss, bool)
        if not (number and max_loss >= 0):
            raise TokenstepError(f"max_loss is {max_loss!r}: give 0 or more points of mIoU, as 0.5")
        if max_loss == 0:
            return None
        if not self.points:
            raise TokenstepError(
                "the model has no operating points: run tokenstep calibrate on it first, or give "
                "thresholds"
            )
        if by_budget:
            measured = [(point.fixed, point) for point in self.points if point.fixed is not None]
            if not measured:
                raise TokenstepError(
                    "the model has no budgets: run tokenstep calibrate on it first, or give one"
                )
            fitting = [(one.gmac, point) for one, point in measured if one.loss <= max_loss]
            return min(fitting, key=lambda pair: pair[0], default=(0.0, None))[1]
        return cheapest_within(self.points, max_loss)

    def at(self, max_loss: float) -> tuple[Thresholds, OperatingPoint | None]:
        """What to run at to lose at most ``max_loss`` points, and its point; None with dense.

        Raises:
            TokenstepError: as :meth:`point_within`.
        """
        point = self.point_within(max_loss)
        return (DENSE, None) if point is None else (point.thresholds, point)

    def check(self, spending: Spending) -> None:
        """Refuse settings that do not fit this model.

        Raises:
            TokenstepError: there is not one threshold per superpatch size, or per exit, or a
                threshold is not within 0 to 1; a budget names a side or an exit that the model
                has not, or its shares are not within 0 to 1 together; or ``spare`` is negative.
        """
        what = "budget" if isinstance(spending, Budget) else "thresholds"
        if not 0 <= spending.spare < 2**31:
            raise TokenstepError(f"{what}: spare must be 0 or more, got {spending.spare}")
        named = [text for text in spending.reducers if text.partition(":")[0] == "exits"]
        if named and isinstance(spending, Budget):
            raise TokenstepError(f"budget: its exits are shares; leave out the reducer {named[0]}")
        for part, given, of in (
            ("superpatch size", spending.merge, self.policy.sizes),
            ("exit", spending.exits, self.vit.exits),
        ):
            if isinstance(given, dict):
                _check_shares(part, given, of)
            else:
                _check_thresholds(part, given, of)


def _check_shares(part: str, shares: dict[int, float], of: tuple[int, ...]) -> None:
    if not shares.keys() <= set(of):
        raise TokenstepError(f"budget: the model has each {part} of {of}, got {shares}")
    total = sum(shares.values())
    if not (all(share >= 0 for share in shares.values()) and total <= 1 + 1e-6):
        raise TokenstepError(
            f"budget: the shares of each {part} must be 0 or more and at most 1 together, got "
            f"{shares}"
        )


def _check_thresholds(part: str, thresholds: tuple[float, ...], of: tuple[int, ...]) -> None:
    if not all(0 <= threshold <= 1 for threshold in thresholds):
        raise TokenstepError(f"thresholds: must be 0 to 1, got {thresholds}")
    if thresholds and len(thresholds) != len(of):
        raise TokenstepError(
            f"thresholds: give no threshold or one per {part} {of}, got {thresholds}"
        )
