"""Compare ways of spending less on a labelled split: all of them on each picture in turn."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenstep.config import Thresholds
from tokenstep.core import partition
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.measure.quality import Run, measure
from tokenstep.model.segmenter import Segmenter

SCALES = (0.75, 0.5)  # of the picture's sides: what a user would try first


def compare(
    model: Segmenter,
    folder: LabelledFolder,
    thresholds: Thresholds,
    *,
    others: Sequence[tuple[str, Segmenter]] = (),
    on_picture: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """One row per way: dense first, then lower resolution, partitions, halves, and STEP.

    ``thresholds`` are those that partitions and halves are compared at; every operating point of
    the model follows. ``time_ratio`` is the dense model's time over that of the row, measured in
    this run; ``others`` run dense, after all ways of ``model``.

    Raises:
        TokenstepError: the folder's classes are not the models', a file cannot be read, or no
            pixel has a label.
    """
    ways = {"dense": Run()}
    for scale in SCALES:
        ways[f"dense at {scale:g} x the sides"] = Run(scale=scale)
    if thresholds.merge:
        alone = thresholds.without_exits()
        tolerance = oracle_tolerance(model, folder.thinned(20), alone)
        ways["random partition"] = Run(alone, "random")
        ways["learned partition (merging alone)"] = Run(alone)
        ways["oracle partition"] = Run(alone, "oracle", tolerance)
    if thresholds.exits:
        ways["exits alone"] = Run(thresholds.without_merging())
    ways["STEP"] = Run(thresholds)
    for point in model.config.points:
        if point.thresholds != thresholds:
            lost = f"{point.loss:.2f} points below the best on {point.split}"
            ways[f"STEP, {lost}"] = Run(point.thresholds)
    reports = measure(model, folder, list(ways.values()), on_picture=on_picture)
    rows = [{"method": name, **report} for name, report in zip(ways, reports, strict=True)]
    for name, other in others:
        (report,) = measure(other, folder, [Run()], on_picture=on_picture)
        rows.append({"method": f"{name}, dense", **report})
    seconds, gmac = rows[0]["seconds"], rows[0]["gmac"]["total"]
    for row in rows:
        row["time_ratio"] = seconds / row["seconds"]
        row["compute_ratio"] = gmac / row["gmac"]["total"]
    return rows


@torch.inference_mode()
def oracle_tolerance(
    model: Segmenter, folder: LabelledFolder, thresholds: Thresholds, rounds: int = 8
) -> float:
    """The impurity at which the oracle's partition has as many tokens as the policy's.

    0 where even the exact oracle has fewer.
    """
    device = next(model.parameters()).device
    wanted = 0
    for image, _ in folder:
        normal = model.normalise([image.to(device)])
        wanted += int(partition.token_counts(model.partition(normal, thresholds)).sum())

    def tokens(tolerance: float) -> int:
        return sum(
            int(
                partition.token_counts(
                    partition.oracle(
                        label[None],
                        patch=model.patch,
                        sizes=model.config.policy.sizes,
                        classes=len(model.config.classes),
                        tolerance=tolerance,
                    )
                ).sum()
            )
            for _, label in folder
        )

    low, high = 0.0, 0.5  # tokens fall as the tolerance rises
    if tokens(low) <= wanted:
        return low
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens(middle) > wanted else (low, middle)
    return high


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
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
    """Write mIoU against GMAC and against time, both relative to dense, as a PNG."""
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


# Okabe and Ito's colours and distinct marks: told apart without colour too.
KINDS = (
    ("dense", "#000000", "*"),
    ("lower resolution", "#e69f00", "s"),
    ("other partitions", "#56b4e9", "^"),
    ("merging alone", "#009e73", "v"),
    ("exits alone", "#cc79a7", "D"),
    ("STEP", "#0072b2", "o"),
    ("other models", "#d55e00", "x"),
)


def kind_of(row: dict[str, Any]) -> str:
    """The group of a row in the figure."""
    method = row["method"]
    if method == "dense" or method == "exits alone":
        return str(method)
    if method.startswith("dense at"):
        return "lower resolution"
    if method.startswith("learned"):
        return "merging alone"
    if method.endswith("partition"):
        return "other partitions"
    return "STEP" if method.startswith("STEP") else "other models"
