"""Windows cover every pixel once, and what they join is what the whole picture would give."""

import numpy as np
import pytest
import torch
from conftest import TinyModel
from hypothesis import given
from hypothesis import strategies as st
from samples import pattern
from support import machine_says

from tokenstep.config import DENSE, Thresholds
from tokenstep.core import partition
from tokenstep.errors import TokenstepError
from tokenstep.model.segmenter import Segmenter
from tokenstep.serve.windows import fits, needed_bytes, segment_tiled, spans, unit_of


@given(
    length=st.integers(1, 3000),
    units=st.integers(4, 12),
    rest=st.integers(0, 15),
    unit=st.sampled_from([16, 32, 56]),
)
def test_every_pixel_is_kept_once_and_seen_with_its_surroundings(
    length: int, units: int, rest: int, unit: int
) -> None:
    found = spans(length, units * unit + rest, unit)
    kept = [pixel for span in found for pixel in range(span.first, span.last)]
    assert kept == list(range(length))
    for span in found:
        assert 0 <= span.start <= span.first < span.last <= span.end <= length
        assert span.end - span.start <= units * unit + rest
        assert span.start % unit == 0 and span.first % unit == 0
        assert span.first - span.start >= unit or span.first == 0
        assert span.end - span.last >= unit or span.last == length


@pytest.fixture
def model(tiny_model: TinyModel) -> Segmenter:
    return tiny_model()


def picture(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(pattern(height, width)).permute(2, 0, 1)


def test_a_window_below_four_superpatches_is_refused(model: Segmenter) -> None:
    with pytest.raises(TokenstepError, match="give 128 or more"):
        segment_tiled(model, picture(10, 10), side=127, spending=DENSE)


REDUCED = Thresholds(merge=(0.2, 0.5), exits=(0.34, 0.34), spare=1)


def test_a_picture_that_fits_is_segmented_as_ever(model: Segmenter) -> None:
    small = picture(70, 101)
    whole = model.segment_batch([small], thresholds=REDUCED)[0]
    tiled = segment_tiled(model, small, side=128, spending=REDUCED)
    assert np.array_equal(tiled.labels, whole.labels)
    assert np.array_equal(tiled.tokens.level, whole.tokens.level)
    assert tiled.cost == whole.cost and tiled.windows == 1


@pytest.mark.parametrize("size", [(200, 300), (301, 150), (150, 160)])
@pytest.mark.parametrize("batch", [1, 3])
def test_windows_join_to_a_picture(model: Segmenter, size: tuple[int, int], batch: int) -> None:
    large, side, unit = picture(*size), 4 * unit_of(model), unit_of(model)
    tiled = segment_tiled(model, large, side=side, spending=REDUCED, batch=batch)
    assert tiled.labels.shape == size
    rows, columns = (spans(length, side, unit) for length in size)
    assert tiled.windows == len(rows) * len(columns) > 1
    grids = [partition.grid_of(size, model.patch)]
    level = torch.from_numpy(tiled.tokens.level)[None]
    assert torch.equal(level >= 0, partition.uniform(grids, level.device) >= 0)
    # The kept part of each window is what it gives alone.
    total = 0.0
    for row in rows:
        for column in columns:
            cut = large[:, row.start : row.end, column.start : column.end]
            alone = model.segment_batch([cut], thresholds=REDUCED)[0]
            total += alone.cost.total
            inner = alone.labels[
                row.first - row.start : row.last - row.start,
                column.first - column.start : column.last - column.start,
            ]
            kept = tiled.labels[row.first : row.last, column.first : column.last]
            assert np.array_equal(kept, inner)
    assert tiled.cost.total == pytest.approx(total)
    assert tiled.tokens.end + sum(tiled.tokens.halted.values()) == tiled.tokens.start


def test_joined_tokens_are_told_apart_and_counted(model: Segmenter) -> None:
    large, side = picture(203, 330), 4 * unit_of(model)
    use = segment_tiled(model, large, side=side, spending=REDUCED).tokens
    places = np.arange(use.owner.size).reshape(use.owner.shape)
    # Windows hand over at whole superpatches: a token is named by its superpatch's first cell.
    side_of = 1 << use.level.astype(np.int64)
    row, column = np.divmod(places, places.shape[1])
    first = row // side_of * side_of * places.shape[1] + column // side_of * side_of
    assert np.array_equal(use.owner, first)
    assert use.live[0] == use.start and len(use.live) == use.depth
    assert use.live[-1] == use.end, "no exit stands after the last block"


def test_no_superpatch_of_a_joined_partition_is_cut(model: Segmenter) -> None:
    large = picture(203, 330)
    everything = Thresholds(merge=(0.0, 0.0))
    level = segment_tiled(model, large, side=4 * unit_of(model), spending=everything).tokens.level
    merged = level.max(initial=0)
    assert merged > 0
    for rank in range(1, merged + 1):
        side = 1 << rank
        rows, columns = np.nonzero(level == rank)
        for row, column in zip(rows // side * side, columns // side * side, strict=True):
            assert (level[row : row + side, column : column + side] == rank).all()


def test_dense_windows_cost_what_they_are(model: Segmenter) -> None:
    large = picture(200, 200)
    tiled = segment_tiled(model, large, side=4 * unit_of(model), spending=DENSE)
    assert tiled.cost.blocks == tiled.dense_cost.blocks
    assert tiled.tokens.grid == 25 * 25 < tiled.tokens.start, "overlaps are run twice"


def test_a_picture_is_tried_whole_unless_it_is_known_not_to_fit(
    model: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = torch.empty(3, 1, 4096).byte(), torch.empty(3, 2048, 2048).byte()
    for free, expected in ((10**6, False), (10**9, True), (None, True)):
        lines = "" if free is None else f"MemAvailable: {free // 1024} kB\n"
        machine_says(monkeypatch, {"/proc/meminfo": lines})
        assert fits(model, [large]) is expected
        assert fits(model, [small])
        assert fits(model, [small, small]) is (free is None), "a batch can be run one by one"


def test_the_maps_that_a_batch_shares_are_counted(model: Segmenter) -> None:
    tall, wide = torch.empty(3, 4096, 8).byte(), torch.empty(3, 8, 4096).byte()
    cells = 2 * 512 * 512  # of the grid as high as the one and as wide as the other
    assert needed_bytes(model, [tall, wide]) >= needed_bytes(model, [tall, tall]) + 8 * cells
