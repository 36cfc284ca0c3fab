"""The builder's progress as one bar, and Ctrl-C while it works."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fqonnx.progress import Task


class Signals:
    """The signal that came, if any."""

    received: int | None = None


@contextmanager
def deferred_signals() -> Iterator[Signals]:
    """Note SIGINT and SIGTERM instead of raising them, and raise them at the end.

    The builder calls back from C++ code that lets no exception through: one raised there by a signal would end the process.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def note(number: int, _frame: object) -> None:
        signals.received = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if signals.received is not None:
            signal.raise_signal(signals.received)


@dataclass
class _Phase:
    """A piece of the builder's work: so many steps, each of which may have phases of its own."""

    parent: str | None
    steps: int
    done: int = 0


class Tracker:
    """The share of the work that is done, from the phases and steps that the builder tells, which nest and come from several threads."""

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.Lock()
        self._share = 0.0

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            self._phases[phase] = _Phase(parent, max(1, steps))

    def step(self, phase: str, step: int) -> None:
        """Step number ``step``, counted from 0, is done."""
        with self._lock:
            if phase in self._phases:
                self._phases[phase].done = min(step + 1, self._phases[phase].steps)

    def finish(self, phase: str) -> None:
        """A phase ends, with whatever it left out."""
        with self._lock:
            ended = self._phases.pop(phase, None)
            if ended is not None and ended.parent is None:
                self._share = 1.0

    @property
    def share(self) -> float:
        """From 0 to 1; never less than before."""
        with self._lock:
            roots = [name for name, phase in self._phases.items() if phase.parent is None]
            self._share = max(self._share, *(self._done(name) for name in roots), 0.0)
            return self._share

    def _done(self, name: str) -> float:
        phase = self._phases[name]
        inner = max((self._done(child) for child, other in self._phases.items() if other.parent == name), default=0.0)
        return min(1.0, (phase.done + inner) / phase.steps)


def make_monitor(trt: Any, task: Task, signals: Signals) -> Any:
    """An ``IProgressMonitor`` that shows a hundred units on ``task`` and stops the builder after a signal.

    Its ``failure`` is the exception that the task raised, if it did.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # untyped base
        def __init__(self) -> None:
            super().__init__()
            self.failure: Exception | None = None
            self._tracker, self._shown, self._lock = Tracker(), 0.0, threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tracker.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tracker.step(phase_name, step)
            self._show()
            return signals.received is None and self.failure is None

        def phase_finish(self, phase_name: str) -> None:
            self._tracker.finish(phase_name)
            self._show()

        def _show(self) -> None:
            with self._lock:
                now = 100 * self._tracker.share
                if now - self._shown < 0.5 and now < 100:  # a redraw for every step would take longer than the step
                    return
                shown, self._shown = now - self._shown, now
                try:
                    task.advance(shown)
                except Exception as error:  # noqa: BLE001 - raised once the builder has stopped: C++ lets nothing through
                    self.failure = error

    return Monitor()
