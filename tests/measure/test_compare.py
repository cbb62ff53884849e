"""The comparison: every method on the same pictures, and the oracle at the policy's token count."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CLASSES, TinyModel
from PIL import Image
from samples import labelled_folder

from tokenstep.config import DENSE, Budget, MeasuredBudget, OperatingPoint, Thresholds
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.measure.compare import KINDS, compare, figure, kind_of, markdown, oracle_tolerance
from tokenstep.measure.quality import Method, measure
from tokenstep.measure.rivals import RIVALS, strength_at
from tokenstep.model.segmenter import Segmenter

SETTINGS = Thresholds(merge=(0.4, 0.4), exits=(0.34, 0.34), spare=1)


@pytest.fixture
def folder(tmp_path: Path) -> LabelledFolder:
    sizes = [(48, 64), (40, 72), (33, 90)]
    return LabelledFolder(labelled_folder(tmp_path / "set", CLASSES, sizes), "test")


@pytest.fixture
def model(tiny_model: TinyModel) -> Segmenter:
    model = tiny_model()
    point = OperatingPoint(Thresholds(merge=(0.9, 0.9)), 0.5, 0.25, 1.0, 9.0, 0.0, "val", 3)
    model.config = replace(model.config, points=(point,))
    return model


def test_each_row_is_what_measuring_it_alone_gives(
    model: Segmenter, folder: LabelledFolder, tiny_model: TinyModel
) -> None:
    rows = compare(model, folder, SETTINGS, others=[("twin", tiny_model())])
    json.dumps(rows, allow_nan=False)
    by_name = {row["method"]: row for row in rows}
    assert len(by_name) == len(rows) == 10
    methods = {
        "dense": Method(),
        "dense at 0.5 x the sides": Method(scale=0.5),
        "learned partition (merging alone)": Method(SETTINGS.without_exits()),
        "exits alone": Method(SETTINGS.without_merging()),
        "STEP": Method(SETTINGS),
        "STEP, 0.25 points below the best on val": Method(model.config.points[0].thresholds),
    }
    for name, method in methods.items():
        (alone,) = measure(model, folder, [method])
        for key in ("miou", "iou", "tokens", "gmac", "halted_share"):
            assert by_name[name][key] == alone[key], name
    learned, drawn = by_name["learned partition (merging alone)"], by_name["random partition"]
    assert learned["tokens"] == drawn["tokens"]
    assert by_name["dense"]["compute_ratio"] == by_name["dense"]["time_ratio"] == 1
    assert by_name["dense at 0.5 x the sides"]["compute_ratio"] > 2
    twin = by_name["twin, dense"]
    assert twin["miou"] == by_name["dense"]["miou"] and twin["compute_ratio"] == 1


def test_a_half_that_is_off_has_no_row(model: Segmenter, folder: LabelledFolder) -> None:
    names = {row["method"] for row in compare(model, folder, SETTINGS.without_merging())}
    assert not any("partition" in name for name in names) and "exits alone" in names
    assert "exits alone" not in {row["method"] for row in compare(model, folder, DENSE)}


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9999])
def test_the_oracle_comes_to_the_policys_tokens(
    model: Segmenter, folder: LabelledFolder, threshold: float
) -> None:
    alone = Thresholds(merge=(threshold, threshold))
    tolerance = oracle_tolerance(model, folder, alone, rounds=20)
    learned, oracle = measure(model, folder, [Method(alone), Method(alone, "oracle", tolerance)])
    assert oracle["tokens"]["start"] <= learned["tokens"]["start"] or tolerance == 0.5
    if 0 < tolerance < 0.5:
        (stricter,) = measure(model, folder, [Method(alone, "oracle", tolerance - 0.01)])
        assert stricter["tokens"]["start"] > learned["tokens"]["start"]


def test_a_scaled_picture_is_held_against_its_full_labels(
    model: Segmenter, folder: LabelledFolder
) -> None:
    full, half = measure(model, folder, [Method(), Method(scale=0.5)])
    assert half["tokens"]["grid"] < 0.4 * full["tokens"]["grid"]
    assert half["accuracy"] is not None
    with pytest.raises(TokenstepError, match="oracle"):
        Method(partition="oracle", scale=0.5)


def test_the_table_and_the_figure_hold_every_row(
    model: Segmenter, folder: LabelledFolder, tmp_path: Path
) -> None:
    rows = compare(model, folder, SETTINGS)
    lines = markdown(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert len({line.count("|") for line in lines}) == 1
    assert "| inter-class boundary IoU |" in lines[0], "it is not the paper's"
    for row, line in zip(rows, lines[2:], strict=True):
        assert line.startswith(f"| {row['method']} |")
        assert kind_of(row) in {kind for kind, _, _ in KINDS}
    pytest.importorskip("matplotlib")
    figure(rows, tmp_path / "figure.png", "tiny")
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 400


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("tome:share=0.1", "other reducers"),
        ("evit tome:share=0.1", "other reducers"),
        ("evit, dense", "other models"),
        ("STEP, 0.25 points below the best on val", "STEP"),
    ],
)
def test_rows_are_drawn_by_their_kind(method: str, kind: str) -> None:
    assert kind_of({"method": method}) == kind


def test_rivals_cost_what_step_costs_or_say_that_they_cannot(
    model: Segmenter, folder: LabelledFolder
) -> None:
    rows = compare(model, folder, SETTINGS, rivalled=[SETTINGS])
    step = next(row for row in rows if row["method"] == "STEP")
    found = {row["method"]: row for row in rows if " GMAC" in row["method"]}
    for name in [*RIVALS, "random partition"]:
        assert any(method.startswith(name) for method in found), name
    for method, row in found.items():
        kinds = ("other reducers", "other partitions", "lower resolution")
        assert kind_of(row) in kinds, method
        if "partition" not in method and "nearest" not in method:
            # costs are matched on two of the three pictures, which differ in size and content
            assert row["gmac"]["total"] == pytest.approx(step["gmac"]["total"], rel=0.2), method


def test_rivals_stand_at_ratios_of_the_dense_cost_of_another_folder(
    model: Segmenter, folder: LabelledFolder
) -> None:
    """So that nothing of the folder that is reported on decides how strong they are."""
    choosing = folder.thinned(1)
    rows = compare(model, folder, DENSE, ratios=[1.5], choosing=choosing)
    (dense,) = measure(model, choosing, [Method()])
    found = [row["method"] for row in rows if row["method"].endswith(", dense / 1.5")]
    assert len(found) == len(RIVALS)
    wanted = dense["gmac"]["total"] / 1.5
    costs = {method: float(method.split(" GMAC")[0].split()[-1]) for method in found}
    for method, cost in costs.items():
        assert "nearest" in method or cost == pytest.approx(wanted, rel=0.03), method
    assert not all("nearest" in method for method in found)


def test_the_strength_of_a_rival_is_found_by_its_cost() -> None:
    assert strength_at(lambda strength: 10 - 8 * strength, 6.0) == pytest.approx((0.5, 6.0), 0.01)
    assert strength_at(lambda strength: 10 - 8 * strength, 1.0) == (1.0, 2.0)
    assert strength_at(lambda strength: 10 - 8 * strength, 11.0) == (0.0, 10.0)


def test_points_with_a_budget_have_a_row_for_it(model: Segmenter, folder: LabelledFolder) -> None:
    budget = Budget(merge={2: 0.3})
    points = [replace(p, fixed=MeasuredBudget(budget, 0.5, 0.2, 1.0)) for p in model.config.points]
    model.config = replace(model.config, points=tuple(points))
    for thresholds in (SETTINGS, points[0].thresholds):
        rows = {row["method"]: row for row in compare(model, folder, thresholds)}
        (name,) = (method for method in rows if method.startswith("STEP by budget"))
        assert (name == "STEP by budget") == (thresholds == points[0].thresholds)
        (alone,) = measure(model, folder, [Method(budget)])
        assert rows[name]["miou"] == alone["miou"] and kind_of(rows[name]) == "STEP"
