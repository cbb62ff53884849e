"""Somebody's dense timm segmenter as a Segmenter: its ViT, its head, and nothing trained."""

import colorsys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenstep.config import RGB, Channels, PolicyConfig, VitConfig
from tokenstep.errors import TokenstepError
from tokenstep.hosts.timm_named import host_type
from tokenstep.model.build import step_parts
from tokenstep.model.config import ModelConfig
from tokenstep.model.decoder import LinearDecoder
from tokenstep.model.segmenter import Segmenter
from tokenstep.policies.entropy import Entropy


def dense(
    vit: nn.Module,
    head: nn.Module,
    classes: Sequence[str],
    *,
    mean: Channels | None = None,
    std: Channels | None = None,
    palette: Sequence[RGB] | None = None,
    policy: Entropy | None = None,
) -> Segmenter:
    """Make a Segmenter of a timm ViT under a head of its patch tokens, both trained elsewhere.

    ``head`` is ``nn.Linear(D, C)`` or a 1x1 ``nn.Conv2d`` of the normed tokens, whose logits are
    scaled up to the picture. Pictures are normalised by ``mean`` and ``std``, by default the ones
    that timm has for the ViT. ``policy`` (ours: APT's entropy, by default with its sizes) is there
    to be used; until it is, by thresholds or ``policy.merge``, the model is the dense one. Parts
    are shared with ``vit``, and in eval mode from then on. A ViT that timm builds just so by its
    name can be saved and loaded.

    Raises:
        TokenstepError: the ViT or the head is not supported, or they do not fit each other or the
            classes.
    """
    policy = Entropy() if policy is None else policy
    try:
        host = host_type(vit)(vit)
    except ValueError as error:
        raise TokenstepError(f"dense: {error}") from error
    known, grid = getattr(vit, "pretrained_cfg", None) or {}, host.table_grid
    mean, std = mean or known.get("mean"), std or known.get("std")
    if mean is None or std is None:
        raise TokenstepError("dense: timm has no mean and std for this ViT: give mean and std")
    config = ModelConfig(
        tuple(classes),
        tuple(palette) if palette is not None else colours(len(classes)),
        VitConfig(
            known.get("architecture") or type(vit).__name__,
            patch=host.patch,
            depth=len(cast(Any, vit).blocks),
            image_size=(grid[0] * host.patch, grid[1] * host.patch),
        ),
        PolicyConfig(kind="entropy", sizes=policy.sizes),
        mean=cast(Channels, tuple(mean)),
        std=cast(Channels, tuple(std)),
    )
    try:
        parts = step_parts(config, host=host)
    except ValueError as error:
        raise TokenstepError(f"dense: {error}") from error
    weight, bias = _linear(head)
    linear = cast(LinearDecoder, parts.decoder).linear
    if weight.shape != linear.weight.shape:
        raise TokenstepError(
            f"dense: the head makes {weight.shape[0]} logits of {weight.shape[1]} features, but "
            f"there are {len(classes)} classes and the ViT has {host.dim} features"
        )
    own = next(vit.parameters())
    if weight.dtype != own.dtype or weight.device != own.device:
        raise TokenstepError(
            f"dense: the head is {weight.dtype} on {weight.device}, the ViT {own.dtype} on "
            f"{own.device}: bring both together first"
        )
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    vit.eval()
    return Segmenter(config, parts).to(own.device, own.dtype).eval()


def with_policy(model: Segmenter, policy: Entropy) -> Segmenter:
    """A copy of a model under another policy, at that policy's thresholds.

    Operating points were measured under the policy before, so it has none.

    Raises:
        TokenstepError: its tokens take the policy's features.
    """
    config = model.config
    if config.vit.policy_features:
        raise TokenstepError(
            "policy: the tokens of this model take what its own policy saw; leave --policy out, or "
            "compare partitions by --partition entropy"
        )
    changed = replace(
        config,
        policy=PolicyConfig(kind="entropy", sizes=policy.sizes),
        thresholds=replace(config.thresholds, merge=policy.merge),
        points=(),
    )
    other = Segmenter.build(changed).to(model.device, model.dtype)
    # The policy was all that it does not need, and the new one learns nothing.
    weights = {
        name: part for name, part in model.state_dict().items() if not name.startswith("policy.")
    }
    other.load_state_dict(weights)
    return other.eval()


def _linear(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight ``(C, D)`` and bias ``(C,)`` of a head."""
    if type(head) is nn.Linear:
        return head.weight, head.bias
    if type(head) is nn.Conv2d:
        plain = (head.kernel_size, head.stride, head.padding, head.groups)
        if plain == ((1, 1), (1, 1), (0, 0), 1):
            return head.weight.flatten(1), head.bias
    raise TokenstepError(
        f"dense: a head of type {type(head).__name__} is not supported: give nn.Linear, or an "
        "nn.Conv2d of 1x1"
    )


def colours(count: int) -> tuple[RGB, ...]:
    """So many colours that differ, by their hue and every other one darker."""
    made = (
        colorsys.hsv_to_rgb(index / max(1, count), 0.75, 0.95 if index % 2 else 0.6)
        for index in range(count)
    )
    return tuple((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in made)
