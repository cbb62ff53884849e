"""The kernel seam: attention over packed tokens, one back end behind one signature."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenstep.core.ragged import Segments

Backend = Literal["auto", "loop", "padded", "varlen"]
BACKENDS: tuple[Backend, ...] = ("auto", "loop", "padded", "varlen")


@dataclass(frozen=True, slots=True)
class Attended:
    """What the attention of one block saw, for a reducer that judges by it.

    Fused kernels keep no weights, so :meth:`received` makes those that are asked for anew.
    """

    segments: Segments
    cells: Tensor | None  # (T,) where a size bias lets a row weigh as its cells
    q: Tensor  # (T, heads, d)
    k: Tensor  # (T, heads, d)
    scale: float

    def of_rows(self, rows: Tensor, segments: Segments) -> "Attended":
        """The same of ``rows (n,)``, which lie as ``segments`` says."""
        cells = None if self.cells is None else self.cells[rows]
        return Attended(segments, cells, self.q[rows], self.k[rows], self.scale)

    @torch.no_grad()
    def received(self, asking: Tensor) -> Tensor:
        """Attention that each row gets from those of its picture in the mask ``asking (T,)``.

        The mean over these rows and over heads, ``(T,)`` float32: it sums to 1 in each picture that
        has a row that asks, and is 0 in others.
        """
        found = self.q.new_zeros(len(self.q), dtype=torch.float32)
        start = 0
        for length in self.segments.lengths:
            own = slice(start, start + length)
            # (heads, asking rows, d), a band of them at a time: all weights are rows squared
            queries = self.q[own][asking[own]].transpose(0, 1)
            for band in torch.split(queries, max(1, _BAND // max(1, length)), dim=1):
                logits = (band @ self.k[own].movedim(0, 2)).float() * self.scale
                if self.cells is not None:
                    logits = logits + self.cells[own].float().log()
                found[own] += logits.softmax(dim=-1).mean(0).sum(0) / max(1, queries.shape[1])
            start += length
        return found


@dataclass(frozen=True, slots=True)
class Hidden:
    """Keys that a few rows of each picture do not see, as EoMT's queries those outside their masks.

    These rows are the ``count`` ones behind the first ``start`` rows of each picture. ``sees``,
    ``(T, count)`` bool, says of each row, as a key, which of them see it.
    """

    start: int
    count: int
    sees: Tensor


_BAND = 2**20  # weights of a head at a time


class Attend:
    """The kernel that the attention of a block calls, over the packed rows of one moment.

    ``cells (T,)`` lets a row weigh as the cells that it speaks for. ``keep`` says that what was
    seen is wanted afterwards, as :attr:`seen`; it holds memory. ``hidden`` are keys that some rows
    do not see.
    """

    def __init__(
        self,
        segments: Segments,
        *,
        cells: Tensor | None = None,
        backend: Backend = "auto",
        keep: bool = False,
        hidden: Hidden | None = None,
    ) -> None:
        self.segments = segments
        self.cells = cells
        self.backend = backend
        self.keep = keep
        self.hidden = hidden
        self.seen: Attended | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """Let each row attend to the rows of its own picture: all are ``(T, heads, d)``."""
        if self.keep:
            self.seen = Attended(self.segments, self.cells, q.detach(), k.detach(), scale)
        width = v.shape[-1]
        if self.cells is not None:
            q, k, v = with_size_bias(q, k, v, size=self.cells, scale=scale)
        out = packed_attention(q, k, v, segments=self.segments, scale=scale, backend=self.backend)
        if self.hidden is not None:
            out = _masked(out, q, k, v, segments=self.segments, scale=scale, hidden=self.hidden)
        return out[..., :width]


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Segments,
    scale: float,
    backend: Backend = "auto",
) -> Tensor:
    """Let each row attend to the rows of its own picture.

    ``q``, ``k``, ``v`` are ``(T, heads, d)``; the result is ``(T, heads, d)``. ``loop`` calls the
    fused kernel once per picture and is the reference; ``padded`` calls it once, with a key mask
    where pictures differ in length; ``varlen`` is CUDA's flash kernel for fp16 and bf16. On CUDA
    ``auto`` takes ``padded`` where no mask is needed or in fp32, else ``varlen``; on a CPU it is
    ``loop``.

    Raises:
        ValueError: an unknown back end, or ``varlen`` where it cannot run.
    """
    match pick_backend(backend, q, even=segments.even):
        case "loop":
            return _loop(q, k, v, segments=segments, scale=scale)
        case "padded":
            return _padded(q, k, v, segments=segments, scale=scale)
        case "varlen":
            return _varlen(q, k, v, segments=segments, scale=scale)
        case unknown:
            raise ValueError(f"unknown attention back end {unknown!r}, choose from {BACKENDS}")


def pick_backend(backend: Backend, q: Tensor, *, even: bool = False) -> Backend:
    """Resolve ``auto`` for the device and dtype of ``q``, and pictures of ``even`` lengths."""
    flash = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    if backend == "varlen" and not flash:
        raise ValueError(
            f"attention back end 'varlen' needs fp16 or bf16 on CUDA, got {q.dtype} on "
            f"{q.device.type}: choose 'loop' or 'padded'"
        )
    if backend != "auto":
        return backend
    if flash and not even:
        return "varlen"
    return "padded" if q.is_cuda else "loop"


def with_size_bias(q: Tensor, k: Tensor, v: Tensor, *, size: Tensor, scale: float) -> list[Tensor]:
    """Add ``log(size)`` of the key to every logit, in a form that fused kernels take.

    One more channel carries it (``q' = [q, 1]``, ``k' = [k, log(size) / scale]``), padded to a
    multiple of 8, so that a supertoken weighs as much as the patches it stands for (proportional
    attention of ToMe, arXiv 2210.09461). ``size`` is ``(T,)``; the caller cuts the result's
    channels back to those of ``v`` and passes the unpadded ``scale`` on.
    """
    rows, heads, width = q.shape
    wide = biased_width(width)
    q_wide, k_wide, v_wide = (F.pad(t, (0, wide - width)) for t in (q, k, v))
    channel = torch.zeros(wide, dtype=torch.bool, device=q.device)
    channel[width] = True
    bias = (size.to(torch.float32).log() / scale).to(k.dtype).view(rows, 1, 1)
    q_wide = torch.where(channel, q.new_ones(()), q_wide)
    k_wide = torch.where(channel, bias.expand(rows, heads, wide), k_wide)
    return [q_wide, k_wide, v_wide]


def biased_width(width: int) -> int:
    """Channels a head of ``width`` has with the size bias: one more, up to a multiple of 8."""
    return -(-(width + 1) // 8) * 8


def _loop(q: Tensor, k: Tensor, v: Tensor, *, segments: Segments, scale: float) -> Tensor:
    pieces = []
    for rows in zip(*(torch.split(t, list(segments.lengths)) for t in (q, k, v)), strict=True):
        # (n, heads, d) -> (1, heads, n, d), a view: the kernel takes strides
        q1, k1, v1 = (t.transpose(0, 1)[None] for t in rows)
        one = F.scaled_dot_product_attention(q1, k1, v1, scale=scale)
        pieces.append(one[0].transpose(0, 1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _padded(q: Tensor, k: Tensor, v: Tensor, *, segments: Segments, scale: float) -> Tensor:
    if segments.even:
        # (T, heads, d) -> (B, heads, n, d), a view
        shape = (len(segments.lengths), segments.longest)
        q4, k4, v4 = (torch.unflatten(t, 0, shape).transpose(1, 2) for t in (q, k, v))
        even = F.scaled_dot_product_attention(q4, k4, v4, scale=scale)
        return even.transpose(1, 2).flatten(0, 1)
    padding = segments.padding
    # (B, 3, heads, longest, d): one gather for all three
    q4, k4, v4 = padding.pad(torch.stack((q, k, v), dim=1)).transpose(1, 3).unbind(2)
    mask = padding.real[:, None, None]
    out = F.scaled_dot_product_attention(q4, k4, v4, attn_mask=mask, scale=scale)
    return padding.unpad(out.transpose(1, 2))


def _masked(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Segments,
    scale: float,
    hidden: Hidden,
) -> Tensor:
    """Put right the rows of ``out (T, heads, d)`` that do not see all keys; they are few."""
    begin, parts = 0, []
    for length in segments.lengths:
        own = slice(begin, begin + length)
        asking = slice(begin + hidden.start, begin + hidden.start + hidden.count)
        # (1, heads, rows, d)
        few, keys, values = (t.transpose(0, 1).unsqueeze(0) for t in (q[asking], k[own], v[own]))
        mask = hidden.sees[own].t()  # (count, length)
        found = F.scaled_dot_product_attention(few, keys, values, attn_mask=mask, scale=scale)
        parts += [out[begin : asking.start], found[0].transpose(0, 1), out[asking.stop : own.stop]]
        begin += length
    return torch.cat(parts)


def _varlen(q: Tensor, k: Tensor, v: Tensor, *, segments: Segments, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets = segments.offsets.to(torch.int32)
    longest = segments.longest
    # Only the first seven arguments are portable between releases, and their scale is fixed at
    # 1 / sqrt(d): another scale goes into the queries.
    q = q * (scale * q.shape[-1] ** 0.5)
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest)
    return out if isinstance(out, Tensor) else out[0]
