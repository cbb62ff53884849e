"""Pictures in, results out: the model as users meet it, with save and load."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tokenstep import cost
from tokenstep.config import ModelConfig, Settings, from_dict
from tokenstep.cost import Cost
from tokenstep.errors import TokenstepError
from tokenstep.model.unmerge import layer_of_cells
from tokenstep.network import StepNetwork
from tokenstep.pictures import Picture, picture_tensor
from tokenstep.result import Result, Segmented, TokenUse
from tokenstep.transforms import to_float

WEIGHTS = "model.safetensors"


class StepSegmenter(
    StepNetwork, PyTorchModelHubMixin, library_name="tokenstep", tags=["image-segmentation"]
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
        self, pictures: Picture | Sequence[Picture], *, settings: Settings | None = None
    ) -> Result | list[Result]:
        """Segment one picture, or a list of them as one batch; sizes may differ.

        A picture is a path, a PIL image, an ``(H, W, 3)`` uint8 array, or a ``(3, H, W)`` tensor
        (uint8, or float in 0..1). One picture gives a :class:`Result`, a list gives a list.
        ``settings`` default to the model's own; ``Settings()`` is the dense model.

        Raises:
            TokenstepError: a picture cannot be read, or the logits are not finite.
        """
        if isinstance(pictures, Sequence) and not isinstance(pictures, str):
            return self.segment_batch(pictures, settings=settings)
        return self.segment_batch([pictures], settings=settings)[0]

    @torch.inference_mode()
    def segment_batch(
        self,
        pictures: Sequence[Picture],
        *,
        settings: Settings | None = None,
        level: Tensor | None = None,
    ) -> list[Result]:
        """:meth:`segment` for a list; times are the batch's, divided by its pictures.

        ``level (B, H, W)`` replaces the policy's partition, for comparisons.
        """
        settings = self.config.settings if settings is None else settings
        device = cast(Tensor, self.mean).device
        clock = _Clock(device, len(pictures))
        normal = self.normalise([to_float(picture_tensor(one)).to(device) for one in pictures])
        clock.lap("prepare")
        by_policy = level is None and bool(settings.merge)
        if level is None:
            level = self.partition(normal, settings)
        clock.lap("policy")
        segmented = self.encode(normal, level, settings=settings)
        clock.lap("encode")
        labels = [one.cpu().numpy() for one in self.label_maps(segmented)]
        clock.lap("decode")
        rows = [self.token_use(segmented, index) for index in range(len(pictures))]
        return [
            Result(
                labels=labels[index],
                class_names=self.config.classes,
                palette=self.config.palette,
                tokens=use,
                cost=self.cost_of(segmented, index, policy=by_policy),
                dense_cost=self.dense_cost(segmented.sizes[index]),
                patch=self.patch,
                milliseconds=clock.laps,
            )
            for index, use in enumerate(rows)
        ]

    def token_use(self, segmented: Segmented, index: int) -> TokenUse:
        """Where the tokens of picture ``index`` of a batch went."""
        height, width = self.tokenise.grid_of(torch.empty(segmented.sizes[index], device="meta"))
        prefix, depth = self.tokenise.prefix_count, len(self.encoder.blocks)
        tokens = segmented.tokens
        halted = dict.fromkeys(self.exits.after, 0)
        if tokens.halted is not None:
            own = tokens.halted.anchor // tokens.owner[0].numel() == index
            for layer in tokens.halted.layer[own].tolist():
                halted[layer] += 1
        level = segmented.level[index, :height, :width]
        layer_map = layer_of_cells(tokens, depth)[index, :height, :width]
        return TokenUse(
            grid=height * width,
            start=segmented.live[0][index] - prefix,
            end=int(tokens.offsets.diff()[index]) - prefix,
            halted=halted,
            level=level.cpu().numpy(),
            layer=layer_map.to(torch.int16).cpu().numpy(),
            depth=depth,
        )

    def cost_of(self, segmented: Segmented, index: int, *, policy: bool) -> Cost:
        """Compute of picture ``index`` of a batch, from the rows that each block really saw."""
        live = [rows[index] for rows in segmented.live]
        end = int(segmented.tokens.offsets.diff()[index])
        used_exits = segmented.tokens.halted is not None
        return self._cost(segmented.sizes[index], live, end, policy=policy, exits=used_exits)

    def dense_cost(self, size: tuple[int, int]) -> Cost:
        """Compute of a picture of ``size`` (h, w) without policy, merging and exits."""
        height, width = self.tokenise.grid_of(torch.empty(size, device="meta"))
        rows = height * width + self.tokenise.prefix_count
        return self._cost(size, [rows] * len(self.encoder.blocks), rows, policy=False, exits=False)

    def _cost(
        self, size: tuple[int, int], live: Sequence[int], end: int, *, policy: bool, exits: bool
    ) -> Cost:
        embedded = live[0] - self.tokenise.prefix_count
        policy_macs = cost.policy_macs(self.config.policy, self.patch, size) if policy else 0
        return Cost(
            policy=policy_macs / cost.GIGA,
            embed=self._embed_macs * embedded / cost.GIGA,
            blocks=cost.blocks_macs(list(self.encoder.blocks), live) / cost.GIGA,
            exits=(cost.exits_macs(self.exits, live) if exits else 0) / cost.GIGA,
            decoder=cost.decoder_macs(self.decoder, end) / cost.GIGA,
        )

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
        config: dict[str, Any],
    ) -> "StepSegmenter":
        """Load safetensors, and nothing else: the mixin's own method may unpickle."""
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
        model = cls(from_dict(ModelConfig, config, f"{model_id}/config.json"))
        model.load_weights(path)
        return model.eval()

    def load_weights(self, path: Path) -> None:
        """Fill every parameter from a safetensors file; other dtypes are converted.

        Raises:
            TokenstepError: the file is missing, damaged, or does not fit the model.
        """
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise TokenstepError(
                f"{path}: cannot read the weights ({error}): fetch or save the model again"
            ) from error
        try:
            self.load_state_dict(state, strict=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise TokenstepError(
                f"{path}: the weights do not fit config.json beside them ({reason}): use the two "
                "files that were saved together"
            ) from error


class _Clock:
    """Milliseconds per stage and picture; waits for a GPU so that each stage owns its time."""

    def __init__(self, device: torch.device, pictures: int) -> None:
        self.device = device
        self.pictures = pictures
        self.laps: dict[str, float] = {}
        self.last = perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = perf_counter()
        self.laps[stage] = (now - self.last) * 1000 / self.pictures
        self.last = now


SHIPPED = Path(__file__).parent / "weights"


def shipped_models() -> list[str]:
    """Names of the models in the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def load(name: str | os.PathLike[str]) -> StepSegmenter:
    """Load a model by a shipped name, a folder, or a Hugging Face repository id.

    Raises:
        TokenstepError: there is no such model, or its files are damaged.
    """
    path = Path(name)
    if not path.is_dir() and str(name) in shipped_models():
        path = SHIPPED / str(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise TokenstepError(f"{path}: holds no model (config.json is missing)")
    elif str(name).count("/") != 1 or str(name).startswith((".", "/")):
        known = ", ".join(shipped_models())
        raise TokenstepError(
            f"model {str(name)!r} is not known: choose a shipped one ({known}), a folder that "
            "holds config.json and model.safetensors, or a Hugging Face id OWNER/NAME"
        )
    source = str(path) if path.is_dir() else str(name)
    try:
        return StepSegmenter.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TokenstepError(f"model {source}: cannot be loaded ({reason})") from error
