"""The model: its pipeline in one forward, pictures in and results out, save and load."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Self, cast

import torch
from torch import Tensor

from tokenstep.config import Budget, Precision, Spending, Thresholds
from tokenstep.core.attention import Backend
from tokenstep.core.partition import grid_of
from tokenstep.core.same_size import sizes_of
from tokenstep.data.pictures import Picture, picture_tensor
from tokenstep.data.scaling import MaxSide, scaled_tensor, side_for
from tokenstep.errors import TokenstepError
from tokenstep.model.build import Parts, step_parts
from tokenstep.model.collected import collected
from tokenstep.model.config import ModelConfig
from tokenstep.model.cost import CostCounter
from tokenstep.model.dataflow import DATAFLOWS, Dataflow, flow_for
from tokenstep.model.decoder import MaskDecoder
from tokenstep.model.encoder import largest_of
from tokenstep.model.folder import ModelFolder
from tokenstep.model.normalise import Normalise
from tokenstep.model.precision import dtype_for, name_of
from tokenstep.model.renamed import renamed
from tokenstep.model.result import Result
from tokenstep.model.segmented import Segmented, token_uses
from tokenstep.model.spending import (
    plan_of,
    reducers_of,
    require_reducers,
    spending_of,
    tokens_known,
)
from tokenstep.model.stage_timer import StageTimer
from tokenstep.policies.batch import (
    features_on_grids,
    partition_by,
    policy_features,
    require_finite,
)
from tokenstep.reducers.base import Reducer

_NO_LISTS = (str, bytes, bytearray, memoryview)  # sequences, but one picture or none


class Segmenter(ModelFolder, library_name="tokenstep", tags=["image-segmentation"]):
    """A plain ViT segmenter with dCTS supertokens and early pruning (STEP, arXiv 2509.14165).

    The parts are handed in; :meth:`build` makes them from the settings alone.
    """

    resizes = False  # pictures are segmented at the size they have

    # The annotation is a string so that the hub mixin hands config.json over as a plain dict:
    # its own conversion knows neither nested settings nor tuples.
    def __init__(self, config: "ModelConfig", parts: Parts) -> None:
        super().__init__()
        fixed = [point.fixed.budget for point in config.points if point.fixed is not None]
        known: list[Spending] = [
            config.thresholds,
            *(point.thresholds for point in config.points),
            *fixed,
        ]
        require_reducers(known, parts.exits, len(parts.encoder.host_blocks()))
        self.config = config
        self.patch = parts.tokenise.patch
        self.normalise = Normalise(config.mean, config.std)
        self.policy = parts.policy
        self.tokenise = parts.tokenise
        self.encoder = parts.encoder
        self.exits = parts.exits
        self.decoder = parts.decoder
        self.costs = CostCounter(parts)
        self.dataflow: Dataflow = "auto"

    @classmethod
    def build(cls, config: ModelConfig) -> Self:
        """The segmenter that ``config`` describes, untrained.

        Raises:
            ValueError: the ViT has a part that packed tokens cannot run, by name; or the exits do
                not lie between its blocks.
        """
        return cls(config, step_parts(config))

    def forward(
        self,
        pictures: Tensor | Sequence[Tensor],
        *,
        thresholds: Thresholds | None = None,
        budget: Budget | None = None,
        partition: Tensor | None = None,
        unmerged: Tensor | None = None,
        reducers: Sequence[Reducer] = (),
    ) -> Segmented:
        """Segment ``pictures``: ``(B, 3, h, w)`` or a list of ``(3, h, w)``, RGB.

        They are uint8, or float in 0..1. ``thresholds`` default to the model's own; a ``budget``
        takes their place; ``partition (B, H, W)`` replaces the policy's; ``unmerged (B,)`` is a
        mask of pictures that keep all of their patches (training runs some of them so);
        ``reducers`` are asked in each block, at their own site, before those that
        ``thresholds`` name and before the exits.

        Raises:
            TokenstepError: the policy's scores are not finite.
            ValueError: there is not one threshold per superpatch size or exit, or ``partition``
                does not cover the pictures' cells.
        """
        spending = spending_of(self.config, thresholds, budget)
        plan = plan_of(spending, self.config.policy.sizes) if partition is None else None
        normal = self.normalise(pictures)
        sizes = sizes_of(normal)
        flow = flow_for(self.dataflow, self.device)
        whole, context = DATAFLOWS[flow].whole, self.tokenise.context is not None
        policy = self.policy if self.training else self.policy.for_use()
        looks = policy_features(policy, normal, whole=whole) if plan or context else []
        finite = counts = None
        if partition is None:
            partition, finite = partition_by(policy, normal, looks, plan)
            counts = tokens_known(spending, [grid_of(size, self.patch) for size in sizes])
        if unmerged is not None:
            kept, counts = unmerged.view(-1, 1, 1), None
            partition = torch.where(kept, partition.clamp(max=0), partition)
        seen = features_on_grids(policy, looks) if context else None
        tokens = self.tokenise(normal, partition, seen, finite=finite, counts=counts, flow=flow)
        own = reducers_of(spending, self.exits, self.config.temperatures, whole=whole)
        tokens, trace = self.encoder(tokens, [*reducers, *own])
        return Segmented(
            tokens=tokens,
            logits=self.decoder(tokens),
            partition=partition,
            trace=trace,
            sizes=tuple(sizes),
            patch=self.patch,
            scored=plan is not None,
            flow=flow,
            finite=None if counts is None else finite,
        )

    def partition(self, pictures: Sequence[Tensor], spending: Spending) -> Tensor:
        """The policy's partition ``(B, H, W)`` of pictures ``(3, h, w)``, without segmenting."""
        plan = plan_of(spending, self.config.policy.sizes)
        normal = self.normalise(pictures)
        policy, whole = self.policy.for_use(), DATAFLOWS[flow_for(self.dataflow, self.device)].whole
        looks = policy_features(policy, normal, whole=whole) if plan else []
        partition, finite = partition_by(policy, normal, looks, plan)
        require_finite(finite is None or bool(finite))
        return partition

    @torch.inference_mode()
    def segment(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        thresholds: Thresholds | None = None,
        budget: Budget | None = None,
        max_loss: float | None = None,
        max_side: MaxSide = "auto",
        settings: Thresholds | None = None,
    ) -> Result | list[Result]:
        """Segment one picture, or a list of them as one batch; sizes may differ.

        A picture is a path, a PIL image, an array ``(h, w)``, ``(h, w, 3)`` or ``(h, w, 4)``, or a
        ``(3, h, w)`` tensor (uint8, or float in 0..1). One picture gives a :class:`Result`, a list
        gives a list. Pictures of a larger side than ``max_side`` are scaled down to it first, and
        their label maps back (``result.scaled_to`` says so): "auto" is the scale that the model was
        trained at, if it has one (``config.long_side``), None takes pictures as they are.
        ``thresholds`` default to the model's own; ``Thresholds()`` is the dense model. ``max_loss``
        takes the cheapest operating point that was measured to lose at most so many points of
        mIoU instead; 0 is dense. ``budget`` spends the same on every picture instead.
        ``settings`` is the former name of ``thresholds``.

        Raises:
            TokenstepError: a picture cannot be read, the logits are not finite, the model has no
                operating points to choose from, or the budget does not fit the model.
        """
        thresholds = renamed("settings", settings, "thresholds", thresholds)
        if max_loss is not None:
            if thresholds is not None or budget is not None:
                raise TokenstepError("give one of thresholds, budget and max_loss")
            thresholds, _ = self.config.at(max_loss)
        side = side_for(max_side, self.config.long_side)
        many = isinstance(pictures, Sequence) and not isinstance(pictures, _NO_LISTS)
        sizes, scaled = [], []
        for picture in cast(Sequence[Picture], pictures) if many else [cast(Picture, pictures)]:
            whole = picture_tensor(picture)
            sizes.append((whole.shape[2], whole.shape[1]))
            scaled.append(scaled_tensor(whole, side))
        results = self.segment_batch(scaled, thresholds=thresholds, budget=budget)
        results = [one.enlarged(*size) for one, size in zip(results, sizes, strict=True)]
        return results if many else results[0]

    @torch.inference_mode()
    def segment_batch(
        self,
        pictures: Sequence[Picture],
        *,
        thresholds: Thresholds | None = None,
        budget: Budget | None = None,
        partition: Tensor | None = None,
        reducers: Sequence[Reducer] = (),
        settings: Thresholds | None = None,
    ) -> list[Result]:
        """:meth:`segment` for a list, never scaled; times are the batch's, over its pictures.

        ``partition (B, H, W)`` replaces the policy's, for comparisons; ``reducers`` are asked
        in each block before those of ``thresholds`` and the exits, and may just look on.
        ``settings`` is the former name of ``thresholds``.
        """
        thresholds = renamed("settings", settings, "thresholds", thresholds)
        if not pictures:
            return []
        if not isinstance(thresholds, Thresholds | None):
            kinds = "give tokenstep.Thresholds(...); Thresholds() is the dense model"
            raise TokenstepError(f"thresholds is {thresholds!r}: {kinds}")
        timer = StageTimer(self.normalise, self.parts, self.device)
        with timer:
            segmented = self(
                [picture_tensor(picture) for picture in pictures],
                thresholds=thresholds,
                budget=budget,
                partition=partition,
                reducers=reducers,
            )
            labels, maps = collected(segmented)
        times = {stage: time / len(pictures) for stage, time in timer.milliseconds().items()}
        return [
            Result(
                labels=labels[index],
                class_names=self.config.classes,
                palette=self.config.palette,
                tokens=use,
                cost=self.costs.of(segmented, index),
                dense_cost=self.costs.dense(segmented.sizes[index]),
                patch=self.patch,
                milliseconds=dict(times),
            )
            for index, use in enumerate(token_uses(segmented, self.exits.after, maps))
        ]

    @property
    def parts(self) -> Parts:
        """The parts, one per stage."""
        return Parts(self.policy, self.tokenise, self.encoder, self.exits, self.decoder)

    @property
    def depth(self) -> int:
        """Blocks of the ViT."""
        return len(self.encoder.host_blocks())

    @property
    def largest(self) -> Tensor:
        """The weight of the largest product of a block."""
        return largest_of(self.encoder)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes with."""
        return cast(Tensor, self.normalise.mean).dtype

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return cast(Tensor, self.normalise.mean).device

    def use(
        self,
        *,
        backend: Backend = "auto",
        checkpointing: bool = False,
        dataflow: Dataflow = "auto",
        precision: Precision | None = None,
    ) -> None:
        """Choose the attention back end, and whether blocks are recomputed in the backward pass.

        ``dataflow`` is how pictures become tokens and tokens pixels: "windows" is made for CPUs and
        "grid" for GPUs; all compute the same. ``precision`` rounds the weights to 16 bits for good:
        "bf16" or "fp16", or what "auto" finds the device made for. Confidences, scores, means over
        merged tokens and label maps are computed in fp32 all the same.

        Raises:
            ValueError: there is no such dataflow or precision, or the weights have lost what a
                higher precision would need.
        """
        flow_for(dataflow, self.device)
        if precision is not None:
            dtype = dtype_for(precision, self.device)
            if dtype != self.dtype and self.dtype.itemsize < 4:
                raise ValueError(
                    f"the weights are {name_of(self.dtype)} already: load the model anew for "
                    f"{name_of(dtype)}"
                )
            self.to(dtype)
        self.dataflow = dataflow
        run = replace(self.encoder.settings, backend=backend, checkpointing=checkpointing)
        self.encoder.settings = run
        if isinstance(self.decoder, MaskDecoder):
            self.decoder.settings = run

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; the policy is never trained here and stays in eval mode.

        The statistics of its norms would drift otherwise.
        """
        super().train(mode)
        self.policy.eval()
        return self
