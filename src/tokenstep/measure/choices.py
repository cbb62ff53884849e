"""What the command line lets users choose from; it is read before torch is, so it needs nothing."""

from dataclasses import dataclass
from typing import Literal

Partition = Literal["policy", "uniform", "oracle", "random"]
PARTITIONS: tuple[Partition, ...] = ("policy", "uniform", "oracle", "random")

RIVALS = {  # what `bench` times beside the model, and the packages that each needs
    "torch": (),
    "compile": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
CPU_ONLY = ("onnx", "openvino")


@dataclass(frozen=True)
class Search:
    """What calibration tries.

    ``prices`` are impure patches that a superpatch may bring to be worth its saving, one set of
    merge thresholds each; ``bars`` are confidences at which tokens halt; ``spares`` how many of
    each class stay. All combinations with the first of ``spares`` are measured on ``sample``
    pictures, those that none beats with the other spares too, and the best ``confirm`` on all.
    """

    prices: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    bars: tuple[float, ...] = (0.7, 0.8, 0.9, 0.95, 0.98)
    spares: tuple[int, ...] = (5, 0, 20)
    sample: int = 20
    confirm: int = 36
