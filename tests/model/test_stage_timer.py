"""The time of each stage is charged to that stage."""

from collections.abc import Callable
from threading import Thread
from time import sleep

import pytest
import torch
from conftest import TinyModel
from torch import nn

from tokenstep.config import DENSE, Thresholds
from tokenstep.model.segmenter import Segmenter

STEP = Thresholds((0.5, 0.5), (0.5, 0.5), spare=1)
REST = 60.0  # milliseconds that a part is made to take: far more than all of this model does

PARTS: dict[str, Callable[[Segmenter], nn.Module]] = {
    "prepare": lambda model: model.normalise,
    "policy": lambda model: model.policy.trunk,
    "embed": lambda model: model.tokenise.embed,
    "blocks 1-1": lambda model: model.encoder.blocks[0].attn.qkv,
    "exit 1": lambda model: model.exits.heads[0],
    "blocks 2-2": lambda model: model.encoder.blocks[1].mlp,
    "blocks 3-3": lambda model: model.encoder.blocks[2].attn.qkv,
    "decode": lambda model: model.decoder.linear,
}


@pytest.mark.parametrize("thresholds", [DENSE, STEP], ids=["dense", "STEP"])
@pytest.mark.parametrize("stage", PARTS)
def test_a_slow_part_is_seen_in_its_own_stage(
    tiny_model: TinyModel, stage: str, thresholds: Thresholds
) -> None:
    model = tiny_model(policy_features=True)  # so that the dense model needs the policy too
    rested: list[None] = []
    PARTS[stage](model).register_forward_pre_hook(
        lambda *_: (rested.append(None), sleep(REST / 1000))[0]
    )
    picture = torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8)
    for result in (model.segment_batch([picture], thresholds=thresholds)[0] for _ in range(2)):
        times = result.milliseconds
        if stage == "exit 1" and thresholds == DENSE:
            assert not rested and stage not in times
        else:
            assert times[stage] >= REST
    exits = ["exit 1", "exit 2"] if thresholds == STEP else []
    assert sorted(times) == sorted({*PARTS, "exit 2", "unmerge"} - {"exit 1", "exit 2"} | {*exits})


def test_two_threads_with_one_model_do_not_mix_their_times(tiny_model: TinyModel) -> None:
    model = tiny_model()
    picture = torch.rand(3, 80, 96)
    expected = list(model.segment_batch([picture], thresholds=STEP)[0].milliseconds)
    found: list[list[str]] = []

    def run() -> None:
        for _ in range(10):
            result = model.segment_batch([picture], thresholds=STEP)[0]
            found.append(list(result.milliseconds))

    threads = [Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 20
