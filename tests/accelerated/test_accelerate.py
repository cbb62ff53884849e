"""Somebody else's model on fewer tokens: the same call, the same outputs, and it stays as it is."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import scramble
from torch import Tensor, nn

import tokenstep
from tokenstep.errors import TokenstepError
from tokenstep.policies.entropy import Entropy
from tokenstep.reducers.base import Reducer
from tokenstep.reducers.evit import EViT
from tokenstep.reducers.mpm import MPM
from tokenstep.reducers.tome import ToMe

transformers = pytest.importorskip("transformers", reason="pip install '.[hf]'")

PROCESSOR = SimpleNamespace(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
SIZE = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_attention_heads": 3}
STAGES = ["stem", "stage1", "stage3"]


def config_of(kind: str, **changes: Any) -> Any:
    wide = {"mlp_ratio": 2} if kind.startswith("Dinov2") else {"intermediate_size": 64}
    given = {**SIZE, "num_hidden_layers": 3, **wide, **changes}
    return getattr(transformers, f"{kind}Config")(**given)


def made(name: str, config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(config)


def uper_net() -> nn.Module:
    backbone = config_of("Dinov2", out_features=["stage1", "stage2", "stage3"], image_size=64)
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=backbone, hidden_size=16, num_labels=4, auxiliary_in_channels=48
        )
    )


def depth_anything() -> nn.Module:
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    backbone = config_of(
        "Dinov2", out_features=stages, num_hidden_layers=4, reshape_hidden_states=False
    )
    return transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(
            backbone_config=backbone,
            patch_size=8,
            reassemble_hidden_size=48,
            neck_hidden_sizes=[8, 16, 24, 24],
            fusion_hidden_size=8,
            head_hidden_size=4,
        )
    )


def dpt() -> nn.Module:
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    backbone = config_of(
        "Dinov2", out_features=stages, num_hidden_layers=4, reshape_hidden_states=False
    )
    settings = {"neck_hidden_sizes": [8, 16, 24, 24], "fusion_hidden_size": 8}
    return transformers.DPTForDepthEstimation(
        transformers.DPTConfig(backbone_config=backbone, **settings)
    )


V3 = {"num_register_tokens": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViT": made("ViTModel", config_of("ViT")),
    "ViT without pooling": lambda: transformers.ViTModel(config_of("ViT"), add_pooling_layer=False),
    "DINOv2": made("Dinov2Model", config_of("Dinov2")),
    "registers": made("Dinov2WithRegistersModel", config_of("Dinov2WithRegisters", **V3)),
    "DINOv3": made("DINOv3ViTModel", config_of("DINOv3ViT", **V3)),
    "DINOv2 backbone": made("Dinov2Backbone", config_of("Dinov2", out_features=STAGES)),
    "registers backbone": made(
        "Dinov2WithRegistersBackbone", config_of("Dinov2WithRegisters", out_features=STAGES, **V3)
    ),
    "DINOv3 backbone": made("DINOv3ViTBackbone", config_of("DINOv3ViT", out_features=STAGES, **V3)),
    "DINOv3 backbone with CLS": made(
        "DINOv3ViTBackbone",
        config_of("DINOv3ViT", out_features=STAGES, return_class_token=True, **V3),
    ),
    "UperNet": uper_net,
    "Depth Anything": depth_anything,
    "DPT": dpt,
}
WAYS: dict[str, dict[str, Any]] = {
    "entropy": {"policy": Entropy(bits=(4.0, 4.0))},
    "tome": {"reducers": [ToMe(share=0.2)]},
    "dropping": {"reducers": [EViT(0.6, (1, 2), fuse=False)]},
    "all": {"policy": Entropy(bits=(4.0,), sizes=(2,)), "reducers": [MPM((2,)), ToMe(share=0.1)]},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(3)
    built = MODELS[request.param]().eval()
    scramble(built)
    return built


def asked(model: nn.Module) -> dict[str, Any]:
    return {"interpolate_pos_encoding": True} if type(model).__name__ == "ViTModel" else {}


def pictures(*size: int) -> Tensor:
    """Noise on the right and one colour on the left."""
    torch.manual_seed(4)
    drawn = torch.randn(*size)
    drawn[..., : size[-1] // 2] = 0.3
    return drawn


def assert_alike(one: Any, other: Any) -> None:
    """Every field of two outputs, to 1e-4 of its range."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert torch.allclose(one, other, atol=1e-4 * float(one.abs().max()))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_alike(one[name], other[name])
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_alike(left, right)


@pytest.mark.parametrize("size", [(2, 3, 32, 32), (1, 3, 40, 72), (2, 3, 61, 45)])
def test_nothing_reduced_gives_every_output_of_the_original(
    model: nn.Module, size: tuple[int, ...]
) -> None:
    if size[-1] % 8 and hasattr(model, "neck"):
        pytest.skip("its head wants whole patches")
    images, cheap = pictures(*size), tokenstep.accelerate(model)
    with torch.no_grad():
        for options in ({}, {"output_hidden_states": True}, {"return_dict": False}):
            options = {**options, **asked(model)}
            assert_alike(model(images, **options), cheap(images, **options))


@pytest.mark.parametrize("way", WAYS)
def test_fewer_tokens_give_the_same_shapes_and_each_picture_alone(
    model: nn.Module, way: str
) -> None:
    cheap = tokenstep.accelerate(model, PROCESSOR, **WAYS[way])
    images = torch.cat([pictures(1, 3, 64, 64), pictures(1, 3, 64, 64).flip(3) * 2])
    with torch.no_grad():
        dense, found = model(images, **asked(model)), cheap(images, **asked(model))
        alone = [cheap(image[None], **asked(model)) for image in images]
    for name, value in found.items():
        maps = value if isinstance(value, tuple) else (value,)
        whole = dense[name] if isinstance(value, tuple) else (dense[name],)
        assert [part.shape for part in maps] == [part.shape for part in whole]
        for index, one in enumerate(alone):
            single = one[name] if isinstance(value, tuple) else (one[name],)
            for part, other in zip(maps, single, strict=True):
                assert torch.allclose(part[index], other[0], atol=1e-4 * float(part.abs().max()))
    rows = getattr(cheap, "backbone", cheap).run.encoded.live
    assert max(rows[-1]) < 64  # of 64 patches and the prefix


def test_the_users_model_stays_as_it_is(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, parts = copy.deepcopy(model.config.to_dict()), dict(model.named_modules())
    images = pictures(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images, **asked(model))
        tokenstep.accelerate(model, PROCESSOR, **WAYS["all"])(images, **asked(model))
        assert_alike(expected, model(images, **asked(model)))
    assert {name: id(part) for name, part in model.named_modules()} == {
        name: id(part) for name, part in parts.items()
    }
    assert model.config.to_dict() == config and list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_head_keeps_its_class_and_a_backbone_what_it_tells(model: nn.Module) -> None:
    cheap = tokenstep.accelerate(model, PROCESSOR, **WAYS["all"])
    assert cheap.config is model.config
    if hasattr(model, "backbone"):
        assert type(cheap) is type(model)
        assert cheap.backbone is not model.backbone
        assert cheap.backbone.channels == model.backbone.channels
    elif hasattr(model, "out_features"):
        assert (cheap.out_features, cheap.channels) == (model.out_features, model.channels)


def test_it_goes_with_the_model_that_it_shares_weights_with(model: nn.Module) -> None:
    own = copy.deepcopy(model)
    cheap = tokenstep.accelerate(own)
    images = pictures(1, 3, 32, 32)
    with torch.no_grad():
        own.to(torch.float64)
        assert_alike(own(images.double(), **asked(own)), cheap(images.double(), **asked(own)))
        state = {name: value * 0.9 for name, value in own.state_dict().items()}
        own.load_state_dict(state, assign=True)
        assert_alike(own(images.double(), **asked(own)), cheap(images.double(), **asked(own)))


def test_it_runs_in_bfloat16_and_gradients_reach_the_pixels(model: nn.Module) -> None:
    own = copy.deepcopy(model)
    cheap = tokenstep.accelerate(own, PROCESSOR, **WAYS["all"])
    images = pictures(1, 3, 64, 64).requires_grad_()
    (first, *_) = cheap(images, **asked(own), return_dict=False)
    first = first[-1] if isinstance(first, tuple) else first
    first.square().sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    with torch.no_grad():
        own.to(torch.bfloat16)
        (half, *_) = cheap(images.bfloat16(), **asked(own), return_dict=False)
    half = half[-1] if isinstance(half, tuple) else half
    assert half.dtype == torch.bfloat16 and bool(half.isfinite().all())


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("Dinov2ForImageClassification", config_of("Dinov2"), "Dinov2ForImageClassification"),
        ("ResNetModel", transformers.ResNetConfig(), "ResNetModel"),
        ("ViTModel", config_of("ViT", attention_probs_dropout_prob=0.1), "attention dropout"),
        ("Dinov2Model", config_of("Dinov2", image_size=(32, 48)), "not square"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name: str, config: Any, said: str) -> None:
    with pytest.raises(TokenstepError, match=said):
        tokenstep.accelerate(getattr(transformers, name)(config))


def test_a_subclass_is_refused() -> None:
    class Own(transformers.Dinov2Model):
        pass

    with pytest.raises(TokenstepError, match="Own"):
        tokenstep.accelerate(Own(config_of("Dinov2")))


def test_calls_that_are_not_supported_are_refused_by_name() -> None:
    images = pictures(1, 3, 40, 40)
    cheap = tokenstep.accelerate(transformers.Dinov2Model(config_of("Dinov2")).eval())
    with pytest.raises(TokenstepError, match="output_attentions"):
        cheap(images, output_attentions=True)
    with pytest.raises(TokenstepError, match="bool_masked_pos"):
        cheap(images, bool_masked_pos=torch.ones(1, 25, dtype=torch.bool))
    with pytest.raises(TokenstepError, match="output_hidden_states"):
        cheap(images, output_hidden_states=[1])
    fixed = tokenstep.accelerate(transformers.ViTModel(config_of("ViT")).eval())
    with pytest.raises(TokenstepError, match="interpolate_pos_encoding"):
        fixed(images)


def test_a_policy_wants_the_processor() -> None:
    model = transformers.Dinov2Model(config_of("Dinov2"))
    with pytest.raises(TokenstepError, match="image_mean"):
        tokenstep.accelerate(model, policy=Entropy())
    for wrong in ({"bits": (5.0,)}, {"bits": (-1.0, 2.0)}, {"bits": (), "sizes": ()}):
        with pytest.raises(TokenstepError, match="entropy"):
            Entropy(**wrong)


def test_a_plain_half_goes_on_as_one_token() -> None:
    model = transformers.Dinov2Model(config_of("Dinov2")).eval()
    cheap = tokenstep.accelerate(model, PROCESSOR, policy=Entropy(bits=(0.5, 0.5)))
    reducers: list[Reducer] = []
    assert cheap.run.reducers == tuple(reducers)
    with torch.no_grad():
        found = cheap(pictures(1, 3, 64, 64)).last_hidden_state[0, 1:].unflatten(0, (8, 8))
    assert cheap.run.encoded.live[0] == (1 + 32 + 2,)  # two superpatches of 4x4 on the left
    assert torch.equal(found[:4, :4], found[:1, :1].expand(4, 4, -1))


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def dinov2(**changes: Any) -> Any:
    return transformers.Dinov2Model(config_of("Dinov2", **changes)).eval()


def spoil_conv(model: Any) -> None:
    model.embeddings.patch_embeddings.projection.__class__ = Twice


def spoil_layer(model: Any) -> None:
    model.encoder.layer[1].register_forward_hook(lambda part, given, out: 0 * out)


def spoil_attention(model: Any) -> None:
    attention = model.encoder.layer[0].attention
    attention.forward = lambda rows, **named: (rows, None)


def spoil_depth(model: Any) -> None:
    del model.encoder.layer[2]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_conv, "Twice"),
        (spoil_layer, "layer.1: has a hook"),
        (spoil_attention, "layer.0.attention: has a hook or a forward"),
        (spoil_depth, "other layers"),
    ],
)
def test_a_part_that_would_not_be_called_is_refused(
    spoil: Callable[[Any], None], said: str
) -> None:
    """Now, or when it is spoilt later on."""
    model = dinov2()
    cheap = tokenstep.accelerate(model)
    spoil(model)
    with pytest.raises(TokenstepError, match=said):
        tokenstep.accelerate(model)
    with pytest.raises(TokenstepError, match=said):
        cheap(pictures(1, 3, 32, 32))


def test_a_head_that_would_come_back_as_it_was_is_refused() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            if name == "inner":
                return nn.Module.__getattr__(self, name)
            return getattr(self.inner, name)

    head = uper_net()
    with pytest.raises(TokenstepError, match="wraps a model"):
        tokenstep.accelerate(Wrapper(head))
    head.again = head.backbone
    with pytest.raises(TokenstepError, match="again"):
        tokenstep.accelerate(head)
    del head.again
    head.forward = head.forward
    with pytest.raises(TokenstepError, match="forward of its own"):
        tokenstep.accelerate(head)


def test_what_is_saved_of_it_the_original_loads(model: nn.Module) -> None:
    cheap = tokenstep.accelerate(copy.deepcopy(model), PROCESSOR, **WAYS["all"])
    state = {name: value + 1 for name, value in cheap.state_dict().items()}
    assert list(state) == list(model.state_dict())
    cheap.load_state_dict(state)
    assert all(torch.equal(state[name], value) for name, value in cheap.state_dict().items())


def test_modes_and_hooks_of_the_users_model_stay(model: nn.Module) -> None:
    own = copy.deepcopy(model).train()
    next(iter(own.children())).eval()
    before = [part.training for part in own.modules()]
    cheap = tokenstep.accelerate(own, PROCESSOR, **WAYS["entropy"])
    assert [part.training for part in own.modules()] == before
    heard: list[str] = []
    cheap.register_forward_hook(lambda *_: heard.append("heard"))
    with torch.no_grad():
        own.eval()(pictures(1, 3, 32, 32))
    assert not heard


def test_more_that_would_differ_in_silence_is_refused_by_name() -> None:
    images = pictures(1, 3, 32, 32)
    with pytest.raises(TokenstepError, match="not square"):
        tokenstep.accelerate(transformers.ViTModel(config_of("ViT", image_size=(16, 64))))
    with pytest.raises(TokenstepError, match="3 channels"):
        tokenstep.accelerate(dinov2(num_channels=1))
    wants = dinov2(output_attentions=True, attn_implementation="eager")
    with pytest.raises(TokenstepError, match="output_attentions"):
        tokenstep.accelerate(wants)(images)
    moved = transformers.DINOv3ViTModel(config_of("DINOv3ViT")).train()
    with pytest.raises(TokenstepError, match="pos_embed_rescale"):
        tokenstep.accelerate(moved)(images)
    for wrong in (images[:, :1], images[:0], images[..., :7]):
        with pytest.raises(TokenstepError, match="at least one picture"):
            tokenstep.accelerate(dinov2())(wrong)


def test_what_is_given_is_checked_at_once() -> None:
    model = dinov2()
    for wrong in ({"reducers": [3]}, {"policy": "entropy"}, {"reducers": ["tomme:r=1"]}):
        with pytest.raises(TokenstepError):
            tokenstep.accelerate(model, PROCESSOR, **wrong)
    for mean in (0.5, [0.5], None):
        processor = SimpleNamespace(image_mean=mean, image_std=[0.5] * 3)
        with pytest.raises(TokenstepError, match="image_mean"):
            tokenstep.accelerate(model, processor, policy=Entropy())
    with torch.no_grad():
        named = tokenstep.accelerate(model, reducers=["tome:share=0.2"])
        own = tokenstep.accelerate(model, reducers=[ToMe(share=0.2)])
        images = pictures(1, 3, 64, 64)
        assert torch.equal(named(images, None)[0], own(images)[0])
    plain = SimpleNamespace(do_normalize=False, image_mean=[0.5] * 3, image_std=[0.2] * 3)
    assert tokenstep.accelerate(model, plain, policy=Entropy()).policy.shift == 0
