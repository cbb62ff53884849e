"""Train a policy from label maps, then a segmenter with that policy frozen."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenstep.config import Channels
from tokenstep.data.check import SOUND, require_sound
from tokenstep.data.digests import FILES, digests_of, of_folder
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.data.pretrained import WeightFile
from tokenstep.errors import TokenstepError
from tokenstep.hosts.timm_named import build_host
from tokenstep.measure.policy_report import policy_report
from tokenstep.measure.quality import Method, measure
from tokenstep.model.build import step_parts
from tokenstep.model.card import write_card
from tokenstep.model.config import ModelConfig
from tokenstep.model.folder import WEIGHTS
from tokenstep.model.segmenter import Segmenter
from tokenstep.model.weight_files import save_weights
from tokenstep.policies.dcts import DCTS, build_trunk
from tokenstep.train.card import policy_card
from tokenstep.train.initial_weights import record, start_of
from tokenstep.train.lock import held
from tokenstep.train.loop import Loop, is_main, meet
from tokenstep.train.losses import class_weights
from tokenstep.train.phase import PolicyModule, SegmenterModule
from tokenstep.train.precision import settled
from tokenstep.train.progress import Progress
from tokenstep.train.recipe import PolicyRecipe, SegmenterRecipe, normal_of, read_recipe
from tokenstep.train.run_folder import (
    Basis,
    begun,
    card_of,
    claim,
    digest_of_weights,
    initial_of,
    load_policy,
    load_weights,
    scored,
)

COMPLETE = "{}: already complete, nothing trained"


def train_policy(recipe: PolicyRecipe, *, progress: bool = True) -> dict[str, Any]:
    """Train a policy and write it to ``recipe.out``; returns its scores on val.

    A run that was killed goes on where it was; one that is complete is only read. ``progress``
    tells on stderr how it goes. Where several processes train together, only the main one writes
    and has scores to return.

    Raises:
        TokenstepError: the data or the recipe is at fault, or another process works in ``out``.
        Terminated: the process was told to end.
    """
    with alone(recipe):
        return _train_policy(recipe, telling(recipe, progress))


def _train_policy(recipe: PolicyRecipe, progress: Progress) -> dict[str, Any]:
    folder, val = folders(recipe)
    found = checked(recipe, folder, val)
    recipe, weights = start_of(settled(recipe))
    torch.manual_seed(recipe.trainer.seed)
    try:
        policy = DCTS(recipe.policy, recipe.patch, build_trunk(recipe.policy, weights))
        policy.require_growth()
    except ValueError as error:
        raise TokenstepError(f"recipe: {error}") from error
    out = Path(recipe.out)
    basis = Basis(initial=record(weights, "policy"))
    complete = claim(out, recipe, folder, found, basis=basis, write=is_main())
    if complete:
        progress.say(COMPLETE.format(out))
        load_weights(policy, out / WEIGHTS)
    else:
        tell_start(progress, "policy.pretrained", weights)
        loop = Loop(out, recipe.trainer, progress)
        for number in range(len(recipe.phases)):
            loop.run(PolicyModule(recipe, number, policy, len(val.classes.names)), policy)
    report: dict[str, Any] = {}
    mean, std = normal_of(recipe)
    if is_main():
        report = scored(
            out,
            of_folder(val, found),
            lambda: policy_report(policy, val, tolerance=recipe.tolerance, mean=mean, std=std),
            fresh=not complete,
        )
        write_card(out, policy_card(recipe, val.classes, report, initial_of(out)))
        if not complete:
            save_weights(policy, out / WEIGHTS)  # last: where it is, the run is complete
    meet()
    return report


def train_segmenter(recipe: SegmenterRecipe, *, progress: bool = True) -> Segmenter:
    """Train a segmenter with the policy of ``recipe.policy_weights`` and write it to ``out``.

    The policy is trained first where it is missing and the recipe names one for it. A run that
    was killed goes on where it was; one that is complete is only read. ``progress`` tells on
    stderr how it goes.

    Raises:
        TokenstepError: the data, the policy's folder or the recipe is at fault, or another process
            works in ``out``.
        Terminated: the process was told to end.
    """
    with alone(recipe):
        lacking = not os.path.isfile(Path(recipe.policy_weights) / WEIGHTS)
        # A run that has begun had its policy: another would not be the same run.
        if recipe.policy_recipe and lacking and not begun(Path(recipe.out)):
            train_policy(policy_recipe_of(recipe), progress=progress)
        return _train_segmenter(recipe, telling(recipe, progress))


def policy_recipe_of(recipe: SegmenterRecipe) -> PolicyRecipe:
    """The recipe of the policy that a segmenter asks for: its own pictures, patch and place.

    Raises:
        TokenstepError: its file is no recipe of a policy, or the segmenter could not be built
            around such a policy, which is better known before it is trained.
    """
    read = read_recipe(PolicyRecipe, Path(recipe.policy_recipe))
    filled, _ = start_of(recipe)  # with the mean and std that both must have
    data, trainer = recipe.data, recipe.trainer
    classes = folders(recipe)[0].classes
    vit, policy = replace(recipe.vit, pretrained=False), replace(read.policy, pretrained=False)
    planned = ModelConfig(classes.names, classes.palette, vit, policy, recipe.thresholds)
    try:
        patch = Segmenter.build(planned).patch
    except ValueError as error:
        raise TokenstepError(f"recipe: {error}") from error
    return replace(
        read,
        out=recipe.policy_weights,
        mean=filled.mean,
        std=filled.std,
        patch=patch,
        data=replace(
            read.data,
            root=data.root,
            train_split=data.train_split,
            val_split=data.val_split,
            train_names=data.train_names,
            val_names=data.val_names,
            workers=data.workers,
        ),
        trainer=replace(read.trainer, accelerator=trainer.accelerator),
    )


def _train_segmenter(recipe: SegmenterRecipe, progress: Progress) -> Segmenter:
    folder, val = folders(recipe)
    found = checked(recipe, folder, val)
    recipe, weights = start_of(settled(recipe))
    model = build_segmenter(recipe, folder, weights)
    out = Path(recipe.out)
    basis = Basis(digest_of_weights(Path(recipe.policy_weights)), record(weights, "vit"))
    complete = claim(out, recipe, folder, found, basis=basis, write=is_main())
    if complete:
        progress.say(COMPLETE.format(out))
        model = Segmenter.from_pretrained(out)
    else:
        weight = torch.ones(len(folder.classes.names))
        if recipe.class_balance > 0:
            weight = class_weights(count_pixels(folder), recipe.class_balance)
        tell_start(progress, "vit.pretrained", weights)
        loop = Loop(out, recipe.trainer, progress)
        for number in range(len(recipe.phases)):
            loop.run(SegmenterModule(recipe, number, model, weight), model)
        model.eval()
    if is_main():
        scored(
            out,
            of_folder(val, found),
            lambda: look_at(val, recipe, model),
            fresh=not complete,
        )
        write_card(out, card_of(out, model.config))
        if not complete:
            model.save_pretrained(out)
    meet()
    return model


def look_at(val: LabelledFolder, recipe: SegmenterRecipe, model: Segmenter) -> dict[str, Any]:
    """What the trained model scores on as many pictures of val as it looked at while training.

    Empty where it looked at none.
    """
    if recipe.trainer.val_pictures == 0:
        return {}
    thin = val.thinned(recipe.trainer.val_pictures)
    dense, reduced = measure(model, thin, [Method(), Method(recipe.thresholds)])
    return {"split": val.title, "images": len(thin), "dense": dense, "reduced": reduced}


def folders(recipe: PolicyRecipe | SegmenterRecipe) -> tuple[LabelledFolder, LabelledFolder]:
    """The pictures that a recipe trains on and those that it looks at, as they are."""
    data = recipe.data
    return (
        LabelledFolder(data.root, data.train_split, names=data.train_names),
        LabelledFolder(data.root, data.val_split, names=data.val_names),
    )


def checked(
    recipe: PolicyRecipe | SegmenterRecipe, folder: LabelledFolder, val: LabelledFolder
) -> dict[str, str]:
    """What the files of both folders hold; the main process reads them whole, unless it has before.

    Raises:
        TokenstepError: a picture or a label is wrong.
    """
    out = Path(recipe.out)
    found = digests_of([folder, val], out / FILES, write=is_main())
    if is_main():
        require_sound([val], folder, digests=found, cache=out / SOUND)
    return found


def alone(recipe: PolicyRecipe | SegmenterRecipe) -> AbstractContextManager[None]:
    """Lock the run's folder, in the main one of the processes that train together."""
    return held(Path(recipe.out)) if is_main() else nullcontext()


def telling(recipe: PolicyRecipe | SegmenterRecipe, progress: bool) -> Progress:
    """The progress of a run, told by the main process if at all."""
    quiet = not (progress and is_main())
    return Progress(Path(recipe.out) / "log", phases=len(recipe.phases), quiet=quiet)


def tell_start(progress: Progress, option: str, weights: WeightFile | None) -> None:
    """Say which weights a training starts from, if it does not start at random."""
    if weights is not None:
        progress.say(f"{option}: starts from {weights.source} (sha256 {weights.sha256[:12]})")


def build_segmenter(
    recipe: SegmenterRecipe, folder: LabelledFolder, weights: WeightFile | None = None
) -> Segmenter:
    """The segmenter as it begins: a ViT, untrained or from ``weights``, and the policy frozen.

    Raises:
        TokenstepError: the policy's folder, the weights or the recipe is at fault.
    """
    policy = load_policy(Path(recipe.policy_weights))
    mean, std = normal_of(recipe)
    if policy.normal != (mean, std):
        raise TokenstepError(
            f"{recipe.policy_weights}: the policy was trained with {_normal(*policy.normal)}, the "
            f"recipe has {_normal(mean, std)}: set these of the policy, or train another policy"
        )
    classes = folder.classes
    vit = replace(recipe.vit, pretrained=False)  # in the model, how it started is a record
    config = ModelConfig(
        *(classes.names, classes.palette, vit, policy.config, recipe.thresholds),
        mean=mean,
        std=std,
        long_side=folder.median_long_side() if recipe.scale_by == "side" else None,
        initial=tuple(part for part in (record(weights, "vit"), policy.initial) if part),
    )
    torch.manual_seed(recipe.trainer.seed)
    try:
        model = Segmenter(config, step_parts(config, host=build_host(vit, weights)))
    except ValueError as error:
        raise TokenstepError(f"recipe: {error}") from error
    if model.patch != policy.patch:
        raise TokenstepError(
            f"{recipe.policy_weights}: the policy was trained for patches of {policy.patch} px but "
            f"the recipe's ViT has {model.patch} px: train one for it, or set vit.patch = "
            f"{policy.patch}"
        )
    if weights is not None:
        model.tokenise.begin_without_context()
    model.policy.load_state_dict(policy.state)
    model.policy.requires_grad_(False)
    model.use(checkpointing=recipe.trainer.checkpointing)
    model.train()  # which leaves the frozen policy in eval mode; Lightning does not call it
    return model


def _normal(mean: Channels, std: Channels) -> str:
    return f"mean = {list(mean)}, std = {list(std)}"


def count_pixels(folder: LabelledFolder) -> Tensor:
    """Pixels of each class over a folder, ``(C,)`` int64."""
    total = torch.zeros(256, dtype=torch.int64)
    for _, label in folder:
        total += torch.bincount(label.flatten().long(), minlength=256)
    return total[: len(folder.classes.names)]
