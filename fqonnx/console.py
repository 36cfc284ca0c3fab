"""Reports on the terminal: results go to standard output as rich tables; progress and the log go to standard error."""

from __future__ import annotations

import math
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fqonnx.report import format as words
from fqonnx.report.mixed_console import allocation_line

if TYPE_CHECKING:
    from rich.console import Console

    from fqonnx.debug import Bisection
    from fqonnx.report.data import Report

WORST = 8
"""Groups that the terminal shows; the page has them all."""


def print_report(report: Report, console: Console, *, command: str | None = None) -> None:
    """Print a report: outputs, language, worst groups, what stayed in float, size, engine, time, and the verdict as the last line.

    Args:
        report: What to print.
        console: Where to; on a narrow or dumb terminal the tables shrink and lose their colours.
        command: The command line for the last line; None takes the report's, or that of this process.
    """
    parts = (_outputs, _language, lambda shown: _groups(shown, console.width), _left, _size, _engine, _time)
    for printed in (part(report) for part in parts):
        if printed is not None:
            console.print(printed)
            console.print()
    if report.allocation is not None:
        console.print(f"schemes: {escape(allocation_line(report.allocation))}", highlight=False)
    if report.polygraphy:
        console.print("The same by hand:", style="bold")
        for line in report.polygraphy:
            console.print(Text(line), soft_wrap=True)
        console.print()
    for note in report.notes:
        console.print(f"note: {escape(note)}", style="dim", highlight=False)
    for failure in report.failures:
        console.print(f"FAILED: {escape(failure)}", style="red", highlight=False)
    console.print(_verdict(report, command or report.command or command_line()), soft_wrap=True)


def print_bisection(found: Bisection, console: Console) -> None:
    """Print what ``fqonnx debug bisect`` measured, and the group that it found as the last line."""
    table = _table("quantized", "error", "last group")
    for step in found.steps:
        last = found.groups[step.quantized - 1] if step.quantized else ""
        table.add_row(f"{step.quantized} of {len(found.groups)}", words.percent(step.error), escape(last))
    table.columns[2].justify = "left"
    console.print(_titled(f"Relative L2 with the first groups quantized; the threshold is {words.percent(found.threshold)}", table))
    if found.first is None:
        console.print(f"no group pushes the output past the threshold: all together leave {words.percent(found.whole)}", highlight=False)
        return
    console.print(
        f"{escape(found.first)} pushes it from {words.percent(found.before)} to {words.percent(found.after)}; "
        f"with this group alone in float the whole build has {words.percent(found.without)} instead of {words.percent(found.whole)}",
        highlight=False,
        soft_wrap=True,
    )


def command_line() -> str:
    """The command line of this process, with the program by its name."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _verdict(report: Report, command: str) -> Text:
    seconds = report.time.get("total")
    parts = [Text("PASSED" if report.passed else "FAILED", style="bold green" if report.passed else "bold red")]
    if seconds is not None:
        parts.append(Text(f"Runtime: {words.duration(seconds)}"))
    parts.append(Text(f"Command: {command}"))
    return Text(" | ").join(parts)


def _table(*columns: str) -> Table:
    """A table whose first column is names and whose others are figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=bool(index), overflow="fold", min_width=0 if index else 8)
    return table


def _titled(title: str, table: Table) -> Group:
    """The title is a line of its own: rich would fold a table's title to the table's width."""
    return Group(Text(title, style="bold"), table)


def _outputs(report: Report) -> Group | None:
    if not report.outputs:
        return None
    tensors = report.outputs.values()
    has_logits, has_exact = any(t.kl is not None for t in tensors), any(not t.is_float for t in tensors)
    columns = ["cosine", "rel. L2", "SQNR dB", "max error"] + (["KL", "top-1"] if has_logits else []) + (["equal"] if has_exact else [])
    table = _table("output", *columns, "NaN/Inf")
    for name, t in report.outputs.items():
        figures = [words.cosine(t.cosine), words.percent(t.rel_l2), words.decibel(t.sqnr_db), words.plain(t.max_abs)]
        figures = figures if t.is_float else [words.MISSING] * len(figures)
        figures += [words.plain(t.kl), words.percent(t.top1)] if has_logits else []
        figures += [words.percent(t.exact)] if has_exact else []
        style = "red" if t.is_float and math.isnan(t.rel_l2) else None
        table.add_row(escape(name), *figures, f"{t.nan}/{t.inf}", style=style)
    samples = f", {report.data.samples} sample{'s' if report.data.samples != 1 else ''}" if report.data else ""
    return _titled(f"Outputs against {report.model}{samples}", table)


def _language(report: Report) -> Group | None:
    if report.language is None:
        return None
    language = report.language
    table = _table("", "float", "quantized")
    table.add_row("perplexity", f"{language.perplexity_reference:.4g}", f"{language.perplexity:.4g}")
    table.add_row("same top token", "", words.percent(language.top1))
    return _titled(f"Next token, {language.tokens} tokens", table)


def _groups(report: Report, width: int) -> Group | None:
    groups = [group for group in report.worst_groups if report.error_of(group) is not None][:WORST]
    if not groups:
        return None
    whole, has_room = any(group.layer is not None for group in groups), width >= 100
    table = _table("group", *(["in the model"] if whole else []), "alone", "weights", "activations", *(["flatness"] if has_room else []))
    for group in groups:
        inside = [words.percent(group.layer.rel_l2 if group.layer else None)] if whole else []
        flatness = words.MISSING
        if group.flatness_before is not None and group.flatness_after is not None:
            flatness = f"{words.fixed(group.flatness_before)} → {words.fixed(group.flatness_after)}"
        errors = (words.percent(e) for e in (group.output_rel_l2, group.weight_rel_l2, group.activation_rel_l2))
        table.add_row(escape(group.name), *inside, *errors, *([flatness] if has_room else []))
    return _titled(f"Groups by relative L2, the worst {len(groups)} of {len(report.groups)}", table)


def _left(report: Report) -> Group | None:
    if not report.left_in_float:
        return None
    table = _table("reason", "products", "first")
    first = {left.reason: left.name for left in reversed(report.left_in_float)}
    for reason, count in Counter(left.reason for left in report.left_in_float).most_common():
        table.add_row(escape(reason), str(count), escape(first[reason]))
    table.columns[2].justify = "left"
    table.columns[2].no_wrap = False
    return _titled("Left in float", table)


def _size(report: Report) -> Group | None:
    size = report.size
    if size is None:
        return None
    title = f"Size: {words.size(size.float_bytes)} → {words.size(size.quantized_bytes)} ({words.times(size.ratio)} smaller)"
    table = _table("part", "bytes", "share")
    for name, count in sorted(size.parts.items(), key=lambda item: -item[1]):
        table.add_row(escape(name), words.size(count), words.percent(count / max(1, size.quantized_bytes)))
    return _titled(title, table)


def _engine(report: Report) -> Group | Text | None:
    if report.engine is None:
        return None
    title = f"Engine: {words.engine(report.engine)}"
    if not report.engine.groups:
        return Text(title, style="bold")
    table = _table("what became of groups", "groups", "weights", "multiplied")
    for (weights, product, how), groups in report.engine.fates.items():
        table.add_row(escape(how), str(len(groups)), weights, product)
    return _titled(title, table)


def _time(report: Report) -> Text | None:
    stages = [f"{name} {words.duration(seconds)}" for name, seconds in report.time.items() if name != "total" and seconds >= 0.005]
    return Text.assemble(("Time", "bold"), ": " + ", ".join(stages)) if stages else None
