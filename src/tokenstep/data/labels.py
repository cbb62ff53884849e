"""Label files: class indices as they are stored, and what lies where a label is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenstep.data.pictures import MAX_PIXELS, decode
from tokenstep.errors import TokenstepError

IGNORE = 255  # the label of a pixel that has no class
LABEL_AGAIN = "save its class indices again as a PNG of one channel"


class WrongKind(TokenstepError):
    """A label that can be decoded but is no PNG of class indices."""


def read_indices(path: Path) -> NDArray[np.uint8]:
    """Read a label file as the (h, w) uint8 indices that it stores.

    It is a PNG with one channel of 1, 2, 4 or 8 bits; of a palette the indices count, not the
    colours. Raises `WrongKind` if the file is anything else, whatever its name, and
    `TokenstepError` if it cannot be read.
    """
    image = decode(path, MAX_PIXELS, _with_format, remedy=LABEL_AGAIN)
    if image.format != "PNG":
        raise WrongKind(f"{path}: is a {image.format} file; save class indices as a PNG")
    if image.mode not in ("1", "L", "P"):
        remedy = "save class indices as one 8-bit channel or a palette PNG"
        raise WrongKind(f"{path}: label has pixels of kind {image.mode}; {remedy}")
    values = np.array(image).astype(np.uint8)
    if image.mode == "L":
        # PIL spreads 2 and 4 bits over 0 to 255 by a whole factor, which is taken back here.
        values //= np.uint8(255 // (2 ** _grey_depth(path) - 1))
    return values


def _with_format(image: Image.Image) -> Image.Image:
    kept = image.copy()
    kept.format = image.format
    return kept


def _grey_depth(path: Path) -> int:
    """Bits of a grey PNG's pixel: byte 24, where the header comes first, as it must."""
    with path.open("rb") as file:
        head = file.read(25)
    if head[12:16] != b"IHDR":
        raise WrongKind(f"{path}: is a PNG whose header does not come first; {LABEL_AGAIN}")
    return head[24]


def outside(present: Sequence[int], num_classes: int) -> str | None:
    """What is wrong with the indices that a label holds; None if each is a class or `IGNORE`."""
    strange = [value for value in present if value >= num_classes and value != IGNORE]
    if not strange:
        return None
    values = ", ".join(map(str, strange[:8])) + (", ..." if len(strange) > 8 else "")
    rule = f"use 0 to {num_classes - 1}, or {IGNORE} for no class"
    return f"label holds {values}, outside the classes; {rule}"


def instead(stems: Sequence[str], folder: Path, suffix: str, *, all_missing: bool) -> str:
    """What a split's `folder` of labels holds in place of ``STEM + suffix``, and the remedy.

    `stems` are the pictures without a label; `all_missing` says that no other has one either.
    """
    if not folder.is_dir():
        return f"there is no folder {folder}; put the labels there"
    others = {f"{path.stem}{suffix}" for path in (folder.parent / "images").iterdir()}
    files = (path.name for path in folder.iterdir() if path.is_file())
    held = sorted(name for name in files if name not in others and not name.startswith("."))
    found = _endings(stems, held)
    if not found and all_missing and held:
        return f"there is {held[0]} instead; name labels as their pictures, as {stems[0]}{suffix}"
    if not found:
        return "add it or remove the picture"
    stem = next(stem for stem in stems if f"{stem}{found[0]}" in held)
    there = f"there is {' and '.join(stem + ending for ending in found[:3])} instead"
    if not found[0].lower().endswith(".png"):
        return f"{there}; save its class indices as the PNG {stem}{suffix}"
    if not all_missing:
        return f"{there}; rename it to {stem}{suffix}"
    choice = " or ".join(f'"{ending}"' for ending in found[:3])
    return f'{there}; set "label_suffix": {choice} in classes.json'


def _endings(stems: Sequence[str], held: Sequence[str]) -> list[str]:
    """The endings that most of `stems` have in the file names `held`, PNG ones first.

    Names that merely begin alike (``a1`` and ``a10.png``) lose, since their endings differ. A few
    stems tell as much as all.
    """
    count = Counter(
        name[len(stem) :] for stem in stems[:20] for name in held if name.startswith(stem)
    )
    most = [ending for ending, times in count.items() if times == max(count.values())]
    pngs = [ending for ending in most if ending.lower().endswith(".png")]
    return sorted(pngs or most, key=len)
