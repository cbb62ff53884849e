"""Pictures of every kind, whole and damaged; label maps; labelled folders; writing files."""

import json
import os
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tokenstep import data
from tokenstep.data import Classes, LabelledFolder
from tokenstep.errors import TokenstepError

ORIENTATION = 0x0112


def pattern(h: int, w: int) -> np.ndarray:
    """A picture whose pixels differ, so that turning or shifting it shows."""
    y, x = np.mgrid[:h, :w]
    return np.stack([x * 255 // w, y * 255 // h, (x + y) % 256], axis=-1).astype(np.uint8)


def told(path: Path, read: Callable[[Path], object] = data.read_picture) -> str:
    """The message for a file that cannot be read: one line that names it."""
    with pytest.raises(TokenstepError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert ";" in message, "a reason and a remedy"
    return message


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


# --- pictures that must be read ---------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (50, 20000), (7, 5)])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_any_size_comes_back_pixel_by_pixel(
    tmp_path: Path, size: tuple[int, int], suffix: str
) -> None:
    pixels = pattern(*size)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels).save(path)
    image = data.read_picture(path)
    assert image.mode == "RGB"
    tensor = data.to_tensor(image)
    assert tensor.dtype == torch.uint8 and tensor.is_contiguous()
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".gif"])
def test_lossy_kinds_come_back_nearly(tmp_path: Path, suffix: str) -> None:
    grey = np.full((20, 30, 3), 120, np.uint8)
    Image.fromarray(grey).save(tmp_path / f"a{suffix}")
    read = np.asarray(data.read_picture(tmp_path / f"a{suffix}")).astype(int)
    assert read.shape == grey.shape and abs(read - 120).max() < 8


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_become_the_same_rgb(tmp_path: Path, mode: str) -> None:
    black_and_white = np.kron(np.array([[0, 255], [255, 0]], np.uint8), np.ones((4, 6), np.uint8))
    suffix = ".tif" if mode == "CMYK" else ".png"
    Image.fromarray(black_and_white).convert("RGB").convert(mode).save(tmp_path / f"a{suffix}")
    image = data.read_picture(tmp_path / f"a{suffix}")
    assert np.array_equal(np.asarray(image), np.stack([black_and_white] * 3, axis=-1))


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK").save(tmp_path / "a.jpg")
    read = np.asarray(data.read_picture(tmp_path / "a.jpg")).astype(int)
    assert abs(read - (200, 30, 60)).max() < 12


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    eight = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(eight * 257).save(tmp_path / f"a{suffix}")
    image = np.asarray(data.read_picture(tmp_path / f"a{suffix}"))
    assert np.array_equal(image, np.stack([eight] * 3, axis=-1))


def test_big_endian_sixteen_bits(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 0x8080, 0xFFFF))
    image.save(tmp_path / "a.tif")
    assert np.asarray(data.read_picture(tmp_path / "a.tif"))[0, :, 0].tolist() == [128, 255]


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_transparency_lies_over_white(tmp_path: Path, suffix: str) -> None:
    clear_half_full = np.array([[[0, 0, 0, 0], [0, 0, 0, 128], [0, 0, 0, 255]]], np.uint8)
    Image.fromarray(clear_half_full).save(tmp_path / f"a{suffix}", lossless=True)
    row = np.asarray(data.read_picture(tmp_path / f"a{suffix}"))[0, :, 0]
    assert row.tolist() == [255, 127, 0]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_transparent_palette_entry_becomes_white(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=transparency)
    pixels = np.asarray(data.read_picture(tmp_path / "a.png"))
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
    image = data.read_picture(tmp_path / f"a{suffix}")
    assert np.array_equal(np.asarray(image), upright)
    image.save(tmp_path / "again.png")
    assert data.read_picture(tmp_path / "again.png").size == (6, 4), "turned once, not twice"


def test_sixteen_bit_picture_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(tmp_path / "a.png", exif=exif)
    assert data.read_picture(tmp_path / "a.png").size == (4, 6)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_first_frame_of_many(tmp_path: Path, suffix: str) -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    red.save(tmp_path / f"a{suffix}", save_all=True, append_images=[blue, blue])
    red_value, _, blue_value = data.read_picture(tmp_path / f"a{suffix}").getpixel((4, 4))
    assert red_value > 200 and blue_value < 50


def test_a_wrong_suffix_does_not_matter(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert data.read_picture(str(tmp_path / "a.jpg")).size == (3, 2)


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
    message = told(tmp_path / "a.png", lambda path: data.read_picture(path, max_pixels=10**8))
    assert "pixels" in message and "scale it down" in message


@pytest.mark.parametrize("limit", [34, 35])
def test_limit_is_exact_and_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # PIL warns above 20: here, an error
    for suffix in sorted(data.SUFFIXES):
        path = tmp_path / f"a{suffix}"
        Image.new("RGB", (7, 5)).save(path)
        if limit == 35:
            assert data.read_picture(path, max_pixels=limit).size == (7, 5)
        else:
            told(path, lambda path: data.read_picture(path, max_pixels=limit))
        assert Image.MAX_IMAGE_PIXELS == 20


def test_reading_in_threads_leaves_pils_limit_alone(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    Image.new("RGB", (6, 5)).save(tmp_path / "a.tif")
    with ThreadPoolExecutor(8) as pool:
        sizes = {image.size for image in pool.map(data.read_picture, [tmp_path / "a.tif"] * 64)}
    assert sizes == {(6, 5)} and before == Image.MAX_IMAGE_PIXELS


# --- finding pictures -------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.PNG", "sub/deep/c.tiff", "notes.txt", ".hidden.jpg", "sub/[1].gif"):
        (tmp_path / "album" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "album" / name).touch()
    return tmp_path / "album"


def names(paths: list[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in paths]


def test_folder_is_searched_to_the_bottom_in_order(album: Path) -> None:
    found = names(data.find_pictures([album]), album)
    assert found == ["a.PNG", "b.jpg", "sub/[1].gif", "sub/deep/c.tiff"]


def test_globs_and_files_keep_their_order_and_come_once(album: Path) -> None:
    given = [str(album / "b*"), album / "notes.txt", album / "sub" / "[1].gif", album]
    found = names(data.find_pictures(given), album)
    assert found == ["b.jpg", "notes.txt", "sub/[1].gif", "a.PNG", "sub/deep/c.tiff"]
    assert names(data.find_pictures([f"{album}/**/*"]), album) == sorted(found, key=Path)[:1] + [
        name for name in sorted(found, key=Path)[1:] if name != "notes.txt"
    ]


def test_one_file_by_two_names_comes_once(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(album)
    assert data.find_pictures(["b.jpg", album / "b.jpg", "./sub/../b.jpg"]) == [Path("b.jpg")]
    assert data.find_pictures([]) == []


def test_nothing_found(album: Path) -> None:
    (album / "bare").mkdir()
    for path, word in (("bare", "without"), ("*.bmp", "matches"), ("x.jpg", "no such")):
        assert word in told(album / path, lambda path: data.find_pictures([path]))
    assert "no such" in told(album / ("x" * 999), lambda path: data.find_pictures([path]))


# --- label maps -------------------------------------------------------------------------------


def test_label_values_come_back(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [255, 2, 0]], np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    label = data.read_label(tmp_path / "a.png", 3)
    assert label.dtype == torch.uint8 and np.array_equal(label.numpy(), values)
    label += 1  # its own memory


def test_palette_label_gives_indices(tmp_path: Path) -> None:
    values = np.array([[0, 1], [2, 255]], np.uint8)
    image = Image.new("P", (2, 2))
    image.putdata(values.reshape(-1).tolist())
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0] + [0] * 759)
    image.save(tmp_path / "a.png")
    assert np.array_equal(data.read_label(tmp_path / "a.png", 3).numpy(), values)


def test_label_values_outside_the_classes_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 3, 77, 255]], np.uint8)).save(tmp_path / "a.png")
    message = told(tmp_path / "a.png", lambda path: data.read_label(path, 3))
    assert "3, 77" in message and "0 to 2" in message
    Image.fromarray(np.arange(255, dtype=np.uint8)[None]).save(tmp_path / "a.png")
    assert len(told(tmp_path / "a.png", lambda path: data.read_label(path, 3))) < 300


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "1", "LA"])
def test_label_must_be_one_byte_channel(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (3, 2)).save(tmp_path / "a.png")
    message = told(tmp_path / "a.png", lambda path: data.read_label(path, 3))
    assert mode in message and "8-bit channel" in message


def test_damaged_label(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    told(tmp_path / "a.png", lambda path: data.read_label(path, 3))
    assert "no such file" in told(tmp_path / "b.png", lambda path: data.read_label(path, 3))


# --- classes ----------------------------------------------------------------------------------


def write_classes(root: Path, content: object) -> Path:
    (root / "classes.json").write_text(json.dumps(content))
    return root


def test_classes_come_back(tmp_path: Path) -> None:
    palette = [[0, 0, 1], [9, 8, 255]]
    content = {"names": ["sky", "road"], "palette": palette, "ignore_index": 255, "more": {}}
    classes = data.read_classes(write_classes(tmp_path, content))
    assert classes == Classes(("sky", "road"), ((0, 0, 1), (9, 8, 255)))
    assert hash(classes)


@pytest.mark.parametrize("count", [1, 2, 8, 9, 150, 255])
def test_default_palette_is_distinct_and_never_black(tmp_path: Path, count: int) -> None:
    content = {"names": [f"class {i}" for i in range(count)]}
    palette = data.read_classes(write_classes(tmp_path, content)).palette
    assert len(set(palette)) == count and (0, 0, 0) not in palette
    assert palette == data.default_palette(255)[:count], "a class keeps its colour"


@pytest.mark.parametrize(
    "content",
    [
        [],
        "sky",
        {},
        {"names": "sky"},
        {"names": []},
        {"names": [1, 2]},
        {"names": ["sky", ""]},
        {"names": ["sky", "sky"]},
        {"names": [f"{i}" for i in range(256)]},
        {"names": ["sky"], "ignore_index": 0},
        {"names": ["sky"], "palette": None},
        {"names": ["sky"], "palette": 7},
        {"names": ["sky"], "palette": []},
        {"names": ["sky"], "palette": [[1, 2]]},
        {"names": ["sky"], "palette": [[1, 2, 256]]},
        {"names": ["sky"], "palette": [[1, 2, -1]]},
        {"names": ["sky"], "palette": [[1, 2, 0.5]]},
        {"names": ["sky"], "palette": ["red"]},
        {"names": ["sky"], "palette": [[1, 2, 3], [4, 5, 6]]},
    ],
)
def test_malformed_classes(tmp_path: Path, content: object) -> None:
    path = write_classes(tmp_path, content) / "classes.json"
    told(path, lambda path: data.read_classes(path.parent))


@pytest.mark.parametrize("content", [None, b"{names: sky", b"\xff\xfe\x00", b""])
def test_unreadable_classes(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "classes.json").write_bytes(content)
    told(tmp_path / "classes.json", lambda path: data.read_classes(path.parent))


# --- labelled folders -------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Six pictures in train, two tiles; a pixel's red is its label, and the picture's number."""
    root = tmp_path / "set"
    for folder in ("images", "labels"):
        (root / "train" / folder).mkdir(parents=True)
    for number, stem in enumerate(["t1_a", "t1_b", "t1_c", "t7_a", "t7_b", "t7_c"]):
        values = np.full((4 + number, 5), number, np.uint8)
        Image.fromarray(values).save(root / "train" / "labels" / f"{stem}.png")
        Image.fromarray(values).convert("RGB").save(root / "train" / "images" / f"{stem}.png")
    write_classes(root, {"names": [f"class {i}" for i in range(6)]})
    return root


@pytest.mark.parametrize("cache", [False, True])
def test_items_pair_picture_and_label(labelled: Path, cache: bool) -> None:
    folder = LabelledFolder(labelled, "train", cache=cache)
    assert len(folder) == 6 and len(folder.classes.names) == 6
    assert [path.stem for path in folder.paths] == sorted(path.stem for path in folder.paths)
    for _ in range(2):
        for number in range(6):
            image, label = folder[number]
            assert image.shape == (3, 4 + number, 5) and label.shape == (4 + number, 5)
            assert image.dtype == label.dtype == torch.uint8
            assert (image == number).all() and (label == number).all()
    with pytest.raises(IndexError):
        folder[6]


def test_cache_reads_a_file_once(labelled: Path) -> None:
    folder, fresh = (LabelledFolder(labelled, "train", cache=cache) for cache in (True, False))
    image, label = folder[2]
    folder.paths[2].unlink()
    assert torch.equal(folder[2][0], image) and torch.equal(folder[2][1], label)
    told(folder.paths[2], lambda _: fresh[2])


@pytest.mark.parametrize("cache", [False, True])
def test_transform_gets_the_pair(labelled: Path, cache: bool) -> None:
    folder = LabelledFolder(
        labelled, "train", transform=lambda image, label: (image[:, :1], label[:1] + 1), cache=cache
    )
    for _ in range(2):
        image, label = folder[3]
        assert image.shape == (3, 1, 5) and (label == 4).all()


@pytest.mark.parametrize(
    ("patterns", "stems"),
    [
        (None, "t1_a t1_b t1_c t7_a t7_b t7_c"),
        ([], "t1_a t1_b t1_c t7_a t7_b t7_c"),
        (["t7_*"], "t7_a t7_b t7_c"),
        (["!t7_*"], "t1_a t1_b t1_c"),
        (["t1_*", "t7_a", "!*_b"], "t1_a t1_c t7_a"),
        (["*_[ab]"], "t1_a t1_b t7_a t7_b"),
    ],
)
def test_names_pick_pictures(labelled: Path, patterns: list[str] | None, stems: str) -> None:
    folder = LabelledFolder(labelled, "train", names=patterns)
    assert " ".join(path.stem for path in folder.paths) == stems
    assert len(folder[len(folder) - 1]) == 2


@pytest.mark.parametrize("patterns", [["t9_*"], ["!*"], "t7_*"])
def test_names_that_pick_nothing(labelled: Path, patterns: list[str]) -> None:
    with pytest.raises(TokenstepError, match=r"t7_|t9_|!") as caught:
        LabelledFolder(labelled, "train", names=patterns)
    assert "\n" not in str(caught.value)


def test_workers_read_the_same(labelled: Path) -> None:
    loader = DataLoader(LabelledFolder(labelled, "train"), batch_size=None, num_workers=1)
    assert [int(label[0, 0]) for _, label in loader] == list(range(6))


def test_missing_root_and_split(labelled: Path) -> None:
    assert "root" in told(labelled / "no", lambda path: LabelledFolder(path, "train"))
    assert "train" in told(labelled, lambda path: LabelledFolder(path, "val")), "names what is"
    (labelled / "val" / "images").mkdir(parents=True)
    assert "train, val" in told(labelled, lambda path: LabelledFolder(path, "test"))
    told(labelled / "val" / "images", lambda _: LabelledFolder(labelled, "val"))


def test_missing_labels_are_counted(labelled: Path) -> None:
    labels = labelled / "train" / "labels"
    for stem in ("t1_b", "t7_a"):
        (labels / f"{stem}.png").unlink()
    message = told(labels / "t1_b.png", lambda _: LabelledFolder(labelled, "train"))
    assert "2 of 6" in message
    assert len(LabelledFolder(labelled, "train", names=["*_c"])) == 2, "only what is picked counts"


def test_two_pictures_may_not_share_a_label(labelled: Path) -> None:
    double = labelled / "train" / "images" / "t1_a.bmp"
    Image.new("RGB", (5, 4)).save(double)
    message = told(double.with_suffix(".png"), lambda _: LabelledFolder(labelled, "train"))
    assert "t1_a.bmp" in message


def test_sizes_must_agree(labelled: Path) -> None:
    path = labelled / "train" / "images" / "t1_b.png"
    Image.new("RGB", (8, 9)).save(path)
    folder = LabelledFolder(labelled, "train")
    message = told(path, lambda _: folder[1])
    assert "8 x 9" in message and "5 x 5" in message
    assert str(labelled / "train" / "labels" / "t1_b.png") in message


# --- writing files ----------------------------------------------------------------------------


def test_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.labels.png"
    for colour in ("red", "blue"):  # the second replaces the first
        data.write_whole(path, Image.new("RGB", (2, 2), colour).save)
        assert data.read_picture(path).tobytes() == Image.new("RGB", (2, 2), colour).tobytes()
    assert list(path.parent.iterdir()) == [path]


def test_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    data.write_whole(tmp_path / "a.txt", lambda path: path.write_text("a") and None)
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
        data.write_whole(path, half)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_part_written_file_is_no_picture(tmp_path: Path) -> None:
    def look(temporary: Path) -> None:
        Image.new("RGB", (2, 2)).save(temporary)
        told(tmp_path, lambda path: data.find_pictures([path]))

    data.write_whole(tmp_path / "a.png", look)
    assert data.find_pictures([tmp_path]) == [tmp_path / "a.png"]


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    save = Image.new("RGB", (2, 2)).save
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        assert "folder" in told(path, lambda path: data.write_whole(path, save))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    save = Image.new("RGB", (2, 2)).save
    told(tmp_path / "locked" / "a.png", lambda path: data.write_whole(path, save))


def test_full_disk(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("as far as it went")
        raise OSError(28, "No space left on device")

    assert "No space left" in told(tmp_path / "a.txt", lambda p: data.write_whole(p, write))
    assert not list(tmp_path.iterdir())
