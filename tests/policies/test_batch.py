"""A policy over batches: what it says of a picture does not depend on the others."""

import pytest
import torch
from conftest import TinyModel
from support import scramble

from tokenstep.core.partition import uniform
from tokenstep.errors import TokenstepError
from tokenstep.policies import batch
from tokenstep.policies.batch import features_on_grids, homogeneity, partition_by, policy_features


@pytest.mark.parametrize("size", [(24, 40), (1000, 1100)], ids=["small", "one by one"])
def test_a_picture_is_seen_alike_in_any_batch(tiny_model: TinyModel, size: tuple[int, int]) -> None:
    policy = tiny_model().policy
    scramble(policy)
    normal = [*torch.randn(3, 3, *size), torch.randn(3, 33, 20)]
    groups = policy_features(policy, normal)
    assert sorted(place for group in groups for place in group.places) == [0, 1, 2, 3]
    whole = sum(2 * picture[0].numel() > batch.CPU_PIXELS for picture in normal)
    assert all(len(group.places) == 1 for group in groups) == (whole == 3)
    for group in groups:
        together = homogeneity(policy, group.features)
        for row, place in enumerate(group.places):
            (alone,) = policy_features(policy, [normal[place]])
            for ours, theirs in zip(homogeneity(policy, alone.features), together, strict=True):
                assert torch.allclose(ours[0], theirs[row], atol=1e-5)
    context = features_on_grids(policy, groups)
    assert [len(features) for features in context.values()] == [3, 1]
    for place in range(3):
        (alone,) = features_on_grids(policy, policy_features(policy, [normal[place]])).values()
        assert torch.allclose(alone[0], next(iter(context.values()))[place], atol=1e-4)


def test_without_thresholds_nothing_merges_and_the_policy_is_not_asked(
    tiny_model: TinyModel,
) -> None:
    normal = [torch.randn(3, 40, 24), torch.randn(3, 16, 64)]
    partition = partition_by(tiny_model().policy, normal, [], None)
    assert torch.equal(partition, uniform([(5, 3), (2, 8)]))


def test_nan_scores_are_an_error(tiny_model: TinyModel) -> None:
    policy = tiny_model().policy
    policy.heads[0].weight.data.fill_(float("nan"))
    (group,) = policy_features(policy, [torch.randn(3, 40, 40)])
    with pytest.raises(TokenstepError, match="NaN scores"):
        homogeneity(policy, group.features)
