"""The page: whole without a network, every number as it stands in the rows, nothing unescaped."""

import re
import shutil
import subprocess
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tokenstep.explain.report import FigureFile, Section, page, shown

ROWS = [
    {"class": "a <b> & c", "pixels_share": 0.25, "tokens": 7, "points_lost": -0.123456},
    {"class": "d", "pixels_share": None, "tokens": 12345, "points_lost": 0.0},
]


class Reader(HTMLParser):
    """Cells of all tables, links that leave the page, and pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.outward: list[str] = []
        self.pictures: list[bytes] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "td"
        if tag in ("script", "link", "iframe", "object"):
            self.outward.append(tag)
        for name, value in attrs:
            if name == "src" and (value or "").startswith("data:image/png;base64,"):
                self.pictures.append(b64decode((value or "").partition(",")[2]))
            elif name in ("src", "href", "srcset", "action") and not (value or "").startswith("#"):
                self.outward.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert "://" not in text and "@import" not in text and "url(" not in text
    assert reader.outward == []
    return reader


def drawn(tmp_path: Path) -> bytes:
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "red.png")
    return (tmp_path / "red.png").read_bytes()


def test_every_value_is_shown_and_the_page_stands_alone(tmp_path: Path) -> None:
    figure = FigureFile("red", 'a "red" <figure>', drawn(tmp_path))
    sections = [
        Section("One & two", "less < more", [figure], [ROWS]),
        Section("under", "", rank=3),
    ]
    text = page("A <title>", "an intro", sections)
    reader = read(text)
    assert reader.cells == [shown(key, value) for row in ROWS for key, value in row.items()]
    assert reader.pictures == [figure.png]
    assert "<b>" not in text and "less &lt; more" in text and "A &lt;title&gt;" in text
    links = re.findall(r'href="#(\w+)"', text)
    assert links == ["s0"], "of the sections of the first rank"
    assert all(f'id="{link}"' in text for link in links)


def test_numbers_read_as_what_they_are() -> None:
    assert shown("pixels_share", 0.25) == "25.00 %"
    assert shown("miou", 0.5131) == "51.31 %"
    assert shown("tokens", 12345) == "12345"
    assert shown("points_lost", -0.123456) == "-0.1235"
    assert shown("anything", None) == "-"


def test_long_tables_are_folded_but_whole() -> None:
    rows = [{"picture": f"p{number}", "tokens": number} for number in range(40)]
    text = page("t", "i", [Section("s", "", tables=[rows, []])])
    assert text.count("<details>") == text.count("</details>") == 1
    assert len(read(text).cells) == 80


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium to open the page")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    figure = FigureFile("red", "red", drawn(tmp_path))
    report = tmp_path / "report.html"
    report.write_text(page("t", "i", [Section("s", "text", [figure], [ROWS])]), encoding="utf-8")
    shot = tmp_path / "shot.png"
    subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,700"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", report.as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    with Image.open(shot) as image:
        colours = dict((colour, count) for count, colour in image.convert("RGB").getcolors(2**20))
    assert colours.get((200, 10, 10)) == 30 * 20, "the figure is drawn"
