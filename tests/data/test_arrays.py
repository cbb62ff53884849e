"""Pictures in memory: every form of one picture is the same picture, and others are refused."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import pattern

from tokenstep.data.pictures import find_pictures, picture_tensor
from tokenstep.errors import TokenstepError

RGB = pattern(9, 14)
GREY = RGB[..., 1]
RGBA = np.dstack([RGB, GREY])


def shown(picture: object) -> torch.Tensor:
    return picture_tensor(picture)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("array", "mode"),
    [
        (GREY, "L"),
        (GREY[::-1, ::2], "L"),
        (GREY[..., None], "L"),
        (np.dstack([GREY, GREY // 2]), "LA"),
        (RGBA, "RGBA"),
        (GREY.astype(np.uint16) * 257, "I;16"),
        (GREY.astype(">u2") * 257, "I;16"),
    ],
)
def test_an_array_is_what_its_pil_image_is(array: np.ndarray, mode: str) -> None:
    flat = np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array)
    image = Image.fromarray(flat.astype(flat.dtype.newbyteorder("=")))
    assert image.mode == mode
    assert torch.equal(shown(array), shown(image))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4"])
def test_a_float_array_is_what_its_tensor_is(kind: type) -> None:
    tensor = torch.from_numpy((RGB / 255).astype(kind).astype(np.dtype(kind).newbyteorder("=")))
    assert torch.equal(shown((RGB / 255).astype(kind)), tensor.permute(2, 0, 1))


@pytest.mark.parametrize("array", [GREY, GREY[..., None], np.dstack([GREY, GREY // 2]), RGBA])
def test_floats_of_grey_and_alpha_are_what_their_bytes_are(array: np.ndarray) -> None:
    floats = shown((array / 255).astype(np.float32))
    assert floats.dtype == torch.float32 and floats.shape == (3, 9, 14)
    assert (floats * 255 - shown(array)).abs().max() <= 1


@pytest.mark.parametrize(
    ("wrong", "way"),
    [
        (np.zeros((2, 4, 4, 3), np.uint8), "list(array)"),
        (torch.zeros(2, 3, 4, 4), "list(tensor)"),
        (np.zeros((3, 9, 14), np.uint8), "transpose(1, 2, 0)"),
        (np.zeros((3, 9, 14), np.float32), "transpose(1, 2, 0)"),
        (RGB.astype(np.float32), "float in 0..1"),
        (RGB.astype(np.int64), "uint8"),
        (np.full((4, 4), np.nan), "0..1"),
        (np.zeros((5, 4, 7), np.float32), "(h, w, 3)"),
        (np.zeros((0, 4), np.uint8), "at least 1"),
        (b"\x89PNG", "io.BytesIO"),
        (bytearray(9), "io.BytesIO"),
        (io.BytesIO(b"\x89PNG"), "a path"),
        ("https://example.org/a.jpg", "download"),
        (Path("https://example.org/a.jpg"), "download"),
        ("s3://bucket/a.jpg", "download"),
    ],
)
def test_what_is_no_picture_is_told_the_way(wrong: object, way: str) -> None:
    with pytest.raises(TokenstepError) as caught:
        shown(wrong)
    assert way in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["https://example.org/a.jpg?size=2", "file:///tmp/[a].jpg"])
def test_an_address_among_paths_is_told_the_way(address: str) -> None:
    found, faults = find_pictures([address])
    assert found == [] and "download" in faults[address]
