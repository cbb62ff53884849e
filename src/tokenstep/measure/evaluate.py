"""Measure a model on a labelled split: dense and reduced, side by side in one run."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tokenstep.data.faults import empty_classes
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.measure.quality import Run, measure, require_same_classes
from tokenstep.model.segmenter import Segmenter


def evaluate(
    model: Segmenter,
    folder: LabelledFolder,
    run: Run,
    *,
    dense: bool = True,
    on_picture: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run the whole folder, dense and as ``run`` says picture by picture, and report both.

    ``dense`` False leaves the dense half out. ``warnings`` are lines on classes without a pixel.

    Raises:
        TokenstepError: the folder's classes are not the model's, a file cannot be read, or no
            pixel has a label.
    """
    require_same_classes(model, folder)
    warnings = empty_classes(folder)
    runs = {"dense": Run(), "reduced": run} if dense else {"reduced": run}
    halves = measure(model, folder, list(runs.values()), on_picture=on_picture)
    how = asdict(run)
    return {
        "images": len(folder),
        "settings": how.pop("settings") | how,
        "warnings": warnings,
        **dict(zip(runs, halves, strict=True)),
    }
