"""Settings: what a model is made of, and how it runs."""

import math
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any, Literal
from warnings import warn

from tokenstep.errors import TokenstepError
from tokenstep.require import require, require_classes

RGB = tuple[int, int, int]
Channels = tuple[float, float, float]  # one value each for red, green and blue

HALF: Channels = (0.5, 0.5, 0.5)  # the mean and std of a model that names no other


@dataclass(frozen=True)
class InitialWeights:
    """What a part of a model started from in training, for the record; nothing reads it again.

    ``source`` is the name of a file without its folder, or an id on the Hugging Face hub.
    """

    part: Literal["vit", "policy"]
    source: str
    sha256: str


@dataclass(frozen=True)
class PolicyConfig:
    """The CNN that looks for superpatches.

    ``scale`` is the resolution it reads the picture at; ``stages`` are the feature stages of the
    timm ``trunk`` that feed its pyramid (stage k has stride ``2 ** (k + 1)`` in EfficientNets).
    ``pretrained`` is for recipes: the trunk starts from timm's weights on the hub (true) or from a
    safetensors file (its path).
    """

    trunk: str = "mobilenetv3_small_100"
    stages: tuple[int, ...] = (1, 2, 3)
    sizes: tuple[int, ...] = (2, 4, 8, 16)
    width: int = 64
    scale: float = 0.5
    pretrained: bool | str = False

    def __post_init__(self) -> None:
        require(len(set(self.sizes)) == len(self.sizes), "sizes", "distinct", self.sizes)
        rising = sorted({*self.stages}) == list(self.stages) and min(self.stages, default=0) >= 0
        require(rising, "stages", "rising from 0 or more", self.stages)
        require(self.width >= 1, "width", "1 or more", self.width)
        require(0 < self.scale < math.inf, "scale", "above 0", self.scale)


@dataclass(frozen=True)
class Thresholds:
    """How much to save.

    ``merge`` holds one threshold in 0..1 per superpatch size and ``exits`` one per exit; empty
    means that the mechanism is off, and both empty is the dense model.
    """

    merge: tuple[float, ...] = ()
    exits: tuple[float, ...] = ()
    spare: int = 5

    def without_merging(self) -> "Thresholds":
        """The same with merging off."""
        return Thresholds((), self.exits, self.spare)

    def without_exits(self) -> "Thresholds":
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

    @property
    def settings(self) -> Thresholds:
        """The former name of ``thresholds``."""
        warn("point.settings is now point.thresholds", DeprecationWarning, stacklevel=2)
        return self.thresholds

    def report(self) -> dict[str, Any]:
        """The point as reports hold it, whose thresholds have always been "settings" there."""
        plain = asdict(self)
        return {"settings": plain.pop("thresholds"), **plain}


@dataclass(frozen=True)
class VitConfig:
    """The ViT and what is built around it.

    ``name`` is any timm ViT with global attention; ``patch``, ``depth`` and ``image_size`` (h, w;
    the grid of the position table) override its own where given. ``stem`` "conv" puts a small
    convolutional stem in place of its patch embedding; ``policy_features`` adds what the policy's
    CNN saw to every token (it then runs for the dense model too); ``sub_patches`` adds a
    zero-initialised projection of its patches to a supertoken; ``size_bias`` lets it weigh as its
    patches in attention. ``exits`` are counts of blocks run; ``cells`` is the side of the
    sub-grid of logits per token. ``pretrained`` is for recipes: the ViT starts from timm's weights
    on the hub (true) or from a safetensors file (its path).
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
    pretrained: bool | str = False

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
        for thresholds in (self.thresholds, *(point.thresholds for point in self.points)):
            self.check(thresholds)

    @property
    def settings(self) -> Thresholds:
        """The former name of ``thresholds``."""
        warn("config.settings is now config.thresholds", DeprecationWarning, stacklevel=2)
        return self.thresholds

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

    def at(self, max_loss: float) -> tuple[Thresholds, OperatingPoint | None]:
        """What to run at to lose at most ``max_loss`` points, and its point; None with dense.

        Raises:
            TokenstepError: as :meth:`point_within`.
        """
        point = self.point_within(max_loss)
        return (DENSE, None) if point is None else (point.thresholds, point)

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
                f"thresholds: must be 0 to 1 and spare 0 or more, got {thresholds}"
            )
        for what, given, of in (
            ("superpatch size", thresholds.merge, self.policy.sizes),
            ("exit", thresholds.exits, self.vit.exits),
        ):
            if given and len(given) != len(of):
                raise TokenstepError(
                    f"thresholds: give no threshold or one per {what} {of}, got {given}"
                )


def require_normal(mean: Channels, std: Channels) -> None:
    """Refuse a mean or a std that pictures cannot be normalised by.

    Raises:
        TokenstepError: a value is not finite, or a std is not above 0.
    """
    require(all(map(math.isfinite, mean)), "mean", "three finite numbers", mean)
    require(all(0 < value < math.inf for value in std), "std", "three numbers above 0", std)
