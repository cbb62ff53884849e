"""Helpers of the tests: random weights that hide nothing, random partitions, naive readings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenstep.core import partition
from tokenstep.core.partition import Grid
from tokenstep.core.ragged import Segments
from tokenstep.core.tokens import PackedTokens
from tokenstep.core.unmerge import unmerge
from tokenstep.model.segmented import Segmented


@torch.no_grad()
def scramble(module: nn.Module) -> None:
    """Give every parameter a random value, those too that start at zero or one."""
    for name, parameter in module.named_parameters():
        if name.endswith(("pos_embed", "cls_token", "reg_token")):
            parameter.normal_(std=0.5)
        elif parameter.ndim < 2:
            parameter.add_(torch.randn_like(parameter) * 0.3)
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)


def random_partition(grids: list[Grid], sizes: tuple[int, ...] = (2, 4)) -> Tensor:
    """A partition with superpatches of all sizes, drawn picture by picture."""
    level = partition.uniform(grids)
    for own, (height, width) in zip(level, grids, strict=True):
        scores = [torch.rand(1, height // size, width // size) for size in sizes]
        empty = partition.uniform([(height, width)])
        thresholds = [0.5] * len(sizes)
        own[:height, :width] = partition.by_threshold(
            scores, empty, sizes=sizes, thresholds=thresholds
        )[0]
    return level


def grid_tokens(grids: list[Grid], dim: int = 5, prefix: int = 1) -> PackedTokens:
    """Unmerged tokens of pictures of ``grids``, with random features."""
    owner = torch.full((len(grids), *(max(side) for side in zip(*grids, strict=True))), -1)
    anchors, lengths = [], []
    for index, (height, width) in enumerate(grids):
        flat = torch.arange(owner.numel()).view_as(owner)[index, :height, :width]
        owner[index, :height, :width] = flat
        anchors += [torch.full((prefix,), -1), flat.flatten()]
        lengths.append(prefix + flat.numel())
    anchor = torch.cat(anchors)
    return PackedTokens(
        x=torch.randn(len(anchor), dim),
        segments=Segments.of(torch.tensor([0, *lengths]).cumsum(0)),
        size=torch.ones_like(anchor),
        anchor=anchor,
        owner=owner,
        prefix=prefix,
        grids=tuple(grids),
    )


def cell_logits(segmented: Segmented, index: int, grid: Grid) -> Tensor:
    """Logits of one picture of a batch on its grid of sub-cells, ``(H * s, W * s, C)``."""
    tokens = segmented.tokens
    spread = unmerge(tokens, segmented.logits, segmented.partition)
    side = spread.shape[1] // segmented.partition.shape[1]
    return spread[index, : grid[0] * side, : grid[1] * side]


def halt(tokens: PackedTokens, done: Tensor, logits: Tensor, layer: int) -> PackedTokens:
    """Halt the rows of a drawn mask that are no prefix rows; ``logits`` are those of all rows."""
    done = done & ~tokens.is_prefix
    return tokens.halt(done, lambda x: logits[done], layer)


def machine_says(monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str]) -> None:
    """Have Linux tell of its memory and its container by ``files`` alone: name -> content."""
    read = Path.read_text

    def told(path: Path, *args: Any, **options: Any) -> str:
        if not str(path).startswith(("/proc/meminfo", "/sys/fs/cgroup")):
            return read(path, *args, **options)
        if str(path) not in files:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", told)
