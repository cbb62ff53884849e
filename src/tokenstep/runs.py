"""The folder of a training run: whose it is, and the weights that are written and read there."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenstep.config import PolicyConfig, from_dict
from tokenstep.data import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.pictures import write_text, write_whole
from tokenstep.recipes import same_run
from tokenstep.segmenter import WEIGHTS

RECIPE = "recipe.json"


def claim(out: Path, recipe: dict[str, Any], *, write: bool = True) -> None:
    """Write the resolved recipe into ``out``, before anything is trained there.

    Raises:
        TokenstepError: ``out`` holds weights of another recipe, or takes no files.
    """
    path = out / RECIPE
    if os.path.isfile(path) and (any(out.glob("phase*/*")) or os.path.isfile(out / WEIGHTS)):
        try:
            same = same_run(json.loads(path.read_text()), recipe)
        except (OSError, ValueError, AttributeError):
            same = False
        if not same:
            raise TokenstepError(
                f"{out}: holds a run of another recipe: choose another out, or remove it"
            )
    if write:
        save_json(recipe, path)


def digest_of_pictures(folder: LabelledFolder) -> str:
    """Tells labelled folders apart, by their classes and the names of their pictures."""
    held = [folder.classes.names, [path.name for path in folder.paths]]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def digest_of_weights(folder: Path) -> str:
    """Tells policies apart, by the file of weights that :func:`load_policy` reads."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_policy(folder: Path) -> tuple[PolicyConfig, dict[str, Tensor], int]:
    """Settings, weights and patch of a policy that was trained in ``folder``.

    Raises:
        TokenstepError: the folder holds no such policy.
    """
    try:
        recipe = json.loads((folder / RECIPE).read_text())
        state = load_file(folder / WEIGHTS)
        patch, config = int(recipe["patch"]), recipe["policy"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TokenstepError(
            f"{folder}: holds no trained policy ({error}): run tokenstep train policy first"
        ) from error
    return from_dict(PolicyConfig, config, str(folder / RECIPE)), state, patch


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a phase that was killed, if it has one.

    Raises:
        TokenstepError: the file is damaged. It is read here, so that no fault of the training
            itself is taken for one of the file.
    """
    last = folder / "last.ckpt"
    if not last.is_file():
        return None
    try:
        torch.load(last, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged files torch raises errors of nearly any type
        raise _damaged(last) from error
    return last


def load_weights(network: nn.Module, path: Path) -> None:
    """Load what :func:`save_weights` wrote.

    Raises:
        TokenstepError: the file is damaged, or of a network of another shape.
    """
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> TokenstepError:
    return TokenstepError(f"{path}: is damaged, or of another run: remove it to train that again")


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's state as safetensors, whole or not at all.

    Raises:
        TokenstepError: a value is not finite, or the folder does not take the file.
    """
    state = {
        name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()
    }
    broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise TokenstepError(f"{path}: not written, {broken[0]} is not finite: lower lr")
    write_whole(path, lambda temporary: save_file(state, temporary))


def save_json(data: object, path: Path) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
