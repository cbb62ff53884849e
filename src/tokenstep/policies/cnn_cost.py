"""The compute of a CNN as a formula of the size of its pictures.

The policy's CNN reads whole strides, ``a`` down and ``b`` across. Then the sides of every layer's
map are linear in ``a`` and in ``b``: a convolution of stride 2 halves them, one without padding
takes off a constant, and a squeeze-excite layer sees a map of 1x1 at any size. A layer costs its
weights times the area of its map, so all of them cost ``constant + rows a + columns b + area a b``.
Four small pictures give the four numbers exactly.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

FEW, MORE = 3, 4  # strides a side of the four pictures: enough for layers without padding
CHECKS = ((6, 3), (5, 7))  # what is not linear in the sides shows on these


@dataclass(frozen=True, slots=True)
class Growth:
    """Multiply-adds that grow with the picture."""

    constant: int
    rows: int
    columns: int
    area: int

    def at(self, strides: tuple[int, int]) -> int:
        """Multiply-adds on a picture of so many strides down and across."""
        rows, columns = strides
        return (
            self.constant + self.rows * rows + self.columns * columns + self.area * rows * columns
        )


def growth_of(cnn: nn.Module, stride: int) -> Growth | None:
    """How the multiply-adds of ``cnn`` grow on ``(1, 3, stride * a, stride * b)``, in eval mode.

    None if they grow in another way: attention between all places of a map.
    """
    least, across, down, both = (
        count_at(cnn, stride, (rows, columns)) for rows in (FEW, MORE) for columns in (FEW, MORE)
    )
    area = both - across - down + least
    rows, columns = (grown - least - FEW * area for grown in (down, across))
    growth = Growth(least - FEW * (rows + columns) - FEW**2 * area, rows, columns, area)
    fits = all(growth.at(strides) == count_at(cnn, stride, strides) for strides in CHECKS)
    return growth if fits else None


def count_at(cnn: nn.Module, stride: int, strides: tuple[int, int]) -> int:
    """Multiply-adds of ``cnn`` on a picture of so many strides down and across, in eval mode."""
    # A copy, so that neither the norms' statistics nor a call beside this one notice.
    tried = copy.deepcopy(cnn).eval()
    rows, columns = strides
    zeros = next(tried.parameters()).new_zeros(1, 3, rows * stride, columns * stride)
    return count_macs(tried, zeros)


def count_macs(module: Callable[[Tensor], object], x: Tensor) -> int:
    """Multiply-adds of a forward pass by torch's counter, which counts two per multiply-add."""
    # Not every release has a formula for fused attention; what has none would count as nothing.
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        module(x)
    return int(counter.get_total_flops()) // 2
