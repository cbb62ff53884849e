import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenstep.core import ragged
from tokenstep.core.ragged import Segments

LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=5)


def packed(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(sum(lengths), 3), ragged.offsets_of(torch.tensor(lengths))


@given(LENGTHS)
def test_offsets_say_where_each_picture_lies(lengths: list[int]) -> None:
    _, offsets = packed(lengths)
    segments = Segments.of(offsets)
    assert segments.lengths == tuple(lengths)
    assert segments.longest == max(lengths)
    expected = [index for index, length in enumerate(lengths) for _ in range(length)]
    assert segments.picture.tolist() == expected


@given(LENGTHS)
def test_pad_lays_pictures_out_and_unpad_undoes_it(lengths: list[int]) -> None:
    x, offsets = packed(lengths)
    padding = Segments.of(offsets).padding
    assert padding.real.sum(1).tolist() == lengths
    if not len(x):
        return
    padded = padding.pad(x)
    assert padded.shape == (len(lengths), max(lengths), 3)
    for row, real, own in zip(padded, padding.real, x.split(lengths), strict=True):
        assert torch.equal(row[real], own)
    assert torch.equal(padding.unpad(padded), x)


@given(LENGTHS, st.randoms(use_true_random=False))
def test_kept_offsets_count_what_stays(lengths: list[int], random) -> None:
    _, offsets = packed(lengths)
    keep = torch.tensor([random.random() < 0.5 for _ in range(sum(lengths))], dtype=torch.bool)
    expected = [int(own.sum()) for own in keep.split(lengths)]
    assert ragged.kept_offsets(keep, offsets).diff().tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=12))
def test_rank_within_equals_sorting_each_group(rows: list[tuple[int, int]]) -> None:
    group = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    score = torch.tensor([float(row[1]) for row in rows])
    ranks = ragged.rank_within(score, group).tolist()
    for number in set(group.tolist()):
        own = [index for index, row in enumerate(rows) if row[0] == number]
        by_score = sorted(own, key=lambda index: (-rows[index][1], index))  # ties: earlier first
        assert [ranks[index] for index in by_score] == list(range(len(own)))


def test_pad_and_unpad_carry_gradients() -> None:
    x, offsets = packed([2, 0, 3])
    x.requires_grad_()
    padding = Segments.of(offsets).padding
    padding.unpad(padding.pad(x)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_segments_of_nothing() -> None:
    assert Segments.of(torch.tensor([0])).longest == 0
