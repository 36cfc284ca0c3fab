"""Solves all groups, in parallel and resumable: each solution is a file that is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from safetensors.numpy import save_file

from fqonnx.calib import stores
from fqonnx.calib.registry import transform_named, weight_quantizer_named
from fqonnx.calib.solution import GroupSolution, GroupStats
from fqonnx.calib.stores import SolutionStore
from fqonnx.errors import CalibrationError
from fqonnx.progress import Silent
from fqonnx.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fqonnx.calib.stores import StatsStore
    from fqonnx.passes.groups import LinearGroup
    from fqonnx.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupTask:
    """One group for a worker: paths in, a path out."""

    name: str
    weight: str
    stats: str | None
    result: str
    key: str
    recipe: dict[str, Any]
    seed: int
    out_features: tuple[int, ...]
    base: str | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GroupTask:
        """The task that ``asdict`` made these values of."""
        return cls(**{**values, "out_features": tuple(values["out_features"])})


def solve(
    groups: Sequence[LinearGroup],
    stats: StatsStore | None,
    recipe: Recipe,
    *,
    workdir: Path,
    fingerprint: str,
    device: str = "cpu",
    base: SolutionStore | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> SolutionStore:
    """Solve every group that ``workdir`` does not hold yet.

    On the CPU, groups that train or need a Hessian are solved by ``jobs`` processes of one thread each, which on small matrices is
    nearly ``jobs`` times as fast as one process of ``jobs`` threads, and makes the result independent of ``jobs``. Memory: each process
    holds one group, most of it in fp64 matrices of ``[K, K]``; see ``_memory``.

    Args:
        groups: What to solve.
        stats: Statistics of the groups; None for a recipe that needs none.
        recipe: How to solve, each group in its own scheme.
        workdir: Folder of the solutions (``groups/``).
        fingerprint: Digest of the model and the data; solutions of another one are not reused.
        device: ``cpu`` or ``cuda``.
        base: Solutions of the same groups in another scheme, whose transforms are taken; None fits transforms for this scheme.
        jobs: Processes on the CPU; None takes one per core, or as many as find room in memory.
        progress: Where to tell how far it is.

    Returns:
        The store, which holds every group.

    Raises:
        CalibrationError: A group cannot be solved.
    """
    workdir = Path(workdir)
    keys = {group.name: _key(fingerprint, recipe.for_group(group.name), device, base, group.name) for group in groups}
    store = SolutionStore(workdir / "groups", list(keys), keys)
    missing = [group for group in groups if not store.has(group.name)]
    if len(missing) < len(groups):
        logger.info("%d of %d groups were solved before", len(groups) - len(missing), len(groups))
    heavy = transform_named(recipe.transform).needs_tokens or weight_quantizer_named(recipe.weights).needs_hessian
    with (progress or Silent()).task("Solving groups", len(missing)) as task:
        if heavy and device == "cpu" and missing:
            # The widest first, so that no process is left alone with a long one at the end.
            missing.sort(key=lambda group: -group.in_features * group.out_features)
            tasks = _Tasks(missing, stats, recipe, store, base, workdir)
            _solve_in_processes(tasks, min(jobs or _processes(missing, stats), len(missing)), task.advance)
        else:
            for group in missing:
                store.save(_solve_here(group, stats, recipe, device, base))
                task.advance()
    return store


def _key(fingerprint: str, recipe: Recipe, device: str, base: SolutionStore | None, group: str) -> str:
    depends_on = [fingerprint, recipe.to_dict(), device, None if base is None else base.key(group), library_versions()]
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def _processes(groups: Sequence[LinearGroup], stats: StatsStore | None) -> int:
    """One process per core, or fewer where that many of the largest group do not fit in memory."""
    cores = len(os.sched_getaffinity(0))
    largest, available = max(_memory(group, stats) for group in groups), _available_memory()
    room = max(available // largest, 1)
    if room < min(cores, len(groups)):
        logger.info("%d processes, not %d: a group takes up to %.1f of %.1f GB", room, cores, largest / 1e9, available / 1e9)
    return min(cores, room)


_PROCESS_BYTES = 512 << 20
"""Of a process that has loaded torch, whichever build of it."""


def _memory(group: LinearGroup, stats: StatsStore | None) -> int:
    """Peak resident bytes of the process that solves a group with FlatQuant and GPTQ, which take the most: measured, rounded up."""
    square, weight = group.in_features**2, group.in_features * group.out_features
    tokens = 0 if stats is None else max(stats.path(group.name).stat().st_size - 4 * square, 0)
    outputs = min(tokens * group.out_features // group.in_features, 256 << 20)  # FlatQuant's targets
    return _PROCESS_BYTES + 90 * square + 65 * weight + 8 * tokens + outputs


def _available_memory() -> int:
    """Bytes that this process and those it starts may still take, by the machine and by the container's limit (cgroup v2)."""
    available = 1024 * _number(Path("/proc/meminfo"), r"MemAvailable:\s+(\d+)", default=1 << 40)
    group = Path("/sys/fs/cgroup")
    limit = _number(group / "memory.max", r"(\d+)", default=0)
    if limit:
        used = _number(group / "memory.current", r"(\d+)", default=0) - _number(group / "memory.stat", r"(?m)^file (\d+)", default=0)
        available = min(available, limit - used)  # cached files make room
    return available


def _number(path: Path, pattern: str, *, default: int) -> int:
    try:
        found = re.search(pattern, path.read_text())
    except OSError:
        return default
    return int(found[1]) if found else default


def _solve_here(group: LinearGroup, stats: StatsStore | None, recipe: Recipe, device: str, base: SolutionStore | None) -> GroupSolution:
    from fqonnx.calib.solve_group import solve_group

    return solve_group(
        group.name,
        group.read_weights(),
        None if stats is None else stats.load(group.name),
        recipe.for_group(group.name),
        seed=group_seed(recipe.seed, group.name),
        out_features=tuple(linear.out_features for linear in group.linears),
        device=device,
        base=None if base is None else base(group.name),
    )


def run_task(task: GroupTask) -> None:
    """Solve one group on the CPU and write its solution, whole or not at all.

    Raises:
        CalibrationError: The group cannot be solved.
        OSError: A file cannot be read or written.
    """
    from fqonnx.calib.solve_group import solve_group

    stats = None if task.stats is None else GroupStats.from_arrays(stores.read(Path(task.stats)))
    weight = stores.read(Path(task.weight))["weight"]
    solution = solve_group(
        task.name,
        weight,
        stats,
        Recipe.from_dict(task.recipe),
        seed=task.seed,
        out_features=task.out_features,
        base=None if task.base is None else GroupSolution.from_arrays(task.name, stores.read(Path(task.base)), {}),
    )
    stores.write_solution(Path(task.result), solution, task.key)


class _Tasks:
    """Hands out groups one at a time; a group's weights lie on disk only from ``take`` to ``done``. Threads may share it."""

    def __init__(
        self,
        groups: Sequence[LinearGroup],
        stats: StatsStore | None,
        recipe: Recipe,
        store: SolutionStore,
        base: SolutionStore | None,
        workdir: Path,
    ) -> None:
        self._groups = deque(groups)
        self._stats, self._recipe, self._store, self._base = stats, recipe, store, base
        self._folder = workdir / "weights"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()  # weights are read by one thread at a time: memory, and the model's files are not thread-safe

    def take(self) -> GroupTask | None:
        """The next group, or None when all are taken."""
        with self._lock:
            if not self._groups:
                return None
            group = self._groups.popleft()
            weight = self._folder / self._store.path(group.name).name
            save_file({"weight": group.read_weights()}, weight)
        return GroupTask(
            name=group.name,
            weight=str(weight),
            stats=None if self._stats is None else str(self._stats.path(group.name)),
            result=str(self._store.path(group.name)),
            key=self._store.key(group.name),
            recipe=self._recipe.for_group(group.name).to_dict(),
            seed=group_seed(self._recipe.seed, group.name),
            out_features=tuple(linear.out_features for linear in group.linears),
            base=None if self._base is None else str(self._base.path(group.name)),
        )

    def done(self, task: GroupTask) -> None:
        """Drop the group's weights."""
        Path(task.weight).unlink(missing_ok=True)

    def stop(self) -> None:
        """Hand out nothing more."""
        with self._lock:
            self._groups.clear()


def _solve_in_processes(tasks: _Tasks, jobs: int, advance: Callable[[], None]) -> None:
    """Feed ``jobs`` workers, each from a thread of its own that waits for its answers.

    Raises:
        CalibrationError: The first error of a worker; the others are ended.
    """
    workers = [_Worker() for _ in range(jobs)]
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def feed(worker: _Worker) -> None:
        try:
            while (task := tasks.take()) is not None:
                worker.solve(task)
                tasks.done(task)
                advance()
            ended.put(None)
        except BaseException as error:  # noqa: BLE001  raised again in the main thread
            ended.put(error)

    threads = [threading.Thread(target=feed, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            error = ended.get()
            if error is not None:
                raise error
    finally:
        tasks.stop()
        for worker in workers:
            worker.end()
        for thread in threads:
            thread.join()


class _Worker:
    """A process running ``fqonnx.calib.worker``."""

    def __init__(self) -> None:
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fqonnx.calib.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def solve(self, task: GroupTask) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asdict(task)) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        if not line:
            code = self._process.wait()
            if code == -signal.SIGKILL:
                raise CalibrationError(f"group {task.name!r}: its process was killed, most likely for lack of memory: go on with --resume")
            raise RuntimeError(f"group {task.name!r}: its process ended with code {code}")  # a bug: its traceback is on standard error
        answer = json.loads(line)
        if "error" in answer:
            raise CalibrationError(answer["error"])

    def end(self) -> None:
        # Both: one that waits for a task ends with its input, one at work by the signal. A handler of the interpreter's own (coverage has
        # one) does not run while the process is about to wait, so that the signal alone could leave it waiting for ever.
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def group_seed(seed: int, name: str) -> int:
    """A group's own seed: what it is given must not depend on which groups there are besides it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "little") >> 1


def library_versions() -> list[str]:
    """What solutions depend on besides their input."""
    import torch

    return [version("fqonnx"), torch.__version__]
