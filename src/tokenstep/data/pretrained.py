"""Weights that a training starts from: a safetensors file, named by the user or on timm's hub.

Nothing is ever unpickled, and nothing loads in part without a word.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenstep.errors import TokenstepError

# What a file can make of timm's loading, which converts the formats of many sources.
_FAULTS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError)
_FLOATS = ("F64", "F32", "F16", "BF16")
_MOST = 3  # parameters that an error names

Create = Callable[[dict[str, Any]], Any]  # timm.create_model, handed a pretrained_cfg_overlay


@dataclass(frozen=True, slots=True)
class Published:
    """What timm says of a model's weights: their repository on the hub, their mean and std."""

    hub: str | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file; ``source`` is its name without the folder, or its id on the hub."""

    path: Path
    source: str
    sha256: str


def find_weights(pretrained: bool | str, option: str, published: Published) -> WeightFile | None:
    """The weights that ``option`` of a recipe asks for; None for a random start.

    Raises:
        TokenstepError: the file is no safetensors file, or damaged, or cannot be fetched.
    """
    if pretrained is False:
        return None
    if isinstance(pretrained, str):
        path = Path(pretrained)
        return open_weights(path, option, path.name)
    remedy = f'fetch a safetensors file by other means and set {option} = "FILE.safetensors"'
    if not published.hub:
        raise TokenstepError(f"{option} = true: timm knows no weights on the hub; {remedy}")
    name, _, revision = published.hub.partition("@")
    try:
        fetched = hf_hub_download(name, "model.safetensors", revision=revision or None)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise TokenstepError(
            f"{option} = true: model.safetensors of {name} cannot be fetched ({reason}); {remedy}"
        ) from error
    return open_weights(Path(fetched), option, published.hub)


def open_weights(path: Path, option: str, source: str) -> WeightFile:
    """A file of weights with its digest.

    Raises:
        TokenstepError: it is no safetensors file, or damaged.
    """
    if path.suffix != ".safetensors":
        raise TokenstepError(
            f"{path}: {option} takes .safetensors files only: convert it with "
            "safetensors.torch.save_file and name the new file"
        )
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise TokenstepError(f"{path}: is no file: name a .safetensors file in {option}")
    try:
        held = _shapes(path)  # which finds damage before anything is built
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, SafetensorError) as error:
        raise TokenstepError(
            f"{path}: cannot be read as safetensors ({error}): fetch it again, or name another "
            f"file in {option}"
        ) from error
    if not held:  # of which timm would think that no file is given, and ask the hub
        raise TokenstepError(f"{path}: holds no weights: name another file in {option}")
    whole = _of_whole_numbers(path)
    if whole:  # as of a quantised model: cast to floats they would be other weights
        raise TokenstepError(
            f"{path}: {whole} holds whole numbers: name floating-point weights in {option}"
        )
    return WeightFile(path, source, digest)


def load_into(create: Create, weights: WeightFile, unused: tuple[str, ...] = ()) -> Any:
    """The model that ``create`` builds, loaded by timm from a file.

    Every parameter and statistic must come from the file, but for those whose names start as
    ``unused`` does. What else the file holds, as later blocks and a head, is left out.

    Raises:
        TokenstepError: the file lacks some, or they do not fit.
    """
    # timm drops its strictness where the number of classes differs, as it must for another depth.
    common: dict[str, Any] = {"custom_load": False, "num_classes": 1}
    try:
        with _quiet():
            # What timm makes of each name is its own business: it is told apart by NaN.
            probe = create({**common, "state_dict": _blank(weights.path)})
            _require_loaded(probe, weights.path, unused)
            model = create({**common, "file": str(weights.path)})
    except _FAULTS as error:
        reason = " ".join(str(error).split())[:200]
        raise TokenstepError(
            f"{weights.path}: does not fit the model ({reason}): name weights of the same model"
        ) from error
    for name, value in model.state_dict().items():
        if not bool(value.isfinite().all()):
            raise TokenstepError(f"{weights.path}: {name} is not finite: name other weights")
    return model


def _require_loaded(probe: Any, path: Path, unused: tuple[str, ...]) -> None:
    """Refuse a file from which some parameter of a model was not filled with NaN."""
    used = {
        name: value
        for name, value in probe.state_dict().items()
        if value.is_floating_point() and not name.startswith(unused)
    }
    lacking = [name for name, value in used.items() if not bool(value.isnan().all())]
    if lacking:
        some = ", ".join(lacking[:_MOST]) + (", ..." if len(lacking) > _MOST else "")
        raise TokenstepError(
            f"{path}: lacks {len(lacking)} of {len(used)} tensors of the model ({some}): name "
            "weights of the same model, under timm's names"
        )


def _shapes(path: Path) -> dict[str, list[int]]:
    with safe_open(path, "pt") as held:
        return {name: held.get_slice(name).get_shape() for name in held.keys()}  # noqa: SIM118


def _of_whole_numbers(path: Path) -> str:
    """The first matrix of a file that is not of floating-point numbers; empty if none is."""
    with safe_open(path, "pt") as held:
        for name in held.keys():  # noqa: SIM118
            part = held.get_slice(name)
            if len(part.get_shape()) > 1 and part.get_dtype() not in _FLOATS:
                return str(name)
    return ""


def _blank(path: Path) -> dict[str, Tensor]:
    """A state of the shapes of a file, all NaN, which takes no memory; named as timm reads it."""
    return {
        _plain(name): torch.full((), torch.nan).expand(shape)
        for name, shape in _shapes(path).items()
    }


def _plain(name: str) -> str:
    """A name without what torch's wrappers put before it, which timm takes off a file's names."""
    for wrapper in ("_orig_mod.", "module.", "_orig_mod."):
        name = name.removeprefix(wrapper)
    return name


@contextmanager
def _quiet() -> Iterator[None]:
    """Without timm's list of what a file holds beside; what it lacks is found here."""
    logger = logging.getLogger("timm.models._builder")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
