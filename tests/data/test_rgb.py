"""Pictures that PIL decodes otherwise than viewers show them: depth, polarity, bands, pages."""

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import (
    BITS,
    EXTRA,
    LEAST,
    MOST,
    NEW_SUBFILE,
    PHOTOMETRIC,
    S_LEAST,
    S_MOST,
    SUB_IFDS,
    SUBFILE,
    Tags,
    planes,
    png16,
    tiff,
)
from PIL import Image
from samples import pattern, png_chunk, told

from tokenstep.data.pictures import picture_tensor, read_picture
from tokenstep.errors import PictureWarning, TokenstepError

GREY = pattern(9, 14)[..., 0]
GREY16 = GREY.astype(np.uint16) * 257
TWELVE = (GREY.astype(np.uint16) * 16) + (GREY >> 4)  # 0 to 4095
COLOURS = pattern(9, 14).astype(np.uint16) * 257


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], np.ndarray]:
    """What a file of these bytes shows."""

    def shown(content: bytes) -> np.ndarray:
        path = tmp_path / "picture"
        path.write_bytes(content)
        return np.asarray(read_picture(path))

    return shown


def over_white(pixels: np.ndarray, clear: np.ndarray) -> np.ndarray:
    pixels = np.stack([pixels] * 3, -1) if pixels.ndim == 2 else pixels
    return np.where(clear[..., None], 255, pixels)


# --- polarity, transparency, bands ------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pixels", [255 - GREY, 65535 - GREY16])
def test_where_the_least_value_is_white_it_is_at_any_depth(
    read: Callable[[bytes], np.ndarray], pixels: np.ndarray, packed: bool
) -> None:
    shown = read(tiff((pixels, {PHOTOMETRIC: 0}), packed=packed))
    assert np.array_equal(shown[..., 0], GREY)


def test_the_transparent_grey_of_16_bits_is_white(read: Callable[[bytes], np.ndarray]) -> None:
    value = int(GREY16[0, 5])
    shown = read(png16(GREY16, clear=(value,)))
    assert np.array_equal(shown, over_white(GREY, np.equal(GREY16, value)))
    near = GREY16.copy()
    near[0, 5] += 1  # another value of 16 bits, though not of 8
    shown = read(png16(near, clear=(value,)))
    assert np.array_equal(shown, over_white(GREY, near == value))


def test_the_transparent_colour_of_16_bits_is_white(read: Callable[[bytes], np.ndarray]) -> None:
    pixels = COLOURS.copy()
    pixels[..., 2] = 0x1234
    pixels[3, 4], pixels[3, 5] = (0x8001, 0x0203, 0xFFFE), (0x8001, 0x0203, 0xFFFF)
    clear = np.zeros(pixels.shape[:2], bool)
    clear[3, 4] = True
    shown = read(png16(pixels, clear=(0x8001, 0x0203, 0xFFFE)))
    assert (shown[3, 4] == 255).all() and tuple(shown[3, 5]) == (0x80, 0x02, 0xFF)
    assert np.abs(shown.astype(int) - over_white(pixels >> 8, clear)).max() <= 1


@pytest.mark.parametrize("bands", [2, 4])
def test_alpha_of_16_bits_lies_over_white(read: Callable[[bytes], np.ndarray], bands: int) -> None:
    pixels = np.zeros((1, 3, bands), np.uint16)
    pixels[0, :, -1] = (0, 0x8080, 0xFFFF)
    pixels[0, :, 0] = 0xFFFF if bands == 4 else 0
    assert read(png16(pixels))[0, :, 1].tolist() == [255, 127, 0]


@pytest.mark.parametrize("depth", [8, 16])
def test_a_fourth_band_is_alpha_only_where_a_tag_says_so(
    read: Callable[[bytes], np.ndarray], depth: int
) -> None:
    infrared = np.dstack([pattern(9, 14), GREY // 2])
    pixels = infrared if depth == 8 else infrared.astype(np.uint16) * 257
    for tags in ({}, {EXTRA: 0}):
        assert np.array_equal(read(tiff((pixels, tags))), pattern(9, 14))
    assert not np.array_equal(read(tiff((pixels, {EXTRA: 2}))), pattern(9, 14))


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_grey_of_few_bits_is_white(
    read: Callable[[bytes], np.ndarray], bits: int, interlaced: int
) -> None:
    values = np.arange(4).reshape(2, 2) % 2**bits
    passes = (
        [values[:1, :1], values[:1, 1:], values[1:]] if interlaced else [values[:1], values[1:]]
    )
    packed = [
        sum(int(value) << (8 - bits) - bits * at for at, value in enumerate(one[0]))
        if bits < 8
        else one[0].astype(np.uint8).tobytes()
        for one in passes
    ]
    rows = b"".join(b"\0" + (row if isinstance(row, bytes) else bytes([row])) for row in packed)
    parts = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, bits, 0, 0, 0, interlaced))
    parts += png_chunk(b"tRNS", b"\0\1") + png_chunk(b"IDAT", zlib.compress(rows))
    shown = read(b"\x89PNG\r\n\x1a\n" + parts + png_chunk(b"IEND", b""))
    grey = np.round(values * 255 / (2**bits - 1))
    assert np.array_equal(shown, over_white(grey, values == 1))


# --- orientation, pages -----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_only_exif_turns_a_picture(tmp_path: Path, suffix: str) -> None:
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0110] = "a camera that says no orientation"
    how: dict[str, object] = {"xmp": packet, "exif": exif}
    if suffix == "tif":
        how = {"tiffinfo": {700: packet}}
    elif suffix == "png":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet.decode())
        how = {"pnginfo": info, "exif": exif}
    path = tmp_path / f"a.{suffix}"
    image.save(path, **how)
    with Image.open(path) as opened:
        opened.getexif()
        assert opened.info.keys() & {"xmp", "XML:com.adobe.xmp"}
    assert read_picture(path).size == (6, 4)
    if suffix != "tif":  # an orientation in both is that of EXIF
        with Image.open(path) as opened:
            assert picture_tensor(opened).shape == (3, 4, 6)
            assert opened.info.keys() & {"xmp", "XML:com.adobe.xmp"}, "what is the user's stays"
        exif[0x0112] = 8
        image.save(path, **how)
        assert read_picture(path).size == (4, 6)


@pytest.mark.parametrize("tag", [{NEW_SUBFILE: 1}, {SUBFILE: 2}, {NEW_SUBFILE: 4}])
def test_reduced_pages_and_masks_are_passed_over(
    read: Callable[[bytes], np.ndarray], tag: Tags
) -> None:
    small, page = (GREY[::4, ::4], tag), (GREY, {NEW_SUBFILE: 0})
    for pages in ([small, page], [small, small, page, small], [page, small], [(GREY, {}), small]):
        assert np.array_equal(read(tiff(*pages))[..., 0], GREY)
    assert read(tiff(small)).shape[:2] == GREY[::4, ::4].shape, "better than nothing"


def test_a_thumbnail_whose_picture_is_hidden_from_us_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff((GREY[::4, ::4], {NEW_SUBFILE: 1, SUB_IFDS: 8})))
    assert "thumbnail" in told(tmp_path / "a.tif", read_picture)


def test_the_limit_of_pixels_is_that_of_the_page_that_is_read(tmp_path: Path) -> None:
    pages = (GREY[::4, ::4], {NEW_SUBFILE: 1}), (GREY, {NEW_SUBFILE: 0})
    (tmp_path / "a.tif").write_bytes(tiff(*pages))
    assert "pixels" in told(tmp_path / "a.tif", lambda path: read_picture(path, max_pixels=100))
    assert read_picture(tmp_path / "a.tif", max_pixels=126).size == (14, 9)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("pixels", "tags"),
    [
        (COLOURS, {}),
        (np.dstack([COLOURS, GREY16]), {EXTRA: 2}),
        (255 - GREY, {PHOTOMETRIC: 0}),
    ],
)
def test_planes_that_would_be_read_as_others_are_refused(
    tmp_path: Path, pixels: np.ndarray, tags: Tags, order: str
) -> None:
    (tmp_path / "a.tif").write_bytes(planes(pixels, tags, order=order))
    assert "save it again as an 8-bit RGB PNG" in told(tmp_path / "a.tif", read_picture)
    with Image.open(tmp_path / "a.tif") as opened, pytest.raises(TokenstepError, match="bands"):
        picture_tensor(opened)


@pytest.mark.parametrize("pixels", [pattern(9, 14), GREY])
def test_planes_of_bytes_are_read(read: Callable[[bytes], np.ndarray], pixels: np.ndarray) -> None:
    assert np.array_equal(read(planes(pixels, {})), over_white(pixels, np.zeros((9, 14), bool)))


# --- 10 to 14 bits in 16 ----------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tags", [{MOST: 4095}, {S_MOST: 4095}, {LEAST: 0, MOST: 4095}])
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_the_files_own_range_is_black_to_white(
    read: Callable[[bytes], np.ndarray], tags: Tags, order: str, packed: bool, bands: int
) -> None:
    eight = GREY if bands == 1 else pattern(9, 14)
    pixels = eight.astype(np.uint16) * 16 + (eight >> 4)
    if bands == 4:
        pixels, tags = np.dstack([pixels, np.full_like(TWELVE, 4095)]), tags | {EXTRA: 0}
    shown = read(tiff((pixels, tags), order=order, packed=packed))
    assert np.abs(shown.astype(int) - (eight if eight.ndim == 3 else eight[..., None])).max() <= 1


def test_a_range_begins_where_the_file_says(read: Callable[[bytes], np.ndarray]) -> None:
    shown = read(tiff((TWELVE // 2 + 1000, {S_LEAST: 1000, S_MOST: 3047, LEAST: 0})))
    assert np.abs(shown[..., 0].astype(int) - GREY).max() <= 1
    inverted = read(tiff((4095 - TWELVE, {MOST: 4095, PHOTOMETRIC: 0})))
    assert np.abs(inverted[..., 0].astype(int) - GREY).max() <= 1


def test_twelve_bits_packed(read: Callable[[bytes], np.ndarray]) -> None:
    pairs = TWELVE.reshape(9, 7, 2).astype(int)
    first, second = pairs[..., 0], pairs[..., 1]
    three = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    data = np.stack(three, -1).astype(np.uint8).reshape(9, 21)
    shown = read(tiff((data, {256: 14, BITS: 12})))
    assert np.abs(shown[..., 0].astype(int) - GREY).max() <= 1


@pytest.mark.parametrize("tags", [{MOST: 255}, {MOST: 0}, {LEAST: 9000, MOST: 65535}])
def test_a_range_that_the_pixels_belie_is_none(
    read: Callable[[bytes], np.ndarray], tags: Tags
) -> None:
    assert np.array_equal(read(tiff((GREY16, tags)))[..., 0], GREY)


@pytest.mark.parametrize("pixels", [TWELVE, COLOURS >> 4, TWELVE >> 2])
def test_a_nearly_black_picture_without_a_range_is_warned_of(
    tmp_path: Path, pixels: np.ndarray
) -> None:
    for content in (png16(pixels), tiff((pixels, {}))):
        (tmp_path / "dark").write_bytes(content)
        with pytest.warns(PictureWarning) as caught:
            shown = np.asarray(read_picture(tmp_path / "dark"))
        (line,) = [str(one.message) for one in caught]
        assert "\n" not in line and line.startswith(f"{tmp_path / 'dark'}: ")
        assert f"{pixels.min()} to {pixels.max()} of 65535" in line
        assert shown.max() <= 16, "as it is stored"


def test_dark_pictures_of_8_bits_and_black_ones_are_no_matter(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pixels in (GREY >> 5, np.zeros((4, 4), np.uint16), np.zeros((4, 4, 3), np.uint8)):
            Image.fromarray(pixels).save(tmp_path / "a.png")
            read_picture(tmp_path / "a.png")


def test_a_pil_image_in_memory_is_warned_of_too() -> None:
    with pytest.warns(PictureWarning, match="0 to 3776 of 65535"):
        dark = picture_tensor(Image.fromarray(GREY.astype(np.uint16) * 16))
    assert torch.equal(dark[0], dark[1]) and dark.max() <= 16


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_that_cannot_be_opened_is_called_one(tmp_path: Path, order: str) -> None:
    five = tiff((np.dstack([COLOURS, GREY16, GREY16]), {EXTRA: 0}), order=order)
    (tmp_path / "a.tif").write_bytes(five)
    message = told(tmp_path / "a.tif", read_picture)
    assert "is a TIFF of a kind" in message and message.endswith("save it as 8-bit or 16-bit RGB")
