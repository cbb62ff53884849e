"""Label maps by squares: the same as all pixels at once, in little memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import random_partition
from torch import Tensor

from tokenstep.core.unmerge import sub_cell_index
from tokenstep.model import squares
from tokenstep.model.squares import label_map
from tokenstep.model.supertokens import owners


def whole_map(values: Tensor, rows: Tensor, level: Tensor, patch: int) -> Tensor:
    """Logits at picture resolution in one piece, ``(C, h, w)``."""
    side = round(values.shape[1] ** 0.5)
    fine = values.flatten(0, 1)[sub_cell_index(rows, level, side)].permute(2, 0, 1)[None]
    target = (rows.shape[0] * patch, rows.shape[1] * patch)
    return F.interpolate(fine, target, mode="bilinear", align_corners=False)[0]


def scene(grid: tuple[int, int], side: int, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    level = random_partition([grid])[0]
    rows = owners(level[None])[0]
    return torch.randn(grid[0] * grid[1], side**2, classes), rows, level


@settings(max_examples=20)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([4, 7, 14]),
    st.sampled_from([1, 2, 3, 100]),
    st.data(),
)
def test_bands_leave_the_label_map_as_it_is(
    grid: tuple[int, int], side: int, patch: int, band: int, data: st.DataObject
) -> None:
    values, rows, level = scene(grid, side)
    height = (grid[0] - 1) * patch + data.draw(st.integers(1, patch))
    width = (grid[1] - 1) * patch + data.draw(st.integers(1, patch))
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(squares, "BAND_FLOATS", band * patch**2 * values.shape[2])
        got = label_map([values], rows, level, patch=patch, size=(height, width))
    whole = whole_map(values, rows, level, patch)[:, :height, :width]
    assert got.shape == (height, width)
    assert got.dtype == torch.uint8
    # Where two classes are equal to rounding either is right.
    top = whole.amax(0)
    assert (whole.gather(0, got[None].long())[0] >= top - 1e-4).all()


def test_one_class_per_cell_gives_its_label_in_the_middle_of_the_cell() -> None:
    labels = torch.tensor([[0, 1, 2], [3, 0, 1]])
    values = F.one_hot(labels.flatten(), 4).float().unsqueeze(1)
    rows = torch.arange(6).view(2, 3)
    got = label_map([values], rows, torch.zeros_like(rows), patch=5, size=(10, 15))
    assert torch.equal(got[2::5, 2::5].long(), labels)


def test_a_supertoken_carries_a_boundary_by_its_sub_cells() -> None:
    """A 4x4 superpatch whose left sub-cells say 0 and right ones 1 is cut in the middle."""
    values = torch.zeros(1, 4, 2)
    values[0, [0, 2], 0] = values[0, [1, 3], 1] = 5.0
    rows = torch.zeros(4, 4, dtype=torch.int64)
    got = label_map([values], rows, torch.full((4, 4), 2), patch=8, size=(32, 32))
    assert (got[:, :16] == 0).all()
    assert (got[:, 16:] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    values, rows, level = scene((3, 4), 2)
    got = label_map([values.to(dtype)], rows, level, patch=8, size=(20, 30))
    expected = label_map([values.to(dtype).float()], rows, level, patch=8, size=(20, 30))
    assert torch.equal(got, expected)


BAND = """
import resource, torch
from tokenstep.model import squares
torch.set_num_threads(1)
squares.BAND_FLOATS = 2**20
height, width, classes = 16, 64, 150
values = torch.randn(height * width, 1, classes)
rows = torch.arange(height * width).view(height, width)
level = torch.zeros_like(rows)
squares.label_map([values], rows[:2, :2], level[:2, :2], patch=16, size=(32, 32))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
labels = squares.label_map([values], rows, level, patch=16, size=(height * 16, width * 16))
assert labels.shape == (256, 1024)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_is_that_of_a_band() -> None:
    """A band of one row of cells, with the rows beside it, is 3/16 of 150 MiB of logits."""
    if not sys.platform.startswith("linux"):
        pytest.skip("ru_maxrss has another unit here")
    outcome = subprocess.run(
        [sys.executable, "-c", BAND], capture_output=True, text=True, check=True
    )
    assert int(outcome.stdout) < 80  # MiB


QUARTER = """
import resource, torch
from tokenstep.model.decoder import LinearDecoder
from tokenstep.model.squares import label_map
from tokenstep.reducers.exit_heads import ExitHeads
from tokenstep.reducers.exits import EarlyPruning
from tokenstep.core.partition import uniform
from tokenstep.core.ragged import Segments
from tokenstep.model.supertokens import owners
from tokenstep.core.unmerge import rows_of_cells
from tokenstep.core.tokens import PackedTokens
torch.set_num_threads(1)
torch.manual_seed(0)

@torch.inference_mode()
def segment(side):
    count, level = side * side, uniform([(side, side)])
    ones, anchor = torch.ones(count, dtype=torch.int64), torch.arange(count)
    segments = Segments(torch.tensor([0, count]), (count,))
    x, owner = torch.randn(count, 64), owners(level)
    tokens = PackedTokens(x, segments, ones, anchor, owner, prefix=0, grids=((1, count),))
    exits = ExitHeads((1,), 64, 150, 4)
    confidence, _ = EarlyPruning(exits, (1.0,), 5).judged(tokens.x, 0)
    halt = EarlyPruning(exits, (float(confidence.median()),), 5)(tokens, 1)
    tokens = tokens.halt(halt.done, halt.classify, 1)
    logits = LinearDecoder(64, 150, 4)(tokens)
    parts, rows = [logits, tokens.halted.logits], rows_of_cells(tokens)[0]
    label_map(parts, rows, level[0], patch=16, size=(side * 16, side * 16))
    return len(tokens.x) / count

segment(8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
left = segment(128)
print(left, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_4096_pixels_and_150_classes_stay_under_a_gigabyte() -> None:
    """A quarter of the picture: its logits, and beside them bands that do not grow with it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("ru_maxrss has another unit here")
    outcome = subprocess.run(
        [sys.executable, "-c", QUARTER], capture_output=True, text=True, check=True
    )
    left, used = map(float, outcome.stdout.split())
    assert 0.2 < left < 0.8, "some halt and some do not"
    logits = 128**2 * 16 * 150 * 4 / 2**20
    assert 4 * logits + (used - logits) < 1000  # MiB


def test_halted_logits_are_read_as_if_they_stood_behind_the_live_ones() -> None:
    values, rows, level = scene((3, 4), 2)
    whole = label_map([values], rows, level, patch=8, size=(20, 30))
    for split in range(len(values) + 1):
        parts = [values[:split], values[split:]]
        assert torch.equal(label_map(parts, rows, level, patch=8, size=(20, 30)), whole)
