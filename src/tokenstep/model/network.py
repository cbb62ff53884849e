"""The pipeline in one forward: pictures -> partition -> tokens -> encoder -> logits."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenstep.config import ModelConfig, Thresholds
from tokenstep.core import partition as superpatches
from tokenstep.core.attention import Backend
from tokenstep.core.tokens import PackedTokens
from tokenstep.core.unmerge import rows_of_cells
from tokenstep.data.augment import to_float
from tokenstep.errors import TokenstepError
from tokenstep.hosts.timm_vit import build_vit
from tokenstep.model.decode import LinearDecoder, MaskDecoder, label_map
from tokenstep.model.encoder import BlockSettings, Encoder, require_supported
from tokenstep.model.result import Segmented
from tokenstep.model.supertokens import ConvEmbed, LinearEmbed, Tokeniser
from tokenstep.policies.dcts import Policy, PolicyFeatures
from tokenstep.reducers.base import Halt, Reducer
from tokenstep.reducers.exits import EarlyPruning, ExitHeads

CPU_PIXELS = 3 * 2**19  # pixels that the policy looks at together on a CPU

Pictures = Tensor | Sequence[Tensor]
Lap = Callable[[str], None]  # told the name of each stage when it ends


def untimed(stage: str) -> None:
    """The lap of a pipeline that nobody times."""


class Sights:
    """What the policy sees of a batch; its CNN runs once, when it is first asked for.

    Pictures of one size go through the CNN together; a picture padded to another's size would be
    seen differently at its border. On a CPU large ones go one by one: together, what the CNN makes
    of them leaves the caches. The policy is never trained through here: no gradient.
    """

    def __init__(self, policy: Policy, normal: Sequence[Tensor]) -> None:
        self.policy = policy
        self.normal = normal

    @cached_property
    def groups(self) -> list[tuple[list[int], PolicyFeatures]]:
        """Places in the batch of pictures of one size, and what was seen of them."""
        groups = []
        with torch.no_grad():
            for members in self._together():
                alike = [self.normal[index][None] for index in members]
                # A copy of large pictures costs what a small convolution does.
                sight = self.policy.look(alike[0] if len(alike) == 1 else torch.cat(alike))
                groups.append((members, sight))
        return groups

    def _together(self) -> list[list[int]]:
        """Places of the pictures that go through the CNN at a time."""
        alike: dict[torch.Size, list[int]] = {}
        for index, picture in enumerate(self.normal):
            alike.setdefault(picture.shape, []).append(index)
        if self.normal[0].device.type != "cpu":
            return list(alike.values())
        turns = []
        for (_, height, width), members in alike.items():
            count = max(1, CPU_PIXELS // (height * width))
            turns += [members[first : first + count] for first in range(0, len(members), count)]
        return turns

    def run(self) -> None:
        """Run the CNN now."""
        _ = self.groups

    @torch.no_grad()
    def context(self) -> dict[superpatches.Grid, Tensor]:
        """Features ``(n, channels, H, W)`` of the pictures of each grid, in their order."""
        context = {}
        for grid in dict.fromkeys(sight.grid for _, sight in self.groups):
            own = [(members, sight) for members, sight in self.groups if sight.grid == grid]
            if len(own) == 1:
                context[grid] = self.policy.features(own[0][1])
                continue
            order = sorted(index for members, _ in own for index in members)
            # Channels last in memory: a cell's features side by side.
            shape = (len(order), *grid, self.policy.channels)
            context[grid] = own[0][1].fused.new_empty(shape).movedim(-1, 1)
            for members, sight in own:
                places = [order.index(member) for member in members]
                context[grid][places] = self.policy.features(sight)
        return context


class Segmenter(nn.Module):
    """A plain ViT segmenter with dCTS supertokens and early pruning: tensors in, logits out.

    Raises:
        ValueError: the backbone has a part that packed tokens cannot run, by name; or the
            exits do not lie between its blocks.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        classes = len(config.classes)
        vit = build_vit(config.vit)
        require_supported(vit)
        patch = int(vit.patch_embed.patch_size[0])
        self.patch = patch
        dim, cells = int(vit.embed_dim), config.vit.cells
        run = BlockSettings(size_bias=config.vit.size_bias)
        embed: nn.Module = LinearEmbed(vit.patch_embed)
        if config.vit.stem == "conv":
            embed = ConvEmbed(patch, dim)
        self.policy = Policy(config.policy, patch)
        context = self.policy.channels if config.vit.policy_features else 0
        self.tokenise = Tokeniser(vit, embed, sub_patches=config.vit.sub_patches, context=context)
        self.encoder = Encoder(vit, run)
        depth = len(vit.blocks)
        if list(config.vit.exits) != sorted({*config.vit.exits} & {*range(1, depth)}):
            raise ValueError(
                f"exits must be rising counts of blocks from 1 to {depth - 1}, "
                f"got {config.vit.exits} for {depth} blocks"
            )
        self.exits = ExitHeads(config.vit.exits, dim, classes, cells)
        self.decoder: nn.Module = LinearDecoder(dim, classes, cells)
        if config.vit.decoder == "mask":
            heads = vit.blocks[0].attn.num_heads
            self.decoder = MaskDecoder(dim, classes, cells, heads=heads, thresholds=run)
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    def forward(
        self,
        pictures: Pictures,
        *,
        thresholds: Thresholds | None = None,
        level: Tensor | None = None,
        reducers: Sequence[Reducer] = (),
    ) -> Segmented:
        """Segment ``pictures``: ``(B, 3, h, w)`` or a list of ``(3, h, w)``, RGB.

        They are uint8, or float in 0..1.

        ``thresholds`` default to the model's own; ``level (B, H, W)`` replaces the policy's
        partition; ``reducers`` are asked after each block before the exits are.
        """
        thresholds = self.config.thresholds if thresholds is None else thresholds
        normal = self.normalise(pictures)
        sights = self.look(normal)
        level = self.partition(normal, thresholds, sights) if level is None else level
        return self.encode(normal, level, thresholds=thresholds, sights=sights, reducers=reducers)

    def normalise(self, pictures: Pictures) -> list[Tensor]:
        """Subtract the mean and divide by the standard deviation, picture by picture.

        uint8 pictures are scaled to 0..1 first.
        """
        mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
        normal = []
        for picture in pictures:
            scaled = to_float(picture).to(mean.dtype)
            # The caller's own floats stay as they are.
            centred = scaled.sub_(mean) if picture.dtype == torch.uint8 else scaled - mean
            normal.append(centred.div_(std))
        return normal

    def look(self, normal: Sequence[Tensor]) -> Sights:
        """Prepare what the policy sees of normalised pictures; it runs when it is asked for."""
        return Sights(self.policy, normal)

    def partition(
        self, normal: Sequence[Tensor], thresholds: Thresholds, sights: Sights | None = None
    ) -> Tensor:
        """The policy's partition ``(B, H, W)`` of normalised pictures; none without merging."""
        grids = [superpatches.grid_of(picture.shape[-2:], self.patch) for picture in normal]
        level = superpatches.uniform(grids, normal[0].device)
        if not thresholds.merge:
            return level
        sights = self.look(normal) if sights is None else sights
        for members, sight in sights.groups:
            height, width = sight.grid
            level[members, :height, :width] = superpatches.from_scores(
                self.scores(sight),
                self.config.policy.sizes,
                thresholds.merge,
                level[members, :height, :width],
            )
        return level

    @torch.no_grad()
    def scores(self, sight: PolicyFeatures) -> list[Tensor]:
        """Homogeneity of each superpatch in 0..1, ``(B, H // s, W // s)`` per size, no gradient.

        Raises:
            TokenstepError: the scores are not finite; they would pass for "merge nothing".
        """
        scores = [score.float().sigmoid() for score in self.policy.score(sight)]
        if not torch.stack([score.isfinite().all() for score in scores]).all():
            raise TokenstepError(
                "the policy produced NaN scores: run it in fp32, or check its weights"
            )
        return scores

    def encode(
        self,
        normal: Sequence[Tensor],
        level: Tensor,
        *,
        thresholds: Thresholds,
        sights: Sights | None = None,
        reducers: Sequence[Reducer] = (),
        lap: Lap = untimed,
    ) -> Segmented:
        """Embed, run the blocks and exits, and classify the tokens of normalised pictures."""
        context = None
        if self.config.vit.policy_features:
            sights = self.look(normal) if sights is None else sights
            context = sights.context()
        tokens = self.tokenise(normal, level, context)
        lap("embed")
        pruning = None
        if thresholds.exits:
            temperatures = self.config.temperatures
            pruning = EarlyPruning(
                self.exits, thresholds.exits, thresholds.spare, temperatures=temperatures
            )
        timed = _TimedExits(self.exits.after, pruning, lap)
        tokens, live = self.encoder(tokens, [*reducers, timed])
        timed.end(len(live))
        logits = self.decoder(tokens)
        lap("decode")
        sizes = tuple((picture.shape[-2], picture.shape[-1]) for picture in normal)
        return Segmented(tokens, logits, level, tuple(live), sizes)

    def label_maps(self, segmented: Segmented) -> list[Tensor]:
        """Class of every pixel of each picture, ``(h, w)`` uint8.

        Raises:
            TokenstepError: the logits are not finite.
        """
        halted = segmented.tokens.halted
        every = [segmented.logits] if halted is None else [segmented.logits, halted.logits]
        # One NaN or infinity makes the sum one; a mask of all logits would cost memory.
        if not all(bool(part.sum(dtype=torch.float64).isfinite()) for part in every):
            raise TokenstepError(
                "the model produced NaN or infinite logits: run it in fp32, or check its weights"
            )
        rows = rows_of_cells(segmented.tokens)
        maps = []
        for index, size in enumerate(segmented.sizes):
            height, width = superpatches.grid_of(size, self.patch)
            maps.append(
                label_map(
                    every,
                    rows[index, :height, :width],
                    segmented.level[index, :height, :width],
                    patch=self.patch,
                    size=size,
                )
            )
        return maps

    def use(self, *, backend: Backend = "auto", checkpointing: bool = False) -> None:
        """Choose the attention back end, and whether blocks are recomputed in the backward pass."""
        run = replace(self.encoder.settings, backend=backend, checkpointing=checkpointing)
        self.encoder.settings = run
        if isinstance(self.decoder, MaskDecoder):
            self.decoder.settings = run

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

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; the policy is never trained here and stays in eval mode.

        The statistics of its norms would drift otherwise.
        """
        super().train(mode)
        self.policy.eval()
        return self


class _TimedExits:
    """Prunes early if it is to, and tells of each group of blocks up to an exit, and of each exit.

    A group's time holds what other reducers do in it.
    """

    def __init__(self, after: Sequence[int], pruning: EarlyPruning | None, lap: Lap) -> None:
        self.after = after
        self.pruning = pruning
        self.lap = lap
        self.first = 1

    def __call__(self, tokens: PackedTokens, blocks_run: int) -> Halt | None:
        if blocks_run not in self.after:
            return None
        self.end(blocks_run)
        if self.pruning is None:
            return None
        decision = self.pruning(tokens, blocks_run)
        self.lap(f"exit {blocks_run}")
        return decision

    def end(self, last: int) -> None:
        """Tell of the blocks since the last exit."""
        self.lap(f"blocks {self.first}-{last}")
        self.first = last + 1
