"""Lines on results that the terminal and the page share."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from tokenstep.config import OperatingPoint

_FILES = ("read", "write")  # the stages that are not the model's own


def promise(point: OperatingPoint, *, by_budget: bool = False) -> str:
    """What an operating point, or its budget, was measured to lose, to what and on what."""
    loss, what = point.loss, "operating point"
    if by_budget and point.fixed is not None:
        loss, what = point.fixed.loss, "budget of the operating point"
    return (
        f"{what}: {loss:.2f} points of mIoU below the best that calibration found, "
        f"on {point.images} pictures of {point.split}"
    )


def spent(entries: Sequence[dict[str, Any]]) -> str:
    """What the pictures of ``report.json`` cost themselves, whatever a calibration measured."""
    used, dense = (fmean(entry["gmac"][key] for entry in entries) for key in ("used", "dense"))
    whose = "this picture" if len(entries) == 1 else f"mean of these {len(entries)} pictures"
    return f"{whose}: {used:.2f} GMAC, {dense:.2f} for the dense model"


def model_milliseconds(entry: dict[str, Any]) -> float:
    """The model's own time in an entry of ``report.json``, without reading and writing files."""
    return float(sum(time for stage, time in entry["milliseconds"].items() if stage not in _FILES))


def warned(warnings: Sequence[str]) -> str:
    """Warnings as they stand below a table, in Markdown too; no text if there is none."""
    return "".join(f"\nwarning: {warning}\n" for warning in warnings)
