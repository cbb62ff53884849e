import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import random_partition, scramble
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenstep.core import partition
from tokenstep.core.same_size import stacked
from tokenstep.core.tokens import PackedTokens
from tokenstep.hosts.positions import resampled
from tokenstep.hosts.timm_embed import ConvEmbed
from tokenstep.hosts.timm_vit import TimmViT
from tokenstep.model.supertokens import Tokeniser, owners

SIZES = st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=3)


def tokeniser(
    stem: str = "linear", *, sub_patches: bool = False, patch: int = 8, **changes: object
) -> Tokeniser:
    torch.manual_seed(2)
    shape = {"patch_size": patch, "img_size": (32, 48), "depth": 1, "num_classes": 0, **changes}
    vit = timm.create_model("test_vit", **shape)
    host = TimmViT(vit, None if stem == "linear" else ConvEmbed(patch, vit.embed_dim))
    built = Tokeniser(host, sides=(2, 4, 8), sub_patches=sub_patches)
    zero = built.sub_patches
    built.sub_patches = None
    torch.manual_seed(3)  # the same weights with and without that part
    scramble(built)
    built.sub_patches = zero
    return built.eval()


def grids_of(build: Tokeniser, pictures: list[Tensor]) -> list[tuple[int, int]]:
    return [partition.grid_of(picture.shape[-2:], build.patch) for picture in pictures]


def one_window(build: Tokeniser, picture: Tensor, top: int, left: int, side: int) -> Tensor:
    """The picture around one superpatch, scaled down by its side; its border goes on outside."""
    reach, patch = build.margin * side, build.patch
    far = F.pad(picture[None], (200, 1000, 200, 1000), mode="replicate")[0]
    rows = slice(200 + top * patch - reach, 200 + (top + side) * patch + reach)
    columns = slice(200 + left * patch - reach, 200 + (left + side) * patch + reach)
    return F.avg_pool2d(far[None, :, rows, columns], side)[0]


def reference(build: Tokeniser, picture: Tensor, level: Tensor) -> Tensor:
    """Tokens of one picture, one superpatch after the other."""
    height, width = level.shape
    prefix = build.prefix_count if build.host.prefix_has_position else 0
    table = build.pos_embed[:, prefix:].transpose(1, 2).unflatten(2, build.host.table_grid)
    table = resampled(table, (height, width))
    rows = []
    for row in range(height):
        for column in range(width):
            side = 2 ** int(level[row, column])
            if row % side == 0 and column % side == 0:
                window = one_window(build, picture, row, column, side)
                place = table[0, :, row : row + side, column : column + side].mean((1, 2))
                rows.append(build.embed(window[None])[0] + place)
    return torch.stack(rows)


@pytest.mark.parametrize("stem", ["linear", "conv"])
@settings(max_examples=8)
@given(SIZES)
def test_supertokens_equal_cutting_and_scaling_each_superpatch(
    stem: str, sizes: list[tuple[int, int]]
) -> None:
    build = tokeniser(stem)
    pictures = [torch.randn(3, *size) for size in sizes]
    level = random_partition(grids_of(build, pictures))
    with torch.no_grad():
        tokens = build(stacked(pictures), level)
        for index, picture in enumerate(pictures):
            height, width = partition.grid_of(picture.shape[-2:], build.patch)
            rows = tokens.x[tokens.offsets[index] : tokens.offsets[index + 1]]
            expected = reference(build, picture, level[index, :height, :width])
            assert torch.allclose(rows[build.prefix_count :], expected, atol=1e-4)


@pytest.mark.parametrize("patch", [4, 8, 14])
@pytest.mark.parametrize("cells", [5, 9, 11])
def test_what_large_superpatches_see_beyond_an_odd_border(patch: int, cells: int) -> None:
    build = tokeniser("conv", patch=patch)
    side = 1 << cells.bit_length() - 1  # 4 or 8: as large as fits, with an odd rest beside it
    picture = torch.randn(3, cells * patch, cells * patch)
    level = torch.zeros(cells, cells, dtype=torch.int8)
    level[:side, :side] = side.bit_length() - 1
    with torch.no_grad():
        tokens = build(stacked([picture]), level[None])
        expected = reference(build, picture, level)
    assert torch.allclose(tokens.x[build.prefix_count :], expected, atol=1e-4)


@settings(max_examples=10)
@given(SIZES, st.sampled_from(["linear", "conv"]), st.booleans())
def test_a_picture_does_not_see_its_batch(
    sizes: list[tuple[int, int]], stem: str, sub_patches: bool
) -> None:
    build = tokeniser(stem, sub_patches=sub_patches)
    if build.sub_patches is not None:
        scramble(build.sub_patches)
    pictures = [torch.randn(3, *size) for size in sizes]
    level = random_partition(grids_of(build, pictures))
    with torch.no_grad():
        tokens = build(stacked(pictures), level)
        for index, picture in enumerate(pictures):
            height, width = partition.grid_of(picture.shape[-2:], build.patch)
            alone = build(stacked([picture]), level[index : index + 1, :height, :width])
            rows = slice(tokens.offsets[index], tokens.offsets[index + 1])
            assert torch.allclose(tokens.x[rows], alone.x, atol=1e-5)
            assert torch.equal(tokens.size[rows], alone.size)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor that was made has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_tall_and_wide_pictures_take_no_more_room_than_alone(stem: str) -> None:
    build = tokeniser(stem)
    pictures = [torch.randn(3, 16, 800), torch.randn(3, 800, 16), torch.randn(3, 20, 790)]
    level = random_partition(grids_of(build, pictures))
    with torch.no_grad(), Largest() as batch:
        build(stacked(pictures), level)
    most = 0
    for index, picture in enumerate(pictures):
        height, width = partition.grid_of(picture.shape[-2:], build.patch)
        with torch.no_grad(), Largest() as alone:
            build(stacked([picture]), level[index : index + 1, :height, :width])
        most += alone.numbers
    assert batch.numbers <= max(most, 2 * level.numel())


def tokens_and_level(build: Tokeniser) -> tuple[PackedTokens, Tensor]:
    pictures = [torch.randn(3, 40, 70), torch.randn(3, 64, 33)]
    level = random_partition(grids_of(build, pictures))
    return build(stacked(pictures), level), level


@pytest.mark.parametrize("registers", [0, 2])
def test_rows_are_prefix_then_raster_order(registers: int) -> None:
    tokens, level = tokens_and_level(tokeniser(reg_tokens=registers))
    prefix = 1 + registers
    for start, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        anchor = tokens.anchor[start:end]
        assert (anchor[:prefix] == -1).all()
        assert (anchor[prefix:].diff() > 0).all()
        assert (tokens.size[start : start + prefix] == 1).all()
    counts = partition.token_counts(level) + prefix
    assert torch.equal(tokens.offsets.diff(), counts)


def test_every_cell_knows_its_superpatch() -> None:
    tokens, level = tokens_and_level(tokeniser())
    assert torch.equal(tokens.owner, owners(level))
    assert ((tokens.owner < 0) == (level < 0)).all()
    own = tokens.owner[tokens.owner >= 0]
    cells = torch.bincount(own, minlength=level.numel())
    speaks = ~tokens.is_prefix
    assert torch.equal(cells[tokens.anchor[speaks]], tokens.size[speaks])


def test_prefix_rows_are_those_of_the_vit() -> None:
    build = tokeniser(reg_tokens=2)
    tokens, _ = tokens_and_level(build)
    expected = torch.cat([build.cls_token[0], build.reg_token[0]])
    if build.host.prefix_has_position:
        expected = expected + build.pos_embed[0, :3]
    for start in tokens.offsets[:-1]:
        assert torch.equal(tokens.x[start : start + 3], expected)


def test_only_selected_superpatches_are_embedded() -> None:
    build = tokeniser()
    seen: list[int] = []
    build.embed.register_forward_hook(lambda *call: seen.append(len(call[2])))
    _, level = tokens_and_level(build)
    assert sum(seen) == int(partition.token_counts(level).sum())


@pytest.mark.parametrize("changes", [{"class_token": False, "global_pool": "avg"}, {}])
@pytest.mark.parametrize("position", ["learn", "none"])
def test_models_without_prefix_or_positions(changes: dict[str, object], position: str) -> None:
    build = tokeniser(pos_embed=position, **changes)
    tokens, level = tokens_and_level(build)
    assert int(tokens.is_prefix.sum()) == (0 if changes else 2)
    assert len(tokens.x) == partition.token_counts(level).sum() + (0 if changes else 2)


def test_sub_patches_change_nothing_until_they_are_trained() -> None:
    pictures = [torch.randn(3, 40, 70)]
    off, on = tokeniser(), tokeniser(sub_patches=True)
    level = random_partition(grids_of(off, pictures))
    before = off(stacked(pictures), level)
    assert torch.equal(before.x, on(stacked(pictures), level).x)
    assert on.sub_patches is not None
    scramble(on.sub_patches)
    changed = (on(stacked(pictures), level).x != before.x).any(1)
    assert torch.equal(changed, before.size > 1)  # supertokens only


def test_sub_patches_reach_the_single_patches_within() -> None:
    build = tokeniser(sub_patches=True)
    assert build.sub_patches is not None
    scramble(build.sub_patches)
    picture = torch.randn(3, 16, 16)
    level = torch.ones(1, 2, 2, dtype=torch.int8)
    before = build(stacked([picture]), level)
    # Pixels of one mean: the scaled-down picture stays as it is, the single patches do not.
    checks = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    after = build(stacked([picture + checks]), level)
    assert not torch.allclose(before.x, after.x, atol=1e-2)
    build.sub_patches = None
    assert torch.allclose(
        build(stacked([picture]), level).x, build(stacked([picture + checks]), level).x, atol=1e-5
    )


@pytest.mark.parametrize("patch", [4, 8, 14, 16, 32])
def test_conv_stem_fits_the_usual_patches(patch: int) -> None:
    embed = ConvEmbed(patch, 12)
    extent = patch + 2 * embed.margin
    assert embed(torch.rand(2, 3, extent, extent)).shape == (2, 12)


@pytest.mark.parametrize("patch", [2, 6, 7, 10])
def test_conv_stem_refuses_other_patches(patch: int) -> None:
    with pytest.raises(ValueError, match="conv stem"):
        ConvEmbed(patch, 12)


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_one_pixel(stem: str) -> None:
    build = tokeniser(stem)
    tokens = build(stacked([torch.randn(3, 1, 1)]), torch.zeros(1, 1, 1, dtype=torch.int8))
    assert tokens.x.shape[0] == 1 + build.prefix_count
    assert tokens.x.isfinite().all()


def test_gradients_reach_pixels_and_positions() -> None:
    build = tokeniser("conv")
    picture = torch.randn(3, 40, 40, requires_grad=True)
    level = random_partition([(5, 5)])
    build(stacked([picture]), level).x.square().sum().backward()
    assert picture.grad is not None
    assert (picture.grad.abs().sum(0) > 0).all()
    assert build.pos_embed.grad is not None
    assert build.cls_token.grad is not None


@pytest.mark.parametrize(
    "level",
    [
        [[0, 0, 1], [0, 0, 1]],  # over the border
        [[1, 0, 0], [0, 0, 0]],  # in parts
        [[0, 1, 1], [0, 1, 1]],  # not aligned
        [[2, 2, 2], [2, 2, 2]],  # larger than the picture
        [[5, 0, 0], [0, 0, 0]],  # larger than the model's
    ],
)
@pytest.mark.parametrize("flow", ["windows", "grid"])
def test_torn_superpatches_are_refused(level: list[list[int]], flow: str) -> None:
    with pytest.raises(ValueError, match="partition"):
        tokeniser()(stacked([torch.randn(3, 16, 24)]), torch.tensor([level]), flow=flow)


def test_a_partition_of_other_pictures_is_refused() -> None:
    build = tokeniser()
    pictures = [torch.randn(3, 16, 16), torch.randn(3, 8, 8)]
    level = partition.uniform([(2, 2), (2, 2)])
    with pytest.raises(ValueError, match="partition"):
        build(stacked(pictures), level)
    with pytest.raises(ValueError, match="partition"):
        build(stacked(pictures), partition.uniform([(3, 2), (1, 1)]))
    with pytest.raises(ValueError, match="partition"):
        build(stacked(pictures), torch.zeros(2, 2, dtype=torch.int8))
