"""Calibration: thresholds that pay, a front that nothing beats, and points that hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, TinyModel
from hypothesis import given
from hypothesis import strategies as st
from samples import labelled_folder

from tokenstep.config import DENSE, Budget, MeasuredBudget, OperatingPoint, Thresholds
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.hub import load
from tokenstep.measure.calibrate import (
    best_threshold,
    calibrate,
    combinations,
    contenders,
    front,
    merge_thresholds,
    other_spares,
    spread,
)
from tokenstep.measure.quality import Method
from tokenstep.measure.quality import measure as measure_methods
from tokenstep.measure.settings import Search
from tokenstep.measure.shares import budget_of
from tokenstep.model.config import ModelConfig
from tokenstep.model.segmenter import Segmenter


def measure(model: Segmenter, folder: LabelledFolder, thresholds: Thresholds) -> dict[str, Any]:
    """The report of one method."""
    return measure_methods(model, folder, [Method(thresholds)])[0]


POINT = OperatingPoint(Thresholds(merge=(0.5,) * 4), 0.5, 0.2, 1.0, 9.0, 0.0, "val", 3)
SEARCH = Search(prices=(0.5, 2.0), bars=(0.35, 0.4), sample=2, confirm=6)


@pytest.fixture
def folder(tmp_path: Path) -> LabelledFolder:
    sizes = [(32, 48), (40, 40), (24, 64), (32, 32)]
    return LabelledFolder(labelled_folder(tmp_path / "set", CLASSES, sizes), "test")


@pytest.fixture
def model(tiny_model: TinyModel) -> Segmenter:
    return tiny_model()


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(-9, 9)), min_size=1, max_size=40))
def test_no_other_threshold_pays_more(entries: list[tuple[int, int]]) -> None:
    scores = torch.tensor([score / 50 for score, _ in dict(entries).items()])
    gains = torch.tensor([float(gain) for _, gain in dict(entries).items()])
    threshold = best_threshold(scores, gains)
    paid = gains[scores > threshold].sum()
    for other in [*scores.tolist(), -0.1, 1.0]:
        assert paid >= gains[scores > other].sum() - 1e-6


def test_nothing_to_score_takes_nothing() -> None:
    assert best_threshold(torch.zeros(0), torch.zeros(0)) == 1.0


def test_a_higher_price_merges_at_least_as_much(model: Segmenter, folder: LabelledFolder) -> None:
    cheap, dear, boundless = merge_thresholds(model, folder, (0.0, 0.5, 1e9))
    assert all(low >= high for low, high in zip(cheap, dear, strict=True))
    everything = measure(model, folder, Thresholds((0.0, 0.0)))["tokens"]["start"]
    assert measure(model, folder, Thresholds(boundless))["tokens"]["start"] == everything


def test_every_set_of_exit_thresholds_meets_every_merging() -> None:
    search = Search(bars=(0.8, 0.9), spares=(5, 0))
    tried = combinations([(0.5,), (0.6,)], 2, search)
    assert len(tried) == len(set(tried)) == 3 * (1 + 2 * 2) - 1
    assert DENSE not in tried
    for thresholds in tried:
        assert len(thresholds.exits) in (0, 2) and len(thresholds.merge) in (0, 1)
    assert combinations([], 0, search) == []
    with_tome = combinations([(0.5,)], 2, Search(bars=(0.8,), reducers=("tome:r=2",)))
    tome = [thresholds for thresholds in with_tome if thresholds.reducers]
    assert [(one.merge, one.exits) for one in tome] == [((), ()), ((0.5,), ())]
    halting = [thresholds for thresholds in tried if thresholds.exits]
    others = other_spares(tried, search)
    assert [(one.merge, one.exits, 0) for one in halting] == [
        (one.merge, one.exits, one.spare) for one in others
    ]
    assert other_spares(tried, Search(spares=(5,))) == []


costs = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=30)


@given(costs)
def test_nothing_beats_the_front_and_the_front_beats_the_rest(pairs: list[tuple[int, int]]) -> None:
    measured = [
        (Thresholds(spare=index), {"gmac": {"total": gmac}, "miou": miou / 10})
        for index, (gmac, miou) in enumerate(pairs)
    ]
    kept = {thresholds.spare for thresholds in front(measured)}
    assert kept
    for index, (gmac, miou) in enumerate(pairs):
        better = [(g, m) for g, m in pairs if g <= gmac and m >= miou and (g, m) != (gmac, miou)]
        assert not (index in kept and better)
        assert index in kept or better or any(pairs[k] == (gmac, miou) for k in kept)


@given(costs, st.integers(1, 40))
def test_contenders_are_the_front_first_and_then_what_is_next_to_it(
    pairs: list[tuple[int, int]], most: int
) -> None:
    measured = [
        (Thresholds(spare=index), {"gmac": {"total": gmac}, "miou": miou / 10})
        for index, (gmac, miou) in enumerate(pairs)
    ]
    kept = contenders(measured, most)
    assert len(set(kept)) == len(kept) == min(most, len(pairs))
    first = front(measured)
    assert set(kept) <= set(first) if most <= len(first) else set(first) <= set(kept)
    for one in set(range(len(pairs))) - {thresholds.spare for thresholds in kept}:
        gmac, miou = pairs[one]
        if len(kept) > len(first):
            assert any(pairs[k.spare][0] <= gmac and pairs[k.spare][1] >= miou for k in kept)


@given(st.integers(1, 30), st.integers(1, 12))
def test_a_thinned_front_keeps_its_ends_and_order(length: int, most: int) -> None:
    thresholds = [Thresholds(spare=index) for index in range(length)]
    thin = spread(thresholds, most)
    assert len(thin) == min(length, most) and thin[0] == thresholds[0]
    assert most == 1 or thin[-1] == thresholds[-1]
    assert [one.spare for one in thin] == sorted({one.spare for one in thin})


def test_points_are_what_measuring_them_gives(
    model: Segmenter, folder: LabelledFolder, tmp_path: Path
) -> None:
    report = calibrate(model, folder, tmp_path / "notes.json", search=SEARCH)
    json.dumps(report, allow_nan=False)
    points = model.config.points
    assert points and len(model.config.temperatures) == 2
    dense = measure(model, folder, DENSE)
    assert [point.gmac for point in points] == sorted(point.gmac for point in points)
    assert [point.miou for point in points] == sorted(point.miou for point in points)
    for point in points:
        again = measure(model, folder, point.thresholds)
        assert point.miou == pytest.approx(again["miou"], abs=1e-5)
        assert point.gmac == pytest.approx(again["gmac"]["total"], abs=1e-4)
        best = max(dense["miou"], points[-1].miou)
        assert point.loss == pytest.approx(100 * (best - again["miou"]), abs=2e-3)
        assert (point.split, point.images) == ("test", 4)
        assert point.fixed is not None
        (fixed,) = measure_methods(model, folder, [Method(point.fixed.budget)])
        assert point.fixed.miou == pytest.approx(fixed["miou"], abs=1e-5)
        assert point.fixed.gmac == pytest.approx(fixed["gmac"]["total"], abs=1e-4)
        assert point.fixed.loss == pytest.approx(100 * (best - fixed["miou"]), abs=2e-3)
        # what the thresholds spend on average, the budget spends on each picture
        merge, halted = again["shares"]["merge"], again["shares"]["exits"]
        for side, share in point.fixed.budget.merge.items():
            assert share == pytest.approx(merge[str(side)], abs=1e-5)
        for after, share in halted.items():
            assert point.fixed.budget.exits.get(int(after), 0) == pytest.approx(share, abs=1e-5)
        assert sum(point.fixed.budget.merge.values()) == pytest.approx(1 - merge["1"], abs=1e-4)
    own = model.config.point_within(0.5)
    assert model.config.thresholds == (DENSE if own is None else own.thresholds)

    model.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").config == model.config


def test_a_killed_calibration_goes_on(
    tiny_model: TinyModel, folder: LabelledFolder, tmp_path: Path
) -> None:
    whole = calibrate(tiny_model(), folder, tmp_path / "whole.json", search=SEARCH)
    notes = tmp_path / "broken.json"

    def kill(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("search", 6):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_model(), folder, notes, search=SEARCH, progress=kill)
    diary = json.loads(notes.read_text())
    kept = diary["entries"]
    assert len(kept) == 6
    for entry in kept.values():
        entry["seconds"] = 4321.5  # which measuring it again would correct
    notes.write_text(json.dumps(diary))
    resumed = calibrate(tiny_model(), folder, notes, search=SEARCH)
    entries = json.loads(notes.read_text())["entries"]
    assert kept.items() <= entries.items(), "nothing is measured twice"
    assert entries.keys() == json.loads((tmp_path / "whole.json").read_text())["entries"].keys()
    for report in (whole, resumed):
        report["dense"].pop("seconds")
    assert resumed == whole


def test_another_models_notes_are_not_used(
    tiny_model: TinyModel, folder: LabelledFolder, tmp_path: Path
) -> None:
    notes = tmp_path / "notes.json"
    first = calibrate(tiny_model(), folder, notes, search=SEARCH)
    other = tiny_model()
    with torch.no_grad():
        other.decoder.linear.bias += 1e3 * torch.eye(len(CLASSES))[0]  # says "road" everywhere
    report = calibrate(other, folder, notes, search=SEARCH)
    assert report["dense"]["miou"] == measure(other, folder, DENSE)["miou"]
    assert report["dense"]["miou"] != first["dense"]["miou"]


def test_a_file_that_is_no_cache_is_refused(
    model: Segmenter, folder: LabelledFolder, tmp_path: Path
) -> None:
    (tmp_path / "notes.json").write_text("[]")
    with pytest.raises(TokenstepError, match=r"notes\.json"):
        calibrate(model, folder, tmp_path / "notes.json", search=SEARCH)


def test_a_model_merging_alone_gets_points_of_merging(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    # Large enough that merging saves more than the policy costs.
    root = labelled_folder(tmp_path / "set", CLASSES, [(160, 240)])
    folder = LabelledFolder(root, "test")
    model = tiny_model(exits=())
    report = calibrate(model, folder, tmp_path / "notes.json", search=SEARCH)
    assert report["exits"] == {} and model.config.points
    assert all(not point.thresholds.exits for point in model.config.points)


def test_a_reducer_can_be_what_pays_and_is_saved_with_the_model(
    tiny_model: TinyModel, folder: LabelledFolder, tmp_path: Path
) -> None:
    """A model without exits, whose ToMe is searched in three strengths."""
    model = tiny_model(exits=())
    texts = tuple(f"tome:share={share}" for share in (0.0, 0.2, 0.5))
    search = Search(prices=(0.5,), reducers=texts, sample=2, confirm=9)
    calibrate(model, folder, tmp_path / "notes.json", search=search)
    points = model.config.points
    (tome,) = {point.thresholds.reducers for point in points[:1]}
    assert tome == ("tome:share=0.5",), "the cheapest of all"
    model.save_pretrained(tmp_path / "model")
    again = load(str(tmp_path / "model"))
    assert again.config.points == points
    assert points[0].fixed is not None and points[0].fixed.budget.reducers == tome
    image, _ = folder[0]
    one, other = (used.segment(image, max_loss=100) for used in (model, again))
    assert (one.labels == other.labels).all() and one.cost == other.cost
    cost = model.costs.dense((image.shape[1], image.shape[2]))
    assert one.cost.total < cost.total and one.cost.reducers > 0


def test_the_shares_of_a_budget_never_sum_to_more_than_all() -> None:
    """Two thirds and a third, rounded each for itself, would."""
    for thirds in ((1 / 3, 2 / 3), (2 / 3, 1 / 3), (0.113208, 0.886792)):
        shares = {"merge": dict(zip(("2", "4"), thirds, strict=True)), "exits": {}}
        budget = budget_of(shares, Thresholds())
        assert 1 - 3e-5 < sum(budget.merge.values()) <= 1


def test_exits_are_not_searched_as_reducers_too(
    model: Segmenter, folder: LabelledFolder, tmp_path: Path
) -> None:
    search = Search(reducers=("exits:thresholds=[0.5,0.5]",))
    with pytest.raises(TokenstepError, match="exits are searched"):
        calibrate(model, folder, tmp_path / "notes.json", search=search)


def test_within_a_loss_a_budget_is_chosen_by_its_own() -> None:
    first, second = (
        replace(POINT, gmac=gmac, fixed=MeasuredBudget(Budget({2: gmac / 9}), 0.5, loss, gmac))
        for gmac, loss in ((1.0, 3.0), (2.0, 0.4))
    )
    config = ModelConfig(("a", "b"), ((0, 0, 0), (9, 9, 9)), points=(first, second))
    assert config.point_within(0.5) == first
    assert config.point_within(0.5, by_budget=True) == second
    assert config.point_within(0.1, by_budget=True) is None
    assert len({first, second}) == 2, "points can be put in sets"
