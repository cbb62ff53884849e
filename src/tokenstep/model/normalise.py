"""Pictures in 0..1 or bytes -> what a network reads: mean 0 and standard deviation 1, about."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tokenstep.core.same_size import SameSize, stacked
from tokenstep.data.augment import normalise


class Normalise(nn.Module):
    """Subtract the mean and divide by the standard deviation, both of each channel in 0..1."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor | Sequence[Tensor]) -> list[SameSize]:
        """Normalise ``(B, 3, h, w)`` or a list of ``(3, h, w)``, uint8 or float in 0..1.

        Those of one size are stacked, and moved to where the model is: as bytes, if they are
        bytes, a quarter of what floats are.
        """
        mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
        return [
            SameSize(group.places, normalise(group.pixels.to(mean.device), mean, std))
            for group in stacked(pictures)
        ]
