"""Weights on disk: safetensors only, written whole or not at all."""

from pathlib import Path

from safetensors.torch import save
from torch import nn

from tokenstep.data.whole_files import write_whole
from tokenstep.errors import TokenstepError


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's state as safetensors.

    Raises:
        TokenstepError: a value is not finite, or the folder does not take the file.
    """
    state = {
        name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()
    }
    broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise TokenstepError(f"{path}: not written, {broken[0]} is not finite: lower lr")
    # As bytes: safetensors' own file is hidden from the group, and its faults are of its own kind.
    content = save(state)
    write_whole(path, lambda temporary: temporary.write_bytes(content))
