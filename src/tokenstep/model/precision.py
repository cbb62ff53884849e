"""The numbers that a model computes with: fp32, or 16 bits where a device is made for them."""

import torch

from tokenstep.config import Precision

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def dtype_for(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype that ``precision`` names; "auto" is the fastest that a device is made for.

    That is bf16, on an older GPU fp16, and fp32 on CPUs without AMX.

    Raises:
        ValueError: there is no such precision.
    """
    if precision == "auto":
        precision = "bf16" if has_bf16(device.type) else "fp16" if device.type == "cuda" else "fp32"
    if precision not in DTYPES:
        raise ValueError(f"unknown precision {precision!r}, choose from auto, {', '.join(DTYPES)}")
    return DTYPES[precision]


def has_bf16(device: str) -> bool:
    """Whether a device, "cuda" or "cpu", has bf16 arithmetic of its own.

    On a CPU that is AMX; without it bf16 is emulated, and slower than fp32.
    """
    if device == "cuda":
        return torch.cuda.is_available() and bool(
            torch.cuda.is_bf16_supported(including_emulation=False)
        )
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, "float64" and the like where it has none here."""
    names = {value: key for key, value in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))
