"""Stage 6 of 6: logits of tokens -> the class of every pixel."""

import torch
from torch import Tensor

from tokenstep.core.same_size import SameSize
from tokenstep.errors import TokenstepError
from tokenstep.model.dataflow import DATAFLOWS
from tokenstep.model.segmented import Segmented


def label_maps(segmented: Segmented) -> list[Tensor]:
    """Class of every pixel of each picture, ``(h, w)`` uint8.

    Raises:
        TokenstepError: the logits are not finite.
    """
    require_finite(bool(are_finite(segmented)))
    found = {
        place: labels
        for stack in class_maps(segmented)
        for place, labels in zip(stack.places, stack.pixels, strict=True)
    }
    return [found[place] for place in range(len(found))]


def class_maps(segmented: Segmented) -> list[SameSize]:
    """:func:`label_maps` stacked by size, whatever the logits are: to ask is a trip to the host."""
    return DATAFLOWS[segmented.flow].class_maps(segmented)


def are_finite(segmented: Segmented) -> Tensor:
    """Whether all logits are, as ``()`` bool where they lie."""
    # One NaN or infinity makes the sum one; a mask of all logits would cost memory.
    sums = [part.sum(dtype=torch.float64) for part in segmented.values]
    return torch.stack(sums).isfinite().all()


def require_finite(finite: bool) -> None:
    """Refuse logits that are not.

    Raises:
        TokenstepError: says what to do.
    """
    if not finite:
        raise TokenstepError(
            "the model produced NaN or infinite logits: run it in fp32, or check its weights"
        )
