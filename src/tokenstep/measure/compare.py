"""Compare methods that cost less than dense on a labelled split, all on each picture in turn."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokenstep.config import DENSE, Thresholds
from tokenstep.core import partition
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.measure.quality import Method, measure
from tokenstep.measure.rivals import RIVALS, gmac_of, rivals_at
from tokenstep.model.any_segmenter import AnySegmenter
from tokenstep.reducers.named import REDUCERS

SCALES = (0.75, 0.5)  # of the picture's sides: what a user would try first


def compare(
    model: AnySegmenter,
    folder: LabelledFolder,
    thresholds: Thresholds,
    *,
    reducers: tuple[str, ...] = (),
    others: Sequence[tuple[str, AnySegmenter]] = (),
    rivalled: Sequence[Thresholds] = (),
    ratios: Sequence[float] = (),
    choosing: LabelledFolder | None = None,
    on_picture: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Measure each method of :func:`methods_of`, and ``others`` dense; give one row for each.

    ``reducers`` have a row of their own, in which they stand in the place of the exits. The
    methods of :func:`rivalling` follow for each of ``rivalled``, and all rivals at so many times
    less compute than dense for each of ``ratios``; how strong they are is found by their cost on
    ``choosing``, the folder itself if none is given. ``others`` run after all methods
    of ``model``. ``time_ratio`` is the dense model's time over
    that of the row, both measured in this run; ``compute_ratio`` is the same of GMAC.

    Raises:
        TokenstepError: the folder's classes are not the models', a file cannot be read, or no
            pixel has a label.
    """
    methods = methods_of(model, folder, thresholds)
    if reducers:
        methods[" ".join(reducers)] = Method(replace(thresholds.without_exits(), reducers=reducers))
    for spent in rivalled:
        methods |= rivalling(model, choosing or folder, spent)
    some = (choosing or folder).thinned(4)
    dense = gmac_of(model, some, Method()) if ratios else 0.0
    for ratio in ratios:
        found = rivals_at(model, some, dense / ratio)
        methods |= {f"{name}, dense / {ratio:g}": method for name, method in found.items()}
    reports = measure(model, folder, list(methods.values()), on_picture=on_picture)
    rows = [{"method": name, **report} for name, report in zip(methods, reports, strict=True)]
    for name, other in others:
        (report,) = measure(other, folder, [Method()], on_picture=on_picture)
        rows.append({"method": f"{name}, dense", **report})
    seconds, gmac = rows[0]["seconds"], rows[0]["gmac"]["total"]
    for row in rows:
        row["time_ratio"] = seconds / row["seconds"]
        row["compute_ratio"] = gmac / row["gmac"]["total"]
    return rows


def methods_of(
    model: AnySegmenter, folder: LabelledFolder, thresholds: Thresholds
) -> dict[str, Method]:
    """The methods to compare, by name: dense, lower resolution, partitions, halves, and STEP.

    ``thresholds`` are those of STEP, its partitions and its halves: merging alone, exits alone.
    The model's other operating points follow. What ``thresholds`` turn off has no method; where a
    model brings pictures to a size of its own, resolutions and partitions have none.
    """
    methods = {"dense": Method()}
    for scale in () if model.resizes else SCALES:
        methods[f"dense at {scale:g} x the sides"] = Method(scale=scale)
    if thresholds.merge and not model.resizes:
        merging = thresholds.without_exits()
        tolerance = oracle_tolerance(model, folder.thinned(20), merging)
        methods["random partition"] = Method(merging, "random")
        methods["learned partition (merging alone)"] = Method(merging)
        methods["oracle partition"] = Method(merging, "oracle", tolerance)
    if thresholds.exits:
        methods["exits alone"] = Method(thresholds.without_merging())
    if thresholds != DENSE:
        methods["STEP"] = Method(thresholds)
    for point in model.config.points:
        loss = f"{point.loss:.2f} points below the best on {point.split}"
        if point.thresholds != thresholds:
            methods[f"STEP, {loss}"] = Method(point.thresholds)
        if point.fixed is not None:
            own = point.thresholds == thresholds
            methods["STEP by budget" if own else f"STEP by budget, of {loss}"] = Method(
                point.fixed.budget
            )
    return methods


def rivalling(
    model: AnySegmenter, folder: LabelledFolder, thresholds: Thresholds
) -> dict[str, Method]:
    """What else a model could do at the cost of ``thresholds``: other partitions and reducers."""
    some = folder.thinned(20)
    gmac = gmac_of(model, some, Method(thresholds))
    methods = rivals_at(model, folder.thinned(2), gmac)
    if thresholds.merge and not model.resizes:
        tolerance = oracle_tolerance(model, some, thresholds)
        exits = f"and the exits of STEP at {gmac:.4g} GMAC"
        methods[f"random partition {exits}"] = Method(thresholds, "random")
        methods[f"oracle partition {exits}"] = Method(thresholds, "oracle", tolerance)
    return methods


@torch.inference_mode()
def oracle_tolerance(
    model: AnySegmenter, folder: LabelledFolder, thresholds: Thresholds, rounds: int = 8
) -> float:
    """The impurity at which the oracle's partition has as many tokens as the policy's.

    It is 0 where even the exact oracle has fewer. ``rounds`` halve the interval that holds it.
    """
    device = model.device
    wanted = 0
    for image, _ in folder:
        learned = model.partition([image.to(device)], thresholds)
        wanted += int(partition.token_counts(learned).sum())

    def tokens(tolerance: float) -> int:
        total = 0
        for _, label in folder:
            exact = partition.oracle(
                label[None],
                patch=model.patch,
                sizes=model.config.policy.sizes,
                classes=len(model.config.classes),
                tolerance=tolerance,
            )
            total += int(partition.token_counts(exact).sum())
        return total

    low, high = 0.0, 0.5  # tokens fall as the tolerance rises
    if tokens(low) <= wanted:
        return low
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens(middle) > wanted else (low, middle)
    return high


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Give the rows of :func:`compare` as a Markdown table."""
    lines = [
        "| method | mIoU | inter-class boundary IoU | tokens, start (p95) | tokens, end | "
        "halted, of start | GMAC per picture | GMAC, dense / row | time, dense / row |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tokens, boundary = row["tokens"], row["boundary_iou"]
        cells = [
            row["method"],
            f"{100 * row['miou']:.2f}",
            "-" if boundary is None else f"{100 * boundary:.2f}",
            f"{tokens['start']:.0f} ({tokens['p95']:.0f})",
            f"{tokens['end']:.0f}",
            f"{100 * row['halted_share']:.0f} %",
            f"{row['gmac']['total']:.2f}",
            f"{row['compute_ratio']:.2f}",
            f"{row['time_ratio']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write a PNG of mIoU against GMAC and against time, both relative to dense."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(11, 5), layout="constrained")
    for place, (key, label) in enumerate(
        (("compute_ratio", "GMAC, share of dense"), ("time_ratio", "time, share of dense"))
    ):
        axes = page.add_subplot(1, 2, place + 1)
        for kind, colour, marker in KINDS:
            points = sorted(
                (1 / row[key], 100 * row["miou"]) for row in rows if kind_of(row) == kind
            )
            if points:
                style = "-" if kind in ("STEP", "lower resolution") else ""
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    marker=marker,
                    linestyle=style,
                    label=kind,
                )
        axes.set_xlabel(label)
        axes.set_ylabel("mIoU, %")
        axes.grid(alpha=0.3)
        if place == 0:
            axes.legend(loc="lower right")
    page.suptitle(title)
    page.savefig(path, dpi=110, format="png")


# Okabe and Ito's colours and distinct markers, so that groups differ without colour too.
KINDS = (
    ("dense", "#000000", "*"),
    ("lower resolution", "#e69f00", "s"),
    ("other partitions", "#56b4e9", "^"),
    ("merging alone", "#009e73", "v"),
    ("exits alone", "#cc79a7", "D"),
    ("STEP", "#0072b2", "o"),
    ("other reducers", "#f0e442", "P"),
    ("other models", "#d55e00", "x"),
)


def kind_of(row: dict[str, Any]) -> str:
    """The group of a row in the figure."""
    method = row["method"]
    if method == "dense" or method == "exits alone":
        return str(method)
    if method.startswith(("dense at", "lower resolution")):
        return "lower resolution"
    if method.startswith("learned"):
        return "merging alone"
    if method.endswith("partition") or method.startswith(("random partition", "oracle partition")):
        return "other partitions"
    if method.startswith("STEP"):
        return "STEP"
    if any(method.startswith(name) for name in RIVALS):
        return "other reducers"
    reducers = all(word.partition(":")[0] in REDUCERS for word in method.split(" "))
    return "other reducers" if reducers else "other models"
