"""Picture files and pictures in memory: found, read, brought to one form, and written whole."""

from __future__ import annotations

import glob
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tokenstep.errors import TokenstepError

MAX_PIXELS = 200_000_000
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
# What tokenstep writes beside others' pictures; a second run must not take it for input.
OUTPUTS = (".labels.png", ".overlay.jpg", ".tokens.jpg", ".figure.png")
# Named, so that no file of a stranger reaches PIL's rarer decoders (EPS runs a program).
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LIMIT = threading.Lock()
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}(\..*)?")  # names that `_temporary` gives

Finish = Callable[[Image.Image], Image.Image]
Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor


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
    elif glob.has_magic(path):
        named, fault = list(map(Path, glob.glob(path, recursive=True))), "matches no picture"
    else:
        raise TokenstepError(f"{path}: there is no such file; check the path")
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

    Transparency is laid over white; 16 bits are scaled to 8; of an animation the first frame is
    taken. Raises `TokenstepError` if the file cannot be read whole, or has more than `max_pixels`
    (told from the header, before any pixel is decoded).
    """
    return decode(Path(path), max_pixels, _upright_rgb)


def decode(path: Path, max_pixels: int, finish: Finish) -> Image.Image:
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
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as fault:
        limit = f"has more than {max_pixels} pixels"
        raise TokenstepError(f"{path}: {limit}; scale it down or cut it up") from fault
    except UnidentifiedImageError as fault:
        kinds = f"is no whole picture of a known kind; give {', '.join(_FORMATS)}"
        raise TokenstepError(f"{path}: {kinds}") from fault
    except Exception as fault:  # on damaged files PIL's decoders raise errors of nearly any type
        raise TokenstepError(f"{path}: {_undecodable(fault)}") from fault


def _undecodable(fault: Exception) -> str:
    reason = " ".join(str(fault).split()) or type(fault).__name__
    return f"cannot be decoded ({reason}); save it again as an 8-bit RGB PNG or JPEG"


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


def _check_file(path: Path) -> None:
    if os.path.isdir(path):
        raise TokenstepError(f"{path}: is a folder; name a picture file in it")
    if not os.path.isfile(path):
        raise TokenstepError(f"{path}: there is no such file; check the path")
    if os.path.getsize(path) == 0:
        raise TokenstepError(f"{path}: is an empty file; copy or save the picture again")


def _upright_rgb(image: Image.Image) -> Image.Image:
    with suppress(SyntaxError):  # of a damaged EXIF block, which then says no orientation
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
    """An RGB picture as a (3, h, w) uint8 tensor with its own memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def picture_tensor(picture: Picture) -> Tensor:
    """Any picture that users hand over as a (3, h, w) tensor, uint8 or float in 0..1.

    A path is read by `read_picture`, and a PIL image is treated as such a file is; an array is
    (h, w, 3) uint8, a tensor (3, h, w) uint8 or float in 0..1. Raises `TokenstepError` if the
    file cannot be read or the picture has another form, no pixels, or values out of range.
    """
    if isinstance(picture, str | os.PathLike):
        return to_tensor(read_picture(picture))
    if isinstance(picture, Image.Image):
        return _from_image(picture)
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    if isinstance(picture, Tensor):
        return _checked(picture)
    kinds = "give a path, a PIL image, an array or a tensor"
    raise TokenstepError(f"a picture of type {type(picture).__name__}: {kinds}")


def _from_image(image: Image.Image) -> Tensor:
    what = f"a PIL image of {image.width} x {image.height} pixels, mode {image.mode}"
    if 0 in image.size:
        raise TokenstepError(f"{what}: is empty; give at least 1 x 1")
    try:
        image.load()
        return to_tensor(_upright_rgb(image))
    except Exception as fault:  # a file may be behind it that is damaged, see `decode`
        raise TokenstepError(f"{what}: {_undecodable(fault)}") from fault


def _from_array(array: NDArray[np.uint8]) -> Tensor:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or array.size == 0:
        what = f"an array of {array.shape} {array.dtype}"
        raise TokenstepError(f"{what}: a picture is (h, w, 3) uint8, h and w at least 1")
    # A copy, since torch takes neither negative strides nor memory that it may not write to.
    return torch.from_numpy(np.array(array, order="C")).permute(2, 0, 1)


def _checked(tensor: Tensor) -> Tensor:
    what = f"a tensor of {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.ndim != 3 or tensor.shape[0] != 3 or tensor.numel() == 0:
        raise TokenstepError(f"{what}: a picture is (3, h, w), h and w at least 1")
    if tensor.dtype == torch.uint8:
        return tensor
    if tensor.dtype not in _FLOATS:
        raise TokenstepError(f"{what}: give uint8 in 0..255 or float in 0..1")
    low, high = torch.stack(tensor.aminmax()).tolist()
    # So much may a resize's rounding err. NaN is within no bounds.
    if not -1e-3 <= low <= high <= 1 + 1e-3:
        raise TokenstepError(f"{what} has values {low:g} to {high:g}: give uint8 or float in 0..1")
    return tensor


def require_writable(folder: Path) -> None:
    """Make a folder if needed; raises `TokenstepError` if it does not take files."""
    with _write_faults(folder), _temporary(folder, ""):
        pass


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: `write` gets a temporary path that then takes its place.

    The temporary file lies in the same folder, which is made if needed, and has the same suffix.
    Raises `TokenstepError` if the folder or the disk does not take the file.
    """
    with _write_faults(path), _temporary(path.parent, path.suffix) as temporary:
        write(temporary)
        os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all; raises as `write_whole` does."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sweep(folder: Path) -> None:
    """Remove what `write_whole` left in a folder when its process was killed in the middle."""
    for path in folder.glob(".*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def _temporary(folder: Path, suffix: str) -> Iterator[Path]:
    """Make an empty file that is hidden and gone at the end, if it has not been moved."""
    temporary = folder / f".{uuid.uuid4().hex}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    temporary.touch()  # an unwritable folder shows here, whatever a writer would raise for it
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _write_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        reason = f"cannot be written ({fault.strerror or fault})"
        remedy = "choose another output folder or free some space"
        raise TokenstepError(f"{path}: {reason}; {remedy}") from fault
