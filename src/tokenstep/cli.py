"""The command line: one command per verb. Errors are one line; progress goes to stderr."""

import io
import json
import logging
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenstep import __version__, tables
from tokenstep.config import DENSE, Settings
from tokenstep.data import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.evaluate import PARTITIONS, Comparison, evaluate
from tokenstep.hub import load
from tokenstep.infer import Report, SegmentJob, segment_files
from tokenstep.pictures import find_pictures, require_writable, write_text
from tokenstep.recipes import PolicyRecipe, SegmenterRecipe, read_recipe
from tokenstep.segmenter import StepSegmenter

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

ModelName = Annotated[
    str, typer.Option("--model", help="A shipped name, a folder, or a Hugging Face repository id.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if not given.")]
Merge = Annotated[
    str | None,
    typer.Option(help="Merge thresholds, one per superpatch size, as 0.6,0.6,0.6,0.6; 'off'."),
]
Exits = Annotated[
    str | None, typer.Option(help="Exit thresholds, one per exit, as 0.95,0.9; 'off'.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Recipe values to change, as data.root=DIR.")
]


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
    merge: Merge = None,
    exits: Exits = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Segment pictures: label map, overlay, token map, and report.json.

    Exit code 1 if some pictures failed; the others are done and the report names the failures.
    """
    if dense and (merge is not None or exits is not None):
        raise TokenstepError("--dense: switches merging and exits off; leave out --merge, --exits")
    paths, entries = _find(pictures)
    network = _load(model, device, threads)
    settings = DENSE if dense else _settings(network, merge, exits)
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
    write_text(out / "report.json", _json({"images": entries}) + "\n")
    done = [entry for entry in entries if "error" not in entry]
    if done:
        console.print(tables.segmented(done))
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
    names: Annotated[
        list[str] | None, typer.Option(help="Patterns of picture names; '!' before one excludes.")
    ] = None,
    partition: Annotated[str, typer.Option(help=f"One of {', '.join(PARTITIONS)}.")] = "policy",
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Impurity that the oracle lets pass.")
    ] = 0.0,
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
    network = _load(model, device, threads)
    comparison = Comparison(_settings(network, merge, exits), source, tolerance)
    with _progress() as progress:
        task = progress.add_task("evaluate", total=len(folder))
        found = evaluate(network, folder, comparison, on_picture=lambda: progress.advance(task))
    report = {"model": model, "data": data.resolve().name, "split": split, **found}
    if printed:
        print(_json(report))
        return
    if json_file is not None:
        write_text(json_file, _json(report) + "\n")
    console.print(tables.evaluated(report))


@train_app.command("policy")
def train_policy_command(recipe: Path, overrides: Overrides = None) -> None:
    """Train the policy that finds homogeneous superpatches, from label maps."""
    _require_training()
    from tokenstep.train import train_policy

    read = read_recipe(PolicyRecipe, recipe, overrides or [])
    report = train_policy(read, progress=sys.stderr.isatty())
    print(_json(report))


@train_app.command("segmenter")
def train_segmenter_command(recipe: Path, overrides: Overrides = None) -> None:
    """Train a segmenter on merged tokens, with the policy frozen."""
    _require_training()
    from tokenstep.train import train_segmenter

    read = read_recipe(SegmenterRecipe, recipe, overrides or [])
    train_segmenter(read, progress=sys.stderr.isatty())
    print(f"saved to {read.out}; try: tokenstep evaluate --model {read.out} --data DIR")


def _require_training() -> None:
    missing = [name for name in ("lightning", "tensorboard") if find_spec(name) is None]
    if missing:
        remedy = "install the extra: pip install 'tokenstep[train]'"
        raise TokenstepError(f"train: {' and '.join(missing)} missing; {remedy}")


def _load(name: str, device: str, threads: int | None) -> StepSegmenter:
    """Load a model onto a device."""
    if threads is not None:
        torch.set_num_threads(threads)
    cards = range(torch.cuda.device_count())
    known = ["cpu", *(["cuda"] if cards else []), *(f"cuda:{number}" for number in cards)]
    if device == "auto":
        device = "cuda" if cards else "cpu"
    if device not in known:
        raise TokenstepError(f"--device {device}: choose from auto, {', '.join(known)}")
    return load(name).to(device)


def _settings(model: StepSegmenter, merge: str | None, exits: str | None) -> Settings:
    """The model's own settings with what the command line changes."""
    settings = model.config.settings
    if merge is not None:
        sizes = model.config.policy.sizes
        settings = replace(settings, merge=_thresholds("--merge", merge, sizes, "superpatch size"))
    if exits is not None:
        after = model.config.vit.exits
        settings = replace(settings, exits=_thresholds("--exits", exits, after, "exit"))
    model.config.check(settings)
    return settings


def _thresholds(option: str, text: str, of: tuple[int, ...], what: str) -> tuple[float, ...]:
    if text == "off":
        return ()
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise TokenstepError(f"{option} {text}: give numbers such as 0.6,0.6, or off") from error
    if not of:
        raise TokenstepError(f"{option} {text}: the model has no {what}; leave {option} out")
    if len(values) != len(of):
        raise TokenstepError(f"{option} {text}: give {len(of)} values, one per {what} {of}")
    return values


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
