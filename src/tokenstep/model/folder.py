"""A model's folder, on this machine or on the hub: config.json and safetensors, nothing else."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from torch import nn

from tokenstep.data.whole_files import write_text
from tokenstep.errors import TokenstepError
from tokenstep.from_dict import from_dict
from tokenstep.model.build import require_described
from tokenstep.model.card import model_card
from tokenstep.model.config import ModelConfig
from tokenstep.model.renamed import with_new_keys
from tokenstep.model.weight_files import load_weights, save_weights

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class ModelFolder(nn.Module, PyTorchModelHubMixin):
    """A module that is saved as such a folder and loaded from one."""

    config: ModelConfig

    @classmethod
    def build(cls, config: ModelConfig) -> Self:
        """The model that ``config`` describes, untrained."""
        raise NotImplementedError

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        config: dict[str, Any] | None = None,
    ) -> Self:
        """Load safetensors, and nothing else: the mixin's own method may unpickle."""
        if config is None:
            raise TokenstepError(f"{model_id}: holds no model ({CONFIG} is missing)")
        if Path(model_id).is_dir():
            path = Path(model_id) / WEIGHTS
        else:
            path = Path(
                hf_hub_download(
                    model_id,
                    WEIGHTS,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        where = f"{model_id}/{CONFIG}"
        settings = from_dict(ModelConfig, with_new_keys(config, where), where)
        try:
            model = cls.build(settings)
        except TokenstepError as fault:
            raise TokenstepError(f"{where}: {fault}") from fault
        load_weights(model, path)
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the settings as they are now, then the weights, each whole or not at all.

        Raises:
            TokenstepError: parts were handed in that the settings do not describe.
        """
        require_described(self.config, self)
        text = json.dumps(dataclasses.asdict(self.config), indent=1)
        write_text(save_directory / CONFIG, text + "\n")
        save_weights(self, save_directory / WEIGHTS)

    def generate_model_card(self, *_: object, **__: object) -> ModelCard:
        """The README that a folder gets if it has none."""
        return ModelCard(model_card(self.config))
