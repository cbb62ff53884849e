"""Scores of label maps: mIoU from one confusion matrix per data set, and boundary IoU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenstep.data.labelled_folder import IGNORE
from tokenstep.errors import TokenstepError


@dataclass(frozen=True)
class Scores:
    """Quality on a data set, all 0 to 1. A score is None where no pixel defines it.

    ``boundary_iou`` is the inter-class boundary IoU that :class:`Tally` defines.
    """

    miou: float
    iou: tuple[float | None, ...]
    accuracy: float
    boundary_iou: float | None


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count the pixels of each true class (rows) and predicted class: ``(C, C)`` int64.

    Both maps have one shape. Ignored pixels are left out.
    """
    valid = labels != IGNORE
    flat = labels[valid].long() * classes + predicted[valid].long()
    return torch.bincount(flat, minlength=classes * classes).view(classes, classes)


def iou_of(confusion: Tensor) -> Tensor:
    """Intersection over union per class ``(C,)`` float64; NaN where a class never occurs."""
    hit = confusion.diag().double()
    return hit / (confusion.sum(0) + confusion.sum(1) - confusion.diag())


def interior(labels: Tensor, distance: int) -> Tensor:
    """Mask of the pixels whose neighbours within ``distance`` all have the pixel's label.

    ``labels`` is ``(h, w)`` uint8. Ignored pixels and what lies beyond the picture never differ.
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

    Windows double until they are long enough. On large pictures that is a hundred times as fast
    as pooling them, since the values stay bytes.
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

    mIoU comes from one summed confusion matrix.

    The inter-class boundary IoU is a variant of Boundary IoU (arXiv 2103.16562). The band of a
    class in a label map is its labelled pixels with a pixel of another class at most d rows and
    at most d columns away. The distance d is 2 % of the picture's diagonal, rounded, at least 1.
    The IoU of a class is the pixels in both bands, the prediction's and the truth's, over the
    pixels in either, both summed over the set. The score is the mean over the classes that have
    a band. In the paper a picture's border is a boundary too. Here neither a picture's border nor
    that of an ignored region is one, and ignored pixels are in no band.
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
        for label_map in (predicted, labels):
            known = label_map.where(valid, IGNORE)
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
