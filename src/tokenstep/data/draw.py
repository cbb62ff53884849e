"""Pictures of a result: the label map, the classes over the picture, where the tokens went.

All functions are pure and return PIL images. A legend never covers the picture, it stands in a
strip of its own below it; the picture's top left corner stays at (0, 0).
Letters: h x w pixels of the picture, H x W cells of the patch grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tokenstep.data.labelled_folder import IGNORE

Colour = tuple[int, int, int]

MAX_SIDE = 2000  # px, long side of everything drawn here with a legend

# Anchors of viridis: readable for colour-blind eyes, and steadily brighter, so in grey print too.
_VIRIDIS = np.frombuffer(
    bytes.fromhex("440154 46327e 365c8d 277f8e 1fa187 4ac16d a0da39 fde725"), dtype=np.uint8
).reshape(-1, 3)
_PAPER, _INK, _LINE = (250, 250, 250), (24, 24, 24), (10, 10, 10)
_TINT = 0.55  # share of the depth colour in a token map; the rest is the greyed picture
_GREYED = 0.7  # share of grey in the greyed picture


@dataclass(frozen=True, slots=True)
class _Entry:
    colour: Colour
    name: str
    share: float  # 0..1


def palette_image(labels: NDArray[np.uint8], palette: Sequence[Colour]) -> Image.Image:
    """Return the label map as a palette picture: pixel values are the class indices themselves.

    Labels are (h, w) uint8, 255 = ignore; the palette has RGB in 0..255 per class; 255 is black.

    Raises:
        ValueError: labels are not (h, w) uint8, or hold a class that the palette does not have.
    """
    colours = _colours(labels, palette)
    image = Image.fromarray(np.ascontiguousarray(labels))
    image.putpalette(colours.tobytes())
    return image


def overlay(
    image: Image.Image,
    labels: NDArray[np.uint8],
    *,
    names: Sequence[str],
    palette: Sequence[Colour],
    alpha: float = 0.5,
) -> Image.Image:
    """Blend the classes over the picture; a legend has those present, and their share of pixels.

    The picture is scaled down (never up) until picture and legend together have at most 2000 px
    on the long side. Shares are counted on the full label map. Ignored pixels (255) are black.

    Args:
        image: RGB picture of w x h pixels.
        labels: (h, w) uint8, class index per pixel, 255 = ignore.
        names: One per class; a name too long for the legend is cut short.
        palette: RGB in 0..255 per class, as many as names.
        alpha: Weight of the class colour, 0 (picture alone) to 1 (colours alone).

    Raises:
        ValueError: the shapes, the mode, alpha or the number of classes do not fit together.
    """
    _check_rgb(image)
    if labels.shape != (image.height, image.width):
        raise ValueError(f"labels {labels.shape} for a picture {(image.height, image.width)}")
    if len(names) != len(palette):
        raise ValueError(f"{len(names)} class names, but {len(palette)} palette colours")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in 0..1, not {alpha}")
    colours = _colours(labels, palette)
    shown = [*names, *["(ignored)"] * (256 - len(names))]
    entries = _entries(np.bincount(labels.reshape(-1)), colours, shown)
    legend = _legend(entries, "share of the pixels", width=image.width)
    scaled = _scaled(image, legend)
    rows = _pixels_under(image.height, scaled.height)[:, None]
    columns = _pixels_under(image.width, scaled.width)
    painted = Image.fromarray(colours[labels[rows, columns]])
    return _stack(Image.blend(scaled, painted, alpha), legend)


def token_map(
    image: Image.Image,
    *,
    level: NDArray[np.int8],
    layer: NDArray[np.int16],
    patch: int,
    depth: int,
) -> Image.Image:
    """Draw where the tokens went: superpatch borders, and cells coloured by their halting depth.

    Dark halted early, bright ran through all blocks. The picture is scaled down (never up) until
    picture and legend together have at most 2000 px on the long side; borders are drawn after
    that. Cells that hang over the picture are cut off, but count in the legend.

    Args:
        image: RGB picture of w x h pixels; H = ceil(h / patch), W = ceil(w / patch).
        level: (H, W) int8, log2 of the side, in patches, of the cell's superpatch, which is
            aligned at multiples of its side.
        layer: (H, W) int16, 0..depth, number of blocks after which the cell's token halted;
            depth = it ran through all blocks.
        patch: Side of a patch in pixels of the picture.
        depth: Number of blocks of the encoder.

    Raises:
        ValueError: the mode, the grid's shape, a level or a halting depth is out of bounds.
    """
    _check_rgb(image)
    grid = math.ceil(image.height / patch), math.ceil(image.width / patch)
    _check_cells("level", level, grid=grid, top=15)  # 2**15 patches: wider than any picture
    _check_cells("layer", layer, grid=grid, top=depth)
    token = _superpatch_index(level)
    colours = _depth_colours(depth)
    shown = [*(f"halted after block {k}" for k in range(depth)), f"ran all {depth} blocks"]
    count = f"tokens: {len(np.unique(token))} for {token.size} grid cells"
    entries = _entries(np.bincount(layer.reshape(-1)), colours, shown)
    heading = f"{count}, one per outlined square; below: share of the cells"
    legend = _legend(entries, heading, width=image.width)
    scaled = _scaled(image, legend)
    rows = _pixels_under(image.height, scaled.height)[:, None] // patch
    columns = _pixels_under(image.width, scaled.width) // patch
    greyed = Image.blend(scaled, scaled.convert("L").convert("RGB"), _GREYED)
    drawn = np.array(Image.blend(greyed, Image.fromarray(colours[layer[rows, columns]]), _TINT))
    drawn[_borders(token[rows, columns])] = _LINE
    return _stack(Image.fromarray(drawn), legend)


def _check_rgb(image: Image.Image) -> None:
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB picture, got mode {image.mode!r}: convert it first")


def _check_cells(
    what: str, cells: NDArray[np.int8] | NDArray[np.int16], *, grid: tuple[int, int], top: int
) -> None:
    if cells.shape != grid:
        raise ValueError(f"{what} has shape {cells.shape}, but the picture's grid is {grid}")
    if cells.min() < 0 or cells.max() > top:
        raise ValueError(f"{what} must lie in 0..{top}, got {cells.min()}..{cells.max()}")


def _colours(labels: NDArray[np.uint8], palette: Sequence[Colour]) -> NDArray[np.uint8]:
    """Return the (256, 3) uint8 colour table, black where the palette ends."""
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError(f"labels must be (h, w) uint8, got {labels.shape} {labels.dtype}")
    if len(palette) > IGNORE:
        raise ValueError(f"a palette has at most {IGNORE} colours, got {len(palette)}")
    if labels[(labels >= len(palette)) & (labels != IGNORE)].size:
        raise ValueError(f"labels hold classes that the palette of {len(palette)} does not have")
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[: len(palette)] = np.array(palette, dtype=np.uint8).reshape(-1, 3)
    return colours


def _superpatch_index(level: NDArray[np.int8]) -> NDArray[np.int64]:
    """Name each cell (H, W) by the flat index of its superpatch's top left cell."""
    side = np.int64(1) << level.astype(np.int64)
    row, column = np.indices(level.shape)
    return np.ravel_multi_index((row // side * side, column // side * side), level.shape)


def _borders(token: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the pixels whose left or upper neighbour belongs to another token."""
    border = np.zeros(token.shape, dtype=np.bool_)
    border[:, 1:] |= token[:, 1:] != token[:, :-1]
    border[1:] |= token[1:] != token[:-1]
    return border


def _depth_colours(depth: int) -> NDArray[np.uint8]:
    """Return the (depth + 1, 3) uint8 colours of the halting depths 0..depth."""
    at = np.linspace(0, len(_VIRIDIS) - 1, depth + 1)
    channels = [np.interp(at, np.arange(len(_VIRIDIS)), channel) for channel in _VIRIDIS.T]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def _pixels_under(source: int, drawn: int) -> NDArray[np.int64]:
    """Return (drawn,) int64, the source's pixels under the centres of the pixels drawn."""
    half = source / drawn / 2
    return np.linspace(half, source - half, drawn).astype(np.int64)


def _entries(
    counts: NDArray[np.intp], colours: NDArray[np.uint8], names: Sequence[str]
) -> list[_Entry]:
    """Return a legend's entries for what occurs at all, counts[k] times."""
    shares = counts / counts.sum()
    present = np.flatnonzero(counts).tolist()
    return [_Entry(tuple(colours[k].tolist()), names[k], float(shares[k])) for k in present]


def _legend(entries: Sequence[_Entry], heading: str = "", *, width: int) -> Image.Image:
    """Draw up to 256 entries on at most MAX_SIDE x MAX_SIDE / 2, whatever the picture's width."""
    px = 20 if width >= 1400 and len(entries) <= 40 else 14  # size of the letters
    line = 8 * px // 5
    font = ImageFont.load_default(px)
    texts = [_text(entry, font, limit=20 * px) for entry in entries]
    step = math.ceil(max(font.getlength(text) for text in texts)) + 2 * line
    top = line // 2 + (line if heading else 0)
    needed = math.ceil(len(entries) / ((MAX_SIDE // 2 - top - line // 2) // line))
    rows = math.ceil(len(entries) / max(min(width, MAX_SIDE) // step, needed))
    columns = math.ceil(len(entries) / rows)
    across = max(columns * step, math.ceil(font.getlength(heading)) + line)
    strip = Image.new("RGB", (across, top + rows * line + line // 2), _PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((line // 2, top - line // 2), heading, _INK, font, anchor="lm")
    for k, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        x, y = k // rows * step + line // 2, top + k % rows * line
        draw.rectangle((x, y + 3, x + px, y + line - 4), entry.colour, _INK)
        draw.text((x + line, y + line // 2), text, _INK, font, anchor="lm")
    return strip


def _text(entry: _Entry, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, *, limit: int) -> str:
    """Write name and share, the name cut short where both are wider than limit pixels."""
    name = " ".join(entry.name.split())  # on one line
    share = "<0.1 %" if entry.share < 0.0005 else f"{entry.share:.1%}".replace("%", " %")
    text = f"{name}  {share}"
    while name and font.getlength(text) > limit:
        name = name[: len(name) * 7 // 8]
        text = f"{name}…  {share}"
    return text


def _scaled(image: Image.Image, legend: Image.Image) -> Image.Image:
    """Scale the picture down to what the legend leaves of MAX_SIDE x MAX_SIDE, at least 1 px."""
    factor = min(1.0, MAX_SIDE / image.width, (MAX_SIDE - legend.height) / image.height)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _stack(picture: Image.Image, legend: Image.Image) -> Image.Image:
    page = max(picture.width, legend.width), picture.height + legend.height
    sheet = Image.new("RGB", page, _PAPER)
    sheet.paste(picture)
    sheet.paste(legend, (0, picture.height))
    return sheet
