import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import grid_tokens, halt, random_partition

from tokenstep.core.tokens import PackedTokens
from tokenstep.core.unmerge import layer_of_cells, rows_of_cells, sub_cell_index, unmerge
from tokenstep.model.supertokens import owners

GRIDS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)


def merged_tokens(grids: list[tuple[int, int]]) -> tuple[PackedTokens, torch.Tensor]:
    """Tokens of a random partition, built by merging single patches."""
    level = random_partition(grids)
    tokens = grid_tokens(grids)
    own = owners(level).flatten()
    row_of = torch.zeros(own.numel(), dtype=torch.int64)
    speaks = ~tokens.is_prefix
    row_of[tokens.anchor[speaks]] = speaks.nonzero().squeeze(1)
    into = torch.arange(len(tokens.x))
    into[speaks] = row_of[own[tokens.anchor[speaks]]]
    return tokens.merge(into), level


@given(GRIDS)
def test_every_cell_takes_the_value_of_its_token(grids: list[tuple[int, int]]) -> None:
    tokens, level = merged_tokens(grids)
    logits = torch.randn(len(tokens.x), 1, 3)
    done = torch.rand(len(tokens.x)) < 0.5
    after = halt(tokens, done, logits, 1)
    spread = unmerge(after, torch.randn(len(after.x), 1, 3) * 0, level)
    value = {int(anchor): row for row, anchor in enumerate(tokens.anchor)}
    for index, (height, width) in enumerate(grids):
        for row in range(level.shape[1]):
            for column in range(level.shape[2]):
                if row >= height or column >= width:
                    assert not spread[index, row, column].any()
                    continue
                speaker = value[int(tokens.owner[index, row, column])]
                expected = logits[speaker, 0] if done[speaker] else torch.zeros(3)
                assert torch.equal(spread[index, row, column], expected)


@given(GRIDS)
def test_merging_and_halting_in_any_order_lose_no_cell(grids: list[tuple[int, int]]) -> None:
    tokens, _ = merged_tokens(grids)
    after = halt(tokens, torch.rand(len(tokens.x)) < 0.3, torch.randn(len(tokens.x), 1, 2), 1)
    rows = rows_of_cells(after)
    assert torch.equal(rows < 0, after.owner < 0)
    total = len(after.x) + (0 if after.halted is None else len(after.halted.anchor))
    seen = rows[rows >= 0].unique()
    prefix = int(after.is_prefix.sum())
    assert len(seen) == total - prefix  # every token but the prefix rows speaks


@pytest.mark.parametrize("side", [1, 2, 4])
def test_sub_cells_spread_over_the_whole_superpatch(side: int) -> None:
    """A superpatch of 2x2 or 4x4 patches is cut into as many parts as a single patch."""
    level = torch.tensor([[2, 2, 2, 2, 0], [2, 2, 2, 2, 0], [2, 2, 2, 2, 1], [2, 2, 2, 2, 1]])
    level = level[:, :5].clone()
    level[2:, 4] = 0
    rows = torch.zeros(4, 5, dtype=torch.int64)
    rows[:, 4] = torch.arange(1, 5)
    index = sub_cell_index(rows, level, side)
    assert index.shape == (4 * side, 5 * side)
    values = torch.arange(5 * side**2).float()
    parts = values[index]
    big = parts[:, : 4 * side]
    expected = values[: side**2].view(side, side)
    assert torch.equal(big, expected.repeat_interleave(4, 0).repeat_interleave(4, 1))
    for cell in range(4):
        small = parts[cell * side : (cell + 1) * side, 4 * side :]
        own = values[(cell + 1) * side**2 : (cell + 2) * side**2]
        assert torch.equal(small, own.view(side, side))


def test_sub_cells_of_superpatches_away_from_the_corner() -> None:
    level = torch.ones(4, 4, dtype=torch.int8)
    rows = torch.tensor([[0, 1], [2, 3]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    index = sub_cell_index(rows, level, 2)
    expected = torch.arange(16).view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
    assert torch.equal(index, expected.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_layers_tell_where_each_cell_halted() -> None:
    tokens = grid_tokens([(1, 3), (1, 2)])
    logits = torch.zeros(7, 1, 1)
    after = halt(tokens, torch.tensor([0, 1, 0, 0, 0, 0, 1]).bool(), logits, 2)
    after = halt(after, torch.tensor([0, 1, 0, 0, 0]).bool(), logits[:5], 5)
    assert layer_of_cells(after, depth=9)[:, 0].tolist() == [[2, 5, 9], [9, 2, -1]]


def test_gradients_reach_live_and_halted_logits() -> None:
    tokens = grid_tokens([(2, 2)])
    early = torch.randn(5, 1, 2, requires_grad=True)
    after = halt(tokens, torch.tensor([0, 1, 0, 0, 0]).bool(), early, 1)
    late = torch.randn(4, 1, 2, requires_grad=True)
    unmerge(after, late, torch.zeros(1, 2, 2, dtype=torch.int8)).sum().backward()
    assert early.grad is not None
    assert late.grad is not None
    assert early.grad.abs().sum(2).flatten().tolist() == [0, 2, 0, 0, 0]
    assert late.grad.abs().sum(2).flatten().tolist() == [0, 2, 2, 2]
