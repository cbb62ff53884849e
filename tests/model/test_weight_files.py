"""Weights on disk: whole, readable by the group, and never what is no number."""

import resource
from pathlib import Path

import pytest
import torch

from tokenstep.errors import TokenstepError
from tokenstep.model.weight_files import save_weights


def test_weights_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 2)
    network.weight.data[0, 0] = float("nan")
    with pytest.raises(TokenstepError, match="weight is not finite"):
        save_weights(network, tmp_path / "weights.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(torch.nn.Linear(2, 2), path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(TokenstepError, match=r"weights\.safetensors: cannot be written"):
            save_weights(torch.nn.Linear(200, 2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
