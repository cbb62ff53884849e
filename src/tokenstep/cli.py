"""The command line: one command per verb. Errors are one line; progress goes to stderr."""

import io
import json
import logging
import sys
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenstep import __version__, tables
from tokenstep.calibrate import calibrate
from tokenstep.compare import compare, figure, markdown
from tokenstep.data import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.evaluate import evaluate
from tokenstep.infer import Report, SegmentJob, segment_files
from tokenstep.measure import PARTITIONS, Run
from tokenstep.options import (
    Device,
    Exits,
    MaxLoss,
    Merge,
    ModelName,
    Names,
    Overrides,
    Threads,
    choose,
    load_model,
)
from tokenstep.pictures import find_pictures, require_writable, write_text, write_whole
from tokenstep.recipes import PolicyRecipe, SegmenterRecipe, read_recipe

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Semantic segmentation by plain ViTs that spend tokens only where the picture needs them.",
)
train_app = typer.Typer(no_args_is_help=True, help="Train a policy, then a segmenter with it.")
app.add_typer(train_app, name="train")
# Names of files are shown as they are, whatever rich would make of their brackets and colons.
console = Console(highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def main() -> None:
    """Run the command line; a fault of the call or of a file ends with one line and code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name need not be text that prints
            stream.reconfigure(errors="backslashreplace")
    # A damaged picture gets its one line from us, or is read all the same.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    try:
        app()
    except TokenstepError as error:
        _complain(str(error))
        sys.exit(2)


def _complain(message: str) -> None:
    errors.print("tokenstep:", " ".join(message.splitlines()))


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Handle the options of tokenstep itself."""
    if show:
        print(__version__)
        raise typer.Exit


@app.command()
def segment(
    pictures: Annotated[list[str], typer.Argument(help="Picture files, folders and globs.")],
    model: ModelName = "road",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("result"),
    dense: Annotated[bool, typer.Option("--dense", help="No merging, no exits.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run the dense model too and report its time.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a batch; sizes may differ.")] = 1,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="Scale larger pictures down to this long side.")
    ] = None,
    max_loss: MaxLoss = None,
    merge: Merge = None,
    exits: Exits = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Segment pictures: label map, overlay, token map, and report.json.

    Exit code 1 if some pictures failed; the others are done and the report names the failures.
    """
    paths, entries = _find(pictures)
    network = load_model(model, device, threads)
    settings, point = choose(network, dense=dense, max_loss=max_loss, merge=merge, exits=exits)
    require_writable(out)
    for entry in entries:
        _complain(entry["error"])
    job = SegmentJob(out, settings, batch=batch, max_side=max_side, compare=compare)
    with _progress() as progress:
        for entry in progress.track(
            segment_files(network, paths, job), total=len(paths), description="segment"
        ):
            entries.append(entry)
            if "error" in entry:
                _complain(entry["error"])
    report = {"settings": asdict(settings), "point": point and asdict(point), "images": entries}
    write_text(out / "report.json", _json(report) + "\n")
    done = [entry for entry in entries if "error" not in entry]
    if done:
        console.print(tables.segmented(done))
        if point is not None:
            print(tables.promise(point))
        print(f"results in {out}")
    if len(done) < len(entries):
        raise typer.Exit(1)


def _find(pictures: list[str]) -> tuple[list[Path], list[Report]]:
    """The pictures of the call, and an entry for each argument that holds none."""
    paths, faults = find_pictures(pictures)
    if not paths:
        for fault in faults.values():
            _complain(fault)
        raise typer.Exit(2)
    return paths, [{"file": file, "error": fault} for file, fault in faults.items()]


@app.command("evaluate")
def evaluate_command(
    data: Annotated[Path, typer.Option(help="Labelled folder, as the README lays it out.")],
    model: ModelName = "road",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    names: Names = None,
    partition: Annotated[str, typer.Option(help=f"One of {', '.join(PARTITIONS)}.")] = "policy",
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Impurity that the oracle lets pass.")
    ] = 0.0,
    max_loss: MaxLoss = None,
    merge: Merge = None,
    exits: Exits = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here; - prints them.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Measure dense and reduced side by side: mIoU, boundary IoU, tokens, GMAC, seconds."""
    source = next((known for known in PARTITIONS if known == partition), None)
    if source is None:
        raise TokenstepError(f"--partition {partition}: choose from {', '.join(PARTITIONS)}")
    printed = json_file == Path("-")
    if json_file is not None and not printed:
        if json_file.is_dir():
            raise TokenstepError(f"--json {json_file}: is a folder; name a file in it")
        require_writable(json_file.parent)
    folder = LabelledFolder(data, split, names=names)
    network = load_model(model, device, threads)
    settings, point = choose(network, max_loss=max_loss, merge=merge, exits=exits)
    run = Run(settings, source, tolerance)
    with _progress() as progress:
        task = progress.add_task("evaluate", total=len(folder))
        found = evaluate(network, folder, run, on_picture=lambda: progress.advance(task))
    of = {"model": model, "data": data.resolve().name, "split": split}
    report = {**of, **found, "point": point and asdict(point)}
    if printed:
        print(_json(report))
        return
    if json_file is not None:
        write_text(json_file, _json(report) + "\n")
    console.print(tables.evaluated(report))


@app.command("calibrate")
def calibrate_command(
    data: Annotated[Path, typer.Option(help="Labelled folder, as the README lays it out.")],
    out: Annotated[Path, typer.Option(help="Folder for the calibrated model.")],
    model: ModelName = "road",
    split: Annotated[str, typer.Option(help="Never the one to report on.")] = "val",
    names: Names = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Search the thresholds that cost least for what they lose, and store them in the model.

    Killed, it goes on where it was when the same command is given again.
    """
    require_writable(out)
    folder = LabelledFolder(data, split, names=names)
    network = load_model(model, device, threads)
    with _progress() as progress:
        tasks = {name: progress.add_task(name, total=None) for name in ("search", "confirm")}
        found = calibrate(
            network,
            folder,
            out / "calibration.notes.json",
            progress=lambda stage, done, total: progress.update(
                tasks[stage], completed=done, total=total
            ),
        )
    network.save_pretrained(out)
    report = {"model": model, "data": data.resolve().name, **found}
    write_text(out / "calibration.json", _json(report) + "\n")
    console.print(tables.calibrated(report))
    print(f"saved to {out}; try: tokenstep evaluate --model {out} --data DIR --max-loss 0.5")


@app.command("compare")
def compare_command(
    data: Annotated[Path, typer.Option(help="Labelled folder, as the README lays it out.")],
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
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Measure STEP beside what a user would do instead, all in one run: a table and a figure."""
    _require("matplotlib", extra="plot")
    require_writable(out)
    folder = LabelledFolder(data, split, names=names)
    network = load_model(model, device, threads)
    settings, _ = choose(network, max_loss=max_loss, merge=merge, exits=exits)
    others = [(name, load_model(name, device, threads)) for name in also or []]
    with _progress() as progress:
        task = progress.add_task("compare", total=len(folder) * (1 + len(others)))
        rows = compare(
            network, folder, settings, others=others, on_picture=lambda: progress.advance(task)
        )
    of = {"model": model, "data": data.resolve().name, "split": split, "images": len(folder)}
    write_text(out / "compare.json", _json({**of, "rows": rows}) + "\n")
    write_text(out / "compare.md", markdown(rows))
    title = f"{model} on {of['data']} {split}, {len(folder)} pictures"
    write_whole(out / "compare.png", lambda path: figure(rows, path, title))
    print(markdown(rows), end="")


@train_app.command("policy")
def train_policy_command(recipe: Path, overrides: Overrides = None) -> None:
    """Train the policy that finds homogeneous superpatches, from label maps."""
    _require("lightning", "tensorboard", extra="train")
    from tokenstep.loop import is_main
    from tokenstep.train import train_policy

    read = read_recipe(PolicyRecipe, recipe, overrides or [])
    report = train_policy(read, progress=sys.stderr.isatty())
    if is_main():
        print(_json(report))


@train_app.command("segmenter")
def train_segmenter_command(recipe: Path, overrides: Overrides = None) -> None:
    """Train a segmenter on merged tokens, with the policy frozen."""
    _require("lightning", "tensorboard", extra="train")
    from tokenstep.loop import is_main
    from tokenstep.train import train_segmenter

    read = read_recipe(SegmenterRecipe, recipe, overrides or [])
    train_segmenter(read, progress=sys.stderr.isatty())
    if is_main():
        print(f"saved to {read.out}; try: tokenstep evaluate --model {read.out} --data DIR")


def _require(*packages: str, extra: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        remedy = f"install the extra: pip install 'tokenstep[{extra}]'"
        raise TokenstepError(f"{' and '.join(missing)} missing; {remedy}")


def _progress() -> Progress:
    """A progress bar on stderr, and only on a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=errors,  # so that what is printed meanwhile stands above the bar
        disable=not sys.stderr.isatty(),
    )


def _json(data: object) -> str:
    return json.dumps(data, indent=1, allow_nan=False)
