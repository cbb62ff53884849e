"""Pictures, labels and labelled folders: what is read from disk, and how files are written.

A labelled folder is ``root/{train,val,test}/{images/NAME.jpg,labels/NAME.png}`` with
``root/classes.json``; a label is one 8-bit channel of class indices, 255 where there is none.
"""

from __future__ import annotations

import colorsys
import glob
import json
import os
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from tokenstep.errors import TokenstepError

IGNORE = 255  # the label of a pixel that has no class
MAX_PIXELS = 200_000_000
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
# Named, so that no file of a stranger reaches PIL's rarer decoders (EPS runs a program).
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
_SAVE_AGAIN = "save it again as an 8-bit RGB PNG or JPEG"
_LIMIT = threading.Lock()
# Okabe and Ito's colours: told apart with any common colour blindness.
_FIRST_COLOURS = (
    *((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)),
    *((86, 180, 233), (213, 94, 0), (240, 228, 66), (150, 150, 150)),
)


@dataclass(frozen=True)
class Classes:
    """The classes of a data set: 1 to 255 distinct names, each with an RGB colour (0 to 255)."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        """Raise `TokenstepError` where names and colours do not make a set of classes."""
        if not 1 <= len(self.names) <= IGNORE:
            raise TokenstepError(f"{len(self.names)} class names; give 1 to {IGNORE}")
        if not all(name.strip() for name in self.names):
            raise TokenstepError("a class name is empty; give each class a name")
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise TokenstepError(f"class name {twice!r} comes twice; rename one")
        if len(self.palette) != len(self.names):
            counts = f"{len(self.palette)} colours for {len(self.names)} names"
            raise TokenstepError(f"{counts}; give one each, or no palette")
        for colour in self.palette:
            if not all(0 <= value <= 255 for value in colour):
                raise TokenstepError(f"palette has {list(colour)}; give values from 0 to 255")


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
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        remedy = 'write {"names": [...], "palette": [[r, g, b], ...]} there'
        raise TokenstepError(f"{path}: cannot be read ({fault.strerror}); {remedy}") from fault
    except ValueError as fault:
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
    try:
        return Classes(tuple(names), tuple(tuple(colour) for colour in palette))
    except TokenstepError as fault:
        raise TokenstepError(f"{path}: {fault}") from fault


def _is_colour(colour: object) -> bool:
    if not isinstance(colour, list | tuple):
        return False
    return len(colour) == 3 and all(type(value) is int for value in colour)


def find_pictures(paths: Sequence[str | Path]) -> list[Path]:
    """List the pictures of files, folders (searched to the bottom) and globs, each once.

    The order is that of `paths`; a folder's or glob's pictures are sorted. A file named outright
    is taken whatever its suffix. Raises `TokenstepError` for a missing file, an empty glob and a
    folder without pictures.
    """
    found: dict[str, Path] = {}
    for path in paths:
        for picture in _expand(str(path)):
            found.setdefault(os.path.realpath(picture), picture)
    return list(found.values())


def _expand(path: str) -> list[Path]:
    if os.path.isdir(path):
        pictures = [p for p in sorted(Path(path).rglob("*")) if _is_picture(p)]
        fault = "is a folder without pictures"
    elif os.path.exists(path):
        return [Path(path)]
    elif glob.has_magic(path):
        pictures = [p for p in map(Path, sorted(glob.glob(path, recursive=True))) if _is_picture(p)]
        fault = "matches no picture"
    else:
        raise TokenstepError(f"{path}: there is no such file; check the path")
    if not pictures:
        kinds = " ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise TokenstepError(f"{path}: {fault}; pictures end in one of {kinds}")
    return pictures


def _is_picture(path: Path) -> bool:
    # A name with a leading dot is a part-written file of ours, or a system's own note.
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def read_picture(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture file as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparency is laid over white; 16 bits are scaled to 8; of an animation the first frame is
    taken. Raises `TokenstepError` if the file cannot be read whole, or has more than `max_pixels`
    (told from the header, before any pixel is decoded).
    """
    return _read(Path(path), max_pixels, _upright_rgb)


def _read(path: Path, max_pixels: int, finish: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Open, check the size, decode and `finish` one file; any fault is one `TokenstepError`."""
    _check_file(path)
    try:
        with _pixel_limit(max_pixels):
            image = Image.open(path, formats=_FORMATS)
        with image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            # Of the formats here, TIFF alone asks PIL's limit once more when it decodes.
            with _pixel_limit(max_pixels) if image.format == "TIFF" else nullcontext():
                image.load()
            return finish(image)
    except Image.DecompressionBombError as fault:
        limit = f"has more than {max_pixels} pixels"
        raise TokenstepError(f"{path}: {limit}; scale it down or cut it up") from fault
    except UnidentifiedImageError as fault:
        kinds = f"is no whole picture of a known kind; give {', '.join(_FORMATS)}"
        raise TokenstepError(f"{path}: {kinds}") from fault
    except Exception as fault:  # on damaged files PIL's decoders raise errors of nearly any type
        reason = " ".join(str(fault).split()) or type(fault).__name__
        raise TokenstepError(f"{path}: cannot be decoded ({reason}); {_SAVE_AGAIN}") from fault


@contextmanager
def _pixel_limit(max_pixels: int) -> Iterator[None]:
    """Put our limit in the place of PIL's, which warns from 89 million pixels and errs at twice.

    PIL keeps one limit for the whole process: it is ours for the moment of a call only.
    """
    with _LIMIT, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        # PIL errs above twice its limit.
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, (max_pixels + 1) // 2
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _check_file(path: Path) -> None:
    if os.path.isdir(path):
        raise TokenstepError(f"{path}: is a folder; name a picture file in it")
    if not os.path.isfile(path):
        raise TokenstepError(f"{path}: there is no such file; check the path")
    if os.path.getsize(path) == 0:
        raise TokenstepError(f"{path}: is an empty file; copy or save the picture again")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers of unknown range")
    if image.mode.startswith("I;16"):  # PIL's own conversion differs by version: clips, or shifts
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """The picture as a (3, h, w) uint8 tensor, RGB."""
    pixels = np.array(image.convert("RGB"))  # (h, w, 3), a copy that torch may write to
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


Picture = str | Path | Image.Image | NDArray[np.uint8] | Tensor


def picture_tensor(picture: Picture) -> Tensor:
    """Any picture that users hand over as ``(3, h, w)``, uint8 or float in 0..1.

    Raises:
        TokenstepError: the file cannot be read, or the array has another shape or type.
    """
    if isinstance(picture, (str, Path)):
        return to_tensor(read_picture(picture))
    if isinstance(picture, Image.Image):
        return to_tensor(picture.convert("RGB"))
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise TokenstepError(
                f"an array must be (height, width, 3) uint8, got {picture.shape} {picture.dtype}"
            )
        return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise TokenstepError(f"a tensor must be (3, height, width), got {tuple(picture.shape)}")
    return picture


def read_label(path: str | Path, num_classes: int) -> Tensor:
    """Read a label map as an (h, w) uint8 tensor of class indices, `IGNORE` where there is none.

    Of a palette picture the indices count, not the colours. Raises `TokenstepError` if the file
    cannot be read, is not one 8-bit channel, or holds values outside the classes.
    """
    image = _read(Path(path), MAX_PIXELS, lambda image: image.copy())
    if image.mode not in ("L", "P"):
        remedy = "save class indices as one 8-bit channel or a palette PNG"
        raise TokenstepError(f"{path}: label has pixels of kind {image.mode}; {remedy}")
    label = np.array(image)
    outside = np.unique(label[(label >= num_classes) & (label != IGNORE)])
    if outside.size:
        values = ", ".join(map(str, outside[:8])) + (", ..." if outside.size > 8 else "")
        rule = f"use 0 to {num_classes - 1}, or {IGNORE} for no class"
        raise TokenstepError(f"{path}: label holds {values}, outside the classes; {rule}")
    return torch.from_numpy(label)


JointTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class LabelledFolder(Dataset[tuple[Tensor, Tensor]]):
    """Pictures (3, h, w) uint8 with their label maps (h, w) uint8, from one split of a folder.

    `names` picks pictures by stem: patterns such as ``t7_*``, and ``!t7_*`` for all but those.
    `transform` gets (image, label) and its answer is the item. `cache` keeps what was decoded in
    memory, so a transform must not change its input. Construction raises `TokenstepError` for a
    missing folder, classes, pictures or labels; reading an item does for a damaged file or a
    label of another size than its picture.
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
        folder = _split_folder(Path(root), split)
        self.classes = read_classes(Path(root))
        self.paths = _pick(_pictures_of(folder / "images"), names, folder)
        self.labels = [folder / "labels" / f"{path.stem}.png" for path in self.paths]
        missing = [path for path in self.labels if not path.is_file()]
        if missing:
            count = f"{len(missing)} of {len(self.paths)} pictures have no label"
            raise TokenstepError(f"{missing[0]}: missing ({count}); add it or remove the picture")
        self.transform = transform
        self._cache: dict[int, tuple[Tensor, Tensor]] | None = {} if cache else None

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.paths)

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


def _split_folder(root: Path, split: str) -> Path:
    if not root.is_dir():
        raise TokenstepError(f"{root}: there is no such folder; give the data set's root")
    if not (root / split / "images").is_dir():
        splits = sorted(path.parent.name for path in root.glob("*/images"))
        known = f"choose from {', '.join(splits)}" if splits else "make SPLIT/images, SPLIT/labels"
        raise TokenstepError(f"{root}: has no split {split!r}; {known}")
    return root / split


def _pictures_of(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if _is_picture(path))
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


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all: `write` gets a temporary path that then takes its place.

    The temporary file lies in the same folder, which is made if needed, and has the same suffix.
    Raises `TokenstepError` if the folder or the disk does not take the file.
    """
    temporary = path.parent / f".{uuid.uuid4().hex}{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # an unwritable folder shows here, whatever `write` would raise for it
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as fault:
        reason = fault.strerror or str(fault)
        remedy = "choose another output folder or free some space"
        raise TokenstepError(f"{path}: cannot be written ({reason}); {remedy}") from fault


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_text(text)

    write_whole(path, write)
