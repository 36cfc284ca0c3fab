"""A library of kernels on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fqonnx.ops.kernels import KERNELS, dotted
from fqonnx.report import format as words

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from fqonnx.plugins.build import Built
    from fqonnx.plugins.ptxas import Usage


def print_library(built: Built, console: Console) -> None:
    """Print the table of kernels, what each source takes on each architecture, and the library's path, size and hash."""
    console.print(_table_of_kernels())
    console.print(_resources(built))
    facts = {
        "library": str(built.path),
        "size": words.size(built.size),
        "sha256": built.sha256,
        "sources": built.sources,
        "architectures": " ".join(built.architectures),
        "parts": " ".join(built.parts),
        "left out": " ".join(built.left_out),
        "compiler": built.compiler,
        "built in": words.duration(built.seconds),
    }
    for name, value in facts.items():
        if value:
            console.print(Text(f"{name}: {value}"), soft_wrap=True, highlight=False)


def _table_of_kernels() -> Table:
    table = Table(title="Kernels, in the order of choice", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("op", "kernel", "chosen for", "codes", "weight", "inner loop"):
        table.add_column(heading, overflow="fold")
    for kernel in KERNELS:
        low, high = kernel.chosen
        span = dotted(low) if low == high else f"{dotted(low)}-{dotted(high)}"
        table.add_row(*map(escape, (kernel.op, kernel.name, span, kernel.container or "any", kernel.layout or "any", kernel.instruction)))
    return table


def _resources(built: Built) -> Table:
    table = Table(title="Compiled", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("source", no_wrap=True)
    for heading in ("arch", "functions", "registers", "shared"):
        table.add_column(heading, justify="right", no_wrap=True)
    for source, usages in built.kernels.items():
        for architecture in dict.fromkeys(usage.architecture for usage in usages):
            here = [usage for usage in usages if usage.architecture == architecture]
            registers, shared = _span(usage.registers for usage in here), _span(usage.shared for usage in here)
            table.add_row(escape(Path(source).name), architecture, str(_functions(here)), registers, shared)
    return table


def _functions(usages: list[Usage]) -> int:
    return len({usage.function for usage in usages})


def _span(values: Iterable[int]) -> str:
    values = list(values)
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
