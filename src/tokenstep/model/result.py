"""One picture's result, as users meet it."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenstep.model.cost import Cost
from tokenstep.model.segmented import TokenUse


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """One segmented picture."""

    labels: NDArray[np.uint8]  # (h, w), the picture's own size, also where it was scaled
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    tokens: TokenUse
    cost: Cost
    dense_cost: Cost  # of the same model without merging and exits
    patch: int  # pixels a side
    milliseconds: dict[str, float]  # of each stage of the model, in order, per picture of the batch
    windows: int = 1  # that the picture was cut into
    seen: NDArray[np.uint8] | None = None  # (h, w, 3) on which the tokens lie, if not the picture
    scaled_to: tuple[int, int] | None = None  # (w, h) that the model saw, of a larger picture

    def enlarged(self, width: int, height: int) -> "Result":
        """The result of a larger picture that was scaled down to this one for the model.

        Its label map has the larger size, by nearest neighbour; ``tokens`` stay on the small grid.
        """
        size = self.labels.shape[1], self.labels.shape[0]
        if size == (width, height):
            return self
        labels = Image.fromarray(self.labels).resize((width, height), Image.Resampling.NEAREST)
        return replace(self, labels=np.array(labels), scaled_to=size)

    def shares(self) -> dict[str, float]:
        """Share of the pixels that each class holds, 0 to 1."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.class_names))
        shares = counts / self.labels.size
        return dict(zip(self.class_names, shares.tolist(), strict=True))

    def report(self) -> dict[str, Any]:
        """The entry of ``report.json``: size, tokens, GMAC, milliseconds and class shares."""
        height, width = self.labels.shape
        tokens = self.tokens
        return {
            "width": width,
            "height": height,
            **({} if self.scaled_to is None else {"scaled_to": list(self.scaled_to)}),
            "windows": self.windows,
            "tokens": {
                "grid": tokens.grid,
                "start": tokens.start,
                "end": tokens.end,
                "halted": {str(layer): count for layer, count in tokens.halted.items()},
            },
            "gmac": {
                "dense": round(self.dense_cost.total, 4),
                "used": round(self.cost.total, 4),
                "policy": round(self.cost.policy, 4),
            },
            "milliseconds": {stage: round(time, 2) for stage, time in self.milliseconds.items()},
            "classes": {name: round(share, 5) for name, share in self.shares().items()},
        }
