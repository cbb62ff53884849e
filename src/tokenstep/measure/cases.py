"""The pictures that are timed: of one size, others in each batch, from memory or files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from tokenstep.data.pictures import read_picture, to_tensor
from tokenstep.errors import TokenstepError

NOISE = 0.5  # correlation of neighbouring pixels below which a picture is noise

Load = Callable[[], list[Tensor]]  # fetches a batch


@dataclass(frozen=True)
class Case:
    """What is timed at a time: ``batch`` pictures of ``size`` (h, w) in pixels."""

    size: tuple[int, int]
    batch: int


def fitting(paths: Sequence[Path], case: Case) -> tuple[list[Path], list[Tensor]]:
    """The files that are large enough for a case, and their pictures at its size.

    Raises:
        TokenstepError: they are fewer than a batch holds, or one cannot be read.
    """
    fitted = [(path, fit(to_tensor(read_picture(path)), case.size)) for path in paths]
    large = [(path, picture) for path, picture in fitted if picture is not None]
    if len(large) < case.batch:
        height, width = case.size
        raise TokenstepError(
            f"{width}x{height}: {len(large)} of {len(paths)} pictures are that large, a batch of "
            f"{case.batch} needs {case.batch}: give more or larger ones, what is scaled up has no "
            "detail"
        )
    return [path for path, _ in large], [picture for _, picture in large]


def fit(picture: Tensor, size: tuple[int, int]) -> Tensor | None:
    """Cut the middle of ``picture (3, h, w)`` in the shape of ``size`` and scale it down to it.

    It is None where the picture would have to be scaled up.
    """
    factor = min(picture.shape[1] / size[0], picture.shape[2] / size[1])
    if factor < 1:
        return None
    cut = tvf.center_crop(picture, [round(side * factor) for side in size])
    scaled: Tensor = tvf.resize(cut, list(size), antialias=True)
    return scaled


def is_noise(picture: Tensor) -> bool:
    """Whether neighbouring pixels of ``picture (3, h, w)`` hardly correlate."""
    grey = picture.float().mean(0)
    left, right = grey[:, :-1].flatten(), grey[:, 1:].flatten()
    if len(left) < 2 or min(float(left.std()), float(right.std())) == 0:
        return False  # one colour is no noise
    return float(torch.corrcoef(torch.stack([left, right]))[0, 1]) < NOISE


def batches_of(
    files: Sequence[Path], pictures: Sequence[Tensor], case: Case, scope: str
) -> Iterator[Load]:
    """Batches of different pictures without end, from memory or, for "end_to_end", from files."""

    def from_file(index: int) -> Tensor:
        picture = fit(to_tensor(read_picture(files[index])), case.size)
        if picture is None:
            raise TokenstepError(f"{files[index]}: has become smaller while it was timed")
        return picture

    get = pictures.__getitem__ if scope == "model" else from_file
    for number in count():
        first = number * case.batch
        indices = [(first + offset) % len(files) for offset in range(case.batch)]
        yield lambda indices=indices: [get(index) for index in indices]  # type: ignore[misc]
