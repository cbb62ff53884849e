"""Settings: what a model is made of, how it runs, and how it is trained."""

import math
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from tokenstep.checks import require, require_classes
from tokenstep.errors import TokenstepError

T = TypeVar("T")

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class PolicyConfig:
    """The CNN that looks for superpatches.

    ``scale`` is the resolution it reads the picture at; ``stages`` are the feature stages of the
    timm ``trunk`` that feed its pyramid (stage k has stride ``2 ** (k + 1)`` in EfficientNets).
    """

    trunk: str = "mobilenetv3_small_100"
    stages: tuple[int, ...] = (1, 2, 3)
    sizes: tuple[int, ...] = (2, 4, 8, 16)
    width: int = 64
    scale: float = 0.5

    def __post_init__(self) -> None:
        require(len(set(self.sizes)) == len(self.sizes), "sizes", "distinct", self.sizes)
        rising = sorted({*self.stages}) == list(self.stages) and min(self.stages, default=0) >= 0
        require(rising, "stages", "rising from 0 or more", self.stages)
        require(self.width >= 1, "width", "1 or more", self.width)
        require(0 < self.scale < math.inf, "scale", "above 0", self.scale)


@dataclass(frozen=True)
class Thresholds:
    """How much to save: the thresholds of one operating point.

    ``merge`` holds one threshold in 0..1 per superpatch size and ``exits`` one per exit; empty
    means that the mechanism is off, and both empty is the dense model.
    """

    merge: tuple[float, ...] = ()
    exits: tuple[float, ...] = ()
    spare: int = 5

    def without_merging(self) -> "Settings":
        """The same with merging off."""
        return Thresholds((), self.exits, self.spare)

    def without_exits(self) -> "Settings":
        """The same with exits off."""
        return Thresholds(self.merge, (), self.spare)


DENSE = Thresholds()


@dataclass(frozen=True)
class OperatingPoint:
    """Settings with what they were measured to lose and to cost, on ``images`` of ``split``.

    ``miou`` is 0 to 1, ``loss`` the points (hundredths) of mIoU below the best that calibration
    found, be it dense or not; ``gmac`` (all parts), ``tokens`` (at the start) and ``halted_share``
    are means per picture.
    """

    thresholds: Thresholds
    miou: float
    loss: float
    gmac: float
    tokens: float
    halted_share: float
    split: str
    images: int


@dataclass(frozen=True)
class VitConfig:
    """The ViT and what is built around it.

    ``name`` is any timm ViT with global attention; ``patch``, ``depth`` and ``image_size`` (h, w;
    the grid of the position table) override its own where given. ``stem`` "conv" puts a small
    convolutional stem in place of its patch embedding; ``policy_features`` adds what the policy's
    CNN saw to every token (it then runs for the dense model too); ``sub_patches`` adds a
    zero-initialised projection of its patches to a supertoken; ``size_bias`` lets it weigh as its
    patches in attention. ``exits`` are counts of blocks run; ``cells`` is the side of the
    sub-grid of logits per token.
    """

    name: str = "vit_tiny_patch16_224"
    patch: int | None = None
    depth: int | None = None
    image_size: tuple[int, int] | None = None
    stem: Literal["linear", "conv"] = "linear"
    policy_features: bool = False
    sub_patches: bool = False
    size_bias: bool = False
    exits: tuple[int, ...] = ()
    decoder: Literal["linear", "mask"] = "linear"
    cells: Literal[1, 2, 4] = 1
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for what, value in (("vit.patch", self.patch), ("vit.depth", self.depth)):
            require(value is None or value >= 1, what, "1 or more", value)
        if self.image_size is not None:
            least = self.patch or 1
            size = self.image_size
            require(min(size) >= least, "vit.image_size", f"{least} or more a side", size)
        require(0 <= self.drop_path < 1, "vit.drop_path", "0 to below 1", self.drop_path)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that a Segmenter is built from.

    Pictures are normalised by ``mean`` and ``std`` after scaling to 0..1. ``thresholds`` are what
    the model runs at unless it is told otherwise; ``points`` are what calibration measured, cheap
    to dear, and ``temperatures`` (one per exit, or none) what it divides the exits' logits by
    before their confidence is taken. ``long_side`` is the scale that it was trained at, in pixels:
    larger pictures of a user are scaled down to it unless told otherwise. None: a pixel has a
    meaning of its own, as a length on a map, or the scale is not known.
    """

    classes: tuple[str, ...]
    palette: tuple[RGB, ...]
    vit: VitConfig = field(default_factory=VitConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    thresholds: Thresholds = DENSE
    points: tuple[OperatingPoint, ...] = ()
    temperatures: tuple[float, ...] = ()
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    long_side: int | None = None

    def __post_init__(self) -> None:
        require_classes(self.classes, self.palette)
        side = self.long_side
        require(side is None or side >= 1, "long_side", "1 or more pixels", side)
        wanted = (0, len(self.vit.exits))
        if len(self.temperatures) not in wanted or min(self.temperatures, default=1) <= 0:
            raise TokenstepError(
                f"model: give no temperature or one above 0 per exit {self.vit.exits}, got "
                f"{self.temperatures}"
            )
        for thresholds in (self.thresholds, *(point.thresholds for point in self.points)):
            self.check(thresholds)

    def point_within(self, max_loss: float) -> OperatingPoint | None:
        """The cheapest operating point that loses at most ``max_loss`` points; None for dense.

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
        within = [point for point in self.points if point.loss <= max_loss]
        return min(within, key=lambda point: point.gmac, default=None)

    def check(self, thresholds: Thresholds) -> None:
        """Refuse settings that do not fit this model.

        Raises:
            TokenstepError: there is not one threshold per superpatch size, or per exit, or a
                threshold is not within 0 to 1, or ``spare`` is negative.
        """
        if (
            not all(0 <= bar <= 1 for bar in thresholds.merge + thresholds.exits)
            or thresholds.spare < 0
        ):
            raise TokenstepError(
                f"settings: thresholds must be 0 to 1 and spare 0 or more, got {thresholds}"
            )
        for what, given, of in (
            ("superpatch size", thresholds.merge, self.policy.sizes),
            ("exit", thresholds.exits, self.vit.exits),
        ):
            if given and len(given) != len(of):
                raise TokenstepError(
                    f"settings: give no threshold or one per {what} {of}, got {given}"
                )


def from_dict(kind: type[T], data: object, where: str) -> T:
    """Build the dataclass ``kind`` from parsed JSON or TOML, nested ones too.

    Lists become tuples. Unknown keys and wrong types are errors, which name ``where``.

    Raises:
        TokenstepError: names the key, what was expected and what came.
    """
    return cast(T, _convert(kind, data, where))


def _convert(kind: Any, value: object, where: str) -> object:
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        return _convert(next(arg for arg in args if arg is not NoneType), value, where)
    if origin is Literal:
        # By type too, since True == 1 == 1.0.
        if (type(value), value) not in [(type(arg), arg) for arg in args]:
            raise TokenstepError(f"{where}: expected one of {list(args)}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TokenstepError(f"{where}: expected a list, got {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise TokenstepError(f"{where}: expected {len(kinds)} values, got {len(value)}")
        return tuple(
            _convert(inner, entry, f"{where}[{index}]")
            for index, (inner, entry) in enumerate(zip(kinds, value, strict=True))
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TokenstepError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _dataclass(kind: Any, value: object, where: str) -> object:
    if not isinstance(value, dict):
        raise TokenstepError(f"{where}: expected a table of settings, got {value!r}")
    hints = get_type_hints(kind)
    known = [entry.name for entry in fields(kind)]
    for key in value:
        if key not in known:
            raise TokenstepError(f"{where}: unknown key {key!r}, known are {', '.join(known)}")
    for entry in fields(kind):
        needed = entry.default is MISSING and entry.default_factory is MISSING
        if needed and entry.name not in value:
            raise TokenstepError(f"{where}: the key {entry.name!r} is missing")
    values = {key: _convert(hints[key], item, f"{where}: {key}") for key, item in value.items()}
    try:
        return kind(**values)
    except TokenstepError as error:
        raise TokenstepError(f"{where}: {error}") from error
