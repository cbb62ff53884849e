"""What the command line lets users choose from.

It is read before torch is, so it imports neither torch nor anything that does.
"""

from dataclasses import dataclass
from typing import Literal, get_args

PartitionSource = Literal["policy", "uniform", "oracle", "random", "entropy"]
PARTITION_SOURCES: tuple[PartitionSource, ...] = get_args(PartitionSource)

RUNTIME_PACKAGES = {  # what `bench --rival` takes, and the packages that each runtime needs
    "torch": (),
    "compile": (),
    "autotune": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
CPU_ONLY = ("onnx", "openvino")


@dataclass(frozen=True)
class Search:
    """What calibration tries.

    ``prices``: a price is the number of impure patches that a superpatch may bring and still be
    worth the three tokens that it saves. Each price gives one set of merge thresholds. A higher
    price merges more.

    ``bars``: exit thresholds, the confidences above which tokens halt.

    ``spares``: how many of the surest tokens of each class stay in a picture as context.

    ``reducers``: other reducers by name and strength, each tried in the place of the exits.

    The search measures all combinations with the first of ``spares`` on ``sample`` pictures. It
    measures those that none beats with the other spares too. The best ``confirm`` settings are
    then measured on all pictures.
    """

    prices: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    bars: tuple[float, ...] = (0.7, 0.8, 0.9, 0.95, 0.98)
    spares: tuple[int, ...] = (5, 0, 20)
    reducers: tuple[str, ...] = ()
    sample: int = 20
    confirm: int = 36
