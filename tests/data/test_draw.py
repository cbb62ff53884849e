"""Pictures of a result: what they show, where the legend stands, how large they get."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tokenstep.data.draw import MAX_SIDE, overlay, palette_image, token_map

NAMES = ["sky", "road", "tree"]
PALETTE = [(128, 128, 128), (128, 64, 128), (128, 128, 0)]
# (w, h): ordinary, single pixels, lines, and far longer than wide
SIZES = [(64, 48), (48, 64), (1, 1), (300, 1), (1, 300), (20000, 50), (50, 20000), (2600, 2500)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_labels(width: int, height: int, classes: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, classes, (height, width), dtype=np.uint8)


def pixels(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """Return the picture's part of a drawing, without the legend."""
    return np.asarray(image)[:height, :width]


def plain_grid(width: int, height: int, patch: int) -> tuple[int, int]:
    return math.ceil(height / patch), math.ceil(width / patch)


def draw_tokens(
    image: Image.Image, level: NDArray[np.int8], patch: int, layer: NDArray[np.int16] | None = None
) -> Image.Image:
    layer = np.full(level.shape, 4, dtype=np.int16) if layer is None else layer
    return token_map(image, level=level, layer=layer, patch=patch, depth=4)


# ---------------------------------------------------------------- palette_image


def test_palette_image_returns_the_labels_after_saving(tmp_path):
    labels = random_labels(31, 17)
    labels[3:5, 2:9] = 255
    palette_image(labels, PALETTE).save(tmp_path / "labels.png")
    read = Image.open(tmp_path / "labels.png")
    assert read.mode == "P"
    np.testing.assert_array_equal(np.asarray(read), labels)


def test_palette_image_shows_each_class_in_its_colour_and_ignore_in_black():
    labels = np.array([[0, 1, 2, 255]], dtype=np.uint8)
    shown = np.asarray(palette_image(labels, PALETTE).convert("RGB"))
    np.testing.assert_array_equal(shown[0], [*PALETTE, (0, 0, 0)])


def test_palette_image_takes_a_strided_view():
    labels = random_labels(20, 20)[::2, ::3]
    np.testing.assert_array_equal(np.asarray(palette_image(labels, PALETTE)), labels)


@pytest.mark.parametrize(
    ("labels", "palette"),
    [
        (np.full((2, 2), 3, dtype=np.uint8), PALETTE),
        (np.zeros((2, 2), dtype=np.uint8), []),
        (np.zeros((2, 2), dtype=np.int64), PALETTE),
        (np.zeros((2, 2, 1), dtype=np.uint8), PALETTE),
        (np.zeros((2, 2), dtype=np.uint8), [(0, 0, 0)] * 256),
    ],
)
def test_palette_image_refuses_what_it_cannot_show(labels, palette):
    with pytest.raises(ValueError, match=r"class|palette|labels"):
        palette_image(labels, palette)


# ---------------------------------------------------------------- overlay


def test_overlay_at_alpha_0_and_1_is_the_picture_and_the_colours():
    image, labels = noise(60, 40), random_labels(60, 40)
    clear = overlay(image, labels, names=NAMES, palette=PALETTE, alpha=0.0)
    solid = overlay(image, labels, names=NAMES, palette=PALETTE, alpha=1.0)
    np.testing.assert_array_equal(pixels(clear, 60, 40), np.asarray(image))
    np.testing.assert_array_equal(pixels(solid, 60, 40), np.array(PALETTE)[labels])


def test_overlay_legend_names_only_what_is_present():
    image = noise(600, 40)
    one = overlay(image, np.zeros((40, 600), dtype=np.uint8), names=NAMES, palette=PALETTE)
    legend = np.asarray(one)[40:].reshape(-1, 3)
    assert (legend == PALETTE[0]).all(axis=1).any()
    assert not (legend == PALETTE[1]).all(axis=1).any()


def test_legends_say_what_their_shares_are_of(monkeypatch):
    words = []
    write = "PIL.ImageDraw.ImageDraw.text"
    monkeypatch.setattr(write, lambda self, xy, text, *_, **__: words.append(text))
    overlay(noise(16, 16), random_labels(16, 16), names=NAMES, palette=PALETTE)
    assert any("share of the pixels" in text for text in words)
    words.clear()
    level, layer = np.zeros((2, 2), np.int8), np.zeros((2, 2), np.int16)
    token_map(noise(16, 16), level=level, layer=layer, patch=8, depth=3)
    assert any("share of the cells" in text for text in words)


def test_overlay_shows_ignored_pixels():
    labels = np.full((10, 10), 255, dtype=np.uint8)
    drawn = overlay(noise(10, 10), labels, names=NAMES, palette=PALETTE, alpha=1.0)
    assert not pixels(drawn, 10, 10).any()


def test_overlay_leaves_its_inputs_alone():
    image, labels = noise(30, 20), random_labels(30, 20)
    before = np.array(image), labels.copy()
    overlay(image, labels, names=NAMES, palette=PALETTE)
    np.testing.assert_array_equal(np.asarray(image), before[0])
    np.testing.assert_array_equal(labels, before[1])


@pytest.mark.parametrize("width", [1, 700, 4000])
def test_overlay_with_every_class_and_long_names_stays_within_the_cap(width):
    labels = np.resize(np.arange(256, dtype=np.uint8), (300, width))
    names = ["W" * 90 + str(k) for k in range(255)]
    palette = [(k, 255 - k, k // 2) for k in range(255)]
    drawn = overlay(noise(width, 300), labels, names=names, palette=palette)
    assert max(drawn.size) <= MAX_SIDE


def test_overlay_takes_names_with_line_breaks_and_letters_of_any_script():
    labels = random_labels(20, 20)
    drawn = overlay(noise(20, 20), labels, names=["a\nb", "", "Straße 道路"], palette=PALETTE)
    assert drawn.height > 20


@pytest.mark.parametrize(
    "wrong",
    [
        {"labels": np.zeros((4, 5), dtype=np.uint8)},
        {"names": NAMES[:2]},
        {"alpha": 1.5},
        {"image": Image.new("L", (4, 4))},
    ],
)
def test_overlay_refuses_what_does_not_fit(wrong):
    call = {
        "image": noise(4, 4),
        "labels": np.zeros((4, 4), dtype=np.uint8),
        "names": NAMES,
        "palette": PALETTE,
    } | wrong
    with pytest.raises(ValueError, match=r"labels|names|alpha|RGB"):
        overlay(**call)


# ---------------------------------------------------------------- token_map


def hand_made_level() -> NDArray[np.int8]:
    """Return an 8 x 12 grid with squares of 4, 2 and 1 patches, in neighbourhoods of all kinds."""
    level = np.zeros((8, 12), dtype=np.int8)
    level[0:4, 0:4] = 2
    level[0:4, 4:8] = 2  # equal neighbours: only the alignment parts them
    level[4:6, 2:4] = 1
    level[6:8, 2:4] = 1
    level[4:8, 8:12] = 2
    return level


def expected_borders(
    level: NDArray[np.int8], patch: int, width: int, height: int
) -> NDArray[np.bool_]:
    """Draw the first row and column of each superpatch, by loops, in a frame of its own."""
    border = np.zeros((height, width), dtype=bool)
    for i, j in np.ndindex(level.shape):
        side = 2 ** int(level[i, j])
        y, x = i // side * side * patch, j // side * side * patch
        if y > 0:
            border[y : y + 1, x : x + side * patch] = True
        if x > 0:
            border[y : y + side * patch, x : x + 1] = True
    return border


@pytest.mark.parametrize("hang", [0, 3])
def test_token_map_borders_follow_the_partition(hang):
    patch, level = 7, hand_made_level()
    width, height = 12 * patch - hang, 8 * patch - hang
    image = Image.new("RGB", (width, height), (200, 200, 200))
    drawn = pixels(draw_tokens(image, level, patch), width, height)
    interior = drawn[0, 0]  # one shade of grey and one depth: all interiors look the same
    changed = (drawn != interior).any(axis=2)
    np.testing.assert_array_equal(changed, expected_borders(level, patch, width, height))


def test_token_map_splitting_a_superpatch_changes_nothing_outside_it():
    level, image = hand_made_level(), noise(96, 64)
    split = level.copy()
    split[4:8, 8:12] = 1
    before, after = (pixels(draw_tokens(image, one, 8), 96, 64) for one in (level, split))
    changed = (before != after).any(axis=2)
    inside = np.zeros_like(changed)
    inside[32:64, 64:96] = True
    assert changed.any()
    assert not changed[~inside].any()
    assert not changed[33:48, 65:80].any()  # the interior of the first of its four parts


def test_token_map_colours_cells_by_halting_depth_alone():
    image = Image.new("RGB", (64, 64), (90, 90, 90))
    layer = np.full((8, 8), 4, dtype=np.int16)
    layer[:, :4] = 1
    level = np.full((8, 8), 2, dtype=np.int8)
    drawn = pixels(draw_tokens(image, level, 8, layer), 64, 64).astype(int)
    early, late = drawn[10, 10], drawn[10, 50]
    np.testing.assert_array_equal(drawn[10, 10], drawn[50, 20])
    assert late.sum() > early.sum() + 30  # told apart in black and white as well


def test_token_map_brightness_rises_with_depth():
    layer = np.arange(13, dtype=np.int16)[None]
    image = Image.new("RGB", (13 * 8, 8), (90, 90, 90))
    drawn = token_map(image, level=np.zeros((1, 13), np.int8), layer=layer, patch=8, depth=12)
    grey = np.asarray(drawn.convert("L"))[4, 4 : 13 * 8 : 8].astype(int)
    assert (np.diff(grey) > 0).all()


def test_token_map_lines_survive_scaling_down():
    image = Image.new("RGB", (8000, 4000), (200, 200, 200))
    level = np.full((8, 16), 2, dtype=np.int8)
    drawn = np.asarray(draw_tokens(image, level, 500))
    row = drawn[100, :MAX_SIDE]
    assert (row != row[0]).any(axis=1).sum() == 3  # four squares side by side, each line whole


@pytest.mark.parametrize(
    ("level", "layer"),
    [
        (np.zeros((2, 2), np.int8), np.zeros((2, 3), np.int16)),
        (np.zeros((3, 2), np.int8), np.zeros((2, 2), np.int16)),
        (np.full((2, 2), -1, np.int8), np.zeros((2, 2), np.int16)),
        (np.zeros((2, 2), np.int8), np.full((2, 2), 5, np.int16)),
    ],
)
def test_token_map_refuses_what_does_not_fit(level, layer):
    with pytest.raises(ValueError, match=r"level|layer"):
        draw_tokens(noise(16, 16), level, 8, layer)


# ---------------------------------------------------------------- sizes, for both


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("kind", ["overlay", "tokens"])
def test_legend_adds_to_the_picture_and_the_sheet_stays_within_the_cap(kind, width, height):
    image = Image.new("RGB", (width, height), (90, 90, 90))
    if kind == "overlay":
        labels = np.zeros((height, width), dtype=np.uint8)
        drawn = overlay(image, labels, names=NAMES, palette=PALETTE, alpha=0.0)
    else:
        drawn = draw_tokens(image, np.zeros(plain_grid(width, height, 16), dtype=np.int8), 16)
    assert drawn.mode == "RGB"
    assert max(drawn.size) <= MAX_SIDE
    if max(width, height) < MAX_SIDE / 2:  # not scaled: the whole picture is there, and more
        assert drawn.height > height
        assert drawn.width >= width
    assert min(drawn.size) > 20  # room for at least one line of text
    strip = np.asarray(drawn)[-20:]
    assert np.ptp(strip.astype(int)) > 100  # paper and ink


@pytest.mark.parametrize(("width", "height"), [(1, 1), (300, 1), (1, 300), (64, 48)])
def test_legend_never_covers_the_picture(width, height):
    image = noise(width, height)
    labels = random_labels(width, height)
    drawn = overlay(image, labels, names=NAMES, palette=PALETTE, alpha=0.0)
    np.testing.assert_array_equal(pixels(drawn, width, height), np.asarray(image))


def test_scaling_keeps_the_proportions():
    image = noise(3000, 1500)
    labels = np.zeros((1500, 3000), dtype=np.uint8)
    labels[:, 1500:] = 1
    drawn = overlay(image, labels, names=NAMES, palette=PALETTE, alpha=1.0)
    picture = np.asarray(drawn)[: MAX_SIDE // 2, :]
    assert drawn.width == MAX_SIDE
    assert (picture[:, : MAX_SIDE // 2] == PALETTE[0]).all()
    assert (picture[:, MAX_SIDE // 2 :] == PALETTE[1]).all()
