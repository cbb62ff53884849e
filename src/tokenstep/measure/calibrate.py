"""Calibrate a model on a labelled split: temperatures of its exits, then operating points.

An operating point holds thresholds, and the loss and cost that were measured with them. The
search measures combinations of merge and exit thresholds on a sample of the pictures, and the
best of them on the whole split. Each point also gets the budget that spends on every picture what
its thresholds spend on average, measured on the whole split too.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenstep.config import DENSE, MeasuredBudget, OperatingPoint, Thresholds
from tokenstep.core.partition import padded_labels, purity
from tokenstep.data.check import SOUND, require_sound
from tokenstep.data.digests import FILES, digests_of
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.measure.measurement_cache import MeasurementCache
from tokenstep.measure.reliability import fit_exits
from tokenstep.measure.settings import Search
from tokenstep.measure.shares import budget_of
from tokenstep.model.segmenter import Segmenter
from tokenstep.policies.batch import homogeneity, policy_features

Measured = tuple[Thresholds, dict[str, Any]]  # thresholds and their report
Progress = Callable[[str, int, int], None]  # stage, done, total


def calibrate(
    model: Segmenter,
    folder: LabelledFolder,
    notes: Path,
    *,
    search: Search | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Give ``model`` temperatures and operating points measured on ``folder``; return a report.

    Every measurement is kept in the file ``notes``. So a killed calibration of the same weights
    on the same pictures goes on where it was. The model's own thresholds become those of the
    cheapest point within 0.5 points of loss.

    Raises:
        TokenstepError: the folder's classes are not the model's, a file cannot be read,
            ``notes`` is no file of this program, or exits are among the reducers to search.
    """
    search = search or Search()
    if any(reducer.partition(":")[0] == "exits" for reducer in search.reducers):
        raise TokenstepError("calibrate: exits are searched as they are; give other reducers")
    digests = digests_of([folder], notes.parent / FILES)
    require_sound([folder], digests=digests, cache=notes.parent / SOUND)
    model.config = dataclasses.replace(model.config, points=(), temperatures=())
    sample = folder.thinned(search.sample)
    merges = merge_thresholds(model, sample, search.prices) if model.config.policy.sizes else []
    exits = fit_exits(model, sample, merges[len(merges) // 2]) if model.exits.after else {}
    temperatures = tuple(exit_["temperature"] for exit_ in exits.values())
    model.config = dataclasses.replace(model.config, temperatures=temperatures)

    cache = MeasurementCache(notes, model, digests)
    measured = measure_sample(cache, sample, merges, search, progress=progress)
    chosen = contenders(measured, search.confirm)
    reports: dict[Thresholds, dict[str, Any]] = {}
    for index, thresholds in enumerate([DENSE, *chosen]):
        progress("confirm", index, len(chosen) + 1)
        reports[thresholds] = cache.measure(thresholds, folder)
    store_points(model, reports, folder)
    add_budgets(model, cache, reports, folder, progress=progress)
    return {
        "split": folder.title,
        "images": len(folder),
        "search": dataclasses.asdict(search),
        "exits": exits,
        "dense": reports[DENSE],
        "points": [point.report() for point in model.config.points],
    }


def measure_sample(
    cache: MeasurementCache,
    sample: LabelledFolder,
    merges: Sequence[tuple[float, ...]],
    search: Search,
    *,
    progress: Progress,
) -> list[Measured]:
    """Measure all :func:`combinations` on the sample, then the best with the other spares."""
    first = combinations(merges, len(cache.model.exits.after), search)
    measured = []
    for index, thresholds in enumerate(first):
        progress("search", index, len(first))
        measured.append((thresholds, cache.measure(thresholds, sample)))
    others = other_spares(front(measured), search)
    for index, thresholds in enumerate(others):
        progress("search", len(first) + index, len(first) + len(others))
        measured.append((thresholds, cache.measure(thresholds, sample)))
    return measured


def store_points(
    model: Segmenter, reports: Mapping[Thresholds, dict[str, Any]], folder: LabelledFolder
) -> None:
    """Store the front of ``reports`` in the model as its operating points, and choose one.

    The model's own thresholds become those of the cheapest point within 0.5 points of loss, or
    dense.
    """
    best = max(report["miou"] for report in reports.values())
    points = tuple(
        operating_point(
            thresholds, reports[thresholds], best, split=folder.title, images=len(folder)
        )
        for thresholds in front(list(reports.items()))
        if thresholds != DENSE
    )
    model.config = dataclasses.replace(model.config, points=points, thresholds=DENSE)
    point = model.config.point_within(0.5) if points else None
    if point is not None:
        model.config = dataclasses.replace(model.config, thresholds=point.thresholds)


def add_budgets(
    model: Segmenter,
    cache: MeasurementCache,
    reports: Mapping[Thresholds, dict[str, Any]],
    folder: LabelledFolder,
    *,
    progress: Progress,
) -> None:
    """Give each operating point of the model its budget, with what that loses and costs."""
    best = max(report["miou"] for report in reports.values())
    points = []
    for index, point in enumerate(model.config.points):
        progress("budgets", index, len(model.config.points))
        budget = budget_of(reports[point.thresholds]["shares"], point.thresholds)
        report = cache.measure(budget, folder)
        fixed = MeasuredBudget(
            budget=budget,
            miou=round(report["miou"], 5),
            loss=round(100 * (best - report["miou"]), 3),
            gmac=round(report["gmac"]["total"], 4),
        )
        points.append(dataclasses.replace(point, fixed=fixed))
    model.config = dataclasses.replace(model.config, points=tuple(points))


def combinations(
    merges: Sequence[tuple[float, ...]], exits: int, search: Search
) -> list[Thresholds]:
    """Every set of merge thresholds with every set of exit thresholds or reducer, but not dense.

    A set of exit thresholds holds one threshold for the last 1, 2, ... all of ``exits`` exits. The
    exits before have the threshold 1, which no confidence passes.
    """
    exit_sets: list[tuple[float, ...]] = [()]
    exit_sets += [
        (1.0,) * idle + (threshold,) * (exits - idle)
        for idle in range(exits)
        for threshold in search.bars
    ]
    spare = search.spares[0]
    every = []
    for merge in ((), *merges):
        every += [Thresholds(merge, exit_set, spare) for exit_set in exit_sets]
        every += [Thresholds(merge, (), spare, (reducer,)) for reducer in search.reducers]
    dense = Thresholds(spare=spare)
    return [thresholds for thresholds in dict.fromkeys(every) if thresholds != dense]


def other_spares(thresholds: Sequence[Thresholds], search: Search) -> list[Thresholds]:
    """Those of ``thresholds`` that let tokens halt, with each of the search's other spares."""
    return [
        dataclasses.replace(halting, spare=spare)
        for halting in thresholds
        if halting.exits
        for spare in search.spares[1:]
    ]


@torch.inference_mode()
def merge_thresholds(
    model: Segmenter, folder: LabelledFolder, prices: Sequence[float]
) -> list[tuple[float, ...]]:
    """For each price the merge thresholds, one per size, at which merging pays most.

    A price is the number of impure patches that one superpatch may bring. Taking a superpatch
    instead of its four quarters saves three tokens whatever its size, but what is impure in it
    grows with its area. So the threshold of a size is the one at which ``price`` minus the impure
    patches, summed over all superpatches taken, is largest.
    """
    sides, classes = model.config.policy.sizes, len(model.config.classes)
    samples: list[list[tuple[Tensor, Tensor]]] = [[] for _ in sides]
    for image, label in folder:
        (looks,) = policy_features(model.policy, model.normalise([image]))
        scores_by_side = homogeneity(model.policy, looks)
        full = padded_labels(label[None], model.patch)
        for sample, side, score in zip(samples, sides, scores_by_side, strict=True):
            share = purity(full, side * model.patch, classes)
            sample.append((score.cpu().flatten(), (1 - share).flatten() * side**2))
    by_side = [
        (torch.cat([score for score, _ in sample]), torch.cat([impure for _, impure in sample]))
        for sample in samples
    ]
    return [
        tuple(best_threshold(scores, price - impure) for scores, impure in by_side)
        for price in prices
    ]


def best_threshold(scores: Tensor, gains: Tensor) -> float:
    """The threshold above which the ``gains (N,)`` of ``scores (N,)`` sum to the most.

    It lies halfway between the last score that is taken and the next. It is 1 where taking
    nothing is best.
    """
    if not len(scores):
        return 1.0
    order = scores.argsort(descending=True)
    total = gains[order].double().cumsum(0)
    best = int(total.argmax())
    if total[best] <= 0:
        return 1.0
    below = scores[order[best + 1]] if best + 1 < len(order) else torch.zeros(())
    return round(float((scores[order[best]] + below) / 2), 4)


def front(measured: Sequence[Measured]) -> list[Thresholds]:
    """The thresholds that no others beat in both mIoU and GMAC, cheap to dear."""

    def cheap_then_good(pair: Measured) -> tuple[float, float]:
        return pair[1]["gmac"]["total"], -pair[1]["miou"]

    kept = []
    best = -1.0
    for thresholds, report in sorted(measured, key=cheap_then_good):
        if report["miou"] > best:
            best = report["miou"]
            kept.append(thresholds)
    return kept


def contenders(measured: Sequence[Measured], most: int) -> list[Thresholds]:
    """The best ``most`` thresholds: the front, then the front of the rest, and so on.

    On few pictures what is nearly on the front may be on it in truth.
    """
    kept: list[Thresholds] = []
    rest = list(measured)
    while rest and len(kept) < most:
        best = front(rest)
        kept += spread(best, most - len(kept))
        rest = [pair for pair in rest if pair[0] not in best]
    return kept


def spread(thresholds: Sequence[Thresholds], most: int) -> list[Thresholds]:
    """At most ``most`` of a front, evenly along it, with both ends."""
    count = min(most, len(thresholds))
    places = torch.linspace(0, len(thresholds) - 1, count).round().long().tolist()
    return [thresholds[place] for place in places]


def operating_point(
    thresholds: Thresholds,
    report: dict[str, Any],
    best: float,
    *,
    split: str,
    images: int,
) -> OperatingPoint:
    """What was measured with ``thresholds``, and the loss against the ``best`` mIoU.

    The best mIoU on the same pictures is seldom the dense model's where a model was trained on
    merged tokens. A loss against dense would then promise more than there is.
    """
    return OperatingPoint(
        thresholds=thresholds,
        miou=round(report["miou"], 5),
        loss=round(100 * (best - report["miou"]), 3),
        gmac=round(report["gmac"]["total"], 4),
        tokens=round(report["tokens"]["start"], 1),
        halted_share=round(report["halted_share"], 4),
        split=split,
        images=images,
    )
