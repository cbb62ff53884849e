"""An EoMT as somebody would train it who never heard of tokenstep.

It is transformers' EoMT in the size of a ViT-Ti, 16 px patches, on 512x512 crops of pictures scaled
up, from a timm ViT-Ti's ImageNet weights:

    python train_eomt.py --data camvid --vit vit_tiny.safetensors --out eomt_camvid

Pictures: the first 267 of train by name. Killed, the same command goes on. `--steps 2` tries it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.optim import swa_utils
from torchvision import tv_tensors
from torchvision.transforms import v2

SIDE, PATCH, DIM, DEPTH, BLOCKS, QUERIES = 512, 16, 192, 12, 3, 50
LARGE = (512, 683)  # a picture of 480x360 whose short side is that of a crop
MEAN = STD = (0.5, 0.5, 0.5)
BATCH, RATE, VOID, EVERY = 4, 3e-4, 255, 50


def build(weights: Path, names: list[str]) -> nn.Module:
    """An EoMT whose encoder is filled from a file under timm's names."""
    config = transformers.EomtConfig(
        **{"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": 3},
        **{"image_size": SIDE, "patch_size": PATCH, "num_queries": QUERIES, "num_blocks": BLOCKS},
        **{"num_register_tokens": 0, "layerscale_value": 1.0, "drop_path_rate": 0.1},
        train_num_points=4096,
        id2label=dict(enumerate(names)),
    )
    model = transformers.EomtForUniversalSegmentation(config)
    # timm resamples positions and patch embedding to the new grid.
    overlay = {"file": str(weights), "num_classes": 0}
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": SIDE, "patch_size": PATCH, "num_classes": 0},
        **{"pretrained": True, "pretrained_cfg_overlay": overlay},
    )
    held = vit.state_dict()
    given = {
        "embeddings.cls_token": held["cls_token"] + held["pos_embed"][:, :1],
        "embeddings.position_embeddings.weight": held["pos_embed"][0, 1:],
        "embeddings.patch_embeddings.projection.weight": held["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": held["patch_embed.proj.bias"],
        "layernorm.weight": held["norm.weight"],
        "layernorm.bias": held["norm.bias"],
    }
    names_of = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.out_proj"}
    names_of |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for index in range(DEPTH):
        for kind in ("weight", "bias"):
            thirds = held[f"blocks.{index}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip("qkv", thirds, strict=True):
                given[f"layers.{index}.attention.{name}_proj.{kind}"] = part
            for own, theirs in names_of.items():
                given[f"layers.{index}.{theirs}.{kind}"] = held[f"blocks.{index}.{own}.{kind}"]
    unknown = model.load_state_dict(given, strict=False).unexpected_keys
    if unknown:
        raise SystemExit(f"{weights}: does not fill an EoMT: {unknown}")
    return model


class Pictures:
    """The first 267 pictures of train, augmented; the k-th of a run is the same in every run."""

    def __init__(self, data: Path) -> None:
        self.pairs = []
        for image in sorted((data / "train" / "images").iterdir())[:267]:
            label = data / "train" / "labels" / f"{image.stem}.png"
            pixels = v2.functional.pil_to_tensor(Image.open(image).convert("RGB"))
            self.pairs.append((pixels, v2.functional.pil_to_tensor(Image.open(label))[0]))

    def draw(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Picture ``(3, 512, 512)``, a mask of each class in it, and these classes."""
        epoch, within = divmod(place, len(self.pairs))
        order = torch.randperm(len(self.pairs), generator=torch.Generator().manual_seed(epoch))
        image, label = self.pairs[order[within]]
        torch.manual_seed(place)
        fill = {tv_tensors.Mask: VOID, "others": 0}
        change = v2.Compose(
            [
                v2.ScaleJitter(LARGE, (0.5, 2.0), antialias=True),
                v2.RandomCrop((SIDE, SIDE), pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(0.4, 0.4, 0.4),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        image, label = change(tv_tensors.Image(image), tv_tensors.Mask(label))
        classes = label.unique()
        classes = classes[classes != VOID]
        return image, (label == classes.view(-1, 1, 1)).float(), classes.long()


def anneal(model: nn.Module, done: float) -> None:
    """Masked attention fades block by block, first to last, and is off in the last tenth."""
    for block in range(BLOCKS):
        part = (done / 0.9 * (BLOCKS + 1) - 1 - block) if done < 0.9 else 1.0
        model.attn_mask_probs[block] = (1 - min(1.0, max(0.0, part))) ** 0.9


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """A rate for each layer, 0.8 times that above it; norms, biases and tables do not decay."""
    groups = []
    for name, parameter in model.named_parameters():
        below = 0
        if name.startswith("layers."):
            below = DEPTH - int(name.split(".")[1])
        elif name.startswith("embeddings."):
            below = DEPTH + 1
        plain = parameter.ndim < 2 or "position" in name or "token" in name
        decay = 0.0 if plain else 0.05
        groups.append({"params": [parameter], "lr": RATE * 0.8**below, "weight_decay": decay})
    return groups


def train(model: nn.Module, data: Pictures, steps: int, last: Path) -> None:
    """Train; a checkpoint every 50 steps."""
    groups = groups_of(model)
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.05)
    average = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=False
    )
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    begin = 0
    if last.exists():
        state = torch.load(last, weights_only=True)
        begin = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for step in range(begin, steps):
        anneal(model, step / steps)
        drawn = [data.draw(step * BATCH + index) for index in range(BATCH)]
        images = torch.stack([image for image, _, _ in drawn])
        torch.manual_seed(step)  # of stochastic depth, masks and points
        masks, classes = [mask for _, mask, _ in drawn], [kind for _, _, kind in drawn]
        loss = model(images, mask_labels=masks, class_labels=classes).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: loss {loss.item():.2f}", flush=True)
            held = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**held, "step": step + 1}, last.with_suffix(".new"))
            last.with_suffix(".new").replace(last)
    model.load_state_dict(average.module.state_dict())
    model.attn_mask_probs.zero_()


def main() -> None:
    """Train, and write the model and its processor as transformers does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vit", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    given = parser.parse_args()
    names = json.loads((given.data / "classes.json").read_text())["names"]
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = build(given.vit, names).train()
    train(model, Pictures(given.data), given.steps, given.out / "last.ckpt")
    model.half().save_pretrained(given.out)
    transformers.EomtImageProcessor(
        size={"shortest_edge": SIDE, "longest_edge": None},
        **{"do_split_image": True, "image_mean": list(MEAN), "image_std": list(STD)},
    ).save_pretrained(given.out)


if __name__ == "__main__":
    main()
