import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from tokenstep.config import DENSE, OperatingPoint, PolicyConfig, Thresholds, VitConfig
from tokenstep.errors import TokenstepError
from tokenstep.from_dict import from_dict
from tokenstep.model.config import ModelConfig
from tokenstep.train.recipe import (
    DataConfig,
    Phase,
    PolicyRecipe,
    SegmenterRecipe,
    TrainerConfig,
)

MODEL = ModelConfig(("a", "b"), ((0, 0, 0), (1, 2, 3)), VitConfig(exits=(2, 4), cells=2))


@dataclass(frozen=True)
class Inner:
    count: int = 1
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Outer:
    root: str
    rate: float = 0.5
    on: bool = False
    pair: tuple[int, float] = (1, 2.0)
    choice: Literal["x", 1, 2] = "x"
    maybe: int | None = None
    inner: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()


def test_lists_and_tables_become_tuples_and_dataclasses() -> None:
    data = {
        "root": "here",
        "rate": 1,
        "on": True,
        "pair": [3, 4],
        "choice": 2,
        "maybe": 7,
        "inner": {"count": 2, "names": ["b", "c"]},
        "many": [{"count": 5}, {}],
    }
    built = from_dict(Outer, data, "file")
    assert built == Outer(
        "here", 1.0, True, (3, 4.0), 2, 7, Inner(2, ("b", "c")), (Inner(5), Inner())
    )
    assert isinstance(built.rate, float)
    assert isinstance(built.pair[1], float)


def test_what_is_left_out_keeps_its_default() -> None:
    assert from_dict(Outer, {"root": "here", "maybe": None}, "file") == Outer("here")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({}, "root"),
        ({"root": 1}, "root"),
        ({"root": "r", "rat": 1.0}, "rat"),
        ({"root": "r", "rate": "1e-4"}, "rate"),
        ({"root": "r", "rate": True}, "rate"),
        ({"root": "r", "on": 1}, "on"),
        ({"root": "r", "maybe": 1.5}, "maybe"),
        ({"root": "r", "choice": 3}, "choice"),
        ({"root": "r", "choice": True}, "choice"),
        ({"root": "r", "choice": 1.0}, "choice"),
        ({"root": "r", "pair": [1]}, "pair"),
        ({"root": "r", "pair": 3}, "pair"),
        ({"root": "r", "inner": []}, "inner"),
        ({"root": "r", "inner": {"names": ["a", 2]}}, r"inner: names\[1\]"),
        ({"root": "r", "many": [{}, {"cuont": 1}]}, "cuont"),
        ("text", "table"),
        (None, "table"),
    ],
)
def test_faults_are_named_in_one_line(data: object, named: str) -> None:
    with pytest.raises(TokenstepError, match=named) as caught:
        from_dict(Outer, data, "recipe.toml")
    assert str(caught.value).startswith("recipe.toml")
    assert "\n" not in str(caught.value)


def test_unknown_keys_are_answered_with_the_known_ones() -> None:
    with pytest.raises(TokenstepError, match="known are root, rate"):
        from_dict(Outer, {"root": "r", "rat": 1}, "file")


def test_a_model_survives_json() -> None:
    text = json.dumps(dataclasses.asdict(MODEL))
    assert from_dict(ModelConfig, json.loads(text), "config.json") == MODEL


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": (), "palette": ()},
        {"palette": ((0, 0, 0),)},
        {"classes": tuple(map(str, range(256))), "palette": ((0, 0, 0),) * 256},
        {"classes": ("a", "a")},
        {"classes": ("a", " ")},
        {"palette": ((0, 0, 0), (0, 256, 0))},
        {"palette": ((0, 0, 0), (0, -1, 0))},
        {"thresholds": Thresholds(merge=(0.5,))},
        {"thresholds": Thresholds(exits=(0.5, 0.5, 0.5))},
        {"thresholds": Thresholds(merge=(0.5, 0.5, 0.5, 1.5))},
        {"thresholds": Thresholds(exits=(-0.1, 0.5))},
        {"thresholds": Thresholds(exits=(float("nan"), 0.5))},
        {"thresholds": Thresholds(spare=-1)},
    ],
)
def test_a_model_that_does_not_fit_together_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(TokenstepError) as caught:
        dataclasses.replace(MODEL, **changes)
    assert "\n" not in str(caught.value)


def test_settings_switch_each_half_off() -> None:
    both = Thresholds((0.1,), (0.2,), 3)
    assert both.without_merging() == Thresholds((), (0.2,), 3)
    assert both.without_exits() == Thresholds((0.1,), (), 3)


PHASE = Phase(steps=1, batch=1, crop=(32, 32))
RANGES: list[tuple[Any, str, list[object]]] = [
    (PHASE, "steps", [0, -1]),
    (PHASE, "batch", [0, -1]),
    (PHASE, "crop", [(0, 8), (8, -8)]),
    (PHASE, "lr", [0.0, -1.0, float("nan"), float("inf")]),
    (PHASE, "head_lr", [0.0, -1.0, float("nan")]),
    (PHASE, "warmup", [-3]),
    (PHASE, "weight_decay", [-1.0, float("nan")]),
    (PHASE, "dense_share", [-0.1, 5.0, float("nan")]),
    (TrainerConfig(), "devices", [0, -1]),
    (TrainerConfig(), "save_every", [0]),
    (TrainerConfig(), "val_every", [0]),
    (TrainerConfig(), "val_pictures", [-1]),
    (TrainerConfig(), "seed", [2**63]),
    (DataConfig("here"), "workers", [-1]),
    (DataConfig("here"), "scale", [(0.0, 1.0), (2.0, 1.0), (1.0, float("inf"))]),
    (DataConfig("here"), "colour", [-0.1, 3.0]),
    (PolicyConfig(), "sizes", [(2, 2)]),
    (PolicyConfig(), "stages", [(1, 1), (2, 1), (-1, 1)]),
    (PolicyConfig(), "width", [0, -1]),
    (PolicyConfig(), "scale", [0.0, -2.0, float("inf"), float("nan")]),
    (VitConfig(), "patch", [0]),
    (VitConfig(), "depth", [-1]),
    (VitConfig(), "image_size", [(0, 4), (-64, 64)]),
    (VitConfig(patch=8), "image_size", [(64, 4)]),
    (VitConfig(), "drop_path", [-0.1, 1.0, 2.0]),
    (PolicyRecipe(DataConfig(""), (PHASE,), 8, ""), "patch", [0, -8]),
    (PolicyRecipe(DataConfig(""), (PHASE,), 8, ""), "tolerance", [-0.1, 1.0, float("nan")]),
    (PolicyRecipe(DataConfig(""), (PHASE,), 8, ""), "class_weight", [-1.0, float("nan")]),
    (SegmenterRecipe(DataConfig(""), (PHASE,), "", "", DENSE), "class_balance", [float("nan")]),
    (SegmenterRecipe(DataConfig(""), (PHASE,), "", "", DENSE), "exit_weight", [-1.0]),
]


@pytest.mark.parametrize(("config", "name", "values"), RANGES, ids=lambda value: str(value)[:20])
def test_values_out_of_range_are_named(config: Any, name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(TokenstepError, match=name) as caught:
            dataclasses.replace(config, **{name: value})
        assert "\n" not in str(caught.value)


def test_a_crop_holds_a_superpatch() -> None:
    policy = PolicyConfig(sizes=(4, 2))
    for side in (9, 64):  # patches are begun, so 9 px are two of 8
        crop = dataclasses.replace(PHASE, crop=(64, side))
        PolicyRecipe(DataConfig(""), (crop,), 8, "", policy)
    small = dataclasses.replace(PHASE, crop=(64, 8))
    with pytest.raises(TokenstepError, match="crop must be 9 or more"):
        PolicyRecipe(DataConfig(""), (PHASE, small), 8, "", policy)


def test_pictures_are_kept_in_memory_on_request_only() -> None:
    assert not DataConfig("here").cache


def point(loss: float, gmac: float, merge: tuple[float, ...] = ()) -> OperatingPoint:
    return OperatingPoint(Thresholds(merge), 0.6, loss, gmac, 900.0, 0.0, "val", 101)


def calibrated(*points: OperatingPoint) -> ModelConfig:
    return ModelConfig(("a", "b"), ((0, 0, 0), (9, 9, 9)), points=points)


def test_the_cheapest_point_within_the_loss_is_taken() -> None:
    cheap, middle, dear, lucky = point(1.5, 2), point(0.5, 4), point(0.4, 6), point(-0.1, 5)
    config = calibrated(cheap, middle, dear, lucky)
    assert config.point_within(9) == config.point_within(1.5) == cheap
    assert config.point_within(1.49) == config.point_within(0.5) == middle
    assert config.point_within(0.45) == lucky
    assert config.point_within(0) is None, "0 is dense, however lucky a point was"
    assert calibrated(cheap).point_within(1) is None


def test_no_points_or_no_sensible_loss_is_told() -> None:
    assert calibrated().point_within(0) is None
    with pytest.raises(TokenstepError, match="calibrate"):
        calibrated().point_within(0.5)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(TokenstepError, match="max_loss"):
            calibrated(point(1, 1)).point_within(wrong)


def test_points_and_temperatures_must_fit_the_model() -> None:
    with pytest.raises(TokenstepError, match="superpatch"):
        calibrated(point(1, 1, merge=(0.5,)))
    config = calibrated()
    for wrong in ((1.0,), (0.0, 1.0), (1.0, -1.0)):
        with pytest.raises(TokenstepError, match="temperature"):
            dataclasses.replace(config, vit=VitConfig(exits=(1, 2)), temperatures=wrong)


@pytest.mark.parametrize("part", ["vit", "policy"])
def test_a_model_names_no_file_of_weights(part: str) -> None:
    started = {
        "vit": VitConfig(pretrained="/home/me/w.safetensors"),
        "policy": PolicyConfig(pretrained=True),
    }
    with pytest.raises(TokenstepError, match=rf"{part}\.pretrained .*recipes"):
        dataclasses.replace(calibrated(), **{part: started[part]})  # type: ignore[arg-type]
