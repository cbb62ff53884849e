"""`tokenstep segment`: what it writes and prints, its exit codes, and one line per fault."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import call, refused, report_in, save_model
from conftest import CLASSES, PALETTE
from PIL import Image
from samples import labelled_folder, pattern, save_pattern

from tokenstep import __version__
from tokenstep.config import Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.hub import load


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save_pattern(tmp_path / "photo.png", 40, 50)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return labelled_folder(tmp_path / "tiny_set", CLASSES, [(40, 56), (17, 90)])


def test_all_done_is_zero_and_silent(tmp_path: Path, saved: Path, photo: Path) -> None:
    out = tmp_path / "new" / "out"
    code, stdout, err = call("segment", photo, "--model", saved, "--out", out)
    assert (code, err) == (0, "") and "photo.png" in stdout
    (entry,) = report_in(out)
    assert set(entry) >= {"file", "width", "height", "tokens", "gmac", "milliseconds", "classes"}
    assert set(entry["milliseconds"]) >= {"read", "policy", "embed", "decode", "write"}
    assert set(entry["gmac"]) >= {"dense", "used"} and set(entry["classes"]) == set(CLASSES)
    again = call("segment", photo, "--model", saved, "--out", out)
    assert again[0] == 0, "results may be written over"


def test_one_damaged_picture_is_one(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no picture")
    code, _, err = call("segment", tmp_path / "bad.jpg", "--model", saved, "--out", tmp_path / "o")
    assert code == 1 and len(err.splitlines()) == 1 and "bad.jpg" in err
    (entry,) = report_in(tmp_path / "o")
    assert f"tokenstep: {entry['error']}\n" == err


@pytest.mark.parametrize("command", ["segment", "evaluate"])
def test_a_picture_of_unknown_range_is_warned_of_in_one_line(
    tmp_path: Path, saved: Path, data: Path, command: str
) -> None:
    path = data / "test" / "images" / "p0.png"
    dark = pattern(40, 56)[..., 0].astype(np.uint16) * 16
    Image.fromarray(dark).save(path)
    given = ("--data", data) if command == "evaluate" else (path, "--out", tmp_path / "out")
    code, _, err = call(command, *given, "--model", saved)
    assert code == 0, "it is read all the same"
    (line,) = err.splitlines()
    assert line.startswith(f"tokenstep: {path}: ") and f"0 to {dark.max()} of 65535" in line
    if command == "segment":
        (entry,) = report_in(tmp_path / "out")
        assert [f"tokenstep: {warning}" for warning in entry["warnings"]] == [line]


def test_a_missing_file_among_good_ones(tmp_path: Path, saved: Path, photo: Path) -> None:
    gone, out = tmp_path / "gone.jpg", tmp_path / "out"
    code, _, err = call("segment", gone, photo, "--model", saved, "--out", out)
    assert code == 1 and len(err.splitlines()) == 1
    entries = {entry["file"]: entry for entry in report_in(out)}
    assert str(gone) in entries[str(gone)]["error"] and "error" not in entries[str(photo)]
    assert (out / "photo.labels.png").is_file()


def test_no_picture_at_all_is_a_wrong_call(tmp_path: Path, saved: Path) -> None:
    out = tmp_path / "out"
    for given in (tmp_path / "gone.jpg", tmp_path, f"{tmp_path}/*.png"):
        assert str(given) in refused("segment", given, "--model", saved, "--out", out)
    code, _, err = call("segment", tmp_path / "gone.jpg", tmp_path, "--model", saved, "--out", out)
    assert code == 2 and len(err.splitlines()) == 2
    assert not out.exists()


def test_line_breaks_in_a_name_make_no_second_line() -> None:
    refused("segment", "a\nb\r\nc.jpg")


def test_an_unwritable_folder_is_told_before_any_work(saved: Path, photo: Path) -> None:
    gone = photo.parent / "gone.jpg"
    for out in (photo, photo / "below"):
        # One line: where the work begins, what was not found is told.
        assert str(out) in refused("segment", gone, photo, "--model", saved, "--out", out)


def test_the_report_says_what_ran_and_names_every_picture(
    tmp_path: Path, saved: Path, photo: Path
) -> None:
    bad, gone, out = tmp_path / "bad.jpg", tmp_path / "gone.jpg", tmp_path / "out"
    bad.write_text("no picture")
    Image.fromarray(pattern(20, 30)).save(tmp_path / "photo.jpg")
    given = ("segment", gone, photo, bad, tmp_path / "photo.jpg")
    call(*given, "--model", saved, "--out", out, "--exits", "0.9", "--max-side", "40")
    report = json.loads((out / "report.json").read_text())
    assert (report["model"], report["version"]) == (str(saved), __version__)
    assert report["finished"]
    assert [(one["index"], one["name"]) for one in report["classes"]] == list(enumerate(CLASSES))
    assert [tuple(one["colour"]) for one in report["classes"]] == list(PALETTE)
    assert report["thresholds"] == {"merge": {"2": 0, "4": 0}, "exits": {"1": 0.9}, "spare": 5}
    entries = {Path(entry["file"]).name: entry for entry in report["images"]}
    names = {file: entry["name"] for file, entry in entries.items()}
    assert names == {
        "gone.jpg": "gone",
        "photo.png": "photo",
        "bad.jpg": "bad",
        "photo.jpg": "photo_jpg",
    }
    assert entries["photo.png"]["scale"] == 40 / 50 and entries["photo.jpg"]["scale"] is None


def test_thresholds_change_what_is_spent(tmp_path: Path, saved: Path, photo: Path) -> None:
    def tokens(*options: str) -> tuple[int, int, int]:
        code, _, err = call("segment", photo, "--model", saved, "--out", tmp_path / "o", *options)
        assert (code, err) == (0, "")
        found = report_in(tmp_path / "o")[0]["tokens"]
        return found["grid"], found["start"], sum(found["halted"].values())

    assert tokens("--dense") == tokens("--merge", "off", "--exits", "off") == (35, 35, 0)
    assert tokens("--merge", "1,1", "--exits", "1")[1:] == (35, 0)
    _, start, halted = tokens("--merge", "0,0", "--exits", "0")
    assert start < 35 and halted > 0


def test_the_picture_s_own_compute_is_printed_not_that_of_the_calibration(
    tmp_path: Path, saved: Path, photo: Path
) -> None:
    shutil.copytree(saved, tmp_path / "model")
    config = json.loads((saved / "config.json").read_text())
    point = {"settings": config["thresholds"], "miou": 0.5, "loss": 0.25, "gmac": 777.77}
    config["points"] = [{**point, "tokens": 9, "halted_share": 0, "split": "val", "images": 7}]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    code, stdout, err = call("segment", photo, "--model", tmp_path / "model", "--out", out)
    assert (code, err) == (0, "")
    (entry,) = report_in(out)
    assert f"this picture: {entry['gmac']['used']:.2f} GMAC" in stdout and "777" not in stdout
    assert "0.25 points of mIoU below the best" in stdout and "7 pictures of val" in stdout


def test_segment_in_python_has_the_knob_too(saved: Path, photo: Path) -> None:
    model = load(saved)
    with pytest.raises(TokenstepError, match="one of"):
        model.segment(photo, thresholds=Thresholds(), max_loss=1)
    with pytest.raises(TokenstepError, match="calibrate"):
        model.segment(photo, max_loss=1)
    dense = model.segment(photo, max_loss=0)
    assert not isinstance(dense, list) and dense.tokens.start == dense.tokens.grid
