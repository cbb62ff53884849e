"""Finding pictures: files, folders and globs, and what is none."""

import os
from pathlib import Path

import pytest
from PIL import Image

from tokenstep.data import pictures
from tokenstep.data.whole_files import write_whole


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
    for kind in ("labels.png", "overlay.jpg", "tokens.jpg", "figure.png"):
        (album / f"b.{kind}").touch()
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


def test_part_written_file_is_no_picture(tmp_path: Path) -> None:
    def look(temporary: Path) -> None:
        Image.new("RGB", (2, 2)).save(temporary)
        assert not pictures.find_pictures([tmp_path])[0]

    write_whole(tmp_path / "a.png", look)
    assert found_in([tmp_path]) == [tmp_path / "a.png"]
