"""Time STEP beside the dense model and what else a user would run, on real pictures.

All ways of a case take turns in one process, so that a busy machine is busy for all of them;
a batch holds different pictures, and the next round has others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from tokenstep.config import DENSE, Thresholds, VitConfig
from tokenstep.data.augment import to_float
from tokenstep.errors import TokenstepError
from tokenstep.measure.cases import Case, Load, batches_of, fitting
from tokenstep.measure.machine import peak_mib
from tokenstep.model.result import Result
from tokenstep.model.segmenter import Segmenter
from tokenstep.runtimes.dense import MakeRuntime, Rival

SCOPES = ("model", "end_to_end")
WINDOW, AGREE, PATIENCE = 5, 0.02, 8  # rounds; until medians agree so; or after so many windows


@dataclass(frozen=True)
class Spent:
    """What one batch took beside its time: GMAC by part and milliseconds by stage, where known."""

    gmac: dict[str, float]
    stages: dict[str, float]


Way = Callable[[Sequence[Tensor]], Spent]  # segments uint8 pictures (3, h, w), all of one size


def bench(
    model: Segmenter,
    paths: Sequence[Path],
    case: Case,
    thresholds: Thresholds,
    *,
    rivals: Mapping[str, MakeRuntime] = MappingProxyType({}),
    seconds: float = 5.0,
) -> list[dict[str, Any]]:
    """One row per way and scope, dense first; the ways take turns for ``seconds`` each, or once.

    The scope "model" begins with uint8 pictures of the size in memory, "end_to_end" with files;
    both end with label maps in memory. ``speedup`` and ``compute_ratio`` are against the dense row
    of the same scope. ``peak_mib`` is what one batch held above what was held before; None for
    rivals, which keep what they once took. Pictures are cut to the shape of the case and scaled
    down, never up.

    Raises:
        TokenstepError: fewer pictures are large enough than a batch holds, or a file cannot be
            read.
    """
    files, pictures = fitting(paths, case)
    device = next(model.parameters()).device
    runs = ways(model, case, thresholds) | {
        name: _other(make(model, case.size, case.batch), device) for name, make in rivals.items()
    }
    rows = []
    for scope in SCOPES:
        with torch.inference_mode():
            batches = batches_of(files, pictures, case, scope)
            turns = rounds(runs, batches)
            settled = settle(turns, seconds * len(runs))
            taken: dict[str, list[tuple[float, Spent]]] = {method: [] for method in runs}
            started = perf_counter()
            while not taken["dense"] or perf_counter() - started < seconds * len(runs):
                for method, found in next(turns).items():
                    taken[method].append(found)
            batch = next(batches)
            peaks = {
                method: None if method in rivals else peak_of(run, batch, device)
                for method, run in runs.items()
            }
        made = [row(method, scope, case, taken[method]) for method in runs]
        for one in made:
            one |= {"peak_mib": peaks[one["method"]], "settled": settled}
            one |= against(made[0], one)
        rows += made
    return rows


def peak_of(way: Way, load: Load, device: torch.device) -> float | None:
    """The most memory that one batch takes in MiB, reading included."""
    return peak_mib(lambda: way(load()), device)


def against(dense: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """How much faster and cheaper a row is than the dense one."""
    return {
        "speedup": one["throughput"] / dense["throughput"],
        "compute_ratio": dense["gmac"] / one["gmac"] if one["gmac"] else None,
    }


def ways(model: Segmenter, case: Case, thresholds: Thresholds) -> dict[str, Way]:
    """Every way of ``model`` itself to run a case, by its name; dense is the first."""
    half = [max(1, side // 2) for side in case.size]

    def own(thresholds: Thresholds) -> Way:
        def run(pictures: Sequence[Tensor]) -> Spent:
            return _spent(model.segment_batch(pictures, thresholds=thresholds))

        return run

    def at_half(pictures: Sequence[Tensor]) -> Spent:
        start = perf_counter()
        small = [tvf.resize(one, half, antialias=True) for one in pictures]
        shrunk = perf_counter()
        results = model.segment_batch(small, thresholds=DENSE)
        ended = perf_counter()
        for result in results:
            labels = torch.from_numpy(result.labels)[None]
            tvf.resize(labels, list(case.size), interpolation=InterpolationMode.NEAREST_EXACT)
        scaling = 1000 * (shrunk - start + perf_counter() - ended)
        spent = _spent(results)
        return replace(spent, stages={"scale": scaling} | spent.stages)

    return {"dense": own(DENSE), "STEP": own(thresholds), "dense at 0.5 x the sides": at_half}


def _other(rival: Rival, device: torch.device) -> Way:
    def run(pictures: Sequence[Tensor]) -> Spent:
        rival(torch.stack([to_float(one.to(device)) for one in pictures])).cpu()
        return Spent({}, {})

    return run


def _spent(results: Sequence[Result]) -> Spent:
    costs = [asdict(result.cost) for result in results]
    return Spent(
        {part: sum(cost[part] for cost in costs) for part in costs[0]},
        {stage: time * len(results) for stage, time in results[0].milliseconds.items()},
    )


def rounds(
    runs: dict[str, Way], batches: Iterator[Load]
) -> Iterator[dict[str, tuple[float, Spent]]]:
    """Run all ways in turn on one batch after the other: milliseconds, and what was spent."""
    for load in batches:
        timed = {}
        for method, run in runs.items():
            start = perf_counter()
            pictures = load()
            read = perf_counter()
            spent = run(pictures)
            total = perf_counter() - start
            stages = {"read": 1000 * (read - start)} | spent.stages
            timed[method] = (1000 * total, Spent(spent.gmac, stages))
        yield timed


def settle(turns: Iterator[dict[str, tuple[float, Spent]]], seconds: float) -> bool:
    """Warm up until the medians of two windows of rounds agree for every way; whether they did.

    A window takes ``seconds`` at most, or one round; it gives up after a few.
    """
    before: dict[str, float] = {}
    started = perf_counter()
    for number in range(PATIENCE):
        opened = perf_counter()
        if number and opened - started > PATIENCE * seconds:
            return False
        window = [next(turns)]
        while len(window) < WINDOW and perf_counter() - opened < seconds:
            window.append(next(turns))
        now = {method: median(one[method][0] for one in window) for method in window[0]}
        if before and all(abs(now[way] / before[way] - 1) <= AGREE for way in now):
            return True
        before = now
    return False


def row(
    method: str, scope: str, case: Case, taken: Sequence[tuple[float, Spent]]
) -> dict[str, Any]:
    """A row of the report; GMAC and stages are means per picture."""
    times = np.array([time for time, _ in taken])
    spent = [one for _, one in taken]
    height, width = case.size

    def means(parts: Sequence[dict[str, float]]) -> dict[str, float]:
        return {name: fmean(one[name] for one in parts) / case.batch for name in parts[0]}

    parts = means([one.gmac for one in spent])
    return {
        "method": method,
        "scope": scope,
        "size": f"{width}x{height}",
        "batch": case.batch,
        "latency_ms": {"p50": float(np.median(times)), "p95": float(np.percentile(times, 95))},
        "throughput": 1000 * case.batch * len(times) / float(times.sum()),
        "gmac": sum(parts.values()) or None,
        "gmac_of": parts,
        "rounds": len(times),
        "stages": means([one.stages for one in spent]),
    }


def growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How time and memory of each way grow with the pixels: the exponent, by least squares.

    For each way, scope and batch of which three sizes or more were timed.
    """
    found = []
    for key in dict.fromkeys((row["method"], row["scope"], row["batch"]) for row in rows):
        own = [row for row in rows if (row["method"], row["scope"], row["batch"]) == key]
        if len(own) < 3:
            continue
        pixels = [float(np.prod([int(side) for side in row["size"].split("x")])) for row in own]
        peaks = [row["peak_mib"] for row in own]
        found.append(
            {
                **dict(zip(("method", "scope", "batch"), key, strict=True)),
                "sizes": [row["size"] for row in own],
                "time": exponent(pixels, [row["latency_ms"]["p50"] for row in own]),
                "memory": exponent(pixels, peaks) if all(peaks) else None,
            }
        )
    return found


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The power of ``x`` by which ``y`` grows."""
    return float(np.polynomial.Polynomial.fit(np.log(x), np.log(y), 1).convert().coef[1])


def with_backbone(model: Segmenter, name: str) -> Segmenter:
    """A model of the timm ViT ``name`` with random weights and the policy of ``model``.

    Raises:
        TokenstepError: there is no such ViT, or its patches are not those of the policy.
    """
    config = model.config
    cells = config.vit.cells
    other = replace(config, vit=VitConfig(name, cells=cells), thresholds=DENSE, points=())
    try:
        built = Segmenter(replace(other, temperatures=()))
    except ValueError as error:
        raise TokenstepError(f"--backbone {name}: {error}") from error
    if built.patch != model.patch:
        raise TokenstepError(
            f"--backbone {name}: has patches of {built.patch} px but the policy knows those of "
            f"{model.patch} px: choose another backbone, or another --model"
        )
    built.policy.load_state_dict(model.policy.state_dict())
    return built.to(next(model.parameters()).device).eval()
