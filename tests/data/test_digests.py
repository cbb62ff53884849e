"""What the files of a labelled folder hold, told apart by content and not by name."""

import os
from pathlib import Path

import pytest
from samples import labelled_folder

from tokenstep.data.digests import changes, digests_of, of_folder
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.errors import TokenstepError


def test_only_what_a_file_holds_counts(tmp_path: Path) -> None:
    root = labelled_folder(tmp_path / "data", ["a", "b"], [(8, 12), (8, 12)])
    folder, cache = LabelledFolder(root, "test"), tmp_path / "cache.json"
    first = digests_of([folder], cache)
    assert len(first) == 2 * 2 + 1
    label = folder.labels[1]
    os.utime(label, ns=(1, 1))  # as copying does
    assert digests_of([folder], cache) == first
    label.write_bytes(label.read_bytes()[:-1] + b"x")
    second = digests_of([folder], cache)
    assert {name for name in first if first[name] != second[name]} == {"test/labels/p1.png"}


def test_other_classes_are_other_contents(tmp_path: Path) -> None:
    root = labelled_folder(tmp_path / "data", ["a", "b"], [(8, 12)])
    first = digests_of([LabelledFolder(root, "test")], tmp_path / "cache.json")
    (root / "classes.json").write_text('{ "names": ["a", "b"]  }')  # said in another way
    assert digests_of([LabelledFolder(root, "test")], tmp_path / "cache.json") == first
    (root / "classes.json").write_text('{"names": ["a", "c"]}')
    assert digests_of([LabelledFolder(root, "test")], tmp_path / "cache.json") != first


def test_changes_are_named(tmp_path: Path) -> None:
    root = labelled_folder(tmp_path / "data", ["a", "b"], [(8, 12), (8, 12), (8, 12)])
    before = digests_of([LabelledFolder(root, "test")], tmp_path / "cache.json")
    assert changes(before, before) == ""
    for number in (0, 1):
        path = root / "test" / "labels" / f"p{number}.png"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    (root / "test" / "images" / "p2.png").unlink()
    after = digests_of([LabelledFolder(root, "test")], tmp_path / "cache.json")
    told = changes(before, after)
    assert "test/labels/p0.png and 1 more changed" in told
    assert "test/images/p2.png and 1 more gone" in told


def test_folders_share_a_cache_and_keep_their_own(tmp_path: Path) -> None:
    root = labelled_folder(tmp_path / "data", ["a", "b"], [(8, 12), (8, 12)])
    cache = tmp_path / "cache.json"
    parts = [LabelledFolder(root, "test", names=[name]) for name in ("p0", "p1")]
    both = digests_of(parts, cache)
    for part, name in zip(parts, ("p0", "p1"), strict=True):
        alone = digests_of([part], tmp_path / f"{name}.json")
        assert of_folder(part, both) == alone
        assert set(alone) == {f"test/images/{name}.png", f"test/labels/{name}.png", "classes.json"}
    digests_of(parts[:1], cache)
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"x" * path.stat().st_size)
        os.utime(path, ns=(0, 0))
    assert digests_of(parts, cache) != both


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    root = labelled_folder(tmp_path / "data", ["a", "b"], [(8, 12)])
    path = tmp_path / "files.json"
    for text in ("{", "[]", '{"a": 3}'):
        path.write_text(text)
        with pytest.raises(TokenstepError, match=r"files\.json: is damaged; remove it"):
            digests_of([LabelledFolder(root, "test")], path)
