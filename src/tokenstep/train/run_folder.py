"""The folder of a training run: whose it is, and the weights that are written and read there."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenstep.config import HALF, Channels, InitialWeights, PolicyConfig
from tokenstep.data.digests import changes, of_folder
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.data.whole_files import sweep, write_text
from tokenstep.errors import TokenstepError
from tokenstep.from_dict import from_dict
from tokenstep.model.card import model_card
from tokenstep.model.config import ModelConfig
from tokenstep.model.folder import WEIGHTS
from tokenstep.model.renamed import with_new_keys
from tokenstep.train.card import run_card
from tokenstep.train.recipe import PolicyRecipe, SegmenterRecipe, differences, resolved

RECIPE = "recipe.json"
DATA = "data.json"  # what the training files held
SCORES = "val.json"
VAL = "val_data.json"  # what the files held that SCORES are of
_RECORDS = ("digests", "initial")  # what RECIPE holds beside the recipe
_REMEDY = "choose another out, or remove it"
_MOST = 4  # differences that an error names


@dataclass(frozen=True)
class Basis:
    """What a run builds on beside its pictures: digests that hold it to the same files.

    ``policy`` is of the policy's weights, ``initial`` of those that its own network starts from:
    None where it starts at random, or where a complete run's were not looked at.
    """

    policy: str = ""
    initial: InitialWeights | None = None


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy as a segmenter takes it: settings and weights, and what it was trained for."""

    config: PolicyConfig
    state: dict[str, Tensor]
    patch: int
    normal: tuple[Channels, Channels]  # mean and std
    initial: InitialWeights | None


def begun(out: Path) -> bool:
    """Whether a training has written weights in a folder."""
    return any(out.glob("phase*/*")) or os.path.isfile(out / WEIGHTS)


def claim(
    out: Path,
    recipe: PolicyRecipe | SegmenterRecipe,
    folder: LabelledFolder,
    found: Mapping[str, str],
    *,
    basis: Basis = Basis(),
    write: bool = True,
) -> bool:
    """Make ``out`` the folder of this training, before anything is trained; whether it is complete.

    The resolved recipe and what the files of ``folder`` hold, as the digests ``found``, are
    written there, and what a killed process left half-written is removed.

    Raises:
        TokenstepError: ``out`` holds a run of another recipe or of other data, or takes no files.
    """
    digests = {"pictures": digest_of_pictures(folder)}
    digests |= {"policy": basis.policy} if basis.policy else {}
    initial = basis.initial
    held = of_folder(folder, found)
    if begun(out):
        _require_same_run(out, recipe, digests, initial)
        initial = initial or initial_of(out)
        if os.path.isfile(out / DATA) and (changed := changes(read_json(out / DATA), held)):
            raise TokenstepError(f"{out}: was trained on other data ({changed}): {_REMEDY}")
    if write:
        for place in (out, *out.glob("phase*")):
            sweep(place)
        records = {"initial": asdict(initial)} if initial else {}
        save_json(resolved(recipe, digests=digests, **records), out / RECIPE)
        save_json(held, out / DATA)
    return os.path.isfile(out / WEIGHTS)


def _require_same_run(
    out: Path,
    recipe: PolicyRecipe | SegmenterRecipe,
    digests: dict[str, str],
    initial: InitialWeights | None,
) -> None:
    """Refuse a folder whose recipe, weights at the start or names of pictures are not these."""
    path = out / RECIPE
    if not os.path.isfile(path):
        return
    try:
        before = read_json(path)
        differ = differences(_without_records(before), recipe)
        was = {**digests, **before.get("digests", {})}
    except (TypeError, TokenstepError) as error:
        raise TokenstepError(
            f"{out}: holds a run of another recipe ({path.name}: {error}): {_REMEDY}"
        ) from error
    if was.get("policy") != digests.get("policy"):
        differ.append("the weights in policy_weights")
    part = recipe.policy if isinstance(recipe, PolicyRecipe) else recipe.vit
    started = initial_of(out)
    known = initial is None or started is None or initial.sha256 == started.sha256
    if (part.pretrained is False) != (started is None) or not known:
        option = "policy" if isinstance(recipe, PolicyRecipe) else "vit"
        differ.append(f"the weights in {option}.pretrained")
    # Of runs of versions that recorded no more than names; see DATA for the others.
    if was["pictures"] != digests["pictures"] and not os.path.isfile(out / DATA):
        differ.append("the names of the pictures")
    if differ:
        some = ", ".join(differ[:_MOST]) + (", ..." if len(differ) > _MOST else "")
        raise TokenstepError(f"{out}: holds a run of another recipe ({some}): {_REMEDY}")


def scored(
    out: Path, held: Mapping[str, str], measured: Callable[[], dict[str, Any]], *, fresh: bool
) -> dict[str, Any]:
    """The scores on val in a run's folder, ``measured`` where there are none of these files.

    ``held`` is what the files of val hold; ``fresh`` weights have no scores yet.

    Raises:
        TokenstepError: the file of the scores is damaged, or takes no new ones.
    """
    # A run of a version that recorded no contents has the scores that it has.
    known = read_json(out / VAL) if os.path.isfile(out / VAL) else held
    if not fresh and known == held and os.path.isfile(out / SCORES):
        return read_json(out / SCORES)
    scores = measured()
    save_json(scores, out / SCORES)
    save_json(held, out / VAL)
    return scores


def card_of(folder: Path, config: ModelConfig) -> str:
    """The card of the segmenter in a folder, with the recipe and the scores if it is a run's.

    Raises:
        TokenstepError: its recipe or its scores are damaged.
    """
    if not os.path.isfile(folder / RECIPE):
        return model_card(config)
    read = _without_records(read_json(folder / RECIPE))
    where = str(folder / RECIPE)
    recipe = from_dict(SegmenterRecipe, with_new_keys(read, where), where)
    scores = read_json(folder / SCORES) if os.path.isfile(folder / SCORES) else {}
    return run_card(recipe, config, scores)


def _without_records(read: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in read.items() if key not in _RECORDS}


def initial_of(out: Path) -> InitialWeights | None:
    """What the network of a run started from, as the run's recipe records it; None: at random.

    Raises:
        TokenstepError: the record is damaged.
    """
    path = out / RECIPE
    held = read_json(path).get("initial") if os.path.isfile(path) else None
    return None if held is None else from_dict(InitialWeights, held, str(path))


def digest_of_pictures(folder: LabelledFolder) -> str:
    """Tells labelled folders apart, by their classes and the names of their pictures."""
    held = [folder.classes.names, [path.name for path in folder.paths]]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def digest_of_weights(folder: Path) -> str:
    """Tells policies apart, by the file of weights that :func:`load_policy` reads."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_policy(folder: Path) -> TrainedPolicy:
    """The policy that was trained in ``folder``.

    Raises:
        TokenstepError: the folder holds no such policy.
    """
    try:
        recipe = json.loads((folder / RECIPE).read_text())
        state = load_file(folder / WEIGHTS)
        patch, config = int(recipe["patch"]), recipe["policy"]
        # A run of an earlier version knew no other than a half.
        mean, std = recipe.get("mean") or HALF, recipe.get("std") or HALF
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TokenstepError(
            f"{folder}: holds no trained policy ({error}): run tokenstep train policy first"
        ) from error
    where = str(folder / RECIPE)
    mean, std = (from_dict(cast(Any, Channels), value, where) for value in (mean, std))
    # How it started is a record from here on.
    policy = replace(from_dict(PolicyConfig, config, where), pretrained=False)
    return TrainedPolicy(policy, state, patch, (mean, std), initial_of(folder))


def load_weights(network: nn.Module, path: Path) -> None:
    """Load what :func:`save_weights` wrote.

    Raises:
        TokenstepError: the file is damaged, or of a network of another shape.
    """
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise damaged(path) from error


def damaged(path: Path) -> TokenstepError:
    """The fault of a file of the run that cannot be read."""
    return TokenstepError(f"{path}: is damaged, or of another run: remove it and start again")


def save_json(data: object, path: Path) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read what :func:`save_json` wrote.

    Raises:
        TokenstepError: the file is missing or damaged.
    """
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path) from error
    if not isinstance(held, dict):
        raise damaged(path)
    return held
