"""Labelled folders checked whole: each kind of fault, empty classes, and what is known as sound."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call
from PIL import Image
from samples import write_split

from tokenstep.data.check import check_folder, require_sound
from tokenstep.data.faults import Fault, empty_classes
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.errors import TokenstepError

NAMES = ("sky", "road", "car")
GOOD = [np.arange(48).reshape(6, 8) % 3, np.full((5, 7), 255)]
MASK = np.where(np.arange(80).reshape(8, 10) < 10, 255, 0)  # an eighth is the object


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of three sound splits."""
    for split in ("train", "val", "test"):
        write_split(tmp_path / "set", split, GOOD, NAMES)
    return tmp_path / "set"


def masks(root: Path, names: tuple[str, ...] = ("rest", "car"), **options: object) -> Path:
    """A folder of 0/255 masks."""
    for split in ("train", "val", "test"):
        write_split(root, split, [MASK], names)
    (root / "classes.json").write_text(json.dumps({"names": names, **options}))
    return root


def faults(root: Path) -> list[Fault]:
    return list(check_folder(root).faults)


# --- the whole folder -----------------------------------------------------------------------------


def test_a_sound_folder_is_counted_and_has_no_fault(root: Path) -> None:
    verdict = check_folder(root)
    assert verdict.files == 12 and verdict.faults == ()
    assert list(verdict.pixels) == list(verdict.values) == ["train", "val", "test"]
    assert verdict.pixels["val"] == {"sky": 16, "road": 16, "car": 16}
    assert verdict.values["test"] == [0, 1, 2, 255]


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:45])  # the header, and next to nothing


ERRORS: list[tuple[str, str, str, Callable[[Path], object]]] = [
    ("unreadable", "images/p0.png", "p0.png", half),
    ("unreadable", "labels/p1.png", "p1.png", half),
    ("unreadable", "labels/p1.png", "empty", lambda path: path.write_bytes(b"")),
    ("wrong-kind", "labels/p1.png", "JPEG", lambda path: Image.new("L", (7, 5)).save(path, "JPEG")),
    ("wrong-kind", "labels/p1.png", "RGB", lambda path: Image.new("RGB", (7, 5)).save(path)),
    ("sizes-differ", "images/p1.png", "7 x 5", lambda path: Image.new("RGB", (5, 7)).save(path)),
    ("outside-classes", "labels/p1.png", "7", lambda path: Image.new("L", (7, 5), 7).save(path)),
    (
        "shared-label",
        "images/p1.png",
        "p1.bmp",
        lambda path: shutil.copy(path, path.parent / "p1.bmp"),
    ),
]


@pytest.mark.parametrize(("kind", "file", "word", "spoil"), ERRORS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_error_names_its_file(
    root: Path, split: str, kind: str, file: str, word: str, spoil: Callable[[Path], object]
) -> None:
    spoil(root / split / file)
    (fault,) = faults(root)
    assert (fault.kind, fault.severity) == (kind, "error")
    assert fault.file == str(root / split / file)
    assert word in str(fault) and "\n" not in str(fault) and ";" in fault.text


def test_all_faults_are_found_in_one_pass(root: Path) -> None:
    half(root / "train" / "images" / "p0.png")
    half(root / "train" / "labels" / "p1.png")
    Image.new("L", (7, 5), 7).save(root / "val" / "labels" / "p1.png")
    assert [fault.kind for fault in faults(root)] == ["unreadable"] * 2 + ["outside-classes"]


def test_pictures_without_labels_and_the_reverse_are_warnings(root: Path) -> None:
    (root / "train" / "labels" / "p1.png").unlink()
    (root / "val" / "images" / "p1.png").unlink()
    lonely, stray = faults(root)
    assert (lonely.file, stray.file) == (
        str(root / "train" / "images" / "p1.png"),
        str(root / "val" / "labels" / "p1.png"),
    )
    assert lonely.severity == stray.severity == "warning"


def test_what_has_no_partner_is_read_too(root: Path) -> None:
    (root / "train" / "labels" / "p1.png").unlink()
    (root / "val" / "images" / "p1.png").unlink()
    whole = check_folder(root).files
    lonely, stray = root / "train" / "images" / "p1.png", root / "val" / "labels" / "p1.png"
    half(lonely)
    half(stray)
    errors = [f for f in faults(root) if f.severity == "error"]
    assert {(f.file, f.kind) for f in errors} == {
        (str(path), "unreadable") for path in (lonely, stray)
    }
    held = [p for kind in ("images", "labels") for p in root.glob(f"*/{kind}/*")]
    assert check_folder(root).files == whole == len(held)


def test_a_split_without_any_label_is_an_error_that_says_what_is_there(root: Path) -> None:
    for path in (root / "val" / "labels").iterdir():
        path.rename(path.with_suffix(".tif"))
    (fault,) = faults(root)
    assert fault.severity == "error" and "p0.tif" in fault.text and "2 of 2" in fault.text


def test_equal_pictures_in_two_splits_are_a_warning(root: Path) -> None:
    shutil.copy(root / "train" / "images" / "p1.png", root / "test" / "images" / "p1.png")
    shutil.copy(root / "train" / "images" / "p0.png", root / "train" / "images" / "q.png")
    shutil.copy(root / "train" / "labels" / "p0.png", root / "train" / "labels" / "q.png")
    (twin,) = faults(root)
    assert twin.severity == "warning" and twin.file == str(root / "test" / "images" / "p1.png")
    assert str(root / "train" / "images" / "p1.png") in twin.text


def test_a_missing_split_is_a_warning_and_others_are_read(root: Path) -> None:
    (root / "val").rename(root / "extra")
    (fault,) = faults(root)
    assert fault.severity == "warning" and fault.file == str(root / "val")
    assert list(check_folder(root).pixels) == ["train", "test", "extra"]


def test_faulty_classes_are_a_fault(root: Path) -> None:
    (root / "classes.json").write_text("{")
    (fault,) = faults(root)
    assert fault.severity == "error" and fault.file == str(root / "classes.json")


# --- classes without a pixel ----------------------------------------------------------------------


@pytest.mark.parametrize("allow", [False, True])
def test_masks_of_0_and_255_are_named_with_class_value_split_and_remedy(
    tmp_path: Path, allow: bool
) -> None:
    found = faults(masks(tmp_path, allow_empty_classes=allow))
    assert [fault.severity for fault in found] == ["warning" if allow else "error"] * 3
    for fault, split in zip(found, ("train", "val", "test"), strict=True):
        said = f"'car' has no pixel in {split}; 255 fills 12.5 % of it: a 0/255 mask?"
        assert said in fault.text and "relabel 255 as 1" in fault.text
        assert ("allow_empty_classes" in fault.text) is not allow
        assert fault.file == str(tmp_path / split / "labels")


def test_one_class_alone_is_an_error(tmp_path: Path) -> None:
    found = faults(masks(tmp_path, ("car",)))
    assert [(fault.kind, fault.severity) for fault in found] == [("single-class", "error")] * 3
    assert "'car'" in found[1].text and "val" in found[1].text
    assert "12.5 % of it: a 0/255 mask?" in found[1].text
    assert {f.severity for f in faults_allowed(tmp_path)} == {"warning"}


def faults_allowed(root: Path) -> list[Fault]:
    content = json.loads((root / "classes.json").read_text())
    (root / "classes.json").write_text(json.dumps({**content, "allow_empty_classes": True}))
    return faults(root)


def test_a_split_that_is_all_255_is_an_error(root: Path) -> None:
    Image.new("L", (8, 6), 255).save(root / "val" / "labels" / "p0.png")
    (fault,) = faults(root)
    assert fault.severity == "error" and "val" in fault.text and "255" in fault.text
    assert "allow_empty_classes" not in fault.text
    assert faults_allowed(root) == [fault], "no option makes it one that can be scored"


@pytest.mark.parametrize(("split", "severity"), [("train", "error"), ("test", "warning")])
def test_a_rare_class_may_be_missing_but_not_in_train(
    root: Path, split: str, severity: str
) -> None:
    Image.fromarray((GOOD[0] % 2).astype(np.uint8)).save(root / split / "labels" / "p0.png")
    (fault,) = faults(root)
    assert fault.severity == severity and f"'car' has no pixel in {split}" in fault.text
    assert "mask" not in fault.text, "0 is not all that is beside 255"
    assert [f.severity for f in faults_allowed(root)] == ["warning"]


def test_without_255_the_remedy_is_another(root: Path) -> None:
    for path in (root / "train" / "labels").iterdir():
        label = np.asarray(Image.open(path))
        Image.fromarray((label % 2).astype(np.uint8)).save(path)
    (fault,) = faults(root)
    assert "255" not in fault.text and "label it as 2" in fault.text


def test_labels_to_measure_on_lack_a_class(tmp_path: Path) -> None:
    (line,) = empty_classes(LabelledFolder(masks(tmp_path), "test"))
    assert "'car' has no pixel in test" in line and "12.5 %" in line


# --- before hours are spent -----------------------------------------------------------------------


def folders(root: Path) -> tuple[list[LabelledFolder], LabelledFolder]:
    return [LabelledFolder(root, "val")], LabelledFolder(root, "train")


def test_faults_are_raised_and_counted(root: Path) -> None:
    require_sound(*folders(root))
    half(root / "val" / "images" / "p0.png")
    half(root / "val" / "images" / "p1.png")
    half(root / "test" / "images" / "p1.png")  # of a split that is not asked for
    with pytest.raises(TokenstepError) as caught:
        require_sound(*folders(root))
    message = str(caught.value)
    assert message.startswith(str(root / "val" / "images" / "p0.png")) and "\n" not in message
    assert "1 more" in message and f"data check {root}" in message


def test_only_the_pictures_that_patterns_pick_count(root: Path) -> None:
    half(root / "train" / "images" / "p1.png")
    require_sound([], LabelledFolder(root, "train", names=["!p1"]))
    with pytest.raises(TokenstepError, match="all pixels of val p1 are 255"):
        require_sound([LabelledFolder(root, "val", names=["p1"])])


def test_what_is_known_as_sound_is_not_read_again(root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "out" / "sound.json"
    spoiled = root / "val" / "images" / "p0.png"
    for _ in range(2):
        require_sound(*folders(root), digests={"a": "1"}, cache=cache)
        half(spoiled)  # unseen, as the contents are said to be the same
    for digests in ({"a": "2"}, {"b": "1"}, {}):
        with pytest.raises(TokenstepError):
            require_sound(*folders(root), digests=digests, cache=cache)
    with pytest.raises(TokenstepError):
        require_sound(folders(root)[0], digests={"a": "1"}, cache=cache)  # other folders
    with pytest.raises(TokenstepError):
        require_sound(*folders(root))
    require_sound(*folders(root), digests={"a": "1"}, cache=cache)


def test_only_soundness_is_remembered(root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "sound.json"
    cache.write_text("no JSON")
    path = root / "val" / "images" / "p0.png"
    whole = path.read_bytes()
    half(path)
    with pytest.raises(TokenstepError):
        require_sound(*folders(root), digests={"a": "1"}, cache=cache)
    path.write_bytes(whole)
    require_sound(*folders(root), digests={"a": "1"}, cache=cache)


# --- the command ----------------------------------------------------------------------------------


def test_exit_codes_and_the_file(root: Path, tmp_path: Path) -> None:
    assert call("data", "check", root)[::2] == (0, "")
    (root / "val").rename(tmp_path / "val")
    code, out, err = call("data", "check", root, "--json", tmp_path / "found.json")
    assert code == 0 and "warnings: 1" in out and err.startswith("tokenstep: warning: ")
    half(root / "test" / "images" / "p0.png")
    code, out, err = call("data", "check", root, "--json", "-")
    assert code == 1 and len(err.splitlines()) == 2
    for text, kinds in (((tmp_path / "found.json").read_text(), 1), (out, 2)):
        report: dict[str, Any] = json.loads(text)
        assert list(report) == ["files", "pixels", "values", "faults"]
        assert report["pixels"]["train"]["road"] == 16 and report["values"]["test"][-1] == 255
        assert len(report["faults"]) == kinds
        assert list(report["faults"][0]) == ["file", "kind", "severity", "text"]


def test_a_wrong_call_is_code_2(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments in ((root / "no",), (tmp_path / "empty",), (root, "--json", tmp_path)):
        code, _, err = call("data", "check", *arguments)
        assert code == 2 and len(err.splitlines()) == 1 and ";" in err


def test_many_faults_of_a_kind_are_counted(root: Path) -> None:
    for number in range(40):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(root / "train" / "images" / f"x{number}.png")
    code, _, err = call("data", "check", root)
    assert code == 0 and len(err.splitlines()) < 20 and "30 more" in err
