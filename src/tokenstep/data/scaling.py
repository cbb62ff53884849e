"""The scale that a picture is run at: the one way down to it, for files, pages and tensors."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenstep.errors import TokenstepError

# A long side in pixels, "auto" for the one that the model was trained at, None for no limit.
MaxSide = int | Literal["auto"] | None


def side_for(given: MaxSide, trained: int | None) -> int | None:
    """The long side that larger pictures are scaled down to; None: they stay as they are.

    ``trained`` is the model's :attr:`ModelConfig.long_side`.

    Raises:
        TokenstepError: ``given`` is none of its kinds.
    """
    if given is None:
        return None
    if isinstance(given, str) and given == "auto":
        return trained
    if isinstance(given, int | np.integer) and not isinstance(given, bool) and given >= 1:
        return int(given)
    kinds = 'give 1 or more pixels, None for the pictures as they are, or "auto"'
    raise TokenstepError(f"max_side is {given!r}: {kinds}")


def scaled_down(image: Image.Image, max_side: int | None) -> Image.Image:
    """The picture, scaled down if its long side is over ``max_side``."""
    size = _size(image.size, max_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def scaled_tensor(picture: Tensor, max_side: int | None) -> Tensor:
    """:func:`scaled_down` for a tensor ``(3, h, w)``: bytes as files are, floats as float32."""
    height, width = picture.shape[1:]
    size = _size((width, height), max_side)
    if size == (width, height):
        return picture
    pixels = picture.cpu()
    whole = pixels if pixels.dtype == torch.uint8 else pixels.float()
    bands = [Image.fromarray(band.numpy()) for band in whole]
    small = [np.array(band.resize(size, Image.Resampling.BILINEAR)) for band in bands]
    return torch.from_numpy(np.stack(small)).to(picture.device)


def _size(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    if max_side is None or max(size) <= max_side:
        return size
    factor = max_side / max(size)
    width, height = (max(1, round(side * factor)) for side in size)
    return width, height
