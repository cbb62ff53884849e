"""What each method from elsewhere takes away, against a naive reading of its paper."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import TinyModel
from support import cell_logits, grid_tokens, scramble

from tokenstep.config import DENSE
from tokenstep.core import partition
from tokenstep.core.attention import Attended
from tokenstep.core.ragged import Segments
from tokenstep.core.tokens import PackedTokens
from tokenstep.core.unmerge import layer_of_cells, unmerge
from tokenstep.errors import TokenstepError
from tokenstep.reducers import matching
from tokenstep.reducers.algm import ALGM
from tokenstep.reducers.base import Drop, Merge
from tokenstep.reducers.evit import EViT
from tokenstep.reducers.mctf import MCTF
from tokenstep.reducers.mpm import MPM
from tokenstep.reducers.random_drop import RandomDrop
from tokenstep.reducers.tome import ToMe

GRIDS = [(3, 4), (2, 3), (1, 1)]


def seen_of(tokens: PackedTokens, heads: int = 2, width: int = 4) -> Attended:
    torch.manual_seed(5)
    q, k = torch.randn(2, len(tokens.x), heads, width)
    return Attended(Segments.of(tokens.offsets), None, q, k, scale=0.5)


def own_rows(tokens: PackedTokens) -> list[range]:
    return list(itertools.starmap(range, itertools.pairwise(tokens.offsets.tolist())))


@pytest.mark.parametrize("weighed", [False, True])
def test_received_is_the_mean_of_the_softmax(weighed: bool) -> None:
    tokens = grid_tokens(GRIDS, prefix=2)
    seen = seen_of(tokens)
    cells = torch.randint(1, 9, (len(tokens.x),)) if weighed else None
    seen = Attended(seen.segments, cells, seen.q, seen.k, seen.scale)
    asking = torch.rand(len(tokens.x)) < 0.5
    asking[tokens.offsets[2] :] = False  # nobody asks in the last picture
    got = seen.received(asking)
    expected = torch.zeros(len(tokens.x))
    for rows in own_rows(tokens):
        askers = [row for row in rows if asking[row]]
        for row in askers:
            for head in range(2):
                logits = torch.stack([seen.q[row, head] @ seen.k[key, head] for key in rows]) * 0.5
                if cells is not None:
                    logits = logits + cells[rows.start : rows.stop].float().log()
                expected[rows.start : rows.stop] += logits.softmax(0) / len(askers) / 2
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reducer", [ToMe(r=2), ToMe(share=0.25), ToMe(r=100)], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_tome_merges_the_likest_pairs_of_two_halves(reducer: ToMe, prefix: int) -> None:
    tokens = grid_tokens(GRIDS, prefix=prefix)
    seen = seen_of(tokens)
    decision = reducer(tokens, 1, seen)
    assert isinstance(decision, Merge) and decision.weight is None
    keys = F.normalize(seen.k.mean(1), dim=1)
    for rows, (height, width) in zip(own_rows(tokens), GRIDS, strict=True):
        expected = {row: row for row in rows}
        edges = []
        for row in rows[::2]:
            likest = [
                (float(keys[row] @ keys[other]), other)
                for other in rows[1::2]
                if tokens.anchor[other] >= 0 and tokens.anchor[row] >= 0
            ]
            edges += [(*max(likest), row)] if likest else []
        for _, other, row in sorted(edges, reverse=True)[: reducer.count(height * width)]:
            expected[row] = other
        assert decision.into[rows.start : rows.stop].tolist() == list(expected.values())


@pytest.mark.parametrize("method", [ToMe, MCTF])
def test_tome_and_mctf_take_a_share_or_a_number(method: type) -> None:
    for wrong in ({}, {"share": 0.1, "r": 3}, {"share": 0.6}, {"r": -1}):
        with pytest.raises(TokenstepError, match="share"):
            method(**wrong)


@pytest.mark.parametrize("threshold", [-1.0, -0.2, 0.0, 0.3])
@pytest.mark.parametrize("prefix", [0, 1])
def test_algm_merges_windows_that_are_alike_on_average(threshold: float, prefix: int) -> None:
    grids = [(3, 4), (5, 2), (1, 1), (4, 4)]
    tokens = grid_tokens(grids, prefix=prefix)
    decision = ALGM(threshold, near=2, far=3)(tokens, 2, None)
    assert isinstance(decision, Merge) and decision.weight is None
    row_of = {int(anchor): row for row, anchor in enumerate(tokens.anchor) if anchor >= 0}
    expected = list(range(len(tokens.x)))
    for picture, (height, width) in enumerate(grids):
        for top in range(0, height - 1, 2):
            for left in range(0, width - 1, 2):
                places = itertools.product((top, top + 1), (left, left + 1))
                own = [row_of[int(tokens.owner[picture, y, x])] for y, x in places]
                pairs = list(itertools.combinations(own, 2))
                alike = [F.cosine_similarity(*tokens.x[list(pair)], dim=0) for pair in pairs]
                if float(torch.stack(alike).mean()) > threshold:
                    for row in own:
                        expected[row] = own[0]
    assert decision.into.tolist() == expected
    assert threshold != -1 or len(set(expected)) == len(tokens.x) - 3 * (2 + 2 + 4)


def test_algm_leaves_a_window_alone_that_has_merged_before() -> None:
    tokens = grid_tokens([(2, 4)], prefix=0)
    merged = tokens.merge(torch.tensor([0, 0, 2, 3, 4, 5, 6, 7]))
    decision = ALGM(-1.0, near=1)(merged, 1, None)
    assert decision is not None  # cells 2, 3, 6, 7 are the rows 1, 2, 5, 6 now
    assert decision.into.tolist() == [0, 1, 1, 3, 4, 1, 1]


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_algm_merges_all_pairs_of_two_halves_that_are_alike(threshold: float, prefix: int) -> None:
    tokens = grid_tokens(GRIDS, prefix=prefix)
    decision = ALGM(threshold, near=1, far=3)(tokens, 3, None)
    assert isinstance(decision, Merge)
    expected = list(range(len(tokens.x)))
    for rows in own_rows(tokens):
        for row in rows[::2]:
            alike = [
                (float(F.cosine_similarity(tokens.x[row], tokens.x[other], dim=0)), other)
                for other in rows[1::2]
                if tokens.anchor[other] >= 0 and tokens.anchor[row] >= 0
            ]
            if alike and max(alike)[0] > threshold:
                expected[row] = max(alike)[1]
    assert decision.into.tolist() == expected
    assert ALGM(threshold, near=1, far=3)(tokens, 2, None) is None


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_mpm_merges_just_the_mutual_pairs(prefix: int) -> None:
    grids = [(4, 4), (1, 1), (3, 5)]
    tokens = grid_tokens(grids, prefix=prefix)
    decision = MPM(blocks=(2,))(tokens, 2, None)
    assert isinstance(decision, Merge) and decision.weight is not None
    assert len(set(decision.weight.tolist())) == 1  # a plain mean
    likest: dict[int, int] = {}
    for rows in own_rows(tokens):
        cells = rows[prefix:]
        for row in cells:
            others = [other for other in cells if other != row]
            cosine = [F.cosine_similarity(tokens.x[row], tokens.x[o], dim=0) for o in others]
            if others:
                likest[row] = others[int(torch.stack(cosine).argmax())]
    for row in range(len(tokens.x)):
        other = likest.get(row, row)
        expected = min(row, other) if likest.get(other) == row else row
        assert decision.into[row] == expected
    assert (decision.into != torch.arange(len(tokens.x))).sum() >= 2
    assert MPM(blocks=(2,))(tokens, 1, None) is None


def test_the_nearest_is_found_in_bands_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = matching.directions(torch.randn(23, 6))
    at_once = matching.nearest(unit)
    monkeypatch.setattr(matching, "_BAND", 3 * 23)
    assert torch.equal(matching.nearest(unit), at_once)
    assert (at_once != torch.arange(23)).all()


@pytest.mark.parametrize("reducer", [MCTF(r=3), MCTF(r=100), MCTF(share=0.25)], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_mctf_merges_the_best_pairs_there_and_back(reducer: MCTF, prefix: int) -> None:
    tokens = grid_tokens(GRIDS, prefix=prefix)
    seen = seen_of(tokens)
    decision = reducer(tokens, 1, seen)
    assert isinstance(decision, Merge) and decision.weight is not None
    attention = seen.received(torch.ones(len(tokens.x), dtype=torch.bool))
    torch.testing.assert_close(decision.weight, attention * tokens.size)
    expected = list(range(len(tokens.x)))

    def worth(one: int, other: int) -> float:
        if tokens.anchor[one] < 0 or tokens.anchor[other] < 0:
            return -1.0
        alike = (float(F.cosine_similarity(tokens.x[one], tokens.x[other], dim=0)) + 1) / 2
        slight = float(attention[one] * attention[other]) ** (-1 / 20)
        return alike * slight * int(tokens.size[one] * tokens.size[other]) ** (-1 / 40)

    def best(takers: list[int], givers: list[int], count: int) -> list[tuple[int, int]]:
        edges = [max((worth(giver, taker), taker) for taker in takers) for giver in givers]
        ranked = sorted(zip(edges, givers, strict=True), reverse=True)
        return [(giver, taker) for (value, taker), giver in ranked[:count] if value >= 0]

    for rows, (height, width) in zip(own_rows(tokens), GRIDS, strict=True):
        first, second = list(rows[::2]), list(rows[1::2])
        if not second:
            continue
        count = reducer.count(height * width)
        there = best(second, first, count // 2)
        left = [row for row in first if row not in dict(there)]
        back = best(left, second, count - len(there))
        for giver, taker in [*back, *there]:
            expected[giver] = expected[taker] if (giver, taker) in there else taker
    assert decision.into.tolist() == expected


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("fuse", [True, False])
def test_evit_parts_with_what_gets_the_least_attention(prefix: int, fuse: bool) -> None:
    tokens = grid_tokens(GRIDS, prefix=prefix)
    seen = seen_of(tokens)
    reducer = EViT(keep=0.6, blocks=(2,), fuse=fuse)
    assert reducer(tokens, 1, seen) is None
    decision = reducer(tokens, 2, seen)
    asking = torch.zeros(len(tokens.x), dtype=torch.bool)
    asking[tokens.offsets[:-1]] = True
    attention = seen.received(asking if prefix else torch.ones_like(asking))
    for rows, (height, width) in zip(own_rows(tokens), GRIDS, strict=True):
        cells = sorted(rows[prefix:], key=lambda row: -float(attention[row]))
        leave = cells[reducer.kept(height * width) :]
        if isinstance(decision, Drop):
            assert [row for row in rows if decision.gone[row]] == sorted(leave)
            continue
        assert isinstance(decision, Merge) and decision.weight is not None
        for row in rows:
            assert decision.into[row] == (leave[0] if row in leave else row)
    assert isinstance(decision, Merge if fuse else Drop)
    if isinstance(decision, Merge):
        torch.testing.assert_close(decision.weight, attention)


def test_random_drop_takes_its_share_in_its_blocks_and_never_the_prefix() -> None:
    tokens = grid_tokens(GRIDS, prefix=1)
    assert RandomDrop(0.5, blocks=(2,))(tokens, 1, None) is None
    one, other = RandomDrop(0.5, seed=1)(tokens, 1, None), RandomDrop(0.5, seed=2)(tokens, 1, None)
    assert one is not None and other is not None
    assert torch.bincount(tokens.picture()[one.gone], minlength=3).tolist() == [6, 3, 0]
    assert not (one.gone & tokens.is_prefix).any()
    assert not torch.equal(one.gone, other.gone)


@pytest.mark.parametrize("size_bias", [True, False])
def test_tome_on_equal_tokens_is_lossless_with_the_size_bias(
    tiny_model: TinyModel, size_bias: bool
) -> None:
    model = tiny_model(size_bias=size_bias)
    scramble(model)
    model.tokenise.pos_embed.data.zero_()
    # Two columns of one colour each: only equal tokens are alike.
    picture = torch.rand(3, 1, 2, 1).expand(3, 32, 2, 24).reshape(3, 32, 48)
    with torch.no_grad():
        merged = model([picture], thresholds=DENSE, reducers=[ToMe(r=4)])
        dense = model([picture], thresholds=DENSE)
    assert len(merged.tokens.x) < len(dense.tokens.x)
    one, other = (cell_logits(out, 0, (4, 6)) for out in (merged, dense))
    assert torch.allclose(one, other, atol=1e-4) == size_bias


def test_what_is_dropped_goes_through_the_decoder_with_what_it_had(tiny_model: TinyModel) -> None:
    model = tiny_model()
    scramble(model)
    picture = torch.rand(3, 32, 48)
    with torch.no_grad():
        out = model([picture], thresholds=DENSE, reducers=[RandomDrop(0.5, blocks=(1,))])
        tokens = model.tokenise(model.normalise([picture]), partition.uniform([(4, 6)]))
        left = model.encoder.blocks[0](tokens.x[None])[0]  # timm's own first block
        waited = model.decoder(out.tokens.with_features(model.encoder.norm(left)))
    dropped = out.tokens.dropped
    assert dropped is not None and len(dropped.anchor) == 12
    rows = [int((tokens.anchor == cell).nonzero()) for cell in dropped.anchor]
    places = [int((out.tokens.anchor == cell).nonzero()) for cell in dropped.anchor]
    torch.testing.assert_close(out.logits[places], waited[rows], atol=1e-4, rtol=1e-4)


def test_tokens_that_wait_aside_are_not_spread_over_the_grid() -> None:
    tokens = grid_tokens([(2, 2)])
    waiting = tokens.drop(tokens.anchor == 1, 1)
    level = partition.uniform([(2, 2)])
    for spread in (
        lambda one: unmerge(one, torch.zeros(len(one.x), 1, 3), level),
        lambda one: layer_of_cells(one, 3),
    ):
        with pytest.raises(ValueError, match="rejoined"):
            spread(waiting)
        spread(waiting.rejoined())
    assert layer_of_cells(waiting.rejoined(), 3).tolist() == [[[3, 1], [3, 3]]]


@pytest.mark.parametrize("tokens", [25, 45, 7, 100])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.7])
def test_evit_keeps_as_many_as_it_says(tokens: int, keep: float) -> None:
    row = grid_tokens([(1, tokens)], prefix=1)
    decision = EViT(keep, (1,), fuse=False)(row, 1, seen_of(row))
    assert isinstance(decision, Drop)
    assert tokens - int(decision.gone.sum()) == EViT(keep).kept(tokens)
