"""Two ways from pictures to tokens and from logits to pixels: one for CPUs, one for GPUs.

Both compute the same. ``windows`` touches only what stays, in steps as small as a CPU's caches;
``grid`` does everything everywhere, in as few operations as it can.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenstep.core.same_size import SameSize
from tokenstep.model import grid, squares, windows
from tokenstep.model.segmented import Segmented
from tokenstep.model.superpatches import Stem, Superpatches

Dataflow = Literal["auto", "grid", "windows"]


@dataclass(frozen=True, slots=True)
class Flow:
    """The two halves of a dataflow."""

    embed: Callable[[Stem, Tensor, Superpatches, Tensor | None], Tensor]
    class_maps: Callable[[Segmented], list[SameSize]]
    whole: bool  # the policy and the exits take all at once; else as much as the caches hold


DATAFLOWS: dict[str, Flow] = {
    "windows": Flow(windows.embed, squares.class_maps, whole=False),
    "grid": Flow(grid.embed, grid.class_maps, whole=True),
}


def flow_for(chosen: Dataflow, device: torch.device) -> str:
    """The name of the dataflow that ``auto`` stands for on a device; any other stays.

    Raises:
        ValueError: there is no such dataflow.
    """
    if chosen == "auto":
        return "windows" if device.type == "cpu" else "grid"
    if chosen not in DATAFLOWS:
        raise ValueError(f"unknown dataflow {chosen!r}, choose from auto, {', '.join(DATAFLOWS)}")
    return chosen
