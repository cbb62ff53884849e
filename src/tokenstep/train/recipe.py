"""Recipes: how a policy and a segmenter are trained, read from flat TOML files."""

import dataclasses
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from tokenstep.config import HALF, Channels, PolicyConfig, Thresholds, VitConfig, require_normal
from tokenstep.errors import TokenstepError
from tokenstep.from_dict import from_dict
from tokenstep.model.renamed import KEYS, with_new_keys
from tokenstep.require import require

T = TypeVar("T")

# What may change between two runs of one recipe: where things lie, how the work is done, and the
# scale that the model notes, which no weight depends on. Not the number of devices: it says which
# pictures a step takes. Of weights to start from, what they hold counts, by its digest.
ASIDE = frozenset(
    {"out", "scale_by", "data.root", "data.workers", "data.cache", "trainer.accelerator"}
    | {"policy_recipe"}
    | {"vit.pretrained", "policy.pretrained"}
    | {f"trainer.{name}" for name in ("checkpointing", "save_every", "val_every", "val_pictures")}
)


@dataclass(frozen=True)
class DataConfig:
    """The labelled folder and its augmentation.

    ``train_names`` and ``val_names`` are patterns of picture names; "!" before one excludes it.
    ``scale`` is the range of random scaling, ``colour`` the strength of random colour, ``rotate``
    adds quarter turns (for pictures without an up), ``cache`` keeps decoded pictures in memory,
    in each worker anew.
    """

    root: str
    train_split: str = "train"
    val_split: str = "val"
    train_names: tuple[str, ...] = ("*",)
    val_names: tuple[str, ...] = ("*",)
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    rotate: bool = False
    colour: float = 0.4
    cache: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        low, high = self.scale
        sound = 0.01 <= low <= high <= 100
        require(sound, "scale", "two factors from 0.01 to 100, rising", self.scale)
        require(0 <= self.colour <= 2, "colour", "0 to 2", self.colour)
        require(self.workers >= 0, "workers", "0 or more", self.workers)


@dataclass(frozen=True)
class TrainerConfig:
    """The loop: precision, devices and how often to write and look.

    ``precision`` "auto" is bf16 where the machine has arithmetic of it, else fp32; a run that has
    begun goes on in what it began with.
    ``val_every`` and ``save_every`` are steps; ``val_pictures`` limits the look while training, of
    all devices together.
    ``checkpointing`` recomputes each block in the backward pass, for less memory.
    """

    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    checkpointing: bool = False
    accelerator: str = "auto"
    devices: int = 1
    save_every: int = 100
    val_every: int = 500
    val_pictures: int = 32

    def __post_init__(self) -> None:
        for name in ("devices", "save_every", "val_every"):
            require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        require(self.val_pictures >= 0, "val_pictures", "0 or more", self.val_pictures)
        require(abs(self.seed) < 2**32, "seed", "below 2 ** 32", self.seed)


@dataclass(frozen=True)
class Phase:
    """One stretch of training, with warm-up and cosine decay of the learning rate.

    ``batch`` is the pictures of a step on each device, so that two devices take twice as many.
    ``dense_share`` is the share of pictures that run unmerged, so that the model is good both
    ways; ``pruning`` lets exits halt tokens at the model's own thresholds. ``head_lr`` times ``lr``
    is the rate of exits, decoder and the projection of policy features, and in a policy's training
    of all but its trunk. A block learns at ``layer_decay`` times the rate of the block above it,
    and the embedding so below the first, which keeps what pretrained ones know. ``optimizer``
    "muon" gives the other matrices orthogonalised momentum (Jordan et al. 2024), at AdamW's rates,
    and leaves the rest to AdamW. ``average`` above 0 is the decay, at each step, of an exponential
    moving average of the weights, which is what the phase ends with; less at first.
    """

    steps: int
    batch: int
    crop: tuple[int, int]
    lr: float = 5e-4
    warmup: int = 100
    weight_decay: float = 0.05
    dense_share: float = 0.1
    pruning: bool = False
    head_lr: float = 1.0
    layer_decay: float = 1.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    average: float = 0.0

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", "1 or more", self.steps)
        require(self.batch >= 1, "batch", "1 or more", self.batch)
        require(min(self.crop) >= 1, "crop", "1 or more pixels a side", self.crop)
        require(0 < self.lr < math.inf, "lr", "above 0", self.lr)
        require(0 < self.head_lr < math.inf, "head_lr", "above 0", self.head_lr)
        require(self.warmup >= 0, "warmup", "0 or more", self.warmup)
        decay = self.weight_decay
        require(0 <= decay < math.inf, "weight_decay", "0 or more", decay)
        require(0 <= self.dense_share <= 1, "dense_share", "0 to 1", self.dense_share)
        layers = self.layer_decay
        require(0 < layers <= 1, "layer_decay", "above 0 to 1", layers)
        require(0 <= self.average < 1, "average", "0 to below 1", self.average)


@dataclass(frozen=True)
class PolicyRecipe:
    """How to train a policy: recipes/*_policy.toml.

    ``tolerance`` is the impurity let pass. ``class_weight`` above 0 adds that times a loss of
    naming the classes, by a head that is dropped afterwards: it makes what the policy sees worth
    more to a ViT with ``policy_features``. Pictures are normalised by ``mean`` and ``std``, 0.5
    unless ``policy.pretrained = true`` brings its own; the segmenter's must be the same.
    """

    data: DataConfig
    phases: tuple[Phase, ...]
    patch: int
    out: str
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    tolerance: float = 0.0
    class_weight: float = 0.0
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    mean: Channels | None = None
    std: Channels | None = None

    def __post_init__(self) -> None:
        _check_phases(self.phases)
        _check_normal(self.mean, self.std)
        require(self.policy.kind == "dcts", "policy.kind", "dcts to be trained", self.policy.kind)
        require(self.patch >= 1, "patch", "1 or more", self.patch)
        require(0 <= self.tolerance < 1, "tolerance", "0 to below 1", self.tolerance)
        weight = self.class_weight
        require(0 <= weight < math.inf, "class_weight", "0 or more", weight)
        # A crop without a superpatch teaches nothing.
        least = (min(self.policy.sizes, default=1) - 1) * self.patch + 1
        for phase in self.phases:
            fits = min(phase.crop) >= least
            require(fits, "phases.crop", f"{least} or more pixels a side", phase.crop)


@dataclass(frozen=True)
class SegmenterRecipe:
    """How to train a segmenter with a frozen policy: recipes/*.toml.

    ``policy_weights`` is the folder that ``train policy`` wrote; where it holds no policy yet and
    ``policy_recipe`` names a file, one is trained by that recipe first, on the same pictures
    and for the same patches. In a recipe's file its name counts from that file's folder.
    ``class_balance`` is the power of the class weights (0: none), ``exit_weight`` the weight
    of all exits' losses together, and ``exit_distil`` the share of theirs that the last block
    teaches instead of the labels. ``scale_by`` "side" is for scenes: the model remembers the
    median long side of its pictures, and larger ones of its users are scaled down to that;
    "pixel" is for maps, where a pixel is a length on the ground: pictures stay as they are.
    ``mean`` and ``std`` must be the policy's; they are 0.5 unless ``vit.pretrained = true``
    brings its own.
    """

    data: DataConfig
    phases: tuple[Phase, ...]
    policy_weights: str
    out: str
    thresholds: Thresholds
    policy_recipe: str = ""
    vit: VitConfig = field(default_factory=VitConfig)
    class_balance: float = 0.0
    exit_weight: float = 0.5
    exit_distil: float = 0.0
    scale_by: Literal["side", "pixel"] = "pixel"
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    mean: Channels | None = None
    std: Channels | None = None

    def __post_init__(self) -> None:
        _check_phases(self.phases)
        _check_normal(self.mean, self.std)
        for name in ("class_balance", "exit_weight"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, "0 or more", value)
        require(0 <= self.exit_distil <= 1, "exit_distil", "0 to 1", self.exit_distil)


def normal_of(recipe: PolicyRecipe | SegmenterRecipe) -> tuple[Channels, Channels]:
    """The mean and std that a recipe's pictures are normalised by."""
    return recipe.mean or HALF, recipe.std or HALF


def _check_phases(phases: tuple[Phase, ...]) -> None:
    if not phases:
        raise TokenstepError("recipe: has no [[phases]]; give at least one with steps and batch")


def _check_normal(mean: Channels | None, std: Channels | None) -> None:
    if (mean is None) != (std is None):
        raise TokenstepError("recipe: mean and std belong together; give both or neither")
    require_normal(mean or HALF, std or HALF)


def read_recipe(kind: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read a recipe from a TOML file; ``overrides`` such as ``data.root=DIR`` go on top.

    A value of an override is TOML where it parses as such, else text.

    Raises:
        TokenstepError: the file is missing or no TOML, or a key is unknown or of a wrong type.
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise TokenstepError(f"{path}: cannot read the recipe ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TokenstepError(f"{path}: is no TOML file ({error})") from error
    data = cast(dict[str, Any], with_new_keys(data, str(path)))
    if isinstance(beside := data.get("policy_recipe"), str) and beside:
        data["policy_recipe"] = str(path.parent / beside)
    for override in overrides:
        _override(data, override, path)
    return from_dict(kind, data, str(path))


def _override(data: dict[str, Any], override: str, path: Path) -> None:
    """Put one ``KEY=VALUE`` on top of a recipe; a number in the key counts a list from 0."""
    key, sign, text = override.partition("=")
    if not sign:
        raise TokenstepError(f"{override!r}: an override reads KEY=VALUE, as data.root=DIR")
    try:
        value: object = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table: Any = data
    *parents, name = (KEYS.get(part, part) for part in key.split("."))
    for parent in parents:
        if isinstance(table, dict):
            table = table.setdefault(parent, {})
        elif isinstance(table, list) and parent in map(str, range(len(table))):
            table = table[int(parent)]
        else:
            table = None
    if not isinstance(table, dict):
        remedy = "the first phase is phases.0, as in phases.0.steps=5"
        raise TokenstepError(f"{override!r}: {'.'.join(parents)} is no table of {path}; {remedy}")
    table[name] = value


def resolved(recipe: PolicyRecipe | SegmenterRecipe, **records: object) -> dict[str, Any]:
    """The recipe as JSON holds it, with records of the files that it works on."""
    plain = {**dataclasses.asdict(recipe), **records}
    copy: dict[str, Any] = json.loads(json.dumps(plain))
    return copy


def differences(before: dict[str, Any], recipe: PolicyRecipe | SegmenterRecipe) -> list[str]:
    """Where ``recipe`` ends in other weights than a resolved one did, as "phases.0.steps 3 -> 4".

    A key that an earlier version did not know stands at its default; ``before`` has no records.

    Raises:
        TokenstepError: ``before`` is no recipe of this kind.
    """
    known = {"mean": HALF, "std": HALF, **before}  # which a run records as numbers
    if isinstance(recipe, PolicyRecipe):
        # Policies of 0.1 paid no heed to head_lr; their phases knew no layer_decay either.
        known["phases"] = [
            phase if "layer_decay" in phase else {**phase, "head_lr": 1.0}
            for phase in before.get("phases", [])
        ]
    read = from_dict(type(recipe), with_new_keys(known, "its recipe"), "its recipe")
    one = _flat(resolved(read))
    other = _flat(resolved(recipe))
    return [
        f"{key} {one.get(key, 'absent')} -> {other.get(key, 'absent')}"
        for key in dict.fromkeys([*one, *other])
        if key not in ASIDE and one.get(key) != other.get(key)
    ]


def _flat(table: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested tables as one, the keys joined by dots; a list of tables counts from 0."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(index): entry for index, entry in enumerate(value)}
        flat |= (
            _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
        )
    return flat
