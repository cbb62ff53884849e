"""Picture files and pictures in memory: found, read, brought to one form, and written whole."""

from __future__ import annotations

import glob
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tokenstep.data.arrays import array_as_image, from_array, from_tensor
from tokenstep.data.rgb import (
    choose_page,
    is_dark_or_clear,
    stored,
    swap_bytes,
    upright_rgb,
    without_xmp,
)
from tokenstep.errors import PictureWarning, TokenstepError

MAX_PIXELS = 200_000_000
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
# What tokenstep writes beside others' pictures; a second run must not take it for input.
OUTPUTS = (".labels.png", ".overlay.jpg", ".tokens.jpg", ".figure.png")
# Named, so that no file of a stranger reaches PIL's rarer decoders (EPS runs a program).
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how one begins, of 4 GiB or more too
PICTURE_AGAIN = "save it again as an 8-bit RGB PNG or JPEG"
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # a path keeps one slash of two
_LIMIT = threading.Lock()

Finish = Callable[[Image.Image], Image.Image]
Picture = str | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor


def find_pictures(paths: Sequence[str | Path]) -> tuple[list[Path], dict[str, str]]:
    """List the pictures of files, folders (searched to the bottom) and globs, each once.

    The order is that of `paths`; a folder's or glob's pictures are sorted, and leave out hidden
    files and what tokenstep wrote. A file named outright is taken whatever its name. The second
    answer says, for each of `paths` that is missing or holds no picture, why, in one line.
    """
    found: dict[str, Path] = {}
    faults: dict[str, str] = {}
    for path in map(str, paths):
        try:
            for picture in _expand(path):
                found.setdefault(os.path.realpath(picture), picture)
        except TokenstepError as fault:
            faults[path] = str(fault)
    return list(found.values()), faults


def _expand(path: str) -> list[Path]:
    if os.path.isdir(path):
        named, fault = list(Path(path).rglob("*")), "is a folder without pictures"
    elif os.path.exists(path):
        return [Path(path)]
    elif _ADDRESS.match(path):
        raise TokenstepError(_missing(path))
    elif glob.has_magic(path):
        named, fault = list(map(Path, glob.glob(path, recursive=True))), "matches no picture"
    else:
        raise TokenstepError(_missing(path))
    pictures = [p for p in sorted(named) if is_picture(p) and not p.name.endswith(OUTPUTS)]
    if not pictures:
        kinds = " ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise TokenstepError(f"{path}: {fault}; pictures end in one of {kinds}")
    return pictures


def is_picture(path: Path) -> bool:
    """Whether a path found in a folder is a picture file; hidden ones may be part-written."""
    named = path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    return named and os.path.isfile(path)  # Path.is_file raises in folders that may only be listed


def read_picture(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture file as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparency is laid over white; 16 bits are scaled to 8, by the range that the file's tags
    state; of an animation the first frame is taken, of a TIFF the first page that is no thumbnail.
    Raises `TokenstepError` if the file cannot be read whole, or has more than `max_pixels` (told
    from the header, before any pixel is decoded). Warns by `PictureWarning` of a picture that is
    nearly black since its range is not known; `info["warnings"]` of the picture keeps the line.
    """
    _check_file(os.fspath(path))  # as it is given: a path has one slash where an address has two
    path, notes, lower = Path(path), list[str](), None
    with _opened(path, max_pixels) as image:
        of = stored(image)
        _load(image, max_pixels)
        if of.wide and is_dark_or_clear(image):
            with _opened(path, max_pixels) as again:
                if swap_bytes(again):
                    _load(again, max_pixels)
                    lower = again
        picture = upright_rgb(image, of, notes, lower=lower)
    for note in notes:
        picture.info["warnings"] = [f"{path}: {note}"]
        warnings.warn(f"{path}: {note}", PictureWarning, stacklevel=2)
    return picture


def picture_size(
    path: Path, *, max_pixels: int = MAX_PIXELS, remedy: str = PICTURE_AGAIN
) -> tuple[int, int]:
    """Width and height of a picture file as it is stored, from its header; raises as reading."""
    with _opened(path, max_pixels, remedy) as image:
        return image.size


def decode(path: Path, max_pixels: int, finish: Finish, *, remedy: str) -> Image.Image:
    """Open, check the size, decode and `finish` one file; any fault is one `TokenstepError`.

    `remedy` is what to do about a file that cannot be decoded.
    """
    with _opened(path, max_pixels, remedy) as image:
        _load(image, max_pixels)
        return finish(image)


@contextmanager
def _opened(path: Path, max_pixels: int, remedy: str = PICTURE_AGAIN) -> Iterator[Image.Image]:
    """Open a file and check its size; any fault of it, later ones too, is a `TokenstepError`."""
    _check_file(str(path))
    try:
        with _pixel_limit(max_pixels):
            image = Image.open(path, formats=_FORMATS)
        with image:
            choose_page(image)
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as fault:
        limit = f"has more than {max_pixels} pixels"
        raise TokenstepError(f"{path}: {limit}; scale it down or cut it up") from fault
    except UnidentifiedImageError as fault:
        raise TokenstepError(f"{path}: {_unidentified(path, remedy)}") from fault
    except TokenstepError:
        raise
    except Exception as fault:  # on damaged files PIL's decoders raise errors of nearly any type
        raise TokenstepError(f"{path}: {_undecodable(fault, remedy)}") from fault


def _load(image: Image.Image, max_pixels: int) -> None:
    # Of the formats here, TIFF alone asks PIL's limit once more when it decodes.
    with _pixel_limit(max_pixels) if image.format == "TIFF" else nullcontext(), without_xmp(image):
        image.load()


def _undecodable(fault: Exception, remedy: str = PICTURE_AGAIN) -> str:
    reason = " ".join(str(fault).split()) or type(fault).__name__
    return f"cannot be decoded ({reason}); {remedy}"


def _unidentified(path: Path, remedy: str) -> str:
    with path.open("rb") as file:
        is_tiff = file.read(4) in _TIFF
    if is_tiff:
        known = "save it as 8-bit or 16-bit RGB" if remedy == PICTURE_AGAIN else remedy
        return f"is a TIFF of a kind that cannot be decoded; {known}"
    kinds = f"give {', '.join(_FORMATS)}" if remedy == PICTURE_AGAIN else remedy
    return f"is no whole picture of a known kind; {kinds}"


@contextmanager
def _pixel_limit(max_pixels: int) -> Iterator[None]:
    """Put our limit in the place of PIL's 89 million: it warns above it and errs above twice.

    PIL keeps one limit for the whole process: it is ours for the moment of a call only.
    """
    with _LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _check_file(path: str) -> None:
    if os.path.isdir(path):
        raise TokenstepError(f"{path}: is a folder; name a picture file in it")
    if not os.path.isfile(path):
        raise TokenstepError(_missing(path))
    if os.path.getsize(path) == 0:
        raise TokenstepError(f"{path}: is an empty file; copy or save it again")


def _missing(path: str) -> str:
    if _ADDRESS.match(path):
        return f"{path}: is an address, not a file; download it and give the file's path"
    return f"{path}: there is no such file; check the path"


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as a (3, h, w) uint8 tensor with its own memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def picture_tensor(picture: Picture) -> Tensor:
    """Any picture that users hand over as a (3, h, w) tensor, uint8 or float in 0..1.

    A path is read by `read_picture`, and a PIL image is treated as such a file is. An array is
    (h, w), (h, w, 3) or (h, w, 4), uint8 or float in 0..1, and what a PIL image or a tensor of
    these values is; a tensor is (3, h, w), uint8 or float in 0..1. Raises `TokenstepError` if the
    file cannot be read or the picture has another form, no pixels, or values out of range.
    """
    if isinstance(picture, str | os.PathLike):
        return to_tensor(read_picture(picture))
    if isinstance(picture, np.ndarray):
        image = array_as_image(picture)
        return from_array(picture) if image is None else _from_image(image)
    if isinstance(picture, Image.Image):
        return _from_image(picture)
    if isinstance(picture, Tensor):
        return from_tensor(picture)
    kinds = "give a path, a PIL image, an array or a tensor, or a list of them"
    if isinstance(picture, bytes | bytearray | memoryview):
        kinds = "give a path, or PIL's Image.open(io.BytesIO(data))"
    raise TokenstepError(f"a picture of type {type(picture).__name__}: {kinds}")


def _from_image(image: Image.Image) -> Tensor:
    what = f"a PIL image of {image.width} x {image.height} pixels, mode {image.mode}"
    if 0 in image.size:
        raise TokenstepError(f"{what}: is empty; give at least 1 x 1")
    notes: list[str] = []
    try:
        of = stored(image)
        with without_xmp(image):
            image.load()
        tensor = to_tensor(upright_rgb(image, of, notes))
    except Exception as fault:  # a file may be behind it that is damaged, see `decode`
        raise TokenstepError(f"{what}: {_undecodable(fault)}") from fault
    for note in notes:
        warnings.warn(f"{what}: {note}", PictureWarning, stacklevel=3)
    return tensor
