"""Time of one call on the GPU with a cold L2 cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fqonnx.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable

_FLUSH_BYTES = 512 << 20
"""Several times any L2 cache, and long enough to write that a call is queued well before the GPU comes to it."""
_FLUSH_MICROSECONDS = 150
"""About what it takes; it only decides how many calls fit the time."""
_LEAST, _MOST = 3, 400
_COPY_BYTES = 2 << 30

METHOD = "medians of calls with CUDA events, the L2 cache overwritten before each"


class Timer:
    """Times calls.

    Args:
        seconds: How long to spend on each, about.

    Raises:
        EngineError: There is no GPU.
    """

    def __init__(self, seconds: float = 0.05) -> None:
        import torch

        if not torch.cuda.is_available():
            raise EngineError("PyTorch finds no CUDA device here: run the benchmark on a machine with one")
        self._torch, self._seconds = torch, seconds
        self._flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self.device = torch.cuda.get_device_name()
        self.capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]

    def __call__(self, function: Callable[[], object]) -> float:
        """Median microseconds of ``function`` on the current stream."""
        torch = self._torch
        function()  # loads the kernel, fills the caching allocator
        first = self._once(function, 1)[0]
        count = int(min(_MOST, max(_LEAST, self._seconds * 1e6 / (first + _FLUSH_MICROSECONDS))))
        return float(torch.tensor(self._once(function, count)).median())

    def _once(self, function: Callable[[], object], count: int) -> list[float]:
        torch = self._torch
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for begin, end in pairs:
            self._flush.zero_()
            begin.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in pairs]

    def copy_bandwidth(self) -> float:
        """Bytes a second of a large copy, reads and writes counted: what memory-bound floors are computed with."""
        source = self._torch.empty(_COPY_BYTES // 4, dtype=self._torch.int32, device="cuda").random_()
        target = self._torch.empty_like(source)
        return 2 * _COPY_BYTES / (self(lambda: target.copy_(source)) * 1e-6)


_REPLAYS = 5
"""Of a graph back to back, for one figure: a replay's own launch is no part of what is measured."""

REPLAY_METHOD = "medians of replays of a CUDA graph, back to back"


def replayed(call: Callable[[], object], seconds: float) -> float:
    """Median microseconds of ``call``, replayed as a CUDA graph for about ``seconds``."""
    import torch

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def once() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / _REPLAYS

    first = min(once() for _ in range(3))
    return float(torch.tensor([once() for _ in range(max(5, int(seconds * 1e6 / first / _REPLAYS)))]).median())


def attempt(timer: Timer, make: Callable[[], Callable[[], object]]) -> float | None:
    """The time of what ``make`` prepares; None where the library behind it does not take the problem."""
    import torch

    try:
        return timer(make())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, EngineError):
        return None


def about(timer: Timer, bandwidth: float, method: str = METHOD) -> dict[str, Any]:
    """What a run was, for ``results.report``: device, a copy's ``bandwidth`` in bytes a second, how times were taken, versions."""
    return {"device": timer.device, "copy_gb_s": bandwidth * 1e-9, "method": method, "versions": versions()}


def versions() -> dict[str, Any]:
    """Of what ran."""
    import torch

    return {"torch": torch.__version__, "cuda": torch.version.cuda, "driver": _driver()}


def _driver() -> str | None:
    from ctypes import CDLL, byref, c_int

    number = c_int()
    try:
        status = CDLL("libcuda.so.1").cuDriverGetVersion(byref(number))
    except OSError:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}" if status == 0 else None
