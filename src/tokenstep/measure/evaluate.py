"""Measure a model on a labelled split: dense and reduced, side by side."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tokenstep.data.faults import empty_classes
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.measure.quality import Method, measure, require_same_classes
from tokenstep.model.any_segmenter import AnySegmenter


def evaluate(
    model: AnySegmenter,
    folder: LabelledFolder,
    method: Method,
    *,
    dense: bool = True,
    on_picture: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Segment the whole folder dense and with ``method``, and report both.

    ``dense`` False leaves the dense half out. ``warnings`` are lines on classes without a pixel.

    Raises:
        TokenstepError: the folder's classes are not the model's, a file cannot be read, or no
            pixel has a label.
    """
    require_same_classes(model, folder)
    warnings = empty_classes(folder)
    methods = {"dense": Method(), "reduced": method} if dense else {"reduced": method}
    halves = measure(model, folder, list(methods.values()), on_picture=on_picture)
    settings = asdict(method)
    return {
        "images": len(folder),
        "settings": settings.pop("spending") | settings,
        "warnings": warnings,
        **dict(zip(methods, halves, strict=True)),
    }
