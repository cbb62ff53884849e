"""Time STEP beside the dense model and what else a user would run, on real pictures.

All methods of a case take turns in one process, so that a busy machine is busy for all of them.
A batch holds different pictures, and the next round has others.
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

from tokenstep.config import DENSE, Budget, Spending
from tokenstep.data.augment import to_float
from tokenstep.measure.cases import Case, Load, batches_of, fitting
from tokenstep.measure.machine import peak_mib
from tokenstep.model.any_segmenter import AnySegmenter
from tokenstep.model.result import Result
from tokenstep.model.segmenter import Segmenter
from tokenstep.model.spending import as_keyword
from tokenstep.runtimes.dense import Runtime
from tokenstep.runtimes.fixed import graph

SCOPES = ("model", "end_to_end")
# Warming up ends when the medians of two windows of rounds differ by less than a share.
WINDOW = 5  # rounds
AGREE = 0.02  # share
PATIENCE = 8  # windows after which it gives up


@dataclass(frozen=True)
class BatchCost:
    """What one batch cost: GMAC by part and milliseconds by stage, empty where unknown."""

    gmac: dict[str, float]
    stages: dict[str, float]


SegmentBatch = Callable[[Sequence[Tensor]], BatchCost]  # of uint8 pictures (3, h, w) of one size
ForCase = Callable[[tuple[int, int], int], Runtime]  # for pictures (h, w), and a batch
Timed = tuple[float, BatchCost]  # milliseconds of one batch, reading included, and its cost


def bench(
    model: AnySegmenter,
    paths: Sequence[Path],
    case: Case,
    spendings: Sequence[Spending],
    *,
    runtimes: Mapping[str, ForCase] = MappingProxyType({}),
    seconds: float = 5.0,
) -> list[dict[str, Any]]:
    """Time each method in each scope and give one row for each, dense first.

    The methods are those of :func:`methods_of`, and the dense model in each of ``runtimes``. They
    take turns for ``seconds`` each, or for one round. Pictures are cut to the shape of the case
    and scaled down, never up.

    The scope "model" begins with uint8 pictures in memory and "end_to_end" with files. Both end
    with label maps in memory. ``speedup`` and ``compute_ratio`` are against the dense row of the
    same scope. ``peak_mib`` is what one batch held above what was held before. It is None for
    runtimes, which keep the memory that they once took.

    Raises:
        TokenstepError: fewer pictures are large enough than a batch holds, or a file cannot be
            read.
    """
    files, pictures = fitting(paths, case)
    device = model.device
    methods = methods_of(model, case, spendings)
    measured = tuple(methods)
    for name, make in runtimes.items():
        methods[name] = _in_runtime(make(case.size, case.batch), device)
    rows = []
    for scope in SCOPES:
        with torch.inference_mode():
            batches = batches_of(files, pictures, case, scope)
            timings, settled = time_methods(methods, batches, seconds * len(methods))
            batch = next(batches)
            peaks = {name: peak_of(methods[name], batch, device) for name in measured}
        dense = row_of("dense", scope, case, timings["dense"])
        for name, timing in timings.items():
            row = row_of(name, scope, case, timing)
            row |= {"peak_mib": peaks.get(name), "settled": settled}
            rows.append(row | relative_to(dense, row))
    return rows


def time_methods(
    methods: Mapping[str, SegmentBatch], batches: Iterator[Load], seconds: float
) -> tuple[dict[str, list[Timed]], bool]:
    """Warm up, then time rounds of all methods for ``seconds``, at least one round.

    Returns the timings of each method, and whether the times had settled before.
    """
    rounds = timed_rounds(methods, batches)
    settled = settle(rounds, seconds)
    timings: dict[str, list[Timed]] = {name: [] for name in methods}
    started = perf_counter()
    while not timings["dense"] or perf_counter() - started < seconds:
        for name, timed in next(rounds).items():
            timings[name].append(timed)
    return timings, settled


def peak_of(segment: SegmentBatch, load: Load, device: torch.device) -> float | None:
    """The most memory that one batch takes in MiB, reading included."""
    return peak_mib(lambda: segment(load()), device)


def relative_to(dense: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """How many times faster and cheaper a row is than the dense one."""
    return {
        "speedup": row["throughput"] / dense["throughput"],
        "compute_ratio": dense["gmac"] / row["gmac"] if row["gmac"] else None,
    }


def methods_of(
    model: AnySegmenter, case: Case, spendings: Sequence[Spending]
) -> dict[str, SegmentBatch]:
    """Every method of ``model`` itself for a case, by its name; dense is the first.

    That of a spending is called STEP, or by its reducers. On a GPU a budget is also run as one
    graph.
    """
    half = [max(1, side // 2) for side in case.size]

    def at(spending: Spending) -> SegmentBatch:
        def segment(pictures: Sequence[Tensor]) -> BatchCost:
            return _cost_of(model.segment_batch(pictures, **as_keyword(spending)))

        return segment

    def at_half(pictures: Sequence[Tensor]) -> BatchCost:
        start = perf_counter()
        small = [tvf.resize(picture, half, antialias=True) for picture in pictures]
        shrunk = perf_counter()
        results = model.segment_batch(small, thresholds=DENSE)
        ended = perf_counter()
        for result in results:
            labels = torch.from_numpy(result.labels)[None]
            tvf.resize(labels, list(case.size), interpolation=InterpolationMode.NEAREST_EXACT)
        scaling = 1000 * (shrunk - start + perf_counter() - ended)
        cost = _cost_of(results)
        return replace(cost, stages={"scale": scaling} | cost.stages)

    methods = {"dense": at(DENSE)}
    for spending in spendings:
        step = "STEP by budget" if isinstance(spending, Budget) else "STEP"
        name = " ".join(spending.reducers) or step
        methods[name] = at(spending)
        on_gpu = model.device.type == "cuda"
        if on_gpu and isinstance(spending, Budget) and isinstance(model, Segmenter):
            run = graph(model, case.size, case.batch, budget=spending)
            methods[f"{name}, one graph"] = _in_runtime(run, model.device)
    return methods if model.resizes else methods | {"dense at 0.5 x the sides": at_half}


def _in_runtime(runtime: Runtime, device: torch.device) -> SegmentBatch:
    def segment(pictures: Sequence[Tensor]) -> BatchCost:
        runtime(torch.stack([to_float(picture.to(device)) for picture in pictures])).cpu()
        return BatchCost({}, {})

    return segment


def _cost_of(results: Sequence[Result]) -> BatchCost:
    costs = [asdict(result.cost) for result in results]
    return BatchCost(
        {part: sum(cost[part] for cost in costs) for part in costs[0]},
        {stage: time * len(results) for stage, time in results[0].milliseconds.items()},
    )


def timed_rounds(
    methods: Mapping[str, SegmentBatch], batches: Iterator[Load]
) -> Iterator[dict[str, Timed]]:
    """Time all methods on one batch after the other: a round per batch, by method."""
    for load in batches:
        timed = {}
        for name, segment in methods.items():
            start = perf_counter()
            pictures = load()
            read = perf_counter()
            cost = segment(pictures)
            total = perf_counter() - start
            stages = {"read": 1000 * (read - start)} | cost.stages
            timed[name] = (1000 * total, BatchCost(cost.gmac, stages))
        yield timed


def settle(rounds: Iterator[dict[str, Timed]], seconds: float) -> bool:
    """Warm up until the medians of two windows of rounds agree for every method.

    Returns whether they did. A window takes ``seconds`` at most, or one round. Warming up gives
    up after some windows.
    """
    before: dict[str, float] = {}
    started = perf_counter()
    for number in range(PATIENCE):
        opened = perf_counter()
        if number and opened - started > PATIENCE * seconds:
            return False
        window = [next(rounds)]
        while len(window) < WINDOW and perf_counter() - opened < seconds:
            window.append(next(rounds))
        now = {name: median(timed[name][0] for timed in window) for name in window[0]}
        if before and all(abs(now[name] / before[name] - 1) <= AGREE for name in now):
            return True
        before = now
    return False


def row_of(method: str, scope: str, case: Case, timings: Sequence[Timed]) -> dict[str, Any]:
    """A row of the report; GMAC and stages are means per picture."""
    times = np.array([time for time, _ in timings])
    costs = [cost for _, cost in timings]
    height, width = case.size

    def means(parts: Sequence[dict[str, float]]) -> dict[str, float]:
        return {name: fmean(part[name] for part in parts) / case.batch for name in parts[0]}

    gmac = means([cost.gmac for cost in costs])
    return {
        "method": method,
        "scope": scope,
        "size": f"{width}x{height}",
        "batch": case.batch,
        "latency_ms": {"p50": float(np.median(times)), "p95": float(np.percentile(times, 95))},
        "throughput": 1000 * case.batch * len(times) / float(times.sum()),
        "gmac": sum(gmac.values()) or None,
        "gmac_of": gmac,
        "rounds": len(times),
        "stages": means([cost.stages for cost in costs]),
    }


def growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How time and memory of each method grow with the pixels: the exponent, by least squares.

    There is a row for each method, scope and batch of which three sizes or more were timed.
    """
    grown = []
    for key in dict.fromkeys((row["method"], row["scope"], row["batch"]) for row in rows):
        alike = [row for row in rows if (row["method"], row["scope"], row["batch"]) == key]
        if len(alike) < 3:
            continue
        pixels = [float(np.prod([int(side) for side in row["size"].split("x")])) for row in alike]
        peaks = [row["peak_mib"] for row in alike]
        grown.append(
            {
                **dict(zip(("method", "scope", "batch"), key, strict=True)),
                "sizes": [row["size"] for row in alike],
                "time": exponent(pixels, [row["latency_ms"]["p50"] for row in alike]),
                "memory": exponent(pixels, peaks) if all(peaks) else None,
            }
        )
    return grown


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The power of ``x`` by which ``y`` grows."""
    return float(np.polynomial.Polynomial.fit(np.log(x), np.log(y), 1).convert().coef[1])
