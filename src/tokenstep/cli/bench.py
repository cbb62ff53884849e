"""The command that times: STEP, the dense model, and what else a user would run."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from tokenstep import __version__
from tokenstep.cli import tables
from tokenstep.cli.options import (
    AcceleratorName,
    BudgetOf,
    Device,
    MaxLoss,
    Merge,
    ModelName,
    PolicyText,
    Reducers,
    Threads,
    load_any,
)
from tokenstep.cli.spending import Asked, choose, numbers, require_reducers
from tokenstep.config import Spending, Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.measure.settings import CPU_ONLY, RUNTIME_PACKAGES
from tokenstep.terminal import as_json, complain, console, progress_bar, require_extra

if TYPE_CHECKING:
    from torch import Tensor

    from tokenstep.model.segmenter import Segmenter
    from tokenstep.runtimes.dense import MakeRuntime

app = typer.Typer()


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
    exits: Annotated[
        str | None,
        typer.Option(help="Thresholds, as 0.95,0.9, or off; with --backbone blocks, as 12,18."),
    ] = None,
    halt: Annotated[
        str | None,
        typer.Option(help="With --backbone: share of the tokens that halts at each exit."),
    ] = None,
    reducer: Reducers = None,
    budget: BudgetOf = None,
    accelerator: AcceleratorName = None,
    policy: PolicyText = None,
    seconds: Annotated[float, typer.Option(min=0, help="For each way and scope.")] = 5.0,
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp16 or auto.")] = "fp32",
    force: Annotated[bool, typer.Option("--force", help="Time noise too.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Time STEP beside the dense model on real pictures, all ways in turn in one process."""
    from tokenstep.data.pictures import find_pictures
    from tokenstep.data.whole_files import require_writable, write_text
    from tokenstep.measure.cases import Case
    from tokenstep.measure.machine import description, gemm_rate
    from tokenstep.measure.speed import bench, growth
    from tokenstep.model.precision import name_of
    from tokenstep.model.segmenter import Segmenter

    cases = [
        Case(_size(text), count)
        for text in size or ["480x360", "960x720"]
        for count in batch or [1, 8]
    ]
    network = load_any(model, device, threads, precision, accelerator=accelerator, policy=policy)
    place = network.device
    runtimes = _runtimes(rival or [], on_cpu=place.type == "cpu" and network.dtype.itemsize == 4)
    if (runtimes or backbone) and not isinstance(network, Segmenter):
        raise TokenstepError(
            f"--{'rival' if runtimes else 'backbone'}: is for models of tokenstep; leave it out"
        )
    if json_file is not None:
        require_writable(json_file.parent)
    paths, faults = find_pictures(pictures)
    for fault in faults.values():
        complain(fault)
    if not paths:
        raise typer.Exit(2)
    if not force:
        _refuse_noise(paths)
    if backbone is None:
        if halt is not None:
            raise TokenstepError("--halt: is of --backbone, whose exits are random")
        asked = Asked(False, max_loss, merge, exits, reducer, budget)
        spending, point = asked.of(network)
        spendings = [spending]
    else:
        if budget is not None:
            raise TokenstepError("--budget: the backbone gets one of its own; leave it out")
        thresholds, point = choose(network, max_loss=max_loss, merge=merge)[0], None
        large = _with_backbone(cast(Segmenter, network), backbone, exits, halt)
        require_reducers(large, reducer or [])
        spendings = _of_backbone(large, paths, cases[0].size, thresholds, halt, reducer)
        network = large
    makes = {name: partial(make, cast(Segmenter, network)) for name, make in runtimes.items()}
    rows = []
    with progress_bar() as progress:
        for case in progress.track(cases, description="bench"):
            rows += bench(network, paths, case, spendings, runtimes=makes, seconds=seconds)
    grown = growth(rows)
    report = {
        "tokenstep": __version__,
        "machine": {**description(place), "gemm_gmac_per_second": gemm_rate(network.largest)},
        "model": model,
        "backbone": backbone,
        "precision": name_of(network.dtype),
        "settings": asdict(spendings[0]),
        "others": [asdict(other) for other in spendings[1:]],
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


def _with_backbone(
    model: "Segmenter", name: str, exits: str | None, halt: str | None
) -> "Segmenter":
    """A large ViT with random weights, with exits if some are to halt tokens.

    Raises:
        TokenstepError: the options do not fit each other or the ViT.
    """
    from tokenstep.measure.backbone import with_backbone

    if (exits is None) != (halt is None):
        raise TokenstepError("--backbone: give --exits BLOCKS and --halt SHARES together")
    if exits is None or halt is None:
        return with_backbone(model, name)
    if not all(part.strip().isdecimal() for part in exits.split(",")):
        raise TokenstepError(f"--exits {exits}: give blocks such as 12,18")
    after, shares = [int(part) for part in exits.split(",")], numbers("--halt", halt)
    if len(after) != len(shares) or not all(0 < share < 1 for share in shares):
        raise TokenstepError(f"--halt {halt}: give a share between 0 and 1 for each of {exits}")
    return with_backbone(model, name, after)


def _of_backbone(
    model: "Segmenter",
    paths: list[Path],
    size: tuple[int, int],
    thresholds: Thresholds,
    halt: str | None,
    reducers: list[str] | None,
) -> list[Spending]:
    """What is timed of a backbone: STEP, the budget that it spends on average, each reducer."""
    from tokenstep.measure.backbone import budget_like, halting
    from tokenstep.measure.cases import Case, fitting

    pictures: list[Tensor] = fitting(paths, Case(size, 1))[1][:8]
    step = thresholds.without_exits()
    if halt is not None:
        step = halting(model, pictures, thresholds.merge, numbers("--halt", halt))
    alone = [Thresholds(reducers=(reducer,)) for reducer in reducers or []]
    return [step, budget_like(model, pictures, step), *alone]


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
