"""What commands ask of a model that segments, ours or somebody else's."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenstep.config import Budget, Precision, Spending, Thresholds
from tokenstep.data.pictures import Picture
from tokenstep.model.config import ModelConfig
from tokenstep.model.result import Result
from tokenstep.reducers.base import Reducer
from tokenstep.reducers.exit_heads import ExitHeads


class AnySegmenter(Protocol):
    """Pictures in, results out. ``resizes``: it brings each picture to a size of its own first."""

    resizes: bool
    patch: int
    exits: ExitHeads

    @property
    def config(self) -> ModelConfig:
        """Its classes, what it spends and what was measured of it."""
        ...

    @property
    def depth(self) -> int:
        """Blocks of its ViT."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What it computes with."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        ...

    @property
    def largest(self) -> Tensor:
        """The weight of the largest product of a block, whose speed is the machine's best."""
        ...

    def use(self, *, precision: Precision | None = None) -> Any:
        """Round its weights to 16 bits for good."""
        ...

    def partition(self, pictures: Sequence[Tensor], spending: Spending) -> Tensor:
        """The policy's partition ``(B, H, W)`` of pictures ``(3, h, w)``, without segmenting."""
        ...

    def segment_batch(
        self,
        pictures: Sequence[Picture],
        *,
        thresholds: Thresholds | None = None,
        budget: Budget | None = None,
        partition: Tensor | None = None,
        reducers: Sequence[Reducer] = (),
    ) -> list[Result]:
        """Segment a list of pictures, as :meth:`tokenstep.Segmenter.segment_batch` does."""
        ...
