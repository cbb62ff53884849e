"""What earlier versions saved and called goes on working."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyModel
from PIL import Image
from samples import pattern

import tokenstep
from tokenstep.config import DENSE, Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.hub import load
from tokenstep.model.segmenter import Segmenter
from tokenstep.train.recipe import SegmenterRecipe, read_recipe

# Written by version 0.1.0 before its settings were called thresholds, with the label maps that it
# gave of `stripes()`: random weights, a conv stem, policy features, two exits.
OLD = Path(__file__).parent / "folder_of_0_1"


def stripes() -> np.ndarray:
    picture = pattern(96, 128)
    dark = np.indices(picture.shape[:2]).sum(0) // 24 % 2
    return np.where(dark[..., None], picture, 255 - picture).astype(np.uint8)


@pytest.mark.parametrize("read", [load, lambda path: Segmenter.from_pretrained(str(path))])
def test_an_old_folder_gives_the_same_label_maps(read) -> None:
    model = read(OLD)
    assert model.config.thresholds == Thresholds((0.55, 0.6), (0.6, 0.7), 1)
    assert model.config.points[0].thresholds == Thresholds((0.52, 0.55), (0.5, 0.5), 1)
    for name, result in {
        "dense": model.segment(stripes(), thresholds=DENSE),
        "own": model.segment(stripes()),
        "cheap": model.segment(stripes(), max_loss=1.0),
    }.items():
        # A pixel between two equal classes may flip on another machine.
        assert (np.array(Image.open(OLD / f"{name}.png")) != result.labels).mean() < 1e-3


def test_what_is_saved_anew_has_the_new_names_and_gives_the_same(tmp_path: Path) -> None:
    model = load(OLD)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "thresholds" in config and "settings" not in config
    again = load(tmp_path)
    assert again.config == model.config
    assert np.array_equal(again.segment(stripes()).labels, model.segment(stripes()).labels)


def test_a_key_under_both_names_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(OLD, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "thresholds": {}}))
    with pytest.raises(TokenstepError, match="settings is the former name of thresholds") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_old_public_names_go_on_with_a_warning(tiny_model: TinyModel) -> None:
    with pytest.warns(DeprecationWarning, match="Thresholds"):
        old = tokenstep.Settings(merge=(0.5, 0.5))
    assert old == Thresholds(merge=(0.5, 0.5))
    with pytest.warns(DeprecationWarning, match=r"Segmenter\.build"):
        kind = tokenstep.StepSegmenter
    model = tiny_model()
    built = kind(model.config)
    built.load_state_dict(model.state_dict())
    picture = torch.rand(3, 40, 56)
    with pytest.warns(DeprecationWarning, match="settings is now called thresholds"):
        ours = built.eval().segment(picture, settings=old)
    theirs = model.segment(picture, thresholds=old)
    assert np.array_equal(ours.labels, theirs.labels) and isinstance(built, Segmenter)
    assert isinstance(kind.from_pretrained(str(OLD)), Segmenter)
    assert isinstance(load(OLD), kind) and not isinstance(old, kind)
    with pytest.warns(DeprecationWarning, match="thresholds") as caught:
        (batched,) = built.segment_batch([picture], settings=old)
    assert caught[0].filename == __file__, "the warning shows the caller's line"
    assert np.array_equal(batched.labels, theirs.labels)
    with pytest.warns(DeprecationWarning, match="config.thresholds"):
        assert model.config.settings == model.config.thresholds
    with pytest.raises(TokenstepError, match="former name"):
        model.segment(picture, settings=old, thresholds=old)


RECIPE = """
policy_weights = "policy"
out = "out"
[data]
root = "data"
[TABLE]
merge = [0.5, 0.5, 0.5, 0.5]
exits = [0.9]
[vit]
exits = [1]
[[phases]]
steps = 1
batch = 1
crop = [64, 64]
"""


def test_an_old_recipe_and_an_old_override_read_as_new_ones(tmp_path: Path) -> None:
    found = []
    for name in ("settings", "thresholds"):
        path = tmp_path / f"{name}.toml"
        path.write_text(RECIPE.replace("TABLE", name))
        for key in ("settings", "thresholds"):
            found.append(read_recipe(SegmenterRecipe, path, [f"{key}.exits=[0.7]"]))
    assert all(one == found[0] for one in found)
    assert found[0].thresholds.exits == (0.7,)


@pytest.mark.data
@pytest.mark.skipif("TOKENSTEP_OLD_MODEL" not in os.environ, reason="TOKENSTEP_OLD_MODEL is unset")
def test_an_old_model_of_yours_loads() -> None:
    model = load(os.environ["TOKENSTEP_OLD_MODEL"])
    labels = model.segment(stripes()).labels
    assert labels.shape == (96, 128) and labels.max() < len(model.config.classes)
