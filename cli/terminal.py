"""What reaches the user's terminal: results on stdout; warnings, progress and errors of fqonnx on stderr; nothing of other libraries."""

from __future__ import annotations

import json
import logging
import os
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fqonnx.bench import Bench
    from fqonnx.debug import Bisection
    from fqonnx.inspect import Inspection
    from fqonnx.plugins.build import Built
    from fqonnx.progress import Progress
    from fqonnx.report import Report
    from fqonnx.report.mixed import SensitivityReport

_LEVELS = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}


def debugging() -> bool:
    """Whether FQONNX_DEBUG asks for tracebacks and for everything other libraries say."""
    return os.environ.get("FQONNX_DEBUG", "") not in ("", "0")


class _Stderr(logging.Handler):
    """Writes ``level: message`` to whatever stderr is at that moment (progress bars and tests replace it)."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{record.levelname.lower()}: {record.getMessage()}", err=True)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Route fqonnx's log to stderr and silence warnings and logs of other libraries while a command runs."""
    root, ours = logging.getLogger(), logging.getLogger("fqonnx")
    silence, handler, level = logging.NullHandler(), _Stderr(), ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.WARNING)
    if debugging():
        ours.setLevel(logging.DEBUG)
    else:
        root.addHandler(silence)
    try:
        with warnings.catch_warnings():
            if not debugging():
                warnings.simplefilter("ignore")
            yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
        root.removeHandler(silence)


def set_verbosity(verbosity: int) -> None:
    """-1: errors only; 0: warnings; 1: what is being done; 2 and more: everything."""
    if not debugging():
        logging.getLogger("fqonnx").setLevel(_LEVELS.get(verbosity, logging.DEBUG))


def progress(quiet: bool) -> Progress:
    """Where long work tells how far it is: bars on stderr, or nothing."""
    from fqonnx.progress import RichProgress, Silent

    return Silent() if quiet else RichProgress()


def show_report(report: Report, *, as_json: bool, quiet: bool) -> None:
    """Print a report on stdout: JSON where asked for, else tables unless quiet."""
    if as_json:
        _print_json(report.to_dict())
    elif not quiet:
        from rich.console import Console

        from fqonnx.console import print_report

        print_report(report, Console())


def show_sensitivity(report: SensitivityReport, *, as_json: bool, quiet: bool) -> None:
    """Print groups' sensitivities on stdout: JSON where asked for, else tables unless quiet."""
    if as_json:
        from fqonnx.report.schema import encode

        _print_json(encode(report))
    elif not quiet:
        from rich.console import Console

        from fqonnx.report.mixed_console import print_sensitivity

        print_sensitivity(report, Console())


def show_inspection(inspection: Inspection, *, as_json: bool, quiet: bool) -> None:
    """Print an inspection on stdout: JSON where asked for, else tables unless quiet."""
    if as_json:
        _print_json(inspection.to_dict())
    elif not quiet:
        from rich.console import Console

        from fqonnx.inspect import print_inspection

        print_inspection(inspection, Console())


def show_bench(result: Bench, *, as_json: bool, quiet: bool) -> None:
    """Print measured times on stdout: JSON where asked for, else tables unless quiet."""
    if as_json:
        _print_json(result.to_dict())
    elif not quiet:
        from rich.console import Console

        from fqonnx.bench_tables import print_bench

        print_bench(result, Console())


def show_bisection(result: Bisection, *, as_json: bool, quiet: bool) -> None:
    """Print which group pushes the output past the threshold on stdout: JSON where asked for, else a table unless quiet."""
    if as_json:
        _print_json(result.to_dict())
    elif not quiet:
        from rich.console import Console

        from fqonnx.console import print_bisection

        print_bisection(result, Console())


def show_plugin(built: Built, *, as_json: bool, quiet: bool) -> None:
    """Print a library of kernels on stdout: JSON where asked for, else tables unless quiet."""
    if as_json:
        _print_json(built.to_dict())
    elif not quiet:
        from rich.console import Console

        from fqonnx.plugins.show import print_library

        print_library(built, Console())


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
