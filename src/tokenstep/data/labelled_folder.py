"""Label maps, classes and labelled folders.

A labelled folder is ``root/{train,val,test}/{images/NAME.jpg,labels/NAME.png}`` with
``root/classes.json``; a label is one channel of class indices in a PNG, 255 where there is none.
"""

from __future__ import annotations

import colorsys
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenstep.data.labels import IGNORE as IGNORE
from tokenstep.data.labels import LABEL_AGAIN, instead, outside, read_indices
from tokenstep.data.pictures import is_picture, picture_size, read_picture, to_tensor
from tokenstep.errors import TokenstepError
from tokenstep.require import require_classes

# Okabe and Ito's colours: told apart with any common colour blindness.
_FIRST_COLOURS = (
    *((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)),
    *((86, 180, 233), (213, 94, 0), (240, 228, 66), (150, 150, 150)),
)


@dataclass(frozen=True)
class Classes:
    """The classes of a data set: 1 to 255 distinct names, each with an RGB colour (0 to 255).

    `allow_empty_classes` lets classes without a pixel pass; `label_suffix` is what follows a
    picture's stem in the name of its label, and ends in ``.png`` in any case.
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    allow_empty_classes: bool = False
    label_suffix: str = ".png"

    def __post_init__(self) -> None:
        """Raise `TokenstepError` where this does not make a set of classes."""
        require_classes(self.names, self.palette)
        allow, suffix = self.allow_empty_classes, self.label_suffix
        if type(allow) is not bool:
            raise TokenstepError(f"allow_empty_classes is {allow!r}; write true or false")
        if not isinstance(suffix, str) or not suffix.lower().endswith(".png"):
            raise TokenstepError(f'label_suffix is {suffix!r}; labels are PNGs, as "_mask.png"')
        if "/" in suffix or "\\" in suffix:
            raise TokenstepError(f"label_suffix is {suffix!r}; give the end of a name, no folder")


def default_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """`count` (to 255) distinct RGB colours; the first eight suit colour-blind eyes as well."""
    colours = list(_FIRST_COLOURS)
    for i in range(count - len(colours)):
        # The golden angle spreads hues; lightness varies too, as hue alone fails the colour-blind.
        red, green, blue = colorsys.hls_to_rgb(i * 0.618034 % 1, (0.35, 0.6, 0.8)[i % 3], 0.75)
        colours.append((round(red * 255), round(green * 255), round(blue * 255)))
    return tuple(colours[:count])


def read_classes(root: Path) -> Classes:
    """Read ``root/classes.json``: names, and a palette or the default one.

    Raises `TokenstepError` if the file is missing, not JSON, or does not describe classes.
    """
    path = Path(root) / "classes.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as fault:
        remedy = 'write {"names": [...], "palette": [[r, g, b], ...]} there'
        raise TokenstepError(f"{path}: cannot be read ({fault.strerror}); {remedy}") from fault
    except (ValueError, RecursionError) as fault:
        raise TokenstepError(f"{path}: is not JSON ({fault}); correct it") from fault
    names = content.get("names") if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TokenstepError(f'{path}: has no list of names; write {{"names": ["sky", ...]}}')
    if content.get("ignore_index", IGNORE) != IGNORE:
        index = content["ignore_index"]
        raise TokenstepError(f"{path}: ignore_index is {index}; relabel those pixels as {IGNORE}")
    palette = content.get("palette", default_palette(len(names)))
    if not isinstance(palette, list | tuple) or not all(map(_is_colour, palette)):
        raise TokenstepError(f"{path}: palette is no list of [red, green, blue]; correct it")
    allow = content.get("allow_empty_classes", False)
    suffix = content.get("label_suffix", ".png")
    try:
        return Classes(tuple(names), tuple(tuple(colour) for colour in palette), allow, suffix)
    except TokenstepError as fault:
        raise TokenstepError(f"{path}: {fault}") from fault


def _is_colour(colour: object) -> bool:
    if not isinstance(colour, list | tuple):
        return False
    return len(colour) == 3 and all(type(value) is int for value in colour)


def read_label(path: str | Path, num_classes: int) -> Tensor:
    """Read a label map as an (h, w) uint8 tensor of class indices, `IGNORE` where there is none.

    Of a palette picture the indices count, not the colours. Raises `TokenstepError` if the file
    cannot be read, is no PNG of one channel of 8 bits or less, or holds values outside the classes.
    """
    label = read_indices(Path(path))
    fault = outside(np.unique(label).tolist(), num_classes)
    if fault is not None:
        raise TokenstepError(f"{path}: {fault}")
    return torch.from_numpy(label)


JointTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class LabelledFolder(Dataset[tuple[Tensor, Tensor]]):
    """Pictures (3, h, w) uint8 with their label maps (h, w) uint8, from one split of a folder.

    `names` picks pictures by stem: patterns such as ``t7_*``, and ``!t7_*`` for all but those.
    `transform` gets (image, label) and its answer is the item. `cache` keeps what was decoded in
    memory, so a transform must not change its input. Construction raises `TokenstepError` for a
    missing folder, classes, pictures or labels; reading an item does for a damaged file or a
    label of another size than its picture. `title` is the split and its patterns, to print.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        names: Sequence[str] | None = None,
        transform: JointTransform | None = None,
        cache: bool = False,
    ) -> None:
        self.root = Path(root)
        self.title = " ".join([split, *(name for name in names or () if name != "*")])
        folder = _split_folder(self.root, split)
        self.classes = read_classes(self.root)
        self.paths = _pick(_pictures_of(folder / "images"), names, folder)
        self.labels = [label_of(path, self.classes) for path in self.paths]
        missing = [path for path in self.labels if not path.is_file()]
        if missing:
            raise TokenstepError(missing_labels(missing, len(self.labels), self.classes))
        self.transform = transform
        self._cache: dict[int, tuple[Tensor, Tensor]] | None = {} if cache else None

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.paths)

    def thinned(self, count: int) -> LabelledFolder:
        """The same with at most `count` pictures, evenly spread over the folder."""
        count = min(max(count, 1), len(self))
        kept = np.unique(np.linspace(0, len(self) - 1, count).round().astype(int))
        thin = copy.copy(self)
        thin.paths = [self.paths[index] for index in kept]
        thin.labels = [self.labels[index] for index in kept]
        thin._cache = None if self._cache is None else {}
        return thin

    def median_long_side(self) -> int:
        """The median long side in pixels of at most 1000 pictures, as their labels' headers say."""
        labels = self.thinned(1000).labels
        sizes = [picture_size(path, remedy=LABEL_AGAIN) for path in labels]
        return round(float(np.median([max(size) for size in sizes])))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All items in order."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Picture and label `index`, transformed."""
        if self._cache is None:
            pair = self._read_pair(index)
        else:
            pair = self._cache[index] = self._cache.get(index) or self._read_pair(index)
        return pair if self.transform is None else self.transform(*pair)

    def _read_pair(self, index: int) -> tuple[Tensor, Tensor]:
        image = to_tensor(read_picture(self.paths[index]))
        label = read_label(self.labels[index], len(self.classes.names))
        if image.shape[1:] != label.shape:
            (h, w), (label_h, label_w) = image.shape[1:], label.shape
            sizes = f"{w} x {h} but its label {self.labels[index]} is {label_w} x {label_h}"
            raise TokenstepError(f"{self.paths[index]}: is {sizes}; give both one size")
        return image, label


def label_of(picture: Path, classes: Classes) -> Path:
    """Where the label of a picture ``SPLIT/images/NAME.jpg`` lies."""
    return picture.parent.parent / "labels" / f"{picture.stem}{classes.label_suffix}"


def missing_labels(missing: Sequence[Path], pictures: int, classes: Classes) -> str:
    """What to say of labels of a split that are not there, of so many pictures."""
    suffix, everything = classes.label_suffix, len(missing) == pictures
    stems = [path.name.removesuffix(suffix) for path in missing]
    there = instead(stems, missing[0].parent, suffix, all_missing=everything)
    return f"{missing[0]}: missing ({len(missing)} of {pictures} pictures have no label); {there}"


def _split_folder(root: Path, split: str) -> Path:
    if not root.is_dir():
        raise TokenstepError(f"{root}: there is no such folder; give the data set's root")
    if not (root / split / "images").is_dir():
        splits = sorted(path.parent.name for path in root.glob("*/images"))
        known = f"choose from {', '.join(splits)}" if splits else "make SPLIT/images, SPLIT/labels"
        raise TokenstepError(f"{root}: has no split {split!r}; {known}")
    return root / split


def _pictures_of(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if is_picture(path))
    if not paths:
        raise TokenstepError(f"{folder}: has no pictures; put NAME.jpg there and labels beside")
    by_stem: dict[str, Path] = {}
    for path in paths:
        other = by_stem.setdefault(path.stem, path)
        if other is not path:
            raise TokenstepError(f"{path}: has the label of {other.name} too; rename one of them")
    return paths


def _pick(paths: list[Path], names: Sequence[str] | None, folder: Path) -> list[Path]:
    if isinstance(names, str):
        raise TokenstepError(f'names is the text {names!r}; give a list such as ["{names}"]')
    wanted = [name for name in names or () if not name.startswith("!")] or ["*"]
    barred = [name[1:] for name in names or () if name.startswith("!")]
    picked = [
        path
        for path in paths
        if any(fnmatchcase(path.stem, name) for name in wanted)
        and not any(fnmatchcase(path.stem, name) for name in barred)
    ]
    if not picked:
        example = f"one is called {paths[0].stem}"
        raise TokenstepError(f"{folder}: names {list(names or ())} picks no picture; {example}")
    return picked
