"""How well a policy finds homogeneous superpatches, measured on a labelled folder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenstep.config import HALF, Channels
from tokenstep.core import partition
from tokenstep.core.same_size import stacked
from tokenstep.data.augment import normalise
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.policies.batch import homogeneity, policy_features
from tokenstep.policies.dcts import DCTS

THRESHOLDS = tuple(step / 20 for step in range(1, 20))


@torch.inference_mode()
def policy_report(
    policy: DCTS,
    folder: LabelledFolder,
    *,
    tolerance: float,
    threshold: float = 0.5,
    mean: Channels = HALF,
    std: Channels = HALF,
) -> dict[str, Any]:
    """Precision, recall, purity and token reduction on a labelled folder, per superpatch size.

    A superpatch is chosen where its score is above ``threshold``. It is homogeneous where other
    classes than its most frequent one hold at most the share ``tolerance`` of it. Purity is the
    mean share of the most frequent class in the chosen superpatches. The reduction of a size is
    that of merging by this size alone, and that of ``all`` is by all sizes. ``curve`` says of the
    partition by all sizes, at each of ``THRESHOLDS``, how many tokens it saves and how pure its
    superpatches are, weighed by their area: two policies are compared where these are equal.

    Pictures are normalised by ``mean`` and ``std``, which must be those that the policy was
    trained with.

    Raises:
        TokenstepError: the policy's scores are not finite.
    """
    policy.eval()
    sides, classes = policy.config.sizes, len(folder.classes.names)
    sums = torch.zeros(len(sides), 6, dtype=torch.float64)
    means, deviations = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
    curve = torch.zeros(len(THRESHOLDS), 3, dtype=torch.float64)
    cells = tokens = 0
    for image, label in folder:
        (looks,) = policy_features(policy, stacked([normalise(image, means, deviations)]))
        scores = homogeneity(policy, looks)
        full = partition.padded_labels(label[None], policy.patch)
        grid = (full.shape[1] // policy.patch, full.shape[2] // policy.patch)
        shares = [partition.purity(full, side * policy.patch, classes) for side in sides]
        for row, (side, share) in enumerate(zip(sides, shares, strict=True)):
            truth = share > partition.purity_bar(tolerance)
            chosen = scores[row] > threshold
            counts = [(truth & chosen).sum(), chosen.sum(), truth.sum(), (share * chosen).sum()]
            tokens_left = _tokens([scores[row]], [side], threshold, grid)
            counted = [*map(float, counts), grid[0] * grid[1], tokens_left]
            sums[row] += torch.tensor(counted, dtype=torch.float64)
        cells += grid[0] * grid[1]
        tokens += _tokens(scores, list(sides), threshold, grid)
        for row, step in enumerate(THRESHOLDS):
            level = _level(scores, sides, step, grid)
            curve[row] += torch.tensor(
                [float(partition.token_counts(level).sum()), *_purity_of(level, sides, shares)],
                dtype=torch.float64,
            )
    return {
        "threshold": threshold,
        "tolerance": tolerance,
        "images": len(folder),
        "sizes": {str(side): _rates(row) for side, row in zip(sides, sums.tolist(), strict=True)},
        "all": {"reduction": _ratio(cells, tokens)},
        "curve": [
            {
                "threshold": step,
                "reduction": _ratio(cells, left),
                "purity": _ratio(pure, merged),
            }
            for step, (left, pure, merged) in zip(THRESHOLDS, curve.tolist(), strict=True)
        ],
    }


def _level(
    scores: Sequence[Tensor], sides: Sequence[int], threshold: float, grid: partition.Grid
) -> Tensor:
    """The partition of one picture by superpatches of these sides."""
    return partition.by_threshold(
        scores, partition.uniform([grid]), sizes=sides, thresholds=[threshold] * len(sides)
    )


def _tokens(
    scores: Sequence[Tensor], sides: Sequence[int], threshold: float, grid: partition.Grid
) -> int:
    """Tokens of one picture that is merged by superpatches of these sides."""
    return int(partition.token_counts(_level(scores, sides, threshold, grid)).sum())


def _purity_of(
    level: Tensor, sides: Sequence[int], shares: Sequence[Tensor]
) -> tuple[float, float]:
    """The cells in a partition's superpatches that are of their own class, and all in them."""
    pure = merged = 0.0
    for side, share in zip(sides, shares, strict=True):
        # Aligned squares: the top left cell of each superpatch lies on this stride.
        taken = level[:, ::side, ::side] == partition.level_of(side)
        taken = taken[:, : share.shape[1], : share.shape[2]]
        pure += float((share * taken).sum()) * side**2
        merged += float(taken.sum()) * side**2
    return pure, merged


def _rates(sums: list[float]) -> dict[str, float | None]:
    """Rates of one size from its six sums."""
    hit, chosen, truth, pure, grid, tokens_left = sums
    return {
        "precision": _ratio(hit, chosen),
        "recall": _ratio(hit, truth),
        "purity": _ratio(pure, chosen),
        "reduction": _ratio(grid, tokens_left),
    }


def _ratio(part: float, whole: float) -> float | None:
    """Quotient, or None where nothing was counted."""
    return part / whole if whole else None
