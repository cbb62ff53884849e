"""The contract of every host: nothing reduced is the original, and its parts are the stages'."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import pytest
import timm
import torch
from support import scramble
from torch import Tensor, nn

from tokenstep.core import partition
from tokenstep.core.attention import Attend
from tokenstep.core.partition import Grid
from tokenstep.core.ragged import Segments
from tokenstep.hosts.base import BlockSettings, Host, HostBlock, Learned
from tokenstep.hosts.timm_vit import TimmViT
from tokenstep.model.encoder import Encoder
from tokenstep.model.supertokens import Tokeniser


class OwnBlock:
    """A block of torch's own layers."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        self.layer = layer
        self.heads = layer.self_attn.num_heads
        self.first = layer.norm1

    def attention(self, x: Tensor, attend: Attend) -> Tensor:
        own = self.layer.self_attn
        qkv = nn.functional.linear(self.layer.norm1(x), own.in_proj_weight, own.in_proj_bias)
        q, k, v = qkv.unflatten(1, (3, self.heads, own.head_dim)).unbind(1)
        return x + own.out_proj(attend(q, k, v, scale=own.head_dim**-0.5).flatten(1))

    def mlp(self, x: Tensor, segments: Segments) -> Tensor:
        layer = self.layer
        return x + layer.linear2(layer.activation(layer.linear1(layer.norm2(x))))

    def macs(self, rows: int, left: int, *, size_bias: bool) -> int:
        return 0


class OwnHost:
    """A ViT of torch's own layers, without CLS and positions, as a foreign host would be."""

    prefix, margin = 0, 0

    def __init__(self, patch: int = 4, dim: int = 24, depth: int = 2) -> None:
        self.patch, self.dim = patch, dim
        self.proj = nn.Conv2d(3, dim, patch, patch)
        layer = partial(nn.TransformerEncoderLayer, dim, 3, 32, 0.0, "gelu")
        self.layers = nn.ModuleList(layer(batch_first=True, norm_first=True) for _ in range(depth))
        self.last = nn.LayerNorm(dim)
        self.blocks: Sequence[HostBlock] = [
            OwnBlock(cast(nn.TransformerEncoderLayer, layer)) for layer in self.layers
        ]

    def before(self) -> Mapping[str, Learned]:
        return {"proj": self.proj}

    def behind(self) -> Mapping[str, Learned]:
        return {"layers": self.layers, "last": self.last}

    def embed(self, windows: Tensor) -> Tensor:
        return self.proj(windows).flatten(1)

    def prefix_rows(self) -> Tensor:
        return self.proj.weight.new_zeros(0, self.dim)

    def positions(self, grid: Grid) -> Tensor | None:
        return None

    def enter(self, x: Tensor) -> Tensor:
        return x

    def norm(self, x: Tensor) -> Tensor:
        return self.last(x)

    def original(self, images: Tensor) -> Tensor:
        x = self.proj(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


@dataclass
class Hosted:
    """A host, and what the ViT that it stands for makes of ``(B, 3, h, w)``."""

    host: Host
    original: Callable[[Tensor], Tensor]


def timm_vit(**changes: object) -> Hosted:
    settings = {"depth": 2, "num_classes": 0, "dynamic_img_size": True, **changes}
    vit = timm.create_model("test_vit", **settings).eval()
    return Hosted(TimmViT(vit), vit.forward_features)


def own_host() -> Hosted:
    host = OwnHost()
    return Hosted(host, host.original)


HOSTS: dict[str, Callable[[], Hosted]] = {
    "timm": timm_vit,
    "timm, registers": partial(timm_vit, reg_tokens=2),
    "a host of torch's own layers": own_host,
}


class Stages(nn.Module):
    """The two stages that hold a host's parts."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.tokenise = Tokeniser(host, sub_patches=False)
        self.encode = Encoder(host, BlockSettings())

    def forward(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Features of each picture's rows, nothing merged."""
        patch = self.tokenise.patch
        grids = [partition.grid_of(picture.shape[-2:], patch) for picture in pictures]
        tokens, _ = self.encode(self.tokenise(pictures, partition.uniform(grids)))
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


@pytest.mark.parametrize("change", ["double", "bfloat16", "a copy", "loaded"])
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
