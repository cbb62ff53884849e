"""Stage 3 of 6: PackedTokens -> PackedTokens through a host's blocks, reducers in between."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from tokenstep.core.attention import Attend, Attended, Hidden
from tokenstep.core.ragged import rows_of
from tokenstep.core.tokens import PackedTokens
from tokenstep.hosts.base import BlockSettings, Host, HostBlock
from tokenstep.reducers.base import Decision, Reducer, apply, staying

Rows = tuple[int, ...]  # of each picture


@dataclass(frozen=True, slots=True)
class Asked:
    """One asking of a reducer: in which block, what it decided, and each picture's rows around."""

    reducer: Reducer
    block: int
    decision: type[Decision]
    before: Rows
    after: Rows


@dataclass(frozen=True, slots=True)
class Trace:
    """The rows of each picture, prefix rows too, wherever they may change in number."""

    attention: list[Rows] = field(default_factory=list)  # that entered each block
    mlp: list[Rows] = field(default_factory=list)  # that entered its MLP
    prefix: list[int] = field(default_factory=list)  # of these, rows without a cell
    asked: list[Asked] = field(default_factory=list)


class Joining(Protocol):
    """What a model does before some of its blocks: rows join, or are hidden from others."""

    def __call__(self, tokens: PackedTokens, block: int) -> tuple[PackedTokens, Hidden | None]:
        """The tokens that enter ``block`` (1 = first), and which keys are hidden in it."""
        ...


class Encoder(nn.Module):
    """The blocks and final norm of a host, over packed tokens of any lengths."""

    def __init__(self, host: Host, settings: BlockSettings) -> None:
        super().__init__()
        self.host = host
        for name, part in host.behind().items():
            setattr(self, name, part)
        self.settings = settings

    def host_blocks(self) -> Sequence[HostBlock]:
        """The blocks as their host runs them, first to last."""
        return self.host.blocks(self)

    def forward(
        self,
        tokens: PackedTokens,
        reducers: Sequence[Reducer] = (),
        joining: Joining | None = None,
    ) -> tuple[PackedTokens, Trace]:
        """Run all blocks; also return how many rows went where.

        Before each block ``joining`` is asked, and in it every reducer in turn, at its own site.
        What was dropped rejoins at the end, and the final norm is applied to all that is left.
        """
        trace, settings = Trace(), self.settings
        between = [reducer for reducer in reducers if reducer.site == "attention"]
        behind = [reducer for reducer in reducers if reducer.site == "block"]
        rotary, rows, hidden = None, None, None
        for number, block in enumerate(self.host_blocks(), start=1):
            if joining is not None:
                tokens, hidden = joining(tokens, number)
            segments = tokens.segments
            if tokens.anchor is not rows:  # some have left or merged
                rotary, rows = self.host.rotary(self, tokens), tokens.anchor
            trace.attention.append(segments.lengths)
            trace.prefix.append(tokens.prefix)
            cells = tokens.size if settings.size_bias else None
            attend = Attend(
                segments,
                cells=cells,
                backend=settings.backend,
                keep=bool(between),
                hidden=hidden,
            )
            attention = partial(block.attention, rotary=rotary)
            tokens = tokens.with_features(settings.run(attention, tokens.x, attend))
            tokens = _reduced(tokens, between, trace, attend.seen)
            trace.mlp.append(tokens.segments.lengths)
            tokens = tokens.with_features(settings.run(block.mlp, tokens.x, tokens.segments))
            tokens = _reduced(tokens, behind, trace)
        tokens = tokens.rejoined()
        return tokens.with_features(self.host.norm(self, tokens.x)), trace


def largest_of(trunk: nn.Module) -> Tensor:
    """The largest weight of the linear layers of a trunk: of an MLP, as ViTs are."""
    weights = [part.weight for part in trunk.modules() if isinstance(part, nn.Linear)]
    return max(weights, key=Tensor.numel)


def _reduced(
    tokens: PackedTokens,
    reducers: Sequence[Reducer],
    trace: Trace,
    seen: Attended | None = None,
) -> PackedTokens:
    """Ask reducers in turn, in the block that ``trace`` is at; each sees what the last left."""
    block = len(trace.attention)
    for reducer in reducers:
        decision = reducer(tokens, block, seen)
        if decision is None:
            continue
        before, tokens = tokens.segments.lengths, apply(decision, tokens, block)
        after = tokens.segments
        trace.asked.append(Asked(reducer, block, type(decision), before, after.lengths))
        if seen is not None:
            seen = seen.of_rows(rows_of(staying(decision), after.total), after)
    return tokens
