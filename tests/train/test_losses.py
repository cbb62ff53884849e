import pytest
import torch
import torch.nn.functional as F
from support import grid_tokens, halt, random_partition

from tokenstep.core import partition
from tokenstep.core.unmerge import unmerge
from tokenstep.train.losses import (
    class_weights,
    distillation_loss,
    homogeneity_loss,
    homogeneity_targets,
    naming_loss,
    segmentation_loss,
)

FLAT = partition.uniform([(2, 3)])


def test_targets_say_whether_all_valid_pixels_share_a_class() -> None:
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)
    labels[0, :4, :4] = 255
    labels[0, 15, 15] = 1
    two, four = homogeneity_targets(labels, patch=2, sizes=(2, 4), classes=2)
    assert two.dtype == torch.bool
    expected = torch.ones(1, 4, 4, dtype=torch.bool)
    expected[0, 3, 3] = False
    assert torch.equal(two, expected)
    assert four.tolist() == [[[True, True], [True, False]]]
    loose = homogeneity_targets(labels, patch=2, sizes=(2,), classes=2, tolerance=0.07)[0]
    assert loose.all()


def test_targets_and_scores_have_one_shape_on_any_picture() -> None:
    labels = torch.zeros(2, 21, 37, dtype=torch.int64)
    for size, target in zip(
        (2, 8), homogeneity_targets(labels, patch=4, sizes=(2, 8), classes=3), strict=True
    ):
        assert target.shape == (2, 6 // size, 10 // size)


def test_homogeneity_loss_weighs_both_outcomes_alike() -> None:
    target = torch.zeros(1, 10, 10, dtype=torch.bool)
    target[0, 0] = True  # one in ten
    wrong_about_the_rare = homogeneity_loss([torch.full((1, 10, 10), -3.0)], [target])
    wrong_about_the_many = homogeneity_loss([torch.full((1, 10, 10), 3.0)], [target])
    assert torch.isclose(wrong_about_the_rare, wrong_about_the_many)
    right = homogeneity_loss([torch.where(target, 3.0, -3.0)], [target])
    assert right < wrong_about_the_rare / 10


def test_homogeneity_loss_leaves_out_sizes_that_do_not_fit() -> None:
    score = torch.randn(1, 2, 2, requires_grad=True)
    target = torch.tensor([[[True, False], [True, True]]])
    empty = torch.zeros(1, 0, 0)
    loss = homogeneity_loss([score, empty], [target, empty.bool()])
    assert torch.isclose(loss, homogeneity_loss([score], [target]))
    assert loss.isfinite()


def test_homogeneity_loss_of_one_outcome_only_is_finite() -> None:
    for target in (torch.ones(1, 3, 3), torch.zeros(1, 3, 3)):
        assert homogeneity_loss([torch.zeros(1, 3, 3)], [target.bool()]).isfinite()


def test_naming_loss_is_cross_entropy_that_ignores() -> None:
    labels = (
        torch.tensor([[0, 0, 0, 1], [0, 0, 0, 1]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    )
    logits = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 2)  # sure of class 0
    sure, wrong = (F.cross_entropy(logits[:, :, 0, 0], torch.tensor([k])) for k in (0, 1))
    # Of four columns at twice the grid's resolution one is of class 1.
    assert torch.isclose(naming_loss(logits, labels[None]), (3 * sure + wrong) / 4)
    labels[labels == 1] = 255
    assert torch.isclose(naming_loss(logits, labels[None]), sure)
    assert naming_loss(logits, torch.full_like(labels, 255)[None]) == 0


def test_segmentation_loss_is_cross_entropy_on_the_grid() -> None:
    tokens = grid_tokens([(2, 3)])
    logits = torch.randn(7, 1, 4)
    labels = torch.randint(0, 4, (1, 16, 24))
    middle = labels[:, 4::8, 4::8].flatten()  # the pixel at the middle of each 8 px patch
    loss = segmentation_loss(tokens, logits, FLAT, labels)
    assert torch.isclose(loss, F.cross_entropy(logits[1:, 0], middle))
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0])
    weighted = segmentation_loss(tokens, logits, FLAT, labels, weight)
    assert torch.isclose(weighted, F.cross_entropy(logits[1:, 0], middle, weight=weight))


def test_segmentation_loss_leaves_ignored_pixels_out() -> None:
    tokens = grid_tokens([(2, 3)])
    logits = torch.randn(7, 1, 4)
    labels = torch.zeros(1, 16, 24, dtype=torch.int64)
    labels[:, 8:] = 255
    loss = segmentation_loss(tokens, logits, FLAT, labels)
    assert torch.isclose(loss, F.cross_entropy(logits[1:4, 0], torch.zeros(3, dtype=torch.int64)))


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 3.0, 0.0])])
def test_segmentation_loss_of_ignored_pixels_alone_is_zero(weight: torch.Tensor | None) -> None:
    tokens = grid_tokens([(2, 3)])
    logits = torch.randn(7, 1, 4, requires_grad=True)
    labels = torch.full((1, 16, 24), 255)
    loss = segmentation_loss(tokens, logits, FLAT, labels, weight)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_supertoken_counts_by_its_area() -> None:
    level = torch.zeros(1, 2, 4, dtype=torch.int8)
    level[0, :, :2] = 1
    tokens = grid_tokens([(2, 4)], prefix=0)
    tokens = tokens.merge(torch.tensor([0, 0, 2, 3, 0, 0, 6, 7]))
    logits = torch.randn(5, 1, 2)
    labels = torch.randint(0, 2, (1, 2, 4))
    per_cell = torch.cat([logits[[0, 0, 1, 2]], logits[[0, 0, 3, 4]]])[:, 0]
    loss = segmentation_loss(tokens, logits, level, labels)
    assert torch.isclose(loss, F.cross_entropy(per_cell, labels.flatten()))


def test_halted_tokens_are_counted_too() -> None:
    tokens = grid_tokens([(2, 3)])
    logits = torch.randn(7, 1, 4)
    labels = torch.randint(0, 4, (1, 16, 24))
    whole = segmentation_loss(tokens, logits, FLAT, labels)
    done = torch.tensor([0, 1, 0, 1, 0, 0, 1]).bool()
    halted = halt(tokens, done, logits, 1)
    assert torch.isclose(segmentation_loss(halted, logits[~done], FLAT, labels), whole)


def test_sub_cells_are_held_against_their_own_pixels() -> None:
    tokens = grid_tokens([(2, 2)], prefix=0)
    level = random_partition([(2, 2)]) * 0
    labels = torch.randint(0, 3, (1, 8, 8))
    logits = torch.randn(4, 16, 3)
    # 4 sub-cells a side on patches of 4 px: one pixel each
    per_pixel = logits.view(2, 2, 4, 4, 3).permute(0, 2, 1, 3, 4).reshape(64, 3)
    loss = segmentation_loss(tokens, logits, level, labels)
    assert torch.isclose(loss, F.cross_entropy(per_pixel, labels.flatten()))


def test_an_exit_that_says_what_the_last_block_says_has_nothing_to_learn() -> None:
    level = partition.uniform([(4, 6), (4, 4)])
    tokens = grid_tokens([(4, 6), (4, 4)])
    logits = torch.randn(len(tokens.x), 4, 3, requires_grad=True)
    last = unmerge(tokens, logits, level)
    labels = torch.zeros(2, 32, 48, dtype=torch.int64)
    assert distillation_loss(tokens, logits + 5, level, last, labels) < 1e-6
    apart = distillation_loss(tokens, torch.zeros_like(logits), level, last, labels)
    assert apart > 0.1 and not apart.requires_grad, "the last block learns nothing from it"
    ignored = torch.full_like(labels, 255)
    assert distillation_loss(tokens, torch.zeros_like(logits), level, last, ignored) == 0


def test_class_weights_favour_the_rare() -> None:
    pixels = torch.tensor([100, 10, 1000, 0])
    weights = class_weights(pixels, 1.0)
    assert torch.allclose(weights, torch.tensor([1.0, 10.0, 0.1, 1.0]))
    assert torch.equal(class_weights(pixels, 0.0), torch.ones(4))
    half = class_weights(pixels, 0.5)
    assert torch.allclose(half, weights.sqrt())
