"""A CNN without its batch norms computes the same, and follows its weights."""

import copy
import dataclasses
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from operations import Operations
from support import scramble
from timm.layers import StdConv2d
from torch import nn

from tokenstep.config import PolicyConfig
from tokenstep.policies.dcts import DCTS
from tokenstep.policies.folded import folded

TRUNKS = [
    "tf_efficientnet_lite0",
    "mobilenetv3_small_100",
    "resnet18",
    "regnety_002",
    "convnext_atto",
]


def random_norms(module: nn.Module) -> None:
    """Give norms statistics and scales that no identity has."""
    scramble(module)
    for one in module.modules():
        if isinstance(one, nn.BatchNorm2d) and one.track_running_stats:
            one.running_mean.normal_(std=0.3)
            one.running_var.uniform_(0.5, 2.0)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_it_computes_the_same_without_norms(trunk: str) -> None:
    cnn = timm.create_model(trunk, features_only=True, out_indices=(1, 2)).eval()
    random_norms(cnn)
    image = torch.rand(2, 3, 64, 96)
    found = folded(cnn, lambda one: one(torch.zeros(1, 3, 32, 32)))
    left = [one for one in found.modules() if isinstance(one, nn.BatchNorm2d)]
    assert not left, "each reads one convolution in these"
    with torch.no_grad():
        for ours, theirs in zip(found(image), cnn(image), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_norms_that_read_something_else_stay() -> None:
    shared = nn.Conv2d(3, 3, 1)
    cnn = nn.Sequential(nn.BatchNorm2d(3), shared, nn.BatchNorm2d(3), shared, nn.ReLU()).eval()
    random_norms(cnn)
    image = torch.rand(1, 3, 8, 8)
    found = folded(cnn, lambda one: [one(image)])
    assert sum(isinstance(one, nn.BatchNorm2d) for one in found.modules()) == 2
    with torch.no_grad():
        assert torch.equal(found(image), cnn(image))


@pytest.fixture
def policy() -> DCTS:
    torch.manual_seed(1)
    made = DCTS(PolicyConfig("tf_efficientnet_lite0", stages=(1, 2), sizes=(2, 4)), 8).eval()
    random_norms(made)
    return made


def scores(policy: DCTS, image: torch.Tensor, *, plain: bool = False) -> list[torch.Tensor]:
    with torch.inference_mode():
        return (policy if plain else policy.for_use())(image)


def test_a_policy_in_use_follows_its_weights(policy: DCTS) -> None:
    image = torch.rand(1, 3, 64, 64)
    for change in ("none", "in place", "a part", "a setting", "loaded", "of another dtype"):
        if change == "in place":
            with torch.no_grad():
                next(policy.trunk.parameters()).mul_(1.5)
        elif change == "a part":
            policy.smooth[2] = nn.GELU()
        elif change == "a setting":
            policy.smooth[1].eps = 0.5
            policy.config = dataclasses.replace(policy.config, scale=1.0)
        elif change == "loaded":
            other = copy.deepcopy(policy)
            random_norms(other)
            policy.load_state_dict(other.state_dict())
        elif change == "of another dtype":
            policy, image = policy.double(), image.double()
        for ours, theirs in zip(
            scores(policy, image), scores(policy, image, plain=True), strict=True
        ):
            assert ours.dtype == image.dtype
            assert torch.allclose(ours, theirs, atol=1e-3 * float(theirs.abs().max())), change


def test_hooks_on_its_parts_are_called_whenever_they_come(policy: DCTS) -> None:
    image, called = torch.rand(1, 3, 64, 64), []
    scores(policy, image)
    hook = policy.trunk.register_forward_hook(lambda *_: called.append(1))
    scores(policy, image)
    assert called == [1]
    hook.remove()
    scores(policy, image)
    assert called == [1]


def test_it_is_no_part_of_the_policy(policy: DCTS) -> None:
    before, size = set(policy.state_dict()), len(pickle.dumps(policy))
    scores(policy, torch.rand(1, 3, 64, 64))
    assert set(policy.state_dict()) == before and len(pickle.dumps(policy)) == size
    again, image = copy.deepcopy(policy), torch.ones(1, 3, 32, 32)
    assert torch.equal(scores(again, image)[0], scores(policy, image)[0])


def test_what_was_made_in_inference_mode_serves_elsewhere(policy: DCTS) -> None:
    scores(policy, torch.rand(1, 3, 64, 64))
    lean = policy.for_use()
    assert lean is not policy and lean.for_use() is lean
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    lean(image)[0].sum().backward()
    assert image.grad is not None
    lean.load_state_dict(copy.deepcopy(lean.state_dict()))


class TwiceRead(nn.Module):
    """A norm that is not the only reader of its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convolution(x)
        return self.norm(x) + x


@pytest.mark.parametrize(
    "make",
    [
        TwiceRead,
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)),
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)
        ),
        lambda: nn.Sequential(StdConv2d(3, 3, 1), nn.BatchNorm2d(3)),
    ],
)
def test_what_cannot_be_folded_stays_as_it_is(make: Callable[[], nn.Module]) -> None:
    cnn, image = make().eval(), torch.rand(1, 3, 8, 8)
    random_norms(cnn)
    with torch.no_grad():
        found = folded(cnn, lambda one: [one(image)])
        assert torch.allclose(found(image), cnn(image), atol=1e-5)
        assert any(isinstance(one, nn.BatchNorm2d) for one in found.modules())


def test_training_goes_through_the_norms(policy: DCTS) -> None:
    policy.train()
    mean = policy.smooth[1].running_mean.clone()
    sum(score.sum() for score in policy(torch.rand(2, 3, 64, 64))).backward()
    assert policy.smooth[1].weight.grad is not None
    assert not torch.equal(policy.smooth[1].running_mean, mean)


def test_a_third_of_the_operations_go(policy: DCTS) -> None:
    image = torch.rand(1, 3, 64, 64)
    scores(policy, image)
    with Operations() as use:
        scores(policy, image)
    with Operations() as plain:
        scores(policy, image, plain=True)
    assert use.total < 0.8 * plain.total
