"""The command that shows where tokens go: a report on pictures, or on a labelled folder."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenstep.cli.options import (
    AcceleratorName,
    Device,
    Exits,
    MaxLoss,
    Merge,
    ModelName,
    Names,
    PolicyText,
    Reducers,
    Side,
    Threads,
    load_any,
    max_side_of,
    scale_note,
)
from tokenstep.cli.spending import choose
from tokenstep.config import DENSE, OperatingPoint, Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.serve import summary
from tokenstep.terminal import as_json, complain, progress_bar, require_extra

if TYPE_CHECKING:
    from tokenstep.data.labelled_folder import LabelledFolder
    from tokenstep.explain.report import Section
    from tokenstep.model.any_segmenter import AnySegmenter

app = typer.Typer()

# The numbers of report.json, with `faults`, and the sections of report.html.
Explanation = tuple[dict[str, Any], "list[Section]"]


@app.command("explain")
def explain_command(
    pictures: Annotated[
        list[str] | None, typer.Argument(help="Picture files, folders and globs.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Labelled folder in their place, as the README lays it out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("report"),
    model: ModelName = "road",
    split: Annotated[str, typer.Option(help="train, val or test; with --data.")] = "test",
    names: Names = None,
    max_side: Side = None,
    max_loss: MaxLoss = None,
    merge: Merge = None,
    exits: Exits = None,
    reducer: Reducers = None,
    accelerator: AcceleratorName = None,
    policy: PolicyText = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Show where tokens are spent and halt, and what it costs: report.html, figures, report.json.

    Exit code 1 if some pictures failed; the others are done and the report names the failures.
    """
    require_extra("matplotlib", extra="plot")
    from tokenstep.data.labelled_folder import LabelledFolder
    from tokenstep.data.scaling import side_for
    from tokenstep.data.whole_files import require_writable
    from tokenstep.explain.report import page
    from tokenstep.serve.reports import header

    if (data is None) == (not pictures):
        raise TokenstepError("explain: give pictures, or --data with a labelled folder")
    if data is None and names:
        raise TokenstepError("--names: picks from --data; name the pictures themselves instead")
    if data is not None and max_side is not None:
        raise TokenstepError("--max-side: labels have their pictures' size; leave it out")
    long_side = max_side_of(max_side)
    require_writable(out)
    folder = None if data is None else LabelledFolder(data, split, names=names)
    network = load_any(model, device, threads, accelerator=accelerator, policy=policy)
    if folder is not None and network.resizes:
        raise TokenstepError(
            "--data: this model brings pictures to a size of its own, which labels do not have; "
            "give pictures"
        )
    thresholds, point = choose(
        network, max_loss=max_loss, merge=merge, exits=exits, reducer=reducer
    )
    head = header(model, network.config, thresholds, point)
    title = f"Where the tokens of {model} go"
    if folder is None:
        side = side_for(long_side, network.config.long_side)
        head["max_side"] = side
        report, sections = _explain_pictures(network, pictures or [], thresholds, side)
    else:
        head |= {"data": folder.root.resolve().name, "split": folder.title}
        title += f" on {head['data']}, {folder.title}"
        report, sections = _explain_data(network, folder, thresholds)
    for fault in report["faults"]:
        complain(fault["error"])
    if not sections:
        raise typer.Exit(2)
    intro = _intro(thresholds, point)
    scaled = sum("scaled_from" in entry for entry in report.get("pictures", ()) if folder is None)
    if scaled:
        note = scale_note(scaled, head["max_side"], max_side)
        intro += f" {note[0].upper()}{note[1:]}."
        print(note)
    text = page(title, intro, sections)
    _write(out, {**head, **report}, sections, text)
    print(summary.warned(report.get("warnings", [])), end="")
    print(f"report in {out / 'report.html'}")
    if report["faults"]:
        raise typer.Exit(1)


def _explain_pictures(
    network: "AnySegmenter", arguments: Sequence[str], thresholds: Thresholds, max_side: int | None
) -> Explanation:
    """Explain each picture that can be read and segmented."""
    from tokenstep.data.pictures import find_pictures, read_picture, to_tensor
    from tokenstep.data.scaling import scaled_down
    from tokenstep.explain.picture import explain_picture, view_of
    from tokenstep.explain.sections import picture_sections
    from tokenstep.serve.files import missing, output_names
    from tokenstep.serve.windows import fits

    paths, missed = find_pictures(arguments)
    faults = missing(paths, missed)
    entries: list[dict[str, Any]] = []
    sections: list[Section] = []
    with progress_bar() as progress:
        todo = list(zip(paths, output_names(paths), strict=True))
        for path, name in progress.track(todo, description="explain"):
            try:
                whole = read_picture(path)
                image = to_tensor(scaled_down(whole, max_side))
                if not fits(network, [image]):
                    raise TokenstepError(f"{path}: does not fit in memory; give a --max-side")
                view = view_of(network, image, thresholds)
            except TokenstepError as error:
                reason = str(error)
                message = reason if str(path) in reason else f"{path}: {reason}"
                faults.append({"file": str(path), "name": name, "error": message})
                continue
            numbers = explain_picture(view)
            entries.append({"file": str(path), "name": name, **numbers})
            if image.shape[1:] != (whole.height, whole.width):
                entries[-1]["scaled_from"] = [whole.width, whole.height]
            sections += picture_sections(name, view, numbers)
    return {"pictures": entries, "faults": faults}, sections


def _explain_data(
    network: "AnySegmenter", folder: "LabelledFolder", thresholds: Thresholds
) -> Explanation:
    """Explain a labelled folder, then each of the pictures that lost most against dense."""
    from tokenstep.explain.folder import explain_folder, worst
    from tokenstep.explain.picture import difference_rows, explain_picture, view_of
    from tokenstep.explain.report import Section
    from tokenstep.explain.sections import difference_section, picture_sections, set_sections

    with progress_bar() as progress:
        task = progress.add_task("explain", total=len(folder))
        report = explain_folder(
            network, folder, thresholds, on_picture=lambda: progress.advance(task)
        )
    sections = set_sections(report)
    chosen = worst(report["pictures"])
    sections.append(
        Section(
            f"The {len(chosen)} pictures that lost most" if len(chosen) > 1 else "The one picture",
            "Of all pictures, the worst first, by points of pixel accuracy below dense.",
        )
    )
    report["worst"] = []
    by_name = {path.name: index for index, path in enumerate(folder.paths)}
    for file in chosen:
        image, label = folder[by_name[file]]
        view = view_of(network, image, thresholds)
        dense = network.segment_batch([image], thresholds=DENSE)[0].labels
        truth = label.numpy()
        numbers = explain_picture(view)
        rows = difference_rows(view.result.labels, dense, truth)
        name = Path(file).stem
        report["worst"].append({"picture": file, **numbers, "difference": rows})
        sections += picture_sections(name, view, numbers, rank=3)
        sections.append(difference_section(name, view, dense, truth))
    return report, sections


def _intro(thresholds: Thresholds, point: OperatingPoint | None) -> str:
    """The thresholds that the model ran at, and the operating point that they are, if one."""
    merge, exits = (
        ", ".join(map(str, values)) or "off" for values in (thresholds.merge, thresholds.exits)
    )
    text = f"Merge thresholds: {merge}. Exit thresholds: {exits}."
    if thresholds.reducers:
        text += f" Reducers: {', '.join(thresholds.reducers)}."
    return text if point is None else f"{text} At this {summary.promise(point)}."


def _write(out: Path, report: dict[str, Any], sections: "Sequence[Section]", text: str) -> None:
    """Write the page, its figures and its numbers, each file whole."""
    from tokenstep.data.whole_files import write_text, write_whole

    for section in sections:
        for figure in section.figures:
            write_whole(out / f"{figure.name}.figure.png", partial(_save, data=figure.png))
    write_text(out / "report.json", as_json(report) + "\n")
    write_text(out / "report.html", text)


def _save(path: Path, data: bytes) -> None:
    path.write_bytes(data)
