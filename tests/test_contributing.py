"""The reducer that CONTRIBUTING shows works as it stands there."""

import re
from pathlib import Path
from typing import Any

import torch
from conftest import TinyModel
from support import cell_logits

from tokenstep.config import DENSE

GUIDE = Path(__file__).parent.parent / "CONTRIBUTING.md"


def example() -> dict[str, Any]:
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(block, str(GUIDE), "exec"), names)
    return names


def test_the_example_reducer_merges_and_does_not_see_the_batch(tiny_model: TinyModel) -> None:
    names, model = example(), tiny_model()
    pairs = names["Pairs"](after=(1,), similarity=-1.0)
    pictures = [torch.rand(3, 40, 48), torch.rand(3, 16, 24)]
    with torch.no_grad():
        together = model(pictures, thresholds=DENSE, reducers=[pairs])
        assert all(late < early for early, late in zip(*together.live[:2], strict=True))
        for index, picture in enumerate(pictures):
            alone = model([picture], thresholds=DENSE, reducers=[pairs])
            grid = tuple(-(-side // model.patch) for side in picture.shape[1:])
            got, expected = cell_logits(together, index, grid), cell_logits(alone, 0, grid)
            assert torch.allclose(got, expected, atol=1e-4)


def test_off_it_changes_nothing(tiny_model: TinyModel) -> None:
    names, model = example(), tiny_model()
    picture = torch.rand(1, 3, 40, 48)
    with torch.no_grad():
        plain = model(picture, thresholds=DENSE).logits
        off = model(picture, thresholds=DENSE, reducers=[names["Pairs"]()])
    assert torch.equal(off.logits, plain)
