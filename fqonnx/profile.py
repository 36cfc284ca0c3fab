"""Where the time of an ONNX Runtime session goes, by op type.

ONNX Runtime's own profile times the calls of its kernels. On a CPU that is all there is to know; on CUDA a call only launches work. What
the GPU did, and when each piece of it was launched, is taken from PyTorch's profiler, which sees all of the process; the launch tells the
node, since ONNX Runtime calls one node after the other.
"""

from __future__ import annotations

import bisect
import json
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

UNKNOWN = "(no node)"
"""What work is counted under whose launch lies in no node: copies of the session's own, say."""

_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})


@dataclass(frozen=True)
class OpTime:
    """Time of one op type in one run.

    Attributes:
        microseconds: All its calls of a run.
        calls: In a run.
    """

    microseconds: float
    calls: float


@dataclass(frozen=True)
class Profile:
    """Where the time of a run goes.

    Attributes:
        ops: By op type, the longest first.
        measured: ``device`` for the time that its kernels ran, ``host`` for the time that its calls took.
        kernels: Microseconds of a run by name of the device's kernel, the longest first; empty for ``host``.
    """

    ops: dict[str, OpTime]
    measured: str
    kernels: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One call of a node's kernel: when it began and how long it took on the host, in nanoseconds."""

    op: str
    start: float
    duration: float


@dataclass(frozen=True)
class Work:
    """One kernel or copy on the device: when it was launched (on the clock of ``Call``), and how long it ran, in nanoseconds."""

    kernel: str
    launched: float
    duration: float


def read_calls(events: Sequence[Mapping[str, Any]], runs: int, begin: float = 0.0) -> list[Call]:
    """The calls of the last ``runs`` runs in ONNX Runtime's profile, in order; ``begin`` is when it began, in nanoseconds."""
    starts = sorted(event["ts"] for event in events if event.get("cat") == "Session" and event.get("name") == "model_run")
    first = starts[-runs]
    calls = [
        Call(event["args"]["op_name"], begin + event["ts"] * 1e3, event["dur"] * 1e3)
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= first
    ]
    return sorted(calls, key=lambda call: call.start)


def read_work(trace: Mapping[str, Any]) -> list[Work]:
    """The kernels and copies in a trace of PyTorch's profiler."""
    base = float(trace.get("baseTimeNanoseconds", 0))
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    launched = {event["args"]["correlation"]: event["ts"] for event in events if event.get("cat") in _LAUNCHES}
    return [
        Work(event["name"], base + launched[event["args"]["correlation"]] * 1e3, event["dur"] * 1e3)
        for event in events
        if event.get("cat") in _WORK and event["args"].get("correlation") in launched
    ]


def summarize(calls: Sequence[Call], runs: int, work: Sequence[Work] | None = None) -> Profile:
    """Sum by op type, per run: the device's work where given (what was launched before the first call is left out), else the calls."""
    count: dict[str, int] = defaultdict(int)
    for call in calls:
        count[call.op] += 1
    spent: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    if work is None:
        for call in calls:
            spent[call.op] += call.duration
    else:
        starts = [call.start for call in calls]
        for item in work:
            if item.launched < starts[0]:
                continue
            call = calls[bisect.bisect_right(starts, item.launched) - 1]
            spent[call.op if item.launched <= call.start + call.duration else UNKNOWN] += item.duration
            kernels[item.kernel] += item.duration
    per_run = 1e-3 / runs
    ops = {op: OpTime(total * per_run, count[op] / runs) for op, total in sorted(spent.items(), key=lambda entry: -entry[1])}
    longest = {name: total * per_run for name, total in sorted(kernels.items(), key=lambda entry: -entry[1])}
    return Profile(ops, "host" if work is None else "device", longest)


@contextmanager
def recorded_work() -> Iterator[list[Work] | None]:
    """Record what the GPU does within the block: the list is filled at its end. None where PyTorch cannot see a GPU."""
    import torch

    if not torch.cuda.is_available():
        yield None
        return
    found: list[Work] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        yield found
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory(prefix="fqonnx-profile-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found += read_work(json.loads(path.read_text(encoding="utf-8")))
