"""16-bit weights: nearly the same label maps, and no way back."""

import pytest
import torch
from conftest import TinyModel
from support import scramble

from tokenstep.config import Thresholds
from tokenstep.model import precision
from tokenstep.model.precision import dtype_for

STEP = Thresholds(merge=(0.5, 0.5), exits=(0.4, 0.4), spare=1)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("dataflow", ["windows", "grid"])
def test_label_maps_are_nearly_the_same(tiny_model: TinyModel, kind: str, dataflow: str) -> None:
    model, full = (tiny_model(cells=2, policy_features=True) for _ in range(2))
    for one in (model, full):
        torch.manual_seed(5)
        scramble(one)
        one.use(dataflow=dataflow)
    model.use(precision=kind, dataflow=dataflow)
    coarse = torch.rand(3, 3, 5, 7)
    pictures = list(torch.nn.functional.interpolate(coarse, (80, 112), mode="bicubic").clamp(0, 1))
    found = model.segment_batch(pictures, thresholds=STEP)
    for ours, theirs in zip(found, full.segment_batch(pictures, thresholds=STEP), strict=True):
        assert (ours.labels != theirs.labels).mean() < 0.1
        assert ours.tokens.start == pytest.approx(theirs.tokens.start, rel=0.1)
    assert {weight.dtype for weight in model.parameters()} == {model.dtype}


def test_what_was_rounded_does_not_come_back(tiny_model: TinyModel) -> None:
    model = tiny_model()
    model.use(precision="fp32")
    model.use(precision="bf16")
    model.use(precision="bf16")
    for other in ("fp32", "fp16"):
        with pytest.raises(ValueError, match="load the model anew"):
            model.use(precision=other)
    with pytest.raises(ValueError, match="unknown precision"):
        model.use(precision="int4")


def test_auto_is_what_the_device_is_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for amx, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: {"amx_bf16": amx})
        assert dtype_for("auto", cpu) == dtype
    monkeypatch.setattr(precision, "has_bf16", lambda device: device == "cuda")
    assert dtype_for("auto", torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    assert dtype_for("auto", torch.device("cuda")) == torch.float16
