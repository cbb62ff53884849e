"""Measurements that are kept in a file, so that a killed calibration goes on where it was."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokenstep.config import Spending
from tokenstep.data.digests import of_folder
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.data.whole_files import write_text
from tokenstep.errors import TokenstepError
from tokenstep.measure.quality import Method, measure
from tokenstep.model.segmenter import Segmenter


class MeasurementCache:
    """Reports of one model by thresholds and pictures, kept in a JSON file as they are made.

    ``digests`` are those of the pictures' and labels' files, so that a corrected label is
    measured anew. The entries of a model with other weights or temperatures are not used.

    Raises:
        TokenstepError: the file ``path`` is no such cache.
    """

    def __init__(self, path: Path, model: Segmenter, digests: Mapping[str, str]) -> None:
        self.path = path
        self.model = model
        self.digests = digests
        digest = hashlib.sha256(json.dumps(model.config.temperatures).encode())
        for value in model.state_dict().values():
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        self.model_digest = digest.hexdigest()[:16]
        self.entries: dict[str, Any] = {}
        if path.is_file():
            try:
                read = json.loads(path.read_text())
                same_model = read["model"] == self.model_digest
                self.entries = dict(read["entries"]) if same_model else {}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise TokenstepError(
                    f"{path}: holds no measurements of a calibration; remove it"
                ) from error

    def measure(self, spending: Spending, folder: LabelledFolder) -> dict[str, Any]:
        """Give the report of thresholds or a budget on ``folder``: from the file, or made now."""
        text = json.dumps(of_folder(folder, self.digests))
        data = hashlib.sha256(text.encode()).hexdigest()[:16]
        key = json.dumps([data, dataclasses.asdict(spending)])
        if key not in self.entries:
            (self.entries[key],) = measure(self.model, folder, [Method(spending)])
            text = json.dumps({"model": self.model_digest, "entries": self.entries}, indent=1)
            write_text(self.path, text + "\n")
        report: dict[str, Any] = self.entries[key]
        return report
