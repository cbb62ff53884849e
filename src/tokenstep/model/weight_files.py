"""Weights on disk: safetensors only, written whole or not at all."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
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


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill every parameter from a safetensors file; other dtypes are converted.

    Raises:
        TokenstepError: the file is missing, damaged, or does not fit the network.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TokenstepError(
            f"{path}: cannot read the weights ({error}): fetch or save the model again"
        ) from error
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise TokenstepError(
            f"{path}: the weights do not fit config.json beside them ({reason}): use the two "
            "files that were saved together"
        ) from error
