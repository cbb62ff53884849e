"""Pictures of one size go through the pipeline together, stacked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SameSize:
    """Pictures of a batch that have one size, in their order."""

    places: tuple[int, ...]  # of the pictures in the batch
    pixels: Tensor  # (n, 3, h, w), or (n, h, w) of label maps

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


def stacked(pictures: Tensor | Sequence[Tensor]) -> list[SameSize]:
    """Stack pictures ``(3, h, w)`` of one size and dtype; ``(B, 3, h, w)`` is a stack already."""
    if isinstance(pictures, Tensor):
        return [SameSize(tuple(range(len(pictures))), pictures)]
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for place, picture in enumerate(pictures):
        alike.setdefault((picture.shape, picture.dtype), []).append(place)
    return [
        # A copy of large pictures costs what a small convolution does.
        SameSize(tuple(places), torch.stack([pictures[place] for place in places]))
        if len(places) > 1
        else SameSize(tuple(places), pictures[places[0]].unsqueeze(0))
        for places in alike.values()
    ]


def sizes_of(groups: Sequence[SameSize]) -> list[tuple[int, int]]:
    """Size (h, w) of each picture of a batch, in their order."""
    return in_order(groups, ([group.size] * len(group.places) for group in groups))


def in_order(groups: Sequence[SameSize], stacks: Iterable[Iterable[T]]) -> list[T]:
    """What ``stacks`` hold of the pictures of each group, in the order of the batch."""
    found = {
        place: one
        for group, stack in zip(groups, stacks, strict=True)
        for place, one in zip(group.places, stack, strict=True)
    }
    return [found[place] for place in range(len(found))]


def rows_at(values: Tensor, places: Sequence[int]) -> Tensor:
    """``values (B, ...)`` of the pictures at ``places``: as they are where these are all."""
    if len(places) == len(values):
        return values
    return values[torch.tensor(places, device=values.device)]
