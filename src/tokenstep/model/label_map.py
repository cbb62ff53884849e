"""Stage 6 of 6: logits of tokens -> the class of every pixel."""

import torch
from torch import Tensor

from tokenstep.core.same_size import SameSize, in_order
from tokenstep.errors import TokenstepError
from tokenstep.model.dataflow import DATAFLOWS
from tokenstep.model.segmented import Segmented
from tokenstep.policies import batch as policies


def label_maps(segmented: Segmented) -> list[Tensor]:
    """Class of every pixel of each picture, ``(h, w)`` uint8.

    Raises:
        TokenstepError: the logits are not finite.
    """
    require_finite(segmented, bool(are_finite(segmented)))
    stacks = class_maps(segmented)
    return in_order(stacks, (stack.pixels for stack in stacks))


def class_maps(segmented: Segmented) -> list[SameSize]:
    """:func:`label_maps` stacked by size, whatever the logits are: to ask is a trip to the host."""
    return DATAFLOWS[segmented.flow].class_maps(segmented)


def are_finite(segmented: Segmented) -> Tensor:
    """Whether all logits are, and scores that nobody looked at, as ``()`` bool where they lie."""
    # One NaN or infinity makes the sum one; a mask of all logits would cost memory.
    sums = [part.sum(dtype=torch.float64) for part in segmented.values]
    finite = torch.stack(sums).isfinite().all()
    return finite if segmented.finite is None else finite & segmented.finite


def require_finite(segmented: Segmented, finite: bool) -> None:
    """Refuse logits and scores that are not.

    Raises:
        TokenstepError: says what to do.
    """
    if not finite:
        if segmented.finite is not None:
            policies.require_finite(bool(segmented.finite))
        raise TokenstepError(
            "the model produced NaN or infinite logits: run it in fp32, or check its weights"
        )
