"""The policy and the segmenter see pictures normalised by one mean and std, the recipe's."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running import assert_same_weights, refused
from training import draw, policy_recipe, segmenter_recipe

from tokenstep.config import Thresholds
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.hub import load
from tokenstep.train.recipe import Phase
from tokenstep.train.train import train_policy, train_segmenter

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
ONE_STEP = Phase(steps=1, batch=2, crop=(64, 64))


def test_a_policy_is_reported_as_the_model_uses_it(drawn: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(policy_recipe(drawn, tmp_path / "policy", 12), **IMAGENET)
    report = train_policy(recipe, progress=False)
    made = segmenter_recipe(drawn, tmp_path / "policy", tmp_path / "segmenter", ONE_STEP)
    train_segmenter(dataclasses.replace(made, **IMAGENET), progress=False)

    model = load(tmp_path / "segmenter")
    assert {"mean": model.config.mean, "std": model.config.std} == IMAGENET
    pictures = LabelledFolder(drawn, "val")
    results = [model.segment(image, thresholds=Thresholds((0.5, 0.5))) for image, _ in pictures]
    cells, tokens = (
        sum(getattr(one.tokens, name) for one in results) for name in ("grid", "start")
    )
    assert cells / tokens > 1, "nothing merges, so nothing is compared"
    assert report["all"]["reduction"] == pytest.approx(cells / tokens)


def test_a_policy_learns_from_what_it_is_reported_on(tmp_path: Path) -> None:
    # Pictures of half the values look the same at half the mean and half the std.
    recipes = []
    for name, factor, half in (("bright", 2, 0.5), ("dark", 1, 0.25)):
        root = draw(tmp_path / name, {"train": 8, "val": 2})
        for path in root.glob("*/images/*.png"):
            values = np.asarray(Image.open(path)) // 2 * factor
            Image.fromarray(values.astype(np.uint8)).save(path)
        recipe = policy_recipe(root, tmp_path / f"{name}_policy", 4)
        # Nothing that rounds: neither scaling nor colour.
        data = dataclasses.replace(recipe.data, scale=(1.0, 1.0), colour=0.0)
        changes: dict[str, Any] = {"mean": (half,) * 3, "std": (half,) * 3, "data": data}
        recipes.append(dataclasses.replace(recipe, **changes))
    bright, dark = (train_policy(recipe, progress=False) for recipe in recipes)
    assert bright == dark
    assert_same_weights(Path(recipes[0].out), Path(recipes[1].out))


def test_a_policy_of_another_normalisation_is_refused(
    drawn: Path, policy: Path, tmp_path: Path
) -> None:
    made = segmenter_recipe(drawn, policy, tmp_path / "segmenter", ONE_STEP)
    said = refused(dataclasses.replace(made, **IMAGENET), "0.485")
    assert str(policy) in said and "[0.5, 0.5, 0.5]" in said
    # As an earlier version wrote it.
    written = json.loads((policy / "recipe.json").read_text())
    other = tmp_path / "policy"
    other.mkdir()
    (other / "model.safetensors").write_bytes((policy / "model.safetensors").read_bytes())
    for key in ("mean", "std"):
        written.pop(key)
    (other / "recipe.json").write_text(json.dumps(written))
    made = dataclasses.replace(made, policy_weights=str(other))
    refused(dataclasses.replace(made, **IMAGENET), "0.485")
    train_segmenter(made, progress=False)


def test_a_run_of_a_version_without_mean_and_std_goes_on(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path, 1)
    report = train_policy(recipe, progress=False)
    written = json.loads((tmp_path / "recipe.json").read_text())
    for table, key in ((written, "mean"), (written, "std"), (written["policy"], "pretrained")):
        table.pop(key)
    (tmp_path / "recipe.json").write_text(json.dumps(written))
    assert train_policy(recipe, progress=False) == report
    refused(dataclasses.replace(recipe, **IMAGENET), "another recipe .*mean")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mean": (0.5, 0.5, 0.5)}, "std"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.0, 0.2)}, "std"),
        ({"mean": (0.5, float("nan"), 0.5), "std": (0.2, 0.2, 0.2)}, "mean"),
    ],
)
def test_what_nothing_can_be_normalised_by_is_refused(
    drawn: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    for recipe in (
        policy_recipe(drawn, tmp_path, 1),
        segmenter_recipe(drawn, tmp_path, tmp_path, ONE_STEP),
    ):
        with pytest.raises(TokenstepError, match=named):
            dataclasses.replace(recipe, **change)


def test_loading_needs_a_sound_std(tiny_config: Any) -> None:
    with pytest.raises(TokenstepError, match="std"):
        dataclasses.replace(tiny_config(), std=(0.0, 1.0, 1.0))
