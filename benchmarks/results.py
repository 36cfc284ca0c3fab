"""What was measured, what it should be, and both as a table or JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.timing import METHOD
from fqonnx.errors import EngineError, FqonnxError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass
class Row:
    """One case.

    Attributes:
        case: Its sizes, by name.
        microseconds: By contender; None where it does not take the case.
        ours: The contender that is held against the target: the kernel that the table chooses.
        floor: Microseconds that the memory traffic takes at a copy's bandwidth.
        bytes: That traffic.
        operations: Multiplications and additions; 0 where nobody counts them.
        target: Microseconds at most; None where there is no target.
        why: What the target is, in words.
        wrong: What is wrong with a result of ours; empty where none is.
    """

    case: dict[str, Any]
    microseconds: dict[str, float | None]
    ours: str
    floor: float
    bytes: int
    operations: int = 0
    target: float | None = None
    why: str = ""
    wrong: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> float | None:
        """Our time."""
        return self.microseconds.get(self.ours)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.target is None:
            return None
        return self.best is not None and self.best <= self.target

    @property
    def tops(self) -> float | None:
        """Our operations a second, in 10¹²."""
        return None if not self.best or not self.operations else self.operations / self.best * 1e-6

    @property
    def bandwidth(self) -> float | None:
        """Our traffic a second, in GB."""
        return None if not self.best else self.bytes / self.best * 1e-3

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"met": self.met, "tops": self.tops, "bandwidth_gb_s": self.bandwidth}


def document(rows: Sequence[Row], **about: Any) -> str:
    """All rows as JSON, with what the run was."""
    return json.dumps({**about, "rows": [row.to_dict() for row in rows]}, indent=2)


def show(title: str, rows: Sequence[Row], contenders: Sequence[str], *, console: Console | None = None) -> None:
    """Print a table in microseconds."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", no_wrap=True)
    has_operations = any(row.operations for row in rows)
    heads = [*contenders, *(["TOP/s"] if has_operations else []), "GB/s", "floor", "target", ""]
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        times = [_time(row.microseconds.get(name), bold=name == row.ours) for name in contenders]
        rates = [*([_whole(row.tops)] if has_operations else []), _whole(row.bandwidth)]
        target = "" if row.target is None else f"{row.target:.1f}"
        table.add_row(label(row.case), *times, *rates, f"{row.floor:.1f}", target, {True: "met", False: "NOT met", None: ""}[row.met])
    (console or Console(width=max(120, Console().width))).print(table)


def label(case: Mapping[str, Any]) -> str:
    """A case in words: sizes that belong together are joined by the measurement itself."""
    return " ".join(str(value) for value in case.values() if value not in (None, ""))


def _time(value: float | None, *, bold: bool) -> str:
    if value is None:
        return "–"
    text = f"{value:.1f}" if value < 1000 else f"{value:.0f}"
    return f"[bold]{text}[/bold]" if bold else text


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


class WrongResultError(EngineError):
    """A kernel's result is not what the operation means: its time would say nothing."""


def report(title: str, rows: Sequence[Row], contenders: Sequence[str], *, as_json: bool, **about: Any) -> None:
    """Print tables or JSON.

    Raises:
        WrongResultError: Results were; everything was printed nevertheless.
    """
    if as_json:
        click.echo(document(rows, **about))
    else:
        show(title, rows, contenders)
        click.echo(f"{about.get('method', METHOD)}; floor: traffic at a copy's {about['copy_gb_s'] / 1e3:.2f} TB/s")
    if wrong := [row.wrong for row in rows if row.wrong]:
        raise WrongResultError(f"{len(wrong)} wrong results, not timed: {wrong[0]}")


def run(program: Callable[[], object]) -> None:
    """Run a benchmark's command line; what the user can mend ends in one line."""
    try:
        program()
    except FqonnxError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
seconds_option = click.option("--seconds", type=float, default=0.04, show_default=True, help="To spend on each figure, about.")
only_option = click.option("--only", metavar="REGEX", help="Only cases whose label matches.")
