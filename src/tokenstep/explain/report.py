"""A report as one HTML file that needs no other: tables, and figures as data URIs."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from tokenstep.explain.picture import Rows

# What columns are called where the names in report.json, which stay as they are, say too little.
HEADINGS = {
    "miou": "mIoU",
    "boundary_iou": "inter-class boundary IoU",
    "points_lost": "points of mIoU below dense",
    "gmac": "GMAC per picture",
    "dense_share": "live tokens, share of dense",
    "pixels_share": "share of the labelled pixels",
    "labelled_share": "share of the labelled pixels",
    "tokens_share": "share of the tokens",
    "cells_share": "share of the cells",
    "sub_cells_share": "share of the sub-cells",
    "pure_share": "of one class, share of the superpatches",
    "token_wrong_share": "wrong, share of the tokens",
    "dense_wrong_share": "wrong in dense, share of the pixels",
    "merging_alone_wrong_share": "wrong in merging alone, share of the pixels",
    "step_wrong_share": "wrong in STEP, share of the pixels",
}
MANY = 15  # rows; a longer table is folded
# Columns of numbers from 0 to 1 that are shown in %.
PERCENT = ("share", "iou", "accuracy", "confidence", "purity")

_STYLE = """
body { font: 16px/1.5 sans-serif; color: #181818; background: #fff; max-width: 860px;
  margin: 2em auto; padding: 0 1em; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5em; border-bottom: 1px solid #ccc; }
img { max-width: 100%; height: auto; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; }
th, td { padding: 0.25em 0.7em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
"""


@dataclass(frozen=True, slots=True)
class FigureFile:
    """A figure in the report and in a file beside it; ``png`` is the whole file."""

    name: str  # of its file, without the suffix
    alt_text: str
    png: bytes


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, a text that defines what is shown, figures, and their tables."""

    title: str
    text: str
    figures: Sequence[FigureFile] = ()
    tables: Sequence[Rows] = ()
    rank: int = 2  # of the heading: one of rank 3 belongs to the last of rank 2
    headings: Mapping[str, str] = field(
        default_factory=dict
    )  # of columns; they go before `HEADINGS`


def page(title: str, intro: str, sections: Sequence[Section]) -> str:
    """The whole report as HTML text."""
    links = "".join(
        f'<li><a href="#s{number}">{escape(section.title)}</a></li>\n'
        for number, section in enumerate(sections)
        if section.rank == 2
    )
    body = "\n".join(_section(section, number) for number, section in enumerate(sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(intro)}</p>\n<ul>\n{links}</ul>\n{body}\n"
        "</body>\n</html>\n"
    )


def _section(section: Section, number: int) -> str:
    parts = [f'<h{section.rank} id="s{number}">{escape(section.title)}</h{section.rank}>']
    if section.text:
        parts.append(f"<p>{escape(section.text)}</p>")
    for figure in section.figures:
        data = b64encode(figure.png).decode("ascii")
        parts.append(f'<img alt="{escape(figure.alt_text)}" src="data:image/png;base64,{data}">')
    headings = {**HEADINGS, **section.headings}
    parts += [_table(rows, headings) for rows in section.tables if rows]
    return "\n".join(parts)


def _table(rows: Rows, headings: Mapping[str, str]) -> str:
    names = (headings.get(key, key.replace("_", " ")) for key in rows[0])
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(shown(key, row[key]))}</td>" for key in row) + "</tr>"
        for row in rows
    )
    table = f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'
    if len(rows) <= MANY:
        return table
    return f"<details><summary>Table of {len(rows)} rows</summary>\n{table}\n</details>"


def shown(column: str, value: object) -> str:
    """A value of a report's table as text; a dash where there is none."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{100 * value:.2f} %" if column.endswith(PERCENT) else f"{value:.4g}"
