"""Pictures of every kind in files, whole and damaged."""

import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import pattern, png_header
from samples import told as told_by

from tokenstep.data import pictures

ORIENTATION = 0x0112


def told(path: Path, read: Callable[[Path], object] = pictures.read_picture) -> str:
    return told_by(path, read)


# --- pictures that must be read -------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (50, 20000), (7, 5)])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_any_size_comes_back_pixel_by_pixel(
    tmp_path: Path, size: tuple[int, int], suffix: str
) -> None:
    pixels = pattern(*size)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels).save(path)
    image = pictures.read_picture(path)
    assert image.mode == "RGB"
    tensor = pictures.to_tensor(image)
    assert tensor.dtype == torch.uint8 and tensor.is_contiguous()
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".gif"])
def test_lossy_kinds_come_back_nearly(tmp_path: Path, suffix: str) -> None:
    grey = np.full((20, 30, 3), 120, np.uint8)
    Image.fromarray(grey).save(tmp_path / f"a{suffix}")
    read = np.asarray(pictures.read_picture(tmp_path / f"a{suffix}")).astype(int)
    assert read.shape == grey.shape and abs(read - 120).max() < 8


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_become_the_same_rgb(tmp_path: Path, mode: str) -> None:
    black_and_white = np.kron(np.array([[0, 255], [255, 0]], np.uint8), np.ones((4, 6), np.uint8))
    suffix = ".tif" if mode == "CMYK" else ".png"
    Image.fromarray(black_and_white).convert("RGB").convert(mode).save(tmp_path / f"a{suffix}")
    image = pictures.read_picture(tmp_path / f"a{suffix}")
    assert np.array_equal(np.asarray(image), np.stack([black_and_white] * 3, axis=-1))


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK").save(tmp_path / "a.jpg")
    read = np.asarray(pictures.read_picture(tmp_path / "a.jpg")).astype(int)
    assert abs(read - (200, 30, 60)).max() < 12


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    eight = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(eight * 257).save(tmp_path / f"a{suffix}")
    image = np.asarray(pictures.read_picture(tmp_path / f"a{suffix}"))
    assert np.array_equal(image, np.stack([eight] * 3, axis=-1))


def test_big_endian_sixteen_bits(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 0x8080, 0xFFFF))
    image.save(tmp_path / "a.tif")
    assert np.asarray(pictures.read_picture(tmp_path / "a.tif"))[0, :, 0].tolist() == [128, 255]


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_transparency_lies_over_white(tmp_path: Path, suffix: str) -> None:
    clear_half_full = np.array([[[0, 0, 0, 0], [0, 0, 0, 128], [0, 0, 0, 255]]], np.uint8)
    Image.fromarray(clear_half_full).save(tmp_path / f"a{suffix}", lossless=True)
    row = np.asarray(pictures.read_picture(tmp_path / f"a{suffix}"))[0, :, 0]
    assert row.tolist() == [255, 127, 0]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_transparent_palette_entry_becomes_white(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=transparency)
    pixels = np.asarray(pictures.read_picture(tmp_path / "a.png"))
    assert pixels.tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = pattern(4, 6)
    # How a camera that notes this orientation stores the upright picture.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, 3),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a{suffix}", exif=exif)
    image = pictures.read_picture(tmp_path / f"a{suffix}")
    assert np.array_equal(np.asarray(image), upright)
    image.save(tmp_path / "again.png")
    assert pictures.read_picture(tmp_path / "again.png").size == (6, 4), "turned once, not twice"


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_damaged_exif_is_no_orientation(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(pattern(4, 6)).save(tmp_path / f"a{suffix}", exif=b"Exif\0\0no such thing")
    assert pictures.read_picture(tmp_path / f"a{suffix}").size == (6, 4)


def test_sixteen_bit_picture_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(tmp_path / "a.png", exif=exif)
    assert pictures.read_picture(tmp_path / "a.png").size == (4, 6)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_first_frame_of_many(tmp_path: Path, suffix: str) -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    red.save(tmp_path / f"a{suffix}", save_all=True, append_images=[blue, blue])
    red_value, _, blue_value = pictures.read_picture(tmp_path / f"a{suffix}").getpixel((4, 4))
    assert red_value > 200 and blue_value < 50


def test_a_wrong_suffix_does_not_matter(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert pictures.read_picture(str(tmp_path / "a.jpg")).size == (3, 2)


# --- pictures that must be refused ----------------------------------------------------------------


def test_missing_folder_and_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    assert "no such file" in told(tmp_path / "missing.jpg")
    assert "folder" in told(tmp_path)
    assert "empty" in told(tmp_path / "empty.jpg")


@pytest.mark.parametrize("content", [b"Dear diary,\n\ntoday I saw a street.\n", b"\xff\xd8\xff"])
def test_not_a_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    assert "JPEG" in told(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".gif", ".tif"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    path = tmp_path / f"a{suffix}"
    # PIL's own TIFF writer puts the directory first, so what is left still has a header.
    Image.fromarray(noise).save(path, **({"compression": "raw"} if suffix == ".tif" else {}))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    told(path)


def test_postscript_is_not_run(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    assert "known kind" in told(tmp_path / "a.png")


def test_pixels_of_unknown_range(tmp_path: Path) -> None:
    for name, dtype in (("f.tif", np.float32), ("i.tif", np.int32)):
        Image.fromarray(np.ones((2, 2), dtype)).save(tmp_path / name)
        assert "range" in told(tmp_path / name)


@pytest.mark.parametrize("side", [12_000, 60_000])  # PIL warns at the first, errs at the second
def test_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.png").write_bytes(png_header(side, side))
    message = told(tmp_path / "a.png", lambda path: pictures.read_picture(path, max_pixels=10**8))
    assert "pixels" in message and "scale it down" in message


@pytest.mark.parametrize("limit", [34, 35])
def test_limit_is_exact_and_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # PIL warns above 20: here, an error
    for suffix in sorted(pictures.SUFFIXES):
        path = tmp_path / f"a{suffix}"
        Image.new("RGB", (7, 5)).save(path)
        if limit == 35:
            assert pictures.read_picture(path, max_pixels=limit).size == (7, 5)
        else:
            told(path, lambda path: pictures.read_picture(path, max_pixels=limit))
        assert Image.MAX_IMAGE_PIXELS == 20


def test_reading_in_threads_leaves_pils_limit_alone(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    Image.new("RGB", (6, 5)).save(tmp_path / "a.tif")
    with ThreadPoolExecutor(8) as pool:
        sizes = {image.size for image in pool.map(pictures.read_picture, [tmp_path / "a.tif"] * 64)}
    assert sizes == {(6, 5)} and before == Image.MAX_IMAGE_PIXELS
