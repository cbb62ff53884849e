"""Recipes: how a policy and a segmenter are trained, read from flat TOML files."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from tokenstep.config import PolicyConfig, Settings, VitConfig, from_dict
from tokenstep.errors import TokenstepError

T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """The labelled folder and its augmentation.

    ``train_names`` and ``val_names`` are patterns of picture names; "!" before one excludes it.
    ``scale`` is the range of random scaling, ``colour`` the strength of random colour, ``rotate``
    adds quarter turns (for pictures without an up), ``cache`` keeps decoded pictures in memory.
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
    cache: bool = True
    workers: int = 1


@dataclass(frozen=True)
class TrainerConfig:
    """The loop: precision, devices and how often to write and look.

    ``val_every`` and ``save_every`` are steps; ``val_pictures`` limits the look while training.
    """

    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accelerator: str = "auto"
    devices: int = 1
    save_every: int = 100
    val_every: int = 500
    val_pictures: int = 32


@dataclass(frozen=True)
class Phase:
    """One stretch of training, with warm-up and cosine decay of the learning rate.

    ``dense_share`` is the share of pictures that run unmerged, so that the model is good both
    ways; ``pruning`` lets exits halt tokens at the model's own thresholds. ``head_lr`` times ``lr``
    is the rate of exits, decoder and the projection of policy features. ``optimizer`` "muon" gives
    the other matrices orthogonalised momentum (Jordan et al. 2024), at AdamW's rates, and leaves
    the rest to AdamW.
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
    optimizer: Literal["adamw", "muon"] = "adamw"


@dataclass(frozen=True)
class PolicyRecipe:
    """How to train a policy: recipes/*_policy.toml.

    ``tolerance`` is the impurity let pass. ``class_weight`` above 0 adds that times a loss of
    naming the classes, by a head that is dropped afterwards: it makes what the policy sees worth
    more to a ViT with ``policy_features``.
    """

    data: DataConfig
    phases: tuple[Phase, ...]
    patch: int
    out: str
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    tolerance: float = 0.0
    class_weight: float = 0.0
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        _check_phases(self.phases)


@dataclass(frozen=True)
class SegmenterRecipe:
    """How to train a segmenter with a frozen policy: recipes/*.toml.

    ``policy_weights`` is the folder that ``train policy`` wrote. ``class_balance`` is the power of
    the class weights (0: none), ``exit_weight`` the weight of all exits' losses together.
    """

    data: DataConfig
    phases: tuple[Phase, ...]
    policy_weights: str
    out: str
    settings: Settings
    vit: VitConfig = field(default_factory=VitConfig)
    class_balance: float = 0.0
    exit_weight: float = 0.5
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        _check_phases(self.phases)


def _check_phases(phases: tuple[Phase, ...]) -> None:
    if not phases:
        raise TokenstepError("recipe: has no [[phases]]; give at least one with steps and batch")


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
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign:
            raise TokenstepError(f"{override!r}: an override reads KEY=VALUE, as data.root=DIR")
        try:
            value: object = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        table = data
        *parents, name = key.split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise TokenstepError(f"{override!r}: {parent!r} is no table of {path}")
        table[name] = value
    return from_dict(kind, data, str(path))
