"""The commands that measure on labelled pictures: evaluate, calibrate, compare."""

from pathlib import Path
from typing import Annotated

import typer

from tokenstep.cli import tables
from tokenstep.cli.options import (
    AcceleratorName,
    BudgetOf,
    Data,
    Device,
    Exits,
    MaxLoss,
    Merge,
    ModelName,
    Names,
    PolicyText,
    Reducers,
    Threads,
    load_any,
    load_model,
)
from tokenstep.cli.spending import Asked, choose, numbers, require_points, require_reducers
from tokenstep.errors import TokenstepError
from tokenstep.measure.settings import PARTITION_SOURCES, Search
from tokenstep.serve import summary
from tokenstep.terminal import as_json, console, progress_bar, require_extra

app = typer.Typer()


@app.command("evaluate")
def evaluate_command(
    data: Data,
    model: ModelName = "road",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    names: Names = None,
    partition: Annotated[
        str, typer.Option(help=f"One of {', '.join(PARTITION_SOURCES)}.")
    ] = "policy",
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Impurity that the oracle lets pass.")
    ] = 0.0,
    max_loss: MaxLoss = None,
    merge: Merge = None,
    exits: Exits = None,
    reducer: Reducers = None,
    budget: BudgetOf = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here; - prints them.")
    ] = None,
    accelerator: AcceleratorName = None,
    policy: PolicyText = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp16 or auto.")] = "fp32",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Measure dense and reduced side by side: mIoU, boundaries, tokens, GMAC, seconds."""
    from tokenstep.data.labelled_folder import LabelledFolder
    from tokenstep.data.whole_files import require_writable, write_text
    from tokenstep.measure.evaluate import evaluate
    from tokenstep.measure.quality import Method
    from tokenstep.model.precision import name_of

    source = next((known for known in PARTITION_SOURCES if known == partition), None)
    if source is None:
        raise TokenstepError(f"--partition {partition}: choose from {', '.join(PARTITION_SOURCES)}")
    printed = json_file == Path("-")
    if json_file is not None and not printed:
        if json_file.is_dir():
            raise TokenstepError(f"--json {json_file}: is a folder; name a file in it")
        require_writable(json_file.parent)
    folder = LabelledFolder(data, split, names=names)
    network = load_any(model, device, threads, precision, accelerator=accelerator, policy=policy)
    asked = Asked(max_loss=max_loss, merge=merge, exits=exits, reducer=reducer, budget=budget)
    spending, point = asked.of(network)
    method = Method(spending, source, tolerance)
    with progress_bar() as progress:
        task = progress.add_task("evaluate", total=len(folder))
        measured = evaluate(network, folder, method, on_picture=lambda: progress.advance(task))
    head = {"model": model, "data": data.resolve().name, "split": split}
    report = {**head, **measured, "point": point and point.report()}
    report["precision"] = name_of(network.dtype)
    if printed:
        print(as_json(report))
        return
    if json_file is not None:
        write_text(json_file, as_json(report) + "\n")
    console.print(tables.evaluated(report))
    print(summary.warned(report["warnings"]), end="")


@app.command("calibrate")
def calibrate_command(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the calibrated model.")],
    model: ModelName = "road",
    split: Annotated[str, typer.Option(help="Never the one to report on.")] = "val",
    names: Names = None,
    sample: Annotated[
        int, typer.Option(min=1, help="Pictures to search on; the best are measured on all.")
    ] = Search.sample,
    confirm: Annotated[
        int, typer.Option(min=1, help="How many settings to measure on all pictures.")
    ] = Search.confirm,
    prices: Annotated[
        str, typer.Option(help="Impure patches that a superpatch may bring; a merging for each.")
    ] = ",".join(map(str, Search.prices)),
    bars: Annotated[str, typer.Option(help="Confidences at which tokens halt.")] = ",".join(
        map(str, Search.bars)
    ),
    reducer: Annotated[
        list[str] | None,
        typer.Option(help="Search this reducer in the place of the exits too; may be repeated."),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the weights in fp16.")] = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Search the thresholds that cost least for what they lose, and store them in the model.

    Killed, it goes on where it was when the same command is given again.
    """
    from tokenstep.data.labelled_folder import LabelledFolder
    from tokenstep.data.whole_files import write_text
    from tokenstep.measure.calibrate import calibrate
    from tokenstep.model.card import write_card
    from tokenstep.train.lock import held
    from tokenstep.train.run_folder import card_of

    search = Search(
        numbers("--prices", prices),
        numbers("--bars", bars),
        reducers=tuple(reducer or []),
        sample=sample,
        confirm=confirm,
    )
    folder = LabelledFolder(data, split, names=names)
    network = load_model(model, device, threads)
    require_reducers(network, search.reducers)
    with held(out), progress_bar() as progress:
        tasks = {
            name: progress.add_task(name, total=None) for name in ("search", "confirm", "budgets")
        }
        calibration = calibrate(
            network,
            folder,
            out / "calibration.notes.json",
            search=search,
            progress=lambda stage, done, total: progress.update(
                tasks[stage], completed=done, total=total
            ),
        )
        (network.half() if half else network).save_pretrained(out)
        write_card(out, card_of(out, network.config))
        report = {"model": model, "data": data.resolve().name, **calibration}
        write_text(out / "calibration.json", as_json(report) + "\n")
    console.print(tables.calibrated(report))
    print(f"saved to {out}; try: tokenstep evaluate --model {out} --data DIR --max-loss 0.5")


@app.command("compare")
def compare_command(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for compare.json, .md and .png.")],
    model: ModelName = "road",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    names: Names = None,
    also: Annotated[
        list[str] | None, typer.Option(help="Another model of the same classes, run dense.")
    ] = None,
    max_loss: MaxLoss = None,
    merge: Merge = None,
    exits: Exits = None,
    reducer: Reducers = None,
    rivals: Annotated[
        list[float] | None,
        typer.Option(
            help="Also ToMe, EViT, ALGM, MCTF, MPM, CTS and other partitions at the cost of the "
            "operating point that loses at most so many points; may be repeated.",
        ),
    ] = None,
    less: Annotated[
        list[float] | None,
        typer.Option(
            min=1,
            max=1000,
            help="Also each of these at so much less compute, as 1.5; repeatable.",
        ),
    ] = None,
    choose_on: Annotated[
        str | None,
        typer.Option(help="The split on which their cost is matched. [the split itself]"),
    ] = None,
    accelerator: AcceleratorName = None,
    policy: PolicyText = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Measure STEP beside what a user would do instead, all in one run: a table and a figure."""
    require_extra("matplotlib", extra="plot")
    from tokenstep.data.faults import empty_classes
    from tokenstep.data.labelled_folder import LabelledFolder
    from tokenstep.data.whole_files import require_writable, write_text, write_whole
    from tokenstep.measure.compare import compare, figure, markdown
    from tokenstep.measure.quality import require_same_classes

    require_writable(out)
    folder = LabelledFolder(data, split, names=names)
    network = load_any(model, device, threads, accelerator=accelerator, policy=policy)
    thresholds, _ = choose(network, max_loss=max_loss, merge=merge, exits=exits)
    require_reducers(network, reducer or [])
    if rivals:
        require_points(network, "--rivals")
    rivalled = [network.config.at(loss)[0] for loss in rivals or []]
    require_same_classes(network, folder)
    choosing = None if choose_on is None else LabelledFolder(data, choose_on)
    warnings = empty_classes(folder)
    others = [(name, load_any(name, device, threads)) for name in also or []]
    with progress_bar() as progress:
        task = progress.add_task("compare", total=len(folder) * (1 + len(others)))
        rows = compare(
            network,
            folder,
            thresholds,
            reducers=tuple(reducer or []),
            others=others,
            rivalled=rivalled,
            ratios=less or (),
            choosing=choosing,
            on_picture=lambda: progress.advance(task),
        )
    head = {"model": model, "data": data.resolve().name, "split": split, "images": len(folder)}
    head |= {"less": less or [], "costs_matched_on": choose_on or split}
    write_text(out / "compare.json", as_json({**head, "warnings": warnings, "rows": rows}) + "\n")
    text = markdown(rows) + summary.warned(warnings)
    write_text(out / "compare.md", text)
    title = f"{model} on {head['data']} {split}, {len(folder)} pictures"
    write_whole(out / "compare.png", lambda path: figure(rows, path, title))
    print(text, end="")
