"""Solves all groups, in parallel and resumable: each solution is a file that is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
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

import numpy as np
from safetensors.numpy import save_file

from fqonnx.calib import files
from fqonnx.calib.registry import transform_named, weight_quantizer_named
from fqonnx.calib.solution import GroupSolution, GroupStats
from fqonnx.errors import CalibrationError
from fqonnx.progress import Silent
from fqonnx.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fqonnx.calib.observe import StatsStore
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
    device: str

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GroupTask:
        """The task that ``asdict`` made these values of."""
        return cls(**{**values, "out_features": tuple(values["out_features"])})


class SolutionStore:
    """Solutions of groups, one file each; calling it with a group's name reads that solution from disk.

    Args:
        folder: The folder of the files; made where missing.
        names: The groups' names in order.
        key: Digest of all that the solutions depend on; files of another key do not count as there.
    """

    def __init__(self, folder: Path, names: Sequence[str], key: str) -> None:
        self._key = key
        self._files = {name: folder / f"{index:04d}.safetensors" for index, name in enumerate(names)}
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where the group's solution is, or will be."""
        return self._files[name]

    def has(self, name: str) -> bool:
        """Whether the group's solution is there, for this key."""
        return files.read_metadata(self._files[name]).get("key") == self._key

    def __call__(self, name: str) -> GroupSolution:
        """Read one solution; nothing is kept.

        Raises:
            CalibrationError: It is not there.
        """
        if name not in self._files or not self.has(name):
            raise CalibrationError(f"group {name!r} has no solution: run the build again")
        arrays = files.read(self._files[name])
        return GroupSolution(
            group=name,
            channel_scale=arrays.get("channel_scale"),
            left=arrays.get("left"),
            right=arrays.get("right"),
            clip=float(arrays["clip"][0]),
            codes=arrays["codes"],
            scales=arrays["scales"],
            metrics=files.read_metadata(self._files[name])["metrics"],
            profile_before=arrays.get("profile_before"),
            profile_after=arrays.get("profile_after"),
        )


def solve(
    groups: Sequence[LinearGroup],
    stats: StatsStore | None,
    recipe: Recipe,
    *,
    workdir: Path,
    fingerprint: str,
    device: str = "cpu",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> SolutionStore:
    """Solve every group that ``workdir`` does not hold yet.

    On the CPU, groups that train or need a Hessian are solved by ``jobs`` processes of one thread each, which on small matrices is
    nearly ``jobs`` times as fast as one process of ``jobs`` threads, and makes the result independent of ``jobs``. Memory: each process
    holds one group's weights, statistics and about four more copies of the weights.

    Args:
        groups: What to solve.
        stats: Statistics of the groups; None for a recipe that needs none.
        recipe: How to solve.
        workdir: Folder of the solutions (``groups/``).
        fingerprint: Digest of the model and the data; solutions of another one are not reused.
        device: ``cpu`` or ``cuda``.
        jobs: Processes; None takes one per core on the CPU and one on CUDA.
        progress: Where to tell how far it is.

    Returns:
        The store, which holds every group.

    Raises:
        CalibrationError: A group cannot be solved.
    """
    workdir = Path(workdir)
    key = hashlib.sha256(json.dumps([fingerprint, recipe.to_dict(), device, _versions()], sort_keys=True).encode()).hexdigest()
    store = SolutionStore(workdir / "groups", [group.name for group in groups], key)
    missing = [group for group in groups if not store.has(group.name)]
    if len(missing) < len(groups):
        logger.info("%d of %d groups were solved before", len(groups) - len(missing), len(groups))
    heavy = transform_named(recipe.transform).needs_tokens or weight_quantizer_named(recipe.weights).needs_hessian
    jobs = 1 if device != "cpu" or not heavy else min(jobs or len(os.sched_getaffinity(0)), len(missing))
    # The widest first, so that no process is left alone with a long one at the end.
    missing.sort(key=lambda group: -group.in_features * group.out_features)
    tasks = _Tasks(missing, stats, recipe, store, key, workdir, device)
    with (progress or Silent()).task("Solving groups", len(missing)) as task:
        if heavy and device == "cpu":
            _solve_in_processes(tasks, jobs, task.advance)
        else:
            while (one := tasks.take()) is not None:
                run_task(one)
                tasks.done(one)
                task.advance()
    return store


def run_task(task: GroupTask) -> None:
    """Solve one group and write its solution, whole or not at all.

    Raises:
        CalibrationError: The group cannot be solved.
    """
    from fqonnx.calib.solve_group import solve_group

    stats = None
    if task.stats is not None:
        arrays = files.read(Path(task.stats))
        stats = GroupStats(arrays["tokens"], arrays.get("hessian"), arrays["absmax"], int(arrays["count"]))
    weight = files.read(Path(task.weight))["weight"]
    solution = solve_group(
        task.name, weight, stats, Recipe.from_dict(task.recipe), seed=task.seed, out_features=task.out_features, device=task.device
    )
    arrays = {
        name: array
        for name in ("channel_scale", "left", "right", "codes", "scales", "profile_before", "profile_after")
        if (array := getattr(solution, name)) is not None
    }
    arrays["clip"] = np.array([solution.clip])
    files.write(Path(task.result), arrays, {"key": task.key, "group": task.name, "metrics": solution.metrics})


class _Tasks:
    """Hands out groups one at a time; a group's weights lie on disk only from ``take`` to ``done``. Threads may share it."""

    def __init__(
        self,
        groups: Sequence[LinearGroup],
        stats: StatsStore | None,
        recipe: Recipe,
        store: SolutionStore,
        key: str,
        workdir: Path,
        device: str,
    ) -> None:
        self._groups = deque(groups)
        self._stats, self._recipe, self._store, self._key, self._device = stats, recipe, store, key, device
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
            key=self._key,
            recipe=self._recipe.to_dict(),
            seed=_seed(self._recipe.seed, group.name),
            out_features=tuple(linear.out_features for linear in group.linears),
            device=self._device,
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
            raise CalibrationError(
                f"group {task.name!r}: its process ended with code {self._process.wait()}: most likely out of memory; go on with --resume"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise CalibrationError(answer["error"])

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()


def _seed(seed: int, name: str) -> int:
    """A group's own seed: what it is given must not depend on which groups there are besides it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "little") >> 1


def _versions() -> list[str]:
    import torch

    return [version("fqonnx"), torch.__version__]
