"""What segmenting returns: the raw outcome of a forward, and one picture's result for users."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokenstep.core.tokens import PackedTokens
from tokenstep.model.cost import Cost


@dataclass(frozen=True, slots=True, eq=False)
class Segmented:
    """What a forward returns: logits of the live tokens, and where each token speaks."""

    tokens: PackedTokens  # after the last block
    logits: Tensor  # (T, S, C) of the live rows; halted ones keep theirs in tokens.halted
    level: Tensor  # (B, H, W) int8, the partition
    live: tuple[tuple[int, ...], ...]  # rows of each picture that entered each block
    sizes: tuple[tuple[int, int], ...]  # (h, w) of each picture


@dataclass(frozen=True, slots=True, eq=False)
class TokenUse:
    """Where one picture's tokens went. Prefix tokens (CLS, registers) are not counted."""

    grid: int  # patches of the picture: the tokens of the dense model
    start: int  # tokens that entered the first block
    end: int  # tokens that were live after the last block
    halted: dict[int, int]  # blocks run -> tokens that halted there, one entry per exit
    level: NDArray[np.int8]  # (H, W): the cell lies in a superpatch of side 2 ** level
    layer: NDArray[np.int16]  # (H, W): blocks that ran for the cell's token
    depth: int  # blocks of the model
    owner: NDArray[np.int64]  # (H, W): flat index of the first cell that the cell's token has
    live: tuple[int, ...]  # tokens that entered each block


def first_cells(owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Name each token by the flat index of its first cell; ``owner (H, W)`` has any names."""
    _, first, token = np.unique(owner, return_index=True, return_inverse=True)
    return first[token].reshape(owner.shape)


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
