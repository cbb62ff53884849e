"""transformers' EoMT on fewer tokens (2503.19108): queries join before its last blocks.

Where its masked attention is on, a query sees a supertoken if the mean of its patches' mask logits
is above 0 (ours; unreduced it is what the original does). Masks are predicted on the whole grid.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.eomt.modeling_eomt import EomtForUniversalSegmentationOutput
from transformers.models.eomt_dinov3.modeling_eomt_dinov3 import (
    EomtDinov3ForUniversalSegmentation,
    EomtDinov3ForUniversalSegmentationOutput,
)

from tokenstep.accelerated.hf import Accelerated, host_of, refuse, returned, wants_states
from tokenstep.accelerated.run import spread
from tokenstep.core.attention import Hidden
from tokenstep.core.tokens import PackedTokens
from tokenstep.errors import TokenstepError
from tokenstep.hosts.hf_vit import layers_of


class Queries:
    """What an EoMT does before its last blocks, in one forward of it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.begin = len(layers_of(model)) - int(model.config.num_blocks)
        self.count = int(model.config.num_queries)
        self.predicted: list[tuple[Tensor, Tensor]] = []
        self.masks: Tensor | None = None  # (B, Q, H, W) logits by which queries see
        self.free: Tensor | None = None  # (B, Q) bool: queries that see everything

    def __call__(self, tokens: PackedTokens, block: int) -> tuple[PackedTokens, Hidden | None]:
        """Let the queries join before the first of these blocks, and hide what they do not mask."""
        model, index = self.model, block - 1 - self.begin
        if index < 0:
            return tokens, None
        if index == 0:
            tokens = tokens.join(model.query.weight)
        chance = model.attn_mask_probs[index]
        if model.training or chance > 0:
            masks, classes = model.predict(model.layernorm(self.first(spread(tokens))))
            self.predicted.append((masks, classes))
            self.masks = F.interpolate(masks, size=model.grid_size, mode="bilinear")
            self.free = None
            if chance < 1:
                self.free = torch.rand(*masks.shape[:2], device=masks.device) > chance
        # A mask stays until another takes its place, as in the original.
        return tokens, None if self.masks is None else self._hidden(tokens, self.masks)

    def first(self, state: Tensor) -> Tensor:
        """``(B, prefix + Q + H * W, D)`` with the queries first, as the original has them."""
        cells = self.model.grid_size[0] * self.model.grid_size[1]
        sizes = [state.shape[1] - self.count - cells, self.count, cells]
        own, queries, patches = torch.split(state, sizes, dim=1)
        return torch.cat([queries, own, patches], dim=1)

    def _hidden(self, tokens: PackedTokens, masks: Tensor) -> Hidden:
        """Each query sees prefix rows, and tokens whose mean logit is above 0."""
        # (B, Q, H, W) -> (T, Q)
        mean = tokens.mean_of_cells(masks.detach().float().permute(0, 2, 3, 1))
        sees = (mean > 0) | tokens.is_prefix.unsqueeze(1)
        if self.free is not None:
            sees = sees | self.free[tokens.picture()]
        return Hidden(tokens.prefix - self.count, self.count, sees)


class AcceleratedEomt(Accelerated):
    """An EoMT: ``masks_queries_logits``, ``class_queries_logits`` and all else that it gives."""

    def forward(
        self,
        pixel_values: Tensor,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        patch_offsets: list[Tensor] | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """As the original's; what it does not know is refused by name.

        Raises:
            TokenstepError: an argument is not supported, or the pictures are not of the model's
                size, since it does not interpolate its positions.
        """
        refuse(self.original, others)
        model, side = self.original, int(self.original.config.image_size)
        if tuple(pixel_values.shape[2:]) != (side, side):
            raise TokenstepError(
                f"pictures of {tuple(pixel_values.shape[2:])} px but this EoMT takes squares of "
                f"{side} px alone: let its processor cut or pad them"
            )
        every, queries = wants_states(model, output_hidden_states), Queries(model)
        depth = len(layers_of(model))
        host = host_of(model)
        found = self.states(host, pixel_values, range(depth + 1) if every else (), queries)
        last = queries.first(found[-1])
        masks, classes = model.predict(last)
        given: dict[str, Any] = {
            "loss": self._loss([*queries.predicted, (masks, classes)], mask_labels, class_labels),
            "masks_queries_logits": masks,
            "class_queries_logits": classes,
            "last_hidden_state": last,
            "patch_offsets": patch_offsets,
        }
        if every:
            behind = [queries.first(found[block]) for block in range(queries.begin + 1, depth)]
            before = [found[block] for block in range(queries.begin + 1)]
            given["hidden_states"] = (*before, *behind, last)
        kind: type[Any] = EomtForUniversalSegmentationOutput
        if isinstance(model, EomtDinov3ForUniversalSegmentation):
            kind = EomtDinov3ForUniversalSegmentationOutput
        return returned(model, kind(**given), return_dict)

    def _loss(
        self,
        predicted: list[tuple[Tensor, Tensor]],
        mask_labels: list[Tensor] | None,
        class_labels: list[Tensor] | None,
    ) -> Tensor | None:
        """The model's own loss of all its predictions, if there are labels."""
        if mask_labels is None or class_labels is None:
            return None
        losses = [
            self.original.get_loss(
                self.original.get_loss_dict(masks, classes, mask_labels, class_labels, None)
            )
            for masks, classes in predicted
        ]
        return torch.stack(losses).sum()
