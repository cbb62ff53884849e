"""Pictures in, results out: the model as users meet it, with save and load."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from torch import Tensor

from tokenstep.config import DENSE, ModelConfig, Thresholds
from tokenstep.core.partition import grid_of, token_counts
from tokenstep.core.unmerge import layer_of_cells
from tokenstep.data.pictures import Picture, picture_tensor
from tokenstep.data.scaling import MaxSide, scaled_tensor, side_for
from tokenstep.data.whole_files import write_text
from tokenstep.errors import TokenstepError
from tokenstep.model import cost
from tokenstep.model.card import model_card
from tokenstep.model.cost import Cost
from tokenstep.model.network import Segmenter
from tokenstep.model.result import Result, Segmented, TokenUse, first_cells
from tokenstep.model.weight_files import save_weights
from tokenstep.reducers.base import Reducer
from tokenstep.typed import from_dict

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_NO_LISTS = (str, bytes, bytearray, memoryview)  # sequences, but one picture or none


class Segmenter(
    Segmenter, PyTorchModelHubMixin, library_name="tokenstep", tags=["image-segmentation"]
):
    """A plain ViT segmenter with dCTS supertokens and early pruning (STEP, arXiv 2509.14165).

    Raises:
        ValueError: the backbone has a part that packed tokens cannot run, by name.
    """

    # The annotation is a string so that the hub mixin hands config.json over as a plain dict:
    # its own conversion knows neither nested settings nor tuples.
    def __init__(self, config: "ModelConfig") -> None:
        super().__init__(config)

    @torch.inference_mode()
    def segment(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        settings: Thresholds | None = None,
        max_loss: float | None = None,
        max_side: MaxSide = "auto",
    ) -> Result | list[Result]:
        """Segment one picture, or a list of them as one batch; sizes may differ.

        A picture is a path, a PIL image, an array ``(h, w)``, ``(h, w, 3)`` or ``(h, w, 4)``, or a
        ``(3, h, w)`` tensor (uint8, or float in 0..1). One picture gives a :class:`Result`, a list
        gives a list. Pictures of a larger side than ``max_side`` are scaled down to it first, and
        their label maps back (``result.scaled_to`` says so): "auto" is the scale that the model was
        trained at, if it has one (``config.long_side``), None takes pictures as they are.
        ``thresholds`` default to the model's own; ``Thresholds()`` is the dense model. ``max_loss``
        takes the cheapest operating point that was measured to lose at most so many points of
        mIoU instead; 0 is dense.

        Raises:
            TokenstepError: a picture cannot be read, the logits are not finite, or the model has
                no operating points to choose from.
        """
        if max_loss is not None:
            if settings is not None:
                raise TokenstepError("give settings or max_loss, not both")
            point = self.config.point_within(max_loss)
            settings = DENSE if point is None else point.settings
        side = side_for(max_side, self.config.long_side)
        many = isinstance(pictures, Sequence) and not isinstance(pictures, _NO_LISTS)
        sizes, scaled = [], []
        for picture in cast(Sequence[Picture], pictures) if many else [cast(Picture, pictures)]:
            whole = picture_tensor(picture)
            sizes.append((whole.shape[2], whole.shape[1]))
            scaled.append(scaled_tensor(whole, side))
        results = self.segment_batch(scaled, settings=settings)
        results = [one.enlarged(*size) for one, size in zip(results, sizes, strict=True)]
        return results if many else results[0]

    @torch.inference_mode()
    def segment_batch(
        self,
        pictures: Sequence[Picture],
        *,
        settings: Thresholds | None = None,
        level: Tensor | None = None,
        reducers: Sequence[Reducer] = (),
    ) -> list[Result]:
        """:meth:`segment` for a list, never scaled; times are the batch's, over its pictures.

        ``level (B, H, W)`` replaces the policy's partition, for comparisons; ``reducers`` are
        asked after each block before the exits are, and may just look on.
        """
        if not pictures:
            return []
        settings = self.config.settings if settings is None else settings
        if not isinstance(settings, Thresholds):
            kinds = "give tokenstep.Thresholds(...); Thresholds() is the dense model"
            raise TokenstepError(f"settings is {settings!r}: {kinds}")
        device = cast(Tensor, self.mean).device
        clock = _Clock(device)
        # Moved as bytes: a quarter of what floats are.
        normal = self.normalise([picture_tensor(one).to(device) for one in pictures])
        clock.lap("prepare")
        sights = self.look(normal)
        by_policy = level is None and bool(settings.merge)
        if level is None:
            level = self.partition(normal, settings, sights)
        if self.config.vit.policy_features:
            sights.run()  # or the dense model's encoder would be charged for it
        clock.lap("policy")
        segmented = self.encode(
            normal, level, settings=settings, sights=sights, reducers=reducers, lap=clock.lap
        )
        labels = [one.cpu().numpy() for one in self.label_maps(segmented)]
        clock.lap("unmerge")
        milliseconds = {stage: time / len(pictures) for stage, time in clock.read().items()}
        layers = layer_of_cells(segmented.tokens, len(self.encoder.blocks))
        rows = [self.token_use(segmented, layers, index) for index in range(len(pictures))]
        return [
            Result(
                labels=labels[index],
                class_names=self.config.classes,
                palette=self.config.palette,
                tokens=use,
                cost=self.cost_of(segmented, index, policy=by_policy),
                dense_cost=self.dense_cost(segmented.sizes[index]),
                patch=self.patch,
                milliseconds=dict(milliseconds),
            )
            for index, use in enumerate(rows)
        ]

    def token_use(self, segmented: Segmented, layers: Tensor, index: int) -> TokenUse:
        """Where the tokens of picture ``index`` of a batch went; ``layers (B, H, W)``."""
        height, width = grid_of(segmented.sizes[index], self.patch)
        prefix, depth = self.tokenise.prefix_count, len(self.encoder.blocks)
        tokens = segmented.tokens
        halted = dict.fromkeys(self.exits.after, 0)
        if tokens.halted is not None:
            own = tokens.halted.anchor // tokens.owner[0].numel() == index
            counts = torch.bincount(tokens.halted.layer[own], minlength=depth).tolist()
            halted = {after: counts[after] for after in self.exits.after}
        level = segmented.level[index, :height, :width]
        layer_map = layers[index, :height, :width]
        return TokenUse(
            grid=height * width,
            start=segmented.live[0][index] - prefix,
            end=int(tokens.offsets.diff()[index]) - prefix,
            halted=halted,
            level=level.cpu().numpy(),
            layer=layer_map.to(torch.int16).cpu().numpy(),
            depth=depth,
            owner=first_cells(tokens.owner[index, :height, :width].cpu().numpy()),
            live=tuple(rows[index] - prefix for rows in segmented.live),
        )

    def cost_of(self, segmented: Segmented, index: int, *, policy: bool) -> Cost:
        """Compute of picture ``index`` of a batch, from the rows that each block really saw."""
        live = [rows[index] for rows in segmented.live]
        end = int(segmented.tokens.offsets.diff()[index])
        exits = segmented.tokens.halted is not None
        total = self._cost(segmented.sizes[index], live, end, policy=policy, exits=exits)
        if self.tokenise.sub_patches is None:
            return total
        # The side path embeds every patch inside a superpatch, and projects their mean.
        merged = segmented.level[index].clamp(min=0)
        patches, supertokens = int((merged > 0).sum()), int(token_counts(merged[merged > 0][None]))
        aside = self._embed_macs * patches
        aside += cost.linear_macs(self.tokenise.sub_patches) * supertokens
        return replace(total, embed=total.embed + aside / cost.GIGA)

    def dense_cost(self, size: tuple[int, int]) -> Cost:
        """Compute of a picture of ``size`` (h, w) without policy, merging and exits."""
        height, width = grid_of(size, self.patch)
        rows = height * width + self.tokenise.prefix_count
        return self._cost(size, [rows] * len(self.encoder.blocks), rows, policy=False, exits=False)

    def _cost(
        self, size: tuple[int, int], live: Sequence[int], end: int, *, policy: bool, exits: bool
    ) -> Cost:
        embedded = live[0] - self.tokenise.prefix_count
        policy_macs = 0
        if policy or self.config.vit.policy_features:
            policy_macs = self.policy.macs(size, scores=policy)
        return Cost(
            policy=policy_macs / cost.GIGA,
            embed=(self._embed_macs + self._context_macs) * embedded / cost.GIGA,
            blocks=cost.blocks_macs(
                list(self.encoder.blocks), live, size_bias=self.config.vit.size_bias
            )
            / cost.GIGA,
            exits=(cost.exits_macs(self.exits, live) if exits else 0) / cost.GIGA,
            decoder=cost.decoder_macs(self.decoder, end) / cost.GIGA,
        )

    @property
    def _context_macs(self) -> int:
        return cost.linear_macs(self.tokenise.context) if self.tokenise.context is not None else 0

    @cached_property
    def _embed_macs(self) -> int:
        return cost.embed_macs(self.tokenise.embed, self.patch + 2 * self.tokenise.margin)

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        config: dict[str, Any] | None = None,
    ) -> "Segmenter":
        """Load safetensors, and nothing else: the mixin's own method may unpickle."""
        if config is None:
            raise TokenstepError(f"{model_id}: holds no model ({CONFIG} is missing)")
        if Path(model_id).is_dir():
            path = Path(model_id) / WEIGHTS
        else:
            path = Path(
                hf_hub_download(
                    model_id,
                    WEIGHTS,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        model = cls(from_dict(ModelConfig, config, f"{model_id}/{CONFIG}"))
        model.load_weights(path)
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the settings as they are now, then the weights, each whole or not at all."""
        text = json.dumps(dataclasses.asdict(self.config), indent=1)
        write_text(save_directory / CONFIG, text + "\n")
        save_weights(self, save_directory / WEIGHTS)

    def generate_model_card(self, *_: object, **__: object) -> ModelCard:
        """The README that a folder gets if it has none."""
        return ModelCard(model_card(self.config))


class _Clock:
    """Milliseconds per stage; on a GPU by events, so that no stage waits for its own end."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.stages: list[str] = []
        self.marks: list[Any] = [self._mark()]

    def _mark(self) -> Any:
        if not self.cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def lap(self, stage: str) -> None:
        """End a stage."""
        self.stages.append(stage)
        self.marks.append(self._mark())

    def read(self) -> dict[str, float]:
        """Milliseconds of each stage."""
        if self.cuda:
            self.marks[-1].synchronize()
            times = [start.elapsed_time(end) for start, end in pairwise(self.marks)]
        else:
            times = [1000 * (end - start) for start, end in pairwise(self.marks)]
        return dict(zip(self.stages, times, strict=True))
