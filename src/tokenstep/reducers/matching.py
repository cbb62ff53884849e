"""Which tokens of a picture are alike: what merging methods have in common."""

import torch
import torch.nn.functional as F
from torch import Tensor

_BAND = 2**24  # similarities at a time


def directions(x: Tensor) -> Tensor:
    """Rows ``(n, d)`` as fp32 vectors of length 1, whose products are cosines."""
    return F.normalize(x.float(), dim=-1)


def two_halves(alike: Tensor, speaks: Tensor) -> Tensor:
    """Similarities of the rows 0, 2, 4 ... with the rows 1, 3, 5 ..., with prefix rows ruled out.

    ``alike (n - n // 2, n // 2)`` comes back with -inf wherever one of the two is not in the mask
    ``speaks (n,)``.
    """
    pair = speaks[::2, None] & speaks[None, 1::2]
    return alike.masked_fill(~pair, -torch.inf)


def likest(alike: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` rows of ``alike (n, m)`` that are surest of their best column, and that column.

    Both are ``(count,)`` int64, fewer where no more rows have a column above -inf.
    """
    best, partner = alike.max(dim=1)
    rows = best.argsort(descending=True, stable=True)[:count]
    rows = rows[best[rows] > -torch.inf]
    return rows, partner[rows]


def nearest(unit: Tensor) -> Tensor:
    """For each of the vectors ``unit (n, d)`` the other one that is most alike, ``(n,)`` int64.

    It takes n products of n at a time in bands. Ties go to the earlier one; n is 2 or more.
    """
    found = []
    rows = max(1, _BAND // len(unit))
    for start in range(0, len(unit), rows):
        alike = unit[start : start + rows] @ unit.T
        own = torch.arange(len(alike), device=unit.device)
        alike[own, start + own] = -torch.inf
        found.append(alike.argmax(dim=1))
    return torch.cat(found)
