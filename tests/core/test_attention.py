import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenstep.core.attention import packed_attention, pick_backend, with_size_bias
from tokenstep.core.ragged import Segments, offsets_of

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=4)


def qkv(lengths: list[int], width: int = 8) -> tuple[list[Tensor], Segments]:
    tensors = [torch.randn(sum(lengths), 2, width, requires_grad=True) for _ in range(3)]
    return tensors, Segments.of(offsets_of(torch.tensor(lengths)))


def naive(tensors: list[Tensor], lengths: list[int], scale: float, bias: Tensor) -> Tensor:
    """Attention written out, one picture after the other; ``bias (T,)`` is added per key."""
    pieces = []
    for q, k, v, b in zip(*(t.split(lengths) for t in (*tensors, bias)), strict=True):
        logits = torch.einsum("qhd,khd->hqk", q, k) * scale + b
        pieces.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v))
    return torch.cat(pieces)


def forward_and_gradients(
    tensors: list[Tensor], segments: Segments, backend: str, upstream: Tensor
) -> list[Tensor]:
    out = packed_attention(*tensors, segments=segments, scale=0.4, backend=backend)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


@given(LENGTHS)
def test_padding_agrees_with_the_loop(lengths: list[int]) -> None:
    tensors, segments = qkv(lengths)
    upstream = torch.randn(sum(lengths), 2, 8)
    loop = forward_and_gradients(tensors, segments, "loop", upstream)
    padded = forward_and_gradients(tensors, segments, "padded", upstream)
    for one, other in zip(loop, padded, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
        assert one.isfinite().all()


@given(LENGTHS)
def test_the_loop_is_attention_within_each_picture(lengths: list[int]) -> None:
    tensors, segments = qkv(lengths)
    out = packed_attention(*tensors, segments=segments, scale=0.4, backend="loop")
    expected = naive(tensors, lengths, 0.4, torch.zeros(sum(lengths)))
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("width", [7, 8, 16])
@pytest.mark.parametrize("backend", ["loop", "padded"])
def test_size_bias_adds_the_log_of_the_size(width: int, backend: str) -> None:
    lengths = [5, 1, 3]
    tensors, segments = qkv(lengths, width)
    size = torch.tensor([1, 4, 16, 1, 64, 1, 256, 1, 4])
    wide = with_size_bias(*tensors, size=size, scale=0.3)
    assert {t.shape[-1] % 8 for t in wide} == {0}
    out = packed_attention(*wide, segments=segments, scale=0.3, backend=backend)[..., :width]
    expected = naive(tensors, lengths, 0.3, size.log())
    upstream = torch.randn_like(out)
    assert torch.allclose(out, expected, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(out, tensors, upstream),
        torch.autograd.grad(expected, tensors, upstream),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_row_of_size_n_weighs_as_n_equal_rows() -> None:
    tensors, _ = qkv([4])
    q, k, v = (torch.cat([t[:1].expand(3, -1, -1), t[1:]]) for t in tensors)
    expected = F.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (q, k, v)), scale=0.3
    )[0].transpose(0, 1)[2:]
    wide = with_size_bias(*tensors, size=torch.tensor([3, 1, 1, 1]), scale=0.3)
    out = packed_attention(*wide, segments=Segments.of(torch.tensor([0, 4])), scale=0.3)
    assert torch.allclose(out[..., :8], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_the_cpu(dtype: torch.dtype) -> None:
    tensors, segments = qkv([3, 5])
    half = [t.detach().to(dtype) for t in tensors]
    loop = packed_attention(*half, segments=segments, scale=0.4, backend="loop")
    padded = packed_attention(*half, segments=segments, scale=0.4, backend="padded")
    assert loop.dtype == dtype
    assert torch.allclose(loop, padded, atol=2e-2)


def test_auto_takes_the_loop_on_the_cpu() -> None:
    assert pick_backend("auto", torch.zeros(1, dtype=torch.float16)) == "loop"


def test_what_cannot_run_is_refused_by_name() -> None:
    tensors, segments = qkv([2])
    with pytest.raises(ValueError, match="varlen"):
        packed_attention(*tensors, segments=segments, scale=1.0, backend="varlen")
    with pytest.raises(ValueError, match="no_such"):
        packed_attention(*tensors, segments=segments, scale=1.0, backend="no_such")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size_bias", [False, True])
def test_varlen_agrees_with_the_loop(dtype: torch.dtype, size_bias: bool) -> None:
    lengths = [70, 1, 200, 33]
    offsets = offsets_of(torch.tensor(lengths)).cuda()
    segments = Segments.of(offsets)
    tensors = [torch.randn(sum(lengths), 3, 64, device="cuda", dtype=dtype) for _ in range(3)]
    tensors = [t.requires_grad_() for t in tensors]
    size = torch.randint(1, 65, (sum(lengths),), device="cuda")
    upstream = torch.randn(sum(lengths), 3, 64, device="cuda", dtype=dtype)
    results = []
    for backend in ("loop", "padded", "varlen"):
        used = with_size_bias(*tensors, size=size, scale=0.125) if size_bias else tensors
        out = packed_attention(*used, segments=segments, scale=0.125, backend=backend)[..., :64]
        results.append([out, *torch.autograd.grad(out, tensors, upstream)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.allclose(one, two, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_auto_on_cuda() -> None:
    assert pick_backend("auto", torch.zeros(1, device="cuda")) == "padded"
    assert pick_backend("auto", torch.zeros(1, device="cuda", dtype=torch.float16)) == "varlen"
