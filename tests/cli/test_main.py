"""The command line as a user calls it: what it writes, its exit codes, and one line per fault."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, PALETTE
from PIL import Image
from samples import labelled_folder, pattern, png_header

from tokenstep import __version__, terminal
from tokenstep.cli import main
from tokenstep.config import ModelConfig, PolicyConfig, Thresholds, VitConfig
from tokenstep.data.pictures import read_picture
from tokenstep.errors import TokenstepError
from tokenstep.explain.report import shown
from tokenstep.hub import load, shipped_models
from tokenstep.model.segmenter import Segmenter
from tokenstep.serve import files as infer

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows nothing, saved as any other is."""
    torch.manual_seed(0)
    vit = VitConfig("test_vit", patch=8, depth=2, image_size=(32, 48), exits=(1,), cells=2)
    policy = PolicyConfig("test_efficientnet", stages=(1, 2), sizes=(2, 4), width=8)
    # Superpatches wherever they fit, so that the largest picture costs little.
    config = ModelConfig(CLASSES, PALETTE, vit, policy, Thresholds((0.0, 0.0), (0.36,)))
    folder = tmp_path_factory.mktemp("saved") / "model"
    Segmenter.build(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `tokenstep` with some arguments in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tokenstep", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught, warnings.catch_warnings():
            main.main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def refused(call: Call) -> Callable[..., str]:
    """Run a call that is wrong; its one line on stderr."""

    def run(*arguments: object) -> str:
        code, _, err = call(*arguments)
        assert code == 2
        (line,) = err.splitlines()
        assert line.startswith("tokenstep: ")
        return line

    return run


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(pattern(40, 50)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def report_in(out: Path) -> list[dict[str, Any]]:
    def never(word: str) -> None:
        raise AssertionError(f"{word} in report.json")

    images = json.loads((out / "report.json").read_text(), parse_constant=never)["images"]
    assert isinstance(images, list)
    return images


# --- the command as a process -----------------------------------------------------------------


def draw_good(folder: Path) -> dict[str, tuple[int, int]]:
    """Pictures of every kind that must be segmented, and the sizes (w, h) of their label maps."""
    image = Image.fromarray(pattern(40, 50))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.convert("L").save(folder / "grey.jpg")
    image.convert("P").save(folder / "palette.png")
    image.convert("RGBA").save(folder / "clear.png")
    image.convert("CMYK").save(folder / "print.jpg")
    image.save(folder / "turned.jpg", exif=exif)
    image.save(folder / "moving.gif", save_all=True, append_images=[image.rotate(90)])
    image.save(folder / "camera.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")  # cut off
    image.save(folder / "[b]:cat:.webp")
    Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 32).save(folder / "deep.png")
    sizes = {path.name: (50, 40) for path in folder.iterdir()}
    sizes["turned.jpg"] = (40, 50)
    for name, w, h in (("dot", 1, 1), ("row", 300, 1), ("column", 1, 300), ("wide", 20000, 50)):
        Image.fromarray(pattern(h, w)).save(folder / f"{name}.png")
        sizes[f"{name}.png"] = (w, h)
    return sizes


def draw_bad(folder: Path) -> set[str]:
    """Pictures that must be refused."""
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "empty.jpg").touch()
    (folder / "diary.jpg").write_text("Today I saw a street.\n")
    Image.fromarray(pattern(40, 50)).save(folder / "half.bmp")
    (folder / "half.bmp").write_bytes((folder / "half.bmp").read_bytes()[:3000])
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / "heights.tif")
    return {"bomb.png", "empty.jpg", "diary.jpg", "half.bmp", "heights.tif"}


def test_every_kind_of_picture_in_one_run(tmp_path: Path, saved: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    sizes, bad = draw_good(folder), draw_bad(folder)
    missing, bare = tmp_path / "missing.jpg", tmp_path / "bare"
    bare.mkdir()
    command = ["segment", folder, missing, bare, "--model", saved, "--out", out]
    program = "from tokenstep.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, command), "--batch", "3", "--threads", "1"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1, done.stderr
    entries = {Path(entry["file"]).name: entry for entry in report_in(out)}
    assert entries.keys() == {*sizes, *bad, missing.name, bare.name}
    for name, size in sizes.items():
        entry = entries[name]
        assert (entry["width"], entry["height"]) == size
        with Image.open(out / f"{entry['name']}.labels.png") as labels:
            assert labels.size == size and labels.mode == "P"
            assert np.asarray(labels).max() < len(CLASSES)
        for kind in ("overlay.jpg", "tokens.jpg"):
            assert read_picture(out / f"{entry['name']}.{kind}").width >= min(size[0], 50)
    lines = done.stderr.splitlines()
    failed = {name: entry["error"] for name, entry in entries.items() if "error" in entry}
    assert failed.keys() == {*bad, missing.name, bare.name}
    assert sorted(lines) == sorted(f"tokenstep: {error}" for error in failed.values())
    assert all(name in error for name, error in failed.items())
    assert "[b]:cat:.webp" in done.stdout and str(out) in done.stdout
    assert len(list(out.iterdir())) == 3 * len(sizes) + 1


# --- segment ----------------------------------------------------------------------------------


def test_all_done_is_zero_and_silent(call: Call, tmp_path: Path, saved: Path, photo: Path) -> None:
    out = tmp_path / "new" / "out"
    code, stdout, err = call("segment", photo, "--model", saved, "--out", out)
    assert (code, err) == (0, "") and "photo.png" in stdout
    (entry,) = report_in(out)
    assert set(entry) >= {"file", "width", "height", "tokens", "gmac", "milliseconds", "classes"}
    assert set(entry["milliseconds"]) >= {"read", "policy", "embed", "decode", "write"}
    assert set(entry["gmac"]) >= {"dense", "used"} and set(entry["classes"]) == set(CLASSES)
    again = call("segment", photo, "--model", saved, "--out", out)
    assert again[0] == 0, "results may be written over"


def test_one_damaged_picture_is_one(call: Call, tmp_path: Path, saved: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no picture")
    code, _, err = call("segment", tmp_path / "bad.jpg", "--model", saved, "--out", tmp_path / "o")
    assert code == 1 and len(err.splitlines()) == 1 and "bad.jpg" in err
    (entry,) = report_in(tmp_path / "o")
    assert f"tokenstep: {entry['error']}\n" == err


@pytest.mark.parametrize("command", ["segment", "evaluate"])
def test_a_picture_of_unknown_range_is_warned_of_in_one_line(
    call: Call, tmp_path: Path, saved: Path, data: Path, command: str
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


def test_a_missing_file_among_good_ones(
    call: Call, tmp_path: Path, saved: Path, photo: Path
) -> None:
    gone, out = tmp_path / "gone.jpg", tmp_path / "out"
    code, _, err = call("segment", gone, photo, "--model", saved, "--out", out)
    assert code == 1 and len(err.splitlines()) == 1
    entries = {entry["file"]: entry for entry in report_in(out)}
    assert str(gone) in entries[str(gone)]["error"] and "error" not in entries[str(photo)]
    assert (out / "photo.labels.png").is_file()


def test_no_picture_at_all_is_a_wrong_call(
    call: Call, refused: Callable[..., str], tmp_path: Path, saved: Path
) -> None:
    out = tmp_path / "out"
    for given in (tmp_path / "gone.jpg", tmp_path, f"{tmp_path}/*.png"):
        assert str(given) in refused("segment", given, "--model", saved, "--out", out)
    code, _, err = call("segment", tmp_path / "gone.jpg", tmp_path, "--model", saved, "--out", out)
    assert code == 2 and len(err.splitlines()) == 2
    assert not out.exists()


def test_line_breaks_in_a_name_make_no_second_line(refused: Callable[..., str]) -> None:
    refused("segment", "a\nb\r\nc.jpg")


def test_an_unwritable_folder_is_told_before_any_work(
    refused: Callable[..., str], saved: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer, "segment_files", None)
    for out in (photo, photo / "below"):
        assert str(out) in refused("segment", photo, "--model", saved, "--out", out)


@pytest.mark.parametrize("pictures", [0, 3])
def test_a_run_that_is_stopped_leaves_a_report_of_what_it_wrote(
    call: Call, tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, pictures: int
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(5):
        Image.fromarray(pattern(20, 30)).save(tmp_path / "in" / f"p{number}.png")
    segment, out = Segmenter.segment_batch, tmp_path / "out"
    meanwhile: list[dict[str, Any]] = []

    def stop(model: Segmenter, images: Any, **thresholds: Any) -> Any:
        if len(meanwhile) == pictures:
            raise KeyboardInterrupt
        written = out / "report.json"
        meanwhile.append(json.loads(written.read_text()) if written.exists() else {})
        return segment(model, images, **thresholds)

    monkeypatch.setattr(Segmenter, "segment_batch", stop)
    code, _, err = call("segment", tmp_path / "in", "--model", saved, "--out", out)
    assert code not in (0, 2) and "Traceback" not in err
    report = json.loads((out / "report.json").read_text())
    assert not report["finished"]
    names = [entry["name"] for entry in report["images"]]
    kinds = ("labels.png", "overlay.jpg", "tokens.jpg")
    files = {f"{name}.{kind}" for name in names for kind in kinds}
    assert {path.name for path in out.iterdir()} == {"report.json", *files}
    if pictures:
        assert len(names) > 0
        assert [len(report["images"]) for report in meanwhile if report], "written on the way"


def test_the_report_says_what_ran_and_names_every_picture(
    call: Call, tmp_path: Path, saved: Path, photo: Path
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


def test_thresholds_change_what_is_spent(
    call: Call, tmp_path: Path, saved: Path, photo: Path
) -> None:
    def tokens(*options: str) -> tuple[int, int, int]:
        code, _, err = call("segment", photo, "--model", saved, "--out", tmp_path / "o", *options)
        assert (code, err) == (0, "")
        found = report_in(tmp_path / "o")[0]["tokens"]
        return found["grid"], found["start"], sum(found["halted"].values())

    assert tokens("--dense") == tokens("--merge", "off", "--exits", "off") == (35, 35, 0)
    assert tokens("--merge", "1,1", "--exits", "1")[1:] == (35, 0)
    _, start, halted = tokens("--merge", "0,0", "--exits", "0")
    assert start < 35 and halted > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--merge", "0.5"], "--merge 0.5 2"),
        (["--merge", "0.5,0.5,0.5"], "--merge 2"),
        (["--merge", "high,low"], "--merge numbers off"),
        (["--merge", "0.5,1.5"], "1.5 0 1"),
        (["--merge", "nan,0.5"], "nan"),
        (["--exits", "0.5,0.5"], "--exits 1 exit"),
        (["--exits", ""], "--exits"),
        (["--dense", "--exits", "0.9"], "--dense --exits"),
        (["--dense", "--max-loss", "1"], "--dense --max-loss"),
        (["--max-loss", "1", "--merge", "off"], "--max-loss --merge"),
        (["--max-loss", "1"], "operating points calibrate"),
        (["--device", "abacus"], "--device abacus cpu"),
        (["--device", "cuda:99"], "--device cuda:99 cpu"),
        (["--device", "meta"], "--device meta cpu"),
        (["--device", "mps"], "--device mps CUDA cpu"),
    ],
)
def test_wrong_options(
    refused: Callable[..., str], saved: Path, photo: Path, options: list[str], words: str
) -> None:
    line = refused("segment", photo, "--model", saved, "--out", photo.parent / "out", *options)
    assert all(word in line for word in words.split())
    assert not (photo.parent / "out").exists()


def test_the_picture_s_own_compute_is_printed_not_that_of_the_calibration(
    call: Call, tmp_path: Path, saved: Path, photo: Path
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


# --- models -----------------------------------------------------------------------------------


def test_an_unknown_model_lists_the_known_ones(refused: Callable[..., str], photo: Path) -> None:
    for name in ("abacus", "no/such/folder", photo):
        line = refused("segment", photo, "--model", name)
        assert str(name) in line and all(known in line for known in shipped_models())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"\x10" * 100),
        ("config.json", None),
        ("config.json", b""),
        ("config.json", b"{classes: road"),
        ("config.json", b"\xff\xfe\x00"),
        ("config.json", b"{}"),
        ("config.json", b"[1, 2]"),
        ("config.json", b"null"),
    ],
)
def test_damaged_models(
    refused: Callable[..., str], tmp_path: Path, saved: Path, name: str, content: bytes | None
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_bytes(content)
    Image.fromarray(pattern(8, 8)).save(tmp_path / "a.png")
    assert str(broken) in refused("segment", tmp_path / "a.png", "--model", broken)


def test_weights_that_are_cut_short(
    refused: Callable[..., str], tmp_path: Path, saved: Path, photo: Path
) -> None:
    shutil.copytree(saved, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    for length in (4, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        assert str(weights) in refused("segment", photo, "--model", tmp_path / "model")


def test_weights_of_other_classes(
    refused: Callable[..., str], tmp_path: Path, saved: Path, photo: Path
) -> None:
    shutil.copytree(saved, tmp_path / "model")
    config = json.loads((saved / "config.json").read_text())
    config |= {"classes": ["sea", "land"], "palette": [[0, 0, 1], [0, 1, 0]]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert "config.json" in refused("segment", photo, "--model", tmp_path / "model")


# --- evaluate ---------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return labelled_folder(tmp_path / "tiny_set", CLASSES, [(40, 56), (17, 90)])


def test_evaluate_writes_both_halves(call: Call, saved: Path, data: Path) -> None:
    target = data.parent / "new" / "eval.json"
    code, stdout, err = call("evaluate", "--model", saved, "--data", data, "--json", target)
    assert (code, err) == (0, "") and "mIoU" in stdout and "tiny_set test, 2 pictures" in stdout
    report = json.loads(target.read_text())
    assert list(report)[:5] == ["model", "data", "split", "images", "settings"]
    assert (report["model"], report["data"], report["split"]) == (str(saved), "tiny_set", "test")
    assert report["images"] == 2 and report["settings"]["merge"] == [0.0, 0.0]
    assert report["reduced"]["tokens"]["start"] < report["dense"]["tokens"]["start"]
    assert report["reduced"]["halted_share"] > report["dense"]["halted_share"] == 0
    assert set(report["dense"]["iou"]) == set(CLASSES)


def test_evaluate_prints_json_alone(
    call: Call, saved: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    options = ["--names", "p1", "--partition", "oracle", "--merge", "off", "--json", "-"]
    code, stdout, _ = call("evaluate", "--model", saved, "--data", ".", *options)
    report = json.loads(stdout)
    assert code == 0 and report["images"] == 1 and report["data"] == "tiny_set"
    assert report["settings"]["partition"] == "oracle" and report["settings"]["merge"] == []


def test_wrong_data(refused: Callable[..., str], saved: Path, data: Path) -> None:
    def line(*options: object) -> str:
        return refused("evaluate", "--model", saved, *options)

    assert str(data / "no") in line("--data", data / "no")
    assert "test" in line("--data", data, "--split", "val")
    assert "zebra" in line("--data", data, "--names", "zebra")
    assert "oracle" in line("--data", data, "--partition", "zebra")
    assert str(data) in line("--data", data, "--json", data)
    assert "classes.json" in line("--data", data, "--json", data / "classes.json" / "a.json")
    label = data / "test" / "labels" / "p1.png"
    Image.new("L", (90, 17), 9).save(label)
    assert str(label) in line("--data", data) and "9" in line("--data", data)
    Image.new("L", (9, 17), 0).save(label)
    assert str(label) in line("--data", data) and "9 x 17" in line("--data", data)
    label.unlink()
    assert str(label) in line("--data", data)
    (data / "classes.json").write_text('{"names": ["sea", "land"]}')
    Image.new("L", (90, 17), 0).save(label)
    assert "sea, land" in line("--data", data) and str(data) in line("--data", data)
    (data / "classes.json").write_text("no json")
    assert "classes.json" in line("--data", data)


def test_data_without_any_label_has_no_score(
    refused: Callable[..., str], saved: Path, data: Path
) -> None:
    for number, size in enumerate([(56, 40), (90, 17)]):
        Image.new("L", size, 255).save(data / "test" / "labels" / f"p{number}.png")
    assert "label" in refused("evaluate", "--model", saved, "--data", data)


# --- the rest ---------------------------------------------------------------------------------


def test_the_package_runs_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tokenstep", "--version"])
    with pytest.raises(SystemExit) as caught, warnings.catch_warnings():
        runpy.run_module("tokenstep", run_name="__main__")
    assert not caught.value.code and capsys.readouterr().out == f"{__version__}\n"


def test_version_and_help(call: Call) -> None:
    assert call("--version") == (0, f"{__version__}\n", "")
    code, stdout, _ = call("--help")
    assert code == 0 and all(verb in stdout for verb in ("segment", "evaluate", "train"))


def test_training_faults_are_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    assert "a.toml" in refused("train", "policy", tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text("out = 'x'\npatch = 8\n")
    assert "zebra" in refused("train", "policy", tmp_path / "a.toml", "zebra=1")
    assert "zebra" in refused("train", "segmenter", tmp_path / "a.toml", "zebra")


def test_training_without_its_extra_says_what_to_install(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "find_spec", lambda name: None if name == "lightning" else name)
    for verb in ("policy", "segmenter"):
        line = refused("train", verb, tmp_path / "a.toml")
        assert "lightning" in line and "tokenstep[train]" in line


def test_a_bar_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda visible=visible: visible)
        assert terminal.progress_bar().disable is not visible


# --- calibrate and its knob -------------------------------------------------------------------


def test_calibrate_gives_segment_and_evaluate_their_knob(
    call: Call, saved: Path, tmp_path: Path, photo: Path
) -> None:
    data = labelled_folder(tmp_path / "set", CLASSES, [(160, 240)])
    out = tmp_path / "calibrated"
    options = ["--data", data, "--split", "test"]
    search = ["--prices", "0.4,9", "--bars", "0.4", "--sample", "1", "--confirm", "3"]
    code, stdout, err = call(
        "calibrate", "--model", saved, "--half", "--out", out, *options, *search
    )
    assert (code, err) == (0, "") and "the best" in stdout and str(out) in stdout
    report = json.loads((out / "calibration.json").read_text())
    tried = report["search"]
    assert (tried["prices"], tried["bars"]) == ([0.4, 9], [0.4])
    assert (tried["sample"], tried["confirm"]) == (1, 3)
    points = report["points"]
    assert points and report["images"] == 1 and report["exits"]["1"]["temperature"] > 0
    whole, small = (path / "model.safetensors" for path in (saved, out))
    assert small.stat().st_size < 0.6 * whole.stat().st_size

    boundless = ["--model", out, "--max-loss", "100", "--out", tmp_path / "o"]
    code, stdout, err = call("segment", photo, *boundless)
    assert (code, err) == (0, "") and "operating point" in stdout
    written = json.loads((tmp_path / "o" / "report.json").read_text())
    assert written["point"] == min(points, key=lambda point: point["gmac"])
    assert written["settings"] == written["point"]["settings"]

    code, stdout, _ = call("evaluate", "--model", out, "--max-loss", "100", *options, "--json", "-")
    found = json.loads(stdout)
    assert code == 0 and found["point"] == written["point"]
    assert found["reduced"]["miou"] == pytest.approx(found["point"]["miou"], abs=1e-5)
    code, stdout, _ = call("evaluate", "--model", out, "--max-loss", "0", *options, "--json", "-")
    found = json.loads(stdout)
    assert code == 0 and found["point"] is None
    assert found["reduced"]["miou"] == found["dense"]["miou"]


@pytest.mark.parametrize("option", ["--prices", "--bars"])
def test_what_to_search_is_numbers(
    refused: Callable[..., str], saved: Path, tmp_path: Path, option: str
) -> None:
    data = labelled_folder(tmp_path / "set", CLASSES, [(32, 48)])
    options = ["--model", saved, "--data", data, "--split", "test", "--out", tmp_path / "o"]
    assert f"{option} few: give numbers" in refused("calibrate", *options, option, "few")


def test_segment_in_python_has_the_knob_too(saved: Path, photo: Path) -> None:
    model = load(saved)
    with pytest.raises(TokenstepError, match="not both"):
        model.segment(photo, thresholds=Thresholds(), max_loss=1)
    with pytest.raises(TokenstepError, match="calibrate"):
        model.segment(photo, max_loss=1)
    dense = model.segment(photo, max_loss=0)
    assert not isinstance(dense, list) and dense.tokens.start == dense.tokens.grid


def test_compare_writes_a_table_and_a_figure(call: Call, saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = labelled_folder(tmp_path / "set", CLASSES, [(40, 56), (17, 90)])
    out = tmp_path / "compared"
    options = ["--model", saved, "--data", data, "--also", saved, "--out", out]
    code, stdout, err = call("compare", *options)
    assert (code, err) == (0, "")
    assert (out / "compare.md").read_text() == stdout
    report = json.loads((out / "compare.json").read_text())
    methods = [row["method"] for row in report["rows"]]
    assert methods[0] == "dense" and methods[-1] == f"{saved}, dense" and "STEP" in methods
    assert report["images"] == 2 and report["split"] == "test"
    with Image.open(out / "compare.png") as picture:
        assert picture.format == "PNG"


def test_a_missing_extra_is_told(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "find_spec", lambda name: None)
    line = refused("compare", "--data", tmp_path, "--out", tmp_path / "o")
    assert "matplotlib" in line and "tokenstep[plot]" in line


def test_explain_writes_a_page_its_figures_and_its_numbers(
    call: Call, saved: Path, photo: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "report"
    given = (photo, tmp_path / "broken.png", "--model", saved, "--out", out)
    code, printed, err = call("explain", *given, "--max-side", "40")
    assert code == 1 and str(out / "report.html") in printed
    (line,) = err.splitlines()
    assert "broken.png" in line
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    (picture,) = report["pictures"]
    assert (picture["name"], picture["width"], picture["height"]) == ("photo", 40, 32)
    (fault,) = report["faults"]
    assert (fault["file"], fault["name"]) == (str(tmp_path / "broken.png"), "broken")
    assert report["version"] == __version__ and set(report["thresholds"]["exits"]) == {"1"}
    names = {path.name for path in out.glob("*.figure.png")}
    assert names == {
        f"photo.{kind}.figure.png" for kind in ("partition", "halting", "confidence-1", "live")
    }
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4 and "://" not in page
    # A second run on the folder does not take the figures for pictures.
    (tmp_path / "broken.png").unlink()
    assert call("explain", tmp_path, "--model", saved, "--out", out)[0] == 0
    again = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in again["pictures"]] == ["photo"]


def test_explain_shows_every_number_of_a_labelled_folder(
    call: Call, saved: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    code, _, err = call("explain", "--data", data, "--model", saved, "--out", tmp_path / "report")
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert report["data"] == data.name and report["faults"] == []
    shown_tables = [table for table in report.values() if isinstance(table, list) and table]
    for worst in report["worst"]:
        shown_tables += [table for table in worst.values() if isinstance(table, list) and table]
    cells = sum(len(row) for table in shown_tables if table != report["worst"] for row in table)
    assert page.count("<td>") == cells, "no table shows what the JSON does not hold, nor less"
    for table in shown_tables:
        if table != report["worst"]:
            for key, value in table[0].items():
                assert f"<td>{escape(shown(key, value))}</td>" in page
    assert len(report["worst"]) == min(10, report["images"])
    headings = re.findall("<th>(.*?)</th>", page)
    assert "inter-class boundary IoU" in headings and "boundary iou" not in headings
    bases = {text for text in headings if text.startswith("points")}
    assert bases == {"points of mIoU below dense", "points of pixel accuracy below dense"}
    assert not any(text.endswith("share") for text in headings), "a share of what?"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give pictures, or --data"),
        (("x.png", "--data", "DATA"), "give pictures, or --data"),
        (("x.png", "--names", "a*"), "--names"),
        (("--data", "DATA", "--max-side", "9"), "--max-side"),
        (("nowhere.png",), "nowhere.png: there is no such file"),
    ],
)
def test_explain_says_what_it_wants(
    refused: Callable[..., str],
    saved: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    pytest.importorskip("matplotlib")
    given = [str(tmp_path) if one == "DATA" else one for one in arguments]
    assert said in refused("explain", *given, "--model", saved, "--out", tmp_path / "report")
