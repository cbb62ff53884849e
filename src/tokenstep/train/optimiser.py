"""The optimiser of a phase and its schedule: which parameters learn how fast."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from tokenstep.train.recipe import Phase

# Position and prefix tables: no matrices that map one thing to another, so they do not decay.
TABLES = ("pos_embed", "cls_token", "reg_token")


def optimise(
    parameters: Iterable[tuple[str, nn.Parameter]],
    phase: Phase,
    heads: tuple[str, ...],
    below: Callable[[str], int] = lambda name: 0,
) -> tuple[torch.optim.Optimizer, SequentialLR]:
    """AdamW or Muon over named parameters, with warm-up and cosine decay.

    Norms, biases and position tables are not decayed. ``heads`` are the starts of the names that
    learn at the heads' rate; ``below`` says how many layers a parameter of the others lies below
    the last one, which lowers its rate by ``layer_decay`` each.
    """
    muon = phase.optimizer == "muon"
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith(TABLES)
            head = name.startswith(heads)
            decay = 0.0 if plain else phase.weight_decay
            lr = phase.lr * (phase.head_lr if head else phase.layer_decay ** below(name))
            turned = muon and not (plain or head)
            groups.setdefault((lr, decay, turned), []).append(parameter)
    parts: list[dict[str, Any]] = [
        {"params": members, "lr": lr, "weight_decay": decay}
        | ({"orthogonal": turned} if muon else {})
        for (lr, decay, turned), members in groups.items()
    ]
    optimizer = Muon(parts) if muon else torch.optim.AdamW(parts)
    warmup = max(1, phase.warmup)
    rise = LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    least = min(phase.lr / 100, *(lr for lr, _, _ in groups))  # so that no rate rises to it
    fall = CosineAnnealingLR(optimizer, max(1, phase.steps - warmup), eta_min=least)
    return optimizer, SequentialLR(optimizer, [rise, fall], milestones=[warmup])


class Muon(torch.optim.AdamW):
    """AdamW whose groups marked ``orthogonal`` step along their orthogonalised momentum (Muon).

    K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024, its steps
    scaled to AdamW's as in arXiv 2502.16982. Those of timm and torch work in bf16 whatever the
    device, which took three quarters of a training step on a CPU without bf16 arithmetic.
    """

    momentum = 0.95

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, betas=(0.9, 0.95))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step once; ``closure`` computes the loss and the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["orthogonal"]:
                for parameter in group["params"]:
                    self._turn(parameter, group["lr"], group["weight_decay"])
        super().step()
        return loss

    def _turn(self, parameter: Tensor, lr: float, decay: float) -> None:
        if parameter.grad is None:
            return
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # unused; AdamW wants one in every state that it loads
        momentum: Tensor = state["momentum"].lerp_(parameter.grad, 1 - self.momentum)
        matrix = momentum.flatten(1)
        # A matrix with orthonormal rows has entries of this size; AdamW's steps are near 0.2.
        scale = 0.2 * max(matrix.shape) ** 0.5
        parameter.mul_(1 - lr * decay)
        parameter.add_(orthogonalised(matrix).view_as(parameter), alpha=-lr * scale)
        parameter.grad = None  # so that AdamW passes it by


# Of Newton-Schulz steps that drive singular values to 1 fast (J. You's, as in timm and NanoGPT).
STEPS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalised(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix to ``matrix (m, n)``, roughly: all singular values about 1."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide / wide.norm().clamp(min=1e-7)
    for a, b, c in STEPS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix else x.T
