"""Rotary positions of supertokens, as timm's and transformers' ViTs have them (arXiv 2104.09864).

An angle grows evenly along an axis, so the mean over a supertoken's patches is the angle at the
mean of their places. That it is turned by just this angle is ours.
"""

import math

import torch
from torch import Tensor

from tokenstep.core.tokens import PackedTokens

FULL_TURN = 2 * math.pi


def centred(tokens: PackedTokens) -> Tensor:
    """Places of rows from -1 to 1 across their picture, ``(T, 2)`` fp32 (DINOv3)."""
    return 2 * tokens.middles() / tokens.sides() - 1


def turns(places: Tensor, bands: Tensor, is_prefix: Tensor, *, halves: bool) -> Tensor:
    """Sine and cosine, ``(T, 1, 2 * d)``, of ``places (T, 2)`` by ``bands (d / 4,)`` of angles.

    The angles of the two axes lie side by side. They are those of the first half of a head's
    channels and of the second alike (``halves``), or of each pair of channels. Prefix rows, in the
    mask ``is_prefix (T,)``, are not turned.
    """
    # (T, 2, d / 4) -> (T, d / 2)
    angle = (places.unsqueeze(-1) * bands.to(places.dtype)).flatten(1)
    angle = torch.where(is_prefix.unsqueeze(1), 0.0, angle)
    angle = torch.cat([angle, angle], dim=1) if halves else angle.repeat_interleave(2, dim=1)
    return torch.cat([angle.sin(), angle.cos()], dim=1).unsqueeze(1)


def turned(x: Tensor, rotary: Tensor | None, *, halves: bool) -> Tensor:
    """Queries or keys ``x (T, heads, d)`` turned by :func:`turns`; as they are without."""
    if rotary is None:
        return x
    sine, cosine = rotary.chunk(2, dim=-1)
    if halves:
        first, second = x.chunk(2, dim=-1)
        crossed = torch.cat([-second, first], dim=-1)
    else:
        crossed = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cosine + crossed * sine).to(x.dtype)
