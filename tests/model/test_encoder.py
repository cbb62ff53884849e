"""Without merging and exits the packed encoder is the timm model."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from support import grid_tokens, scramble
from timm.layers import RmsNorm, SwiGLU
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from tokenstep.config import VitConfig
from tokenstep.core import partition
from tokenstep.core.attention import Attended
from tokenstep.core.same_size import stacked
from tokenstep.core.tokens import PackedTokens
from tokenstep.hosts.base import BlockSettings
from tokenstep.hosts.timm_block import require_supported, run_block
from tokenstep.hosts.timm_build import build_vit
from tokenstep.hosts.timm_vit import TimmViT
from tokenstep.model.encoder import Encoder
from tokenstep.model.supertokens import Tokeniser
from tokenstep.reducers.base import Decision, Halt, Merge, Site, Turn

small = partial(
    VisionTransformer,
    img_size=(48, 64),
    patch_size=16,
    embed_dim=48,
    depth=2,
    num_heads=3,
    num_classes=0,
    dynamic_img_size=True,
)


def named(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return timm.create_model(name, depth=2, num_classes=0, dynamic_img_size=True)

    return build


MODELS: dict[str, Callable[[], nn.Module]] = {
    name: named(name)
    for name in (
        "vit_tiny_patch16_224.augreg_in21k",
        "deit3_small_patch16_224",  # LayerScale, no position for CLS
        "vit_small_patch14_reg4_dinov2",  # registers, LayerScale, patch 14
        "vit_small_patch8_224",
        "vit_small_patch32_224",
        "vit_base_patch32_clip_224",  # a norm before the blocks, quick GELU
        "vit_medium_patch16_gap_256",  # no CLS
    )
} | {
    "qk_norm": partial(small, qk_norm=True, init_values=1e-5),
    "scaled norms": partial(small, scale_attn_norm=True, scale_mlp_norm=True),
    "no positions": partial(small, pos_embed="none", class_token=False, global_pool="avg"),
    "no prefix": partial(small, class_token=False, global_pool="avg"),
    "registers without CLS": partial(small, class_token=False, global_pool="avg", reg_tokens=2),
    "positions of cells only": partial(small, no_embed_class=True, reg_tokens=3),
    "positions of the prefix": partial(small, reg_tokens=3),
    "SwiGLU": partial(small, mlp_layer=SwiGLU),
}


def packed_features(vit: nn.Module, images: Tensor, settings: BlockSettings) -> Tensor:
    host = TimmViT(vit)
    tokenise = Tokeniser(host, sides=(2,), sub_patches=False).eval()
    pictures = list(images)
    level = partition.uniform(
        [partition.grid_of(picture.shape[-2:], tokenise.patch) for picture in pictures]
    )
    tokens, trace = Encoder(host, settings)(tokenise(stacked(images), level))
    assert {sum(rows) for rows in (*trace.attention, *trace.mlp)} == {len(tokens.x)}
    return tokens.x.unflatten(0, (len(images), -1))


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_the_timm_model(name: str) -> None:
    torch.manual_seed(3)
    vit = MODELS[name]().eval()
    scramble(vit)
    patch = vit.patch_embed.patch_size[0]
    images = torch.randn(2, 3, 3 * patch, 5 * patch)
    with torch.no_grad():
        expected = vit.forward_features(images)
        for backend in ("loop", "padded"):
            # A size bias of unmerged tokens is log 1 = 0.
            settings = BlockSettings(backend=backend, size_bias=backend == "loop")
            got = packed_features(vit, images, settings)
            assert got.shape == expected.shape
            assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max()))


class OwnBlock(Block):
    """Stands for a foreign block that overrides forward."""


@pytest.mark.parametrize(
    ("build", "part"),
    [
        (partial(small, block_fn=ParallelScalingBlock), "ParallelScalingBlock"),
        (partial(small, block_fn=OwnBlock), "OwnBlock"),
        (partial(small, patch_drop_rate=0.2), "patch_drop_rate"),
        (partial(small, attn_drop_rate=0.2), "attention dropout"),
        (partial(small, attn_layer="diff"), "DiffAttention"),
        (partial(small, norm_layer=RmsNorm), "RmsNorm"),
        (partial(timm.create_model, "vit_tiny_r_s16_p8_224", num_classes=0), "HybridEmbed"),
        (partial(timm.create_model, "vit_small_patch16_dinov3", num_classes=0), "Eva"),
        (partial(timm.create_model, "test_convnext"), "ConvNeXt"),
    ],
)
def test_what_it_cannot_run_is_refused_by_name(build: Callable[[], nn.Module], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        require_supported(build())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (VitConfig("no_such_vit"), "no_such_vit"),
        (VitConfig("vit_small_patch16_dinov3", depth=1), "Eva"),
        (VitConfig("test_convnext"), "ConvNeXt"),
        (VitConfig("test_resnet", image_size=(32, 32)), "test_resnet"),
    ],
)
def test_backbones_of_other_kinds_are_refused_by_name(config: VitConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build_vit(config)


def test_overrides_reach_the_backbone() -> None:
    vit = build_vit(VitConfig("test_vit", patch=8, depth=2, image_size=(24, 40), drop_path=0.3))
    assert len(vit.blocks) == 2
    assert vit.patch_embed.grid_size == (3, 5)
    assert vit.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    assert len(vit.pos_embed[0, -15:].unique(dim=0)) == 15


PLAIN = BlockSettings()


def encoder(settings: BlockSettings = PLAIN, **changes: object) -> Encoder:
    torch.manual_seed(4)
    vit = small(**{"depth": 3, **changes})
    scramble(vit)
    return Encoder(TimmViT(vit), settings)


def run(encode: Encoder, grids: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    tokens = grid_tokens(grids, dim=48)
    x = tokens.x.requires_grad_()
    return x, encode(tokens)[0].x


def test_stochastic_depth_is_drawn_per_picture() -> None:
    block = encoder(drop_path_rate=0.5).train().blocks[2]
    tokens = grid_tokens([(1, 2)] * 40, dim=48, prefix=0)
    tokens = tokens.with_features(torch.ones_like(tokens.x) * torch.linspace(-1, 1, 48))
    out = run_block(block, tokens, BlockSettings())
    pictures = out.unflatten(0, (40, 2))
    # All rows are equal, so what differs can only be the draw.
    assert torch.allclose(pictures[:, 0], pictures[:, 1], atol=1e-5)
    kinds = {tuple(row) for row in (pictures[:, 0] * 1e3).round().tolist()}
    assert 2 <= len(kinds) <= 4  # each of two branches is kept or dropped


def test_stochastic_depth_keeps_the_mean_and_rests_in_eval() -> None:
    encode = encoder(drop_path_rate=0.5).eval()
    dense = encoder().eval()
    assert torch.equal(run(encode, [(2, 2)])[1], run(dense, [(2, 2)])[1])


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_checkpointing_gives_the_same_gradients(drop: float) -> None:
    gradients = []
    for checkpointing in (False, True):
        settings = BlockSettings(checkpointing=checkpointing)
        encode = encoder(settings, drop_path_rate=drop).train()
        x, out = run(encode, [(2, 3), (1, 2)])
        weights = [weight for weight in encode.parameters() if weight.requires_grad]
        gradients.append(torch.autograd.grad(out.square().sum(), [x, *weights], allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        if one is None:
            assert other is None
        else:
            assert torch.allclose(one, other, atol=1e-5, rtol=1e-4)


def test_checkpointing_keeps_fewer_tensors() -> None:
    kept = []
    for checkpointing in (False, True):
        count = [0]

        def pack(tensor: Tensor, count: list[int] = count) -> Tensor:
            count[0] += tensor.numel()
            return tensor

        encode = encoder(BlockSettings(checkpointing=checkpointing))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(encode, [(3, 3)])
        kept.append(count[0])
    assert kept[1] < kept[0] / 3


class Scripted:
    """A reducer that returns what the test wants in each block."""

    def __init__(
        self, decide: Callable[[PackedTokens, int], Decision | None], site: Site = "block"
    ) -> None:
        self.decide = decide
        self.site = site

    def __call__(self, tokens: PackedTokens, block: int, seen: Attended | None) -> Decision | None:
        assert (seen is None) == (self.site == "block")
        return self.decide(tokens, block)

    def macs(self, turn: Turn) -> int:
        return 0


def test_reducers_are_asked_after_each_block_and_shrink_the_sequence() -> None:
    asked: list[tuple[int, int]] = []

    def decide(tokens: PackedTokens, block: int) -> Merge | Halt | None:
        asked.append((block, len(tokens.x)))
        if block == 1:
            return Halt(torch.arange(len(tokens.x)) == 2, lambda x: x.unsqueeze(1))
        if block == 2:
            return Merge(torch.arange(len(tokens.x)).clamp(max=2))
        return None

    tokens, trace = encoder().eval()(grid_tokens([(2, 2)], dim=48), [Scripted(decide)])
    assert asked == [(1, 5), (2, 4), (3, 3)]
    assert trace.attention == trace.mlp == [(5,), (4,), (3,)]
    assert tokens.halted is not None
    assert tokens.halted.layer.tolist() == [1]
    assert tokens.size.tolist() == [1, 1, 2]


def test_a_sequence_may_run_empty() -> None:
    def decide(tokens: PackedTokens, block: int) -> Halt:
        return Halt(torch.ones(len(tokens.x), dtype=torch.bool), lambda x: x.unsqueeze(1))

    for backend in ("loop", "padded"):
        encode = encoder(BlockSettings(backend=backend, size_bias=True)).eval()
        one = grid_tokens([(2, 2), (1, 1)], dim=48, prefix=0)
        tokens, trace = encode(one, [Scripted(decide)])
        assert trace.attention == [(4, 1), (0, 0), (0, 0)]
        assert tokens.x.shape == (0, 48)


def test_one_picture_may_run_empty_without_harm_to_the_others() -> None:
    def first(tokens: PackedTokens, block: int) -> Halt:
        done = tokens.picture() == 0
        return Halt(done, lambda x: x.unsqueeze(1))

    for backend in ("loop", "padded"):
        encode = encoder(BlockSettings(backend=backend)).eval()
        both = grid_tokens([(2, 2), (2, 3)], dim=48, prefix=0)
        x = both.x.requires_grad_()
        tokens, _ = encode(both, [Scripted(first)])
        rest = replace(
            grid_tokens([(2, 3)], dim=48, prefix=0), x=x.detach()[4:].clone().requires_grad_()
        )
        alone, _ = encode(rest)
        assert torch.allclose(tokens.x, alone.x, atol=1e-5)
        (gradient,) = torch.autograd.grad(tokens.x.square().sum(), x)
        (expected,) = torch.autograd.grad(alone.x.square().sum(), rest.x)
        assert torch.allclose(gradient[4:], expected, atol=1e-4)
        assert not gradient[:4].any()
