"""A CNN without its batch norms computes the same, and follows its weights."""

import copy

import pytest
import timm
import torch
from operations import Operations
from support import scramble
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
        if isinstance(one, nn.BatchNorm2d):
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
    found = folded(cnn, lambda one: one(image))
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
    if plain:
        with torch.no_grad():
            return policy.score(policy.look(image))
    with torch.inference_mode():
        return policy(image)


def test_a_policy_in_use_follows_its_weights(policy: DCTS) -> None:
    image = torch.rand(1, 3, 64, 64)
    for change in ("none", "in place", "loaded", "of another dtype"):
        if change == "in place":
            with torch.no_grad():
                next(policy.trunk.parameters()).mul_(1.5)
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


def test_hooks_on_its_trunk_are_called_whenever_they_come(policy: DCTS) -> None:
    image, called = torch.rand(1, 3, 64, 64), []
    scores(policy, image)
    hook = policy.trunk.register_forward_hook(lambda *_: called.append(1))
    scores(policy, image)
    assert called
    hook.remove()
    called.clear()
    scores(policy, image)
    assert not called


def test_it_is_no_part_of_the_policy(policy: DCTS) -> None:
    before = set(policy.state_dict())
    scores(policy, torch.rand(1, 3, 64, 64))
    assert set(policy.state_dict()) == before
    again = copy.deepcopy(policy)
    assert torch.equal(
        scores(again, torch.ones(1, 3, 32, 32))[0], scores(policy, torch.ones(1, 3, 32, 32))[0]
    )


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
