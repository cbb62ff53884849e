"""The command that times: STEP, the dense model, and what else a user would run."""

from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tokenstep import __version__
from tokenstep.cli import tables
from tokenstep.cli.options import (
    BudgetOf,
    Device,
    Exits,
    MaxLoss,
    Merge,
    ModelName,
    Reducers,
    Threads,
    choose,
    load_model,
    require_reducers,
    spending_of,
)
from tokenstep.errors import TokenstepError
from tokenstep.measure.settings import CPU_ONLY, RUNTIME_PACKAGES
from tokenstep.terminal import as_json, complain, console, progress_bar, require_extra

if TYPE_CHECKING:
    import torch

    from tokenstep.runtimes.dense import MakeRuntime

app = typer.Typer()


class Precision(StrEnum):
    """Of the arithmetic that is timed."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


@app.command("bench")
def bench_command(
    pictures: Annotated[list[str], typer.Argument(help="Picture files, folders and globs.")],
    model: ModelName = "road",
    backbone: Annotated[
        str | None,
        typer.Option(help="Time this timm ViT with random weights and the model's policy."),
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="WIDTHxHEIGHT; may be repeated. [480x360, 960x720]")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Pictures a batch; may be repeated. [1, 8]")
    ] = None,
    rival: Annotated[
        list[str] | None, typer.Option(help=f"Also {', '.join(RUNTIME_PACKAGES)}; may be repeated.")
    ] = None,
    max_loss: MaxLoss = None,
    merge: Merge = None,
    exits: Exits = None,
    reducer: Reducers = None,
    budget: BudgetOf = None,
    seconds: Annotated[float, typer.Option(min=0, help="For each way and scope.")] = 5.0,
    precision: Annotated[
        Precision, typer.Option(help="16 bits are by autocast.", case_sensitive=False)
    ] = Precision.FP32,
    force: Annotated[bool, typer.Option("--force", help="Time noise too.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Time STEP beside the dense model on real pictures, all ways in turn in one process."""
    import torch

    from tokenstep.data.pictures import find_pictures
    from tokenstep.data.whole_files import require_writable, write_text
    from tokenstep.measure.cases import Case
    from tokenstep.measure.machine import description, gemm_rate
    from tokenstep.measure.speed import bench, growth, with_backbone

    cases = [
        Case(_size(text), count)
        for text in size or ["480x360", "960x720"]
        for count in batch or [1, 8]
    ]
    network = load_model(model, device, threads)
    place = next(network.parameters()).device
    runtimes = _runtimes(rival or [], on_cpu=place.type == "cpu" and precision is Precision.FP32)
    if json_file is not None:
        require_writable(json_file.parent)
    paths, faults = find_pictures(pictures)
    for fault in faults.values():
        complain(fault)
    if not paths:
        raise typer.Exit(2)
    if not force:
        _refuse_noise(paths)
    of_model = None if backbone else reducer
    thresholds, point = choose(
        network, max_loss=max_loss, merge=merge, exits=exits, reducer=of_model
    )
    if backbone is not None:
        network, point = with_backbone(network, backbone), None
        require_reducers(network, reducer or [])
        # Exits of random weights are never sure, so they only cost.
        thresholds = replace(thresholds.without_exits(), reducers=tuple(reducer or []))
    by_hand = bool(merge or exits or reducer)
    spending, point = spending_of(
        network, budget, thresholds, point, max_loss=max_loss, by_hand=by_hand
    )
    rows = []
    with progress_bar() as progress:
        for case in progress.track(cases, description="bench"):
            with torch.autocast(place.type, _dtype(precision), precision is not Precision.FP32):
                rows += bench(
                    network,
                    paths,
                    case,
                    spending,
                    runtimes=runtimes,
                    seconds=seconds,
                )
    grown = growth(rows)
    weight: torch.Tensor = cast(Any, network.encoder.blocks)[0].mlp.fc1.weight
    report = {
        "tokenstep": __version__,
        "machine": {**description(place), "gemm_gmac_per_second": gemm_rate(weight)},
        "model": model,
        "backbone": backbone,
        "precision": precision.value,
        "settings": asdict(spending),
        "point": point and point.report(),
        "pictures": len(paths),
        "growth": grown,
        "rows": rows,
    }
    if json_file is not None:
        write_text(json_file, as_json(report) + "\n")
    console.print(tables.benched(rows))
    if grown:
        console.print(tables.grown(grown))


def _dtype(precision: Precision) -> "torch.dtype":
    import torch

    return {
        Precision.FP32: torch.float32,
        Precision.BF16: torch.bfloat16,
        Precision.FP16: torch.float16,
    }[precision]


def _runtimes(names: list[str], *, on_cpu: bool) -> "dict[str, MakeRuntime]":
    """The runtimes that the options name, by the method of their rows."""
    from tokenstep.runtimes.dense import RUNTIMES

    runtimes = {}
    for name in names:
        if name not in RUNTIME_PACKAGES:
            raise TokenstepError(f"--rival {name}: choose from {', '.join(RUNTIME_PACKAGES)}")
        if name in CPU_ONLY and not on_cpu:
            raise TokenstepError(f"--rival {name}: runs in fp32 on the CPU alone; leave it out")
        require_extra(*RUNTIME_PACKAGES[name], extra="bench")
        runtimes[f"dense, {name}"] = RUNTIMES[name]
    return runtimes


def _refuse_noise(paths: list[Path]) -> None:
    from tokenstep.data.pictures import read_picture, to_tensor
    from tokenstep.measure.cases import is_noise

    if all(is_noise(to_tensor(read_picture(path))) for path in paths):
        raise TokenstepError(
            f"{paths[0]}: is noise, as all pictures given: there is nothing to merge in noise, and "
            "times of it say nothing of pictures; give real ones, or --force"
        )


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise TokenstepError(f"--size {text}: give WIDTHxHEIGHT in pixels, as 960x720")
    return int(height), int(width)
