"""What is printed: results to stdout, faults and progress to stderr, one line per fault."""

import json
import sys
import warnings
from importlib.util import find_spec
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenstep.errors import TokenstepError

# Names of files are shown as they are, whatever rich would make of their brackets and colons.
console = Console(highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def complain(message: str) -> None:
    """Print a fault as one line."""
    errors.print("tokenstep:", " ".join(message.splitlines()))


def one_line_a_warning(kind: type[Warning]) -> None:
    """Have warnings of a kind printed as faults are; those of other kinds stay as Python's own."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, kind):
            complain(str(message))
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show


def progress_bar() -> Progress:
    """A progress bar on stderr, and only on a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=errors,  # so that what is printed meanwhile stands above the bar
        disable=not sys.stderr.isatty(),
    )


def as_json(data: object) -> str:
    """Data as JSON; NaN is a fault."""
    return json.dumps(data, indent=1, allow_nan=False)


def require_extra(*packages: str, extra: str) -> None:
    """Refuse a command whose extra is not installed.

    Raises:
        TokenstepError: a package is missing; names the extra.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        remedy = f"install the extra: pip install 'tokenstep[{extra}]'"
        raise TokenstepError(f"{' and '.join(missing)} missing; {remedy}")
