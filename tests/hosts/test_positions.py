import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed

from tokenstep.hosts.positions import resampled
from tokenstep.hosts.timm_build import sincos_positions

GRIDS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)


@given(GRIDS)
def test_resampling_is_that_of_timm(grids: list[tuple[int, int]]) -> None:
    maps = torch.randn(1, 6, 3, 5)
    for grid in grids:
        if grid[1] == 1:
            continue  # timm runs into torch's fault there, see the next test
        table = maps.flatten(2).transpose(1, 2)
        expected = resample_abs_pos_embed(
            table, new_size=list(grid), old_size=[3, 5], num_prefix_tokens=0
        )
        got = resampled(maps, grid).flatten(2).transpose(1, 2)
        assert torch.allclose(got, expected, atol=1e-6)


def axis_weights(old: int, new: int) -> torch.Tensor:
    """How resampling mixes ``old`` places into ``new`` ones, ``(old, new)``: from unit impulses.

    Two columns, not one: torch's kernel (2.15, CPU) repeats the first row of a single column.
    """
    impulses = torch.eye(old).view(1, old, old, 1).expand(1, old, old, 2).contiguous()
    return F.interpolate(impulses, (new, 2), mode="bicubic", antialias=True)[0, :, :, 0]


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 1]))
def test_resampling_is_right_in_every_memory_layout(height: int, width: int, prefix: int) -> None:
    table = torch.randn(1, prefix + 15, 6)[:, prefix:]
    maps = table.transpose(1, 2).unflatten(2, (3, 5))
    exact = torch.einsum("bchw,hi,wj->bcij", maps, axis_weights(3, height), axis_weights(5, width))
    for layout in (maps, maps.contiguous(), maps.contiguous(memory_format=torch.channels_last)):
        assert torch.allclose(resampled(layout, (height, width)), exact, atol=1e-5)


def test_its_own_grid_is_left_as_it_is() -> None:
    maps = torch.randn(1, 6, 2, 8)
    assert resampled(maps, (2, 8)) is maps
    assert resampled(maps, (4, 4)).shape == (1, 6, 4, 4)  # as many cells, another grid


@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
def test_sine_and_cosine_positions_tell_cells_apart(grid: tuple[int, int]) -> None:
    table = sincos_positions(grid, 16)
    assert table.shape == (1, grid[0] * grid[1], 16)
    assert len(table[0].unique(dim=0)) == grid[0] * grid[1]
    assert table.abs().max() <= 1


def test_sine_and_cosine_need_a_width_divisible_by_four() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_positions((2, 2), 6)


def test_a_grid_one_column_wide_keeps_what_its_rows_say() -> None:
    rows = torch.linspace(0, 1, 8).view(1, 1, 8, 1).expand(1, 3, 8, 6)
    narrow, wide = resampled(rows, (4, 1)), resampled(rows, (4, 5))
    torch.testing.assert_close(narrow, wide[..., :1], atol=1e-5, rtol=0)
    assert narrow.shape == (1, 3, 4, 1)
