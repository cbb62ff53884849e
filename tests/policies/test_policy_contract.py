"""The contract of every policy: finite scores of each picture on its own, at any size."""

from collections.abc import Callable

import pytest
import torch
from guide import example
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenstep.config import PolicyConfig
from tokenstep.core.partition import grid_of
from tokenstep.core.same_size import stacked
from tokenstep.policies.base import Policy
from tokenstep.policies.batch import features_on_grids, homogeneity, policy_features
from tokenstep.policies.dcts import DCTS
from tokenstep.policies.entropy import EntropyPolicy

SIZES = (2, 4)
TINY = PolicyConfig("test_efficientnet", stages=(1, 2), sizes=SIZES, width=8)

POLICIES: dict[str, Callable[[], Policy]] = {
    "dcts": lambda: DCTS(TINY, 8),
    "entropy": lambda: EntropyPolicy(8, SIZES),
    "the example of CONTRIBUTING": lambda: example("Contrast")(8, SIZES),
}


@pytest.fixture(scope="module", params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    torch.manual_seed(2)
    return POLICIES[request.param]().eval()


@settings(max_examples=10)
@given(st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4))
def test_each_picture_is_seen_on_its_own(policy: Policy, sizes: list[tuple[int, int]]) -> None:
    pictures = [torch.rand(3, *size) for size in sizes]
    groups = stacked(pictures)
    for group, looks in zip(groups, policy_features(policy, groups), strict=True):
        scores = homogeneity(policy, looks)
        assert len(scores) == len(SIZES)
        for row, place in enumerate(group.places):
            (alone,) = policy_features(policy, stacked([pictures[place]]))
            grid = grid_of(sizes[place], policy.patch)
            for size, score, single in zip(SIZES, scores, homogeneity(policy, alone), strict=True):
                assert score.shape[1:] == (grid[0] // size, grid[1] // size)
                assert ((score >= 0) & (score <= 1)).all()
                assert torch.allclose(score[row], single[0], atol=1e-5)


def test_what_it_tells_the_tokens_lies_on_their_grid(policy: Policy) -> None:
    pictures: list[Tensor] = [torch.rand(3, 40, 56), torch.rand(3, 17, 9), torch.rand(3, 40, 56)]
    found = features_on_grids(policy, policy_features(policy, stacked(pictures)))
    assert [tuple(maps.shape) for maps in found] == [
        (2, policy.channels, 5, 7),
        (1, policy.channels, 3, 2),
    ]


def test_a_larger_picture_costs_more_and_scores_are_not_free(policy: Policy) -> None:
    small, large = policy.macs((64, 64)), policy.macs((256, 128))
    assert 0 < small < large
    assert policy.macs((64, 64), scores=False) < small
