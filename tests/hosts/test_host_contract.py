"""The contract of every host: nothing reduced is the original, and its parts are the stages'."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import timm
import torch
from guide import example
from support import scramble
from timm.models.eva import Eva
from torch import Tensor, nn

from tokenstep.core import partition
from tokenstep.core.same_size import stacked
from tokenstep.hosts.base import BlockSettings, Host
from tokenstep.hosts.timm_eva import TimmEva
from tokenstep.hosts.timm_vit import TimmViT
from tokenstep.model.encoder import Encoder
from tokenstep.model.supertokens import Tokeniser


@dataclass
class Hosted:
    """A host, and what the ViT that it stands for makes of ``(B, 3, h, w)``."""

    host: Host
    original: Callable[[Tensor], Tensor]


def timm_vit(**changes: object) -> Hosted:
    settings = {"depth": 2, "num_classes": 0, "dynamic_img_size": True, **changes}
    vit = timm.create_model("test_vit", **settings).eval()
    return Hosted(TimmViT(vit), vit.forward_features)


def hf(kind: str, **changes: object) -> Hosted:
    transformers = pytest.importorskip("transformers", reason="pip install '.[hf]'")
    from tokenstep.hosts.hf_vit import HFViT

    size = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_attention_heads": 3}
    config = getattr(transformers, f"{kind}Config")(**size, num_hidden_layers=2, **changes)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    call = partial(model, interpolate_pos_encoding=True) if kind == "ViT" else model
    return Hosted(HFViT(model), lambda images: call(images).last_hidden_state)


def of_the_guide() -> Hosted:
    layer = nn.TransformerEncoderLayer(24, 3, 32, 0.0, "gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(24), enable_nested_tensor=False)
    host = example("TorchViT")(4, encoder)
    return Hosted(host, lambda images: encoder(host.proj(images).flatten(2).transpose(1, 2)))


def timm_eva(**changes: object) -> Hosted:
    settings = {
        **{"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2},
        **{"num_classes": 0, "dynamic_img_size": True, "use_rot_pos_emb": True, **changes},
    }
    vit = Eva(**settings).eval()  # type: ignore[arg-type]
    return Hosted(TimmEva(vit), vit.forward_features)


EVA_02 = {"swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "scale_attn_inner": True}
DINO_V3: dict[str, object] = {
    **{"rope_type": "dinov3", "rope_rotate_half": True, "use_abs_pos_emb": False},
    **{"num_reg_tokens": 2, "init_values": 0.1, "qkv_bias": False, "global_pool": "token"},
}

HOSTS: dict[str, Callable[[], Hosted]] = {
    "timm": timm_vit,
    "timm, registers": partial(timm_vit, reg_tokens=2),
    "timm, eva-02": partial(timm_eva, **EVA_02, ref_feat_shape=(3, 5)),
    "timm, eva without turns": partial(timm_eva, use_rot_pos_emb=False),
    "timm, dinov3": partial(timm_eva, **DINO_V3),
    "timm, the older attention": partial(timm_eva, attn_type="rope", qk_norm=True),
    "timm, columns first": partial(timm_eva, rope_grid_indexing="xy", rope_grid_offset=1.0),
    "transformers, ViT": partial(hf, "ViT", intermediate_size=64),
    "transformers, DINOv2": partial(hf, "Dinov2", mlp_ratio=2),
    "transformers, DINOv2 gated": partial(hf, "Dinov2", mlp_ratio=2, use_swiglu_ffn=True),
    "transformers, DINOv2 with registers": partial(
        hf, "Dinov2WithRegisters", mlp_ratio=2, num_register_tokens=2
    ),
    "transformers, DINOv3": partial(hf, "DINOv3ViT", intermediate_size=64, num_register_tokens=2),
    "transformers, DINOv3 gated": partial(
        hf, "DINOv3ViT", intermediate_size=64, use_gated_mlp=True, num_register_tokens=1
    ),
    "the example of CONTRIBUTING": of_the_guide,
}


class Stages(nn.Module):
    """The two stages that hold a host's parts."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.tokenise = Tokeniser(host, sides=(2, 4), sub_patches=False)
        self.encode = Encoder(host, BlockSettings())

    def forward(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Features of each picture's rows, nothing merged."""
        patch = self.tokenise.patch
        grids = [partition.grid_of(picture.shape[-2:], patch) for picture in pictures]
        tokens, _ = self.encode(self.tokenise(stacked(pictures), partition.uniform(grids)))
        return list(torch.split(tokens.x, tokens.offsets.diff().tolist()))


@pytest.fixture(params=HOSTS)
def hosted(request: pytest.FixtureRequest) -> tuple[Stages, Callable[[Tensor], Tensor]]:
    torch.manual_seed(2)
    made = HOSTS[request.param]()
    stages = Stages(made.host)
    scramble(stages)
    return stages.eval(), made.original


def pictures(stages: Stages, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    patch = stages.tokenise.patch
    return [torch.rand(3, rows * patch, columns * patch, dtype=dtype) for rows, columns in GRIDS]


GRIDS = [(3, 5), (2, 2), (3, 5), (6, 1)]


def test_nothing_reduced_is_the_original_for_mixed_sizes(
    hosted: tuple[Stages, Callable[[Tensor], Tensor]],
) -> None:
    stages, original = hosted
    images = pictures(stages)
    with torch.no_grad():
        for image, found in zip(images, stages(images), strict=True):
            expected = original(image[None])[0]
            assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("change", ["double", "bfloat16", "a copy", "loaded", "assigned"])
def test_it_stays_one_with_the_stages_that_hold_its_parts(
    hosted: tuple[Stages, Callable[[Tensor], Tensor]], change: str
) -> None:
    """What is done to the stages is done to the host: moved, copied, loaded."""
    stages, _ = hosted
    images = pictures(stages)
    with torch.no_grad():
        before = stages(images)
        match change:
            case "a copy":
                changed = copy.deepcopy(stages)
                for weight in stages.parameters():
                    weight.zero_()
            case "loaded":
                changed = stages
                state = {key: value.clone() for key, value in stages.state_dict().items()}
                for weight in stages.parameters():
                    weight.zero_()
                assert not torch.allclose(before[0], stages(images)[0])
                stages.load_state_dict(state)
            case "assigned":
                changed = copy.deepcopy(stages)
                scramble(changed)
                assert not torch.allclose(before[0], changed(images)[0])
                called = torch.func.functional_call(changed, stages.state_dict(), (images,))
                assert torch.allclose(called[0], before[0], atol=1e-5)
                changed.load_state_dict(stages.state_dict(), assign=True)
            case dtype:
                changed = stages.to(getattr(torch, dtype))
                images = [image.to(getattr(torch, dtype)) for image in images]
        tolerance = 0.1 if change == "bfloat16" else 1e-4
        for one, other in zip(before, changed(images), strict=True):
            assert other.dtype == images[0].dtype
            assert torch.allclose(one, other.float(), atol=tolerance * float(one.abs().max()))


def test_gradients_reach_the_pixels_and_every_part(
    hosted: tuple[Stages, Callable[[Tensor], Tensor]],
) -> None:
    stages, _ = hosted
    images = [image.requires_grad_() for image in pictures(stages)]
    sum(rows.square().mean() for rows in stages(images)).backward()
    assert all(image.grad is not None and image.grad.abs().sum() > 0 for image in images)
    for name, weight in stages.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name


def test_no_part_is_held_twice(hosted: tuple[Stages, Callable[[Tensor], Tensor]]) -> None:
    stages, _ = hosted
    names = [name for name, _ in stages.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len(list(stages.parameters()))
