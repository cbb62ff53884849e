"""Counts what a GPU would be told to do: operations, and trips to the host that it waits for.

Counted on a CPU, by the name of each operation. Views are free: nothing is launched for them.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# A tensor's numbers go to the host; `tolist` and `numpy` show as the first.
SYNCS = {
    *("resolve_conj", "item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero"),
    *("unique", "_unique", "_unique2", "unique_dim", "masked_select", "bincount"),
}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Operations(TorchDispatchMode):
    """Counts operations and syncs while the ``with`` lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Operations of all kinds."""
        return sum(self.operations.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.__name__.partition(".")[0]
        out = func(*args, **(kwargs or {}))
        if not self._is_view(func, args, out):
            self.operations[name] += 1
        by_mask = name in INDEXED and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in SYNCS or by_mask or unsized:
            self.syncs[name] += 1
        return out

    @staticmethod
    def _is_view(func: Any, args: Any, out: object) -> bool:
        """Whether what came out lies in the memory of what went in, unchanged."""
        made = list(out) if isinstance(out, (tuple, list)) else [out]
        read = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        inside = all(
            isinstance(one, Tensor) and one.untyped_storage().data_ptr() in read for one in made
        )
        return bool(made) and inside and not func._schema.is_mutable
