"""A policy over a batch of pictures of any sizes: its CNN, scores, partition and features.

Pictures of one size go through the CNN together; a picture padded to another's size would be seen
differently at its border. The policy is never trained through here: nothing has a gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenstep.core.partition import Plan, grid_of, uniform
from tokenstep.core.same_size import SameSize, sizes_of
from tokenstep.errors import TokenstepError
from tokenstep.policies.base import Policy, Seen

CPU_PIXELS = 3 * 2**19  # pixels that the CNN takes together on a CPU

Looks = list[Seen]  # what the policy made of pictures of one size, some of them at a time


@torch.no_grad()
def policy_features(
    policy: Policy, groups: Sequence[SameSize], *, whole: bool = False
) -> list[Looks]:
    """Run the CNN on normalised pictures, group by group.

    Large ones go one by one: together, what the CNN makes of them leaves a CPU's caches. ``whole``
    groups go together, as a GPU wants them.
    """
    looks = []
    for group in groups:
        height, width = group.size
        count = len(group.pixels)
        if not whole:
            count = max(1, CPU_PIXELS // (height * width))
        looks.append([policy.features(images) for images in torch.split(group.pixels, count)])
    return looks


@torch.no_grad()
def scores_of(policy: Policy, features: Seen) -> list[Tensor]:
    """Homogeneity of each superpatch in 0..1, ``(B, H // s, W // s)`` per size."""
    return [score.float().sigmoid() for score in policy.score(features)]


def homogeneity(policy: Policy, looks: Looks) -> list[Tensor]:
    """:func:`scores_of` all pictures of a size.

    Raises:
        TokenstepError: the scores are not finite; they would pass for "merge nothing".
    """
    scores = _joined(policy, looks)
    require_finite(bool(are_finite(scores)))
    return scores


def are_finite(scores: Sequence[Tensor]) -> Tensor:
    """Whether all scores are, as ``()`` bool where they lie."""
    # One NaN makes a sum one.
    return torch.stack([score.sum() for score in scores]).isfinite().all()


def require_finite(finite: bool) -> None:
    """Refuse scores that are not.

    Raises:
        TokenstepError: says what to do.
    """
    if not finite:
        raise TokenstepError("the policy produced NaN scores: run it in fp32, or check its weights")


def partition_by(
    policy: Policy, groups: Sequence[SameSize], looks: Sequence[Looks], plan: Plan | None
) -> tuple[Tensor, Tensor | None]:
    """The partition ``(B, H, W)`` that ``plan`` makes of the scores, and whether these are finite.

    The second, ``()`` bool, waits on the device, since to read it is a trip to the host. Without a
    plan nothing merges, ``looks`` are not read, and there is nothing to say of scores.
    """
    grids = [grid_of(size, policy.patch) for size in sizes_of(groups)]
    partition = uniform(grids, groups[0].pixels.device)
    if plan is None:
        return partition, None
    finite = []
    for group, own in zip(groups, looks, strict=True):
        scores = _joined(policy, own)
        finite.append(are_finite(scores))
        if len(groups) == 1:
            return plan(scores, partition), finite[0]
        height, width = own[0].grid
        places = torch.tensor(group.places, device=partition.device)
        partition[places, :height, :width] = plan(scores, partition[places, :height, :width])
    return partition, torch.stack(finite).all()


@torch.no_grad()
def features_on_grids(policy: Policy, looks: Sequence[Looks]) -> list[Tensor]:
    """Features ``(n, channels, H, W)`` of the pictures of each size."""
    return [_cat([policy.on_grid(one) for one in own]) for own in looks]


def _joined(policy: Policy, looks: Looks) -> list[Tensor]:
    every = [scores_of(policy, one) for one in looks]
    return [_cat(parts) for parts in zip(*every, strict=True)]


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
