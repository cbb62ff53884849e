"""Time STEP beside the dense model and what else a user would run, on real pictures.

All ways of a case take turns in one process, so that a busy machine is busy for all of them;
a batch holds different pictures, and the next round has others.
"""

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from tokenstep import __version__
from tokenstep.config import DENSE, Settings, VitConfig
from tokenstep.errors import TokenstepError
from tokenstep.pictures import read_picture, to_tensor
from tokenstep.rivals import MakeRival, Rival
from tokenstep.segmenter import StepSegmenter
from tokenstep.transforms import to_float

SCOPES = ("model", "end_to_end")
WINDOW, AGREE, PATIENCE = 5, 0.02, 8  # rounds; until medians agree so; or after so many windows
NOISE = 0.5  # correlation of neighbouring pixels below which a picture is noise


@dataclass(frozen=True)
class Case:
    """Pictures of ``size`` (h, w), ``batch`` of them at a time."""

    size: tuple[int, int]
    batch: int


@dataclass(frozen=True)
class Spent:
    """What one batch took beside its time: GMAC, where known, and milliseconds of each stage."""

    gmac: float | None
    stages: dict[str, float]


Run = Callable[[Sequence[Tensor]], Spent]  # segments uint8 pictures (3, h, w), all of one size


def bench(
    model: StepSegmenter,
    paths: Sequence[Path],
    case: Case,
    settings: Settings,
    *,
    rivals: dict[str, MakeRival] | None = None,
    seconds: float = 5.0,
) -> list[dict[str, Any]]:
    """One row per way and scope, dense first; the ways take turns for ``seconds`` each, or once.

    The scope "model" begins with uint8 pictures of the size in memory, "end_to_end" with files;
    both end with label maps in memory. ``speedup`` and ``compute_ratio`` are against the dense row
    of the same scope. Pictures are cut to the shape of the case and scaled down, never up.

    Raises:
        TokenstepError: fewer pictures are large enough than a batch holds, or a file cannot be
            read.
    """
    files, pictures = fitting(paths, case)
    runs = ways(model, case, settings, rivals or {})
    rows = []
    for scope in SCOPES:
        with torch.inference_mode():
            turns = rounds(runs, files, pictures, case, scope)
            settled = settle(turns)
            taken: dict[str, list[tuple[float, Spent]]] = {method: [] for method in runs}
            started = perf_counter()
            while not taken["dense"] or perf_counter() - started < seconds * len(runs):
                for method, found in next(turns).items():
                    taken[method].append(found)
        rows += [row(method, scope, case, taken[method], settled) for method in runs]
        dense = rows[-len(runs)]
        for one in rows[-len(runs) :]:
            one["speedup"] = dense["latency_ms"]["p50"] / one["latency_ms"]["p50"]
            one["compute_ratio"] = dense["gmac"] / one["gmac"] if one["gmac"] else None
    return rows


def fitting(paths: Sequence[Path], case: Case) -> tuple[list[Path], list[Tensor]]:
    """The files that are large enough for a case, and their pictures at its size.

    Raises:
        TokenstepError: they are fewer than a batch holds, or one cannot be read.
    """
    found = [(path, fit(to_tensor(read_picture(path)), case.size)) for path in paths]
    large = [(path, picture) for path, picture in found if picture is not None]
    if len(large) < case.batch:
        height, width = case.size
        raise TokenstepError(
            f"{width}x{height}: {len(large)} of {len(paths)} pictures are that large, a batch of "
            f"{case.batch} needs {case.batch}: give more or larger ones, what is scaled up has no "
            "detail"
        )
    return [path for path, _ in large], [picture for _, picture in large]


def fit(picture: Tensor, size: tuple[int, int]) -> Tensor | None:
    """Cut the middle of ``picture (3, h, w)`` in the shape of ``size`` and scale it down to it.

    None where the picture would have to be scaled up.
    """
    factor = min(picture.shape[1] / size[0], picture.shape[2] / size[1])
    if factor < 1:
        return None
    cut = tvf.center_crop(picture, [round(side * factor) for side in size])
    scaled: Tensor = tvf.resize(cut, list(size), antialias=True)
    return scaled


def is_noise(picture: Tensor) -> bool:
    """Whether neighbouring pixels of ``picture (3, h, w)`` tell little of one another."""
    grey = picture.float().mean(0)
    left, right = grey[:, :-1].flatten(), grey[:, 1:].flatten()
    if len(left) < 2 or min(float(left.std()), float(right.std())) == 0:
        return False  # one colour is no noise
    return float(torch.corrcoef(torch.stack([left, right]))[0, 1]) < NOISE


def ways(
    model: StepSegmenter, case: Case, settings: Settings, rivals: dict[str, MakeRival]
) -> dict[str, Run]:
    """Every way to run a case, by its name; dense is the first."""
    half = [max(1, side // 2) for side in case.size]

    def own(settings: Settings, scale: list[int] | None = None) -> Run:
        def run(pictures: Sequence[Tensor]) -> Spent:
            if scale is not None:
                pictures = [tvf.resize(one, scale, antialias=True) for one in pictures]
            results = model.segment_batch(pictures, settings=settings)
            stages = {
                stage: sum(result.milliseconds[stage] for result in results)
                for stage in results[0].milliseconds
            }
            return Spent(sum(result.cost.total for result in results), stages)

        return run

    def other(rival: Rival) -> Run:
        def run(pictures: Sequence[Tensor]) -> Spent:
            rival(torch.stack([to_float(one) for one in pictures]))
            return Spent(None, {})

        return run

    found = {
        "dense": own(DENSE),
        "STEP": own(settings),
        "dense at 0.5 x the sides": own(DENSE, half),
    }
    return found | {
        name: other(make(model, case.size, case.batch)) for name, make in rivals.items()
    }


def rounds(
    runs: dict[str, Run],
    files: Sequence[Path],
    pictures: Sequence[Tensor],
    case: Case,
    scope: str,
) -> Iterator[dict[str, tuple[float, Spent]]]:
    """Run all ways in turn on one batch after the other: milliseconds, and what was spent."""
    for turn in count():
        batch = [(turn * case.batch + place) % len(files) for place in range(case.batch)]
        timed = {}
        for method, run in runs.items():
            start = perf_counter()
            if scope == "model":
                spent = run([pictures[index] for index in batch])
            else:
                read = [fit(to_tensor(read_picture(files[index])), case.size) for index in batch]
                reading = {"read": 1000 * (perf_counter() - start)}
                spent = run([one for one in read if one is not None])
                spent = Spent(spent.gmac, reading | spent.stages)
            timed[method] = (1000 * (perf_counter() - start), spent)
        yield timed


def settle(turns: Iterator[dict[str, tuple[float, Spent]]]) -> bool:
    """Warm up until the medians of two windows of rounds agree for every way; whether they did."""
    before: dict[str, float] = {}
    for _ in range(PATIENCE):
        window = [next(turns) for _ in range(WINDOW)]
        now = {method: median(one[method][0] for one in window) for method in window[0]}
        if before and all(abs(now[way] / before[way] - 1) <= AGREE for way in now):
            return True
        before = now
    return False


def row(
    method: str, scope: str, case: Case, taken: Sequence[tuple[float, Spent]], settled: bool
) -> dict[str, Any]:
    """A row of the report; GMAC and stages are means per picture."""
    times = np.array([time for time, _ in taken])
    spent = [one for _, one in taken]
    costs = [one.gmac for one in spent if one.gmac is not None]
    height, width = case.size
    return {
        "method": method,
        "scope": scope,
        "size": f"{width}x{height}",
        "batch": case.batch,
        "latency_ms": {"p50": float(np.median(times)), "p95": float(np.percentile(times, 95))},
        "throughput": 1000 * case.batch * len(times) / float(times.sum()),
        "gmac": fmean(costs) / case.batch if costs else None,
        "rounds": len(times),
        "settled": settled,
        "stages": {
            stage: fmean(one.stages.get(stage, 0.0) for one in spent) / case.batch
            for stage in spent[0].stages
        },
    }


def with_backbone(model: StepSegmenter, name: str) -> StepSegmenter:
    """A model of the timm ViT ``name`` with random weights and the policy of ``model``.

    Raises:
        TokenstepError: there is no such ViT, or its patches are not those of the policy.
    """
    config = model.config
    cells = config.vit.cells
    other = replace(config, vit=VitConfig(name, cells=cells), settings=DENSE, points=())
    try:
        built = StepSegmenter(replace(other, temperatures=()))
    except ValueError as error:
        raise TokenstepError(f"--backbone {name}: {error}") from error
    if built.patch != model.patch:
        raise TokenstepError(
            f"--backbone {name}: has patches of {built.patch} px but the policy knows those of "
            f"{model.patch} px: choose another backbone, or another --model"
        )
    built.policy.load_state_dict(model.policy.state_dict())
    return built.to(next(model.parameters()).device).eval()


@torch.inference_mode()
def gemm_rate(model: StepSegmenter, rows: int = 4096, repeats: int = 20) -> float:
    """GMAC per second of the largest product in a block of ``model``, on ``rows`` tokens."""
    weight: Tensor = cast(Any, model.encoder.blocks[0]).mlp.fc1.weight
    x = torch.randn(rows, weight.shape[1]).to(weight)
    times = []
    for _ in range(repeats):
        start = perf_counter()
        y = x @ weight.T
        if y.is_cuda:
            torch.cuda.synchronize(y.device)
        times.append(perf_counter() - start)
    return rows * weight.numel() / min(times) / 1e9


def machine(model: StepSegmenter) -> dict[str, Any]:
    """What was timed on what: processor, threads and versions."""
    device = next(model.parameters()).device
    packages = ("torch", "torchvision", "timm", "onnxruntime", "openvino")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "tokenstep": __version__,
        **{name: version(name) for name in packages if find_spec(name)},
    }


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
