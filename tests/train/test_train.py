"""Training on drawn pictures: it learns, it merges, and a wrong recipe is one line."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from training import POLICY, VIT, segmenter_recipe

from tokenstep.config import Thresholds
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.hub import load
from tokenstep.measure.evaluate import evaluate
from tokenstep.measure.policy_report import policy_report
from tokenstep.measure.quality import Method
from tokenstep.policies.dcts import DCTS
from tokenstep.train.recipe import Phase
from tokenstep.train.train import (
    train_segmenter,
)


def test_the_policy_learns_which_superpatches_are_homogeneous(policy: Path) -> None:
    report = json.loads((policy / "val.json").read_text())
    smallest = report["sizes"]["2"]
    assert smallest["precision"] > 0.8
    assert smallest["recall"] > 0.5
    assert smallest["purity"] > 0.93
    assert report["all"]["reduction"] > smallest["reduction"] > 1.2


def test_a_trained_segmenter_is_right_and_merges(drawn: Path, policy: Path, tmp_path: Path) -> None:
    phase = Phase(steps=90, batch=8, crop=(64, 64), lr=2e-3, warmup=10, dense_share=0.2)
    tuned = Phase(steps=10, batch=8, crop=(64, 64), lr=2e-4, warmup=2, pruning=True)
    train_segmenter(segmenter_recipe(drawn, policy, tmp_path, phase, tuned), progress=False)

    model = load(tmp_path)
    frozen = load_file(policy / "model.safetensors")  # with the statistics of its norms
    for name, value in model.policy.state_dict().items():
        assert torch.equal(value, frozen[name]), name
    thresholds = model.config.thresholds
    test = LabelledFolder(drawn, "test")
    report = evaluate(model, test, Method(thresholds))
    for half in ("dense", "reduced"):
        assert report[half]["miou"] > 0.6, half  # guessing one class gives less than 0.3
    assert report["reduced"]["tokens"]["start"] < 0.8 * report["dense"]["tokens"]["start"]
    gmac = {half: report[half]["gmac"] for half in ("dense", "reduced")}
    assert gmac["reduced"]["policy"] > 0
    assert gmac["reduced"]["total"] < gmac["dense"]["total"], "the policy costs what it saves"
    assert 0 < report["reduced"]["halted_share"] < 1
    assert json.loads((tmp_path / "recipe.json").read_text())["vit"]["patch"] == 8


@pytest.mark.parametrize(("scale_by", "side"), [("side", 64), ("pixel", None)])
def test_a_model_of_scenes_remembers_the_scale_of_its_pictures(
    drawn: Path, policy: Path, tmp_path: Path, scale_by: Literal["side", "pixel"], side: int | None
) -> None:
    phase = Phase(steps=1, batch=2, crop=(32, 32))
    recipe = segmenter_recipe(drawn, policy, tmp_path, phase)
    recipe = dataclasses.replace(recipe, scale_by=scale_by)
    train_segmenter(recipe, progress=False)
    assert load(tmp_path).config.long_side == side
    written = json.loads((tmp_path / "recipe.json").read_text())
    assert written.pop("scale_by") == scale_by
    (tmp_path / "recipe.json").write_text(json.dumps(written))  # as an earlier version wrote it
    train_segmenter(recipe, progress=False)  # is not refused as another recipe


def test_a_policy_that_is_no_number_has_no_report(drawn: Path) -> None:
    broken = DCTS(POLICY, 8)
    broken.heads[0].bias.data.fill_(float("nan"))
    with pytest.raises(TokenstepError, match="NaN"):
        policy_report(broken, LabelledFolder(drawn, "val"), tolerance=0.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policy_weights": "nowhere"}, "holds no trained policy"),
        ({"vit": dataclasses.replace(VIT, patch=16)}, "patches of 8 px"),
        ({"vit": dataclasses.replace(VIT, name="resnet18")}, "resnet18"),
        ({"vit": dataclasses.replace(VIT, name="vit_of_dreams")}, "vit_of_dreams"),
        ({"vit": dataclasses.replace(VIT, name="test_vit.foo")}, "foo"),
        ({"vit": dataclasses.replace(VIT, patch=None, image_size=(8, 8))}, "image_size"),
        ({"thresholds": Thresholds(exits=(0.9, 0.9))}, "exit"),
        ({"thresholds": Thresholds(merge=(0.9,))}, "superpatch"),
    ],
)
def test_a_wrong_recipe_is_one_line(
    drawn: Path, policy: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    phase = Phase(steps=1, batch=2, crop=(64, 64))
    recipe = dataclasses.replace(segmenter_recipe(drawn, policy, tmp_path, phase), **change)
    with pytest.raises(TokenstepError, match=said) as caught:
        train_segmenter(recipe, progress=False)
    assert "\n" not in str(caught.value)


def test_a_recipe_without_phases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenstepError, match="phases"):
        segmenter_recipe(tmp_path, tmp_path, tmp_path)
