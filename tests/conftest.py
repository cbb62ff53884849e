"""What every test shares: one thread, fixed seeds, quick hypothesis, and tiny models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from training import draw, policy_recipe

from tokenstep.config import PolicyConfig, VitConfig
from tokenstep.model.config import ModelConfig
from tokenstep.model.segmenter import Segmenter

torch.set_num_threads(1)

settings.register_profile(
    "tokenstep",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tokenstep")

CLASSES = ("road", "tree", "sky")
PALETTE = ((90, 90, 90), (0, 120, 0), (90, 160, 230))

TinyModel = Callable[..., Segmenter]


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """Settings of a small model; keywords override its VitConfig."""

    def config(*, policy: PolicyConfig | None = None, **vit: object) -> ModelConfig:
        base = VitConfig("test_vit", patch=8, depth=3, image_size=(32, 48), exits=(1, 2))
        policy = policy or PolicyConfig("test_efficientnet", stages=(1, 2), sizes=(2, 4), width=8)
        return ModelConfig(CLASSES, PALETTE, vit=replace(base, **vit), policy=policy)

    return config


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., ModelConfig]) -> TinyModel:
    """Build a small model in eval mode, the same for the same keywords."""

    def build(**changes: object) -> Segmenter:
        torch.manual_seed(1)
        return Segmenter.build(tiny_config(**changes)).eval()

    return build


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled folder of drawn rectangles, to train on."""
    return draw(tmp_path_factory.mktemp("drawn"), {"train": 24, "val": 6, "test": 6})


@pytest.fixture(scope="session")
def policy(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a policy that was trained there."""
    from tokenstep.train.train import train_policy  # Lightning takes seconds, and few tests need it

    out = tmp_path_factory.mktemp("policy")
    train_policy(policy_recipe(drawn, out, 60), progress=False)
    return out
