"""The command line: one command per verb. Errors are one line; progress goes to stderr."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tokenstep import __version__
from tokenstep.config import DENSE, PolicyRecipe, SegmenterRecipe, Settings, read_recipe
from tokenstep.data import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.evaluate import PARTITIONS, Comparison, evaluate
from tokenstep.infer import SegmentJob, segment_files
from tokenstep.pictures import find_pictures, write_text
from tokenstep.segmenter import StepSegmenter, load

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Semantic segmentation by plain ViTs that spend tokens only where the picture needs them.",
)
train_app = typer.Typer(no_args_is_help=True, help="Train a policy, then a segmenter with it.")
app.add_typer(train_app, name="train")
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

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
    try:
        app()
    except TokenstepError as error:
        errors.print(f"tokenstep: {error}")
        sys.exit(2)


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
    paths = find_pictures(pictures)
    network = _load(model, device, threads)
    settings = DENSE if dense else _settings(network, merge, exits)
    job = SegmentJob(out, settings, batch=batch, max_side=max_side, compare=compare)
    entries = []
    # The folder must take files before any work is done.
    _write_json({"images": []}, out / "report.json")
    with _progress() as progress:
        for entry in progress.track(
            segment_files(network, paths, job), total=len(paths), description="segment"
        ):
            entries.append(entry)
            if "error" in entry:
                errors.print(f"tokenstep: {entry['error']}")
    _write_json({"images": entries}, out / "report.json")
    failed = sum("error" in entry for entry in entries)
    _print_segmented([entry for entry in entries if "error" not in entry], out)
    if failed:
        raise typer.Exit(1)


@app.command("evaluate")
def evaluate_command(
    data: Annotated[Path, typer.Option(help="Labelled folder, as the README lays it out.")],
    model: ModelName = "road",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    names: Annotated[
        list[str] | None, typer.Option(help="Patterns of picture names; '!' before one excludes.")
    ] = None,
    partition: Annotated[str, typer.Option(help=f"One of {', '.join(PARTITIONS)}.")] = "policy",
    tolerance: Annotated[float, typer.Option(help="Impurity that the oracle lets pass.")] = 0.0,
    merge: Merge = None,
    exits: Exits = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Measure dense and reduced side by side: mIoU, boundary IoU, tokens, GMAC, seconds."""
    source = next((known for known in PARTITIONS if known == partition), None)
    if source is None:
        raise TokenstepError(f"--partition {partition}: choose from {', '.join(PARTITIONS)}")
    network = _load(model, device, threads)
    folder = LabelledFolder(data, split, names=names)
    comparison = Comparison(_settings(network, merge, exits), source, tolerance)
    with _progress() as progress:
        task = progress.add_task("evaluate", total=len(folder))
        found = evaluate(network, folder, comparison, on_picture=lambda: progress.advance(task))
    report = {"model": model, "data": data.name, "split": split, **found}
    if json_file is not None:
        _write_json(report, json_file)
    _print_evaluation(report)


@train_app.command("policy")
def train_policy_command(recipe: Path, overrides: Overrides = None) -> None:
    """Train the policy that finds homogeneous superpatches, from label maps."""
    from tokenstep.train import train_policy

    read = read_recipe(PolicyRecipe, recipe, overrides or [])
    report = train_policy(read, progress=sys.stderr.isatty())
    print(json.dumps(report, indent=1))


@train_app.command("segmenter")
def train_segmenter_command(recipe: Path, overrides: Overrides = None) -> None:
    """Train a segmenter on merged tokens, with the policy frozen."""
    from tokenstep.train import train_segmenter

    read = read_recipe(SegmenterRecipe, recipe, overrides or [])
    train_segmenter(read, progress=sys.stderr.isatty())
    print(f"saved to {read.out}; try: tokenstep evaluate --model {read.out} --data DIR")


def _load(name: str, device: str, threads: int | None) -> StepSegmenter:
    """Load a model onto a device."""
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise TokenstepError(f"--device {device}: is no device; choose cpu or cuda") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise TokenstepError(f"--device {device}: no CUDA device is visible; choose cpu")
    return load(name).to(place)


def _settings(model: StepSegmenter, merge: str | None, exits: str | None) -> Settings:
    """The model's own settings with what the command line changes."""
    settings = model.config.settings
    if merge is not None:
        sizes = model.config.policy.sizes
        settings = replace(settings, merge=_thresholds("--merge", merge, sizes, "superpatch size"))
    if exits is not None:
        after = model.config.vit.exits
        settings = replace(settings, exits=_thresholds("--exits", exits, after, "exit"))
    return settings


def _thresholds(option: str, text: str, of: tuple[int, ...], what: str) -> tuple[float, ...]:
    if text == "off":
        return ()
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise TokenstepError(f"{option} {text}: give numbers such as 0.6,0.6, or off") from error
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
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def _write_json(data: object, path: Path) -> None:
    write_text(path, json.dumps(data, indent=1) + "\n")


def _print_segmented(entries: list[dict[str, Any]], out: Path) -> None:
    """One row per picture on stdout."""
    if not entries:
        return
    table = Table("picture", "size", "tokens", "halted", "GMAC", "ms")
    for entry in entries:
        tokens, gmac = entry["tokens"], entry["gmac"]
        table.add_row(
            Path(entry["file"]).name,
            f"{entry['width']}x{entry['height']}",
            f"{tokens['grid']} -> {tokens['start']}",
            str(sum(tokens["halted"].values())),
            f"{gmac['dense']:.1f} -> {gmac['used']:.1f}",
            _milliseconds(entry),
        )
    Console().print(table)
    print(f"results in {out}")


def _milliseconds(entry: dict[str, Any]) -> str:
    model = ("prepare", "policy", "encode", "decode")
    used = sum(entry["milliseconds"][stage] for stage in model)
    if "dense" not in entry:
        return f"{used:.0f}"
    dense = sum(entry["dense"]["milliseconds"][stage] for stage in model)
    return f"{dense:.0f} -> {used:.0f}"


def _print_evaluation(report: dict[str, Any]) -> None:
    """The two halves as columns on stdout."""
    table = Table(
        f"{report['data']} {report['split']}, {report['images']} pictures", "dense", "reduced"
    )
    dense, reduced = report["dense"], report["reduced"]
    rows: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        ("mIoU", lambda half: f"{half['miou']:.4f}"),
        ("boundary IoU", lambda half: f"{half['boundary_iou']:.4f}"),
        ("accuracy", lambda half: f"{half['accuracy']:.4f}"),
        ("tokens at start", lambda half: f"{half['tokens']['start']:.0f}"),
        ("tokens at end", lambda half: f"{half['tokens']['end']:.0f}"),
        ("halted share", lambda half: f"{half['halted_share']:.3f}"),
        ("GMAC", lambda half: f"{half['gmac']['total']:.2f}"),
        ("seconds", lambda half: f"{half['seconds']:.3f}"),
    )
    for label, pick in rows:
        table.add_row(label, pick(dense), pick(reduced))
    Console().print(table)
