"""Dense and reduced side by side: what is counted, and where the partition comes from."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, TinyModel
from PIL import Image
from samples import labelled_folder, told
from support import scramble
from torch import Tensor

from tokenstep.config import DENSE, Thresholds
from tokenstep.core import partition as superpatches
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.measure.evaluate import evaluate
from tokenstep.measure.metrics import Tally
from tokenstep.measure.quality import Method, segment_with
from tokenstep.measure.settings import PARTITION_SOURCES, PartitionSource
from tokenstep.model.result import Result
from tokenstep.model.segmenter import Segmenter
from tokenstep.policies.batch import homogeneity, policy_features

SIZES = [(40, 56), (64, 32), (17, 90)]
MERGED = Thresholds(merge=(0.4, 0.4), exits=(0.34, 0.34), spare=1)


@pytest.fixture
def folder(tmp_path: Path) -> LabelledFolder:
    return LabelledFolder(labelled_folder(tmp_path / "set", CLASSES, SIZES), "test")


@pytest.fixture
def model(tiny_model: TinyModel) -> Segmenter:
    return tiny_model()


def levels_of(model: Segmenter, folder: LabelledFolder, method: Method) -> list[Tensor]:
    """The partitions of a folder's pictures with ``method``."""
    generator = torch.Generator().manual_seed(method.seed)
    return [
        torch.from_numpy(
            segment_with(model, image, label, method=method, generator=generator).tokens.level
        )[None]
        for image, label in folder
    ]


def test_the_report_is_complete_and_plain_json(model: Segmenter, folder: LabelledFolder) -> None:
    seen: list[None] = []
    method = Method(MERGED, tolerance=0.1)
    found = evaluate(model, folder, method, on_picture=lambda: seen.append(None))
    assert len(seen) == found["images"] == len(SIZES)
    assert json.loads(json.dumps(found, allow_nan=False))["settings"] == {
        "merge": [0.4, 0.4],
        "exits": [0.34, 0.34],
        "spare": 1,
        "partition": "policy",
        "tolerance": 0.1,
        "seed": 0,
        "scale": 1.0,
        "reducers": [],
    }
    for half in (found["dense"], found["reduced"]):
        assert set(half) == {
            *("miou", "iou", "accuracy", "boundary_iou", "tokens"),
            *("halted_share", "gmac", "seconds", "shares"),
        }
        assert tuple(half["iou"]) == CLASSES
        assert set(half["tokens"]) == {"grid", "start", "end", "p95"}
        assert set(half["gmac"]) == {"total", "policy"}
        for score in (half["miou"], half["accuracy"], half["boundary_iou"], half["halted_share"]):
            assert 0 <= score <= 1
        tokens = half["tokens"]
        assert tokens["end"] <= tokens["start"] <= tokens["grid"] and half["seconds"] > 0
        assert tokens["start"] - tokens["end"] == pytest.approx(
            half["halted_share"] * tokens["start"]
        )


def test_scores_come_from_one_summed_count(model: Segmenter, folder: LabelledFolder) -> None:
    found = evaluate(model, folder, Method(MERGED))
    for half, thresholds in (("dense", DENSE), ("reduced", MERGED)):
        tally, starts, costs = Tally(len(CLASSES)), [], []
        for image, label in folder:
            result = model.segment(image, thresholds=thresholds)
            assert isinstance(result, Result)
            tally.add(torch.from_numpy(result.labels), label)
            starts.append(result.tokens.start)
            costs.append(result.cost.total)
        scores = tally.scores()
        assert found[half]["miou"] == scores.miou
        assert tuple(found[half]["iou"].values()) == scores.iou
        assert found[half]["tokens"]["start"] == pytest.approx(sum(starts) / len(starts))
        assert found[half]["gmac"]["total"] == pytest.approx(sum(costs) / len(costs))
        assert min(starts) <= found[half]["tokens"]["p95"] <= max(starts)


def test_the_dense_half_spends_nothing_on_policy_and_exits(
    model: Segmenter, folder: LabelledFolder
) -> None:
    found = evaluate(model, folder, Method(MERGED))
    dense, reduced = found["dense"], found["reduced"]
    assert dense["gmac"]["policy"] == dense["halted_share"] == 0 < reduced["gmac"]["policy"]
    assert dense["tokens"]["end"] == dense["tokens"]["grid"] == reduced["tokens"]["grid"]
    assert reduced["tokens"]["start"] < dense["tokens"]["start"]
    alike = evaluate(model, folder, Method(DENSE))
    for key in ("miou", "iou", "accuracy", "boundary_iou", "tokens", "gmac"):
        assert alike["dense"][key] == alike["reduced"][key] == dense[key]
    assert "dense" not in evaluate(model, folder, Method(DENSE), dense=False)


def test_a_class_that_never_occurs_has_no_iou(tmp_path: Path, model: Segmenter) -> None:
    with torch.no_grad():  # the model says "road" everywhere
        model.decoder.linear.bias.view(-1, len(CLASSES))[:, 0] = 1e4
    root = labelled_folder(tmp_path / "set", CLASSES, [(8, 16)])
    Image.new("L", (16, 8), 0).save(root / "test" / "labels" / "p0.png")
    half = evaluate(model, LabelledFolder(root, "test"), Method(DENSE))["reduced"]
    assert half["iou"] == {"road": 1.0, "tree": None, "sky": None}
    assert half["miou"] == half["accuracy"] == 1 and half["boundary_iou"] is None


def test_oracle_takes_what_is_pure_by_the_labels(model: Segmenter, folder: LabelledFolder) -> None:
    counts = []
    for tolerance in (0.0, 0.3, 1.0):
        method = Method(MERGED, "oracle", tolerance)
        levels = levels_of(model, folder, method)
        counts.append(sum(int(superpatches.token_counts(level)) for level in levels))
        for (_, label), level in zip(folder, levels, strict=True):
            sides = {"patch": 8, "sizes": (2, 4), "classes": len(CLASSES)}
            expected = superpatches.oracle(label[None], tolerance=tolerance, **sides)
            assert torch.equal(level, expected)
    assert counts[0] > counts[1] > counts[2], "the more impurity passes, the fewer tokens"


def test_uniform_merges_nothing(model: Segmenter, folder: LabelledFolder) -> None:
    for level in levels_of(model, folder, Method(MERGED, "uniform")):
        assert not level.any()


def test_random_keeps_the_policys_counts_and_moves_the_places(
    model: Segmenter, folder: LabelledFolder
) -> None:
    scramble(model.policy)
    (looks,) = policy_features(model.policy, model.normalise([folder[0][0]]))
    pairs, fours = homogeneity(model.policy, looks)
    half = Thresholds((float(pairs.median()), float(fours.min()) - 1e-3))

    def run(partition: PartitionSource, seed: int = 0) -> list[Tensor]:
        return levels_of(model, folder, Method(half, partition, seed=seed))

    learned, drawn, again, other = run("policy"), run("random"), run("random"), run("random", 1)
    for policy, random in zip(learned, drawn, strict=True):
        for level in (-1, 0, 1, 2):
            assert (policy == level).sum() == (random == level).sum()
    assert learned[0].unique().tolist() == [0, 1, 2]
    assert all(map(torch.equal, drawn, again))
    assert not all(map(torch.equal, drawn, other))


@pytest.mark.parametrize("partition", PARTITION_SOURCES)
def test_only_the_policy_is_charged_for(
    model: Segmenter, folder: LabelledFolder, partition: PartitionSource
) -> None:
    gmac = evaluate(model, folder, Method(MERGED, partition))["reduced"]["gmac"]
    assert (gmac["policy"] > 0) == (partition == "policy")
    assert gmac["total"] > gmac["policy"]


def test_other_classes_are_refused(tmp_path: Path, model: Segmenter) -> None:
    root = labelled_folder(tmp_path / "set", ("road", "tree", "water"), SIZES)
    data = LabelledFolder(root, "test")
    message = told(root, lambda _: evaluate(model, data, Method(MERGED)))
    assert "water" in message and "sky" in message


@pytest.mark.gpu
def test_partitions_follow_the_model_to_its_device(
    model: Segmenter, folder: LabelledFolder
) -> None:
    for partition in PARTITION_SOURCES:
        method = Method(MERGED, partition)
        there = evaluate(model.cuda(), folder, method)["reduced"]
        here = evaluate(model.cpu(), folder, method)["reduced"]
        assert there["tokens"]["start"] == pytest.approx(here["tokens"]["start"], rel=0.05)
