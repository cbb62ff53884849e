"""Losses of the two trainings: homogeneity for the policy, cross-entropy for the segmenter."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenstep.core.partition import padded_labels, purity, purity_bar
from tokenstep.core.tokens import PackedTokens
from tokenstep.core.unmerge import unmerge
from tokenstep.data.labelled_folder import IGNORE


def homogeneity_targets(
    labels: Tensor, *, patch: int, sizes: Sequence[int], classes: int, tolerance: float = 0.0
) -> list[Tensor]:
    """Whether each superpatch's valid pixels share one class, from ``labels (B, h, w)``.

    One bool map ``(B, H // s, W // s)`` per size. ``tolerance`` is the share of other pixels that
    is let pass; squares without a valid pixel count as homogeneous.
    """
    full = padded_labels(labels, patch)
    bar = purity_bar(tolerance)
    return [purity(full, size * patch, classes, IGNORE) > bar for size in sizes]


def homogeneity_loss(scores: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Binary cross-entropy of the policy's logits, mean over sizes.

    Large superpatches are rarely homogeneous and small ones mostly are, so within each size both
    outcomes get the same weight in the batch. Sizes too large for the pictures do not count.
    """
    losses = []
    for score, target in zip(scores, targets, strict=True):
        if target.numel() == 0:
            continue
        share = target.float().mean().clamp(0.02, 0.98)
        weight = torch.where(target, 0.5 / share, 0.5 / (1 - share))
        losses.append(F.binary_cross_entropy_with_logits(score, target.float(), weight))
    return torch.stack(losses).mean()


def naming_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of ``logits (B, C, H, W)`` on the patch grid with ``labels (B, h, w)``, int64.

    Taken on a grid of twice its resolution, so that a patch across a boundary is told so. Where
    all labels are ignored the loss is 0.
    """
    fine = F.interpolate(logits.float(), scale_factor=2, mode="bilinear", align_corners=False)
    target = F.interpolate(labels[:, None].float(), fine.shape[2:], mode="nearest-exact")[:, 0]
    target = target.long()
    summed = F.cross_entropy(fine, target, ignore_index=IGNORE, reduction="sum")
    return summed / (target != IGNORE).sum().clamp(min=1)


def segmentation_loss(
    tokens: PackedTokens,
    logits: Tensor,
    level: Tensor,
    labels: Tensor,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of live and halted tokens' logits against ``labels (B, h, w)``, int64.

    It is taken on the grid of sub-cells, whose label is that of the pixel at their middle: there
    a supertoken counts by its area, and no logits at picture resolution are needed. Labels must
    fill whole patches (:func:`padded_labels`); where all are ignored the loss is 0.
    """
    spread = unmerge(tokens, logits, level)
    flat = _of_sub_cells(labels, spread).flatten()
    summed = F.cross_entropy(
        spread.flatten(0, 2).float(),
        flat,
        weight=class_weight,
        ignore_index=IGNORE,
        reduction="sum",
    )
    if class_weight is None:
        class_weight = summed.new_ones(logits.shape[-1])
    weight = F.pad(class_weight, (0, 1))[flat.clamp(max=len(class_weight))].sum()
    return summed / weight.clamp(min=torch.finfo(weight.dtype).tiny)


def distillation_loss(
    tokens: PackedTokens, logits: Tensor, level: Tensor, target: Tensor, labels: Tensor
) -> Tensor:
    """How far an exit's prediction is from the last block's: KL divergence, mean over sub-cells.

    ``target (B, H * side, W * side, C)`` is what the last block's logits come to on the grid of
    sub-cells, :func:`unmerge`. Sub-cells that are ignored in ``labels`` do not count; ours.
    """
    spread = unmerge(tokens, logits, level).float().log_softmax(dim=-1)
    wanted = target.detach().float().log_softmax(dim=-1)
    apart = F.kl_div(spread, wanted, reduction="none", log_target=True).sum(dim=-1)
    counts = _of_sub_cells(labels, spread) != IGNORE
    return (apart * counts).sum() / counts.sum().clamp(min=1)


def _of_sub_cells(labels: Tensor, spread: Tensor) -> Tensor:
    """The label of each sub-cell, that of the pixel at its middle: ``(B, H * side, W * side)``."""
    target = F.interpolate(labels[:, None].float(), spread.shape[1:3], mode="nearest-exact")
    return target[:, 0].long()


def class_weights(pixels: Tensor, power: float) -> Tensor:
    """Weight of each class from its ``pixels (C,)``: ``(median / pixels) ** power``.

    0 weighs all classes alike; 1 is median frequency balancing (SegNet, arXiv 1511.00561).
    Classes without a pixel weigh 1.
    """
    seen = pixels > 0
    ratio = pixels[seen].float().median() / pixels.clamp(min=1).float()
    return torch.where(seen, ratio**power, 1.0)
