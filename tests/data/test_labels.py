"""Label files: indices at the file's own depth, PNGs by content, and labels under other names."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import labelled_folder, told

from tokenstep.data.labelled_folder import LabelledFolder, read_classes, read_label
from tokenstep.errors import TokenstepError

# --- depth and kind of a file -------------------------------------------------------------------


def packed_png(values: np.ndarray, depth: int, colours: int | None = None) -> bytes:
    """A PNG of `values` at 1, 2, 4 or 8 bits, grey or with a palette of so many colours."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    h, w = values.shape
    bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits.reshape(h, w * depth))
    palette = b"" if colours is None else chunk(b"PLTE", bytes(range(3 * colours)))
    header = struct.pack(">IIBBBBB", w, h, depth, 0 if colours is None else 3, 0, 0, 0)
    body = chunk(b"IHDR", header) + palette + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("colours", [None, 2])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_label_of_any_depth_gives_the_indices_that_it_stores(
    tmp_path: Path, depth: int, colours: int | None
) -> None:
    count = min(2**depth, 9)
    values = np.arange(5 * 7).reshape(5, 7) % count  # rows end within a byte
    path = tmp_path / "a.png"
    path.write_bytes(packed_png(values, depth, colours and count))
    assert np.array_equal(read_label(path, count).numpy(), values)
    if count > 2:
        message = told(path, lambda path: read_label(path, count - 1))
        assert f"holds {count - 1}," in message, "the index as it stands in the file"


def test_a_label_of_two_values_may_be_one_bit(tmp_path: Path) -> None:
    values = np.array([[True, False, True]])
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(read_label(tmp_path / "a.png", 2).numpy(), values)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "BMP", "GIF", "WEBP"])
def test_what_is_no_png_is_refused_by_its_content(tmp_path: Path, kind: str) -> None:
    Image.new("L", (8, 8), 1).save(tmp_path / "a.png", kind)
    assert kind in told(tmp_path / "a.png", lambda path: read_label(path, 3))


def test_an_inverted_tiff_is_no_label(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 1).save(tmp_path / "a.png", "TIFF", tiffinfo={262: 0})
    assert "TIFF" in told(tmp_path / "a.png", lambda path: read_label(path, 255))


@pytest.mark.parametrize(
    "content",
    [
        packed_png(np.zeros((90, 90)), 8)[:60],
        b"no picture at all",
        b"II*\0\x08\0\0\0\xff\xff",
        b"\xff\xd8\xff\xe0 a JPEG",
    ],
)
def test_the_remedy_for_a_damaged_label_is_one_for_labels(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    message = told(tmp_path / "a.png", lambda path: read_label(path, 3))
    assert "; save its class indices again as a PNG of one channel" in message
    assert "RGB" not in message and "JPEG" not in message


# --- labels under other names -------------------------------------------------------------------

Rename = Callable[[str], str]


def renamed(root: Path, rename: Rename) -> Path:
    """Three labelled pictures, whose labels are called as `rename` says of their stems."""
    labelled_folder(root, ("sky", "road"), [(6, 9), (6, 9), (6, 9)])
    for path in sorted((root / "test" / "labels").iterdir()):
        path.rename(path.with_name(rename(path.stem)))
    return root


@pytest.mark.parametrize("ending", ["_mask.png", "_labelIds.png", ".PNG", ".label.png"])
def test_the_suffix_that_the_error_proposes_takes_the_labels(tmp_path: Path, ending: str) -> None:
    root = renamed(tmp_path, lambda stem: stem + ending)
    message = told(root / "test/labels/p0.png", lambda _: LabelledFolder(root, "test"))
    assert f"p0{ending}" in message and f'"label_suffix": "{ending}"' in message
    content = {"names": ["sky", "road"], "label_suffix": ending}
    (root / "classes.json").write_text(json.dumps(content))
    folder = LabelledFolder(root, "test")
    assert len(folder) == 3
    assert all(label.shape == (6, 9) for _, label in folder)


@pytest.mark.parametrize(
    ("rename", "there"),
    [
        (lambda stem: f"{stem}.tif", "p0.tif instead; save its class indices as the PNG p0.png"),
        (lambda stem: f"gt_{stem[1:]}.png", "gt_0.png instead; name labels as their pictures"),
        (lambda stem: "p1.PNG" if stem == "p1" else f"{stem}.png", "p1.PNG instead; rename it"),
    ],
)
def test_other_names_are_named_with_their_own_remedy(
    tmp_path: Path, rename: Rename, there: str
) -> None:
    with pytest.raises(TokenstepError) as caught:
        LabelledFolder(renamed(tmp_path, rename), "test")
    assert there in str(caught.value) and "label_suffix" not in str(caught.value)


def test_several_labels_of_one_picture_are_all_named(tmp_path: Path) -> None:
    root = renamed(tmp_path, lambda stem: f"{stem}_ids.png")
    for stem in ("p0", "p1", "p2"):
        (root / "test/labels" / f"{stem}_colour.png").touch()
        (root / "test/labels" / f"{stem}.json").touch()
    message = told(root / "test/labels/p0.png", lambda _: LabelledFolder(root, "test"))
    assert '"_ids.png" or "_colour.png"' in message


def test_the_label_of_a_picture_that_begins_alike_is_not_proposed(tmp_path: Path) -> None:
    root = renamed(tmp_path, lambda stem: f"{stem}.png")
    for kind in ("images", "labels"):
        (root / "test" / kind / "p1.png").rename(root / "test" / kind / "p0_b.png")
    (root / "test/labels/p0.png").unlink()
    message = told(root / "test/labels/p0.png", lambda _: LabelledFolder(root, "test"))
    assert "p0_b" not in message and "1 of 3" in message


def test_a_split_without_a_folder_of_labels_says_so(tmp_path: Path) -> None:
    root = renamed(tmp_path, lambda stem: f"{stem}.png")
    (root / "test/labels").rename(root / "test/masks")
    message = told(root / "test/labels/p0.png", lambda _: LabelledFolder(root, "test"))
    assert "no folder" in message


@pytest.mark.parametrize(
    "option",
    [{"label_suffix": value} for value in (".tif", "", 7, None, "../x.png", "a\\b.png", [".png"])]
    + [{"allow_empty_classes": value} for value in (1, 0, "true", None, [])],
)
def test_options_of_classes_are_typed(tmp_path: Path, option: dict[str, object]) -> None:
    (tmp_path / "classes.json").write_text(json.dumps({"names": ["sky", "road"], **option}))
    message = told(tmp_path / "classes.json", lambda path: read_classes(path.parent))
    assert next(iter(option)) in message


def test_classes_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('{"names": ["sky", "road"]}', encoding="utf-8-sig")
    assert read_classes(tmp_path).names == ("sky", "road")


def test_classes_nested_without_end_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text("[" * 100_000)
    assert "JSON" in told(tmp_path / "classes.json", lambda path: read_classes(path.parent))
