"""What the files of a labelled folder hold, told apart by content and not by name."""

import os
from pathlib import Path

import pytest
from samples import labelled_folder

from tokenstep.contents import changes, contents, mark, read_marks
from tokenstep.data import LabelledFolder
from tokenstep.errors import TokenstepError


def test_only_what_a_file_holds_counts(tmp_path: Path) -> None:
    root = labelled_folder(tmp_path / "data", ["a", "b"], [(8, 12), (8, 12)])
    folder, cache = LabelledFolder(root, "test"), tmp_path / "cache.json"
    first = contents(folder, cache)
    assert len(first) == 2 * 2 + 1
    label = folder.labels[1]
    os.utime(label, ns=(1, 1))  # as copying does
    assert contents(folder, cache) == first
    label.write_bytes(label.read_bytes()[:-1] + b"x")
    second = contents(folder, cache)
    assert {name for name in first if first[name] != second[name]} == {"test/labels/p1.png"}


def test_other_classes_are_other_contents(tmp_path: Path) -> None:
    root = labelled_folder(tmp_path / "data", ["a", "b"], [(8, 12)])
    first = contents(LabelledFolder(root, "test"), tmp_path / "cache.json")
    (root / "classes.json").write_text('{ "names": ["a", "b"]  }')  # said in another way
    assert contents(LabelledFolder(root, "test"), tmp_path / "cache.json") == first
    (root / "classes.json").write_text('{"names": ["a", "c"]}')
    assert contents(LabelledFolder(root, "test"), tmp_path / "cache.json") != first


def test_changes_are_named(tmp_path: Path) -> None:
    root = labelled_folder(tmp_path / "data", ["a", "b"], [(8, 12), (8, 12), (8, 12)])
    before = mark(LabelledFolder(root, "test"), {})
    assert changes(before, before) == ""
    for number in (0, 1):
        path = root / "test" / "labels" / f"p{number}.png"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    (root / "test" / "images" / "p2.png").unlink()
    told = changes(before, mark(LabelledFolder(root, "test"), {}))
    assert "test/labels/p0.png and 1 more changed" in told
    assert "test/images/p2.png and 1 more gone" in told


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    for text in ("{", "[]", '{"a": 3}'):
        path.write_text(text)
        with pytest.raises(TokenstepError, match=r"data\.json: is damaged; remove it"):
            read_marks(path)
