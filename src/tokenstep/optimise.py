"""The optimiser of a phase and its schedule: which parameters learn how fast."""

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import Muon  # type: ignore[attr-defined]  # timm re-exports without saying so
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from tokenstep.recipes import Phase

# Position and prefix tables: no matrices that map one thing to another, so they do not decay.
TABLES = ("pos_embed", "cls_token", "reg_token")


def optimise(
    parameters: Iterable[tuple[str, nn.Parameter]], phase: Phase, heads: tuple[str, ...]
) -> tuple[torch.optim.Optimizer, SequentialLR]:
    """AdamW or Muon over named parameters, with warm-up and cosine decay.

    Norms, biases and position tables are not decayed. ``heads`` are the starts of the names that
    learn at the heads' rate.
    """
    muon = phase.optimizer == "muon"
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith(TABLES)
            head = name.startswith(heads)
            decay = 0.0 if plain else phase.weight_decay
            lr = phase.lr * (phase.head_lr if head else 1.0)
            aside = muon and (plain or head)  # what Muon leaves to AdamW
            groups.setdefault((lr, decay, aside), []).append(parameter)
    parts: list[dict[str, Any]] = [
        {"params": members, "lr": lr, "weight_decay": decay}
        | ({"use_fallback": aside} if muon else {})
        for (lr, decay, aside), members in groups.items()
    ]
    optimizer: torch.optim.Optimizer = Muon(parts) if muon else torch.optim.AdamW(parts)
    warmup = max(1, phase.warmup)
    rise = LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    fall = CosineAnnealingLR(optimizer, max(1, phase.steps - warmup), eta_min=phase.lr / 100)
    return optimizer, SequentialLR(optimizer, [rise, fall], milestones=[warmup])
