"""Pictures of every kind, whole and damaged, in files and in memory; writing files."""

import os
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
from tokenstep.errors import TokenstepError

ORIENTATION = 0x0112


def told(path: Path, read: Callable[[Path], object] = pictures.read_picture) -> str:
    return told_by(path, read)


# --- pictures that must be read ---------------------------------------------------------------


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


# --- pictures that must be refused ------------------------------------------------------------


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


# --- finding pictures -------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.PNG", "sub/deep/c.tiff", "notes.txt", ".hidden.jpg", "sub/[1].gif"):
        (tmp_path / "album" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "album" / name).touch()
    return tmp_path / "album"


def found_in(paths: list[str | Path]) -> list[Path]:
    found, faults = pictures.find_pictures(paths)
    assert not faults
    return found


def names(paths: list[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in paths]


def test_folder_is_searched_to_the_bottom_in_order(album: Path) -> None:
    found = names(found_in([album]), album)
    assert found == ["a.PNG", "b.jpg", "sub/[1].gif", "sub/deep/c.tiff"]


def test_globs_and_files_keep_their_order_and_come_once(album: Path) -> None:
    given = [str(album / "b*"), album / "notes.txt", album / "sub" / "[1].gif", album]
    found = names(found_in(given), album)
    assert found == ["b.jpg", "notes.txt", "sub/[1].gif", "a.PNG", "sub/deep/c.tiff"]
    by_glob = names(found_in([f"{album}/**/*"]), album)
    assert by_glob == sorted(set(found) - {"notes.txt"}, key=Path)


def test_one_file_by_two_names_comes_once(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(album)
    assert found_in(["b.jpg", album / "b.jpg", "./sub/../b.jpg"]) == [Path("b.jpg")]
    assert found_in([]) == []


def test_what_segment_wrote_is_found_only_by_name(album: Path) -> None:
    for suffix in pictures.OUTPUTS:
        (album / f"b{suffix}").touch()
    assert [path.name for path in found_in([album])] == ["a.PNG", "b.jpg", "[1].gif", "c.tiff"]
    assert found_in([f"{album}/b*"]) == [album / "b.jpg"]
    assert found_in([album / "b.overlay.jpg"]) == [album / "b.overlay.jpg"]


def test_each_argument_without_pictures_has_its_line_and_the_others_go_on(album: Path) -> None:
    (album / "bare").mkdir()
    reasons = {"bare": "without", "*.bmp": "matches", "x.jpg": "no such", "x" * 999: "no such"}
    given = {str(album / name): word for name, word in reasons.items()}
    found, faults = pictures.find_pictures([*given, album / "b.jpg"])
    assert found == [album / "b.jpg"] and list(faults) == list(given)
    for path, word in given.items():
        assert path in faults[path] and word in faults[path]
        assert "\n" not in faults[path] and ";" in faults[path]


# --- pictures in memory -----------------------------------------------------------------------


def image_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", ["turned", "16 bit", "clear", "palette", "CMYK", "unread file"])
def test_a_pil_image_is_treated_as_its_file_is(tmp_path: Path, kind: str) -> None:
    image = Image.fromarray(pattern(9, 14))
    exif = Image.Exif()
    if kind == "turned":
        exif[ORIENTATION] = 6
    elif kind == "16 bit":
        image = Image.fromarray(np.arange(126, dtype=np.uint16).reshape(9, 14) * 500)
    elif kind == "clear":
        image.putalpha(Image.fromarray(pattern(9, 14)[..., 0]))
    elif kind == "palette":
        image = image.convert("P")
    elif kind == "CMYK":
        image = image.convert("CMYK")
    path = tmp_path / ("a.tif" if kind == "CMYK" else "a.png")
    image.save(path, exif=exif)
    with Image.open(path) as opened:
        in_memory = opened if kind in ("turned", "unread file") else image
        given = pictures.picture_tensor(in_memory)
    assert torch.equal(given, pictures.picture_tensor(str(path)))
    assert torch.equal(given, pictures.picture_tensor(path))
    assert given.shape == ((3, 14, 9) if kind == "turned" else (3, 9, 14))


def test_arrays_and_tensors_come_back_as_they_are() -> None:
    pixels = pattern(9, 14)
    locked = pixels.copy()
    locked.flags.writeable = False
    for array in (pixels, locked, pixels[::-1, ::-1], np.asfortranarray(pixels), pixels[::2]):
        tensor = pictures.picture_tensor(array)
        assert tensor.dtype == torch.uint8 and np.array_equal(image_of(tensor), array)
        tensor += 1  # its own memory
        assert np.array_equal(pixels, pattern(9, 14))
    whole = torch.from_numpy(pixels).permute(2, 0, 1)
    for tensor in (whole, whole / 255, (whole / 255).half(), (whole / 255).double()):
        assert torch.equal(pictures.picture_tensor(tensor), tensor)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4), np.int64),
        np.zeros((3, 5, 6), np.uint8),
        np.full((4, 4, 3), 2, np.float32),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(4, 4, dtype=torch.uint8),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 4, 4),
        torch.zeros(3, 0, 4),
        torch.zeros(3, 4, 4, dtype=torch.int64),
        torch.zeros(3, 4, 4, dtype=torch.bool),
        torch.full((3, 4, 4), 255.0),
        torch.full((3, 4, 4), -0.5),
        torch.full((3, 4, 4), float("nan")),
        torch.full((3, 4, 4), float("inf")),
        torch.zeros(3, 4, 4).index_fill(2, torch.tensor([3]), float("nan")),
        Image.new("F", (4, 4)),
        Image.new("I", (4, 4)),
        Image.new("RGB", (0, 4)),
        None,
        7,
        [[1, 2, 3]],
    ],
)
def test_other_forms_are_refused_in_one_line(wrong: object) -> None:
    with pytest.raises(TokenstepError) as caught:
        pictures.picture_tensor(wrong)
    message = str(caught.value)
    assert "\n" not in message and ("give" in message or "picture is" in message or ";" in message)


def test_a_damaged_file_behind_a_pil_image(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with (
        Image.open(tmp_path / "a.png") as image,
        pytest.raises(TokenstepError, match="60 x 40 pixels, mode RGB: cannot be decoded"),
    ):
        pictures.picture_tensor(image)


def test_a_folder_that_may_be_listed_but_not_entered_has_no_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("locked", "open"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / name / "a.png")
    stat = os.stat

    def deny(path: object, **how: object) -> os.stat_result:
        if "locked/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **how)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "stat", deny)
    assert found_in([tmp_path]) == [tmp_path / "open" / "a.png"]


# --- writing files ----------------------------------------------------------------------------


def test_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.labels.png"
    for colour in ("red", "blue"):  # the second replaces the first
        pictures.write_whole(path, Image.new("RGB", (2, 2), colour).save)
        assert pictures.read_picture(path).tobytes() == Image.new("RGB", (2, 2), colour).tobytes()
    assert list(path.parent.iterdir()) == [path]


def test_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    pictures.write_whole(tmp_path / "a.txt", lambda path: path.write_text("a") and None)
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, TokenstepError])
def test_failure_leaves_what_was_there(tmp_path: Path, fault: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def half(temporary: Path) -> None:
        assert temporary.parent == path.parent and temporary.suffix == path.suffix
        temporary.write_text("hal")
        raise fault("stopped")

    with pytest.raises(fault, match="stopped"):
        pictures.write_whole(path, half)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_part_written_file_is_no_picture(tmp_path: Path) -> None:
    def look(temporary: Path) -> None:
        Image.new("RGB", (2, 2)).save(temporary)
        assert not pictures.find_pictures([tmp_path])[0]

    pictures.write_whole(tmp_path / "a.png", look)
    assert found_in([tmp_path]) == [tmp_path / "a.png"]


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    save = Image.new("RGB", (2, 2)).save
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        assert "folder" in told(path, lambda path: pictures.write_whole(path, save))
    below = tmp_path / "file" / "new"
    for path in (tmp_path / "file", below):
        assert "folder" in told(path, pictures.require_writable)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    save = Image.new("RGB", (2, 2)).save
    told(tmp_path / "locked" / "a.png", lambda path: pictures.write_whole(path, save))


def test_full_disk(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("as far as it went")
        raise OSError(28, "No space left on device")

    assert "No space left" in told(tmp_path / "a.txt", lambda p: pictures.write_whole(p, write))
    assert not list(tmp_path.iterdir())


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    for _ in range(2):
        pictures.require_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_text_is_written_as_utf_8(tmp_path: Path) -> None:
    pictures.write_text(tmp_path / "a.json", "Straße ✓\n")
    assert (tmp_path / "a.json").read_bytes() == "Straße ✓\n".encode()
