"""Pictures in memory: arrays and tensors of the forms that users have, as `(3, h, w)` tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokenstep.errors import TokenstepError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_VALUES = "give uint8 in 0..255 or float in 0..1"


def array_as_image(array: NDArray[Any]) -> Image.Image | None:
    """Grey, grey with alpha and RGBA integers as the PIL image that they are; None: no such array.

    They are `(h, w)` uint8 or uint16, or `(h, w, 1)`, `(h, w, 2)` or `(h, w, 4)` uint8.
    """
    flat = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    grey = flat.ndim == 2 and flat.dtype in (np.uint8, np.uint16)
    layers = flat.ndim == 3 and flat.shape[2] in (2, 4) and flat.dtype == np.uint8
    if not (grey or layers) or flat.size == 0:
        return None
    return Image.fromarray(np.ascontiguousarray(flat, flat.dtype.newbyteorder("=")))


def from_array(array: NDArray[Any]) -> Tensor:
    """An RGB array `(h, w, 3)` uint8, or floats in 0..1 of it, of grey or of RGBA, as a tensor.

    Raises `TokenstepError` if the array has another form, no pixels, or values out of range.
    """
    what = f"an array of {array.shape} {array.dtype}"
    if array.ndim == 4:
        raise TokenstepError(f"{what}: is a batch; give a list of pictures, as list(array)")
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] > 4:
        raise TokenstepError(f"{what}: channels go last; give array.transpose(1, 2, 0)")
    floats = array.dtype.kind == "f" and array.dtype.itemsize <= 8
    if not floats and array.dtype != np.uint8:
        raise TokenstepError(f"{what}: {_VALUES}")
    bands = array.shape[2] if array.ndim == 3 else 1
    known = array.ndim in (2, 3) and (bands in (1, 2, 3, 4) if floats else bands == 3)
    if not known or array.size == 0:
        forms = "a picture is (h, w), (h, w, 3) or (h, w, 4)"
        raise TokenstepError(f"{what}: {forms}, h and w at least 1")
    # A copy, since torch takes neither negative strides nor memory that it may not write to.
    copy = np.array(array, array.dtype.newbyteorder("="), order="C")
    tensor = torch.from_numpy(copy.reshape(*array.shape[:2], bands)).permute(2, 0, 1)
    if bands == 3 and not floats:
        return tensor
    _require_range(tensor, what)
    if bands in (2, 4):  # transparency lies over white, as in files
        alpha = tensor[-1:]
        tensor = tensor[:-1] * alpha + (1 - alpha)
    return tensor.expand(3, -1, -1)


def from_tensor(tensor: Tensor) -> Tensor:
    """A tensor `(3, h, w)`, uint8 or float in 0..1, as it is; raises as `from_array` does."""
    what = f"a tensor of {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.ndim == 4:
        raise TokenstepError(f"{what}: is a batch; give a list of pictures, as list(tensor)")
    if tensor.ndim != 3 or tensor.shape[0] != 3 or tensor.numel() == 0:
        raise TokenstepError(f"{what}: a picture is (3, h, w), h and w at least 1")
    if tensor.dtype == torch.uint8:
        return tensor
    if tensor.dtype not in _FLOATS:
        raise TokenstepError(f"{what}: {_VALUES}")
    _require_range(tensor, what)
    return tensor


def _require_range(tensor: Tensor, what: str) -> None:
    low, high = torch.stack(tensor.aminmax()).tolist()
    # So much may a resize's rounding err. NaN is within no bounds.
    if not -1e-3 <= low <= high <= 1 + 1e-3:
        raise TokenstepError(f"{what} has values {low:g} to {high:g}: give uint8 or float in 0..1")
