"""What leaves the device: all that is to be told of a batch, in one copy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenstep.core.same_size import in_order
from tokenstep.core.unmerge import ends_of_tokens
from tokenstep.model.label_map import are_finite, class_maps, require_finite
from tokenstep.model.segmented import CellMaps, Encoded, Segmented


def collected(segmented: Segmented) -> tuple[list[NDArray[np.uint8]], CellMaps]:
    """Label maps ``(h, w)`` of the pictures of a batch, and where their tokens went, on the host.

    Raises:
        TokenstepError: the logits are not finite.
    """
    stacks = class_maps(segmented)
    owner, end, level, finite, *labels = to_host(
        [*_cells(segmented), are_finite(segmented), *(stack.pixels for stack in stacks)]
    )
    require_finite(segmented, bool(finite))
    # Copies, not parts of the batch's memory.
    maps = [one.copy() for one in in_order(stacks, labels)]
    return maps, CellMaps(level, end, owner)


def cell_maps(encoded: Encoded) -> CellMaps:
    """Where the tokens of a batch went, on the host."""
    owner, end, level = to_host(_cells(encoded))
    return CellMaps(level, end, owner)


def _cells(encoded: Encoded) -> list[Tensor]:
    """Owner, twice the end, and level of each cell, ``(B, H, W)``."""
    ends = ends_of_tokens(encoded.tokens, len(encoded.live)).to(torch.int16)
    # The widest first, so that all lie as their type wants them.
    return [encoded.tokens.owner.to(torch.int32), ends[encoded.rows], encoded.partition]


def to_host(parts: Sequence[Tensor]) -> list[NDArray[Any]]:
    """The same as arrays, which share one piece of memory, by one copy from where they lie."""
    flat = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]).cpu().numpy()
    found, begin = [], 0
    for part in parts:
        end = begin + part.numel() * part.element_size()
        kind = np.dtype(str(part.dtype).removeprefix("torch."))
        found.append(flat[begin:end].view(kind).reshape(part.shape))
        begin = end
    return found
