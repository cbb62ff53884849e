"""The contract of every way to spend fewer tokens: partitions, early pruning, merging reducers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from conftest import TinyModel
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cell_logits, random_partition, scramble
from torch import Tensor

from tokenstep.config import DENSE, Thresholds
from tokenstep.core import partition, ragged
from tokenstep.core.attention import Attended
from tokenstep.core.tokens import PackedTokens
from tokenstep.hosts.timm_build import build_vit
from tokenstep.model.segmented import Segmented
from tokenstep.model.segmenter import Segmenter
from tokenstep.reducers.algm import ALGM
from tokenstep.reducers.base import Merge, Reducer, Site, Turn
from tokenstep.reducers.evit import EViT
from tokenstep.reducers.mctf import MCTF
from tokenstep.reducers.mpm import MPM
from tokenstep.reducers.random_drop import RandomDrop
from tokenstep.reducers.tome import ToMe

Sizes = list[tuple[int, int]]
SIZES = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=3)


class MergeNeighbours:
    """The fake of a merging reducer: after each block the ``count`` most alike neighbours merge.

    Neighbours are rows 0 and 1, 2 and 3, ... of a picture, prefix rows left out.
    """

    site: Site = "block"

    def __init__(self, count: int) -> None:
        self.count = count

    def macs(self, turn: Turn) -> int:
        return turn.dim * turn.before

    def __call__(self, tokens: PackedTokens, block: int, seen: Attended | None = None) -> Merge:
        rows = torch.arange(len(tokens.x))
        picture = tokens.picture()
        prefix = tokens.is_prefix.sum() // (len(tokens.offsets) - 1)
        place = rows - tokens.offsets[picture] - prefix
        left = rows - 1
        second = (place >= 0) & (place % 2 == 1)
        distance = (tokens.x - tokens.x[left.clamp(min=0)]).square().sum(1)
        group = torch.where(second, picture, -1)
        alike = ragged.rank_within(-distance.detach(), group) < self.count
        return Merge(torch.where(second & alike, left, rows))


@dataclass(frozen=True)
class Way:
    """One way to run a model: thresholds and reducers."""

    thresholds: Thresholds = DENSE
    reducers: Callable[[], Sequence[Reducer]] = lambda: ()


# Thresholds near the middle of what the scrambled tiny model gives: some pass, some do not.
WAYS = {
    "dense": Way(),
    "policy": Way(Thresholds(merge=(0.5, 0.5))),
    "exits": Way(Thresholds(exits=(0.5, 0.5), spare=1)),
    "exits that spare none": Way(Thresholds(exits=(0.4, 0.4), spare=0)),
    "merging reducer": Way(reducers=lambda: [MergeNeighbours(2)]),
    "tome": Way(reducers=lambda: [ToMe(share=0.2)]),
    "tome, a number": Way(reducers=lambda: [ToMe(r=1)]),
    "evit": Way(reducers=lambda: [EViT(keep=0.6, blocks=(1, 2))]),
    "algm, windows": Way(reducers=lambda: [ALGM(0.0, near=1, far=0)]),
    "algm, pairs": Way(reducers=lambda: [ALGM(0.3, near=0, far=2)]),
    "mctf": Way(reducers=lambda: [MCTF(share=0.2)]),
    "mctf, a number": Way(reducers=lambda: [MCTF(r=3)]),
    "mpm": Way(reducers=lambda: [MPM(blocks=(1, 2))]),
    "evit that drops": Way(reducers=lambda: [EViT(keep=0.6, blocks=(1, 3), fuse=False)]),
    "random drop": Way(reducers=lambda: [RandomDrop(share=0.3)]),
    "two at one site": Way(
        Thresholds(merge=(0.5, 0.5)), lambda: [EViT(0.7, (1, 2), fuse=False), ToMe(share=0.2)]
    ),
    "all": Way(Thresholds((0.5, 0.5), (0.5, 0.5), 1), lambda: [MergeNeighbours(2)]),
}
ZERO = {
    "policy": Way(Thresholds(merge=(1.0, 1.0))),
    "exits": Way(Thresholds(exits=(1.0, 1.0), spare=0)),
    "merging reducer": Way(reducers=lambda: [MergeNeighbours(0)]),
    "tome": Way(reducers=lambda: [ToMe(share=0.0)]),
    "evit": Way(reducers=lambda: [EViT(keep=1.0)]),
    "algm": Way(reducers=lambda: [ALGM(1.0, near=1, far=2)]),
    "mctf": Way(reducers=lambda: [MCTF(share=0.0)]),
    "mpm": Way(reducers=lambda: [MPM(blocks=())]),
    "random drop": Way(reducers=lambda: [RandomDrop(share=0.0)]),
    "all": Way(Thresholds((1.0, 1.0), (1.0, 1.0), 0), lambda: [MergeNeighbours(0)]),
}


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Segmenter:
    model = tiny_model(cells=2, size_bias=True)
    scramble(model)
    return model


def pictures_of(sizes: Sizes) -> list[Tensor]:
    torch.manual_seed(6)
    return [torch.rand(3, *size) for size in sizes]


def run(model: Segmenter, way: Way, pictures: Sequence[Tensor]) -> Segmented:
    return model(pictures, thresholds=way.thresholds, reducers=way.reducers())


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=10)
@given(SIZES)
def test_each_cell_has_one_owner_and_sizes_equal_cells(
    model: Segmenter, name: str, sizes: Sizes
) -> None:
    with torch.no_grad():
        tokens = run(model, WAYS[name], pictures_of(sizes)).tokens
    for index, (height, width) in enumerate(sizes):
        grid = (-(-height // 8), -(-width // 8))
        assert (tokens.owner[index, : grid[0], : grid[1]] >= 0).all()
        assert int((tokens.owner[index] >= 0).sum()) == grid[0] * grid[1]
    counted = torch.bincount(tokens.owner[tokens.owner >= 0], minlength=tokens.owner.numel())
    speaks = ~tokens.is_prefix
    live = tokens.anchor[speaks]
    halted = live[:0] if tokens.halted is None else tokens.halted.anchor
    anchors = torch.cat([live, halted])
    assert len(anchors.unique()) == len(anchors)
    assert torch.equal(counted[live], tokens.size[speaks])
    assert int(counted[anchors].sum()) == int((tokens.owner >= 0).sum())


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=10)
@given(SIZES)
def test_a_picture_does_not_depend_on_its_batch(model: Segmenter, name: str, sizes: Sizes) -> None:
    pictures = pictures_of(sizes)
    with torch.no_grad():
        together = run(model, WAYS[name], pictures)
        for index, (picture, (height, width)) in enumerate(zip(pictures, sizes, strict=True)):
            alone = run(model, WAYS[name], [picture])
            grid = (-(-height // 8), -(-width // 8))
            assert [rows[index] for rows in together.live] == [rows[0] for rows in alone.live]
            assert torch.equal(together.partition[index, : grid[0], : grid[1]], alone.partition[0])
            one, other = cell_logits(together, index, grid), cell_logits(alone, 0, grid)
            assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("name", WAYS)
def test_it_really_reduces(model: Segmenter, name: str) -> None:
    """Or the contract would be kept by doing nothing."""
    sizes = [(60, 50), (33, 70)]
    with torch.no_grad():
        out = run(model, WAYS[name], pictures_of(sizes))
        dense = run(model, WAYS["dense"], pictures_of(sizes))
    ran, all_rows = (sum(map(sum, (*one.trace.mlp, *one.trace.attention))) for one in (out, dense))
    assert (ran < all_rows) == (name != "dense")


@pytest.mark.parametrize("name", WAYS)
def test_prefix_rows_survive(tiny_model: TinyModel, name: str) -> None:
    model = tiny_model()
    scramble(model)
    with torch.no_grad():
        out = run(model, WAYS[name], pictures_of([(40, 40), (9, 70)]))
    count = model.tokenise.prefix_count
    assert count > 0
    for start in out.tokens.offsets[:-1]:
        assert (out.tokens.anchor[start : start + count] == -1).all()
    assert int(out.tokens.is_prefix.sum()) == 2 * count


@pytest.mark.parametrize("name", ZERO)
def test_zero_strength_changes_nothing(model: Segmenter, name: str) -> None:
    pictures = pictures_of([(40, 40), (9, 70)])
    with torch.no_grad():
        out = run(model, ZERO[name], pictures)
        dense = run(model, WAYS["dense"], pictures)
    assert torch.equal(out.partition, partition.uniform([(5, 5), (2, 9)]))
    assert torch.allclose(out.tokens.x, dense.tokens.x, atol=1e-4)
    assert torch.allclose(out.logits, dense.logits, atol=1e-4)


def timm_twin(model: Segmenter) -> torch.nn.Module:
    """timm's own model with the same weights."""
    vit = build_vit(model.config.vit)
    vit.blocks.load_state_dict(model.encoder.blocks.state_dict())
    vit.norm.load_state_dict(model.encoder.norm.state_dict())
    vit.patch_embed.proj.load_state_dict(model.tokenise.embed.proj.state_dict())
    for name in ("pos_embed", "cls_token"):
        getattr(vit, name).data.copy_(getattr(model.tokenise, name))
    return vit.eval()


@pytest.mark.parametrize("name", ZERO)
def test_at_zero_strength_the_features_are_those_of_timm(model: Segmenter, name: str) -> None:
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        out = run(model, ZERO[name], images)
        expected = timm_twin(model).forward_features(model.normalise(images)[0].pixels)
    assert torch.allclose(out.tokens.x, expected.flatten(0, 1), atol=1e-4)


def flat_scene(level: Tensor, patch: int) -> Tensor:
    """A picture in which every superpatch of ``level (H, W)`` has one colour of its own."""
    height, width = level.shape
    picture = torch.zeros(3, height * patch, width * patch)
    for row in range(height):
        for column in range(width):
            side = 2 ** int(level[row, column])
            if row % side == 0 and column % side == 0:
                top, left = row * patch, column * patch
                reach = side * patch
                picture[:, top : top + reach, left : left + reach] = torch.rand(3, 1, 1)
    return picture


@pytest.mark.parametrize("decoder", ["linear", "mask"])
@pytest.mark.parametrize("size_bias", [True, False])
def test_merging_equal_rows_is_lossless_end_to_end(
    tiny_model: TinyModel, decoder: str, size_bias: bool
) -> None:
    """One row of size 4 or 16 then weighs as much as the equal rows that it stands for.

    Without the size bias it does not, which shows that this test would see it missing.
    """
    model = tiny_model(size_bias=size_bias, decoder=decoder)
    scramble(model)
    model.tokenise.pos_embed.data.zero_()  # else the rows of a superpatch are not equal
    level = random_partition([(4, 6), (5, 4)])
    pictures = [flat_scene(level[0, :4, :6], 8), flat_scene(level[1, :5, :4], 8)]
    with torch.no_grad():
        merged = model(pictures, thresholds=DENSE, partition=level)
        dense = model(pictures, thresholds=DENSE)
    assert len(merged.tokens.x) < len(dense.tokens.x)
    same = [
        torch.allclose(cell_logits(merged, i, grid), cell_logits(dense, i, grid), atol=1e-4)
        for i, grid in enumerate([(4, 6), (5, 4)])
    ]
    assert all(same) == size_bias


@pytest.mark.parametrize("size_bias", [True, False])
def test_merging_equal_rows_between_blocks_is_lossless(
    tiny_model: TinyModel, size_bias: bool
) -> None:
    model = tiny_model(size_bias=size_bias)
    scramble(model)
    model.tokenise.pos_embed.data.zero_()
    # Columns in pairs of one colour: the neighbours that merge are equal.
    stripes = torch.rand(3, 4, 1, 3, 1).expand(3, 4, 8, 3, 16).reshape(3, 32, 48)
    with torch.no_grad():
        merged = run(model, Way(reducers=lambda: [OncePerPicture()]), [stripes])
        dense = run(model, WAYS["dense"], [stripes])
    prefix = model.tokenise.prefix_count
    assert [rows[0] - prefix for rows in merged.live] == [24, 12, 12]
    same = torch.allclose(cell_logits(merged, 0, (4, 6)), cell_logits(dense, 0, (4, 6)), atol=1e-4)
    assert same == size_bias


class OncePerPicture(MergeNeighbours):
    """Merges all pairs of neighbours after the first block."""

    def __init__(self) -> None:
        super().__init__(1000)

    def __call__(self, tokens: PackedTokens, block: int, seen: Attended | None = None) -> Merge:
        if block == 1:
            return super().__call__(tokens, block)
        return Merge(torch.arange(len(tokens.x)))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_gradients_reach_the_pixels(tiny_model: TinyModel, name: str, stem: str) -> None:
    model = tiny_model(stem=stem)
    scramble(model)
    pictures = [picture.requires_grad_() for picture in pictures_of([(40, 40), (9, 70)])]
    run(model, WAYS[name], pictures).logits.square().sum().backward()
    for picture in pictures:
        assert picture.grad is not None
        assert picture.grad.isfinite().all()
        touched = (picture.grad.abs().sum(0) > 0).float().mean()
        assert touched > 0.95


@pytest.mark.parametrize("name", WAYS)
def test_training_mode_runs_and_reaches_every_live_weight(tiny_model: TinyModel, name: str) -> None:
    model = tiny_model(drop_path=0.1).train()
    run(model, WAYS[name], pictures_of([(40, 40), (24, 30)])).logits.square().sum().backward()
    learned = [model.tokenise, model.encoder, model.decoder]
    for part in learned:
        missing = [key for key, weight in part.named_parameters() if weight.grad is None]
        assert not missing
