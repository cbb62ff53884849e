"""A policy over a batch of pictures of any sizes: its CNN, scores, partition and features.

Pictures of one size go through the CNN together; a picture padded to another's size would be seen
differently at its border. The policy is never trained through here: nothing has a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenstep.core.partition import Grid, Plan, grid_of, uniform
from tokenstep.errors import TokenstepError
from tokenstep.policies.base import Policy, Seen

CPU_PIXELS = 3 * 2**19  # pixels that the CNN takes together on a CPU


@dataclass(frozen=True, slots=True)
class SameSize:
    """Pictures of one size that went through the CNN together."""

    places: list[int]  # of the pictures in the batch
    features: Seen


@torch.no_grad()
def policy_features(policy: Policy, normal: Sequence[Tensor]) -> list[SameSize]:
    """Run the CNN on normalised pictures, each ``(3, h, w)``."""
    groups = []
    for places in _together(normal):
        alike = [normal[place][None] for place in places]
        # A copy of large pictures costs what a small convolution does.
        images = alike[0] if len(alike) == 1 else torch.cat(alike)
        groups.append(SameSize(places, policy.features(images)))
    return groups


def _together(normal: Sequence[Tensor]) -> list[list[int]]:
    """Places of the pictures that go through the CNN at a time.

    On a CPU large ones go one by one: together, what the CNN makes of them leaves the caches.
    """
    alike: dict[torch.Size, list[int]] = {}
    for place, picture in enumerate(normal):
        alike.setdefault(picture.shape, []).append(place)
    if normal[0].device.type != "cpu":
        return list(alike.values())
    turns = []
    for (_, height, width), places in alike.items():
        count = max(1, CPU_PIXELS // (height * width))
        turns += [places[first : first + count] for first in range(0, len(places), count)]
    return turns


@torch.no_grad()
def homogeneity(policy: Policy, features: Seen) -> list[Tensor]:
    """Homogeneity of each superpatch in 0..1, ``(B, H // s, W // s)`` per size.

    Raises:
        TokenstepError: the scores are not finite; they would pass for "merge nothing".
    """
    scores = [score.float().sigmoid() for score in policy.score(features)]
    if not torch.stack([score.isfinite().all() for score in scores]).all():
        raise TokenstepError("the policy produced NaN scores: run it in fp32, or check its weights")
    return scores


def partition_by(
    policy: Policy, normal: Sequence[Tensor], groups: Sequence[SameSize], plan: Plan | None
) -> Tensor:
    """The partition ``(B, H, W)`` of normalised pictures that ``plan`` makes of their scores.

    Without a plan nothing merges and ``groups`` are not read.
    """
    grids = [grid_of(picture.shape[-2:], policy.patch) for picture in normal]
    partition = uniform(grids, normal[0].device)
    if plan is None:
        return partition
    for group in groups:
        height, width = group.features.grid
        scores = homogeneity(policy, group.features)
        empty = partition[group.places, :height, :width]
        partition[group.places, :height, :width] = plan(scores, empty)
    return partition


@torch.no_grad()
def features_on_grids(policy: Policy, groups: Sequence[SameSize]) -> dict[Grid, Tensor]:
    """Features ``(n, channels, H, W)`` of the pictures of each grid, in their order."""
    found = {}
    for grid in dict.fromkeys(group.features.grid for group in groups):
        alike = [group for group in groups if group.features.grid == grid]
        if len(alike) == 1:
            found[grid] = policy.on_grid(alike[0].features)
            continue
        order = sorted(place for group in alike for place in group.places)
        # Channels last in memory: a cell's features side by side.
        shape = (len(order), *grid, policy.channels)
        for group in alike:
            maps = policy.on_grid(group.features)
            if grid not in found:
                found[grid] = maps.new_empty(shape).movedim(-1, 1)
            found[grid][[order.index(place) for place in group.places]] = maps
    return found
