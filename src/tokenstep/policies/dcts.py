"""Stage 1 of 6: picture -> homogeneity scores, one map per superpatch size (dCTS).

STEP (arXiv 2509.14165) merges 2x2 to 16x16 patches where a light CNN is sure that they show one
class; the trunk, pyramid and heads here are ours (CTS, CVPR 2023, used EfficientNet-Lite0).
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenstep.config import PolicyConfig
from tokenstep.core.partition import Grid, grid_of, halved, level_of
from tokenstep.data.pretrained import Published, WeightFile, load_into
from tokenstep.errors import TokenstepError
from tokenstep.policies.base import Policy
from tokenstep.policies.cnn_cost import Growth, count_at, growth_of
from tokenstep.policies.folded import folded, has_hooks, state_of

STRIDE = 32  # the picture is padded to whole strides, so that every trunk's maps line up


@dataclass(frozen=True, slots=True)
class PolicyFeatures:
    """What the policy's CNN makes of pictures of one size."""

    maps: list[Tensor]  # features of the trunk, fine to coarse
    fused: Tensor  # (B, width, ...) on the grid of the finest superpatches
    grid: Grid  # (H, W) patches of the pictures
    whole: Grid  # the same, rounded up to superpatches of the coarsest size


class DCTS(Policy):
    """Scores how surely each superpatch shows one class, by ``trunk`` or an untrained CNN.

    Raises:
        ValueError: the trunk is no timm CNN with these stages, or a size is no power of two.
    """

    def __init__(self, config: PolicyConfig, patch: int, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.patch = patch
        if not config.sizes or not config.stages:
            raise ValueError("the policy needs at least one superpatch size and one stage")
        for size in config.sizes:
            level_of(size)
        self.trunk = build_trunk(config) if trunk is None else trunk
        width = config.width
        channels = cast(Any, self.trunk).feature_info.channels()
        self.lateral = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.smooth = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.is_folded = False
        self._folded: tuple[Hashable, DCTS] | None = None
        # Homogeneity is "no boundary anywhere inside": the maximum finds one, the mean weighs it.
        self.heads = nn.ModuleList(nn.Conv2d(2 * width, 1, 1) for _ in config.sizes)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Score ``images (B, 3, h, w)``, normalised; one logit map ``(B, H // s, W // s)`` a size.

        ``H`` and ``W`` are the patch grid, rounded up; what hangs over is padded with the border.
        """
        return self.score(self.features(images))

    def features(self, images: Tensor) -> PolicyFeatures:
        """Run the CNN on ``images (B, 3, h, w)``, normalised."""
        grid = grid_of(images.shape[2:], self.patch)
        whole = self.whole(grid)
        read = self.read(images, whole)
        # Channels last in memory, as is then all that the CNN makes of it: on a CPU half the time.
        maps = list(self.trunk(read.contiguous(memory_format=torch.channels_last)))
        return PolicyFeatures(maps, self.fuse(maps, whole), grid, whole)

    def for_use(self) -> "DCTS":
        """The same without batch norms, made anew whenever a part or a weight has changed.

        It is itself where somebody listens to a part by a hook.
        """
        if self.is_folded or has_hooks(self):
            return self
        state, known = (state_of(self), id(self.config)), self._folded
        if known is not None and known[0] == state:
            return known[1]
        weight = next(self.parameters())
        drawn = torch.Generator().manual_seed(0)
        picture = torch.rand(1, 3, 2 * STRIDE, 2 * STRIDE, generator=drawn)

        def run(copied: DCTS) -> list[Tensor]:
            seen = copied.features(picture.to(weight))
            return [*seen.maps, seen.fused]

        lean = folded(self, run)
        lean.is_folded = True
        self._folded = (state, lean)
        return lean

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or pickled: all but what :meth:`for_use` makes."""
        return {**self.__dict__, "_folded": None}

    def score(self, features: PolicyFeatures) -> list[Tensor]:
        """Logit maps of :meth:`forward` from the features."""
        grid, fused = features.grid, features.fused
        scores = []
        finest = min(self.config.sizes)
        for size, head in zip(self.config.sizes, self.heads, strict=True):
            ratio = size // finest
            pooled = torch.cat([F.max_pool2d(fused, ratio), F.avg_pool2d(fused, ratio)], dim=1)
            score = head(pooled).squeeze(1)
            scores.append(score[:, : grid[0] // size, : grid[1] // size])
        return scores

    def macs(self, size: tuple[int, int], *, scores: bool = True) -> int:
        """Multiply-adds on a picture of ``size`` (h, w); without ``scores``, of the features."""
        rows, columns = self.whole(grid_of(size, self.patch))
        finest = min(self.config.sizes)
        smooth = cast(nn.Conv2d, self.smooth[0]).weight.numel()
        total = self._pyramid_macs(self.strides((rows, columns)))
        total += smooth * (rows // finest) * (columns // finest)
        if not scores:
            return total
        heads = zip(self.config.sizes, cast(Iterable[nn.Conv2d], self.heads), strict=True)
        return total + sum(
            head.weight.numel() * (rows // side) * (columns // side) for side, head in heads
        )

    def require_growth(self) -> None:
        """Refuse a trunk whose compute has no formula, before it is trained.

        Raises:
            TokenstepError: names the trunk.
        """
        if self._growth is None:
            raise TokenstepError(
                f"policy trunk {self.config.trunk!r}: its compute does not grow with the area of "
                "its maps: choose a CNN without attention"
            )

    def _pyramid_macs(self, strides: Grid) -> int:
        """Multiply-adds of the trunk and of the layers that read its maps."""
        if self._growth is not None:
            return self._growth.at(strides)
        # A trunk with attention, in a model of an earlier version: counted once per size.
        if strides not in self._counted:
            pyramid = _Pyramid(self.trunk, self.lateral)
            self._counted[strides] = count_at(pyramid, STRIDE, strides)
        return self._counted[strides]

    @cached_property
    def _growth(self) -> Growth | None:
        return growth_of(_Pyramid(self.trunk, self.lateral), STRIDE)

    @cached_property
    def _counted(self) -> dict[Grid, int]:
        return {}

    @property
    def channels(self) -> int:
        """Channels of :meth:`on_grid`."""
        trunk: list[int] = cast(Any, self.trunk).feature_info.channels()
        return self.config.width + sum(trunk)

    def on_grid(self, features: PolicyFeatures) -> Tensor:
        """The features on the patch grid: ``(B, channels, H, W)``."""
        height, width = features.grid
        scaled = [
            F.interpolate(maps, features.whole, mode="bilinear", align_corners=False)
            for maps in (features.fused, *features.maps)
        ]
        return torch.cat(scaled, dim=1)[:, :, :height, :width]

    def whole(self, grid: Grid) -> Grid:
        """The grid in whole superpatches of the coarsest size.

        So every map is an exact pooling of one.
        """
        coarsest = max(self.config.sizes)
        rows, columns = (-(-side // coarsest) * coarsest for side in grid)
        return rows, columns

    def strides(self, whole: Grid) -> tuple[int, int]:
        """Strides down and across that are read of ``whole`` patches."""
        scale = self.config.scale
        down, across = (max(1, round(side * self.patch * scale / STRIDE)) for side in whole)
        return down, across

    def read(self, images: Tensor, whole: Grid) -> Tensor:
        """Pad to ``whole`` patches and scale to the resolution that the policy reads at."""
        height, width = images.shape[2:]
        full = (whole[0] * self.patch, whole[1] * self.patch)
        padding = (0, full[1] - width, 0, full[0] - height)
        padded = F.pad(images, padding, mode="replicate") if any(padding) else images
        target = tuple(count * STRIDE for count in self.strides(whole))
        if target == full:
            return padded
        if all(side % new == 0 for side, new in zip(full, target, strict=True)):
            step = (full[0] // target[0], full[1] // target[1])
            return halved(padded) if step == (2, 2) else F.avg_pool2d(padded, step)
        # In fp32, since the CPU has no antialiased half-precision kernel.
        scaled = F.interpolate(padded.float(), target, mode="bilinear", antialias=True)
        return scaled.to(images.dtype)

    def fuse(self, maps: list[Tensor], whole: Grid) -> Tensor:
        """Fuse the trunk's maps top-down onto the grid of the finest superpatch size."""
        finest = min(self.config.sizes)
        target = (whole[0] // finest, whole[1] // finest)
        fused: Tensor | None = None
        for lateral, features in reversed(list(zip(self.lateral, maps, strict=True))):
            level = lateral(features)
            if fused is not None:
                level = level + _resize(fused, (level.shape[2], level.shape[3]))
            fused = level
        assert fused is not None
        return cast(Tensor, self.smooth(_resize(fused, target)))


class _Pyramid(nn.Module):
    """The part of the policy whose maps have the sides of the trunk's."""

    def __init__(self, trunk: nn.Module, lateral: nn.ModuleList) -> None:
        super().__init__()
        self.trunk = trunk
        self.lateral = lateral

    def forward(self, images: Tensor) -> list[Tensor]:
        return [
            lateral(features)
            for lateral, features in zip(self.lateral, self.trunk(images), strict=True)
        ]


def build_trunk(config: PolicyConfig, weights: WeightFile | None = None) -> nn.Module:
    """Build the timm CNN whose ``stages`` feed the pyramid, from ``weights`` if there are any.

    Raises:
        ValueError: timm knows no such model, it takes pictures of one size only, or it lacks a
            stage.
        TokenstepError: the weights lack a part of these stages, or do not fit.
    """
    _require_known(config.trunk)
    create = partial(
        timm.create_model,
        config.trunk,
        features_only=True,
        feature_cls="getter",  # which also prunes the stages behind the last one that is used
        out_indices=config.stages,
    )
    try:
        trunk: nn.Module = create(pretrained=False)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"policy trunk {config.trunk!r} has no such stages {config.stages}: {error}"
        ) from error
    if weights is None:
        return trunk
    loaded: nn.Module = load_into(
        lambda overlay: create(pretrained=True, pretrained_cfg_overlay=overlay), weights
    )
    return loaded


def published_trunk(name: str) -> Published:
    """What timm says of the weights of a CNN, those of the tag in ``name`` if it has one.

    Raises:
        ValueError: timm knows no such model or tag, or it takes pictures of one size only.
    """
    said = _require_known(name)
    return Published(said.hf_hub_id, said.mean, said.std)


def _require_known(name: str) -> Any:
    """What timm knows of a CNN's weights."""
    try:
        known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError as error:  # the part of the name behind the point
        raise ValueError(f"policy trunk {name!r} is not known: {error}") from error
    if known is None or known.fixed_input_size:
        raise ValueError(f"policy trunk {name!r} is not a timm CNN that takes pictures of any size")
    return known


def _resize(features: Tensor, target: tuple[int, int]) -> Tensor:
    """Bilinear upwards, average downwards."""
    if features.shape[2:] == torch.Size(target):
        return features
    if all(old >= new for old, new in zip(features.shape[2:], target, strict=True)):
        return F.adaptive_avg_pool2d(features, target)
    return F.interpolate(features, target, mode="bilinear", align_corners=False)
