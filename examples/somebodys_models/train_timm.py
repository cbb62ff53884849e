"""A dense segmenter as somebody would train it who never heard of tokenstep.

It is a timm ViT-Ti under a linear head, with 8 px patches at 480x360, from ImageNet weights:

    python train_timm.py --data camvid --vit vit_tiny.safetensors --out vit_camvid

Pictures: the first 267 of train by name. Killed, the same command goes on. `--steps 2,1` tries it.
"""

import argparse
import json
import math
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import swa_utils
from torchvision import tv_tensors
from torchvision.transforms import v2

SIZE, PATCH, VOID = (360, 480), 8, 255
MEAN = STD = (0.5, 0.5, 0.5)
# Small crops first, then whole pictures: height, width, pictures a step, rate.
PHASES = ((192, 256, 8, 3e-4), (360, 480, 4, 1e-4))


class Segmenter(nn.Module):
    """A ViT and a linear head; logits `(B, C, h, w)` of normalised pictures `(B, 3, h, w)`."""

    def __init__(self, vit: nn.Module, classes: int) -> None:
        super().__init__()
        self.vit = vit
        self.head = nn.Linear(vit.embed_dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits at the resolution of the pictures."""
        height, width = images.shape[2:]
        tokens = self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :]
        maps = self.head(tokens).transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
        return F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)


def build(weights: Path, classes: int) -> Segmenter:
    """The ViT from a file under timm's names, and a new head."""
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        **{"patch_size": PATCH, "img_size": SIZE, "num_classes": 0, "drop_path_rate": 0.1},
        **{"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights), "num_classes": 0}},
        dynamic_img_size=True,
    )
    return Segmenter(vit, classes)


class Pictures:
    """The first 267 pictures of train, augmented; the k-th of a run is the same in every run."""

    def __init__(self, data: Path) -> None:
        images = sorted((data / "train" / "images").iterdir())[:267]
        self.pairs = [
            (v2.functional.pil_to_tensor(Image.open(image).convert("RGB")), label_of(image))
            for image in images
        ]

    def draw(self, place: int, crop: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Picture ``(3, *crop)`` float and label ``(*crop)``."""
        epoch, within = divmod(place, len(self.pairs))
        order = torch.randperm(len(self.pairs), generator=torch.Generator().manual_seed(epoch))
        image, label = self.pairs[order[within]]
        torch.manual_seed(place)
        change = v2.Compose(
            [
                v2.ScaleJitter(SIZE, (0.5, 2.0), antialias=True),
                v2.RandomCrop(crop, pad_if_needed=True, fill={tv_tensors.Mask: VOID, "others": 0}),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(0.4, 0.4, 0.4),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        return change(tv_tensors.Image(image), tv_tensors.Mask(label))

    def weights(self, classes: int) -> Tensor:
        """Rare classes count more: (median / pixels) ** 0.4."""
        every = torch.stack([torch.bincount(one.flatten(), minlength=256) for _, one in self.pairs])
        pixels = every.sum(0)[:classes].float().clamp(min=1)
        return (pixels.median() / pixels) ** 0.4


def label_of(image: Path) -> Tensor:
    """The label map of a picture, ``(h, w)`` uint8."""
    label = image.parent.parent / "labels" / f"{image.stem}.png"
    return v2.functional.pil_to_tensor(Image.open(label))[0]


def train(model: Segmenter, data: Pictures, steps: list[int], last: Path, classes: int) -> None:
    """Train through both phases; a checkpoint every 50 steps."""
    average = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=False
    )
    weights, place, begin = data.weights(classes), 0, (0, 0)
    state = torch.load(last, weights_only=True) if last.exists() else None
    if state is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        begin, place = (state["phase"], state["step"]), state["place"]
    for phase, (height, width, batch, rate) in enumerate(PHASES):
        groups = param_groups_layer_decay(model.vit, weight_decay=0.05, layer_decay=0.8)
        groups.append({"params": [*model.head.parameters()], "lr_scale": 10.0})
        optimizer = torch.optim.AdamW(groups, lr=rate)
        if state is not None and begin[0] == phase and begin[1] > 0:
            optimizer.load_state_dict(state["optimizer"])
        for step in range(steps[phase]):
            if (phase, step) < begin:
                continue
            fall = 0.5 * (1 + math.cos(math.pi * step / steps[phase]))
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0) * min(1.0, (step + 1) / 50) * fall
            pairs = [data.draw(place + index, (height, width)) for index in range(batch)]
            images, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
            torch.manual_seed(place)  # of stochastic depth
            loss = F.cross_entropy(model(images), labels.long(), weights, ignore_index=VOID)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(model)
            place += batch
            if (step + 1) % 50 == 0 or step + 1 == steps[phase]:
                print(f"phase {phase + 1}, step {step + 1}: loss {loss.item():.3f}", flush=True)
                held = {"model": model.state_dict(), "average": average.state_dict()}
                held |= {"optimizer": optimizer.state_dict(), "place": place}
                torch.save({**held, "phase": phase, "step": step + 1}, last.with_suffix(".new"))
                last.with_suffix(".new").replace(last)
    model.load_state_dict(average.module.state_dict())


def main() -> None:
    """Train, and write what was learned."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vit", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", default="2400,500")
    given = parser.parse_args()
    names = json.loads((given.data / "classes.json").read_text())["names"]
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = build(given.vit, len(names)).train()
    steps = [int(count) for count in given.steps.split(",")]
    train(model, Pictures(given.data), steps, given.out / "last.ckpt", len(names))
    held = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(held, given.out / "model.safetensors")
    settings = {
        **{"vit": "vit_tiny_patch16_224", "patch": PATCH, "size": SIZE},
        **{"classes": names, "mean": MEAN, "std": STD, "steps": steps},
    }
    (given.out / "config.json").write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    main()
