"""What the command line prints: reports as tables for people to read."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from tokenstep.serve import summary


def segmented(entries: Sequence[dict[str, Any]]) -> Table:
    """One row per picture, from the entries of ``report.json`` that have no error."""
    both = "\ndense -> used"
    time = "model ms" + (both if any("dense" in entry for entry in entries) else "")
    table = Table("picture", "size", f"tokens{both}", "tokens\nhalted", f"GMAC{both}", time)
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
    return table


def _milliseconds(entry: dict[str, Any]) -> str:
    used = summary.model_milliseconds(entry)
    if "dense" not in entry:
        return f"{used:.0f}"
    return f"{summary.model_milliseconds(entry['dense']):.0f} -> {used:.0f}"


def evaluated(report: dict[str, Any]) -> Table:
    """The two halves of an evaluation as columns; a score that nothing defines is a dash."""
    heading = f"{report['data']} {report['split']}, {report['images']} pictures"
    table = Table(heading, "dense", "reduced")
    rows: tuple[tuple[str, int, Callable[[dict[str, Any]], float | None]], ...] = (
        ("mIoU", 4, lambda half: half["miou"]),
        ("inter-class boundary IoU", 4, lambda half: half["boundary_iou"]),
        ("accuracy", 4, lambda half: half["accuracy"]),
        ("tokens at start", 0, lambda half: half["tokens"]["start"]),
        ("tokens at end", 0, lambda half: half["tokens"]["end"]),
        ("halted, share of tokens at start", 3, lambda half: half["halted_share"]),
        ("GMAC per picture", 2, lambda half: half["gmac"]["total"]),
        ("seconds per picture", 3, lambda half: half["seconds"]),
    )
    if _otherwise_gone(report["reduced"]) > 0.0005:  # tokens that reducers merged or dropped
        label = "merged or dropped between blocks, share"
        rows = (*rows[:6], (label, 3, _otherwise_gone), *rows[6:])
    for label, digits, pick in rows:
        values = (pick(report[half]) for half in ("dense", "reduced"))
        table.add_row(label, *("-" if v is None else f"{v:.{digits}f}" for v in values))
    return table


def _otherwise_gone(half: dict[str, Any]) -> float:
    """Share of the tokens at the start that neither halted nor reached the end."""
    tokens = half["tokens"]
    return float(1 - tokens["end"] / tokens["start"] - half["halted_share"])


def checked(report: dict[str, Any]) -> Table:
    """Each class's share of the pixels that have a class, per split."""
    table = Table("class", *report["pixels"])
    columns = list(report["pixels"].values())
    for name in columns[0] if columns else ():
        shares = (column[name] / max(sum(column.values()), 1) for column in columns)
        table.add_row(name, *(f"{share:.2%}" for share in shares))
    return table


def calibrated(report: dict[str, Any]) -> Group:
    """The operating points of a calibration, cheap to dear, with dense, and their budgets."""
    table = Table(
        *("points\nbelow\nthe best", "mIoU", "GMAC per\npicture", "tokens\nat start"),
        *("halted,\nshare\nof them", "merge", "exits", "spare"),
    )
    budgets = Table("points below the best", "by its budget", "GMAC per picture", "by its budget")
    for point in report["points"]:
        thresholds, fixed = point["settings"], point["fixed"]
        exits = [*(f"{value:g}" for value in thresholds["exits"]), *thresholds["reducers"]]
        table.add_row(
            f"{point['loss']:.2f}",
            f"{point['miou']:.4f}",
            f"{point['gmac']:.2f}",
            f"{point['tokens']:.0f}",
            f"{point['halted_share']:.2f}",
            " ".join(f"{value:g}" for value in thresholds["merge"]) or "off",
            " ".join(exits) or "off",
            str(thresholds["spare"]),
        )
        pairs = (point["loss"], fixed["loss"], point["gmac"], fixed["gmac"])
        budgets.add_row(*(f"{value:.2f}" for value in pairs))
    dense = report["dense"]
    cost, tokens = f"{dense['gmac']['total']:.2f}", f"{dense['tokens']['start']:.0f}"
    table.add_row("dense", f"{dense['miou']:.4f}", cost, tokens, "0", "off", "off", "-")
    return Group(table, budgets) if report["points"] else Group(table)


def benched(rows: Sequence[dict[str, Any]]) -> Group:
    """A table per case and scope with a row per method, and below what the columns are."""
    return Group(
        *(
            _case(f"{size}, batch {batch}, {scope.replace('_', ' ')}", list(group))
            for (size, batch, scope), group in groupby(
                rows, lambda row: (row["size"], row["batch"], row["scope"])
            )
        ),
        "ms and MiB are of a batch, GMAC of a picture; x speed and / GMAC are dense over the row;\n"
        "share is x speed over / GMAC: how much of the saved compute shows as time.",
    )


def _case(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    # Eight figures of up to seven digits in 80 columns.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", min_width=12)
    for heading in ("ms p50", "p95", "per s", "GMAC", "MiB", "x speed", "/ GMAC", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        speed, compute = row["speedup"], row["compute_ratio"]
        slower = row["method"] != "dense" and speed < 1
        table.add_row(
            row["method"] + (" (slower than dense)" if slower else ""),
            _short(row["latency_ms"]["p50"]),
            _short(row["latency_ms"]["p95"]),
            _short(row["throughput"], 3),
            "-" if row["gmac"] is None else _short(row["gmac"]),
            "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            f"{speed:.2f}",
            "-" if compute is None else f"{compute:.2f}",
            "-" if compute is None else f"{speed / compute:.2f}",
        )
    return table


def _short(value: float, digits: int = 4) -> str:
    """So many digits, or all of a number from 1000: exponents are hard to compare."""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.{digits}g}".rstrip(".")


def grown(rows: Sequence[dict[str, Any]]) -> Table:
    """How time and memory grow with the pixels, as exponents."""
    table = Table("method", "scope", "batch", "sizes", "time ~ pixels ^", "memory ~ pixels ^")
    for row in rows:
        table.add_row(
            row["method"],
            row["scope"].replace("_", " "),
            str(row["batch"]),
            ", ".join(row["sizes"]),
            f"{row['time']:.2f}",
            "-" if row["memory"] is None else f"{row['memory']:.2f}",
        )
    return table
