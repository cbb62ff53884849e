"""What each command makes of labels that lack a class: masks of 0 and 255 above all."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import call
from conftest import CLASSES, TinyModel
from samples import write_split

MASK = np.where(np.arange(32 * 40).reshape(32, 40) < 160, 255, 0)  # an eighth is the object
SAID = "'tree' has no pixel in test; 255 fills 12.5 % of it: a 0/255 mask?"


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """A labelled folder of 0/255 masks."""
    for split in ("train", "val", "test"):
        write_split(tmp_path / "masks", split, [MASK], CLASSES)
    return tmp_path / "masks"


def allow(root: Path) -> None:
    """Let empty classes pass."""
    write_classes(root, allow_empty_classes=True)


def write_classes(root: Path, **options: bool) -> None:
    (root / "classes.json").write_text(json.dumps({"names": CLASSES, **options}))


@pytest.fixture
def model(tiny_model: TinyModel, tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def train_policy(masks: Path, out: Path) -> list[object]:
    """The command that trains a policy for one step."""
    recipe = out.with_suffix(".toml")
    recipe.write_text(
        f"""patch = 8
out = '{out}'
[data]
root = '{masks}'
workers = 0
[trainer]
accelerator = "cpu"
[policy]
trunk = "test_efficientnet"
stages = [1, 2]
sizes = [2]
width = 8
[[phases]]
steps = 1
batch = 1
crop = [32, 32]
"""
    )
    return ["train", "policy", recipe]


def train_segmenter(masks: Path, policy: Path, out: Path) -> list[object]:
    """The command that trains a segmenter for one step."""
    recipe = out.with_suffix(".toml")
    recipe.write_text(
        f"""policy_weights = '{policy}'
out = '{out}'
class_balance = 0.5
[settings]
merge = [0.5]
[data]
root = '{masks}'
workers = 0
[trainer]
accelerator = "cpu"
[vit]
name = "test_vit"
patch = 8
depth = 1
image_size = [32, 32]
[[phases]]
steps = 1
batch = 1
crop = [32, 32]
"""
    )
    return ["train", "segmenter", recipe]


def test_training_refuses_masks_unless_told_to_go_on(masks: Path, tmp_path: Path) -> None:
    policy, out = tmp_path / "policy", tmp_path / "segmenter"
    commands = [train_policy(masks, policy), train_segmenter(masks, policy, out)]
    refusals = [call(*commands[0])]
    assert not (policy / "recipe.json").exists(), "nothing is begun"
    allow(masks)
    assert call(*commands[0])[0] == call(*commands[1])[0] == 0
    shutil.rmtree(out)
    write_classes(masks)
    refusals.append(call(*commands[1]))
    assert not (out / "recipe.json").exists()
    for code, _, err in refusals:
        assert code == 2 and len(err.splitlines()) == 1
        assert SAID.replace("test", "train") in err and "relabel 255 as 1" in err
        assert '"allow_empty_classes": true' in err and "3 more" in err


def test_training_finds_a_bad_val_label_before_it_begins(tmp_path: Path) -> None:
    whole = np.arange(1280).reshape(32, 40) % 3
    for split in ("train", "val"):
        write_split(tmp_path / "set", split, [whole], CLASSES)
    spoilt = tmp_path / "set" / "val" / "labels" / "p0.png"
    spoilt.write_bytes(spoilt.read_bytes()[:60])
    code, _, err = call(*train_policy(tmp_path / "set", tmp_path / "policy"))
    assert code == 2 and str(spoilt) in err and len(err.splitlines()) == 1
    assert not (tmp_path / "policy" / "recipe.json").exists()


def test_calibrate_refuses_masks_unless_told_to_go_on(
    masks: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    few = ["--sample", 1, "--confirm", 1, "--prices", 0.4, "--bars", 0.9]
    command = ["calibrate", "--data", masks, "--model", model, "--out", out, *few]
    code, _, err = call(*command)
    assert code == 2 and len(err.splitlines()) == 1 and not (out / "config.json").exists()
    assert SAID.replace("test", "val") in err and '"allow_empty_classes": true' in err
    allow(masks)
    assert call(*command)[0] == 0 and (out / "calibration.json").is_file()


def test_evaluate_warns_in_the_table_and_in_json(masks: Path, model: Path, tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    code, out, _ = call("evaluate", "--data", masks, "--model", model, "--json", written)
    warnings = json.loads(written.read_text())["warnings"]
    assert code == 0 and len(warnings) == 2 and SAID in warnings[0] and "'sky'" in warnings[1]
    assert all(f"warning: {line}\n" in out for line in warnings)


@pytest.mark.parametrize(
    ("command", "figures", "page"),
    [("compare", "compare.json", "compare.md"), ("explain", "report.json", None)],
)
def test_a_comparison_and_a_report_warn_on_the_screen_the_page_and_in_json(
    masks: Path, model: Path, tmp_path: Path, command: str, figures: str, page: str | None
) -> None:
    pytest.importorskip("matplotlib")
    code, out, _ = call(command, "--data", masks, "--model", model, "--out", tmp_path / "out")
    warnings = json.loads((tmp_path / "out" / figures).read_text())["warnings"]
    assert code == 0 and len(warnings) == 2 and SAID in warnings[0]
    for text in [out, *([(tmp_path / "out" / page).read_text()] if page else [])]:
        assert all(line in text for line in warnings)


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_without_any_label_nothing_is_measured(tmp_path: Path, model: Path, command: str) -> None:
    root = write_split(tmp_path / "void", "test", [np.full((32, 40), 255)], CLASSES)
    allow(root)
    out = ["--out", tmp_path / "out"] if command == "compare" else []
    code, _, err = call(command, "--data", root, "--model", model, *out)
    assert code == 2 and "all pixels of test are 255" in err
    assert "allow_empty_classes" not in err and len(err.splitlines()) == 1


def test_all_classes_there_is_nothing_to_warn_of(tmp_path: Path, model: Path) -> None:
    root = write_split(tmp_path / "set", "test", [np.arange(1280).reshape(32, 40) % 3], CLASSES)
    code, out, _ = call("evaluate", "--data", root, "--model", model, "--json", "-")
    assert code == 0 and json.loads(out)["warnings"] == []
    assert "warning" not in call("evaluate", "--data", root, "--model", model)[1]
