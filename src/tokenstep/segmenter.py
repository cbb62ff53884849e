"""The pipeline in one forward: picture -> partition -> tokens -> encoder -> logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenstep.config import ModelConfig, Settings, VitConfig, from_dict
from tokenstep.errors import TokenstepError
from tokenstep.model import superpatches
from tokenstep.model.decode import LinearDecoder, MaskDecoder, label_map
from tokenstep.model.encoder import Encoder, EncoderSettings, require_supported
from tokenstep.model.exits import EarlyPruning, ExitHeads
from tokenstep.model.policy import Policy
from tokenstep.model.supertokens import ConvEmbed, LinearEmbed, Tokeniser, sincos_positions
from tokenstep.model.unmerge import rows_of_cells, token_values
from tokenstep.reducers.base import Reducer
from tokenstep.tokens import PackedTokens

WEIGHTS = "model.safetensors"
Pictures = Tensor | Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Segmented:
    """What a forward returns: logits of every token, and where each token speaks."""

    tokens: PackedTokens  # after the last block
    logits: Tensor  # (T + A, S, C): live rows, then halted ones
    level: Tensor  # (B, H, W) int8, the partition
    live: tuple[tuple[int, ...], ...]  # rows of each picture that entered each block
    sizes: tuple[tuple[int, int], ...]  # (h, w) of each picture


class StepSegmenter(
    nn.Module, PyTorchModelHubMixin, library_name="tokenstep", tags=["image-segmentation"]
):
    """A plain ViT segmenter with dCTS supertokens and early pruning (STEP, arXiv 2509.14165).

    Raises:
        ValueError: the backbone has a part that packed tokens cannot run, by name.
    """

    # The annotation is a string so that the hub mixin hands config.json over as a plain dict:
    # its own conversion knows neither nested settings nor tuples.
    def __init__(self, config: "ModelConfig") -> None:
        super().__init__()
        self.config = config
        classes = len(config.classes)
        vit = build_vit(config.vit)
        require_supported(vit)
        patch = int(vit.patch_embed.patch_size[0])
        self.patch = patch
        dim, cells = int(vit.embed_dim), config.vit.cells
        run = EncoderSettings(size_bias=config.vit.size_bias)
        embed: nn.Module = LinearEmbed(vit.patch_embed)
        if config.vit.stem == "conv":
            embed = ConvEmbed(patch, dim)
        self.policy = Policy(config.policy, patch)
        self.tokenise = Tokeniser(vit, embed, sub_patches=config.vit.sub_patches)
        self.encoder = Encoder(vit, run)
        self.exits = ExitHeads(config.vit.exits, dim, classes, cells)
        self.decoder: nn.Module = LinearDecoder(dim, classes, cells)
        if config.vit.decoder == "mask":
            heads = vit.blocks[0].attn.num_heads
            self.decoder = MaskDecoder(dim, classes, cells, heads=heads, settings=run)
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    def forward(
        self,
        pictures: Pictures,
        *,
        settings: Settings | None = None,
        level: Tensor | None = None,
        observers: Sequence[Reducer] = (),
    ) -> Segmented:
        """Segment ``pictures``: ``(B, 3, h, w)`` or a list of ``(3, h, w)``, float RGB in 0..1.

        ``settings`` default to the model's own; ``level (B, H, W)`` replaces the policy's
        partition; ``observers`` are asked after each block before the exits are.
        """
        settings = self.config.settings if settings is None else settings
        normal = self.normalise(pictures)
        level = self.partition(normal, settings) if level is None else level
        return self.encode(normal, level, settings=settings, observers=observers)

    def normalise(self, pictures: Pictures) -> list[Tensor]:
        """Subtract the mean and divide by the standard deviation, picture by picture."""
        mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
        return [(picture.to(mean.dtype) - mean) / std for picture in pictures]

    def partition(self, normal: Sequence[Tensor], settings: Settings) -> Tensor:
        """The policy's partition ``(B, H, W)`` of normalised pictures; none without merging."""
        grids = [self.tokenise.grid_of(picture) for picture in normal]
        level = superpatches.uniform(grids, normal[0].device)
        if not settings.merge:
            return level
        # Pictures of one size go through the CNN together; a picture padded to another's size
        # would be scored differently at its border.
        shapes = [picture.shape for picture in normal]
        for shape in dict.fromkeys(shapes):
            members = [index for index, other in enumerate(shapes) if other == shape]
            height, width = grids[members[0]]
            scores = self.scores(torch.stack([normal[index] for index in members]))
            level[members, :height, :width] = superpatches.from_scores(
                scores, self.config.policy.sizes, settings.merge, level[members, :height, :width]
            )
        return level

    @torch.no_grad()
    def scores(self, images: Tensor) -> list[Tensor]:
        """Homogeneity of each superpatch in 0..1, ``(B, H // s, W // s)`` per size, no gradient."""
        return [score.float().sigmoid() for score in self.policy(images)]

    def encode(
        self,
        normal: Sequence[Tensor],
        level: Tensor,
        *,
        settings: Settings,
        observers: Sequence[Reducer] = (),
    ) -> Segmented:
        """Embed, run the blocks and exits, and classify the tokens of normalised pictures."""
        tokens = self.tokenise(normal, level)
        reducers = list(observers)
        if settings.exits:
            reducers.append(EarlyPruning(self.exits, settings.exits, settings.spare))
        tokens, live = self.encoder(tokens, reducers)
        logits = self.decoder(tokens)
        halted = tokens.halted.logits if tokens.halted is not None else None
        sizes = tuple((picture.shape[-2], picture.shape[-1]) for picture in normal)
        return Segmented(tokens, token_values(logits, halted), level, tuple(live), sizes)

    def label_maps(self, segmented: Segmented) -> list[Tensor]:
        """Class of every pixel of each picture, ``(h, w)`` uint8.

        Raises:
            TokenstepError: the logits are not finite.
        """
        if not bool(torch.isfinite(segmented.logits).all()):
            raise TokenstepError(
                "the model produced NaN or infinite logits: run it in fp32, or check its weights"
            )
        rows = rows_of_cells(segmented.tokens)
        maps = []
        for index, size in enumerate(segmented.sizes):
            height, width = (-(-side // self.patch) for side in size)
            maps.append(
                label_map(
                    segmented.logits,
                    rows[index, :height, :width],
                    segmented.level[index, :height, :width],
                    patch=self.patch,
                    size=size,
                )
            )
        return maps

    def train(self, mode: bool = True) -> "StepSegmenter":
        """Set the training mode; a frozen policy stays in eval mode, or its statistics drift."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.policy.parameters()):
            self.policy.eval()
        return self

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


def build_vit(config: VitConfig) -> Any:
    """timm's ViT, untrained; its position table starts as sine and cosine.

    Raises:
        ValueError: timm knows no such model.
    """
    if config.name not in timm.list_models():
        raise ValueError(
            f"backbone {config.name!r} is not a timm model, see timm.list_models('vit_*')"
        )
    overrides: dict[str, object] = {
        "patch_size": config.patch,
        "depth": config.depth,
        "img_size": config.image_size,
        "drop_path_rate": config.drop_path,
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    vit = timm.create_model(config.name, pretrained=False, num_classes=0, **given)
    table = getattr(vit, "pos_embed", None)
    if table is not None and table.shape[-1] % 4 == 0:
        cells = vit.patch_embed.num_patches
        with torch.no_grad():
            # As strong as timm's random start is wide, times the few that a pattern needs.
            table[:, -cells:] = 0.1 * sincos_positions(vit.patch_embed.grid_size, table.shape[-1])
    return vit
