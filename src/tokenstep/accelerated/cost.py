"""Compute of somebody else's model: all of it as it is, and its blocks on fewer tokens."""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenstep.accelerated.accelerate import vit_of
from tokenstep.accelerated.hf import host_of
from tokenstep.core.partition import grid_of
from tokenstep.hosts.base import BlockSettings
from tokenstep.hosts.hf_vit import EOMT
from tokenstep.model.cost import GIGA, Cost, asked_macs
from tokenstep.model.encoder import Encoder
from tokenstep.model.segmented import Encoded
from tokenstep.policies.base import Policy


class ForeignCosts:
    """Counts the compute of pictures by a model of transformers; see :mod:`tokenstep.model.cost`.

    What lies beside its blocks (embedding, heads) is counted once for a size, by torch's counter
    on a copy without weights, and stands under ``decoder``: it does not shrink with the tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.vit = vit_of(model)
        self.host = host_of(self.vit)
        self.blocks = Encoder(self.host, BlockSettings()).host_blocks()
        self._beside: dict[tuple[int, int], float] = {}

    def dense(self, size: tuple[int, int]) -> Cost:
        """Compute of normalised pixels of ``size`` (h, w), nothing reduced."""
        return self._cost(size, [(rows, rows) for rows in self._rows(size)])

    def of(self, encoded: Encoded, index: int, policy: Policy | None) -> Cost:
        """Compute of picture ``index`` of a batch, from the rows that each block really saw."""
        trace, size = encoded.trace, encoded.sizes[index]
        halves = zip(trace.attention, trace.mlp, strict=True)
        _, reducers = asked_macs(trace, index, self.blocks, dim=self.host.dim)
        return self._cost(
            size,
            [(before[index], left[index]) for before, left in halves],
            policy=policy.macs(size) if policy is not None and encoded.scored else 0,
            reducers=reducers,
        )

    def _cost(
        self,
        size: tuple[int, int],
        rows: list[tuple[int, int]],
        *,
        policy: int = 0,
        reducers: int = 0,
    ) -> Cost:
        if size not in self._beside:
            full = [(count, count) for count in self._rows(size)]
            self._beside[size] = macs_of(self.model, size) / GIGA - self._of_blocks(full)
        return Cost(
            policy=policy / GIGA,
            embed=0.0,
            blocks=self._of_blocks(rows),
            exits=0.0,
            decoder=self._beside[size],
            reducers=reducers / GIGA,
        )

    def _of_blocks(self, rows: list[tuple[int, int]]) -> float:
        pairs = zip(self.blocks, rows, strict=True)
        return sum(block.macs(*counts, size_bias=False) for block, counts in pairs) / GIGA

    def _rows(self, size: tuple[int, int]) -> list[int]:
        """Rows that enter each block where nothing is reduced; an EoMT's queries join late."""
        height, width = grid_of(size, self.host.patch)
        rows = [height * width + self.host.prefix] * len(self.blocks)
        if isinstance(self.vit, EOMT):
            config: Any = self.vit.config
            late = len(rows) - config.num_blocks
            rows[late:] = [count + config.num_queries for count in rows[late:]]
        return rows


@torch.no_grad()
def macs_of(model: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-adds of a forward of normalised pixels of ``size`` (h, w), without doing them."""
    whole: Any = model
    with torch.device("meta"):
        twin: Any = type(whole)(copy.deepcopy(whole.config)).eval()
        pixels = torch.empty(1, 3, *size)
    twin.float()  # a config may ask for another precision than its parts take alone
    if isinstance(model, EOMT):  # by its values it decides what to run
        twin.attn_mask_probs = whole.attn_mask_probs.detach().cpu()
    counter = FlopCounterMode(display=False)
    with counter:
        twin(pixel_values=pixels)
    return int(counter.get_total_flops()) // 2
