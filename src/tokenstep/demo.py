"""What `tokenstep demo` shows of one picture: files, figures and promises, but not the page."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokenstep import tables
from tokenstep.config import DENSE, Settings
from tokenstep.errors import TokenstepError
from tokenstep.infer import Report, SegmentJob, segment_files
from tokenstep.options import choose
from tokenstep.pictures import read_picture, write_text, write_whole
from tokenstep.reports import classes_of, header
from tokenstep.segmenter import StepSegmenter
from tokenstep.terminal import as_json

MAX_MEGABYTES = 20  # of an upload
MAX_PIXELS = 50_000_000  # of a picture: what a camera takes, and a second or two to decode


@dataclass(frozen=True)
class Demo:
    """The models to choose from, by name, and the long side that larger pictures are scaled to."""

    models: Mapping[str, StepSegmenter]
    max_side: int


@dataclass(frozen=True)
class Shown:
    """What there is to see and to download of one picture; the files lie in the folder given."""

    overlay: Path
    tokens: Path
    dense_overlay: Path
    figures: str  # a Markdown table, STEP beside dense
    point: str  # what the operating point promises
    downloads: tuple[Path, ...]  # label map, overlay, token map, report


def warm_up(model: StepSegmenter) -> None:
    """Run a model once each way, so that no picture's time holds what only a first call costs."""
    blank = torch.zeros(3, 256, 256, dtype=torch.uint8)
    for settings in (model.config.settings, DENSE):
        model.segment_batch([blank], settings=settings)


def knob_of(model: StepSegmenter) -> tuple[float, float]:
    """The knob's largest value, and where it starts, in points of mIoU."""
    points = model.config.points
    top = max(1, math.ceil(max((point.loss for point in points), default=0)))
    return float(top), 0.5 if points else 0.0


def promise(model: StepSegmenter, max_loss: float) -> str:
    """Which operating point the knob takes, and what that was measured to lose.

    Raises:
        TokenstepError: the model was not calibrated.
    """
    _, point = choose(model, max_loss=max_loss)
    if point is not None:
        return tables.promise(point)
    reason = "the knob is at 0" if max_loss == 0 else "no operating point loses so little"
    return f"dense, since {reason}: no merging, no exits"


def show(demo: Demo, upload: Path, *, name: str, max_loss: float, out: Path) -> Shown:
    """Segment a picture by the model ``name`` as the knob says, and dense; write all to ``out``.

    The picture is scaled down to the demo's ``max_side`` first, and its results have that size.

    Raises:
        TokenstepError: the file is no picture or too large, the model was not calibrated, or the
            picture does not fit in memory; names the file as it was uploaded.
    """
    model = demo.models[name]
    settings, point = choose(model, max_loss=max_loss)
    picture = out / f"{upload.stem}.png"
    width, height = _scale_down(upload, picture, demo.max_side)
    # STEP goes first: what a first call at this size costs is then on our side of the comparison.
    step = _segment(model, picture, settings, out / "step")
    if settings == DENSE:
        dense = step
        shutil.copytree(out / "step", out / "dense")
    else:
        dense = _segment(model, picture, DENSE, out / "dense")
    labels, overlay, tokens = (
        out / "step" / f"{step['name']}.{kind}"
        for kind in ("labels.png", "overlay.jpg", "tokens.jpg")
    )
    report = {
        "file": upload.name,
        "uploaded_size": [width, height],
        **header(name, model.config, settings, point),
        "classes": classes_of(model.config),
        "max_loss": max_loss,
        "machine": machine_of(model),
        "step": _without_paths(step),
        "dense": _without_paths(dense),
        "same_pixels": _same_pixels(labels, out / "dense" / labels.name),
    }
    write_text(out / "step" / "report.json", as_json(report) + "\n")
    return Shown(
        overlay=overlay,
        tokens=tokens,
        dense_overlay=out / "dense" / overlay.name,
        figures=figures(report),
        point=f"{promise(model, max_loss)}; {tables.spent([step])}",
        downloads=(labels, overlay, tokens, out / "step" / "report.json"),
    )


def machine_of(model: StepSegmenter) -> str:
    """What a model runs on, in words."""
    device = next(model.parameters()).device
    return str(device) if device.type != "cpu" else f"CPU threads: {torch.get_num_threads()}"


def figures(report: Mapping[str, Any]) -> str:
    """The two halves of a report of :func:`show` side by side, as a Markdown table."""
    dense, step = report["dense"], report["step"]
    clock = f"time on this machine ({report['machine']}), ms"
    pairs: tuple[tuple[str, float, float, str], ...] = (
        ("tokens at the start", dense["tokens"]["start"], step["tokens"]["start"], ",.0f"),
        ("GMAC of this picture", dense["gmac"]["used"], step["gmac"]["used"], ",.2f"),
        (clock, tables.model_milliseconds(dense), tables.model_milliseconds(step), ",.0f"),
    )
    rows = [
        f"| {what} | {after:{form}} | {before:{form}} | {before / after:.1f} |"
        for what, before, after, form in pairs
    ]
    halted = sum(step["tokens"]["halted"].values())
    rows.append(f"| tokens that halted early | {halted:,} | 0 | |")
    rows.append(f"| pixels of the same class as dense | {report['same_pixels']:.1%} | | |")
    return "\n".join(["| | STEP | dense | dense / STEP |", "|:--|--:|--:|--:|", *rows])


def _scale_down(upload: Path, picture: Path, max_side: int) -> tuple[int, int]:
    """Write the upload as a PNG of ``max_side`` at most; its own size (w, h)."""
    try:
        image = read_picture(upload, max_pixels=MAX_PIXELS)
    except TokenstepError as fault:
        raise TokenstepError(_named(str(fault), upload)) from fault
    size = image.size
    image.thumbnail((max_side, max_side), Image.Resampling.BILINEAR)
    write_whole(picture, image.save)
    return size


def _segment(model: StepSegmenter, picture: Path, settings: Settings, out: Path) -> Report:
    (entry,) = segment_files(model, [picture], SegmentJob(out, settings))
    if "error" in entry:
        raise TokenstepError(_named(entry["error"], picture))
    return entry


def _named(message: str, path: Path) -> str:
    """A message that names the file as users know it, not where it lies on this machine."""
    return message.replace(str(path), path.name)


def _without_paths(entry: Report) -> Report:
    return {key: value for key, value in entry.items() if key not in ("file", "name")}


def _same_pixels(one: Path, other: Path) -> float:
    """Share of the pixels that have the same class in two label maps, 0 to 1."""
    with Image.open(one) as first, Image.open(other) as second:
        return round(float((np.asarray(first) == np.asarray(second)).mean()), 5)
