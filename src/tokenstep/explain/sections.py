"""What a report of tokens consists of: the text, figures and tables of each section."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from tokenstep.explain import maps, plots
from tokenstep.explain.picture import Rows, View, difference_rows
from tokenstep.explain.report import FigureFile, Section

Draw = Callable[[Axes], None]


def _figure(name: str, alt_text: str, *draws: Draw, height: float = 4.0) -> FigureFile:
    return FigureFile(name, alt_text, maps.png(maps.figure(*draws, height=height)))


def _photo(name: str, alt_text: str, draw: Draw, view: View) -> FigureFile:
    page = maps.figure(draw, height=maps.map_height(view))
    return FigureFile(name, alt_text, maps.png(page, photo=True))


def picture_sections(
    name: str, view: View, report: dict[str, Any], *, rank: int = 2
) -> list[Section]:
    """The sections of one picture: ``name`` is that of its files, ``report`` its numbers."""
    gmac = report["gmac"]
    text = (
        f"{report['width']} x {report['height']} px; {gmac['used']:.2f} GMAC in place of "
        f"{gmac['dense']:.2f} for the dense model ({gmac['policy']:.2f} of them the policy's)."
    )
    height = 0.85 * maps.map_height(view)  # its scale takes some of the width
    confidence = [
        _figure(
            f"{name}.confidence-{exit_view.after}",
            f"confidence of each token at the exit after block {exit_view.after}",
            partial(maps.confidence, view=view, exit_view=exit_view),
            height=height,
        )
        for exit_view in view.exits
    ]
    live = partial(plots.live, rows=report["live"])
    outlines = partial(maps.partition, view=view)
    halting = partial(maps.halting, view=view)
    return [
        Section(name, text, rank=rank),
        Section(
            "Superpatches",
            "One token stands for each outlined square. Large squares are where the policy found "
            "little to tell apart.",
            [_photo(f"{name}.partition", "superpatches over the picture", outlines, view)],
            [report["sizes"]],
            rank=3,
        ),
        Section(
            "Where tokens halt",
            "A token that an exit is sure of halts there, and what the exit said of it stands; "
            "of each class the surest few go on as context.",
            [_photo(f"{name}.halting", "halting depth of each token", halting, view)],
            [report["depths"]],
            rank=3,
        ),
        Section(
            "How sure the exits are",
            "The confidence of a token is the mean over its sub-cells of the top probability, "
            "after the exit's temperature. The red line in the scale is the bar to halt.",
            confidence,
            [report["exits"]],
            rank=3,
        ),
        Section(
            "Live tokens",
            "Tokens that enter each block.",
            [_figure(f"{name}.live", "live tokens per block", live)],
            [report["live"]],
            rank=3,
        ),
    ]


def difference_section(
    name: str, view: View, dense: NDArray[np.uint8], truth: NDArray[np.uint8]
) -> Section:
    """Where a picture's label map differs from the dense model's; both maps ``(h, w)``."""
    draw = partial(maps.difference, view=view, dense=dense, truth=truth)
    return Section(
        "Difference to dense",
        "Pixels whose class is not the one that the dense model gives.",
        [_photo(f"{name}.difference", "pixels where STEP and dense differ", draw, view)],
        [difference_rows(view.result.labels, dense, truth)],
        rank=3,
    )


def set_sections(report: dict[str, Any]) -> list[Section]:
    """The sections of a labelled folder, before those of single pictures."""
    return [*_token_sections(report), *_exit_sections(report), *_error_sections(report)]


def _token_sections(report: dict[str, Any]) -> list[Section]:
    classes = report["classes"]
    height = 1.5 + 0.28 * len(classes)
    # A drop stands just before its block ends.
    depths = [row["blocks"] - 0.5 * row["depth"].startswith("drop") for row in report["depths"]]
    return [
        Section(
            "What is saved, and what is lost",
            "Each picture was run in each way. Merging alone is the same without exits. What is "
            "lost is counted from dense here, while an operating point's loss is counted from the "
            "best that calibration found. In the inter-class boundary IoU neither the border of "
            "the picture nor that of an unlabelled region is a boundary.",
            tables=[report["ways"]],
        ),
        Section(
            "Live tokens per block",
            "Means over the pictures. Tokens only end at exits.",
            [_figure("live", "live tokens per block", partial(plots.live, rows=report["live"]))],
            [report["live"]],
        ),
        Section(
            "Tokens per class",
            "A token that lies over several classes counts for each by its share of the token's "
            "pixels. Only labelled pixels count. The dense model spends 1000 tokens on 1000 "
            "patches of any class.",
            [
                _figure(
                    "classes",
                    "share of pixels and of tokens of each class, and tokens per 1000 patches",
                    partial(plots.shares, rows=classes),
                    partial(plots.density, rows=classes),
                    height=height,
                )
            ],
            [classes],
        ),
        Section(
            "Where each class halts",
            "Of the tokens of each class, counted as above, the share that ended at each depth.",
            [
                _figure(
                    "class_depths",
                    "share of each class's tokens that halted after each exit",
                    partial(plots.class_depths, rows=report["class_depths"], depths=depths),
                    height=height,
                )
            ],
            [report["class_depths"]],
            headings=_depth_headings(report["class_depths"]),
        ),
    ]


def _depth_headings(rows: Rows) -> dict[str, str]:
    keys = [key for row in rows[:1] for key in row if key != "class"]
    names = (key.removesuffix("_share").replace("_", " ") for key in keys)
    return {k: f"{n}, share of the class's tokens" for k, n in zip(keys, names, strict=True)}


def _exit_sections(report: dict[str, Any]) -> list[Section]:
    rows = report["reliability"]
    exits = sorted({row["exit_after_block"] for row in rows})
    diagrams = [partial(plots.reliability, rows=rows, after=after) for after in exits]
    pairs = [diagrams[first : first + 2] for first in range(0, len(diagrams), 2)]
    names = [f"reliability-{number}" for number in range(1, len(pairs) + 1)]
    return [
        Section(
            "How often a halted token is wrong",
            "A token is wrong if the class that most of its pixels got in the label map is not "
            "the one that most of its labelled pixels have. Beside it stand the wrong pixels of "
            "such tokens, and those that dense has on the same pixels: only what lies above dense "
            "is the price of merging and halting.",
            [
                _figure(
                    "depths",
                    "share of wrong tokens and pixels by halting depth",
                    partial(plots.depth_errors, rows=report["depths"]),
                )
            ],
            [report["depths"]],
        ),
        Section(
            "Whether the exits' confidence is honest",
            "Confidence against accuracy of each sub-cell that was live at the exit, after its "
            "temperature, in ten bins. Points below the dashed line mean an exit that is too "
            "sure. ECE is the mean distance from the line.",
            [
                _figure(name, "confidence against accuracy of the exits", *pair, height=4.6)
                for name, pair in zip(names, pairs, strict=True)
            ],
            [rows],
        ),
    ]


def _error_sections(report: dict[str, Any]) -> list[Section]:
    return [
        Section(
            "Superpatch sizes",
            "The purity of a superpatch is the share of its labelled pixels that its most "
            "frequent class holds; side 1 is a patch that was not merged. Right: the pixels under "
            "superpatches of that size that each way got wrong.",
            [
                _figure(
                    "sizes",
                    "purity of superpatches and share of wrong pixels by size",
                    partial(plots.purity, rows=report["sizes"]),
                    partial(plots.size_errors, rows=report["sizes"]),
                )
            ],
            [report["sizes"]],
        ),
        Section(
            "Boundaries against interiors",
            "Wrong pixels by their distance from the nearest labelled pixel of another class: the "
            "larger of the steps across and down.",
            [
                _figure(
                    "bands",
                    "share of wrong pixels by distance from a boundary",
                    partial(plots.bands, rows=report["bands"]),
                )
            ],
            [report["boundary"], report["bands"]],
        ),
        Section(
            "Loss and tokens of each picture",
            "What a picture loses is counted in points of pixel accuracy: hundredths of the "
            "labelled pixels that dense has right, less those that STEP has right. Below 0, STEP "
            "is better.",
            [
                _figure(
                    "pictures",
                    "points of pixel accuracy below dense, over tokens, one dot per picture",
                    partial(plots.losses, rows=report["pictures"]),
                )
            ],
            [report["pictures"]],
            headings={"points_lost": "points of pixel accuracy below dense"},
        ),
    ]
