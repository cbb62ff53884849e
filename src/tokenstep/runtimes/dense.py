"""The dense model as its user would run it elsewhere: plain torch, compiled, ONNX, OpenVINO.

All take pictures of one size, ``(B, 3, h, w)`` float RGB in 0..1, and give ``(B, h, w)`` uint8
label maps. They compute what the dense model computes, in the form that each of them runs best.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenstep.core.partition import grid_of
from tokenstep.errors import TokenstepError
from tokenstep.hosts.timm_plain import plain_vit
from tokenstep.hosts.timm_vit import TimmViT
from tokenstep.model.decoder import LinearDecoder
from tokenstep.model.segmenter import Segmenter

Runtime = Callable[[Tensor], Tensor]
MakeRuntime = Callable[[Segmenter, tuple[int, int], int], Runtime]  # for pictures (h, w), a batch


class DenseGraph(nn.Module):
    """The dense model on pictures of one size ``(h, w)``, as a plain graph of tensors.

    It is timm's own model with the head, unless the tokens get what the policy saw or the stem is
    not timm's.

    Raises:
        TokenstepError: the model has a decoder that is not linear, or a host that cannot be so.
    """

    def __init__(self, model: Segmenter, size: tuple[int, int]) -> None:
        super().__init__()
        if not isinstance(model.decoder, LinearDecoder):
            raise TokenstepError("only models with a linear decoder have a plain dense graph")
        self.model = model
        self.policy = model.policy.for_use()
        self.size = size
        self.grid = grid_of(size, model.patch)
        tokenise = model.tokenise
        self.vit: nn.Module | None = None
        if tokenise.context is None:
            self.vit = plain_vit(model.config.vit, tokenise, model.encoder, self.grid)
        if self.vit is None and type(tokenise.host) is not TimmViT:
            raise TokenstepError(
                f"a {type(tokenise.host).__name__} whose tokens get what the policy saw, or with a "
                "stem of its own, has no plain dense graph: leave --rival out"
            )
        prefix = tokenise.prefix_count
        table = torch.zeros(1, prefix + self.grid[0] * self.grid[1], model.encoder.host.dim)
        with torch.no_grad():
            maps = tokenise.host.positions(tokenise, self.grid)
            if maps is not None:
                table[:, prefix:] = maps.flatten(2).transpose(1, 2)
            if prefix:
                table[:, :prefix] = tokenise.host.prefix_rows(tokenise)
        self.register_buffer("table", table.to(next(model.parameters())), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Label maps ``(B, h, w)`` of ``images (B, 3, h, w)``."""
        model = self.model
        mean, std = cast(Tensor, model.normalise.mean), cast(Tensor, model.normalise.std)
        normal = (images.to(mean.dtype) - mean) / std
        stem, prefix = model.tokenise, model.tokenise.prefix_count
        head = cast(LinearDecoder, model.decoder).linear
        canvas = self.canvas(normal)
        if self.vit is not None:
            return self.labels(head(cast(Any, self.vit).forward_features(canvas)[:, prefix:]))
        x = stem.host.embed_grid(stem, canvas).flatten(1, 2)
        if stem.context is not None:
            seen = self.policy.on_grid(self.policy.features(normal))
            x = x + stem.context(seen.flatten(2).transpose(1, 2))
        x = F.pad(x, (0, 0, prefix, 0)) + cast(Tensor, self.table)
        x = stem.host.enter(stem, x)
        for block in cast(nn.Sequential, model.encoder.blocks):
            x = block(x)
        return self.labels(head(model.encoder.host.norm(model.encoder, x)[:, prefix:]))

    def canvas(self, normal: Tensor) -> Tensor:
        """Pictures filled up to whole patches, and the stem's margin around them."""
        patch, margin = self.model.patch, self.model.tokenise.margin
        bottom, right = (
            cells * patch - side for cells, side in zip(self.grid, self.size, strict=True)
        )
        edges = (margin, right + margin, margin, bottom + margin)
        return F.pad(normal, edges, mode="replicate") if max(edges) else normal

    def labels(self, logits: Tensor) -> Tensor:
        """``logits (B, H * W, S * C)`` -> ``(B, h, w)`` uint8."""
        rows, columns = self.grid
        classes = len(self.model.config.classes)
        side = round((logits.shape[-1] // classes) ** 0.5)
        fine = logits.view(len(logits), rows, columns, side, side, classes)
        fine = fine.permute(0, 5, 1, 3, 2, 4).reshape(-1, classes, rows * side, columns * side)
        target = (rows * self.model.patch, columns * self.model.patch)
        full = F.interpolate(fine, target, mode="bilinear", align_corners=False)
        return full.argmax(1).to(torch.uint8)[:, : self.size[0], : self.size[1]]


def eager(model: Segmenter, size: tuple[int, int], batch: int) -> Runtime:
    """The graph in eager mode."""
    return DenseGraph(model, size).eval()


def compiled(model: Segmenter, size: tuple[int, int], batch: int) -> Runtime:
    """The graph under ``torch.compile``."""
    return cast(Runtime, torch.compile(DenseGraph(model, size).eval()))


def autotuned(model: Segmenter, size: tuple[int, int], batch: int) -> Runtime:
    """The graph under ``torch.compile``, which tries kernels and captures it on a GPU."""
    return cast(Runtime, torch.compile(DenseGraph(model, size).eval(), mode="max-autotune"))


def onnx_runtime(model: Segmenter, size: tuple[int, int], batch: int) -> Runtime:
    """The graph in ONNX Runtime, on the CPU with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with TemporaryDirectory() as folder:
        path = export(DenseGraph(model, size).eval(), batch, Path(folder))
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def openvino_runtime(model: Segmenter, size: tuple[int, int], batch: int) -> Runtime:
    """The graph in OpenVINO, on the CPU in fp32 with torch's number of threads."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    with TemporaryDirectory() as folder:
        path = export(DenseGraph(model, size).eval(), batch, Path(folder))
        compiled = openvino.Core().compile_model(path, "CPU", settings)
    return partial(_run_openvino, compiled)


def _run_openvino(compiled: Any, images: Tensor) -> Tensor:
    return torch.from_numpy(compiled([images.numpy()])[0])


def export(graph: DenseGraph, batch: int, folder: Path) -> Path:
    """Write the graph as ONNX for batches of ``batch`` and return the file."""
    path = folder / "dense.onnx"
    images = torch.rand(batch, 3, *graph.size)
    torch.onnx.export(graph, (images,), path, dynamo=True, verbose=False)
    return path


RUNTIMES: dict[str, MakeRuntime] = {  # of `settings.RUNTIME_PACKAGES`
    "torch": eager,
    "compile": compiled,
    "autotune": autotuned,
    "onnx": onnx_runtime,
    "openvino": openvino_runtime,
}
