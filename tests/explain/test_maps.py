"""Figures are drawn whole from views and rows, offline, at 800 px, whatever a model lacks."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, TinyModel
from PIL import Image
from samples import labelled_folder, pattern
from support import scramble

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes

from tokenstep.config import DENSE, Thresholds
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.explain import maps, plots
from tokenstep.explain.folder import explain_folder
from tokenstep.explain.picture import View, explain_picture, view_of
from tokenstep.explain.report import FigureFile
from tokenstep.explain.sections import difference_section, picture_sections, set_sections
from tokenstep.model.segmenter import Segmenter

STEP = Thresholds(merge=(0.4, 0.4), exits=(0.36, 0.36), spare=1)


@pytest.fixture
def model(tiny_model: TinyModel) -> Segmenter:
    model = tiny_model(cells=2)
    scramble(model)
    return model


@pytest.fixture
def view(model: Segmenter) -> View:
    return view_of(model, torch.from_numpy(pattern(70, 101)).permute(2, 0, 1), STEP)


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()  # a file that is cut short would raise
    assert image.format == "PNG"
    return image


def drawn(draw: Callable[[Axes], None]) -> tuple[maps.Figure, Axes]:
    page = maps.figure(draw, height=4)
    opened(maps.png(page))
    return page, page.axes[0]


def test_a_figure_is_800_px_wide_and_of_few_colours_as_a_photo(view: View) -> None:
    page = maps.figure(partial(maps.partition, view=view), height=maps.map_height(view))
    plain, photo = opened(maps.png(page)), opened(maps.png(page, photo=True))
    assert plain.width == photo.width == 800 and plain.size == photo.size
    assert photo.mode == "P"


def test_outlines_are_where_tokens_meet(view: View) -> None:
    _, axes = drawn(partial(maps.partition, view=view))
    owner = view.result.tokens.owner
    meet = (owner[1:] != owner[:-1]).sum() + (owner[:, 1:] != owner[:, :-1]).sum()
    for lines in axes.collections:
        assert len(lines.get_segments()) == meet
    assert str(view.result.tokens.start) in axes.get_title()


def test_the_legend_of_halting_names_every_depth(view: View) -> None:
    _, axes = drawn(partial(maps.halting, view=view))
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [name.partition(":")[0] for name in names] == [
        "halted after block 1",
        "halted after block 2",
        "ran all 3 blocks",
    ]


def test_what_an_exit_does_not_see_is_white(view: View) -> None:
    _, axes = drawn(partial(maps.confidence, view=view, exit_view=view.exits[1]))
    shown = axes.images[-1].get_array()
    gone = np.isnan(view.exits[1].confidence)
    assert gone.any()
    for row, column in zip(*np.nonzero(gone), strict=True):
        assert (shown[row * 8, column * 8] == 255).all()


def test_differences_are_lost_gained_or_wrong_in_both(view: View) -> None:
    step = view.result.labels
    truth = np.where(np.arange(step.shape[1]) < 50, step, (step + 1) % 3).astype(np.uint8)
    dense = step.copy()
    dense[:10] = (step[:10] + 1) % 3  # gained on the left, lost on the right
    dense[20:30] = (step[20:30] + 2) % 3  # on the right, both are wrong
    _, axes = drawn(partial(maps.difference, view=view, dense=dense, truth=truth))
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    left, right, rows = 50, step.shape[1] - 50, 10
    for name, pixels in zip(names, (rows * right, 2 * rows * left, rows * right), strict=True):
        assert name.endswith(f", {pixels / step.size:.1%}")


def test_bars_of_a_class_end_at_the_whole() -> None:
    rows = [
        {"class": "a", "x_share": 0.2, "y_share": 0.3, "ran_all_share": 0.5},
        {"class": "b", "x_share": 0.0, "y_share": 0.0, "ran_all_share": 1.0},
    ]
    _, axes = drawn(partial(plots.class_depths, rows=rows, depths=[1, 2, 3]))
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches[-2:]]
    assert ends == pytest.approx([1, 1])


def every(sections: list[Any]) -> list[FigureFile]:
    files = [figure for section in sections for figure in section.figures]
    assert len({figure.name for figure in files}) == len(files)
    for figure in files:
        assert opened(figure.png).width == 800 and figure.alt_text
    return files


@pytest.mark.parametrize(("exits", "merge"), [((), ()), ((1, 2), (0.4, 0.4))])
def test_sections_are_drawn_whatever_is_off(
    tiny_model: TinyModel, tmp_path: Path, exits: tuple[int, ...], merge: tuple[float, ...]
) -> None:
    model = tiny_model(exits=exits)
    root = labelled_folder(tmp_path / "set", CLASSES, [(48, 64), (33, 90)])
    folder = LabelledFolder(root, "test")
    thresholds = Thresholds(merge, (0.36,) * len(exits))
    report = explain_folder(model, folder, thresholds)
    every(set_sections(report))
    image, label = folder[0]
    view = view_of(model, image, thresholds)
    dense = model.segment_batch([image], thresholds=DENSE)[0].labels
    sections = picture_sections("p", view, explain_picture(view))
    sections.append(difference_section("p", view, dense, label.numpy()))
    assert len(every(sections)) == 4 + len(exits)
