"""A CNN for use: each batch norm folded into the convolution before it.

In eval mode a norm is a scale and a shift of each channel, which the convolution can do as well. A
third of an EfficientNet-Lite0's operations are norms.
"""

import copy
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

Cnn = TypeVar("Cnn", bound=nn.Module)


@torch.no_grad()
def folded(cnn: Cnn, run: Callable[[Cnn], object]) -> Cnn:
    """A copy of ``cnn`` in eval mode, without the norms that read a convolution's output.

    ``run`` runs it on any picture, which shows what each norm reads.
    """
    found = copy.deepcopy(cnn).eval()
    names = {module: name for name, module in found.named_modules()}
    for norm, convolution in _reads(found, lambda: run(found)).items():
        _fold(convolution, norm)
        parent, _, name = names[norm].rpartition(".")
        # timm's norms bring an activation along.
        setattr(found.get_submodule(parent), name, getattr(norm, "act", nn.Identity()))
    return found


def state_of(module: nn.Module) -> Hashable:
    """What differs as soon as a weight of ``module`` or a hook on it does."""
    weights = (*module.parameters(), *module.buffers())
    hooks = (len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules())
    return sum(hooks), *((one.data_ptr(), one.dtype, _version(one)) for one in weights)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _reads(cnn: nn.Module, run: Callable[[], object]) -> dict[nn.BatchNorm2d, nn.Conv2d]:
    """The convolution that each norm reads; both are called just once in a run."""
    made: list[tuple[Tensor, nn.Conv2d]] = []
    reads: list[tuple[nn.BatchNorm2d, Tensor]] = []
    hooks: list[Any] = []
    for module in cnn.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda one, _, out: made.append((out, one))))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(
                module.register_forward_pre_hook(lambda one, read: reads.append((one, read[0])))
            )
    run()
    for hook in hooks:
        hook.remove()
    calls = Counter([one for _, one in made] + [one for one, _ in reads])
    return {
        norm: convolution
        for norm, read in reads
        for out, convolution in made
        if out is read and calls[norm] == calls[convolution] == 1
    }


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Let ``convolution`` do what ``norm`` does behind it, in fp32 whatever they are kept in."""
    kept = convolution.weight.dtype
    parts = (convolution.weight, convolution.bias, norm.running_mean, norm.running_var)
    weight, bias, mean, variance = (None if one is None else one.float() for one in parts)
    scale, shift = (cast(Tensor, one).float() for one in (norm.weight, norm.bias))
    fused = fuse_conv_bn_weights(
        cast(Tensor, weight),
        bias,
        cast(Tensor, mean),
        cast(Tensor, variance),
        norm.eps,
        scale,
        shift,
    )
    convolution.weight, convolution.bias = (
        nn.Parameter(one.to(kept), requires_grad=False) for one in fused
    )
