"""What a host is: a ViT that somebody trained, in what packed tokens need of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenstep.core.attention import Attend, Backend
from tokenstep.core.partition import Grid
from tokenstep.core.ragged import Segments
from tokenstep.core.tokens import PackedTokens

T = TypeVar("T")

Learned = nn.Module | nn.Parameter | None


class HostBlock(Protocol):
    """One block of a host, in two halves, so that a reducer may act between them."""

    @property
    def heads(self) -> int:
        """Heads of its attention."""
        ...

    @property
    def first(self) -> nn.Module:
        """The module that it runs first: where its time begins."""
        ...

    def attention(self, x: Tensor, attend: Attend, rotary: Tensor | None) -> Tensor:
        """Features ``(T, D)`` after attention, whose queries, keys and values ``attend`` takes.

        ``rotary`` is what :meth:`Host.rotary` says of these rows.
        """
        ...

    def mlp(self, x: Tensor, segments: Segments) -> Tensor:
        """Features ``(T, D)`` after the MLP; ``segments`` says which rows are whose."""
        ...

    def macs(self, rows: int, left: int, *, size_bias: bool) -> int:
        """Multiply-adds where attention sees ``rows`` rows of a picture and the MLP ``left``."""
        ...


class Host(Protocol):
    """A ViT. It is no module itself: two stages of a segmenter hold what it learned.

    They take the parts of :meth:`before` and :meth:`behind` by their names, and hand themselves
    in wherever these are used. So whatever is done to a stage (moved, loaded, replaced) is done.
    ``patch`` is the side of a patch and ``margin`` how far around a patch its embedding reads,
    both in pixels; ``prefix`` counts CLS and register rows, ``dim`` features.
    """

    patch: int
    margin: int
    prefix: int
    dim: int

    def before(self) -> Mapping[str, Learned]:
        """What it learned for use before its blocks, by name: the parts of the ``stem``."""
        ...

    def behind(self) -> Mapping[str, Learned]:
        """Its blocks and what it learned for use behind them, by name: the ``trunk``'s parts."""
        ...

    def embed(self, stem: Any, windows: Tensor) -> Tensor:
        """Windows ``(n, 3, k, k)`` of normalised pixels, a patch and its margin -> ``(n, D)``."""
        ...

    def embed_grid(self, stem: Any, canvas: Tensor) -> Tensor:
        """The same of all patches of pictures at once: canvas -> ``(B, H, W, D)``.

        ``canvas`` is ``(B, 3, H * patch + 2 * margin, W * patch + 2 * margin)``. What cannot do
        better than window by window returns :func:`by_windows`.
        """
        ...

    def prefix_rows(self, stem: Any) -> Tensor:
        """CLS and register rows with their positions, ``(prefix, D)``."""
        ...

    def positions(self, stem: Any, grid: Grid) -> Tensor | None:
        """Position embedding of the cells of a grid, ``(1, D, H, W)``, if it is added to them."""
        ...

    def rotary(self, trunk: Any, tokens: PackedTokens) -> Tensor | None:
        """By what queries and keys of each row are turned, ``(T, ...)``; None if by nothing."""
        ...

    def enter(self, stem: Any, x: Tensor) -> Tensor:
        """What happens to rows ``(..., D)`` before the first block: norm, dropout."""
        ...

    def blocks(self, trunk: Any) -> Sequence[HostBlock]:
        """Its blocks, first to last."""
        ...

    def norm(self, trunk: Any, x: Tensor) -> Tensor:
        """The norm behind the last block."""
        ...


def kept_by_chance(
    branch: Tensor, segments: Segments, chance: float, *, scale: bool = True
) -> Tensor:
    """Stochastic depth: drop a branch ``(T, D)`` with ``chance``, picture by picture.

    ``scale`` makes up for it where it is kept.
    """
    kept = branch.new_empty(len(segments.lengths)).bernoulli_(1 - chance)
    if scale:
        kept = kept / (1 - chance)
    return branch * kept[segments.picture].unsqueeze(1)


def by_windows(host: Host, stem: Any, canvas: Tensor) -> Tensor:
    """Every patch of ``canvas`` by ``host.embed``, ``(B, H, W, D)``: windows overlap by margins."""
    extent = host.patch + 2 * host.margin
    # (B, H, W, 3, k, k)
    windows = canvas.unfold(2, extent, host.patch).unfold(3, extent, host.patch).movedim(1, 3)
    return torch.unflatten(host.embed(stem, windows.flatten(0, 2)), 0, windows.shape[:3])


@dataclass(frozen=True, slots=True)
class BlockSettings:
    """How blocks run over packed tokens; none of it changes a weight."""

    backend: Backend = "auto"
    size_bias: bool = False  # a supertoken weighs as much in attention as its patches
    checkpointing: bool = False  # recompute each block in the backward pass to save memory

    def run(self, half: Callable[[Tensor, T], Tensor], x: Tensor, aside: T) -> Tensor:
        """Run one half of a block on ``x (T, D)``, now or again in the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(half, x, aside, use_reentrant=False)
            return recomputed
        return half(x, aside)
