import pytest
import torch
from torch import Tensor

from tokenstep.errors import TokenstepError
from tokenstep.measure.metrics import Tally, confusion_matrix, interior, iou_of

CLASSES = 3


def pictures(count: int = 3, ignored: bool = True) -> list[tuple[Tensor, Tensor]]:
    """Predictions and labels with blobs, of different sizes and classes."""
    drawn = []
    for index in range(count):
        height, width = 20 + 7 * index, 33 - 5 * index
        label = torch.zeros(height, width, dtype=torch.uint8)
        label[index * 3 : 12, 4:20] = 1
        if index % 2:
            label[8:, 10:] = 2
        predicted = label.roll(index + 1, 0).roll(-1, 1)
        if ignored:
            label[:3, :5] = label[-2:] = 255
        drawn.append((predicted.where(predicted != 255, 0), label))
    return drawn


def tally(drawn: list[tuple[Tensor, Tensor]]) -> Tally:
    sums = Tally(CLASSES)
    for predicted, label in drawn:
        sums.add(predicted, label)
    return sums


def naive_iou(drawn: list[tuple[Tensor, Tensor]], label: int) -> float:
    hit = either = 0
    for predicted, truth in drawn:
        valid = truth != 255
        one, other = (predicted == label) & valid, (truth == label) & valid
        hit += int((one & other).sum())
        either += int((one | other).sum())
    return hit / either


def test_miou_is_that_of_the_whole_set() -> None:
    drawn = pictures()
    scores = tally(drawn).scores()
    expected = [naive_iou(drawn, label) for label in range(CLASSES)]
    assert scores.iou == pytest.approx(expected)
    assert scores.miou == pytest.approx(sum(expected) / CLASSES)


def test_miou_is_not_the_mean_over_pictures() -> None:
    drawn = pictures()
    alone = [tally([one]).scores().miou for one in drawn]
    assert tally(drawn).scores().miou != pytest.approx(sum(alone) / len(alone), abs=1e-3)


def test_a_class_that_never_occurs_has_no_iou() -> None:
    labels = torch.zeros(4, 4, dtype=torch.uint8)
    scores = tally([(labels, labels)]).scores()
    assert scores.iou == (1.0, None, None)
    assert scores.miou == 1.0
    assert scores.boundary_iou is None
    assert scores.accuracy == 1.0


def test_a_class_that_is_only_predicted_counts_as_missed() -> None:
    labels = torch.zeros(4, 4, dtype=torch.uint8)
    predicted = labels.clone()
    predicted[0] = 1
    scores = tally([(predicted, labels)]).scores()
    assert scores.iou == (0.75, 0.0, None)
    assert scores.accuracy == 0.75


def test_rows_of_the_confusion_matrix_are_the_truth() -> None:
    predicted = torch.tensor([[0, 1], [1, 2]], dtype=torch.uint8)
    labels = torch.tensor([[0, 0], [1, 255]], dtype=torch.uint8)
    matrix = confusion_matrix(predicted, labels, CLASSES)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert iou_of(matrix)[:2].tolist() == [0.5, 0.5]


def test_what_is_predicted_at_ignored_pixels_does_not_matter() -> None:
    drawn = pictures()
    changed = [
        (torch.where(label == 255, 2, predicted), label.clone()) for predicted, label in drawn
    ]
    assert tally(drawn).scores() == tally(changed).scores()


def naive_interior(labels: Tensor, distance: int) -> Tensor:
    inside = torch.ones(labels.shape, dtype=torch.bool)
    for row in range(labels.shape[0]):
        for column in range(labels.shape[1]):
            window = labels[
                max(row - distance, 0) : row + distance + 1,
                max(column - distance, 0) : column + distance + 1,
            ]
            inside[row, column] = ((window == labels[row, column]) | (window == 255)).all()
    return inside


@pytest.mark.parametrize("distance", [1, 3])
def test_interior_pixels_have_no_other_class_around(distance: int) -> None:
    for _, labels in pictures():
        valid = labels != 255
        got = interior(labels, distance)
        assert torch.equal(got[valid], naive_interior(labels, distance)[valid])


def naive_boundary_iou(drawn: list[tuple[Tensor, Tensor]], label: int) -> float:
    shared = either = 0
    for predicted, truth in drawn:
        distance = max(1, round(0.02 * (truth.shape[0] ** 2 + truth.shape[1] ** 2) ** 0.5))
        valid = truth != 255
        known = predicted.where(valid, 255)
        band = [
            (which == label) & ~naive_interior(which, distance) & valid for which in (known, truth)
        ]
        shared += int((band[0] & band[1]).sum())
        either += int((band[0] | band[1]).sum())
    return shared / either


def test_boundary_iou_equals_comparing_the_bands() -> None:
    drawn = pictures()
    expected = [naive_boundary_iou(drawn, label) for label in range(CLASSES)]
    assert tally(drawn).scores().boundary_iou == pytest.approx(sum(expected) / CLASSES)


def test_boundary_iou_is_one_for_the_truth_and_hurt_more_by_a_shift_than_miou() -> None:
    drawn = pictures(ignored=False)
    right = tally([(label, label) for _, label in drawn]).scores()
    assert right.boundary_iou == right.miou == right.accuracy == 1.0
    shifted = tally(drawn).scores()
    assert shifted.boundary_iou is not None
    assert shifted.boundary_iou < shifted.miou < 1


def test_the_border_of_the_picture_is_no_boundary() -> None:
    labels = torch.ones(9, 9, dtype=torch.uint8)
    assert interior(labels, 3).all()


def test_data_without_a_labelled_pixel_are_refused() -> None:
    labels = torch.full((4, 4), 255, dtype=torch.uint8)
    with pytest.raises(TokenstepError, match="no pixel"):
        tally([(labels * 0, labels)]).scores()
