"""A policy over batches: what it says of a picture does not depend on the others."""

import pytest
import torch
from conftest import TinyModel
from support import scramble

from tokenstep.core.partition import uniform
from tokenstep.core.same_size import stacked
from tokenstep.errors import TokenstepError
from tokenstep.policies import batch
from tokenstep.policies.batch import features_on_grids, homogeneity, partition_by, policy_features


@pytest.mark.parametrize("size", [(24, 40), (1000, 1100)], ids=["small", "one by one"])
def test_a_picture_is_seen_alike_in_any_batch(tiny_model: TinyModel, size: tuple[int, int]) -> None:
    policy = tiny_model().policy
    scramble(policy)
    normal = [*torch.randn(3, 3, *size), torch.randn(3, 33, 20)]
    groups = stacked(normal)
    assert [group.places for group in groups] == [(0, 1, 2), (3,)]
    looks = policy_features(policy, groups)
    whole = 2 * size[0] * size[1] > batch.CPU_PIXELS
    assert [len(own) for own in looks] == [3 if whole else 1, 1]
    context = features_on_grids(policy, looks)
    for group, own, seen in zip(groups, looks, context, strict=True):
        together = homogeneity(policy, own)
        for row, place in enumerate(group.places):
            (alone,) = policy_features(policy, stacked([normal[place]]))
            for ours, theirs in zip(homogeneity(policy, alone), together, strict=True):
                assert torch.allclose(ours[0], theirs[row], atol=1e-5)
            (single,) = features_on_grids(policy, [alone])
            assert torch.allclose(single[0], seen[row], atol=1e-4)


def test_without_thresholds_nothing_merges_and_the_policy_is_not_asked(
    tiny_model: TinyModel,
) -> None:
    normal = stacked([torch.randn(3, 40, 24), torch.randn(3, 16, 64)])
    partition, finite = partition_by(tiny_model().policy, normal, [], None)
    assert finite is None
    assert torch.equal(partition, uniform([(5, 3), (2, 8)]))


def test_nan_scores_are_an_error(tiny_model: TinyModel) -> None:
    policy = tiny_model().policy
    policy.heads[0].weight.data.fill_(float("nan"))
    (looks,) = policy_features(policy, stacked([torch.randn(3, 40, 40)]))
    with pytest.raises(TokenstepError, match="NaN scores"):
        homogeneity(policy, looks)
