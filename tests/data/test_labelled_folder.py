"""Label maps, classes and labelled folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import told
from torch.utils.data import DataLoader

from tokenstep.data import labelled_folder
from tokenstep.data.labelled_folder import Classes, LabelledFolder
from tokenstep.errors import TokenstepError

# --- label maps -------------------------------------------------------------------------------


def test_label_values_come_back(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [255, 2, 0]], np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    label = labelled_folder.read_label(tmp_path / "a.png", 3)
    assert label.dtype == torch.uint8 and np.array_equal(label.numpy(), values)
    label += 1  # its own memory


def test_palette_label_gives_indices(tmp_path: Path) -> None:
    values = np.array([[0, 1], [2, 255]], np.uint8)
    image = Image.new("P", (2, 2))
    image.putdata(values.reshape(-1).tolist())
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0] + [0] * 759)
    image.save(tmp_path / "a.png")
    assert np.array_equal(labelled_folder.read_label(tmp_path / "a.png", 3).numpy(), values)


def test_label_values_outside_the_classes_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 3, 77, 255]], np.uint8)).save(tmp_path / "a.png")
    message = told(tmp_path / "a.png", lambda path: labelled_folder.read_label(path, 3))
    assert "3, 77" in message and "0 to 2" in message
    Image.fromarray(np.arange(255, dtype=np.uint8)[None]).save(tmp_path / "a.png")
    assert len(told(tmp_path / "a.png", lambda path: labelled_folder.read_label(path, 3))) < 300


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "LA"])
def test_label_must_be_one_byte_channel(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (3, 2)).save(tmp_path / "a.png")
    message = told(tmp_path / "a.png", lambda path: labelled_folder.read_label(path, 3))
    assert mode in message and "8-bit channel" in message


def test_damaged_label(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    told(tmp_path / "a.png", lambda path: labelled_folder.read_label(path, 3))
    assert "no such file" in told(
        tmp_path / "b.png", lambda path: labelled_folder.read_label(path, 3)
    )


# --- classes ----------------------------------------------------------------------------------


def write_classes(root: Path, content: object) -> Path:
    (root / "classes.json").write_text(json.dumps(content))
    return root


def test_classes_come_back(tmp_path: Path) -> None:
    palette = [[0, 0, 1], [9, 8, 255]]
    content = {"names": ["sky", "road"], "palette": palette, "ignore_index": 255, "more": {}}
    classes = labelled_folder.read_classes(write_classes(tmp_path, content))
    assert classes == Classes(("sky", "road"), ((0, 0, 1), (9, 8, 255)))
    assert hash(classes)


@pytest.mark.parametrize("count", [1, 2, 8, 9, 150, 255])
def test_default_palette_is_distinct_and_never_black(tmp_path: Path, count: int) -> None:
    content = {"names": [f"class {i}" for i in range(count)]}
    palette = labelled_folder.read_classes(write_classes(tmp_path, content)).palette
    assert len(set(palette)) == count and (0, 0, 0) not in palette
    assert palette == labelled_folder.default_palette(255)[:count], "a class keeps its colour"


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
    told(path, lambda path: labelled_folder.read_classes(path.parent))


@pytest.mark.parametrize("content", [None, b"{names: sky", b"\xff\xfe\x00", b""])
def test_unreadable_classes(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "classes.json").write_bytes(content)
    told(tmp_path / "classes.json", lambda path: labelled_folder.read_classes(path.parent))


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
