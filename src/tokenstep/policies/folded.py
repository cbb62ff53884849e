"""A CNN for use: each batch norm folded into the convolution before it.

In eval mode a norm is a scale and a shift of each channel, which the convolution can do as well. A
third of an EfficientNet-Lite0's operations are norms.
"""

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

Cnn = TypeVar("Cnn", bound=nn.Module)


PLAIN = ("Conv2d", "Conv2dSame")  # convolutions that use their weight as it is
CLOSE = 1e-3  # of the largest number, how far what a folded CNN makes may be from the original's


def folded(cnn: Cnn, run: Callable[[Cnn], Sequence[Tensor]]) -> Cnn:
    """A copy of ``cnn`` in eval mode, without the norms that read a convolution's output.

    ``run`` runs it on some picture, which shows what each norm reads. Where the copy does not make
    the same of it, since something else reads what a norm reads, all norms stay.
    """
    # Kept for later, with gradients or without.
    with torch.inference_mode(False), torch.no_grad():
        plain = copy.deepcopy(cnn).eval()
        found = copy.deepcopy(plain)
        names = {module: name for name, module in found.named_modules()}
        for norm, convolution in _reads(found, lambda: run(found)).items():
            _fold(convolution, norm)
            parent, _, name = names[norm].rpartition(".")
            # timm's norms bring an activation along.
            setattr(found.get_submodule(parent), name, getattr(norm, "act", nn.Identity()))
        alike = all(
            torch.allclose(ours, theirs, rtol=0, atol=CLOSE * float(theirs.abs().max()))
            for ours, theirs in zip(run(found), run(plain), strict=True)
        )
        return found if alike else plain


def state_of(module: nn.Module) -> Hashable:
    """What differs as soon as a part or a weight of ``module`` does.

    It does not see what is written through ``.data``, nor in place in inference mode.
    """
    weights = (*module.parameters(), *module.buffers())
    parts = ((id(one), getattr(one, "eps", None)) for one in module.modules())
    return *parts, *((one.data_ptr(), one.dtype, _version(one)) for one in weights)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to a part of ``module``."""
    return any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _reads(cnn: nn.Module, run: Callable[[], object]) -> dict[nn.BatchNorm2d, nn.Conv2d]:
    """The convolution that each norm reads; both are called just once in a run."""
    made: list[tuple[Tensor, nn.Conv2d]] = []
    reads: list[tuple[nn.BatchNorm2d, Tensor]] = []
    hooks: list[Any] = []
    for module in cnn.modules():
        if type(module).__name__ in PLAIN:
            hooks.append(module.register_forward_hook(lambda one, _, out: made.append((out, one))))
        elif isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
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
