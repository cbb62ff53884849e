"""How far an exit's confidence can be trusted, and the temperature that makes it honest."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenstep.config import Thresholds
from tokenstep.core.partition import padded_labels
from tokenstep.core.unmerge import unmerge
from tokenstep.data.labelled_folder import IGNORE, LabelledFolder
from tokenstep.model.segmenter import Segmenter
from tokenstep.reducers.exits import DeepSupervision


@torch.inference_mode(False)
def fit_exits(
    model: Segmenter, folder: LabelledFolder, merge: tuple[float, ...]
) -> dict[str, dict[str, Any]]:
    """Temperature of each exit, and its reliability before and after, on merged tokens."""
    logits, labels = exit_logits(model, folder, Thresholds(merge))
    report = {}
    for after, found in zip(model.exits.after, logits, strict=True):
        temperature = round(fit_temperature(found, labels), 3)
        report[str(after)] = {
            "temperature": temperature,
            "before": reliability(found, labels),
            "after": reliability(found / temperature, labels),
        }
    return report


@torch.no_grad()
def exit_logits(
    model: Segmenter, folder: LabelledFolder, thresholds: Thresholds, most: int = 200_000
) -> tuple[list[Tensor], Tensor]:
    """Logits ``(N, C)`` of each exit and labels ``(N,)`` at evenly drawn sub-cells of a folder."""
    device = next(model.parameters()).device
    logits: list[list[Tensor]] = [[] for _ in model.exits.after]
    labels = []
    generator = torch.Generator().manual_seed(0)
    for image, label in folder:
        watch = DeepSupervision(model.exits)
        out = model([image.to(device)], thresholds=thresholds, reducers=[watch])
        spreads = [unmerge(tokens, found, out.level)[0] for tokens, found in watch.seen]
        target = sub_cell_labels(label, model.patch, spreads[0].shape[:2]).flatten()
        valid = (target != IGNORE).nonzero().flatten()
        drawn = valid[torch.randperm(len(valid), generator=generator)[: most // len(folder)]]
        labels.append(target[drawn])
        for found, spread_out in zip(logits, spreads, strict=True):
            found.append(spread_out.flatten(0, 1).cpu().float()[drawn])
    return [torch.cat(found) for found in logits], torch.cat(labels)


def sub_cell_labels(label: Tensor, patch: int, size: Sequence[int]) -> Tensor:
    """The label at each sub-cell's centre, int64 of ``size`` (rows, columns), from ``(h, w)``."""
    full = padded_labels(label[None], patch)[:, None].float()
    return F.interpolate(full, tuple(size), mode="nearest-exact")[0, 0].long()


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature above 0 that makes ``logits (N, C)`` likeliest (Guo et al. 2017)."""
    log = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log.exp(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(log.detach().exp().clamp(0.05, 20))


def reliability(logits: Tensor, labels: Tensor, bins: int = 10) -> dict[str, Any]:
    """Confidence against accuracy of ``logits (N, C)`` in equal bins, and their mean gap (ECE)."""
    return reliability_of(bin_sums(logits, labels, bins))


def bin_sums(logits: Tensor, labels: Tensor, bins: int = 10) -> Tensor:
    """Count, and summed confidence and hits, of ``logits (N, C)`` in bins: ``(3, bins)`` float64.

    The sums of several pictures may be added.
    """
    confidence, predicted = logits.softmax(1).max(1)
    right = (predicted == labels).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    count = torch.bincount(place, minlength=bins)
    sums = [torch.bincount(place, part.double(), minlength=bins) for part in (confidence, right)]
    return torch.stack([count.double(), *sums])


def reliability_of(sums: Tensor) -> dict[str, Any]:
    """The report of :func:`reliability` from the sums ``(3, bins)`` of one sample or more."""
    count = sums[0]
    means = [one / count.clamp(min=1) for one in sums[1:]]
    gap = ((means[0] - means[1]).abs() * count).sum() / count.sum()
    return {
        "ece": float(gap),
        "confidence": means[0].tolist(),
        "accuracy": means[1].tolist(),
        "share": (count / count.sum()).tolist(),
    }
