"""The whole model as one static graph: under a budget all shapes are known beforehand.

It is the model's own forward. The same budget leaves as many tokens of every picture of a size, so
nothing waits for the host, and the graph can be exported, compiled, or captured on a GPU.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenstep.config import Budget
from tokenstep.errors import TokenstepError
from tokenstep.model.label_map import class_maps
from tokenstep.model.segmented import Segmented
from tokenstep.model.segmenter import Segmenter

GIB = 2**30
WARM_UP = 3  # runs before a capture: libraries choose their kernels in the first ones


class FixedGraph(nn.Module):
    """A segmenter under one budget: ``(B, 3, h, w)`` float in 0..1 -> label maps ``(B, h, w)``.

    Label maps are uint8. Nothing is checked: NaN in the weights gives wrong classes. The weights
    are those of the moment, copied.

    Raises:
        TokenstepError: the budget does not fit the model, or names reducers.
    """

    def __init__(self, model: Segmenter, budget: Budget) -> None:
        super().__init__()
        model.config.check(budget)
        if budget.reducers:
            raise TokenstepError(
                f"a budget with {', '.join(budget.reducers)}: what such reducers leave is not "
                "known beforehand; leave them out of the graph"
            )
        self.model = copy.deepcopy(model).eval()
        self.model.policy = self.model.policy.for_use()
        self.model.dataflow = "grid"
        self.budget = budget

    def forward(self, images: Tensor) -> Tensor:
        """Class of every pixel."""
        segmented: Segmented = self.model(images, budget=self.budget)
        (maps,) = class_maps(segmented)
        return maps.pixels


def exported(
    model: Segmenter, budget: Budget, size: tuple[int, int], batch: int
) -> torch.export.ExportedProgram:
    """The graph for ``batch`` pictures of ``size`` (h, w); its module compiles as one.

    Raises:
        TokenstepError: the budget does not fit the model.
    """
    fixed = FixedGraph(model, budget)
    images = torch.rand(batch, 3, *size, device=model.device)
    with torch.no_grad():
        return torch.export.export(fixed, (images,), strict=False)


def graph(
    model: Segmenter, size: tuple[int, int], batch: int, *, budget: Budget, limit_gib: float = 8.0
) -> Callable[[Tensor], Tensor]:
    """Capture the graph on CUDA: one launch for all of it. It holds memory for as long as it lives.

    What comes back takes ``(batch, 3, h, w)`` float in 0..1 on the GPU and gives label maps
    ``(batch, h, w)`` uint8, which the next call overwrites.

    Raises:
        TokenstepError: the model is not on a GPU, the budget does not fit it, or the graph would
            hold more than ``limit_gib`` GiB.
    """
    if model.device.type != "cuda":
        raise TokenstepError("a graph is captured on a GPU: move the model there, model.cuda()")
    run = exported(model, budget, size, batch).module()
    images = torch.rand(batch, 3, *size, device=model.device)
    with torch.no_grad():
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run(images)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            labels: Tensor = run(images)
    held = (torch.cuda.memory_reserved() - before) / GIB
    if held > limit_gib:
        del captured, labels
        torch.cuda.empty_cache()
        raise TokenstepError(
            f"the graph of {batch} pictures of {size[1]}x{size[0]} holds {held:.1f} GiB, more than "
            f"limit_gib={limit_gib:g}: take fewer pictures at a time"
        )

    def replay(pictures: Tensor) -> Tensor:
        if pictures.shape != images.shape:
            raise ValueError(f"the graph is of {tuple(images.shape)}, got {tuple(pictures.shape)}")
        images.copy_(pictures)
        captured.replay()
        return labels

    return replay
