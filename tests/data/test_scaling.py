"""The scale that a model was trained at: larger pictures go down to it by default, in one way."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import call, refused
from conftest import CLASSES, TinyModel
from PIL import Image
from samples import labelled_folder, pattern, save_pattern
from support import scramble

from tokenstep.config import OperatingPoint, Thresholds
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.hub import load
from tokenstep.model.config import ModelConfig
from tokenstep.model.result import Result
from tokenstep.model.segmenter import Segmenter
from tokenstep.serve.demo import Demo, show

SIDE = 32
Run = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Segmenter:
    """A model that was trained at a long side of 32 px, and calibrated."""
    model = tiny_model(cells=2)
    scramble(model)
    thresholds = Thresholds((0.5, 0.5), (0.4, 0.4))
    point = OperatingPoint(thresholds, 0.5, 0.1, 1.0, 9.0, 0.5, "val", 7)
    model.config = replace(model.config, thresholds=thresholds, points=(point,), long_side=SIDE)
    return model


@pytest.fixture(scope="module")
def saved(model: Segmenter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of 90 x 60, three times larger than the model knows."""
    return save_pattern(tmp_path / "photo.png", 60, 90)


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Run:
    """Run `tokenstep` with the model: what it prints on both streams, and report.json."""

    def run(*arguments: object) -> tuple[str, dict[str, Any]]:
        code, out, err = call(
            *arguments, "--model", saved, "--out", tmp_path / "out", "--threads", 1
        )
        assert not code, err
        return out + err, json.loads((tmp_path / "out" / "report.json").read_text())

    return run


def labels_in(tmp_path: Path) -> np.ndarray:
    return np.asarray(Image.open(tmp_path / "out" / "photo.labels.png"))


# --- in Python --------------------------------------------------------------------------------


def test_a_larger_picture_is_run_at_the_models_scale_and_comes_back_whole(
    model: Segmenter, photo: Path
) -> None:
    result = model.segment(photo)
    assert isinstance(result, Result)
    assert result.labels.shape == (60, 90) and result.scaled_to == (32, 21)
    assert result.tokens.grid == 4 * 3
    report = result.report()
    assert (report["width"], report["height"], report["scaled_to"]) == (90, 60, [32, 21])
    small = model.segment(np.asarray(Image.open(photo).resize((32, 21), Image.BILINEAR)))
    assert isinstance(small, Result) and small.scaled_to is None
    again = Image.fromarray(small.labels).resize((90, 60), Image.NEAREST)
    assert np.array_equal(result.labels, np.asarray(again))


def test_every_form_of_a_picture_is_scaled_in_one_way(model: Segmenter, photo: Path) -> None:
    pixels = np.array(Image.open(photo))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    whole = model.segment([photo, Image.open(photo), pixels, tensor, tensor / 255])
    assert isinstance(whole, list)
    for result in whole[:-1]:
        assert np.array_equal(result.labels, whole[0].labels) and result.scaled_to == (32, 21)
    assert (whole[-1].labels != whole[0].labels).mean() < 0.02, "floats are not rounded to bytes"
    assert whole[-1].scaled_to == (32, 21)


def test_a_side_of_ones_own_and_none(model: Segmenter, photo: Path) -> None:
    sizes = {None: None, 45: (45, 30), 90: None, 200: None, "auto": (32, 21)}
    for side, scaled in sizes.items():
        result = model.segment(photo, max_side=side)  # type: ignore[arg-type]
        assert isinstance(result, Result)
        assert result.scaled_to == scaled and result.labels.shape == (60, 90)
    for wrong in (0, -5, 4.5, "none", True):
        with pytest.raises(TokenstepError, match="max_side") as caught:
            model.segment(photo, max_side=wrong)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_pictures_within_the_scale_are_left(model: Segmenter, tmp_path: Path) -> None:
    for h, w in ((SIDE, SIDE), (9, SIDE), (1, 1)):
        result = model.segment(pattern(h, w))
        assert isinstance(result, Result) and result.scaled_to is None


def test_only_segment_scales(model: Segmenter, photo: Path) -> None:
    (result,) = model.segment_batch([photo])
    assert result.scaled_to is None and result.tokens.grid == 12 * 8


def test_a_model_without_a_scale_takes_pictures_as_they_are(saved: Path, photo: Path) -> None:
    path = saved.parent / "old"
    load(saved).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    assert config.pop("long_side") == SIDE, "it is saved"
    (path / "config.json").write_text(json.dumps(config))
    old = load(path)
    result = old.segment(photo)
    assert isinstance(result, Result) and result.scaled_to is None
    assert result.tokens.grid == 12 * 8


def test_a_scale_is_a_number_of_pixels(tiny_config: Callable[..., ModelConfig]) -> None:
    with pytest.raises(TokenstepError, match="long_side"):
        replace(tiny_config(), long_side=0)


def test_streets_have_a_scale_and_maps_have_none() -> None:
    assert load("road").config.long_side == 480
    assert load("aerial").config.long_side is None


def test_a_number_of_numpy_is_a_side_too(model: Segmenter, photo: Path) -> None:
    result, wanted = model.segment(photo, max_side=np.int64(20)), model.segment(photo, max_side=20)
    assert result.scaled_to == wanted.scaled_to and max(result.scaled_to) == 20


def test_settings_that_are_none_are_told(model: Segmenter, photo: Path) -> None:
    with pytest.raises(TokenstepError, match="thresholds is 'dense': give"):
        model.segment(photo, thresholds="dense")


def test_an_address_is_named_as_it_is_given(model: Segmenter) -> None:
    with pytest.raises(TokenstepError, match=r"^http://x/y\.jpg: is an address"):
        model.segment("http://x/y.jpg")


@pytest.mark.parametrize("max_loss", ["1", True, float("nan"), -1])
def test_a_loss_that_is_no_number_is_told(model: Segmenter, max_loss: object) -> None:
    with pytest.raises(TokenstepError, match="give 0 or more points") as caught:
        model.segment(pattern(9, 9), max_loss=max_loss)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_bytes_are_no_list_of_pictures(model: Segmenter, photo: Path) -> None:
    with pytest.raises(TokenstepError, match="BytesIO"):
        model.segment(photo.read_bytes())  # type: ignore[arg-type]


# --- on the command line, and on the page -----------------------------------------------------


def test_segment_scales_by_default_and_says_so(
    run: Run, model: Segmenter, photo: Path, tmp_path: Path
) -> None:
    said, report = run("segment", photo)
    (line,) = [line for line in said.splitlines() if "scaled down" in line]
    assert f"{SIDE} px" in line and "--max-side none" in line and "1 picture " in line
    (entry,) = report["images"]
    assert report["max_side"] == SIDE and entry["scaled_to"] == [32, 21]
    assert (entry["width"], entry["height"], entry["tokens"]["grid"]) == (90, 60, 12)
    result = model.segment(photo)
    assert isinstance(result, Result) and np.array_equal(labels_in(tmp_path), result.labels)


@pytest.mark.parametrize(
    ("options", "side", "grid"),
    [
        (["--max-side", "none"], None, 96),
        (["--tile", "128"], None, 96),
        (["--tile", "128", "--max-side", "45"], 45, 24),
        (["--max-side", "45"], 45, 24),
        (["--max-side", "90"], 90, 96),
    ],
)
def test_what_is_asked_for_goes_over_the_default(
    run: Run, photo: Path, options: list[str], side: int | None, grid: int
) -> None:
    said, report = run("segment", photo, *options)
    assert report["max_side"] == side and report["images"][0]["tokens"]["grid"] == grid
    assert ("scaled down" in said) == (grid != 96)


@pytest.mark.parametrize("command", ["segment", "explain"])
@pytest.mark.parametrize("side", ["0", "-1", "4.5", "auto", "nought", "9" * 5000])
def test_a_wrong_side_is_told(photo: Path, command: str, side: str) -> None:
    if command == "explain":
        pytest.importorskip("matplotlib")
    line = refused(command, photo, "--max-side", side)
    assert re.search(f"--max-side {side[:9]}[.]*: .*none", line)


def test_the_page_and_the_command_line_have_one_label_map(
    run: Run, model: Segmenter, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    upload = tmp_path / "photo.jpg"
    Image.fromarray(noise).save(upload)
    run("segment", upload)
    page = tmp_path / "page"
    page.mkdir()
    shown = show(Demo({"own": model}), upload, name="own", max_loss=1, out=page)
    assert np.array_equal(np.asarray(Image.open(shown.downloads[0])), labels_in(tmp_path))
    report = json.loads(shown.downloads[-1].read_text())
    assert report["max_side"] == SIDE and report["uploaded_size"] == [300, 200]
    assert report["step"]["scaled_to"] == [32, 21] and "32 x 21 px" in shown.figures


def test_explain_scales_by_default_and_says_so(run: Run, photo: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    said, report = run("explain", photo)
    assert "scaled down" in said and report["max_side"] == SIDE
    (picture,) = report["pictures"]
    assert (picture["width"], picture["height"], picture["scaled_from"]) == (32, 21, [90, 60])
    assert "scaled down" in (tmp_path / "out" / "report.html").read_text()


def test_measuring_never_scales(tmp_path: Path, model: Segmenter) -> None:
    data = labelled_folder(tmp_path / "data", CLASSES, [(60, 90)])
    seen = []
    for side in (SIDE, None):
        folder = tmp_path / str(side)
        model.config = replace(model.config, long_side=side)
        model.save_pretrained(folder)
        given = ("--model", folder, "--data", data, "--json", folder / "eval.json")
        assert call("evaluate", *given)[0] == 0
        report = json.loads((folder / "eval.json").read_text())
        seen.append([report[half]["tokens"]["start"] for half in ("dense", "reduced")])
    model.config = replace(model.config, long_side=SIDE)
    assert seen[0] == seen[1] and seen[0][0] == 96


# --- where the scale comes from ---------------------------------------------------------------


def test_the_scale_of_a_folder_is_its_median_long_side(tmp_path: Path) -> None:
    sizes = [(30, 40), (50, 20), (60, 90), (45, 10), (7, 48)]
    folder = LabelledFolder(labelled_folder(tmp_path, CLASSES, sizes), "test")
    assert folder.median_long_side() == 48
