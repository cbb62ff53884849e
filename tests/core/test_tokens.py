import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import grid_tokens, halt

from tokenstep.core.tokens import PackedTokens

GRIDS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)


def random_merge(tokens: PackedTokens, survivors: float = 0.5) -> torch.Tensor:
    """Each row that does not survive goes to a random survivor of its picture."""
    into = torch.arange(len(tokens.x))
    picture = tokens.picture()
    keep = (torch.rand(len(into)) < survivors) | tokens.is_prefix
    for number in picture.unique():
        rows = ((picture == number) & ~tokens.is_prefix).nonzero().squeeze(1)
        keep[rows[0]] = True
        targets = rows[keep[rows]]
        for row in rows[~keep[rows]]:
            into[row] = targets[torch.randint(len(targets), ())]
    return into


def check(tokens: PackedTokens) -> None:
    """Each cell has one owner, and each row's size is the number of its cells."""
    cells = tokens.owner[tokens.owner >= 0]
    live = tokens.anchor[~tokens.is_prefix]
    assert len(live.unique()) == len(live)
    counted = torch.bincount(cells, minlength=tokens.owner.numel())
    assert torch.equal(counted[live], tokens.size[~tokens.is_prefix])
    halted = live.new_empty(0) if tokens.halted is None else tokens.halted.anchor
    assert set(cells.tolist()) == set(live.tolist()) | set(halted.tolist())
    plane = tokens.owner[0].numel()
    assert torch.equal(live // plane, tokens.picture()[~tokens.is_prefix])


@given(GRIDS, st.integers(0, 1))
def test_merging_keeps_one_owner_per_cell(grids: list[tuple[int, int]], prefix: int) -> None:
    tokens = grid_tokens(grids, prefix=prefix)
    for _ in range(2):
        merged = tokens.merge(random_merge(tokens))
        check(merged)
        assert int(merged.size.sum()) == int(tokens.size.sum())
        tokens = merged


def test_merging_takes_the_mean_weighted_by_size() -> None:
    tokens = grid_tokens([(2, 2)], prefix=1)
    once = tokens.merge(torch.tensor([0, 1, 1, 3, 4]))
    assert torch.allclose(once.x[1], tokens.x[1:3].mean(0))
    assert torch.equal(once.x[[0, 2, 3]], tokens.x[[0, 3, 4]])
    twice = once.merge(torch.tensor([0, 2, 2, 3]))
    assert torch.allclose(twice.x[1], tokens.x[1:4].mean(0), atol=1e-6)
    assert twice.size.tolist() == [1, 3, 1]
    assert twice.owner.flatten().tolist() == [2, 2, 2, 3]


@given(GRIDS)
def test_merging_equal_rows_loses_nothing(grids: list[tuple[int, int]]) -> None:
    tokens = grid_tokens(grids)
    x = tokens.picture().float().unsqueeze(1).expand(-1, 5)
    merged = tokens.with_features(x).merge(random_merge(tokens))
    assert torch.equal(merged.x, x[: len(merged.x)] * 0 + merged.picture().float().unsqueeze(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_large_superpatches_in_half_precision_is_exact(dtype: torch.dtype) -> None:
    tokens = grid_tokens([(16, 32)], prefix=0)
    x = torch.full((512, 5), 300.0, dtype=dtype)  # the sum is beyond fp16
    merged = tokens.with_features(x).merge(torch.zeros(512, dtype=torch.int64))
    assert merged.x.dtype == dtype
    assert torch.equal(merged.x, x[:1])


def test_merging_nothing_changes_nothing() -> None:
    tokens = grid_tokens([(2, 3), (1, 1)])
    merged = tokens.merge(torch.arange(len(tokens.x)))
    assert torch.allclose(merged.x, tokens.x)
    assert torch.equal(merged.owner, tokens.owner)
    assert torch.equal(merged.offsets, tokens.offsets)


@pytest.mark.parametrize(
    ("into", "reason"),
    [
        ([0, 2, 3, 3, 4, 5, 6, 7], "into a row that does not survive"),
        ([0, 1, 1, 3, 4, 5, 1, 7], "into another picture's row"),
        ([0, 0, 2, 3, 4, 5, 6, 7], "into a prefix row"),
        ([1, 1, 2, 3, 4, 5, 6, 7], "a prefix row"),
        ([0, 1], "too few"),
    ],
)
def test_illegal_merges_are_refused(into: list[int], reason: str) -> None:
    tokens = grid_tokens([(2, 2), (1, 2)])
    with pytest.raises(ValueError, match=r"into|rows"):
        tokens.merge(torch.tensor(into))


def test_halting_takes_rows_out_and_keeps_their_logits() -> None:
    tokens = grid_tokens([(1, 3), (2, 1)])
    logits = torch.randn(len(tokens.x), 1, 4)
    done = torch.tensor([True, False, True, True, False, True, False])
    with pytest.raises(ValueError, match="1 prefix rows, which never leave"):
        tokens.halt(done, lambda x: logits[done], layer=2)
    done = done & ~tokens.is_prefix
    with pytest.raises(ValueError, match="3 rows halt"):
        tokens.halt(done, lambda x: logits, layer=2)
    table = dict(zip(tokens.x[:, 0].tolist(), logits, strict=True))
    after = tokens.halt(done, lambda x: torch.stack([table[v] for v in x[:, 0].tolist()]), layer=2)
    assert after.halted is not None
    assert after.anchor.tolist() == [-1, 0, -1, 9]
    assert after.offsets.tolist() == [0, 2, 4]
    assert torch.equal(after.x, tokens.x[[0, 1, 4, 6]])
    assert torch.equal(after.halted.logits, logits[[2, 3, 5]])
    assert after.halted.layer.tolist() == [2, 2, 2]
    check(after)

    more = halt(after, torch.tensor([False, True, False, True]), logits[:4], layer=5)
    assert more.halted is not None
    assert more.anchor.tolist() == [-1, -1]
    assert torch.equal(more.halted.logits[:3], after.halted.logits)  # earlier ones are final
    assert more.halted.layer.tolist() == [2, 2, 2, 5, 5]
    check(more)


@given(GRIDS)
def test_merging_and_halting_in_turn_keep_the_bookkeeping(grids: list[tuple[int, int]]) -> None:
    tokens = grid_tokens(grids)
    for layer in range(3):
        if bool((~tokens.is_prefix).all()) or bool(tokens.is_prefix.all()):
            break
        present = tokens.picture()[~tokens.is_prefix].unique()
        if len(present) == len(grids):  # random_merge wants a token in every picture
            tokens = tokens.merge(random_merge(tokens))
        done = torch.rand(len(tokens.x)) < 0.4
        tokens = halt(tokens, done, torch.randn(len(tokens.x), 1, 2), layer)
        check(tokens)


def test_merging_by_a_weight_of_its_own() -> None:
    tokens = grid_tokens([(1, 3)], prefix=1)
    merged = tokens.merge(torch.tensor([0, 1, 1, 3]), torch.tensor([1.0, 3.0, 1.0, 5.0]))
    torch.testing.assert_close(merged.x[1], (3 * tokens.x[1] + tokens.x[2]) / 4)
    assert merged.size.tolist() == [1, 2, 1], "size counts cells whatever the weight"


@given(GRIDS)
def test_dropped_rows_come_back_with_what_they_had(grids: list[tuple[int, int]]) -> None:
    tokens = start = grid_tokens(grids)
    for layer in (1, 2):
        gone = (torch.rand(len(tokens.x)) < 0.5) & ~tokens.is_prefix
        before, tokens = tokens, tokens.drop(gone, layer)
        assert tokens.anchor.equal(before.anchor[~gone])
    left = tokens.with_features(tokens.x + 1)
    back = left.rejoined()
    check(back)
    assert back.picture().equal(start.picture())
    assert back.is_prefix.equal(start.is_prefix), "prefix rows are the first of each picture"
    row = {int(anchor): index for index, anchor in enumerate(start.anchor) if anchor >= 0}
    for index, anchor in enumerate(back.anchor.tolist()):
        if anchor >= 0:
            was_dropped = left.dropped is not None and anchor in left.dropped.anchor.tolist()
            expected = start.x[row[anchor]] + (0 if was_dropped else 1)
            assert torch.equal(back.x[index], expected)
    assert start.rejoined() is start


@given(GRIDS, st.integers(0, 2))
def test_a_row_lies_in_the_middle_of_its_cells(grids: list[tuple[int, int]], prefix: int) -> None:
    tokens = grid_tokens(grids, prefix=prefix)
    tokens = tokens.merge(random_merge(tokens))
    tokens = halt(tokens, torch.rand(len(tokens.x)) < 0.3, torch.zeros(len(tokens.x), 1, 1), 1)
    for row, anchor in enumerate(tokens.anchor.tolist()):
        picture = int(tokens.picture()[row])
        assert tokens.sides()[row].tolist() == list(grids[picture])
        places = [
            (y + 0.5, x + 0.5)
            for y, x in itertools.product(*map(range, grids[picture]))
            if int(tokens.owner[picture, y, x]) == anchor >= 0
        ]
        expected = torch.tensor(places or [(0.0, 0.0)]).mean(0)
        torch.testing.assert_close(tokens.middles()[row], expected)


@given(GRIDS, st.integers(0, 2), st.integers(0, 3))
def test_rows_that_join_speak_for_no_cell(
    grids: list[tuple[int, int]], prefix: int, count: int
) -> None:
    tokens = grid_tokens(grids, prefix=prefix)
    tokens = tokens.merge(random_merge(tokens))
    rows = torch.randn(count, tokens.x.shape[1])
    joined = tokens.join(rows)
    check(joined)
    assert joined.prefix == prefix + count and joined.owner is tokens.owner
    pairs = zip(
        torch.split(tokens.x, tokens.segments.lengths),
        torch.split(joined.x, joined.segments.lengths),
        strict=True,
    )
    for before, after in pairs:
        assert torch.equal(after, torch.cat([before[:prefix], rows, before[prefix:]]))
    assert torch.equal(joined.size[~joined.is_prefix], tokens.size[~tokens.is_prefix])
    assert joined.counts().tolist() == tokens.counts().tolist()


def test_prefix_rows_are_not_dropped() -> None:
    tokens = grid_tokens([(2, 2)])
    with pytest.raises(ValueError, match="prefix"):
        tokens.drop(tokens.is_prefix, 1)
    with pytest.raises(ValueError, match="gone must be"):
        tokens.drop(tokens.is_prefix[1:], 1)


def test_gradients_pass_through_merge_and_halt() -> None:
    tokens = grid_tokens([(2, 2)])
    x = tokens.x.clone().requires_grad_()
    merged = tokens.with_features(x).merge(torch.tensor([0, 1, 1, 3, 4]))
    done = torch.tensor([False, False, True, False])
    after = halt(merged, done, merged.x.unsqueeze(1), 1)
    assert after.halted is not None
    (after.x.sum() + after.halted.logits.sum()).backward()
    assert x.grad is not None
    assert torch.allclose(x.grad.sum(1), torch.tensor([1.0, 0.5, 0.5, 1.0, 1.0]) * 5)


def test_fields_of_different_lengths_are_refused() -> None:
    tokens = grid_tokens([(2, 2)])
    with pytest.raises(ValueError, match="one length"):
        replace(tokens, x=tokens.x[1:])
    with pytest.raises(ValueError, match="owner"):
        replace(tokens, owner=tokens.owner[0])
    with pytest.raises(ValueError, match="done must be"):
        tokens.halt(torch.zeros(2, dtype=torch.bool), lambda x: x, 1)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    st.integers(0, 2),
)
def test_tokens_are_counted_and_ranked_within_their_picture(
    grids: list[tuple[int, int]], prefix: int
) -> None:
    tokens = grid_tokens(grids, prefix=prefix)
    score = torch.randn(len(tokens.x))
    assert tokens.counts().tolist() == [height * width for height, width in grids]
    rank = tokens.ranked(score)
    for number, count in enumerate(tokens.counts().tolist()):
        own = (tokens.picture() == number) & ~tokens.is_prefix
        assert rank[own].sort().values.tolist() == [*range(count)]
        assert torch.equal(score[own][rank[own].argsort()], score[own].sort(descending=True).values)
