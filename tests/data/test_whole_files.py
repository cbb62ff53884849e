"""Files are written whole or not at all."""

import os
from pathlib import Path

import pytest
from PIL import Image
from samples import told

from tokenstep.data import whole_files
from tokenstep.data.pictures import read_picture
from tokenstep.errors import TokenstepError


def test_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.labels.png"
    for colour in ("red", "blue"):  # the second replaces the first
        whole_files.write_whole(path, Image.new("RGB", (2, 2), colour).save)
        assert read_picture(path).tobytes() == Image.new("RGB", (2, 2), colour).tobytes()
    assert list(path.parent.iterdir()) == [path]


def test_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    whole_files.write_whole(tmp_path / "a.txt", lambda path: path.write_text("a") and None)
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
        whole_files.write_whole(path, half)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    save = Image.new("RGB", (2, 2)).save
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        assert "folder" in told(path, lambda path: whole_files.write_whole(path, save))
    below = tmp_path / "file" / "new"
    for path in (tmp_path / "file", below):
        assert "folder" in told(path, whole_files.require_writable)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    save = Image.new("RGB", (2, 2)).save
    told(tmp_path / "locked" / "a.png", lambda path: whole_files.write_whole(path, save))


def test_full_disk(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("as far as it went")
        raise OSError(28, "No space left on device")

    assert "No space left" in told(tmp_path / "a.txt", lambda p: whole_files.write_whole(p, write))
    assert not list(tmp_path.iterdir())


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    for _ in range(2):
        whole_files.require_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_text_is_written_as_utf_8(tmp_path: Path) -> None:
    whole_files.write_text(tmp_path / "a.json", "Straße ✓\n")
    assert (tmp_path / "a.json").read_bytes() == "Straße ✓\n".encode()
