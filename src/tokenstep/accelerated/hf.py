"""transformers' ViTs and backbones on fewer tokens, with the calls and outputs of the originals."""

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTBackboneOutput
from transformers.models.vit.modeling_vit import ViTModel

from tokenstep.accelerated.accelerator import Accelerator, Base
from tokenstep.accelerated.run import PackedRun
from tokenstep.config import OperatingPoint, Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.hosts.hf_vit import DINO_V3, HFViT, layers_of
from tokenstep.hosts.timm_embed import LinearEmbed
from tokenstep.model.encoder import Joining
from tokenstep.policies.base import Policy
from tokenstep.reducers.named import text_of


class Accelerated(nn.Module):
    """What both kinds have in common; any other attribute is that of the ``original``."""

    original: Any
    policy: Policy | None

    def __init__(self, model: nn.Module, run: PackedRun) -> None:
        super().__init__()
        self.original = model
        self.policy = run.policy
        self.run = run
        self.points: tuple[OperatingPoint, ...] = ()  # of the accelerator that it came from
        self.training = model.training
        if run.policy is not None:
            run.policy.eval()
        self._register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            self._own_names
        )

    def state_dict(self, *given: Any, **named: Any) -> Any:
        """The original's: what is saved of this, the original loads."""
        return self.original.state_dict(*given, **named)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write an accelerator, without the model: JSON and a card; see :class:`Accelerator`.

        Raises:
            TokenstepError: a reducer has no name, or the folder cannot be written.
        """
        spending, reducers = self.run.spending, tuple(map(text_of, self.run.reducers))
        if not isinstance(spending, Thresholds):
            raise TokenstepError("accelerator: a budget is not stored; give a policy's thresholds")
        thresholds = Thresholds(merge=spending.merge, reducers=reducers)
        base = Base.of(self.original)
        Accelerator(base, self.run.sizes, thresholds, self.points).save(folder)

    @staticmethod
    def _own_names(state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Let the original's names be those of the part that it is here."""
        for name in [name for name in state if name.startswith(prefix)]:
            state[f"{prefix}original.{name.removeprefix(prefix)}"] = state.pop(name)

    def __getattr__(self, name: str) -> Any:
        """A part of its own, or what the original has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    def train(self, mode: bool = True) -> "Accelerated":
        """Set the training mode; the policy stays in eval mode."""
        super().train(mode)
        if self.policy is not None:
            self.policy.eval()
        return self

    def states(
        self, host: HFViT, pixels: Tensor, wanted: Sequence[int], joining: Joining | None = None
    ) -> dict[int, Tensor]:
        """Features behind blocks, ``(B, prefix + H * W, D)``; see :class:`PackedRun`."""
        weight = cast(LinearEmbed, host.before()["embed"]).proj.weight
        return self.run(host, pixels.to(weight.dtype), wanted, joining)


class AcceleratedViT(Accelerated):
    """A ViT: ``last_hidden_state``, ``pooler_output`` and, if asked for, ``hidden_states``."""

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """As the original's; what it does not know is refused by name.

        Raises:
            TokenstepError: an argument is not supported, or the pictures have another size than a
                ViT that is not asked to interpolate its positions.
        """
        model = self.original
        refuse(model, {"bool_masked_pos": bool_masked_pos, **others})
        if isinstance(model, ViTModel) and not interpolate_pos_encoding:
            size, own = tuple(pixel_values.shape[2:]), tuple(model.embeddings.image_size)
            if size != own:
                raise TokenstepError(
                    f"pictures of {size} px but the model is made for {own}: give "
                    "interpolate_pos_encoding=True"
                )
        every = wants_states(model, output_hidden_states)
        depth = len(layers_of(model))
        found = self.states(host_of(model), pixel_values, range(depth + 1) if every else ())
        last = found[-1]
        pool = model.pooler if isinstance(model, ViTModel) else _first_row
        pooled = None if pool is None else pool(last)
        states = tuple(found[block] for block in range(depth + 1)) if every else None
        output = BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=pooled, hidden_states=states
        )
        return returned(model, output, return_dict)


class AcceleratedBackbone(Accelerated):
    """A backbone: ``feature_maps`` of the stages that it was asked for."""

    def forward_with_filtered_kwargs(self, *given: Any, **named: Any) -> Any:
        """The call that transformers' heads make."""
        return self(*given, **named)

    def forward(
        self,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """As the original's; what it does not know is refused by name.

        Raises:
            TokenstepError: an argument is not supported.
        """
        model = self.original
        refuse(model, {"attention_mask": attention_mask, **others})
        every = wants_states(model, output_hidden_states)
        names = list(model.stage_names)
        stages = [index for index, name in enumerate(names) if name in model.out_features]
        host = host_of(model)
        found = self.states(host, pixel_values, range(len(names)) if every else stages)
        is_v3, last = isinstance(model, DINO_V3), len(names) - 1
        norm = model.norm if is_v3 else model.layernorm
        maps, first = [], []
        for stage in stages:
            state = found[stage]
            if model.config.apply_layernorm or (is_v3 and stage == last):
                state = norm(state)
            first.append(state[:, 0])
            maps.append(self._mapped(host, state, pixel_values))
        given: dict[str, Any] = {"feature_maps": tuple(maps)}
        if every:
            given["hidden_states"] = tuple(found[block] for block in range(len(names)))
        if is_v3 and getattr(model.config, "return_class_token", False):
            given["cls_tokens"] = tuple(first)
        output = (DINOv3ViTBackboneOutput if is_v3 else BackboneOutput)(**given)
        return returned(model, output, return_dict)

    def _mapped(self, host: HFViT, state: Tensor, pixels: Tensor) -> Tensor:
        """``(B, prefix + H * W, D)`` as the feature map that the original's head is given."""
        prefix, patch = host.prefix, host.patch
        if not self.original.config.reshape_hidden_states:
            return state[:, prefix:] if isinstance(self.original, DINO_V3) else state
        grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        return torch.unflatten(state[:, prefix:], 1, grid).permute(0, 3, 1, 2).contiguous()


def _first_row(state: Tensor) -> Tensor:
    return state[:, 0]


def host_of(model: nn.Module) -> HFViT:
    """The host that stands for a model.

    Raises:
        TokenstepError: the model or one of its parts is not supported, or not any more.
    """
    try:
        return HFViT(model)
    except ValueError as error:
        raise TokenstepError(f"accelerate: {error}") from error


def refuse(model: Any, others: dict[str, Any]) -> None:
    """Refuse what is asked for, by a call or by the model's config, beyond what is known here.

    Raises:
        TokenstepError: names the first such argument.
    """
    if getattr(model.config, "output_attentions", False):
        others = {"output_attentions": True, **others}
    for name, value in others.items():
        if value is not None and value is not False:
            raise TokenstepError(f"accelerate: {name} is not supported on fewer tokens")


def wants_states(model: Any, asked: Any) -> bool:
    """Whether features of every block are wanted, by the call or else by the model's config."""
    wanted = getattr(model.config, "output_hidden_states", False) if asked is None else asked
    if not isinstance(wanted, bool):
        raise TokenstepError("accelerate: give output_hidden_states as True or False")
    return wanted


def returned(model: Any, output: Any, return_dict: bool | None) -> Any:
    """The output as it was asked for: by names, or as a plain tuple."""
    named = getattr(model.config, "return_dict", True) if return_dict is None else return_dict
    return output if named else output.to_tuple()
