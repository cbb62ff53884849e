"""Somebody else's model, made cheap: the same call and the same outputs, on fewer tokens.

The user's model is walked, never changed: its weights are shared, and a model around a backbone is
a shallow copy of it with the backbone replaced.
"""

import copy
import os
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from torch import nn

from tokenstep.accelerated.accelerator import read_accelerator
from tokenstep.accelerated.run import NamedPolicy
from tokenstep.errors import TokenstepError
from tokenstep.reducers.base import Reducer

M = TypeVar("M", bound=nn.Module)


def accelerate(
    model: M,
    processor: Any = None,
    *,
    policy: NamedPolicy | None = None,
    reducers: Sequence[Reducer | str] = (),
    accelerator: str | os.PathLike[str] | None = None,
    max_loss: float | None = None,
) -> M:
    """Make a model of transformers cheaper, without any training; it stays as it is itself.

    What comes back takes the same call and gives the same outputs in the same shapes. ``policy``
    merges superpatches before the first block and ``reducers`` merge or drop tokens in between;
    with neither, outputs equal those of ``model``. ``processor`` is the model's own, whose mean and
    std a policy needs to know. A model with a ``backbone`` keeps its class; a ViT or a backbone
    itself, or an EoMT, becomes a module of :mod:`tokenstep.accelerated`, which has all else that
    the original has. Both share their weights with ``model``.

    Its ``save_pretrained`` writes an accelerator, not the model. ``accelerator`` is such a folder
    (or a repository of the hub) and takes the place of policy and reducers; with ``max_loss`` it
    runs at the cheapest of its points that was measured to lose at most so many.

    Raises:
        TokenstepError: the model, one of its parts or of the settings is not supported, by name;
            the accelerator is another model's, or has no such point; or the `hf` extra is not
            installed.
    """
    try:
        from tokenstep.accelerated.named import accelerated_of
    except ModuleNotFoundError as error:
        raise TokenstepError(
            "accelerate: needs transformers: pip install 'tokenstep[hf]'"
        ) from error

    inner, known = vit_of(model), None
    if accelerator is not None:
        if policy is not None or reducers:
            raise TokenstepError("accelerate: an accelerator has its own policy and reducers")
        known = read_accelerator(accelerator)
        known.require_for(inner, str(accelerator))
        thresholds = known.at(max_loss)
        policy, reducers = known.policy(thresholds), thresholds.reducers
    elif max_loss is not None:
        raise TokenstepError(
            "accelerate: max_loss chooses among the measured points of an accelerator: give one, "
            "or policy and reducers"
        )
    cheap = accelerated_of(inner, processor, policy, reducers)
    cheap.points = () if known is None else known.points
    if inner is model:
        return cast(M, cheap)
    changed = copy.copy(model)
    # Dictionaries of its own, so that the user's model keeps its backbone and its hooks.
    for held, value in vars(model).items():
        if held.startswith("_") and isinstance(value, dict):
            changed.__dict__[held] = copy.copy(value)
    changed.backbone = cheap
    cast(Any, changed).save_pretrained = cheap.save_pretrained
    return changed


def vit_of(model: nn.Module) -> nn.Module:
    """The part of a model that runs on fewer tokens: its backbone, or the model itself.

    Raises:
        TokenstepError: the model wraps another, or its backbone cannot be replaced in a copy.
    """
    if "backbone" not in model._modules:
        # One that only passes on what another has would come back as it was.
        if isinstance(getattr(model, "backbone", None), nn.Module):
            raise TokenstepError(
                f"accelerate: {type(model).__name__} wraps a model with a backbone: give that model"
            )
        return model
    inner = cast(nn.Module, model._modules["backbone"])
    names = [name for name, part in model.named_modules(remove_duplicate=False) if part is inner]
    if "forward" in vars(model) or len(names) != 1:
        raise TokenstepError(
            f"accelerate: {type(model).__name__} has a forward of its own set on it, or holds its "
            f"backbone by several names: {', '.join(names)}"
        )
    return inner
