"""What can be wrong with labelled pictures: faults, and what the pixels say of the classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tokenstep.data.labelled_folder import Classes, LabelledFolder, read_label
from tokenstep.data.labels import IGNORE
from tokenstep.errors import TokenstepError

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Fault:
    """What is wrong with one file or folder; `text` is one line that does not name it again."""

    file: str
    kind: str
    severity: Severity
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.text}"


@dataclass(frozen=True)
class Part:
    """Pictures with their labels that are used together: a split, or what patterns pick of it.

    `folder` is the split's. Fewer than `least` classes with a pixel are an error. `alone` are
    pictures without a label of their own and labels without a picture.
    """

    title: str
    folder: Path
    pairs: tuple[tuple[Path, Path], ...]
    least: int
    alone: tuple[Path, ...] = ()


def part_of(folder: LabelledFolder, least: int) -> Part:
    """The pictures of a labelled folder, of which at least so many classes must have a pixel."""
    pairs = tuple(zip(folder.paths, folder.labels, strict=True))
    return Part(folder.title, folder.paths[0].parent.parent, pairs, least)


def class_faults(part: Part, classes: Classes, counts: Tensor) -> list[Fault]:
    """Classes without a pixel in `part`, from the pixels of each index, ``counts (256,)`` int64.

    What would be an error is a warning where the classes allow empty ones, unless no pixel has one.
    """
    total, ignored = int(counts.sum()), int(counts[IGNORE])
    pixels = counts[: len(classes.names)].tolist()
    file = str(part.folder / "labels")
    hard: Severity = "warning" if classes.allow_empty_classes else "error"
    if total == 0:
        return []
    if ignored == total:
        text = f"all pixels of {part.title} are {IGNORE}, which is no class; label them"
        return [Fault(file, "all-ignored", "error", text)]  # nothing can be learnt or scored
    # With one class alone every pixel that counts is right, whatever a model does.
    if len(pixels) == 1:
        text = f"{classes.names[0]!r} is the only class of {part.title}{_share(pixels, counts)}"
        two = f'["other", "{classes.names[0]}"]'
        remedy = f"name two, as {two}, and label both: {IGNORE} is no class"
        return [Fault(file, "single-class", hard, f"{text} {remedy}{_way_on(hard)}")]
    severity = hard if sum(map(bool, pixels)) < part.least else "warning"
    faults = []
    for index, name in enumerate(classes.names):
        if not pixels[index]:
            text = f"{name!r} has no pixel in {part.title}{_share(pixels, counts)}"
            remedy = f"label it as {index} or take it out of classes.json"
            if ignored:
                remedy = f"if that is {name!r}, relabel {IGNORE} as {index}"
            text = f"{text} {remedy}{_way_on(severity)}"
            faults.append(Fault(file, "empty-class", severity, text))
    return faults


def _share(pixels: list[int], counts: Tensor) -> str:
    """How much of all pixels is ignored, and whether that looks like a mask of 0 and 255."""
    total, ignored = int(counts.sum()), int(counts[IGNORE])
    if not ignored:
        return ";"
    mask = ": a 0/255 mask?" if pixels[0] + ignored == total else ";"
    return f"; {IGNORE} fills {100 * ignored / total:.3g} % of it{mask}"


def _way_on(severity: Severity) -> str:
    if severity == "warning":
        return ""
    return ', or set "allow_empty_classes": true in classes.json'


def empty_classes(folder: LabelledFolder) -> list[str]:
    """Read the labels of a folder to measure on: a line for each class without a pixel.

    Raises `TokenstepError` if a label cannot be read, if no pixel has a class, or if there is one
    class alone: then no score says anything.
    """
    counts = torch.zeros(256, dtype=torch.int64)
    for path in folder.labels:
        label = read_label(path, len(folder.classes.names))
        counts += torch.bincount(label.flatten(), minlength=256)
    return class_warnings(folder, counts)


def class_warnings(folder: LabelledFolder, counts: Tensor) -> list[str]:
    """:func:`empty_classes` of a folder whose pixels of each index are known: ``(256,)`` int64."""
    faults = class_faults(part_of(folder, 1), folder.classes, counts)
    for fault in faults:
        if fault.severity == "error":
            raise TokenstepError(str(fault))
    return [fault.text for fault in faults]
