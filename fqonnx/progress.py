"""Progress of long work: a protocol of two methods, a rich bar with an ETA and one that says nothing.

Everything goes to standard error: standard output belongs to results.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from rich.console import Console


class Task(Protocol):
    """One running piece of work."""

    def advance(self, amount: float = 1) -> None:
        """Count ``amount`` more units as done."""
        ...


class Progress(Protocol):
    """Where long work tells how far it is. Used as ``with progress.task("Observing", total) as task: task.advance()``."""

    def task(self, name: str, total: float | None = None) -> AbstractContextManager[Task]:
        """Start a piece of work of ``total`` units; None where nobody knows how many."""
        ...


class Silent:
    """Says nothing: for libraries, tests and ``-q``."""

    def advance(self, amount: float = 1) -> None:
        """Do nothing."""

    @contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Task]:  # noqa: ARG002  the protocol's signature
        """Yield itself: there is nothing to show."""
        yield self


class RichProgress:
    """Bars with count, elapsed and remaining time on standard error; plain lines where that is not a terminal.

    Args:
        console: Where to draw; by default one on standard error. Give the console that log lines go to, so that they do not cut bars.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True)

    @contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Task]:
        """Draw a bar until the block ends; a bar that was interrupted stays where it stopped."""
        from rich import progress

        columns = [
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("ETA"),
            progress.TimeRemainingColumn(),
        ]
        with progress.Progress(*columns, console=self._console) as bar:
            yield _RichTask(bar, bar.add_task(name, total=total))


class _RichTask:
    def __init__(self, bar: object, task_id: int) -> None:
        self._bar = bar
        self._id = task_id

    def advance(self, amount: float = 1) -> None:
        self._bar.advance(self._id, amount)  # type: ignore[attr-defined]
