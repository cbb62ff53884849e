"""Which accelerated form a ViT, a backbone or an EoMT of transformers has."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from tokenstep.accelerated.eomt import AcceleratedEomt
from tokenstep.accelerated.hf import Accelerated, AcceleratedBackbone, AcceleratedViT
from tokenstep.accelerated.run import NamedPolicy, PackedRun
from tokenstep.config import Channels, Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.hosts.hf_vit import EOMT, HFViT
from tokenstep.reducers.base import Reducer


def accelerated_of(
    model: nn.Module,
    processor: Any,
    policy: NamedPolicy | None,
    reducers: Sequence[Reducer],
) -> Accelerated:
    """The accelerated form of a ViT or of a backbone; see :func:`tokenstep.accelerate`."""
    try:
        host = HFViT(model)
        built = None if policy is None else policy.build(host.patch, *_normal_of(processor))
    except ValueError as error:
        raise TokenstepError(f"accelerate: {error}") from error
    if built is not None:
        built = built.to(next(model.parameters()).device)
    thresholds = Thresholds() if policy is None else Thresholds(merge=policy.merge)
    run = PackedRun(built, thresholds, reducers)
    kind: type[Accelerated] = AcceleratedViT
    if isinstance(model, EOMT):
        kind = AcceleratedEomt
    elif hasattr(model, "out_features"):
        kind = AcceleratedBackbone
    return kind(model, built, run, () if policy is None else policy.sizes)


def _normal_of(processor: Any) -> tuple[Channels, Channels]:
    mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    if mean is None or std is None:
        raise TokenstepError(
            "accelerate: a policy has to know how pictures were normalised: give the model's "
            "processor, with its image_mean and image_std"
        )
    red, green, blue = (float(one) for one in mean)
    return (red, green, blue), cast(Channels, tuple(float(one) for one in std))
