"""From an opened picture file to what a viewer shows of it: upright 8-bit RGB.

PIL decodes the formats. What is set right here is what it leaves as it lies in the file, or takes
otherwise than viewers do: 16-bit values with their range, polarity and transparency, bands that
nobody called alpha, reduced pages of a TIFF, and orientations outside EXIF.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.ExifTags import Base

# 16-bit values that all lie below are taken for those of 10- to 14-bit data.
DARK = 2**14
_XMP = ("xmp", "XML:com.adobe.xmp")
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_WHOLE = ("RGB;16", "RGBX;16", "RGBA;16")  # modes that PIL decodes in either order of bytes
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file says of its pixels that a decoded image no longer does.

    ``tags`` are those of a TIFF page; ``wide``: its colours have 16 bits, of which PIL keeps 8;
    ``grey_bits``: those of a PNG's grey values where PIL spreads 2 or 4 of them to 8, else 8.
    """

    tags: Mapping[int, Any]
    wide: bool
    grey_bits: int = 8

    def numbers(self, tag: int) -> list[float]:
        """The values of a tag, none if it is missing or holds no numbers."""
        value = self.tags.get(tag, ())
        values = value if isinstance(value, tuple) else (value,)
        return [float(one) for one in values if isinstance(one, Real)]


def stored(image: Image.Image) -> Stored:
    """What the file of an image says that is not decoded yet; of any other, what is left of it.

    Raises:
        ValueError: PIL would decode it as something else, without a word.
    """
    tiles = getattr(image, "tile", [])
    modes = {_raw_mode(one.args) for one in tiles}
    wide = any(";16" in mode for mode in modes)
    clear = image.info.get("transparency")
    wide = wide or (isinstance(clear, tuple) and max(clear) > 255)
    grey_bits = 2 if modes == {"L;2"} else 4 if modes == {"L;4"} else 8
    tags = getattr(image, "tag_v2", {})
    of = Stored(tags, wide and image.mode in ("RGB", "RGBA"), grey_bits)
    if any(one.codec_name == "raw" for one in tiles) and _loses_planes(of, image.mode):
        raise ValueError("its bands are uncompressed planes of another kind than 8-bit colours")
    return of


def _loses_planes(of: Stored, mode: str) -> bool:
    """Whether PIL reads uncompressed planes as plain bytes that are none."""
    if of.numbers(Base.PlanarConfiguration) != [2]:
        return False
    bits, polarity = of.numbers(Base.BitsPerSample), of.numbers(Base.PhotometricInterpretation)
    return polarity == [0] or (bits[:1] != [8] and mode != "1")


def _raw_mode(args: Any) -> str:
    return str(args[0] if isinstance(args, tuple) else args)


def swap_bytes(image: Image.Image) -> bool:
    """Have the lower 8 bits of 16-bit colours decoded in place of the upper, if PIL can."""
    tiles = image.tile  # type: ignore[attr-defined]
    for index, tile in enumerate(tiles):
        mode = _raw_mode(tile.args)
        if mode[:-1] not in _WHOLE:
            return False
        mode = mode[:-1] + _SWAPPED[mode[-1]]
        args = (mode, *tile.args[1:]) if isinstance(tile.args, tuple) else mode
        tiles[index] = tile._replace(args=args)
    return True


def choose_page(image: Image.Image) -> None:
    """Turn a TIFF to its first page that is neither reduced nor a mask, if it has one.

    Raises:
        ValueError: the full picture lies where PIL does not look.
    """
    page = 0
    while image.format == "TIFF" and _is_aside(stored(image)):
        page += 1
        try:
            image.seek(page)
        except EOFError:
            image.seek(0)
            if Base.SubIFDs in stored(image).tags:
                raise ValueError("its first page is a thumbnail of a picture in a SubIFD") from None
            return


def _is_aside(page: Stored) -> bool:
    kinds = [int(kind) for kind in page.numbers(Base.NewSubfileType)]
    return any(kind & (_REDUCED | _MASK) for kind in kinds) or page.numbers(Base.SubfileType) == [2]


@contextmanager
def without_xmp(image: Image.Image) -> Iterator[None]:
    """Put an XMP packet aside while an image is decoded: PIL would turn it by what is in there."""
    packet = {key: image.info.pop(key) for key in _XMP if key in image.info}
    try:
        yield
    finally:
        image.info.update(packet)


def is_dark_or_clear(image: Image.Image) -> bool:
    """Whether the lower 8 bits of 16-bit colours are needed too: of a decoded image."""
    return "transparency" in image.info or int(np.asarray(image)[..., :3].max()) < DARK >> 8


def upright_rgb(
    image: Image.Image, of: Stored, notes: list[str], *, lower: Image.Image | None = None
) -> Image.Image:
    """A decoded image as 8-bit RGB, turned as its EXIF block says and laid over white.

    ``lower`` holds the lower 8 bits of 16-bit colours. ``notes`` gets a line where the picture
    may look otherwise than it was meant to.

    Raises:
        ValueError: its pixels are of a kind without a known range.
    """
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers of unknown range")
    wide = _wide_values(image, of, lower)
    alpha = image.getchannel("A") if image.mode == "RGBA" and _has_alpha(of) else None
    if wide is not None:
        picture = _eight_bits(wide, of, notes)
        if "transparency" in image.info:
            alpha = _opaque(wide, image.info["transparency"], exact=lower is not None)
    elif image.has_transparency_data and image.mode != "RGBA":
        layered = _clear_as_spread(image, of).convert("RGBA")
        picture, alpha = layered.convert("RGB"), layered.getchannel("A")
    else:
        picture = image.convert("RGB")
    if alpha is not None:
        picture.putalpha(alpha)
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    return _turned(picture, _orientation(image))


def _wide_values(
    image: Image.Image, of: Stored, lower: Image.Image | None
) -> NDArray[np.uint16] | None:
    """Grey ``(h, w)`` or colours ``(h, w, 3)`` of 16 bits, where 8 of them would not do."""
    if image.mode.startswith("I;16"):  # PIL's own conversion differs by version: clips, or shifts
        return np.asarray(image).astype(np.uint16)
    if not (of.wide and is_dark_or_clear(image)):
        return None
    upper = np.asarray(image)[..., :3].astype(np.uint16)
    return upper * 256 + (upper if lower is None else np.asarray(lower)[..., :3])


def _clear_as_spread(image: Image.Image, of: Stored) -> Image.Image:
    """The image with its transparent grey on the scale of its pixels, to which PIL leaves it."""
    if of.grey_bits == 8:
        return image
    image, most = image.copy(), 2**of.grey_bits - 1
    image.info["transparency"] = (image.info["transparency"] & most) * (255 // most)
    return image


def _opaque(
    values: NDArray[np.uint16], clear: int | tuple[int, ...], *, exact: bool
) -> Image.Image:
    """The alpha of a picture that has one colour for transparent."""
    if values.ndim == 2:
        same = values == clear
    else:
        shift = 0 if exact else 8
        same = (values >> shift == np.array(clear) >> shift).all(-1)
    return Image.fromarray(np.where(same, 0, 255).astype(np.uint8))


def _eight_bits(values: NDArray[np.uint16], of: Stored, notes: list[str]) -> Image.Image:
    """Scale 16-bit values to 8 bits: by the file's own range, if its pixels do not belie it."""
    least, most = int(values.min()), int(values.max())
    (bits,) = of.numbers(Base.BitsPerSample)[:1] or [16]
    black, white = 0.0, 2.0**bits - 1
    low = min(of.numbers(Base.SMinSampleValue) or of.numbers(Base.MinSampleValue) or [black])
    high = max(of.numbers(Base.SMaxSampleValue) or of.numbers(Base.MaxSampleValue) or [white])
    if low <= least <= most <= high and low < high:
        black, white = low, high
    if 0 < most < DARK and white == 2**16 - 1:
        notes.append(
            f"its 16-bit values are {least} to {most} of 65535, so it is read nearly black; if "
            f"they are {most.bit_length()}-bit data, scale them to 16 bits"
        )
    table = np.arange(2**16, dtype=np.float64)
    table = ((table - black) * (255 / (white - black))).round().clip(0, 255)
    if values.ndim == 2 and of.tags and of.tags.get(Base.PhotometricInterpretation, 0) == 0:
        table = 255 - table  # MinIsWhite, as PIL does for 8 bits
    return Image.fromarray(table.astype(np.uint8)[values]).convert("RGB")


def _has_alpha(of: Stored) -> bool:
    """Whether a fourth band is alpha: in a TIFF, some tag has to say so."""
    return not of.tags or Base.ExtraSamples in of.tags


def _orientation(image: Image.Image) -> int:
    """The orientation of the EXIF block, 1 to 8; 1 if there is none, or it is damaged."""
    block = image
    if any(key in image.info for key in _XMP):  # PIL may have taken the one in there already
        block = Image.new("1", (1, 1))
        block.info = {key: value for key, value in image.info.items() if key not in _XMP}
    try:
        return int(block.getexif().get(Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError):
        return 1


def _turned(picture: Image.Image, orientation: int) -> Image.Image:
    picture.info = {}
    picture.getexif()[Base.Orientation] = orientation
    return ImageOps.exif_transpose(picture)
