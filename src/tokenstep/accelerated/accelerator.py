"""An accelerator: how somebody's model is made cheap, in a folder of its own, without the model.

``accelerator.json`` names the ViT that it is for, by type and by a digest of its weights, what
merges before its blocks and in between, and the operating points if any were measured.
"""

import dataclasses
import hashlib
import json
import os
from numbers import Real
from pathlib import Path
from typing import cast
from warnings import warn

import torch
from huggingface_hub import hf_hub_download
from torch import nn

from tokenstep.config import DENSE, OperatingPoint, Thresholds, cheapest_within
from tokenstep.data.whole_files import write_text
from tokenstep.errors import TokenstepError
from tokenstep.from_dict import from_dict
from tokenstep.model.card import OURS, write_card
from tokenstep.policies.entropy import Entropy, bits_of
from tokenstep.reducers.named import reducer_of

FILE = "accelerator.json"


@dataclasses.dataclass(frozen=True)
class Base:
    """The ViT, backbone or EoMT that an accelerator is for; ``sha256`` is of names and weights."""

    kind: str
    weights: int
    sha256: str

    @classmethod
    def of(cls, model: nn.Module) -> "Base":
        """What ``model`` is."""
        digest, count = hashlib.sha256(), 0
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # A scalar has no bytes of its own to view.
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(flat.numpy().tobytes())
            count += tensor.numel()
        return cls(type(model).__name__, count, digest.hexdigest())


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """What makes a model cheap: superpatches of ``sizes`` merged by entropy, and reducers.

    ``thresholds`` are what it runs at unless an operating point of ``points`` is asked for;
    without ``sizes`` nothing merges before the first block.
    """

    base: Base
    sizes: tuple[int, ...] = ()
    thresholds: Thresholds = DENSE
    points: tuple[OperatingPoint, ...] = ()

    def at(self, max_loss: float | None) -> Thresholds:
        """What to run at to lose at most ``max_loss`` points; its own if None, dense for 0.

        It is dense too where no point was measured to lose so little.

        Raises:
            TokenstepError: it has no points, or ``max_loss`` is no number of them.
        """
        if max_loss is None:
            return self.thresholds
        if not (isinstance(max_loss, Real) and max_loss >= 0):
            raise TokenstepError(f"max_loss is {max_loss!r}: give 0 or more points, as 0.5")
        if max_loss == 0:
            return DENSE
        if not self.points:
            raise TokenstepError("accelerator: no points were measured of it; leave max_loss out")
        cheapest = cheapest_within(self.points, max_loss)
        return DENSE if cheapest is None else cheapest.thresholds

    def policy(self, thresholds: Thresholds) -> Entropy | None:
        """The policy that merges by ``thresholds``."""
        if not thresholds.merge:
            return None
        return Entropy(tuple(map(bits_of, thresholds.merge)), self.sizes)

    def require_for(self, model: nn.Module, where: str) -> None:
        """Refuse another model; warn of the same with other weights.

        Raises:
            TokenstepError: ``model`` is of another type or size.
        """
        own = Base.of(model)
        if (own.kind, own.weights) != (self.base.kind, self.base.weights):
            raise TokenstepError(
                f"{where}: is for a {self.base.kind} of {self.base.weights:,} weights, but this is "
                f"a {own.kind} of {own.weights:,}"
            )
        if own.sha256 != self.base.sha256:
            warn(
                f"{where}: was made for this {own.kind} with other weights (or in another "
                "precision): what was measured of it does not hold here",
                stacklevel=3,
            )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``accelerator.json`` and a card, each whole or not at all.

        Raises:
            TokenstepError: the folder cannot be written.
        """
        text = json.dumps(dataclasses.asdict(self), indent=1)
        write_text(Path(folder) / FILE, text + "\n")
        write_card(Path(folder), self._card())

    def _card(self) -> str:
        merging = self.policy(self.thresholds)
        what = "none"
        if merging is not None:
            bits = ", ".join(f"{one:.4g}" for one in merging.bits)
            sides = ", ".join(f"{side}x{side}" for side in merging.sizes)
            what = f"below {bits} bits of entropy, for sides of {sides} patches"
        lines = [
            *("---", "library_name: tokenstep", "tags: [token-merging]", "---", ""),
            *(OURS, "", "# An accelerator", ""),
            f"It makes models of the type {self.base.kind} with {self.base.weights:,} weights "
            f"(sha256 {self.base.sha256[:12]}) cheaper; the model itself is not in it.",
            "",
            f"- superpatches before the first block: {what}",
            f"- reducers between the blocks: {', '.join(self.thresholds.reducers) or 'none'}",
            "",
            *("```python", "import tokenstep", ""),
            'cheap = tokenstep.load("THE MODEL", accelerator="THIS FOLDER")',
            "```",
        ]
        return "\n".join(lines) + "\n"


def read_accelerator(source: str | os.PathLike[str]) -> Accelerator:
    """Read an accelerator from a folder, or from a repository of the Hugging Face hub.

    Raises:
        TokenstepError: there is none, or its settings are not understood.
    """
    path, name = Path(source) / FILE, str(source)
    try:
        if not Path(source).is_dir():
            if name.count("/") != 1 or name.startswith((".", "/")):
                raise FileNotFoundError("no such folder")
            path = Path(hf_hub_download(name, FILE))
        data = cast(object, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TokenstepError(
            f"{source}: holds no accelerator ({reason}): give a folder with {FILE}, as "
            "save_pretrained of an accelerated model writes it"
        ) from error
    where = f"{source}/{FILE}"
    read = from_dict(Accelerator, data, where)
    try:
        for thresholds in (read.thresholds, *(point.thresholds for point in read.points)):
            read.policy(thresholds)
            for text in thresholds.reducers:
                if not hasattr(reducer_of(text), "site"):
                    raise TokenstepError(f"reducer {text}: needs heads that were trained for it")
    except TokenstepError as fault:
        raise TokenstepError(f"{where}: {fault}") from fault
    return read
