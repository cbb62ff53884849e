"""Calibrate a model on a labelled split: honest exits, then operating points from a search.

An operating point says what its settings were measured to lose and to cost. The search measures
combinations of merge and exit thresholds on a sample, and the best of them on the whole split.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenstep.config import DENSE, OperatingPoint, Thresholds
from tokenstep.core.partition import padded_labels, purity
from tokenstep.data.check import SOUND, require_sound
from tokenstep.data.contents import FILES, contents, of_folder
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.data.whole_files import write_text
from tokenstep.errors import TokenstepError
from tokenstep.measure.choices import Search
from tokenstep.measure.quality import Run, measure
from tokenstep.measure.reliability import fit_exits
from tokenstep.model.segmenter import Segmenter

Measure = Callable[[Thresholds, LabelledFolder], dict[str, Any]]


def calibrate(
    model: Segmenter,
    folder: LabelledFolder,
    notes: Path,
    *,
    search: Search | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Give ``model`` temperatures and operating points measured on ``folder``; returns a report.

    Every measurement is kept in the file ``notes``, so that a killed calibration of the same
    weights on the same pictures goes on where it was. The model's own settings become the
    cheapest point within 0.5 points of loss.

    Raises:
        TokenstepError: the folder's classes are not the model's, a file cannot be read, or
            ``notes`` is no file of this program.
    """
    search = search or Search()
    held = contents([folder], notes.parent / FILES)
    require_sound([folder], contents=held, cache=notes.parent / SOUND)
    model.config = dataclasses.replace(model.config, points=(), temperatures=())
    thin = folder.thinned(search.sample)
    merges = merge_thresholds(model, thin, search.prices) if model.config.policy.sizes else []
    found = fit_exits(model, thin, merges[len(merges) // 2]) if model.exits.after else {}
    model.config = dataclasses.replace(
        model.config, temperatures=tuple(one["temperature"] for one in found.values())
    )
    diary = Diary(notes, model, held)

    tried = combinations(merges, len(model.exits.after), search)
    rough = []
    for index, thresholds in enumerate(tried):
        progress("search", index, len(tried))
        rough.append((thresholds, diary.measure(thresholds, thin)))
    others = other_spares(front(rough), search)
    for index, thresholds in enumerate(others):
        progress("search", len(tried) + index, len(tried) + len(others))
        rough.append((thresholds, diary.measure(thresholds, thin)))
    chosen = contenders(rough, search.confirm)
    exact = []
    for index, thresholds in enumerate([DENSE, *chosen]):
        progress("confirm", index, len(chosen) + 1)
        exact.append((thresholds, diary.measure(thresholds, folder)))
    reports = dict(exact)
    best = max(report["miou"] for report in reports.values())
    split = folder.title
    points = tuple(
        operating_point(thresholds, reports[thresholds], best, split=split, images=len(folder))
        for thresholds in front(exact)
        if thresholds != DENSE
    )
    model.config = dataclasses.replace(model.config, points=points, thresholds=DENSE)
    point = model.config.point_within(0.5) if points else None
    if point is not None:
        model.config = dataclasses.replace(model.config, thresholds=point.thresholds)
    return {
        "split": split,
        "images": len(folder),
        "search": dataclasses.asdict(search),
        "exits": found,
        "dense": reports[DENSE],
        "points": [dataclasses.asdict(point) for point in points],
    }


class Diary:
    """Measurements of one model, kept in a JSON file as they are made.

    ``held`` is what the files of the pictures hold: a corrected label is measured anew.
    """

    def __init__(self, path: Path, model: Segmenter, held: Mapping[str, str]) -> None:
        self.path = path
        self.model = model
        self.held = held
        digest = hashlib.sha256(json.dumps(model.config.temperatures).encode())
        for value in model.state_dict().values():
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        self.owner = digest.hexdigest()[:16]
        self.entries: dict[str, Any] = {}
        if path.is_file():
            try:
                read = json.loads(path.read_text())
                self.entries = dict(read["entries"]) if read["model"] == self.owner else {}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise TokenstepError(f"{path}: is no calibration diary; remove it") from error

    def measure(self, thresholds: Thresholds, folder: LabelledFolder) -> dict[str, Any]:
        """The report of ``thresholds`` on ``folder``: read if it is there, else measured."""
        text = json.dumps(of_folder(folder, self.held))
        data = hashlib.sha256(text.encode()).hexdigest()[:16]
        key = json.dumps([data, dataclasses.asdict(thresholds)])
        if key not in self.entries:
            (self.entries[key],) = measure(self.model, folder, [Run(thresholds)])
            text = json.dumps({"model": self.owner, "entries": self.entries}, indent=1)
            write_text(self.path, text + "\n")
        report: dict[str, Any] = self.entries[key]
        return report


def combinations(
    merges: Sequence[tuple[float, ...]], exits: int, search: Search
) -> list[Thresholds]:
    """All settings to try first but the dense ones: every merging with every way to halt.

    A way to halt is one bar for the last 1, 2, ... all exits; a bar of 1 never lets halt.
    """
    halts: list[tuple[float, ...]] = [()]
    halts += [
        (1.0,) * idle + (bar,) * (exits - idle) for idle in range(exits) for bar in search.bars
    ]
    every = [Thresholds(merge, bars, search.spares[0]) for merge in ((), *merges) for bars in halts]
    return [
        thresholds for thresholds in dict.fromkeys(every) if thresholds.merge or thresholds.exits
    ]


def other_spares(thresholds: Sequence[Thresholds], search: Search) -> list[Thresholds]:
    """Those of ``thresholds`` that let tokens halt, with each of the search's other spares."""
    return [
        dataclasses.replace(one, spare=spare)
        for one in thresholds
        if one.exits
        for spare in search.spares[1:]
    ]


@torch.inference_mode()
def merge_thresholds(
    model: Segmenter, folder: LabelledFolder, prices: Sequence[float]
) -> list[tuple[float, ...]]:
    """For each price the merge thresholds, one per size, at which merging pays most.

    Taking a superpatch instead of its four quarters saves three tokens whatever its size, but
    what is impure in it grows with its area. So for each size the threshold is that at which
    ``price`` minus the impure patches, summed over all superpatches taken, is largest.
    """
    device = next(model.parameters()).device
    sizes, classes = model.config.policy.sizes, len(model.config.classes)
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in sizes]
    for image, label in folder:
        ((_, sight),) = model.look(model.normalise([image.to(device)])).groups
        full = padded_labels(label[None], model.patch)
        for row, (size, score) in enumerate(zip(sizes, model.scores(sight), strict=True)):
            share = purity(full, size * model.patch, classes)
            seen[row].append((score.cpu().flatten(), (1 - share).flatten() * size**2))
    thresholds = []
    for price in prices:
        bars = []
        for pairs in seen:
            scores = torch.cat([score for score, _ in pairs])
            impure = torch.cat([patches for _, patches in pairs])
            bars.append(best_threshold(scores, price - impure))
        thresholds.append(tuple(bars))
    return thresholds


def best_threshold(scores: Tensor, gains: Tensor) -> float:
    """The threshold above which the ``gains (N,)`` of ``scores (N,)`` sum to the most; 1 for none.

    It lies halfway between the last score that is taken and the next.
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


def front(measured: Sequence[tuple[Thresholds, dict[str, Any]]]) -> list[Thresholds]:
    """The settings that no others beat in both mIoU and GMAC, cheap to dear."""
    kept = []
    best = -1.0
    for thresholds, report in sorted(
        measured, key=lambda one: (one[1]["gmac"]["total"], -one[1]["miou"])
    ):
        if report["miou"] > best:
            best = report["miou"]
            kept.append(thresholds)
    return kept


def contenders(
    measured: Sequence[tuple[Thresholds, dict[str, Any]]], most: int
) -> list[Thresholds]:
    """The best ``most`` settings: the front, then the front of the rest, and so on.

    On few pictures what is nearly on the front may be on it in truth.
    """
    kept: list[Thresholds] = []
    rest = list(measured)
    while rest and len(kept) < most:
        best = front(rest)
        kept += spread(best, most - len(kept))
        rest = [one for one in rest if one[0] not in best]
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
    """What was measured of ``thresholds``, beside the ``best`` mIoU on the same pictures.

    The best is seldom the dense model's where a model was trained on merged tokens; a loss
    against dense would then promise for free what is not.
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
