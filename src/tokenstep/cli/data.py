"""The commands for labelled folders: check."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenstep.cli import tables
from tokenstep.errors import TokenstepError
from tokenstep.terminal import as_json, complain, console, progress_bar

if TYPE_CHECKING:
    from tokenstep.data.faults import Fault

_SHOWN = 10  # faults of one kind that are printed

app = typer.Typer(no_args_is_help=True, help="Look after labelled folders.")


@app.command("check")
def check_command(
    folder: Annotated[Path, typer.Argument(help="Labelled folder, as the README lays it out.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write what was found here; - prints it.")
    ] = None,
) -> None:
    """Read every picture and label once, and name what is wrong with them.

    Exit code 1 if there is an error; warnings alone end with 0.
    """
    from tokenstep.data.check import check_folder
    from tokenstep.data.whole_files import require_writable, write_text

    printed = json_file == Path("-")
    if json_file is not None and not printed:
        if json_file.is_dir():
            raise TokenstepError(f"--json {json_file}: is a folder; name a file in it")
        require_writable(json_file.parent)
    with progress_bar() as progress:
        task = progress.add_task("check", total=None)
        verdict = check_folder(
            folder,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    report = asdict(verdict)
    _complain_of(verdict.faults)
    if printed:
        print(as_json(report))
    else:
        if json_file is not None:
            write_text(json_file, as_json(report) + "\n")
        console.print(tables.checked(report))
    errors = sum(fault.severity == "error" for fault in verdict.faults)
    if not printed:
        warnings = len(verdict.faults) - errors
        print(f"{verdict.files} files read; errors: {errors}, warnings: {warnings}")
    if errors:
        raise typer.Exit(1)


def _complain_of(faults: "Sequence[Fault]") -> None:
    """Print the first faults of each kind, errors first, and count the others."""

    def kind(fault: "Fault") -> tuple[str, str]:
        return fault.severity, fault.kind

    for (severity, name), group in groupby(sorted(faults, key=kind), kind):
        alike = list(group)
        for fault in alike[:_SHOWN]:
            complain(f"{severity}: {fault}")
        if len(alike) > _SHOWN:
            more = f"{len(alike) - _SHOWN} more of this kind ({name})"
            complain(f"{severity}: {more}; --json FILE lists all")
