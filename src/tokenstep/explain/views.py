"""Where one picture's tokens go: the picture segmented once, with what each exit thought of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenstep.config import Thresholds
from tokenstep.core.unmerge import rows_of_cells, unmerge
from tokenstep.data.labelled_folder import IGNORE
from tokenstep.model.result import Result, TokenUse
from tokenstep.model.segmenter import Segmenter
from tokenstep.reducers.exits import DeepSupervision, confidence_of

Rows = list[dict[str, Any]]  # of a table; one key per column


@dataclass(frozen=True, slots=True, eq=False)
class ExitView:
    """What one exit saw of a picture, just before it halted anything."""

    after: int  # blocks run
    bar: float | None  # the confidence above which tokens may halt, None if the exits are off
    confidence: NDArray[np.float32]  # (H, W) of the cell's token, 0..1; NaN: halted before
    logits: Tensor  # (H * side, W * side, C) of the sub-cells over the temperature, on the CPU


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A segmented picture and what its exits saw."""

    image: NDArray[np.uint8]  # (h, w, 3)
    result: Result
    exits: tuple[ExitView, ...]


@torch.inference_mode()
def look(model: Segmenter, image: Tensor, thresholds: Thresholds) -> View:
    """Segment ``image (3, h, w)`` uint8 and keep what each exit saw.

    The exits look on in any case; they halt tokens where ``thresholds`` have them on.

    Raises:
        TokenstepError: the logits are not finite.
    """
    watch = DeepSupervision(model.exits)
    result = model.segment_batch([image], thresholds=thresholds, reducers=[watch])[0]
    level = torch.from_numpy(result.tokens.level)[None].to(next(model.parameters()).device)
    temperatures = model.config.temperatures or (1.0,) * len(model.exits.after)
    bars: Sequence[float | None] = thresholds.exits or (None,) * len(model.exits.after)
    views = []
    for after, bar, temperature, (tokens, logits) in zip(
        model.exits.after, bars, temperatures, watch.seen, strict=True
    ):
        tempered = logits / temperature
        rows = rows_of_cells(tokens)[0]
        live = rows < len(tokens.x)  # the rows behind them had halted before
        confidence = confidence_of(tempered)[0][rows.clamp(max=len(tokens.x) - 1)]
        views.append(
            ExitView(
                after,
                bar,
                confidence.masked_fill(~live, torch.nan).cpu().numpy(),
                unmerge(tokens, tempered, level)[0].float().cpu(),
            )
        )
    return View(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), result, tuple(views))


def depths_of(use: TokenUse) -> list[int]:
    """Where tokens end: after each exit, and after the last block."""
    return [*use.halted, use.depth]


def depth_name(blocks: int, depth: int) -> str:
    """How a halting depth is called in tables and figures."""
    return f"ran all {depth} blocks" if blocks == depth else f"halted after block {blocks}"


def live_rows(use: TokenUse) -> Rows:
    """Tokens that enter each block, and their share of the dense model's."""
    return [
        {"block": block, "tokens": count, "dense_share": count / use.grid}
        for block, count in enumerate(use.live, start=1)
    ]


def size_rows(use: TokenUse) -> Rows:
    """Superpatches of each size, in patches a side, and the share of the cells under them."""
    tokens = use.level.ravel()[np.unique(use.owner)]
    return [
        {
            "patches_a_side": 1 << level,
            "tokens": int((tokens == level).sum()),
            "cells_share": float((use.level == level).mean()),
        }
        for level in np.unique(use.level).tolist()
    ]


def depth_rows(use: TokenUse) -> Rows:
    """Tokens that end after each exit and after the last block, and their share of the cells."""
    tokens = use.layer.ravel()[np.unique(use.owner)]
    return [
        {
            "depth": depth_name(blocks, use.depth),
            "tokens": int((tokens == blocks).sum()),
            "tokens_share": float((tokens == blocks).mean()),
            "cells_share": float((use.layer == blocks).mean()),
        }
        for blocks in depths_of(use)
    ]


def exit_rows(view: View) -> Rows:
    """What each exit saw: live tokens, their confidence, how many passed the bar and halted."""
    use = view.result.tokens
    rows = []
    first = np.unique(use.owner)
    for seen in view.exits:
        known = seen.confidence.ravel()[first]
        known = known[~np.isnan(known)]
        rows.append(
            {
                "exit_after_block": seen.after,
                "live_tokens": len(known),
                "mean_confidence": float(known.mean()) if len(known) else None,
                "bar": seen.bar,
                "above_the_bar": None if seen.bar is None else int((known > seen.bar).sum()),
                "halted": use.halted[seen.after],
            }
        )
    return rows


def explain_picture(view: View) -> dict[str, Any]:
    """Every number about one picture's tokens, as plain data: rows of tables."""
    report = view.result.report()
    return {
        **{key: report[key] for key in ("width", "height", "gmac", "classes")},
        "live": live_rows(view.result.tokens),
        "sizes": size_rows(view.result.tokens),
        "depths": depth_rows(view.result.tokens),
        "exits": exit_rows(view),
    }


def differences(
    step: NDArray[np.uint8], dense: NDArray[np.uint8], truth: NDArray[np.uint8]
) -> dict[str, NDArray[np.bool_]]:
    """Labelled pixels that STEP gives another class than dense, by who is right; all ``(h, w)``."""
    changed = (step != dense) & (truth != IGNORE)
    return {
        "lost: dense is right": changed & (dense == truth),
        "gained: STEP is right": changed & (step == truth),
        "both wrong": changed & (dense != truth) & (step != truth),
    }


def difference_rows(
    step: NDArray[np.uint8], dense: NDArray[np.uint8], truth: NDArray[np.uint8]
) -> Rows:
    """How many pixels :func:`differences` finds, and their share of the labelled ones."""
    labelled = max(1, int((truth != IGNORE).sum()))
    counts = {who: int(mask.sum()) for who, mask in differences(step, dense, truth).items()}
    return [
        {"difference": who, "pixels": count, "labelled_share": count / labelled}
        for who, count in counts.items()
    ]


def over_pixels(cells: NDArray[Any], patch: int, size: Sequence[int]) -> NDArray[Any]:
    """Spread ``cells (H, W)`` over the pixels of a picture of ``size`` (h, w)."""
    height, width = size
    spread: NDArray[Any] = cells[np.arange(height)[:, None] // patch, np.arange(width) // patch]
    return spread
