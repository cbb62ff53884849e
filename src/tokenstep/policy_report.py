"""How well a policy finds homogeneous superpatches, measured on a labelled folder."""

from typing import Any

import torch

from tokenstep.data import LabelledFolder
from tokenstep.model import superpatches
from tokenstep.model.policy import Policy
from tokenstep.transforms import to_float


@torch.inference_mode()
def policy_report(
    policy: Policy, folder: LabelledFolder, *, tolerance: float, threshold: float = 0.5
) -> dict[str, Any]:
    """Precision, recall, purity and token reduction on a labelled folder, per superpatch size.

    The reduction of a size is that of merging by this size alone; ``all`` merges by all sizes.
    Purity is the mean share of the most frequent class in the chosen superpatches.
    """
    policy.eval()
    sizes, classes = policy.config.sizes, len(folder.classes.names)
    sums = torch.zeros(len(sizes), 6, dtype=torch.float64)
    cells = tokens = 0
    for image, label in folder:
        normal = (to_float(image)[None] - 0.5) / 0.5
        scores = [score.sigmoid() for score in policy(normal)]
        grid = (-(-label.shape[0] // policy.patch), -(-label.shape[1] // policy.patch))
        empty = superpatches.uniform([grid])
        full = superpatches.padded_labels(label[None], policy.patch)
        for row, size in enumerate(sizes):
            share = superpatches.purity(full, size * policy.patch, classes)
            truth, chosen = share > 1 - tolerance - 1e-6, scores[row] > threshold
            alone = superpatches.from_scores([scores[row]], [size], [threshold], empty)
            sums[row] += torch.tensor(
                [
                    float((truth & chosen).sum()),
                    float(chosen.sum()),
                    float(truth.sum()),
                    float((share * chosen).sum()),
                    float(grid[0] * grid[1]),
                    float(superpatches.token_counts(alone).sum()),
                ],
                dtype=torch.float64,
            )
        level = superpatches.from_scores(scores, sizes, [threshold] * len(sizes), empty)
        cells += grid[0] * grid[1]
        tokens += int(superpatches.token_counts(level).sum())
    return {
        "threshold": threshold,
        "tolerance": tolerance,
        "images": len(folder),
        "sizes": {
            str(size): {
                "precision": _ratio(hit, chosen),
                "recall": _ratio(hit, truth),
                "purity": _ratio(pure, chosen),
                "reduction": _ratio(grid, left),
            }
            for size, (hit, chosen, truth, pure, grid, left) in zip(
                sizes, sums.tolist(), strict=True
            )
        },
        "all": {"reduction": _ratio(cells, tokens)},
    }


def _ratio(part: float, whole: float) -> float | None:
    """Quotient, or None where nothing was counted."""
    return part / whole if whole else None
