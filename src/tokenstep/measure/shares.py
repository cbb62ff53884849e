"""Where tokens were saved on average, as shares of a grid; and the budget that saves as much."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from tokenstep.config import Budget, Thresholds
from tokenstep.from_dict import from_dict
from tokenstep.model.segmented import TokenUse


class Shares:
    """Means per picture of the shares of its grid that merged, and of the tokens that halted."""

    def __init__(self) -> None:
        self.pictures = 0
        self.merged: defaultdict[int, float] = defaultdict(float)  # shares of a grid, by side
        self.halted: defaultdict[int, float] = defaultdict(float)  # tokens over patches, by exit

    def add(self, use: TokenUse) -> None:
        """Count one picture."""
        self.pictures += 1
        for level, cells in Counter(use.level.flatten().tolist()).items():
            self.merged[1 << level] += cells / use.grid
        for after, tokens in use.halted.items():
            self.halted[after] += tokens / use.grid

    def report(self) -> dict[str, dict[str, float]]:
        """The means, with keys as JSON has them."""
        return {"merge": self._means(self.merged), "exits": self._means(self.halted)}

    def _means(self, sums: Mapping[int, float]) -> dict[str, float]:
        return {str(key): sums[key] / self.pictures for key in sorted(sums)}


def budget_of(report: Mapping[str, Mapping[str, float]], thresholds: Thresholds) -> Budget:
    """The budget whose shares are those of the report of ``thresholds``."""
    # Cut off, not rounded: shares that fill the grid would sum to more than all of it.
    shares: dict[str, Any] = {
        part: {key: int(1e5 * share) / 1e5 for key, share in report[part].items() if share}
        for part in ("merge", "exits")
    }
    shares["merge"].pop("1", None)  # patches that stay alone
    other = {"spare": thresholds.spare, "reducers": thresholds.reducers}
    return from_dict(Budget, shares | other, "budget")
