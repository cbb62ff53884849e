"""What tests of files share: drawn pictures, a labelled folder, and how a fault reads."""

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenstep.errors import TokenstepError


def pattern(h: int, w: int) -> np.ndarray:
    """A picture whose pixels differ, so that turning or shifting it shows."""
    y, x = np.mgrid[:h, :w]
    return np.stack([x * 255 // w, y * 255 // h, (x + y) % 256], axis=-1).astype(np.uint8)


def save_pattern(path: Path, h: int, w: int) -> Path:
    """A file of such a picture."""
    Image.fromarray(pattern(h, w)).save(path)
    return path


def told(path: Path, read: Callable[[Path], object]) -> str:
    """The message for a file that cannot be read: one line that names it."""
    with pytest.raises(TokenstepError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert ";" in message, "a reason and a remedy"
    return message


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file."""
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")


def labelled_folder(root: Path, classes: Sequence[str], sizes: Sequence[tuple[int, int]]) -> Path:
    """A test split of pictures of `sizes` (h, w), each with its label map in stripes."""
    for folder in ("images", "labels"):
        (root / "test" / folder).mkdir(parents=True)
    for number, (h, w) in enumerate(sizes):
        stripes = np.arange(w) * (len(classes) + 1) // w
        label = np.broadcast_to(np.where(stripes < len(classes), stripes, 255), (h, w))
        Image.fromarray(label.astype(np.uint8)).save(root / "test" / "labels" / f"p{number}.png")
        Image.fromarray(pattern(h, w)).save(root / "test" / "images" / f"p{number}.png")
    (root / "classes.json").write_text(json.dumps({"names": list(classes)}))
    return root


def write_split(root: Path, split: str, labels: Sequence[object], names: Sequence[str]) -> Path:
    """A split of `labels` (h, w), each with a picture of its own, and the classes `names`."""
    for folder in ("images", "labels"):
        (root / split / folder).mkdir(parents=True)
    for number, values in enumerate(labels):
        label = np.asarray(values, np.uint8)
        picture = np.roll(pattern(*label.shape), zlib.crc32(f"{split}{number}".encode()) % 251)
        Image.fromarray(label).save(root / split / "labels" / f"p{number}.png")
        Image.fromarray(picture).save(root / split / "images" / f"p{number}.png")
    (root / "classes.json").write_text(json.dumps({"names": list(names)}))
    return root
