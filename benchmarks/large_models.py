"""How the speed of a large accelerated model follows its compute, on real pictures.

    python benchmarks/large_models.py PICTURES --model dinov3-l --side 1024 --threads 1

Weights are random, so nothing is said of quality: the entropy of the pictures decides what merges,
by one number of bits for 2x2 and 4x4 patches, chosen for half of the compute.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvf

import tokenstep
from tokenstep.data.pictures import read_picture, to_tensor
from tokenstep.hosts.hf_vit import HFViT
from tokenstep.policies.entropy import Entropy

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 16}
TINY = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "patch_size": 16}
PROCESSOR = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def dinov3(size: dict[str, int], side: int) -> nn.Module:
    wide = {"intermediate_size": 4 * size["hidden_size"], "num_register_tokens": 4}
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**size, **wide))


def eomt(size: dict[str, int], side: int) -> nn.Module:
    # Masked attention off, as its authors leave it after training.
    model = transformers.EomtForUniversalSegmentation(
        transformers.EomtConfig(**size, image_size=side)
    )
    model.attn_mask_probs.zero_()
    return model


MODELS: dict[str, tuple[Callable[[dict[str, int], int], nn.Module], dict[str, int]]] = {
    "dinov3-l": (dinov3, LARGE),
    "eomt-l": (eomt, LARGE),
    "dinov3-tiny": (dinov3, TINY),  # to try the script
    "eomt-tiny": (eomt, TINY),
}


def macs(host: HFViT, stages: Any, rows: list[int]) -> int:
    """Multiply-adds of the blocks where so many rows of a picture entered each."""
    blocks = host.blocks(stages)
    return sum(
        block.macs(count, count, size_bias=False) for block, count in zip(blocks, rows, strict=True)
    )


def seconds(model: nn.Module, image: Tensor) -> float:
    begin = time.perf_counter()
    model(image)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--model", choices=MODELS, default="dinov3-l")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--ratio", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    build, size = MODELS[given.model]
    model = build(size, given.side).eval()
    host = HFViT(model)
    stages = SimpleNamespace(**host.behind())
    rows = []
    with torch.inference_mode():
        for path in given.pictures:
            picture = to_tensor(read_picture(path))
            square = tvf.resize(picture, [given.side, given.side], antialias=True)
            image = (square.float() / 255 * 2 - 1)[None]
            plain = tokenstep.accelerate(model)
            dense_time = [seconds(model, image), seconds(plain, image)]
            full = macs(host, stages, [lengths[0] for lengths in plain.run.encoded.live])
            cheap, cost = at_ratio(model, host, stages, image, full / given.ratio)
            dense_time[0] = min(dense_time[0], seconds(model, image))
            step = min(seconds(cheap, image) for _ in range(2))
            speed, ratio = dense_time[0] / step, full / cost
            own = {"picture": path.name, "dense_s": dense_time[0], "unreduced_s": dense_time[1]}
            rows.append({**own, "reduced_s": step, "speed": speed, "ratio": ratio})
            print(
                f"{path.name}: {dense_time[0]:.2f} s, unreduced {dense_time[1]:.2f} s, reduced "
                f"{step:.2f} s: {speed:.2f} times for {ratio:.2f} times less compute "
                f"({speed / ratio:.2f})",
                flush=True,
            )
    share = statistics.median(row["speed"] / row["ratio"] for row in rows)
    print(f"{given.model} at {given.side} px: share {share:.2f} (median of {len(rows)} pictures)")
    if given.json:
        given.json.write_text(json.dumps({"model": given.model, "share": share, "rows": rows}))


def at_ratio(
    model: nn.Module, host: HFViT, stages: Any, image: Tensor, wanted: float
) -> tuple[nn.Module, int]:
    """The model merging by the bits at which a picture costs the nearest to ``wanted``."""
    patches = (image.shape[2] // host.patch) * (image.shape[3] // host.patch)
    policy = Entropy().build(host.patch, (0.5,) * 3, (0.5,) * 3)
    bits = policy.bits(policy.features(image))
    best = (float("inf"), 0.0, 0)
    for level in torch.linspace(0, 9, 91).tolist():
        large = bits[1][0] < level
        small = (bits[0][0] < level) & ~large.repeat_interleave(2, 0).repeat_interleave(2, 1)
        count = patches - 15 * int(large.sum()) - 3 * int(small.sum()) + host.prefix
        cost = macs(host, stages, [count] * len(host.blocks(stages)))
        best = min(best, (abs(cost - wanted), level, cost))
    level = best[1]
    return tokenstep.accelerate(model, PROCESSOR, policy=Entropy(bits=(level, level))), best[2]


if __name__ == "__main__":
    main()
