"""Which accelerated form a ViT, a backbone or an EoMT of transformers has."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from tokenstep.accelerated.eomt import AcceleratedEomt
from tokenstep.accelerated.hf import (
    Accelerated,
    AcceleratedBackbone,
    AcceleratedViT,
    host_of,
)
from tokenstep.accelerated.run import NamedPolicy, PackedRun
from tokenstep.config import Channels, Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.hosts.hf_vit import EOMT
from tokenstep.reducers.base import Reducer
from tokenstep.reducers.named import reducer_of


def accelerated_of(
    model: nn.Module,
    processor: Any,
    policy: NamedPolicy | None,
    reducers: Sequence[Reducer | str],
) -> Accelerated:
    """The accelerated form of a ViT or of a backbone; see :func:`tokenstep.accelerate`."""
    host = host_of(model)
    asked = [reducer_of(one) if isinstance(one, str) else one for one in reducers]
    for one in asked:
        if not hasattr(one, "site"):
            raise TokenstepError(f"accelerate: {one!r} is no reducer: give one, or its name")
    if policy is not None and not (hasattr(policy, "build") and hasattr(policy, "merge")):
        raise TokenstepError(
            f"accelerate: {policy!r} is no policy by its settings: give policies.entropy.Entropy()"
        )
    try:
        built = None if policy is None else policy.build(host.patch, *normal_of(processor))
    except ValueError as error:
        raise TokenstepError(f"accelerate: {error}") from error
    if built is not None:
        built = built.to(next(model.parameters()).device)
    thresholds = Thresholds() if policy is None else Thresholds(merge=policy.merge)
    sizes = () if policy is None else policy.sizes
    run = PackedRun(built, thresholds, sizes, cast(Sequence[Reducer], asked))
    kind: type[Accelerated] = AcceleratedViT
    if isinstance(model, EOMT):
        kind = AcceleratedEomt
    elif hasattr(model, "out_features"):
        kind = AcceleratedBackbone
    return kind(model, run)


def normal_of(processor: Any) -> tuple[Channels, Channels]:
    """The mean and std, of pixels in 0..1, by which a processor normalises.

    Raises:
        TokenstepError: it says no mean or std of three numbers.
    """
    # What a pixel of 255 has become before the mean is taken from it.
    full = 255 * getattr(processor, "rescale_factor", 1 / 255)
    if getattr(processor, "do_rescale", True) is False:
        full = 255.0
    if not getattr(processor, "do_normalize", True):
        return (0.0,) * 3, (1 / full,) * 3
    found = []
    for name in ("image_mean", "image_std"):
        value = getattr(processor, name, None)
        if not (isinstance(value, Sequence) and len(value) == 3):
            raise TokenstepError(
                "accelerate: a policy has to know how pictures were normalised: give the model's "
                f"processor, with three numbers as its {name}"
            )
        found.append(cast(Channels, tuple(float(one) / full for one in value)))
    return found[0], found[1]
