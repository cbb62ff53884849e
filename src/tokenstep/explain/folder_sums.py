"""Sums over labelled pictures that were segmented with several methods: tokens, pixels, exits."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenstep.data.labelled_folder import IGNORE
from tokenstep.explain.picture import Rows, View, ends_of, over_pixels
from tokenstep.measure.metrics import Tally, interior
from tokenstep.measure.reliability import bin_sums, sub_cell_labels
from tokenstep.model.any_segmenter import AnySegmenter
from tokenstep.model.result import Result

LEVELS = 16  # more than superpatches have: a side of 2 ** 15 patches


class FolderSums:
    """What is counted of a folder; the last of ``methods`` is the one that is explained.

    A token that lies over several classes counts for each by its share of the token's pixels.
    Arrays with a column per method hold the labelled pixels in the first column, then the wrong
    pixels of each method.
    """

    def __init__(self, model: AnySegmenter, methods: Sequence[str]) -> None:
        self.names = model.config.classes
        self.methods = tuple(methods)
        self.patch = model.patch
        self.depth = model.depth
        # Exits, the last block, and behind them the blocks that may drop tokens.
        self.depths = [*model.exits.after, *range(self.depth, 2 * self.depth + 1)]
        # Distances from a boundary in px, up to two patches.
        self.edges = sorted({max(1, 2 * model.patch // part) for part in (1, 2, 4, 8, 16)})
        classes, columns, depths = len(self.names), 1 + len(self.methods), len(self.depths)
        self.tallies = {method: Tally(classes) for method in self.methods}
        self.tokens = np.zeros((depths, classes + 1))  # by class; the last column has no label
        self.class_pixels = np.zeros(classes + 1, np.int64)
        self.judged = np.zeros((depths, 2), np.int64)  # tokens with labels, and wrong ones
        self.purity = np.zeros((LEVELS, 3))  # superpatches with labels, pure ones, summed purity
        self.by_depth = np.zeros((depths, columns), np.int64)
        self.by_level = np.zeros((LEVELS, columns), np.int64)
        self.by_band = np.zeros((len(self.edges) + 1, columns), np.int64)
        self.reliability = torch.zeros(len(model.exits.after), 3, 10, dtype=torch.float64)
        self.live: list[tuple[int, ...]] = []
        self.gmac: list[list[float]] = []
        self.pictures: Rows = []

    def add(self, name: str, view: View, others: Sequence[Result], label: Tensor) -> None:
        """Count one picture; ``others`` are the results of the other methods, ``label (h, w)``."""
        results = [*others, view.result]
        for method, result in zip(self.methods, results, strict=True):
            self.tallies[method].add(torch.from_numpy(result.labels), label)
        truth = label.numpy()
        valid = truth != IGNORE
        wrong = [valid & (result.labels != truth) for result in results]
        self._add_tokens(view.result, truth)
        self._add_pixels(view.result, label, [valid, *wrong])
        self._add_exits(view, label)
        self.live.append(view.result.tokens.live)
        self.gmac.append([result.cost.total for result in results])
        labelled, dense, step = (int(mask.sum()) for mask in (valid, wrong[0], wrong[-1]))
        self.pictures.append(
            {
                "picture": name,
                "patches": view.result.tokens.grid,
                "tokens": view.result.tokens.start,
                "tokens_at_end": view.result.tokens.end,
                "gmac": view.result.cost.total,
                "dense_wrong_share": ratio(dense, labelled),
                "step_wrong_share": ratio(step, labelled),
                "points_lost": 100 * (step - dense) / labelled if labelled else None,
            }
        )

    def _add_tokens(self, result: Result, truth: NDArray[np.uint8]) -> None:
        """Count whole tokens: the classes under them, whether they are pure, and whether right."""
        use, classes = result.tokens, len(self.names)
        first, token = np.unique(use.owner, return_inverse=True)
        token = over_pixels(token.reshape(use.owner.shape), self.patch, truth.shape)
        shape = (len(first), classes + 1)
        true = _histogram(token, np.minimum(truth, classes), shape)
        predicted = _histogram(token, result.labels, shape)
        of_classes, labelled = true[:, :classes], true[:, :classes].sum(1)
        depth = np.searchsorted(self.depths, ends_of(use).ravel()[first])
        np.add.at(self.tokens, depth, true / true.sum(1, keepdims=True))
        self.class_pixels += true.sum(0)
        known = labelled > 0
        wrong = of_classes.argmax(1) != predicted.argmax(1)
        np.add.at(self.judged, depth[known], np.stack([known, wrong], 1)[known])
        purity = of_classes.max(1)[known] / labelled[known]
        level = use.level.ravel()[first][known]
        np.add.at(self.purity, level, np.stack([np.ones_like(purity), purity == 1, purity], 1))

    def _add_pixels(
        self, result: Result, label: Tensor, masks: Sequence[NDArray[np.bool_]]
    ) -> None:
        """Count labelled and wrong pixels by depth, superpatch size and distance."""
        use, size = result.tokens, label.shape
        depth = np.searchsorted(self.depths, over_pixels(ends_of(use), self.patch, size))
        level = over_pixels(use.level, self.patch, size)
        # A pixel is in the interior at each distance that is less than its own.
        inside = [interior(label, edge).numpy() for edge in self.edges]
        band = np.sum(inside, axis=0, dtype=np.int64)
        for group, sums in (
            (depth, self.by_depth),
            (level, self.by_level),
            (np.asarray(band), self.by_band),
        ):
            for column, mask in enumerate(masks):
                sums[:, column] += np.bincount(group[mask], minlength=len(sums))

    def _add_exits(self, view: View, label: Tensor) -> None:
        """Sum the confidence and the accuracy of each exit over the sub-cells that were live."""
        for sums, exit_view in zip(self.reliability, view.exits, strict=True):
            target = sub_cell_labels(label, self.patch, exit_view.logits.shape[:2])
            side = len(target) // len(exit_view.confidence)
            live = torch.from_numpy(~np.isnan(exit_view.confidence))
            live = live.repeat_interleave(side, 0).repeat_interleave(side, 1)
            counted = live & (target != IGNORE)
            sums += bin_sums(exit_view.logits[counted], target[counted])

    def shown(self) -> list[int]:
        """Places in ``depths`` of where tokens may end: of drops, those that happened."""
        tokens = self.tokens.sum(1)
        return [k for k, end in enumerate(self.depths) if end <= self.depth or tokens[k]]


def ratio(part: float, whole: float) -> float | None:
    """``part / whole``, or None where ``whole`` is 0."""
    return part / whole if whole else None


def _histogram(
    token: NDArray[np.int64], value: NDArray[np.uint8], shape: tuple[int, int]
) -> NDArray[np.int64]:
    """Pixels of each token (rows) that hold each value (columns)."""
    counts = np.bincount((token * shape[1] + value).ravel(), minlength=shape[0] * shape[1])
    return counts.reshape(shape)
