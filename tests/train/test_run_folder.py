"""The folder of a run: whose it is, complete or not, and what is damaged there."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from killed import Call, run, write_recipe
from PIL import Image
from running import assert_same_weights, refused
from safetensors.torch import load_file, save_file
from training import POLICY, TRAINER, draw, policy_recipe, segmenter_recipe

from tokenstep.train.recipe import Phase
from tokenstep.train.train import train_policy, train_segmenter


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_of_another_recipe_is_not_taken_for_this_one(
    drawn: Path, tmp_path: Path, ended: bool
) -> None:
    recipe = policy_recipe(drawn, tmp_path / "run", 3)
    assert run(recipe, die_at=None if ended else (0, 2)) == (0 if ended else -signal.SIGKILL)
    written = (tmp_path / "run" / "recipe.json").read_text()
    phase = recipe.phases[0]
    others: list[dict[str, object]] = [
        {"policy": dataclasses.replace(POLICY, width=24)},
        {"phases": (dataclasses.replace(phase, steps=4),)},
        {"phases": (dataclasses.replace(phase, optimizer="muon"),)},
        {"phases": (phase, phase)},
        {"tolerance": 0.1},
        {"trainer": dataclasses.replace(TRAINER, seed=1)},
        {"data": dataclasses.replace(recipe.data, scale=(0.5, 1.25))},
        {"data": dataclasses.replace(recipe.data, train_names=("!000",))},
    ]
    for change in others:
        refused(dataclasses.replace(recipe, **change), "another recipe")
    other = str(draw(tmp_path, {"train": 3, "val": 1}))
    data = dataclasses.replace(recipe.data, root=other)
    refused(dataclasses.replace(recipe, data=data), "other data .*train/images/003.png .*gone")
    assert (tmp_path / "run" / "recipe.json").read_text() == written


def test_what_differs_between_two_recipes_is_named(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path, 1)
    train_policy(recipe, progress=False)
    phase = dataclasses.replace(recipe.phases[0], lr=0.25)
    trainer = dataclasses.replace(TRAINER, seed=3)
    said = refused(dataclasses.replace(recipe, phases=(phase,), trainer=trainer), "another")
    assert "phases.0.lr 0.005 -> 0.25, trainer.seed 0 -> 3" in said


def test_a_run_keeps_its_number_of_devices(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path, 1)
    train_policy(recipe, progress=False)
    two = dataclasses.replace(recipe, trainer=dataclasses.replace(TRAINER, devices=2))
    assert "trainer.devices 1 -> 2" in refused(two, "another recipe")


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("kind", ["images", "labels"])
def test_a_corrected_file_under_the_same_name_is_another_training(
    tmp_path: Path, ended: bool, kind: str
) -> None:
    root = draw(tmp_path / "data", {"train": 4, "val": 1})
    recipe = policy_recipe(root, tmp_path / "out", 3)
    assert run(recipe, die_at=None if ended else (0, 2)) == (0 if ended else -signal.SIGKILL)
    path = root / "train" / kind / "002.png"
    array = np.array(Image.open(path))
    array[:8] = 1
    Image.fromarray(array).save(path)
    said = refused(recipe, "other data")
    assert f"train/{kind}/002.png changed" in said


def test_copied_data_are_the_same_data(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path / "out", 1)
    train_policy(recipe, progress=False)
    shutil.copytree(drawn, tmp_path / "copy", copy_function=shutil.copyfile)
    data = dataclasses.replace(recipe.data, root=str(tmp_path / "copy"))
    train_policy(dataclasses.replace(recipe, data=data), progress=False)


def test_a_complete_run_says_so_and_is_left_alone(
    drawn: Path, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = policy_recipe(drawn, tmp_path / "policy", 1)
    other = segmenter_recipe(
        drawn, policy, tmp_path / "segmenter", Phase(steps=1, batch=2, crop=(64, 64))
    )
    report = train_policy(one, progress=False)
    trained = train_segmenter(other, progress=False)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert train_policy(one) == report
    found = train_segmenter(other)
    for name, value in trained.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("already complete, nothing trained" in line for line in lines)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


@pytest.mark.parametrize("what", ["a val label", "the scores"])
def test_a_complete_run_measures_val_anew_where_it_changed(tmp_path: Path, what: str) -> None:
    root = draw(tmp_path / "data", {"train": 4, "val": 2})
    recipe = policy_recipe(root, tmp_path / "out", 1)
    before = train_policy(recipe, progress=False)
    scores = tmp_path / "out" / "val.json"
    if what == "the scores":
        scores.write_text("{")
        assert str(scores) in refused(recipe, "remove it and start again")
        scores.unlink()
        assert train_policy(recipe, progress=False) == before
    else:
        path = root / "val" / "labels" / "000.png"
        Image.fromarray(np.random.default_rng(1).integers(0, 3, (64, 64), np.uint8)).save(path)
        after = train_policy(recipe, progress=False)
        assert after != before
        assert json.loads(scores.read_text()) == after


@pytest.mark.parametrize("text", ["3", "null", '["classes.json"]', "[" * 100_000])
@pytest.mark.parametrize("name", ["data.json", "recipe.json", "files.json"])
def test_a_damaged_record_is_one_line(drawn: Path, tmp_path: Path, name: str, text: str) -> None:
    recipe = policy_recipe(drawn, tmp_path, 1)
    train_policy(recipe, progress=False)
    (tmp_path / name).write_text(text)
    assert name in refused(recipe, "damaged")


def test_a_run_of_a_version_that_knew_no_contents_goes_on(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path / "out", 3)
    assert run(recipe, die_at=(0, 2)) == -signal.SIGKILL
    (tmp_path / "out" / "data.json").unlink()
    path = tmp_path / "out" / "recipe.json"
    held = json.loads(path.read_text())
    del held["trainer"]["val_pictures"], held["class_weight"]  # keys that it did not know either
    path.write_text(json.dumps(held))
    train_policy(recipe, progress=False)
    held["digests"]["pictures"] = "of other names"
    path.write_text(json.dumps(held))
    (tmp_path / "out" / "data.json").unlink()
    refused(recipe, "the names of the pictures")


def test_another_process_in_the_folder_is_named(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path / "out", 10_000)
    with Call(tmp_path, "train", "policy", str(write_recipe(recipe))) as call:
        call.wait_until((tmp_path / "out" / "recipe.json").exists)
        said = refused(recipe, f"process {call.process.pid} ")
    assert str(tmp_path / "out") in said


def test_what_a_run_leaves_can_be_read_by_others_and_says_what_it_is(
    drawn: Path, policy: Path, tmp_path: Path
) -> None:
    before = os.umask(0o022)
    try:
        train_policy(policy_recipe(drawn, tmp_path / "policy", 1), progress=False)
        phase = Phase(steps=7, batch=2, crop=(64, 64))
        recipe = segmenter_recipe(drawn, policy, tmp_path / "segmenter", phase)
        train_segmenter(recipe, progress=False)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}
    scores = json.loads((tmp_path / "segmenter" / "val.json").read_text())
    for folder in ("policy", "segmenter"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "ground, red, yellow" in card and "64x64 px" in card
        assert "[More Information Needed]" not in card
    assert "7 steps of 2 crops" in card
    assert f"{100 * scores['dense']['miou']:.2f}" in card


def test_a_run_may_move_and_work_in_another_way(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = policy_recipe(drawn, tmp_path / "run", 3)
    assert run(recipe, die_at=(0, 2)) == -signal.SIGKILL  # 2 are saved
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "data").symlink_to(drawn)
    moved = dataclasses.replace(
        recipe,
        out=str(tmp_path / "moved"),
        data=dataclasses.replace(recipe.data, root=str(tmp_path / "data"), cache=True),
        trainer=dataclasses.replace(TRAINER, save_every=1, accelerator="auto"),
    )
    train_policy(moved)
    assert "goes on after step 2: 3 steps" in capsys.readouterr().err
    train_policy(dataclasses.replace(recipe, out=str(tmp_path / "whole")), progress=False)
    assert_same_weights(tmp_path / "moved", tmp_path / "whole")
    found = {path.name for path in (tmp_path / "moved" / "phase0").iterdir()}
    assert found == {"last.ckpt", "end.safetensors"}, "a second kill resumes from the newest"


def test_a_recipe_that_trained_nothing_may_be_corrected(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path, 1)
    trainer = dataclasses.replace(TRAINER, accelerator="abacus")
    refused(dataclasses.replace(recipe, tolerance=0.5, trainer=trainer), "abacus")
    train_policy(recipe, progress=False)


def test_a_segmenter_is_of_the_weights_of_one_policy(
    drawn: Path, policy: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "policy"
    shutil.copytree(policy, copy)
    phase = Phase(steps=1, batch=2, crop=(64, 64))
    recipe = segmenter_recipe(drawn, copy, tmp_path / "run", phase)
    train_segmenter(recipe, progress=False)
    state = load_file(copy / "model.safetensors")
    state["heads.0.bias"] += 1
    save_file(state, copy / "model.safetensors")
    refused(recipe, "another recipe")


@pytest.mark.parametrize("name", ["last.ckpt", "end.safetensors"])
@pytest.mark.parametrize("content", [b"", b"these are no weights", None])
def test_a_damaged_file_of_a_run_is_named(
    drawn: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    recipe = policy_recipe(drawn, tmp_path, 2)
    train_policy(recipe, progress=False)
    (tmp_path / "model.safetensors").unlink()  # which would say that all is done
    (tmp_path / "phase0" / "end.safetensors").rename(tmp_path / "end")
    if name == "end.safetensors":
        (tmp_path / "end").rename(tmp_path / "phase0" / name)
    path = tmp_path / "phase0" / name
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    assert str(path) in refused(recipe, "damaged")


def test_an_out_that_takes_no_files_is_named(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(out) in refused(policy_recipe(drawn, out, 1), "folder")
