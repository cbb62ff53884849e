"""The curve of a policy's report against a partition that is looked at square by square."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import POLICY

from tokenstep.core import partition
from tokenstep.core.same_size import stacked
from tokenstep.data.augment import normalise
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.measure.policy_report import policy_report
from tokenstep.policies.batch import homogeneity, policy_features
from tokenstep.policies.dcts import DCTS


@pytest.mark.parametrize("place", [2, 9, 16])
def test_the_curve_is_that_of_the_partition_by_all_sizes(
    policy: Path, drawn: Path, place: int
) -> None:
    network = DCTS(POLICY, 8).eval()
    network.load_state_dict(load_file(policy / "model.safetensors"))
    folder = LabelledFolder(drawn, "val")
    found = policy_report(network, folder, tolerance=0.0)["curve"][place]
    half = torch.full((3, 1, 1), 0.5)
    cells = tokens = merged = 0
    pure = 0.0
    for image, label in folder:
        with torch.inference_mode():
            (looks,) = policy_features(network, stacked([normalise(image, half, half)]))
            scores = homogeneity(network, looks)
        thresholds = [found["threshold"]] * 2
        level = partition.by_threshold(
            scores, partition.uniform([(8, 8)]), sizes=POLICY.sizes, thresholds=thresholds
        )
        cells += 64
        tokens += int(partition.token_counts(level).sum())
        for rank in (1, 2):
            side = 1 << rank
            for row in range(0, 8, side):
                for column in range(0, 8, side):
                    if level[0, row, column] != rank:
                        continue
                    square = label[row * 8 : (row + side) * 8, column * 8 : (column + side) * 8]
                    most = int(torch.bincount(square.flatten().long()).max())
                    merged += side**2
                    pure += most / square.numel() * side**2
    assert merged > 0
    assert found["reduction"] == pytest.approx(cells / tokens)
    assert found["purity"] == pytest.approx(pure / merged)


def test_a_higher_threshold_merges_less(policy: Path, drawn: Path) -> None:
    network = DCTS(POLICY, 8).eval()
    network.load_state_dict(load_file(policy / "model.safetensors"))
    curve = policy_report(network, LabelledFolder(drawn, "val"), tolerance=0.0)["curve"]
    reductions = [point["reduction"] for point in curve]
    assert reductions == sorted(reductions, reverse=True) and reductions[0] > reductions[-1]
