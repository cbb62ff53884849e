"""What the tokens of a picture did and cost where a processor cuts it into crops."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tokenstep.model.cost import Cost
from tokenstep.model.segmented import TokenUse, first_cells


def whole_grid(pixels: tuple[int, int], patch: int, depth: int) -> TokenUse:
    """Where the tokens of a dense picture are: each patch is one, in all blocks."""
    grid = (pixels[0] // patch, pixels[1] // patch)
    count = grid[0] * grid[1]
    return TokenUse(
        grid=count,
        start=count,
        end=count,
        halted={},
        level=np.zeros(grid, np.int8),
        layer=np.full(grid, depth, np.int16),
        dropped=np.zeros(grid, np.bool_),
        depth=depth,
        owner=np.arange(count, dtype=np.int64).reshape(grid),
        live=(count,) * depth,
    )


def beside(uses: Sequence[TokenUse]) -> TokenUse:
    """Where the tokens of the crops of a picture went, their maps side by side."""
    first = uses[0]
    if len(uses) == 1:
        return first
    # Tokens of two crops have names of their own.
    owners = [use.owner + place * first.owner.size for place, use in enumerate(uses)]
    return replace(
        first,
        grid=sum(use.grid for use in uses),
        start=sum(use.start for use in uses),
        end=sum(use.end for use in uses),
        level=np.concatenate([use.level for use in uses], axis=1),
        layer=np.concatenate([use.layer for use in uses], axis=1),
        dropped=np.concatenate([use.dropped for use in uses], axis=1),
        owner=first_cells(np.concatenate(owners, axis=1)),
        live=tuple(map(sum, zip(*(use.live for use in uses), strict=True))),
    )


def total(costs: Sequence[Cost]) -> Cost:
    """The compute of the crops of a picture together."""
    names = ("policy", "embed", "blocks", "exits", "decoder", "reducers")
    return Cost(**{name: sum(getattr(cost, name) for cost in costs) for name in names})
