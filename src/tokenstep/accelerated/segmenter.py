"""A segmentation model of transformers as every command takes one: pictures in, results out.

Its own processor prepares the pictures and makes label maps of its outputs, as its user does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenstep.accelerated.accelerate import accelerate, vit_of
from tokenstep.accelerated.accelerator import Accelerator
from tokenstep.accelerated.cost import ForeignCosts
from tokenstep.accelerated.crops import beside, total, whole_grid
from tokenstep.accelerated.named import normal_of
from tokenstep.accelerated.run import PackedRun
from tokenstep.config import Budget, PolicyConfig, Precision, Spending, Thresholds, VitConfig
from tokenstep.data.pictures import Picture, picture_tensor
from tokenstep.errors import TokenstepError, is_out_of_memory
from tokenstep.model.collected import cell_maps
from tokenstep.model.config import ModelConfig
from tokenstep.model.cost import Cost
from tokenstep.model.dense import colours
from tokenstep.model.encoder import largest_of
from tokenstep.model.precision import dtype_for
from tokenstep.model.result import Result
from tokenstep.model.segmented import TokenUse, token_uses
from tokenstep.model.spending import spending_of
from tokenstep.model.stage_timer import Clock
from tokenstep.policies.entropy import Entropy
from tokenstep.reducers.base import Reducer
from tokenstep.reducers.exit_heads import ExitHeads
from tokenstep.reducers.named import reducer_of


class AcceleratedSegmenter:
    """A model and its processor, dense until thresholds, a budget or reducers are asked for.

    ``policy`` gives the sizes of superpatches, and the thresholds that the model runs at unless it
    is told otherwise; an ``accelerator`` gives these, reducers and operating points instead.

    Raises:
        TokenstepError: the model is not supported, or no segmenter of a processor that makes label
            maps.
    """

    resizes = True

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        policy: Entropy | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.original: Any = model.eval()
        self.processor = processor
        self._one_at_a_time = Lock()
        names = classes_of(model, processor)
        sizes = (policy or Entropy()).sizes
        thresholds = Thresholds() if policy is None else Thresholds(merge=policy.merge)
        if accelerator is not None:
            sizes, thresholds = accelerator.sizes or sizes, accelerator.thresholds
        # By thresholds or a budget it merges; until then the original runs.
        self.cheap = accelerate(model, processor, policy=Entropy((0.0,) * len(sizes), sizes))
        self.run = cast(PackedRun, cast(Any, vit_of(self.cheap)).run)
        self.costs = ForeignCosts(model)
        self.patch, self.depth = self.costs.host.patch, len(self.costs.blocks)
        self.exits = ExitHeads((), self.costs.host.dim, len(names), 1)
        mean, std = self._normal = normal_of(processor)
        self.config = ModelConfig(
            names,
            colours(len(names)),
            VitConfig(type(self.costs.vit).__name__, patch=self.patch, depth=self.depth),
            PolicyConfig(kind="entropy", sizes=sizes),
            thresholds=thresholds,
            points=() if accelerator is None else accelerator.points,
            mean=mean,
            std=std,
        )

    @property
    def largest(self) -> Tensor:
        """The weight of the largest product of a block."""
        return largest_of(self.costs.vit)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes with."""
        return cast(Tensor, next(self.original.parameters())).dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return cast(Tensor, next(self.original.parameters())).device

    def use(self, *, precision: Precision | None = None) -> None:
        """Round its weights to 16 bits for good, as :meth:`tokenstep.Segmenter.use`."""
        if precision is not None:
            self.original.to(dtype_for(precision, self.device))

    def partition(self, pictures: Sequence[Tensor], spending: Spending) -> Tensor:
        """Refused: the processor brings pictures to a grid of their own.

        Raises:
            TokenstepError: always.
        """
        raise TokenstepError(_NO_PARTITION)

    @torch.inference_mode()
    def segment_batch(
        self,
        pictures: Sequence[Picture],
        *,
        thresholds: Thresholds | None = None,
        budget: Budget | None = None,
        partition: Tensor | None = None,
        reducers: Sequence[Reducer] = (),
    ) -> list[Result]:
        """Segment a list of pictures; those of one size go together.

        As :meth:`tokenstep.Segmenter.segment_batch`, but for partitions from outside. Where a
        processor cuts a picture, the maps of its tokens lie side by side.

        Raises:
            TokenstepError: a picture cannot be read, the outputs are not finite, or settings do
                not fit the model.
        """
        if partition is not None:
            raise TokenstepError(_NO_PARTITION)
        spending = spending_of(self.config, thresholds, budget)
        self.config.check(spending)
        tensors = [picture_tensor(picture) for picture in pictures]
        results: list[Result | None] = [None] * len(tensors)
        for size in dict.fromkeys(tensor.shape for tensor in tensors):
            places = [place for place, tensor in enumerate(tensors) if tensor.shape == size]
            with self._one_at_a_time:  # what is spent is a state of the accelerated model
                same = self._segmented([tensors[place] for place in places], spending, reducers)
            for place, result in zip(places, same, strict=True):
                results[place] = result
        return cast(list[Result], results)

    def _segmented(
        self, pictures: list[Tensor], spending: Spending, reducers: Sequence[Reducer]
    ) -> list[Result]:
        """Results of pictures of one size."""
        asked = [*reducers, *(reducer_of(text) for text in spending.reducers)]
        plain = not asked and not spending.merge
        self.run.spending, self.run.reducers = spending, tuple(cast(list[Reducer], asked))
        clock = Clock(self.device)
        clock.start()
        with _told_by_size(pictures[0]):
            given, outputs, labels = self._called(pictures, clock, plain=plain)
        if not all(bool(part.isfinite().all()) for part in outputs.values() if _floats(part)):
            raise TokenstepError("the model produced NaN or infinite outputs: check its weights")
        times = {stage: time / len(pictures) for stage, time in clock.read().items()}
        crops = given.get("patch_offsets") or [[place] for place in range(len(pictures))]
        # What hangs over whole patches is seen by no token.
        height, width = (
            side // self.patch * self.patch for side in given["pixel_values"].shape[2:]
        )
        seen = self._as_seen(given["pixel_values"][..., :height, :width])
        uses, costs, whole = self._spent(len(crops), (height, width), plain=plain)
        results = []
        for place in range(len(pictures)):
            own = [crop for crop, offset in enumerate(crops) if offset[0] == place]
            results.append(
                Result(
                    labels=labels[place],
                    class_names=self.config.classes,
                    palette=self.config.palette,
                    tokens=beside([uses[crop] for crop in own]),
                    cost=total([costs[crop] for crop in own]),
                    dense_cost=total([whole] * len(own)),
                    patch=self.patch,
                    seen=np.concatenate([seen[crop] for crop in own], axis=1),
                    milliseconds=dict(times),
                )
            )
        return results

    def _called(
        self, pictures: list[Tensor], clock: Clock, *, plain: bool
    ) -> tuple[Any, Any, list[NDArray[np.uint8]]]:
        """What the processor made of pictures of one size, the outputs, and label maps."""
        size = tuple(pictures[0].shape[1:])
        given = self.processor(images=pictures, return_tensors="pt").to(self.device)
        clock.end("prepare")
        outputs = (self.original if plain else self.cheap)(**given)
        clock.end("model")
        made = self.processor.post_process_semantic_segmentation(
            outputs, target_sizes=[size] * len(pictures)
        )
        labels = [one.to(torch.uint8).cpu().numpy() for one in made]
        clock.end("label maps")
        return given, outputs, labels

    def _as_seen(self, pixels: Tensor) -> NDArray[np.uint8]:
        """Normalised ``pixels (B, 3, h, w)`` as they look, ``(B, h, w, 3)``."""
        mean, std = (torch.tensor(one, device=pixels.device).view(3, 1, 1) for one in self._normal)
        shown = ((pixels.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return shown.permute(0, 2, 3, 1).cpu().numpy()

    def _spent(
        self, count: int, pixels: tuple[int, int], *, plain: bool
    ) -> tuple[list[TokenUse], list[Cost], Cost]:
        """Where tokens of ``count`` crops of ``pixels`` (h, w) went, their cost, and dense's."""
        whole, encoded = self.costs.dense(pixels), self.run.encoded
        if plain or encoded is None:
            return [whole_grid(pixels, self.patch, self.depth)] * count, [whole] * count, whole
        costs = [self.costs.of(encoded, crop, self.run.policy) for crop in range(count)]
        return token_uses(encoded, (), cell_maps(encoded)), costs, whole


def classes_of(model: nn.Module, processor: Any) -> tuple[str, ...]:
    """The names of the classes of a segmenter.

    Raises:
        TokenstepError: the model is none, its processor makes no label maps, or a class has no
            name.
    """
    kind = type(model).__name__
    segments = kind.endswith(("ForSemanticSegmentation", "ForUniversalSegmentation"))
    if not (segments and hasattr(processor, "post_process_semantic_segmentation")):
        raise TokenstepError(
            f"{kind}: is no semantic segmenter, or its processor has no "
            "post_process_semantic_segmentation: tokenstep.accelerate makes other models cheap"
        )
    names = cast(Any, model).config.id2label
    sound = isinstance(names, dict) and sorted(names) == list(range(len(names)))
    if not (sound and all(isinstance(name, str) for name in names.values())):
        raise TokenstepError(f"{kind}: its id2label must name the classes 0, 1, 2 ...: {names}")
    return tuple(names[index] for index in range(len(names)))


_NO_PARTITION = "the model's processor brings pictures to a grid of its own: give no partition"


@contextmanager
def _told_by_size(picture: Tensor) -> Iterator[None]:
    """Make what a model or a processor raises of a picture one line; memory stays a fault apart."""
    try:
        yield
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        height, width = picture.shape[1:]
        reason = " ".join(str(error).split())[:200]
        raise TokenstepError(
            f"the model or its processor does not take pictures of {width} x {height} px "
            f"({reason}); scale them"
        ) from error


def _floats(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()
