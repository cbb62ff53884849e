"""`tokenstep explain`: its page, its figures, its numbers, and what it refuses."""

import json
import re
from html import escape
from pathlib import Path

import pytest
from commands import call, refused, save_model
from conftest import CLASSES
from samples import labelled_folder, save_pattern

from tokenstep import __version__
from tokenstep.explain.report import shown


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save_pattern(tmp_path / "photo.png", 40, 50)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return labelled_folder(tmp_path / "tiny_set", CLASSES, [(40, 56), (17, 90)])


def test_explain_writes_a_page_its_figures_and_its_numbers(
    saved: Path, photo: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "report"
    given = (photo, tmp_path / "broken.png", "--model", saved, "--out", out)
    code, printed, err = call("explain", *given, "--max-side", "40")
    assert code == 1 and str(out / "report.html") in printed
    (line,) = err.splitlines()
    assert "broken.png" in line
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    (picture,) = report["pictures"]
    assert (picture["name"], picture["width"], picture["height"]) == ("photo", 40, 32)
    (fault,) = report["faults"]
    assert (fault["file"], fault["name"]) == (str(tmp_path / "broken.png"), "broken")
    assert report["version"] == __version__ and set(report["thresholds"]["exits"]) == {"1"}
    names = {path.name for path in out.glob("*.figure.png")}
    assert names == {
        f"photo.{kind}.figure.png" for kind in ("partition", "halting", "confidence-1", "live")
    }
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4 and "://" not in page
    # A second run on the folder does not take the figures for pictures.
    (tmp_path / "broken.png").unlink()
    assert call("explain", tmp_path, "--model", saved, "--out", out)[0] == 0
    again = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in again["pictures"]] == ["photo"]


def test_explain_shows_every_number_of_a_labelled_folder(
    saved: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    code, _, err = call("explain", "--data", data, "--model", saved, "--out", tmp_path / "report")
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert report["data"] == data.name and report["faults"] == []
    shown_tables = [table for table in report.values() if isinstance(table, list) and table]
    for worst in report["worst"]:
        shown_tables += [table for table in worst.values() if isinstance(table, list) and table]
    cells = sum(len(row) for table in shown_tables if table != report["worst"] for row in table)
    assert page.count("<td>") == cells, "no table shows what the JSON does not hold, nor less"
    for table in shown_tables:
        if table != report["worst"]:
            for key, value in table[0].items():
                assert f"<td>{escape(shown(key, value))}</td>" in page
    assert len(report["worst"]) == min(10, report["images"])
    headings = re.findall("<th>(.*?)</th>", page)
    assert "inter-class boundary IoU" in headings and "boundary iou" not in headings
    bases = {text for text in headings if text.startswith("points")}
    assert bases == {"points of mIoU below dense", "points of pixel accuracy below dense"}
    assert not any(text.endswith("share") for text in headings), "a share of what?"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give pictures, or --data"),
        (("x.png", "--data", "DATA"), "give pictures, or --data"),
        (("x.png", "--names", "a*"), "--names"),
        (("--data", "DATA", "--max-side", "9"), "--max-side"),
        (("nowhere.png",), "nowhere.png: there is no such file"),
    ],
)
def test_explain_says_what_it_wants(
    saved: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    pytest.importorskip("matplotlib")
    given = [str(tmp_path) if one == "DATA" else one for one in arguments]
    assert said in refused("explain", *given, "--model", saved, "--out", tmp_path / "report")
