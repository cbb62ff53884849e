"""Settings: what the parts of a model are made of, and how it runs."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal
from warnings import warn

from tokenstep.require import require

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
    """What looks for superpatches of ``sizes``, in patches: a CNN, or their entropy.

    ``kind`` "dcts" is the CNN. ``scale`` is the resolution it reads the picture at; ``stages`` are
    the feature stages of the timm ``trunk`` that feed its pyramid (stage k has stride
    ``2 ** (k + 1)`` in EfficientNets). ``pretrained`` is for recipes: the trunk starts from timm's
    weights on the hub (true) or from a safetensors file (its path). ``kind`` "entropy" (APT, arXiv
    2510.18091) learns nothing and uses nothing of these.
    """

    trunk: str = "mobilenetv3_small_100"
    stages: tuple[int, ...] = (1, 2, 3)
    sizes: tuple[int, ...] = (2, 4, 8, 16)
    width: int = 64
    scale: float = 0.5
    pretrained: bool | str = False
    kind: Literal["dcts", "entropy"] = "dcts"

    def __post_init__(self) -> None:
        require(len(set(self.sizes)) == len(self.sizes), "sizes", "distinct", self.sizes)
        rising = sorted({*self.stages}) == list(self.stages) and min(self.stages, default=0) >= 0
        require(rising, "stages", "rising from 0 or more", self.stages)
        require(self.kind in ("dcts", "entropy"), "kind", "dcts or entropy", self.kind)
        require(self.width >= 1, "width", "1 or more", self.width)
        require(0 < self.scale < math.inf, "scale", "above 0", self.scale)


@dataclass(frozen=True)
class Thresholds:
    """How much to save.

    ``merge`` holds one threshold in 0..1 per superpatch size and ``exits`` one per exit; empty
    means that the mechanism is off. ``spare`` is how many of the surest tokens of each class stay
    as context at an exit. ``reducers`` are other token reducers by name and strength, as
    "tome:share=0.1", asked in this order. All empty is the dense model.
    """

    merge: tuple[float, ...] = ()
    exits: tuple[float, ...] = ()
    spare: int = 5
    reducers: tuple[str, ...] = ()

    def without_merging(self) -> "Thresholds":
        """The same with merging off."""
        return replace(self, merge=())

    def without_exits(self) -> "Thresholds":
        """The same with exits and other reducers off."""
        return Thresholds(self.merge, (), self.spare)


DENSE = Thresholds()


@dataclass(frozen=True)
class Budget:
    """How much to save, the same for each picture: pictures of one size then have equal shapes.

    ``merge`` has for each side of a superpatch the share of a grid's patches that lie in
    superpatches of that side. ``exits`` has for each exit, named by the blocks run, how many
    tokens halt there, as a share of the grid's patches. Both are rounded to counts for a grid,
    so one budget serves pictures of any size. ``spare`` and ``reducers`` are those of
    :class:`Thresholds`; where the budget asks for more tokens to halt, the spared halt too.
    """

    merge: dict[int, float] = field(default_factory=dict)
    exits: dict[int, float] = field(default_factory=dict)
    spare: int = 5
    reducers: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash((*self.merge.items(), *self.exits.items(), self.spare, self.reducers))


Precision = Literal["auto", "fp32", "bf16", "fp16"]  # of weights and of all but what needs more

Spending = Thresholds | Budget  # how much to save: judged in each picture, or equal for all


@dataclass(frozen=True)
class MeasuredBudget:
    """A budget with what it was measured to lose and to cost, as an operating point is."""

    budget: Budget
    miou: float
    loss: float
    gmac: float


@dataclass(frozen=True)
class OperatingPoint:
    """Settings with what they were measured to lose and to cost, on ``images`` of ``split``.

    ``miou`` is 0 to 1, ``loss`` the points (hundredths) of mIoU below the best that calibration
    found, be it dense or not; ``gmac`` (all parts), ``tokens`` (at the start) and ``halted_share``
    are means per picture. ``fixed`` is the budget that spends on each picture what the thresholds
    spend on average; models calibrated by 0.1 have none.
    """

    thresholds: Thresholds
    miou: float
    loss: float
    gmac: float
    tokens: float
    halted_share: float
    split: str
    images: int
    fixed: MeasuredBudget | None = None

    @property
    def settings(self) -> Thresholds:
        """The former name of ``thresholds``."""
        warn("point.settings is now point.thresholds", DeprecationWarning, stacklevel=2)
        return self.thresholds

    def report(self) -> dict[str, Any]:
        """The point as reports hold it, whose thresholds have always been "settings" there."""
        plain = asdict(self)
        if self.fixed is None:
            del plain["fixed"]
        return {"settings": plain.pop("thresholds"), **plain}


def cheapest_within(points: Sequence[OperatingPoint], max_loss: float) -> OperatingPoint | None:
    """The cheapest point that was measured to lose at most ``max_loss`` points, if there is one."""
    within = (point for point in points if point.loss <= max_loss)
    return min(within, key=lambda point: point.gmac, default=None)


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


def require_normal(mean: Channels, std: Channels) -> None:
    """Refuse a mean or a std that pictures cannot be normalised by.

    Raises:
        TokenstepError: a value is not finite, or a std is not above 0.
    """
    require(all(map(math.isfinite, mean)), "mean", "three finite numbers", mean)
    require(all(0 < value < math.inf for value in std), "std", "three numbers above 0", std)
