"""`tokenstep segment` as a process: pictures of every kind, and a run that is stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import report_in, save_model
from conftest import CLASSES
from PIL import Image
from samples import pattern, png_header, save_pattern

from tokenstep.data.pictures import read_picture


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved") / "model")


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


# Events of Python's own: a file is opened, or a whole one takes its place.
FIRST_READ, THIRD_WRITTEN = ("open", "in/p00.png"), ("os.rename", "p02.labels.png")


@pytest.mark.parametrize(
    ("number", "event"),
    [
        (signal.SIGINT, FIRST_READ),
        (signal.SIGINT, THIRD_WRITTEN),
        (signal.SIGKILL, THIRD_WRITTEN),
    ],
)
def test_a_run_that_is_stopped_leaves_a_report_of_what_it_wrote(
    tmp_path: Path, saved: Path, number: signal.Signals, event: tuple[str, str]
) -> None:
    (tmp_path / "in").mkdir()
    for name in range(20):
        save_pattern(tmp_path / "in" / f"p{name:02}.png", 20, 30)
    out = tmp_path / "out"
    words = ("segment", str(tmp_path / "in"), "--model", str(saved), "--out", str(out))
    pytest.importorskip("lightning")  # which all copies of a process that trains have
    from killed import Call

    with Call(tmp_path, *words, signalled=(number, *event)) as call:
        code, said = call.end()
    assert code not in (0, 2) and "Traceback" not in "".join(said)
    report = json.loads((out / "report.json").read_text())
    names = [entry["name"] for entry in report["images"]]
    assert not report["finished"]
    assert bool(names) == (event == THIRD_WRITTEN) and len(names) < 20
    kinds = ("labels.png", "overlay.jpg", "tokens.jpg")
    files = {"report.json", *(f"{name}.{kind}" for name in names for kind in kinds)}
    left = {path.name for path in out.iterdir()}
    assert files <= left if number == signal.SIGKILL else files == left
