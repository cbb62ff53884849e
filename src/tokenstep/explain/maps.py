"""Maps of where one picture's tokens go, drawn onto axes, so that a notebook may compose them.

The module needs matplotlib, the extra `plot`. Colours are viridis for what is ordered and those of
Okabe and Ito for what is not. Readers with any common colour blindness tell them apart.
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

from tokenstep.explain.picture import (
    ExitView,
    View,
    depth_name,
    depths_of,
    difference_rows,
    differences,
    ends_of,
    over_pixels,
)

WIDTH = 8.0  # inches of a figure, at DPI dots each: 800 px
DPI = 100
BLACK, ORANGE, SKY, YELLOW = "#000000", "#e69f00", "#56b4e9", "#f0e442"
BLUE, RED = "#0072b2", "#d55e00"
_DIFFERENCES = (RED, BLUE, YELLOW)  # lost, gained, both wrong
_GREYED = 0.35  # weight of the picture under a map's colours


def figure(*draws: Callable[[Axes], None], height: float) -> Figure:
    """A figure of one or more axes side by side, 800 px wide and ``height`` inches high."""
    page = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    for place, draw in enumerate(draws, start=1):
        draw(page.add_subplot(1, len(draws), place))
    return page


def map_height(view: View) -> float:
    """Inches that a map of a picture needs, with room for its title and legend."""
    height, width = view.image.shape[:2]
    return min(12.0, WIDTH * float(height / width) + 0.9)


def png(page: Figure, *, photo: bool = False) -> bytes:
    """The figure as the bytes of a PNG; a ``photo`` gets 256 colours, a third of the bytes."""
    stream = io.BytesIO()
    page.savefig(stream, format="png")
    if not photo:
        return stream.getvalue()
    few = Image.open(stream).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    stream = io.BytesIO()
    few.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def partition(axes: Axes, view: View) -> None:
    """Outline every token over the picture: a superpatch, or a single patch."""
    use, patch = view.result.tokens, view.result.patch
    _map(axes, view.image)
    lines = _outlines(use.owner, patch)
    axes.add_collection(LineCollection(lines, colors=BLACK, linewidths=1.3))
    axes.add_collection(LineCollection(lines, colors="white", linewidths=0.5))
    axes.set_title(f"{use.start} tokens for {use.grid} patches of {patch} x {patch} px")


def halting(axes: Axes, view: View) -> None:
    """Colour each cell by where its token halted, dark early and bright at the end."""
    use = view.result.tokens
    ends, depths = ends_of(use), depths_of(use)
    colours = depth_colours([_place(end, use.depth) for end in depths])
    table = np.zeros((2 * use.depth + 1, 3), np.uint8)
    table[depths] = (255 * np.array(colours)).round()
    _map(axes, _tinted(view, table[ends]))
    lines = _outlines(use.owner, view.result.patch)
    axes.add_collection(LineCollection(lines, colors=BLACK, linewidths=0.4))
    shares = [(ends == blocks).mean() for blocks in depths]
    names = [f"{depth_name(b, use.depth)}: {s:.0%}" for b, s in zip(depths, shares, strict=True)]
    axes.set_title("where tokens halt, share of the cells")
    _below(axes, [Patch(facecolor=c, label=n) for c, n in zip(colours, names, strict=True)])


def _place(end: int, depth: int) -> float:
    """Where a drop stands among the exits: just before its block ends."""
    return end if end <= depth else end - depth - 0.5


def confidence(axes: Axes, view: View, exit_view: ExitView) -> None:
    """Colour each cell by the confidence of its token; white where it was gone before."""
    shades = np.nan_to_num(exit_view.confidence)
    coloured = (255 * colormaps["viridis"](shades)[..., :3]).round().astype(np.uint8)
    coloured[np.isnan(exit_view.confidence)] = 255
    shown = axes.imshow(shades, cmap="viridis", vmin=0, vmax=1, visible=False)
    _map(axes, over_pixels(coloured, view.result.patch, view.image.shape[:2]))
    page = axes.get_figure(root=True)
    if page is not None:
        scale = page.colorbar(shown, ax=axes, shrink=0.8)
        scale.set_label("confidence of the token, 0 to 1")
        if exit_view.threshold is not None:
            scale.ax.axhline(exit_view.threshold, color=RED, linewidth=2)
    parts = [f"exit after block {exit_view.after}", "exits are off"]
    if exit_view.threshold is not None:
        parts[1] = f"above {exit_view.threshold:g} tokens may halt"
    if np.isnan(exit_view.confidence).any():
        parts.append("white: had halted before")
    axes.set_title("; ".join(parts))


def difference(axes: Axes, view: View, dense: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
    """Mark the pixels where STEP and dense differ; ``dense`` and ``truth`` are ``(h, w)``."""
    step = view.result.labels
    masks = differences(step, dense, truth)
    drawn = _grey(view.image)
    for colour, mask in zip(_DIFFERENCES, masks.values(), strict=True):
        drawn[mask] = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    _map(axes, drawn)
    axes.set_title("where STEP and dense differ, share of the labelled pixels")
    rows = difference_rows(step, dense, truth)
    names = [f"{row['difference']}, {row['labelled_share']:.1%}" for row in rows]
    _below(axes, [Patch(facecolor=c, label=n) for c, n in zip(_DIFFERENCES, names, strict=True)])


def depth_colours(depths: Sequence[float]) -> list[tuple[float, float, float]]:
    """A colour of viridis for each halting depth, bright where tokens ran through all blocks."""
    return [tuple(map(float, colormaps["viridis"](b / max(depths))[:3])) for b in depths]  # type: ignore[misc]


def _map(axes: Axes, picture: NDArray[np.uint8]) -> None:
    height, width = picture.shape[:2]
    axes.imshow(picture, extent=(0, width, height, 0), interpolation="antialiased")
    axes.set_xlabel("px")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _below(axes: Axes, entries: list[Patch]) -> None:
    axes.legend(
        handles=entries, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=3, frameon=False
    )


def _grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture in pale grey ``(h, w, 3)``, to draw on."""
    pale = 128 + image.mean(axis=2) / 2
    return np.repeat(pale[..., None], 3, axis=2).astype(np.uint8)


def _tinted(view: View, cells: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Colours of cells ``(H, W, 3)`` over the greyed picture."""
    over = over_pixels(cells, view.result.patch, view.image.shape[:2])
    return (_GREYED * _grey(view.image) + (1 - _GREYED) * over).astype(np.uint8)


def _outlines(owner: NDArray[np.int64], patch: int) -> list[NDArray[np.int64]]:
    """Sides of cells between two tokens: each from ``(x, y)`` to ``(x, y)`` in pixels."""
    rows, columns = np.nonzero(owner[:, 1:] != owner[:, :-1])
    upright = np.stack([columns + 1, rows, columns + 1, rows + 1], axis=1)
    rows, columns = np.nonzero(owner[1:] != owner[:-1])
    level = np.stack([columns, rows + 1, columns + 1, rows + 1], axis=1)
    return list(patch * np.concatenate([upright, level]).reshape(-1, 2, 2))
