"""What is measured: one confusion matrix per data set, and how far boundaries hold."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenstep.data.labelled_folder import IGNORE
from tokenstep.errors import TokenstepError


@dataclass(frozen=True)
class Scores:
    """Quality on a data set, all 0 to 1; None where nothing of the kind ever occurs.

    ``boundary_iou`` is the inter-class boundary IoU that :class:`Tally` defines.
    """

    miou: float
    iou: tuple[float | None, ...]
    accuracy: float
    boundary_iou: float | None


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Pixels of each true class (rows) that were given each class, ``(C, C)`` int64.

    Both maps have one shape; ignored pixels are left out.
    """
    valid = labels != IGNORE
    flat = labels[valid].long() * classes + predicted[valid].long()
    return torch.bincount(flat, minlength=classes * classes).view(classes, classes)


def iou_of(confusion: Tensor) -> Tensor:
    """Intersection over union per class ``(C,)`` float64; NaN where a class never occurs."""
    hit = confusion.diag().double()
    return hit / (confusion.sum(0) + confusion.sum(1) - confusion.diag())


def interior(labels: Tensor, distance: int) -> Tensor:
    """Mask of the pixels all of whose neighbours within ``distance`` have their own label.

    ``labels`` is ``(h, w)`` uint8; ignored pixels and what lies beyond the picture never differ.
    """
    high = labels.masked_fill(labels == IGNORE, 0)
    low = labels
    for axis in (0, 1):
        high = _over_window(torch.maximum, high, distance, axis, outside=0)
        low = _over_window(torch.minimum, low, distance, axis, outside=IGNORE)
    return high == low


def _over_window(
    extreme: Callable[[Tensor, Tensor], Tensor],
    values: Tensor,
    distance: int,
    axis: int,
    *,
    outside: int,
) -> Tensor:
    """``extreme`` of each value of ``(h, w)`` and its ``distance`` neighbours either way.

    Windows double until they are long enough, in bytes: on large pictures a hundred times as fast
    as pooling them.
    """
    padding = (0, 0, distance, distance) if axis == 0 else (distance, distance)
    values = F.pad(values, padding, value=outside)
    length, whole = 1, 2 * distance + 1
    while length < whole:
        step = min(length, whole - length)
        rest = values.shape[axis] - step
        values = extreme(values.narrow(axis, 0, rest), values.narrow(axis, step, rest))
        length += step
    return values


class Tally:
    """Sums over a data set, from which the scores follow.

    mIoU comes from one summed confusion matrix. The inter-class boundary IoU is a variant of
    Boundary IoU (arXiv 2103.16562). Of a label map, a class's band are its labelled pixels with a
    pixel of another class at most d rows and at most d columns away; d is 2 % of the picture's
    diagonal, rounded, at least 1. Of each class, the pixels in both bands, the prediction's and
    the truth's, are divided by those in either, both summed over the set; the score is the mean
    over the classes that have a band. In the paper a picture's border is a boundary too. Here it
    is none, nor is the border of an ignored region, and ignored pixels are in no band.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.shared = torch.zeros(classes, dtype=torch.int64)
        self.either = torch.zeros(classes, dtype=torch.int64)

    def add(self, predicted: Tensor, labels: Tensor) -> None:
        """Count one picture: two uint8 maps ``(h, w)`` on the CPU."""
        self.confusion += confusion_matrix(predicted, labels, self.classes)
        height, width = labels.shape
        distance = max(1, round(0.02 * (height**2 + width**2) ** 0.5))
        valid = labels != IGNORE
        bands = []
        for which in (predicted, labels):
            known = which.where(valid, IGNORE)
            bands.append(known.where(valid & ~interior(known, distance), self.classes))
        counts = [torch.bincount(band.flatten(), minlength=self.classes + 1) for band in bands]
        shared = torch.bincount(bands[0][bands[0] == bands[1]], minlength=self.classes + 1)
        self.shared += shared[:-1]
        self.either += (counts[0] + counts[1] - shared)[:-1]

    def scores(self) -> Scores:
        """The scores of all pictures so far.

        Raises:
            TokenstepError: no pixel has a label.
        """
        if not self.confusion.any():
            raise TokenstepError(f"no pixel of the data has a label: all are {IGNORE} (ignored)")
        iou = iou_of(self.confusion)
        boundary = self.shared.double() / self.either
        return Scores(
            miou=float(iou.nanmean()),
            iou=tuple(None if bool(value.isnan()) else float(value) for value in iou),
            accuracy=float(self.confusion.diag().sum() / self.confusion.sum()),
            boundary_iou=None if bool(boundary.isnan().all()) else float(boundary.nanmean()),
        )
