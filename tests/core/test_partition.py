import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import random_partition
from torch import Tensor

from tokenstep.core import partition

SIZES = (2, 4, 8)
GRIDS = st.lists(st.tuples(st.integers(1, 19), st.integers(1, 19)), min_size=1, max_size=3)


def assert_partition(level: Tensor, grids: list[tuple[int, int]]) -> None:
    """Every cell lies in exactly one square, aligned and within its picture."""
    for own, (height, width) in zip(level, grids, strict=True):
        covered = torch.zeros(own.shape, dtype=torch.int64)
        for row in range(height):
            for column in range(width):
                side = 2 ** int(own[row, column])
                top, left = row - row % side, column - column % side
                assert top + side <= height
                assert left + side <= width
                assert (own[top : top + side, left : left + side] == own[row, column]).all()
                if (row, column) == (top, left):
                    covered[top : top + side, left : left + side] += 1
        assert (covered[:height, :width] == 1).all()
        inside = torch.zeros(own.shape, dtype=torch.bool)
        inside[:height, :width] = True
        assert ((own >= 0) == inside).all()


@given(GRIDS)
def test_every_cell_is_covered_once_on_any_grid(grids: list[tuple[int, int]]) -> None:
    level = random_partition(grids, SIZES)
    assert_partition(level, grids)


@given(GRIDS)
def test_tokens_are_counted_per_picture(grids: list[tuple[int, int]]) -> None:
    level = random_partition(grids, SIZES)
    for own, count in zip(level, partition.token_counts(level).tolist(), strict=True):
        expected = sum(int((own == rank).sum()) // 4**rank for rank in range(4))
        assert count == expected


def test_larger_superpatches_come_first() -> None:
    empty = partition.uniform([(4, 6)])
    scores = [torch.full((1, 2, 3), 0.9), torch.full((1, 1, 1), 0.9)]
    level = partition.by_threshold(scores, empty, sizes=(2, 4), thresholds=(0.5, 0.5))
    assert level[0].tolist() == [[2, 2, 2, 2, 1, 1]] * 4
    # the order in which sizes are named does not matter
    swapped = partition.by_threshold(scores[::-1], empty, sizes=(4, 2), thresholds=(0.5, 0.5))
    assert torch.equal(level, swapped)


def test_each_size_has_its_own_threshold_and_must_pass_it() -> None:
    empty = partition.uniform([(4, 4)])
    scores = [torch.tensor([[[0.6, 0.5], [0.4, 0.9]]]), torch.tensor([[[0.7]]])]
    level = partition.by_threshold(scores, empty, sizes=(2, 4), thresholds=(0.5, 0.7))
    assert level[0, ::2, ::2].tolist() == [[1, 0], [0, 1]]
    nothing = partition.by_threshold(scores, empty, sizes=(2, 4), thresholds=(1.0, 1.0))
    assert torch.equal(nothing, empty)


@given(st.integers(1, 20), st.integers(1, 20))
def test_a_higher_threshold_never_merges_more(height: int, width: int) -> None:
    empty = partition.uniform([(height, width)] * 3)
    scores = [torch.rand(3, height // size, width // size) for size in SIZES]
    counts = [
        partition.token_counts(
            partition.by_threshold(scores, empty, sizes=SIZES, thresholds=(bar,) * 3)
        )
        for bar in (0.2, 0.5, 0.8)
    ]
    assert (counts[0] <= counts[1]).all()
    assert (counts[1] <= counts[2]).all()


def test_uniform_merges_nothing() -> None:
    level = partition.uniform([(2, 3), (3, 1)])
    assert level.tolist() == [
        [[0, 0, 0], [0, 0, 0], [-1, -1, -1]],
        [[0, -1, -1], [0, -1, -1], [0, -1, -1]],
    ]


def test_oracle_merges_exactly_the_squares_of_one_class() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[0, 5, 5] = 1  # one pixel of another class, patches of 2 px
    level = partition.oracle(labels, patch=2, sizes=(2, 4), classes=2)
    assert level[0].tolist() == [[1, 1, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2
    pure = partition.oracle(labels * 0, patch=2, sizes=(2, 4), classes=2)
    assert (pure == 2).all()


def test_oracle_lets_impurity_up_to_the_tolerance_pass() -> None:
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[0, 0, :2] = 1  # 2 of 16 pixels
    for tolerance, merged in ((0.0, False), (0.12, False), (0.125, True), (0.2, True)):
        level = partition.oracle(labels, patch=2, sizes=(2,), classes=2, tolerance=tolerance)
        assert bool((level == 1).all()) == merged


def test_oracle_does_not_count_ignored_pixels() -> None:
    labels = torch.full((1, 4, 4), 255, dtype=torch.uint8)
    assert (partition.oracle(labels, patch=2, sizes=(2,), classes=3) == 1).all()
    labels[0, 0, 0] = 2
    assert (partition.oracle(labels, patch=2, sizes=(2,), classes=3) == 1).all()
    labels[0, 3, 3] = 1
    assert (partition.oracle(labels, patch=2, sizes=(2,), classes=3) == 0).all()


@given(st.integers(1, 40), st.integers(1, 40))
def test_oracle_runs_on_any_picture(height: int, width: int) -> None:
    labels = torch.randint(0, 2, (1, height, width))
    level = partition.oracle(labels, patch=4, sizes=(2, 16), classes=2)
    grid = (-(-height // 4), -(-width // 4))
    assert level.shape[1:] == grid
    assert_partition(level, [grid])


def test_purity_equals_counting() -> None:
    labels = torch.randint(0, 4, (2, 7, 9))
    labels[labels == 3] = 255
    share = partition.purity(labels, 3, 3)
    assert share.shape == (2, 2, 3)
    for picture in range(2):
        for row in range(2):
            for column in range(3):
                square = labels[picture, row * 3 : row * 3 + 3, column * 3 : column * 3 + 3]
                valid = square[square != 255]
                expected = valid.bincount().max() / len(valid)
                assert torch.isclose(share[picture, row, column], expected)


@given(GRIDS, st.integers(0, 3))
def test_shuffled_keeps_the_count_of_every_size(grids: list[tuple[int, int]], seed: int) -> None:
    level = random_partition(grids, SIZES)
    moved = partition.shuffled(level, SIZES, torch.Generator().manual_seed(seed))
    assert_partition(moved, grids)
    for rank in range(4):
        assert torch.equal((moved == rank).sum((1, 2)), (level == rank).sum((1, 2)))


@given(GRIDS, st.integers(0, 3))
def test_by_count_takes_the_best_of_each_size(grids: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    counts = partition.counts_of(random_partition(grids, SIZES), SIZES)
    empty = partition.uniform(grids)
    height, width = empty.shape[1:]
    scores = [torch.rand(len(grids), height // size, width // size) for size in SIZES]
    level = partition.by_count(scores, empty, sizes=SIZES, counts=counts)
    assert_partition(level, grids)
    assert all(map(torch.equal, partition.counts_of(level, SIZES), counts))
    # Of the largest size, none that was left out is better than one that was taken.
    size = max(SIZES)
    score = scores[SIZES.index(size)]
    for index in range(len(grids)):
        whole = (empty[index] == 0)[: height // size * size, : width // size * size]
        room = whole.unflatten(1, (-1, size)).unflatten(0, (-1, size)).all(3).all(1)
        taken = level[index, ::size, ::size][: room.shape[0], : room.shape[1]]
        taken = taken == partition.level_of(size)
        left = room & ~taken
        if taken.any() and left.any():
            assert score[index][taken].min() >= score[index][left].max()


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
def test_shares_are_rounded_to_what_there_is_room_for(
    grid: tuple[int, int], parts: list[float]
) -> None:
    whole = max(1.0, sum(parts))
    shares = {size: part / whole for size, part in zip(SIZES, parts, strict=True)}
    counts = partition.superpatch_counts(shares, grid)
    scores = [torch.rand(2, grid[0] // size, grid[1] // size) for size in SIZES]
    empty = partition.uniform([grid, grid])
    level = partition.by_share(scores, empty, sizes=SIZES, shares=shares)
    assert_partition(level, [grid, grid])
    for size, found in zip(SIZES, partition.counts_of(level, SIZES), strict=True):
        # both pictures alike, and no more than half a superpatch from what was asked for
        assert found.tolist() == [counts[size]] * 2
        wanted = shares[size] * grid[0] * grid[1] / size**2
        assert counts[size] <= wanted + 0.5
    # Sides that are multiples of the largest size have room for any share of one size alone.
    square = {max(SIZES): 0.5}
    assert partition.superpatch_counts(square, (32, 32)) == {max(SIZES): 512 // max(SIZES) ** 2}


def test_by_count_says_where_there_is_no_room() -> None:
    empty = partition.uniform([(4, 4), (4, 2)])
    scores, counts = [torch.rand(2, 2, 2)], [torch.tensor([4, 2])]
    level = partition.by_count(scores, empty, sizes=[2], counts=counts)
    assert partition.token_counts(level).tolist() == [4, 2]
    with pytest.raises(ValueError, match="no room"):
        partition.by_count(scores, empty, sizes=[2], counts=[torch.tensor([4, 3])])


def test_shuffled_moves_and_follows_its_seed() -> None:
    level = partition.uniform([(8, 8)])
    level[0, :2, :2] = 1
    moved = [
        partition.shuffled(level, SIZES, torch.Generator().manual_seed(seed)) for seed in (3, 3)
    ]
    assert torch.equal(*moved)
    places = {
        tuple(partition.shuffled(level, SIZES, torch.Generator().manual_seed(seed)).flatten())
        for seed in range(5)
    }
    assert len(places) > 1


@pytest.mark.parametrize("size", [0, 1, 3, 6])
def test_sizes_that_are_no_power_of_two_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        partition.level_of(size)


def test_one_threshold_per_size_is_asked_for() -> None:
    empty = partition.uniform([(2, 2)])
    with pytest.raises(ValueError, match="one entry per size"):
        partition.by_threshold([torch.ones(1, 1, 1)], empty, sizes=(2,), thresholds=(0.5, 0.5))
