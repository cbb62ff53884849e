"""Plots of a report's tables, drawn onto axes as `maps` draws maps.

Each takes the rows of the table that it stands over.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tokenstep.explain.maps import BLACK, BLUE, ORANGE, RED, SKY, depth_colours
from tokenstep.explain.picture import Rows

METHODS = {  # colour, marker and name of each method
    "dense": (BLACK, "o", "dense"),
    "merging_alone": (ORANGE, "s", "merging alone"),
    "step": (BLUE, "^", "STEP"),
}


def live(axes: Axes, rows: Rows) -> None:
    """Tokens that enter each block, of a picture or as means of a folder; 100 % is dense."""
    blocks = [row["block"] for row in rows]
    tokens = [row["mean_tokens" if "mean_tokens" in row else "tokens"] for row in rows]
    patches = tokens[0] / rows[0]["dense_share"]
    axes.step(blocks, tokens, where="mid", color=BLUE, marker="^", label="STEP")
    if "p5_tokens" in rows[0]:
        low, high = ([row[key] for row in rows] for key in ("p5_tokens", "p95_tokens"))
        axes.fill_between(
            blocks, low, high, step="mid", color=SKY, alpha=0.4, label="5th to 95th percentile"
        )
    axes.axhline(patches, color=BLACK, linestyle="--", label="dense")
    axes.set_xlabel("block")
    axes.set_ylabel("live tokens")
    axes.set_ylim(0, 1.05 * patches)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes)


def shares(axes: Axes, rows: Rows) -> None:
    """Each class's share of the pixels beside its share of the tokens."""
    _bars(axes, rows, {"pixels_share": (BLACK, "pixels"), "tokens_share": (ORANGE, "tokens")})
    axes.set_xlabel("share of the labelled pixels, and of their tokens")
    _legend_above(axes)


def density(axes: Axes, rows: Rows) -> None:
    """Tokens that each class gets for 1000 of its patches; the dense model gives 1000."""
    _bars(axes, rows, {"tokens_per_1000_patches": (BLUE, "tokens")})
    axes.set_xlabel("tokens for 1000 patches of the class")
    axes.xaxis.set_major_formatter("{x:.0f}")


def class_depths(axes: Axes, rows: Rows, depths: Sequence[float]) -> None:
    """The share of each class's tokens that end at each depth."""
    places = np.arange(len(rows))
    keys = [key for key in rows[0] if key != "class"]
    left = np.zeros(len(rows))
    for key, colour in zip(keys, depth_colours(depths), strict=True):
        values = np.array([row[key] for row in rows])
        name = key.removesuffix("_share").replace("_", " ")
        axes.barh(places, values, left=left, color=colour, label=name, edgecolor="white")
        left += values
    _classes(axes, rows)
    axes.set_xlabel("share of the class's tokens")
    _legend_above(axes)


def depth_errors(axes: Axes, rows: Rows) -> None:
    """The share of wrong tokens by the depth where they end, beside dense on the same pixels."""
    wanted = {
        "token_wrong_share": (RED, "tokens, by their majority"),
        "step_wrong_share": (BLUE, "their pixels, STEP"),
        "dense_wrong_share": (BLACK, "the same pixels, dense"),
    }
    _columns(axes, rows, "depth", wanted)
    axes.set_ylabel("share that is wrong")


def reliability(axes: Axes, rows: Rows, after: int) -> None:
    """Accuracy against confidence at one exit, with the share of the sub-cells as bars."""
    bins = [row for row in rows if row["exit_after_block"] == after]
    confidence = [row["confidence"] for row in bins]
    axes.bar(
        np.floor(np.minimum(confidence, 0.999) * 10) / 10 + 0.05,
        [row["sub_cells_share"] for row in bins],
        width=0.09,
        color=SKY,
        alpha=0.6,
        label="share of the sub-cells",
    )
    axes.plot([0, 1], [0, 1], color=BLACK, linestyle="--", label="honest")
    axes.plot(
        confidence, [row["accuracy"] for row in bins], color=RED, marker="o", label="accuracy"
    )
    axes.set_title(f"exit after block {after}, ECE {bins[0]['exit_ece']:.3f}")
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy, and share of the sub-cells")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_aspect("equal")
    _grid(axes)
    axes.legend(loc="upper left")  # above stands the title


def purity(axes: Axes, rows: Rows) -> None:
    """How pure superpatches of each size are."""
    wanted = {"mean_purity": (SKY, "mean purity"), "pure_share": (BLUE, "of one class alone")}
    _columns(axes, rows, "patches_a_side", wanted)
    axes.set_xlabel("side of the superpatch, patches")
    axes.set_ylabel("share")
    axes.set_ylim(0, 1.02)


def size_errors(axes: Axes, rows: Rows) -> None:
    """The share of wrong pixels by the size of their superpatch, for each method."""
    wanted = {
        f"{method}_wrong_share": (colour, name) for method, (colour, _, name) in METHODS.items()
    }
    present = {key: value for key, value in wanted.items() if key in rows[0]}
    _columns(axes, rows, "patches_a_side", present)
    axes.set_xlabel("side of the superpatch, patches")
    axes.set_ylabel("pixels that are wrong")


def bands(axes: Axes, rows: Rows) -> None:
    """The share of wrong pixels by their distance from a boundary, for each method."""
    places = np.arange(len(rows))
    for method, (colour, marker, name) in METHODS.items():
        key = f"{method}_wrong_share"
        if key in rows[0]:
            values = [np.nan if row[key] is None else row[key] for row in rows]
            axes.plot(places, values, color=colour, marker=marker, label=name)
    names = [f"to {row['to_px']}" if row["to_px"] else f"over {row['above_px']}" for row in rows]
    axes.set_xticks(places, names)
    axes.set_xlabel("distance from the nearest pixel of another class, px")
    axes.set_ylabel("pixels that are wrong")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _finish(axes)


def losses(axes: Axes, rows: Rows) -> None:
    """Points that each picture loses against dense, over its tokens."""
    known = [row for row in rows if row["points_lost"] is not None]
    shares = [row["tokens"] / row["patches"] for row in known]
    axes.axhline(0, color=BLACK, linestyle="--", label="dense")
    axes.scatter(
        shares,
        [row["points_lost"] for row in known],
        s=18,
        color=BLUE,
        alpha=0.6,
        label="a picture",
    )
    axes.set_xlabel("tokens at the start, share of dense")
    axes.set_ylabel("points of pixel accuracy below dense")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    _finish(axes)


def _bars(axes: Axes, rows: Rows, wanted: dict[str, tuple[str, str]]) -> None:
    """Bars to the right, one group per class."""
    places, thick = np.arange(len(rows)), 0.8 / len(wanted)
    for number, (key, (colour, name)) in enumerate(wanted.items()):
        shift = (number - (len(wanted) - 1) / 2) * thick
        axes.barh(places + shift, [row[key] for row in rows], thick, color=colour, label=name)
    _classes(axes, rows)
    _grid(axes)


def _classes(axes: Axes, rows: Rows) -> None:
    axes.set_yticks(np.arange(len(rows)), [row["class"] for row in rows])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1))


def _columns(axes: Axes, rows: Rows, by: str, wanted: dict[str, tuple[str, str]]) -> None:
    """Bars upwards, one group per row; a share that is None has no bar."""
    places, thick = np.arange(len(rows)), 0.8 / len(wanted)
    for number, (key, (colour, name)) in enumerate(wanted.items()):
        shift = (number - (len(wanted) - 1) / 2) * thick
        values: list[Any] = [row[key] or 0.0 for row in rows]
        axes.bar(places + shift, values, thick, color=colour, label=name)
    axes.set_xticks(places, [str(row[by]) for row in rows])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _finish(axes)


def _finish(axes: Axes) -> None:
    _grid(axes)
    _legend_above(axes)


def _grid(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _legend_above(axes: Axes) -> None:
    """Put the legend where it covers nothing; matplotlib's own search for a place is slow."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
