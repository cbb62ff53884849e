"""The command line: one command per verb. Errors are one line; progress goes to stderr."""

import io
import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenstep import __version__
from tokenstep.cli import bench, demo, explain, measure, tables
from tokenstep.cli import data as cli_data
from tokenstep.cli.options import (
    AcceleratorName,
    BudgetOf,
    Device,
    Exits,
    MaxLoss,
    Merge,
    ModelName,
    Overrides,
    PolicyText,
    PrecisionOf,
    Reducers,
    Side,
    Threads,
    load_any,
    max_side_of,
    scale_note,
)
from tokenstep.cli.spending import Asked
from tokenstep.config import Budget
from tokenstep.errors import PictureWarning, Terminated, TokenstepError
from tokenstep.serve import summary
from tokenstep.terminal import (
    as_json,
    complain,
    console,
    one_line_a_warning,
    progress_bar,
    require_extra,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Semantic segmentation by plain ViTs that spend tokens only where the picture needs them.",
)
train_app = typer.Typer(no_args_is_help=True, help="Train a policy, then a segmenter with it.")
app.add_typer(train_app, name="train")
app.add_typer(cli_data.app, name="data")
app.add_typer(measure.app)
app.add_typer(bench.app)
app.add_typer(demo.app)
app.add_typer(explain.app)


def main() -> None:
    """Run the command line; a fault of the call or of a file ends with one line and code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name need not be text that prints
            stream.reconfigure(errors="backslashreplace")
    # A damaged picture gets its one line from us, or is read all the same.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("default", category=PictureWarning)
    one_line_a_warning(PictureWarning)
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    signal.signal(signal.SIGTERM, _end)
    try:
        app()
    except TokenstepError as error:
        complain(str(error))
        sys.exit(2)
    except Terminated as end:
        complain(end.message)
        raise


def _end(*_: object) -> None:
    raise Terminated("told to end")


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
    max_side: Side = None,
    tile: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Segment larger pictures in overlapping windows of this side. [2048, for what "
            "would not fit in memory]",
        ),
    ] = None,
    max_loss: MaxLoss = None,
    merge: Merge = None,
    exits: Exits = None,
    reducer: Reducers = None,
    budget: BudgetOf = None,
    accelerator: AcceleratorName = None,
    policy: PolicyText = None,
    precision: PrecisionOf = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Segment pictures: label map, overlay, token map, and report.json.

    Exit code 1 if some pictures failed; the others are done and the report names the failures.
    """
    from tokenstep.data.scaling import side_for
    from tokenstep.data.whole_files import require_writable
    from tokenstep.model.precision import name_of
    from tokenstep.serve.files import SegmentJob, segment_files
    from tokenstep.serve.reports import ReportFile, classes_of, header
    from tokenstep.serve.windows import require_side

    wanted = max_side_of(max_side, tile=tile)
    paths, entries = _find(pictures, out)
    network = load_any(model, device, threads, precision, accelerator=accelerator, policy=policy)
    spending, point = Asked(dense, max_loss, merge, exits, reducer, budget).of(network)
    if tile is not None:
        require_side(network, tile)
    require_writable(out)
    for entry in entries:
        complain(entry["error"])
    side = side_for(wanted, network.config.long_side)
    job = SegmentJob(out, spending, batch=batch, max_side=side, compare=compare, tile=tile)
    head = {**header(model, network.config, spending, point), "max_side": side}
    head["precision"] = name_of(network.dtype)
    head["classes"] = classes_of(network.config)
    with progress_bar() as progress, ReportFile(out / "report.json", head, entries) as report:
        for entry in progress.track(
            segment_files(network, paths, job), total=len(paths), description="segment"
        ):
            report.add(entry)
            if "error" in entry:
                complain(entry["error"])
    done = [entry for entry in entries if "error" not in entry]
    if done:
        console.print(tables.segmented(done))
        for entry in done:
            if entry["windows"] > 1:
                print(f"{entry['file']}: in {entry['windows']} overlapping windows")
        scaled = sum("scaled_to" in entry for entry in done)
        if scaled and side is not None:
            print(scale_note(scaled, side, max_side))
        print(summary.spent(done))
        if point is not None:
            print(summary.promise(point, by_budget=isinstance(spending, Budget)))
        print(f"results in {out}")
    if len(done) < len(entries):
        raise typer.Exit(1)


def _find(pictures: list[str], out: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    """The pictures of the call, and an entry for each argument that holds none."""
    from tokenstep.data.pictures import find_pictures
    from tokenstep.serve.files import missing

    paths, faults = find_pictures(pictures)
    if not paths:
        for fault in faults.values():
            complain(fault)
        raise typer.Exit(2)
    return paths, missing(paths, faults, out)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make Ctrl-C in a training one line, which says where the same command goes on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        complain(str(stop) or "interrupted; the same command goes on where it was")
        raise typer.Exit(128 + signal.SIGINT) from None


@train_app.command("policy")
def train_policy_command(recipe: Path, overrides: Overrides = None) -> None:
    """Train the policy that finds homogeneous superpatches, from label maps."""
    require_extra("lightning", "tensorboard", extra="train")
    from tokenstep.train.loop import is_main
    from tokenstep.train.recipe import PolicyRecipe, read_recipe
    from tokenstep.train.train import train_policy

    read = read_recipe(PolicyRecipe, recipe, overrides or [])
    with _interruptible():
        report = train_policy(read)
    if is_main():
        print(as_json(report))


@train_app.command("segmenter")
def train_segmenter_command(recipe: Path, overrides: Overrides = None) -> None:
    """Train a segmenter on merged tokens, with the policy frozen."""
    require_extra("lightning", "tensorboard", extra="train")
    from tokenstep.train.loop import is_main
    from tokenstep.train.recipe import SegmenterRecipe, read_recipe
    from tokenstep.train.train import train_segmenter

    read = read_recipe(SegmenterRecipe, recipe, overrides or [])
    with _interruptible():
        train_segmenter(read)
    if is_main():
        data = f"--data {read.data.root} --split {read.data.val_split}"
        print(f"the model is in {read.out}; try: tokenstep evaluate --model {read.out} {data}")
