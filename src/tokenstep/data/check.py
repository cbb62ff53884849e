"""Check labelled pictures whole, before hours are spent on them."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tokenstep.data.faults import Fault, Part, class_faults, part_of
from tokenstep.data.labelled_folder import (
    Classes,
    LabelledFolder,
    label_of,
    missing_labels,
    read_classes,
)
from tokenstep.data.labels import WrongKind, outside, read_indices
from tokenstep.data.pictures import is_picture, read_picture
from tokenstep.data.whole_files import write_text
from tokenstep.errors import TokenstepError

SPLITS = ("train", "val", "test")
SOUND = "sound.json"  # the usual name of a cache of verdicts
_READERS = 4  # threads: decoders run outside Python's lock, and large pictures need memory

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verdict:
    """What a check read: how many files, and per part the pixels of each class and the indices."""

    files: int
    pixels: dict[str, dict[str, int]]
    values: dict[str, list[int]]
    faults: tuple[Fault, ...]


def require_sound(
    measured: Sequence[LabelledFolder],
    trained: LabelledFolder | None = None,
    *,
    digests: Mapping[str, str] | None = None,
    cache: Path | None = None,
) -> None:
    """Read all pictures and labels of folders with one root, and refuse them if one is wrong.

    Each class must have a pixel in `trained`, and two of them in each of `measured`. Where
    `digests` (file name to hash) are what the JSON file `cache` knows as sound, nothing is read.

    Raises:
        TokenstepError: names the first error and counts the others.
    """
    folders = [*measured] if trained is None else [trained, *measured]
    classes, root = folders[0].classes, folders[0].root
    parts = [part_of(one, len(classes.names) if one is trained else 2) for one in folders]
    asked = [asdict(classes), [[part.title, part.least] for part in parts]]
    text = json.dumps([asked, sorted((digests or {}).items())])
    mark = hashlib.sha256(text.encode()).hexdigest()
    known = _known(cache) if cache is not None and digests is not None else []
    if mark in known:
        return
    errors = [fault for fault in check_parts(parts, classes).faults if fault.severity == "error"]
    if errors:
        others = f" ({len(errors) - 1} more: see tokenstep data check {root})"
        raise TokenstepError(f"{errors[0]}{others if len(errors) > 1 else ''}")
    if cache is not None and digests is not None:
        write_text(cache, json.dumps({"sound": [*known, mark]}, indent=1) + "\n")


def _known(cache: Path) -> list[str]:
    """What a cache knows as sound: nothing, if it is missing or damaged."""
    try:
        marks = json.loads(cache.read_text(encoding="utf-8"))["sound"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return marks if isinstance(marks, list) else []


def check_folder(root: Path, *, progress: Progress = lambda done, total: None) -> Verdict:
    """Read every picture and label of a labelled folder once.

    `progress` gets how many pairs and files without a partner are read, of how many.

    Raises:
        TokenstepError: there is no such folder, or no split in it. All else is a fault.
    """
    held = _splits_of(root)
    try:
        classes = read_classes(root)
    except TokenstepError as error:
        return Verdict(0, {}, {}, (_fault(root / "classes.json", "classes", error),))
    parts, faults = [], []
    for split in held:
        part, found = _whole_split(root / split, classes)
        parts.append(part)
        faults += found
    for split in SPLITS:
        if split not in held:
            text = "there is no such split; make it, or name another where one is asked for"
            faults.append(Fault(str(root / split), "no-split", "warning", text))
    verdict = check_parts(parts, classes, progress=progress)
    faults += verdict.faults
    twins = _twins(parts, {fault.file for fault in faults})
    return replace(verdict, faults=(*faults, *twins))


def check_parts(
    parts: Sequence[Part], classes: Classes, *, progress: Progress = lambda done, total: None
) -> Verdict:
    """Read every picture and label of `parts` once."""
    pixels, values = {}, {}
    faults: list[Fault] = []
    files = sum(2 * len(part.pairs) + len(part.alone) for part in parts)
    done, total = 0, sum(len(part.pairs) + len(part.alone) for part in parts)
    with ThreadPoolExecutor(_READERS) as readers:
        for part in parts:
            counts = torch.zeros(256, dtype=torch.int64)
            for found, count in readers.map(lambda pair: _check_pair(pair, classes), part.pairs):
                faults += found
                counts += count
                done += 1
                progress(done, total)
            for found in readers.map(_check_alone, part.alone):
                faults += found
                done += 1
                progress(done, total)
            faults += class_faults(part, classes, counts)
            pixels[part.title] = dict(zip(classes.names, counts.tolist(), strict=False))
            values[part.title] = counts.nonzero().flatten().tolist()
    return Verdict(files, pixels, values, tuple(faults))


def _check_alone(path: Path) -> list[Fault]:
    """The fault of a picture without a label, or of a label without a picture, if it has one."""
    try:
        if path.parent.name == "labels":
            read_indices(path)
        else:
            read_picture(path)
    except TokenstepError as error:
        return [_fault(path, _kind(error), error)]
    return []


def _kind(error: TokenstepError) -> str:
    return "wrong-kind" if isinstance(error, WrongKind) else "unreadable"


def _check_pair(pair: tuple[Path, Path], classes: Classes) -> tuple[list[Fault], Tensor]:
    """The faults of a picture and its label, and the label's pixels of each index, ``(256,)``."""
    picture, label = pair
    faults, size = [], None
    try:
        size = read_picture(picture).size
    except TokenstepError as error:
        faults.append(_fault(picture, "unreadable", error))
    try:
        values = torch.from_numpy(read_indices(label))
    except TokenstepError as error:
        return [*faults, _fault(label, _kind(error), error)], torch.zeros(256, dtype=torch.int64)
    counts = torch.bincount(values.flatten(), minlength=256)
    strange = outside(counts.nonzero().flatten().tolist(), len(classes.names))
    if strange is not None:
        faults.append(Fault(str(label), "outside-classes", "error", strange))
    height, width = values.shape
    if size is not None and size != (width, height):
        sizes = f"is {size[0]} x {size[1]} but its label {label} is {width} x {height}"
        faults.append(Fault(str(picture), "sizes-differ", "error", f"{sizes}; give both one size"))
    return faults, counts


def _fault(path: Path, kind: str, error: TokenstepError) -> Fault:
    return Fault(str(path), kind, "error", str(error).removeprefix(f"{path}: "))


def _splits_of(root: Path) -> list[str]:
    """The splits that a folder has, the usual ones first."""
    if not root.is_dir():
        raise TokenstepError(f"{root}: there is no such folder; give the data set's root")
    held = sorted(path.parent.name for path in root.glob("*/images") if path.is_dir())
    if not held:
        raise TokenstepError(f"{root}: has no split; make train/images, train/labels and so on")
    return sorted(held, key=lambda split: SPLITS.index(split) if split in SPLITS else len(SPLITS))


def _whole_split(folder: Path, classes: Classes) -> tuple[Part, list[Fault]]:
    """What can be read of a split, and what its lists of files lack."""
    pictures = sorted(path for path in (folder / "images").iterdir() if is_picture(path))
    faults = []
    if not pictures:
        text = "has no pictures; put NAME.jpg there and labels beside"
        faults.append(Fault(str(folder / "images"), "no-pictures", "warning", text))
    owner: dict[Path, Path] = {}
    for path in pictures:
        other = owner.setdefault(label_of(path, classes), path)
        if other is not path:
            text = f"has the label of {other.name} too; rename one of them"
            faults.append(Fault(str(path), "shared-label", "error", text))
    pairs = tuple((path, label) for label, path in owner.items() if label.is_file())
    labelled = {label for _, label in pairs}
    missing = [label for label in owner if label not in labelled]
    if missing and not pairs:
        error = TokenstepError(missing_labels(missing, len(owner), classes))
        faults.append(_fault(missing[0], "no-label", error))
    else:
        for label in missing:
            text = f"its label {label} is missing; a command that reads this split refuses it"
            faults.append(Fault(str(owner[label]), "no-label", "warning", text))
    paired = {path for path, _ in pairs}
    alone = [path for path in pictures if path not in paired]
    if (folder / "labels").is_dir():
        for label in sorted((folder / "labels").iterdir()):
            named = label.name.endswith(classes.label_suffix) and not label.name.startswith(".")
            if named and label not in owner:
                alone.append(label)
                text = "is the label of no picture; add the picture or remove the label"
                faults.append(Fault(str(label), "no-picture", "warning", text))
    least = len(classes.names) if folder.name == "train" else 2
    return Part(folder.name, folder, pairs, least, tuple(alone)), faults


def _twins(parts: Sequence[Part], faulty: Collection[str]) -> list[Fault]:
    """Pictures that lie in two splits byte for byte: what a model was shown it knows."""
    by_size: dict[int, list[tuple[Path, str]]] = defaultdict(list)
    for part in parts:
        for picture, _ in part.pairs:
            if str(picture) not in faulty:
                by_size[picture.stat().st_size].append((picture, part.title))
    faults = []
    first: dict[bytes, tuple[Path, str]] = {}
    for group in by_size.values():
        if len({title for _, title in group}) == 1:
            continue
        for picture, title in group:
            with picture.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            other, where = first.setdefault(digest, (picture, title))
            if where != title:
                text = f"is byte for byte {other} of {where}; keep it in one split"
                faults.append(Fault(str(picture), "twin", "warning", text))
    return faults
