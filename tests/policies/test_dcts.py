import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenstep.config import PolicyConfig
from tokenstep.policies.dcts import DCTS

TINY = PolicyConfig("test_efficientnet", stages=(1, 2), sizes=(2, 4, 16), width=8)


def grid_of(height: int, width: int, patch: int) -> tuple[int, int]:
    return -(-height // patch), -(-width // patch)


@pytest.fixture(scope="module", params=[8, 14, 16])
def policy(request: pytest.FixtureRequest) -> DCTS:
    return DCTS(TINY, request.param).eval()


@settings(max_examples=12)
@given(st.integers(1, 300), st.integers(1, 90))
def test_one_score_per_superpatch_on_pictures_of_any_size(
    policy: DCTS, height: int, width: int
) -> None:
    with torch.no_grad():
        scores = policy(torch.rand(1, 3, height, width))
    grid = grid_of(height, width, policy.patch)
    for size, score in zip(TINY.sizes, scores, strict=True):
        assert score.shape == (1, grid[0] // size, grid[1] // size)
        assert score.isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (2000, 5)])
def test_extreme_pictures(policy: DCTS, size: tuple[int, int]) -> None:
    with torch.no_grad():
        scores = policy(torch.rand(1, 3, *size))
    assert len(scores) == len(TINY.sizes)


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.7, 1.0])
def test_it_may_read_at_a_lower_resolution(scale: float) -> None:
    config = PolicyConfig("test_efficientnet", stages=(1, 2), sizes=(2, 4), width=8, scale=scale)
    policy = DCTS(config, 16).eval()
    read = policy.read(torch.rand(1, 3, 250, 380), (16, 24))
    assert read.shape[2] % 32 == read.shape[3] % 32 == 0
    assert abs(read.shape[2] - 256 * scale) <= 16
    assert policy(torch.rand(1, 3, 250, 380))[0].shape == (1, 8, 12)


def test_padding_goes_on_as_the_border() -> None:
    policy = DCTS(TINY, 8)
    read = policy.read(torch.full((1, 3, 3, 5), 0.25), (16, 16))
    assert torch.allclose(read, torch.full_like(read, 0.25))


@pytest.mark.parametrize(
    ("trunk", "stages"),
    [("efficientnet_lite0", (1, 2, 3)), ("mobilenetv3_small_100", (1, 2, 3)), ("resnet18", (1, 2))],
)
def test_trunks_by_name(trunk: str, stages: tuple[int, ...]) -> None:
    policy = DCTS(PolicyConfig(trunk, stages=stages, width=8), 8).eval()
    with torch.no_grad():
        scores = policy(torch.rand(1, 3, 128, 200))
    assert [score.shape for score in scores] == [(1, 8, 12), (1, 4, 6), (1, 2, 3), (1, 1, 1)]


def test_scores_follow_the_place() -> None:
    """Turning a picture turns its score maps, but for the trunk's own asymmetry."""
    policy = DCTS(TINY, 8).eval()
    image = torch.zeros(1, 3, 256, 256)
    image[..., :64] = torch.rand(1, 3, 256, 64)
    with torch.no_grad():
        changed = (policy(image)[0] - policy(torch.zeros(1, 3, 256, 256))[0]).abs()
    assert changed[..., :4].mean() > 5 * changed[..., 12:].mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_the_cpu(dtype: torch.dtype) -> None:
    policy = DCTS(TINY, 14).eval().to(dtype)
    with torch.no_grad():
        scores = policy(torch.rand(1, 3, 50, 300, dtype=dtype))
    assert all(score.dtype == dtype and score.isfinite().all() for score in scores)


def test_every_part_learns() -> None:
    policy = DCTS(TINY, 8).train()
    sum(score.square().mean() for score in policy(torch.rand(2, 3, 128, 128))).backward()
    dead = [name for name, weight in policy.named_parameters() if weight.grad is None]
    assert not dead


def test_what_it_cannot_be_built_from_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no_such_net"):
        DCTS(PolicyConfig("no_such_net"), 8)
    with pytest.raises(ValueError, match="got 3"):
        DCTS(PolicyConfig(sizes=(2, 3)), 8)
    with pytest.raises(ValueError, match="size"):
        DCTS(PolicyConfig(sizes=()), 8)
    with pytest.raises(ValueError, match="stages"):
        DCTS(PolicyConfig("test_efficientnet", stages=(1, 17)), 8)
    with pytest.raises(ValueError, match=r"resnet18\.foo"):
        DCTS(PolicyConfig("resnet18.foo"), 8)
    with pytest.raises(ValueError, match="vit_tiny_patch16_224"):
        DCTS(PolicyConfig("vit_tiny_patch16_224"), 8)
