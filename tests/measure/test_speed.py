"""The benchmark times real pictures at sizes that they have, and relates rows to dense ones."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyModel
from PIL import Image
from rich.console import Console
from samples import pattern
from torch import Tensor
from typer.testing import CliRunner

from tokenstep.cli import main
from tokenstep.cli.tables import benched
from tokenstep.config import DENSE, Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.measure.backbone import budget_like, halting, with_backbone
from tokenstep.measure.cases import Case, fit, fitting, is_noise
from tokenstep.measure.speed import (
    SCOPES,
    BatchCost,
    bench,
    exponent,
    growth,
    settle,
)
from tokenstep.model.segmenter import Segmenter
from tokenstep.runtimes.dense import Runtime


@pytest.fixture
def model(tiny_model: TinyModel) -> Segmenter:
    return tiny_model()


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Three pictures, the last of which is small."""
    paths = []
    for number, (h, w) in enumerate([(60, 90), (64, 80), (30, 40)]):
        paths.append(tmp_path / f"photo{number}.png")
        Image.fromarray(pattern(h, w)).save(paths[-1])
    return paths


def test_each_row_is_related_to_the_dense_row_of_its_scope(
    model: Segmenter, photos: list[Path]
) -> None:
    def rival(size: tuple[int, int], batch: int) -> Runtime:
        def run(images: Tensor) -> Tensor:
            assert images.shape == (batch, 3, *size) and images.dtype == torch.float32
            assert not torch.equal(images[0], images[1]), "a batch holds different pictures"
            return images[:, 0].to(torch.uint8)

        return run

    thresholds = Thresholds((0.0, 0.0), (0.0, 0.0))
    rows = bench(
        model,
        photos,
        Case((48, 64), 2),
        [thresholds],
        runtimes={"other": rival},
        seconds=0.0,
    )
    methods = ["dense", "STEP", "dense at 0.5 x the sides", "other"]
    assert [(row["scope"], row["method"]) for row in rows] == [
        (scope, method) for scope in SCOPES for method in methods
    ]
    for dense, *others in (rows[:4], rows[4:]):
        assert dense["speedup"] == dense["compute_ratio"] == 1
        for row in others:
            assert row["throughput"] == pytest.approx(row["speedup"] * dense["throughput"])
        step, half, other = others
        assert step["gmac"] < dense["gmac"] and half["gmac"] < dense["gmac"]
        assert step["compute_ratio"] == pytest.approx(dense["gmac"] / step["gmac"])
        assert other["gmac"] is None and other["compute_ratio"] is None
    expected = model.segment_batch([fit_of(photos[0])], thresholds=DENSE)[0].cost.total
    assert rows[0]["gmac"] == pytest.approx(expected)
    assert rows[0]["gmac"] == pytest.approx(sum(rows[0]["gmac_of"].values()))
    assert rows[0]["stages"]["read"] < rows[4]["stages"]["read"], "files take longer than memory"
    assert all(row["peak_mib"] is None or row["method"] != "other" for row in rows)
    assert sum(rows[1]["stages"].values()) <= 2 * rows[1]["latency_ms"]["p95"]
    json.dumps(rows, allow_nan=False)


def fit_of(path: Path) -> Tensor:
    (picture,) = fitting([path], Case((48, 64), 1))[1]
    return picture


def test_nothing_is_scaled_up(photos: list[Path]) -> None:
    files, pictures = fitting(photos, Case((48, 64), 2))
    assert files == photos[:2]
    assert all(picture.shape == (3, 48, 64) for picture in pictures)
    with pytest.raises(TokenstepError, match="64x48: 2 of 3 pictures"):
        fitting(photos, Case((48, 64), 3))


def test_the_middle_is_cut_in_the_shape_that_is_asked_for() -> None:
    picture = torch.zeros(3, 10, 40, dtype=torch.uint8)
    picture[:, :, 15:25] = 200
    fitted = fit(picture, (5, 5))
    assert fitted is not None and (fitted == 200).all()
    assert fit(picture, (10, 40)) is not None
    assert fit(picture, (11, 20)) is None


def test_noise_is_told_from_pictures() -> None:
    assert is_noise(torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8))
    assert not is_noise(torch.from_numpy(pattern(40, 40)).permute(2, 0, 1))
    assert not is_noise(torch.full((3, 8, 8), 7, dtype=torch.uint8))
    assert not is_noise(torch.zeros(3, 1, 1, dtype=torch.uint8))


def test_warming_up_ends_when_times_agree_or_patience_does() -> None:
    def turns(times: list[float]) -> object:
        for time in times:
            yield {"dense": (time, BatchCost({}, {}))}

    steady = turns([100.0] * 5 + [50.0] * 5 + [50.5] * 5 + [9.0] * 99)
    assert settle(steady, 60.0)  # type: ignore[arg-type]
    assert next(steady)["dense"][0] == 9.0  # type: ignore[call-overload]
    assert not settle(turns([2.0**step for step in range(40)]), 60.0)  # type: ignore[arg-type]
    slow = turns([100.0, 50.0, 9.0])
    assert not settle(slow, 0.0)  # type: ignore[arg-type]
    assert next(slow)["dense"][0] == 50.0, "a window without time is one round"  # type: ignore[call-overload]


def test_growth_is_the_power_of_the_pixels() -> None:
    assert exponent([1.0, 10.0, 100.0], [3.0, 30.0, 300.0]) == pytest.approx(1)
    rows = [
        {
            "method": method,
            "scope": "model",
            "batch": 1,
            "size": f"{side}x{side}",
            "latency_ms": {"p50": 0.3 * (side**2) ** power},
            "peak_mib": None if method == "rival" else side**2,
        }
        for method, power, sides in (("dense", 1.7, (8, 16, 32)), ("rival", 1.0, (8, 16, 32, 64)))
        for side in sides
    ]
    dense, rival = growth(rows)
    assert (dense["method"], rival["method"]) == ("dense", "rival")
    assert dense["time"] == pytest.approx(1.7) and dense["memory"] == pytest.approx(1.0)
    assert rival["time"] == pytest.approx(1.0) and rival["memory"] is None
    assert growth(rows[:2]) == [], "two points fit any power"


def test_a_backbone_takes_the_policy_along(model: Segmenter) -> None:
    with pytest.raises(TokenstepError, match="vit_tiny_patch16_224: has patches of 16 px"):
        with_backbone(model, "vit_tiny_patch16_224")
    with pytest.raises(TokenstepError, match="no_such_vit"):
        with_backbone(model, "no_such_vit")
    model.config = replace(model.config, temperatures=(1.5, 2.0))  # as calibration leaves it
    other = with_backbone(model, "vit_small_patch8_224")
    assert other.patch == model.patch and other.config.temperatures == ()


def test_random_exits_halt_the_shares_that_are_asked_for(model: Segmenter) -> None:
    other = with_backbone(model, "vit_small_patch8_224", (4, 8))
    with pytest.raises(TokenstepError, match="exits"):
        with_backbone(model, "vit_small_patch8_224", (12,))
    pictures = [torch.rand(3, 96, 128) for _ in range(2)]
    step = halting(other, pictures, (0.4, 0.4), (0.25, 0.5))
    assert step.merge == (0.4, 0.4)
    uses = [one.tokens for one in other.segment_batch(pictures, thresholds=step)]
    start, end = sum(use.start for use in uses), sum(use.end for use in uses)
    first, second = (sum(use.halted[after] for use in uses) for after in (4, 8))
    assert first == pytest.approx(0.25 * start, abs=3)
    assert second == pytest.approx(0.5 * (start - first), abs=3) and start - first - second == end
    budget = budget_like(other, pictures, step)
    spent = [one.tokens for one in other.segment_batch(pictures, budget=budget)]
    assert sum(use.start for use in spent) == pytest.approx(start, rel=0.1)
    assert sum(use.end for use in spent) == pytest.approx(end, rel=0.25)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_command_writes_what_it_prints(
    model: Segmenter, photos: list[Path], tmp_path: Path, precision: str
) -> None:
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "bench.json"
    options = ["--model", str(tmp_path / "model"), "--size", "64x48", "--seconds", "0"]
    call = ["bench", *map(str, photos), *options, "--merge", "0.5,0.5", "--batch", "1"]
    done = CliRunner().invoke(main.app, [*call, "--precision", precision, "--json", str(out)])
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert report["precision"] == precision
    assert report["machine"]["gemm_gmac_per_second"] > 0 and report["pictures"] == 3
    assert {(row["size"], row["batch"]) for row in report["rows"]} == {("64x48", 1)}
    for row in report["rows"]:
        speed = row["throughput"]
        assert (f"{speed:.3g}" if speed < 1000 else f"{speed:.0f}") in done.output


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--size", "64"], "--size 64"),
        (["--size", "0x9"], "--size 0x9"),
        (["--rival", "tpu"], "--rival tpu"),
        (["--rival", "onnx", "--precision", "bf16"], "--rival onnx"),
        (["--size", "640x480"], "640x480: 0 of 1"),
    ],
)
def test_faults_of_the_call_are_named(photos: list[Path], extra: list[str], named: str) -> None:
    done = CliRunner().invoke(main.app, ["bench", str(photos[0]), *extra])
    assert isinstance(done.exception, TokenstepError) and named in str(done.exception)


def test_noise_alone_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    done = CliRunner().invoke(main.app, ["bench", str(tmp_path / "noise.png")])
    assert isinstance(done.exception, TokenstepError) and "noise" in str(done.exception)


def test_large_figures_stay_whole_in_80_columns() -> None:
    row = {
        "size": "4096x4096",
        "batch": 1,
        "scope": "end_to_end",
        "method": "dense at 0.5 x the sides",
        "latency_ms": {"p50": 318256.4, "p95": 327001.2},
        "throughput": 0.0031421,
        "gmac": 10116.99,
        "peak_mib": 1186.2,
        "speedup": 12.034,
        "compute_ratio": 13.153,
    }
    console = Console(width=80, record=True, file=StringIO())
    console.print(benched([row]))
    printed = console.export_text()
    for figure in ("318256", "327001", "0.00314", "10117", "1186", "12.03", "13.15", "0.91"):
        assert f" {figure} " in printed, printed


def test_other_reducers_are_timed_in_the_place_of_step(
    model: Segmenter, photos: list[Path]
) -> None:
    tome = Thresholds(reducers=("tome:share=0.3",))
    rows = bench(model, photos, Case((48, 64), 1), [tome], seconds=0.0)
    dense, tome = rows[:2]
    assert tome["method"] == "tome:share=0.3"
    assert tome["gmac"] < dense["gmac"]
