"""Schemes per group on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from fqonnx.report import format as words
from fqonnx.report.parts import short_names

if TYPE_CHECKING:
    from rich.console import Console

    from fqonnx.report.mixed import AllocationReport, SensitivityReport


def print_sensitivity(report: SensitivityReport, console: Console) -> None:
    """Print the groups, worst first, and the measured choices."""
    schemes = [scheme for scheme in report.schemes if scheme != "float"]
    measured = any(error.rel_l2 is not None for group in report.groups for error in group.errors if error.scheme != "float")
    table = Table(box=box.SIMPLE_HEAD, title=_title(report, measured=measured), title_justify="left")
    table.add_column("group", overflow="fold")
    for column in ("weights", "gain", *schemes):
        table.add_column(column, justify="right", no_wrap=True)
    short = short_names([group.name for group in report.groups])
    for group in report.worst_groups:
        errors = [words.percent(group.of(scheme).error) for scheme in schemes]
        table.add_row(escape(short[group.name]), words.count(group.parameters), words.plain(group.gain), *errors)
    console.print(table)
    console.print(_curve(report))


def _title(report: SensitivityReport, *, measured: bool) -> str:
    how = "measured" if measured else "estimated to first order"
    return f"{escape(report.model)}: relative L2 of the output with one group quantized, {how} on {report.samples} samples"


def _curve(report: SensitivityReport) -> Table:
    unit = "KL, nats" if report.measure == "kl" else "relative L2"
    table = Table(box=box.SIMPLE_HEAD, title=f"all groups quantized ({unit})", title_justify="left")
    table.add_column("schemes")
    for column in ("bits", "weights", "predicted", "measured"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in report.curve:
        if point.label or point.measured is not None:
            row = [f"{point.average_bits:.2f}", words.size(point.weight_bytes), words.plain(point.predicted), words.plain(point.measured)]
            table.add_row(escape(point.label) or "best choice", *row)
    return table


def allocation_line(allocation: AllocationReport) -> str:
    """The choice in a line."""
    counts: dict[str, int] = {}
    for scheme in allocation.schemes.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    groups = ", ".join(f"{count} {scheme}" for scheme, count in sorted(counts.items(), key=lambda pair: -pair[1]))
    return f"{allocation.average_bits:.2f} bits on average: {groups}"
