"""The page to try a model in: what it shows and refuses, and the page itself in a browser."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
import pytest
from commands import refused, without
from conftest import CLASSES, TinyModel
from PIL import Image
from samples import pattern, png_header, save_pattern

from tokenstep.config import DENSE, OperatingPoint, Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.model.segmenter import Segmenter
from tokenstep.serve import demo
from tokenstep.serve.demo import Demo, knob_of, promise, show

LOSSES = {0.4: Thresholds((0.5, 0.5), (0.9, 0.9)), 2.3: Thresholds((0.0, 0.0), (0.0, 0.0), 0)}


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Segmenter:
    """A tiny model with two operating points, the cheaper of which merges and halts all it can."""
    model = tiny_model()
    points = tuple(
        OperatingPoint(thresholds, 0.5, loss, 1 / loss, 9.0, 0.5, "val", 7)
        for loss, thresholds in LOSSES.items()
    )
    model.config = replace(model.config, points=points)
    return model


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save_pattern(tmp_path / "photo.jpg", 60, 90)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def report_of(downloads: tuple[Path, ...]) -> dict[str, Any]:
    report = json.loads(downloads[-1].read_text())
    assert isinstance(report, dict)
    return report


# --- what is shown ----------------------------------------------------------------------------


def test_the_knob_reaches_all_points_and_starts_within_half_a_point(
    model: Segmenter, tiny_model: TinyModel
) -> None:
    assert knob_of(model) == (3, 0.5)
    assert "0.40 points" in promise(model, 0.5) and "7 pictures of val" in promise(model, 0.5)
    assert "2.30 points" in promise(model, 3)
    assert "knob is at 0" in promise(model, 0) and "no operating point" in promise(model, 0.1)
    assert knob_of(tiny_model()) == (1, 0)
    with pytest.raises(TokenstepError, match="calibrate"):
        promise(tiny_model(), 1)


def test_both_halves_of_a_picture_and_whole_files(model: Segmenter, photo: Path, out: Path) -> None:
    shown = show(Demo({"own": model}, 480), photo, name="own", max_loss=3, out=out)
    assert "2.30 points" in shown.point and "below the best that calibration" in shown.point
    labels, overlay, tokens, _ = shown.downloads
    with Image.open(labels) as read:
        assert read.mode == "P" and read.size == (90, 60) and np.asarray(read).max() < len(CLASSES)
    assert overlay == shown.overlay and tokens == shown.tokens
    for path in (shown.overlay, shown.tokens, shown.dense_overlay):
        with Image.open(path) as read:
            read.load()
            assert read.height > 60, "a legend below the picture"
    report = report_of(shown.downloads)
    assert report["file"] == "photo.jpg" and report["point"]["loss"] == 2.3
    step, dense = report["step"], report["dense"]
    assert step["tokens"]["start"] < dense["tokens"]["start"] == dense["tokens"]["grid"]
    assert f"this picture: {step['gmac']['used']:.2f} GMAC" in shown.point
    assert step["gmac"]["used"] < dense["gmac"]["used"] == dense["gmac"]["dense"]
    assert sum(step["tokens"]["halted"].values()) > 0
    with Image.open(out / "dense" / labels.name) as first, Image.open(labels) as second:
        same = (np.asarray(first) == np.asarray(second)).mean()
    assert report["same_pixels"] == pytest.approx(same, abs=1e-5)
    for half in (step, dense):
        assert f"{half['tokens']['start']:,}" in shown.figures
        assert f"{half['gmac']['used']:,.2f}" in shown.figures
    assert str(out) not in shown.downloads[-1].read_text(), "no path of this machine"


@pytest.mark.parametrize("max_loss", [0, 0.1])
def test_the_dense_model_is_its_own_rival(
    model: Segmenter, photo: Path, out: Path, max_loss: float
) -> None:
    shown = show(Demo({"own": model}, 480), photo, name="own", max_loss=max_loss, out=out)
    report = report_of(shown.downloads)
    assert report["point"] is None and report["settings"]["merge"] == []
    assert report["step"] == report["dense"] and report["same_pixels"] == 1
    assert shown.dense_overlay.read_bytes() == shown.overlay.read_bytes()
    assert shown.point.startswith("dense")


def test_large_pictures_are_scaled_down_and_small_ones_left(
    model: Segmenter, photo: Path, out: Path, tmp_path: Path
) -> None:
    Image.fromarray(pattern(120, 300)).save(tmp_path / "wide.png")
    for path, size, seen in (
        (tmp_path / "wide.png", (300, 120), [100, 40]),
        (photo, (90, 60), None),
    ):
        folder = out / path.stem
        folder.mkdir()
        shown = show(Demo({"own": model}, 100), path, name="own", max_loss=0, out=folder)
        with Image.open(shown.downloads[0]) as labels:
            assert labels.size == size
        report = report_of(shown.downloads)
        assert report["uploaded_size"] == list(size) and report["max_side"] == 100
        assert report["step"].get("scaled_to") == seen


def test_bad_uploads_are_one_line_without_our_folders(
    model: Segmenter, tmp_path: Path, out: Path
) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(TokenstepError) as caught:
            show(Demo({"own": model}, 480), path, name="own", max_loss=0, out=out)
        message = str(caught.value)
        assert message.startswith(f"{path.name}: ") and ";" in message and "\n" not in message
        assert str(tmp_path) not in message and f"{out.name}/" not in message
        return message

    (tmp_path / "diary.jpg").write_text("Today I saw a street.\n")
    assert "no whole picture" in refused(tmp_path / "diary.jpg")
    (tmp_path / "empty.png").touch()
    assert "empty" in refused(tmp_path / "empty.png")
    (tmp_path / "bomb.png").write_bytes(png_header(10_000, 5_001))
    assert "50000000 pixels" in refused(tmp_path / "bomb.png")
    good = save_pattern(tmp_path / "good.png", 40, 50)
    (out / "step" / "good.tokens.jpg").mkdir(parents=True)  # so no file can take its place
    assert "good.tokens.jpg: cannot be written" in refused(good)


def test_warming_up_runs_both_ways(model: Segmenter) -> None:
    class Watched:
        config = replace(model.config, thresholds=LOSSES[0.4])
        ran: ClassVar[list[Thresholds]] = []

        def segment_batch(self, pictures: list[object], *, thresholds: Thresholds) -> None:
            self.ran.append(thresholds)

    demo.warm_up(Watched())  # type: ignore[arg-type]
    assert set(Watched.ran) == {DENSE, LOSSES[0.4]}


# --- the command ------------------------------------------------------------------------------


def test_faults_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        without(patch, "gradio")
        assert "tokenstep[demo]" in refused("demo")
    require_page()
    assert refused("demo", "--host", "192.0.2.1").startswith("tokenstep: 192.0.2.1:7860: "), (
        "not of this machine"
    )
    assert "zebra" in refused("demo", "--model", "zebra", "--port", 0)


def require_page() -> None:
    if find_spec("gradio") is None:
        pytest.skip("needs the extra demo: gradio is not installed")


# --- the page in a browser --------------------------------------------------------------------


@pytest.fixture
def browser_page() -> Iterator[Any]:
    """An empty page of a headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    programs = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    program = next(filter(None, programs), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser.new_page(viewport={"width": 800, "height": 900})
        browser.close()


# A server that tells on itself: it is to reach for no other machine, by name or by address.
PROGRAM = """
import sys
asked = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
sys.addaudithook(lambda event, given: event in asked and print(event, given[1:], flush=True))
from tokenstep.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def address(model: Segmenter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the page, as a user starts it, with a tiny model."""
    require_page()
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder / "tiny")
    options = ["--model", str(folder / "tiny"), "--port", "0", "--threads", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "demo", *options, "--max-side", "64"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    ) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line + server.stdout.read()
        yield found.group()
        server.send_signal(signal.SIGTERM)
        said = server.stdout.read()
    assert server.returncode == 0 and said == "", "nothing sent, no traceback, an end in peace"
    assert not list(folder.glob("tokenstep-demo-*")), "nothing is left of uploads and results"


def test_a_user_drops_a_picture_and_turns_the_knob(
    browser_page: Any, address: str, photo: Path, tmp_path: Path
) -> None:
    page, asked = browser_page, []
    page.on("request", lambda request: asked.append(urlsplit(request.url)))
    page.goto(address)
    upload, knob = "#upload input[type=file]", page.locator("#knob input[type=number]")

    page.set_input_files(upload, photo)
    page.wait_for_selector("#overlay img", timeout=60_000)
    assert all(page.is_visible(f"#{name} img") for name in ("overlay", "dense", "tokens"))
    assert "0.40 points" in page.inner_text("#shown-point")
    assert "GMAC" in page.inner_text("#figures")

    knob.fill("3")
    page.get_by_text("2.30 points").first.wait_for()
    page.click("#segment")
    page.locator("#shown-point", has_text="2.30 points").wait_for()
    with page.expect_download() as download:
        page.get_by_text("Report (JSON)").click()
    assert report_of((download.value.path(),))["point"]["loss"] == 2.3

    bad = tmp_path / "diary.jpg"
    bad.write_text("Today I saw a street.\n")
    page.click("#upload [aria-label='Clear']")
    page.locator("#message", has_text="Drop a picture").wait_for()
    page.set_input_files(upload, bad)
    fault = page.locator("#message [role=alert]")
    fault.wait_for()
    assert "diary.jpg: is no whole picture" in fault.inner_text()
    assert not page.is_visible("#overlay"), "no result of another picture beside a fault"

    page.get_by_label("road", exact=True).check()
    page.locator("#point", has_text="101 pictures").wait_for()
    web = {one.hostname for one in asked if one.scheme not in ("data", "blob")}
    assert web == {"127.0.0.1"}, "nothing is asked of another host"


def test_a_file_over_the_limit_is_refused(browser_page: Any, address: str, tmp_path: Path) -> None:
    with (tmp_path / "huge.jpg").open("wb") as huge:
        huge.truncate(demo.MAX_MEGABYTES * 2**20 + 1)
    browser_page.goto(address)
    browser_page.set_input_files("#upload input[type=file]", tmp_path / "huge.jpg")
    browser_page.get_by_text(re.compile("exceed.*huge.jpg")).wait_for()
    assert not browser_page.is_visible("#overlay")
