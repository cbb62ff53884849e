"""TIFF and PNG files of kinds that PIL does not write, byte by byte."""

import struct
import zlib

import numpy as np
from samples import png_chunk

NEW_SUBFILE, SUBFILE, BITS, PHOTOMETRIC, EXTRA, SUB_IFDS = 254, 255, 258, 262, 338, 330
LEAST, MOST, S_LEAST, S_MOST = 280, 281, 340, 341
Tags = dict[int, int | tuple[int, ...]]


def tiff(*pages: tuple[np.ndarray, Tags], order: str = "<", packed: bool = False) -> bytes:
    """A TIFF of grey or colour pages, each with tags that go over the plain ones.

    The numbers of a tag of ranges are given once for all bands.
    """
    body = (b"II*\0" if order == "<" else b"MM\0*") + bytes(4)
    link = 4  # where the place of the next page is written
    for pixels, changes in pages:
        data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        data = zlib.compress(data) if packed else data
        (h, w), bands = pixels.shape[:2], pixels.shape[2] if pixels.ndim == 3 else 1
        bits = (pixels.itemsize * 8,) * bands
        plain: Tags = {256: w, 257: h, BITS: bits, 259: 8 if packed else 1, 278: h, 277: bands}
        plain |= {PHOTOMETRIC: 2 if bands > 1 else 1, 273: len(body), 279: len(data)}
        body += data + bytes(len(data) % 2)
        tags, extra = sorted((plain | changes).items()), b""
        start = len(body)
        entries = struct.pack(order + "H", len(tags))
        for tag, value in tags:
            values = value if isinstance(value, tuple) else (value,)
            values *= bands if tag in (LEAST, MOST, S_LEAST, S_MOST) else 1
            kind, letter = (4, "I") if tag in (273, 279, SUB_IFDS) else (3, "H")
            packed_values = struct.pack(f"{order}{len(values)}{letter}", *values).ljust(4, b"\0")
            if len(packed_values) > 4:
                place = start + 6 + 12 * len(tags) + len(extra)
                extra += packed_values
                packed_values = struct.pack(order + "I", place)
            entries += struct.pack(order + "HHI", tag, kind, len(values)) + packed_values
        body = body[:link] + struct.pack(order + "I", start) + body[link + 4 :]
        body += entries + bytes(4) + extra + bytes(len(extra) % 2)
        link = start + len(entries)
    return body


def png16(pixels: np.ndarray, *, clear: tuple[int, ...] = ()) -> bytes:
    """A PNG of 16 bits a band, with a colour that is transparent."""
    h, w = pixels.shape[:2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.shape[2] if pixels.ndim == 3 else 1]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = png_chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, kind, 0, 0, 0))
    if clear:
        parts += png_chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
    parts += png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def planes(pixels: np.ndarray, tags: Tags, *, order: str = "<") -> bytes:
    """A TIFF whose bands lie one after the other."""
    h, w = pixels.shape[:2]
    bands = pixels.shape[2] if pixels.ndim == 3 else 1
    apart = np.moveaxis(pixels.reshape(h, w, bands), 2, 0).reshape(bands * h, w)
    bits = (pixels.itemsize * 8,) * bands
    size = h * w * pixels.itemsize
    places = tuple(8 + size * band for band in range(bands))
    plain: Tags = {257: h, BITS: bits, 277: bands, 284: 2, 273: places, 279: (size,) * bands}
    return tiff((apart, plain | {PHOTOMETRIC: 2 if bands > 1 else 1} | tags), order=order)
