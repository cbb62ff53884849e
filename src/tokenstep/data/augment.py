"""Joint augmentation of a picture and its label map; normalising is the model's own business."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from tokenstep.data.labelled_folder import IGNORE
from tokenstep.errors import TokenstepError

_GREY = 0.5  # what lies beside a picture that is smaller than the crop


def to_float(image: Tensor) -> Tensor:
    """A uint8 picture as float32, 0 to 1, of the same shape."""
    scaled: Tensor = tvf.to_dtype(image, torch.float32, scale=True)
    return scaled


def normalise(picture: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract ``mean`` and divide by ``std``, both ``(3, 1, 1)``, at the scale of 0 to 1.

    ``picture (..., 3, h, w)`` is uint8, or float in 0..1; the result has the dtype of ``mean``.
    """
    scaled = to_float(picture).to(mean.dtype)
    # The caller's own floats stay as they are.
    centred = scaled.sub_(mean) if picture.dtype == torch.uint8 else scaled - mean
    return centred.div_(std)


class TrainTransform:
    """Random scale, place, flip and colour: any picture becomes one crop of a fixed size.

    `crop` is (height, width). The picture is scaled by a factor drawn from `scale`, evenly in its
    logarithm, and cut at random; where it is smaller than the crop, it is placed at random on
    grey with label `IGNORE`. `rotate` adds quarter turns, for pictures without an up. `colour`
    is the strength of brightness, contrast and saturation jitter (a quarter of it for hue), 0 to
    2. Draws from torch's global generator. Raises `TokenstepError` for settings out of range.
    """

    def __init__(
        self,
        crop: tuple[int, int],
        *,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: bool = True,
        colour: float = 0.4,
        rotate: bool = False,
    ) -> None:
        if min(crop) < 1:
            raise TokenstepError(f"crop is {crop}; give a height and a width of 1 or more pixels")
        if not 0 < scale[0] <= scale[1]:
            raise TokenstepError(f"scale is {scale}; give a lower and an upper factor above 0")
        if not 0 <= colour <= 2:
            raise TokenstepError(f"colour is {colour}; give a strength from 0 to 2")
        self.crop = crop
        self.scale = scale
        self.flip = flip
        self.rotate = rotate
        self.jitter = v2.ColorJitter(colour, colour, colour, colour / 4) if colour else None

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Turn (3, h, w) uint8 and (h, w) uint8 into (3, *crop) float32 0..1 and (*crop) int64."""
        turns = int(torch.randint(4, ())) if self.rotate else 0
        mirror = self.flip and bool(torch.rand(()) < 0.5)
        # The crop is turned afterwards, so an odd number of turns cuts the crop lying down.
        size = self.crop if turns % 2 == 0 else self.crop[::-1]
        picture, target = self._cut(image, label, size)
        if turns:
            picture, target = picture.rot90(turns, (-2, -1)), target.rot90(turns, (-2, -1))
        if mirror:
            picture, target = picture.flip(-1), target.flip(-1)
        return picture.contiguous(), target.contiguous()

    def _cut(self, image: Tensor, label: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Cut a random window and scale it to `size`; only the pixels in the window are touched."""
        low, high = math.log(self.scale[0]), math.log(self.scale[1])
        factor = math.exp(low + (high - low) * float(torch.rand(())))
        source_y, target_y = _place(label.shape[0], size[0], factor)
        source_x, target_x = _place(label.shape[1], size[1], factor)
        shape = [target_y.stop - target_y.start, target_x.stop - target_x.start]

        # torch 2.15's antialiased kernels fill an output of width 1 with wrong pixels.
        smooth = shape[1] > 1
        region = to_float(tvf.resize(image[:, source_y, source_x], shape, antialias=smooth))
        region = self.jitter(region) if self.jitter else region
        picture = torch.full((3, *size), _GREY)
        picture[:, target_y, target_x] = region

        classes = label[None, source_y, source_x]
        nearest = v2.InterpolationMode.NEAREST_EXACT  # shares the pixel centres of bilinear
        target = torch.full(size, IGNORE)
        target[target_y, target_x] = tvf.resize(classes, shape, interpolation=nearest)[0].long()
        return picture, target


def _place(length: int, crop: int, factor: float) -> tuple[slice, slice]:
    """Along one axis, draw which part of the source comes to lie on which part of the crop."""
    window = max(round(crop / factor), 1)  # the crop's extent in source pixels
    slack = length - window  # negative: the source lies somewhere inside the crop
    start = int(torch.randint(min(slack, 0), max(slack, 0) + 1, ()))
    source = slice(max(start, 0), min(start + window, length))
    first = min(round((source.start - start) * crop / window), crop - 1)
    last = max(round((source.stop - start) * crop / window), first + 1)
    return source, slice(first, last)
