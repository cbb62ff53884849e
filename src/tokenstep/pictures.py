"""Picture files and pictures in memory: found, read, brought to one form, and written whole."""

from __future__ import annotations

import glob
import os
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tokenstep.errors import TokenstepError

MAX_PIXELS = 200_000_000
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
# Named, so that no file of a stranger reaches PIL's rarer decoders (EPS runs a program).
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
_SAVE_AGAIN = "save it again as an 8-bit RGB PNG or JPEG"
_LIMIT = threading.Lock()


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
        pictures = [p for p in sorted(Path(path).rglob("*")) if is_picture(p)]
        fault = "is a folder without pictures"
    elif os.path.exists(path):
        return [Path(path)]
    elif glob.has_magic(path):
        pictures = [p for p in map(Path, sorted(glob.glob(path, recursive=True))) if is_picture(p)]
        fault = "matches no picture"
    else:
        raise TokenstepError(f"{path}: there is no such file; check the path")
    if not pictures:
        kinds = " ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise TokenstepError(f"{path}: {fault}; pictures end in one of {kinds}")
    return pictures


def is_picture(path: Path) -> bool:
    # A name with a leading dot is a part-written file of ours, or a system's own note.
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def read_picture(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture file as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparency is laid over white; 16 bits are scaled to 8; of an animation the first frame is
    taken. Raises `TokenstepError` if the file cannot be read whole, or has more than `max_pixels`
    (told from the header, before any pixel is decoded).
    """
    return decode(Path(path), max_pixels, _upright_rgb)


def decode(path: Path, max_pixels: int, finish: Callable[[Image.Image], Image.Image]) -> Image.Image:
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
