"""A labelled folder's tokens: shares add up, oracles are never wrong, and bad files do not stop."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, TinyModel
from PIL import Image
from samples import labelled_folder
from support import scramble

from tokenstep.config import DENSE, Thresholds
from tokenstep.data.labelled_folder import IGNORE, LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.explain.folder import explain_folder, methods_of, worst
from tokenstep.explain.picture import view_of
from tokenstep.measure.evaluate import evaluate
from tokenstep.measure.metrics import interior
from tokenstep.measure.quality import Method
from tokenstep.model.segmenter import Segmenter

STEP = Thresholds(merge=(0.4, 0.4), exits=(0.36, 0.36), spare=1)
SIZES = [(48, 64), (40, 72), (33, 90)]


@pytest.fixture
def folder(tmp_path: Path) -> LabelledFolder:
    return LabelledFolder(labelled_folder(tmp_path / "set", CLASSES, SIZES), "test")


@pytest.fixture
def model(tiny_model: TinyModel) -> Segmenter:
    model = tiny_model(cells=2)
    scramble(model)
    return model


@pytest.fixture
def report(model: Segmenter, folder: LabelledFolder) -> dict[str, Any]:
    return explain_folder(model, folder, STEP)


def relabel(folder: LabelledFolder, labels: Callable[[torch.Tensor], np.ndarray]) -> None:
    """Give each picture the labels that a function makes of it."""
    for (image, _), path in zip(list(folder), folder.labels, strict=True):
        Image.fromarray(labels(image)).save(path)


def test_shares_sum_to_one(report: dict[str, Any]) -> None:
    json.dumps(report, allow_nan=False)
    for table, column in (
        ("classes", "pixels_share"),
        ("classes", "tokens_share"),
        ("depths", "tokens_share"),
        ("depths", "pixels_share"),
        ("sizes", "pixels_share"),
        ("boundary", "pixels_share"),
        ("bands", "pixels_share"),
    ):
        assert sum(row[column] for row in report[table]) == pytest.approx(1), (table, column)
    for row in report["class_depths"]:
        assert sum(value for key, value in row.items() if key != "class") == pytest.approx(1)
    for exit_ in (1, 2):
        shares = [
            r["sub_cells_share"] for r in report["reliability"] if r["exit_after_block"] == exit_
        ]
        assert sum(shares) == pytest.approx(1)


def test_scores_and_costs_are_those_of_evaluate(
    model: Segmenter, folder: LabelledFolder, report: dict[str, Any]
) -> None:
    found = evaluate(model, folder, Method(STEP))
    methods = {row["way"]: row for row in report["ways"]}
    assert list(methods) == ["dense", "merging_alone", "step"]
    for method, half in (("dense", "dense"), ("step", "reduced")):
        for key in ("miou", "accuracy", "boundary_iou"):
            assert methods[method][key] == pytest.approx(found[half][key])
        assert methods[method]["gmac"] == pytest.approx(found[half]["gmac"]["total"])
    assert report["live"][0]["mean_tokens"] == found["reduced"]["tokens"]["start"]


def test_errors_of_all_groupings_are_those_of_the_set(report: dict[str, Any]) -> None:
    for row in report["ways"]:
        column = f"{row['way']}_wrong_share"
        for table in ("depths", "sizes", "boundary", "bands"):
            wrong = sum(one["pixels_share"] * (one[column] or 0) for one in report[table])
            assert wrong == pytest.approx(1 - row["accuracy"]), table


def test_dense_gives_every_class_a_token_a_patch(model: Segmenter, tmp_path: Path) -> None:
    whole = labelled_folder(tmp_path / "whole", CLASSES, [(48, 64), (64, 32)])
    report = explain_folder(model, LabelledFolder(whole, "test"), DENSE)
    for row in report["classes"]:
        assert row["tokens_per_1000_patches"] == pytest.approx(1000)
        assert row["tokens_share"] == pytest.approx(row["pixels_share"])
        assert row["dense_iou"] == row["step_iou"]
    assert [row["patches_a_side"] for row in report["sizes"]] == [1]
    assert [row["tokens_share"] for row in report["depths"]] == [0, 0, 1]
    assert report["depths"][0]["token_wrong_share"] is None, "no token halted, none was wrong"


def test_tokens_are_those_of_the_results(
    model: Segmenter, folder: LabelledFolder, report: dict[str, Any]
) -> None:
    uses = [view_of(model, image, STEP).result.tokens for image, _ in folder]
    for row, use in zip(report["pictures"], uses, strict=True):
        assert (row["patches"], row["tokens"], row["tokens_at_end"]) == (
            use.grid,
            use.start,
            use.end,
        )
    total = sum(use.start for use in uses)
    ended = [sum(use.halted[after] for use in uses) for after in (1, 2)]
    assert [row["tokens_share"] for row in report["depths"][:2]] == pytest.approx(
        [count / total for count in ended]
    )
    for row, column in zip(report["live"], np.array([use.live for use in uses]).T, strict=True):
        assert row["mean_tokens"] == column.mean()


def test_what_an_oracle_labels_is_never_wrong(model: Segmenter, folder: LabelledFolder) -> None:
    relabel(folder, lambda image: view_of(model, image, STEP).result.labels)
    report = explain_folder(model, folder, STEP)
    for table in ("depths", "sizes", "bands", "boundary"):
        assert not any(row["step_wrong_share"] for row in report[table])
    assert not any(row["token_wrong_share"] for row in report["depths"])
    assert all(row["points_lost"] <= 0 for row in report["pictures"])


def test_a_token_is_judged_by_its_majority(model: Segmenter, folder: LabelledFolder) -> None:
    def spotted(image: torch.Tensor) -> np.ndarray:
        """Right everywhere but in one pixel of each patch."""
        labels = view_of(model, image, DENSE).result.labels.copy()
        labels[::8, ::8] = (labels[::8, ::8] + 1) % len(CLASSES)
        return labels

    relabel(folder, spotted)
    report = explain_folder(model, folder, Thresholds(exits=(0.36, 0.36), spare=1))
    assert [row["way"] for row in report["ways"]] == ["dense", "step"]
    last = report["depths"][-1]
    assert last["dense_wrong_share"] > 0
    assert report["ways"][0]["accuracy"] > 0.9


def test_bands_are_distances_from_another_class(model: Segmenter, tmp_path: Path) -> None:
    root = labelled_folder(tmp_path / "set", CLASSES, [(64, 64)])
    halves = np.repeat([[0] * 32 + [1] * 32], 64, axis=0).astype(np.uint8)
    Image.fromarray(halves).save(root / "test" / "labels" / "p0.png")
    report = explain_folder(model, LabelledFolder(root, "test"), STEP)
    assert [(row["above_px"], row["to_px"]) for row in report["bands"]] == [
        *((0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, None))
    ]
    wanted = [2 / 64, 2 / 64, 4 / 64, 8 / 64, 16 / 64, 32 / 64]
    assert [row["pixels_share"] for row in report["bands"]] == pytest.approx(wanted)
    assert report["boundary"][0]["pixels_share"] == pytest.approx(16 / 64)
    assert float(interior(torch.from_numpy(halves), 8).float().mean()) == pytest.approx(48 / 64)


def test_purity_is_that_of_the_labels(model: Segmenter, tmp_path: Path) -> None:
    root = labelled_folder(tmp_path / "set", CLASSES, [(32, 32)])
    label = np.zeros((32, 32), np.uint8)
    label[:4, :8], label[:, 16:] = 1, IGNORE  # one patch is half of class 1; one half has no label
    Image.fromarray(label).save(root / "test" / "labels" / "p0.png")
    report = explain_folder(model, LabelledFolder(root, "test"), DENSE)
    (row,) = report["sizes"]
    assert row["superpatches"] == 8
    assert row["pure_share"] == 7 / 8 and row["mean_purity"] == (7 + 0.5) / 8
    by_class = {row["class"]: row for row in report["classes"]}
    assert by_class[CLASSES[1]]["tokens_share"] == pytest.approx(0.5 / 8)


def test_the_worst_come_first(report: dict[str, Any]) -> None:
    losses = {row["picture"]: row["points_lost"] for row in report["pictures"]}
    found = worst(report["pictures"], 2)
    assert len(found) == 2
    assert [losses[name] for name in found] == sorted(losses.values(), reverse=True)[:2]
    for row in report["pictures"]:
        lost = 100 * (row["step_wrong_share"] - row["dense_wrong_share"])
        assert row["points_lost"] == pytest.approx(lost)


def test_a_picture_without_labels_has_no_loss(model: Segmenter, folder: LabelledFolder) -> None:
    Image.fromarray(np.full(SIZES[0], IGNORE, np.uint8)).save(folder.labels[0])
    report = explain_folder(model, folder, STEP)
    assert report["pictures"][0]["points_lost"] is None
    assert "p0.png" not in worst(report["pictures"])


def test_a_damaged_picture_is_named_and_the_others_go_on(
    model: Segmenter, folder: LabelledFolder
) -> None:
    folder.paths[1].write_bytes(b"no picture")
    calls: list[None] = []
    report = explain_folder(model, folder, STEP, on_picture=lambda: calls.append(None))
    assert report["images"] == 2 and len(calls) == 3
    (fault,) = report["faults"]
    assert fault["file"] == str(folder.paths[1]) and str(folder.paths[1]) in fault["error"]
    for path in folder.paths:
        path.write_bytes(b"no picture")
    with pytest.raises(TokenstepError, match="p0"):
        explain_folder(model, folder, STEP)


def test_other_classes_are_refused(model: Segmenter, tmp_path: Path) -> None:
    other = labelled_folder(tmp_path / "other", ("cat", "dog"), SIZES)
    with pytest.raises(TokenstepError, match="cat"):
        explain_folder(model, LabelledFolder(other, "test"), STEP)


def test_merging_alone_is_run_where_it_is_another_way() -> None:
    assert list(methods_of(STEP)) == ["dense", "merging_alone", "step"]
    assert list(methods_of(STEP.without_exits())) == ["dense", "step"]
    assert methods_of(DENSE)["step"] == DENSE


def test_a_model_merging_alone_is_explained_too(
    tiny_model: TinyModel, folder: LabelledFolder
) -> None:
    report = explain_folder(tiny_model(exits=()), folder, Thresholds(merge=(0.4, 0.4)))
    assert report["reliability"] == [] and len(report["depths"]) == 1
