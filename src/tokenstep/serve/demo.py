"""What `tokenstep demo` shows of one picture: files, figures and promises, but not the page."""

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokenstep.config import DENSE
from tokenstep.data.pictures import picture_size
from tokenstep.data.scaling import MaxSide, side_for
from tokenstep.data.whole_files import write_text
from tokenstep.errors import TokenstepError
from tokenstep.model.any_segmenter import AnySegmenter
from tokenstep.serve import summary
from tokenstep.serve.files import Report, SegmentJob, segment_files
from tokenstep.serve.reports import classes_of, header
from tokenstep.terminal import as_json

MAX_MEGABYTES = 20  # of an upload
MAX_PIXELS = 50_000_000  # of a picture: what a camera takes, and a second or two to decode


@dataclass(frozen=True)
class Demo:
    """The models to choose from, by name, and what larger pictures are scaled down to.

    "auto" is each model's own scale, None takes them as they are.
    """

    models: Mapping[str, AnySegmenter]
    max_side: MaxSide = "auto"

    def side(self, name: str) -> int | None:
        """The long side that larger pictures are scaled down to for a model, if they are."""
        return side_for(self.max_side, self.models[name].config.long_side)


@dataclass(frozen=True)
class Shown:
    """What there is to see and to download of one picture; the files lie in the folder given."""

    overlay: Path
    tokens: Path
    dense_overlay: Path
    figures: str  # a Markdown table, STEP beside dense
    point: str  # what the operating point promises
    downloads: tuple[Path, ...]  # label map, overlay, token map, report


def warm_up(model: AnySegmenter) -> None:
    """Run a model once each way, so that no picture's time holds what only a first call costs."""
    blank = torch.zeros(3, 256, 256, dtype=torch.uint8)
    for thresholds in (model.config.thresholds, DENSE):
        model.segment_batch([blank], thresholds=thresholds)


def knob_of(model: AnySegmenter) -> tuple[float, float]:
    """The knob's largest value, and where it starts, in points of mIoU."""
    points = model.config.points
    top = max(1, math.ceil(max((point.loss for point in points), default=0)))
    return float(top), 0.5 if points else 0.0


def promise(model: AnySegmenter, max_loss: float) -> str:
    """Which operating point the knob takes, and what that was measured to lose.

    Raises:
        TokenstepError: the model was not calibrated.
    """
    _, point = model.config.at(max_loss)
    if point is not None:
        return summary.promise(point)
    reason = "the knob is at 0" if max_loss == 0 else "no operating point loses so little"
    return f"dense, since {reason}: no merging, no exits"


def show(demo: Demo, upload: Path, *, name: str, max_loss: float, out: Path) -> Shown:
    """Segment a picture by the model ``name`` as the knob says, and dense; write all to ``out``.

    The picture is scaled down first and its label map back, as by ``tokenstep segment``.

    Raises:
        TokenstepError: the file is no picture or too large, the model was not calibrated, or the
            picture does not fit in memory; names the file as it was uploaded.
    """
    model = demo.models[name]
    thresholds, point = model.config.at(max_loss)
    side = demo.side(name)
    try:
        picture_size(upload, max_pixels=MAX_PIXELS)
        # STEP goes first: what a first call at this size costs is on our side of the comparison.
        step = _segment(model, upload, SegmentJob(out / "step", thresholds, max_side=side))
        if thresholds == DENSE:
            dense = step
            shutil.copytree(out / "step", out / "dense")
        else:
            dense = _segment(model, upload, SegmentJob(out / "dense", DENSE, max_side=side))
    except TokenstepError as fault:
        raise TokenstepError(_without_folders(str(fault), out, upload.parent)) from fault
    labels, overlay, tokens = (
        out / "step" / f"{step['name']}.{kind}"
        for kind in ("labels.png", "overlay.jpg", "tokens.jpg")
    )
    report = {
        "file": upload.name,
        "uploaded_size": [step["width"], step["height"]],
        **header(name, model.config, thresholds, point),
        "classes": classes_of(model.config),
        "max_loss": max_loss,
        "max_side": side,
        "machine": machine_of(model),
        "step": _without_paths(step, upload.parent),
        "dense": _without_paths(dense, upload.parent),
        "same_pixels": _same_pixels(labels, out / "dense" / labels.name),
    }
    write_text(out / "step" / "report.json", as_json(report) + "\n")
    return Shown(
        overlay=overlay,
        tokens=tokens,
        dense_overlay=out / "dense" / overlay.name,
        figures=figures(report),
        point=f"{promise(model, max_loss)}; {summary.spent([step])}",
        downloads=(labels, overlay, tokens, out / "step" / "report.json"),
    )


def machine_of(model: AnySegmenter) -> str:
    """What a model runs on, in words."""
    device = model.device
    return str(device) if device.type != "cpu" else f"CPU threads: {torch.get_num_threads()}"


def figures(report: Mapping[str, Any]) -> str:
    """The two halves of a report of :func:`show` side by side, as a Markdown table."""
    dense, step = report["dense"], report["step"]
    clock = f"time on this machine ({report['machine']}), ms"
    pairs: tuple[tuple[str, float, float, str], ...] = (
        ("tokens at the start", dense["tokens"]["start"], step["tokens"]["start"], ",.0f"),
        ("GMAC of this picture", dense["gmac"]["used"], step["gmac"]["used"], ",.2f"),
        (clock, summary.model_milliseconds(dense), summary.model_milliseconds(step), ",.0f"),
    )
    rows = [
        f"| {what} | {after:{form}} | {before:{form}} | {before / after:.1f} |"
        for what, before, after, form in pairs
    ]
    halted = sum(step["tokens"]["halted"].values())
    rows.append(f"| tokens that halted early | {halted:,} | 0 | |")
    rows.append(f"| pixels of the same class as dense | {report['same_pixels']:.1%} | | |")
    table = ["| | STEP | dense | dense / STEP |", "|:--|--:|--:|--:|", *rows]
    if "scaled_to" in step:
        size = "{} x {}".format(*step["scaled_to"])
        table += ["", f"The models saw the picture scaled down to {size} px."]
    if "warnings" in step:
        table += ["", "The picture may look otherwise than it was meant: see the report."]
    return "\n".join(table)


def _segment(model: AnySegmenter, picture: Path, job: SegmentJob) -> Report:
    (entry,) = segment_files(model, [picture], job)
    if "error" in entry:
        raise TokenstepError(entry["error"])
    return entry


def _without_folders(message: str, *folders: Path) -> str:
    """A message that names files as users know them, not where they lie on this machine."""
    for folder in folders:
        message = message.replace(f"{folder}{os.sep}", "")
    return message


def _without_paths(entry: Report, folder: Path) -> Report:
    rest = {key: value for key, value in entry.items() if key not in ("file", "name")}
    if "warnings" in rest:
        rest["warnings"] = [_without_folders(note, folder) for note in rest["warnings"]]
    return rest


def _same_pixels(one: Path, other: Path) -> float:
    """Share of the pixels that have the same class in two label maps, 0 to 1."""
    with Image.open(one) as first, Image.open(other) as second:
        return round(float((np.asarray(first) == np.asarray(second)).mean()), 5)
