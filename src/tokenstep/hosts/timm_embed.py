"""Stage 2 of 6, its first half: windows of pixels -> features, the patch embedding."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearEmbed(nn.Module):
    """A convolution as wide as a patch, on patches ``(n, 3, p, p)`` that were cut out before."""

    margin = 0
    convolves = True

    def __init__(self, proj: nn.Conv2d, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.proj = proj
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, windows: Tensor) -> Tensor:
        """``(n, 3, p, p)`` -> ``(n, D)``."""
        weight = self.proj.weight.flatten(1)
        return cast(Tensor, self.norm(F.linear(windows.flatten(1), weight, self.proj.bias)))

    def on_grid(self, canvas: Tensor) -> Tensor:
        """All patches of ``canvas (B, 3, H * p, W * p)`` -> ``(B, H, W, D)``."""
        stride = self.proj.weight.shape[-1]
        maps = F.conv2d(canvas, self.proj.weight, self.proj.bias, stride=stride)
        return cast(Tensor, self.norm(maps.movedim(1, -1)))


class ConvEmbed(nn.Module):
    """A small convolutional stem on each patch and half a patch around it; ours.

    It helps a ViT that is trained from scratch on few pictures to see edges (early convolutions,
    arXiv 2106.14881). Cut per patch, so that it costs nothing for patches that were merged away.

    Raises:
        ValueError: the patch is too small, or leads to another number of positions.
    """

    def __init__(self, patch: int, dim: int, width: int = 32) -> None:
        super().__init__()
        self.margin = patch // 2
        step = patch // 4
        self.convolves = patch % 4 == 0  # else the windows' own grids do not meet
        if patch % 2 or step == 0 or not 7 <= 2 * patch // step - 1 <= 8:
            raise ValueError(f"the conv stem runs on patches of 4, 8, 14, 16 or 32 px, not {patch}")
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 2 * step, stride=step),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(2 * width * 9, dim),  # two patches / step = 8 positions -> 7 -> 3 a side
            nn.LayerNorm(dim),
        )

    def forward(self, windows: Tensor) -> Tensor:
        """``(n, 3, 2p, 2p)`` -> ``(n, D)``."""
        # Channels last in memory: on a CPU the convolutions take a third less time.
        return cast(Tensor, self.layers(windows.contiguous(memory_format=torch.channels_last)))

    def on_grid(self, canvas: Tensor) -> Tensor:
        """All patches of ``canvas (B, 3, H * p + p, W * p + p)`` -> ``(B, H, W, D)``.

        Windows overlap by half a patch on each side, so they share their convolutions.
        """
        x = self.layers[:4](canvas)
        # The layer that reads the 3 x 3 positions of a patch, as a convolution over all of them.
        linear = cast(nn.Linear, self.layers[5])
        weight = linear.weight.view(len(linear.weight), -1, 3, 3)
        x = F.conv2d(x, weight, linear.bias, stride=2)
        return cast(Tensor, self.layers[6](x.movedim(1, -1)))
