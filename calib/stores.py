"""What calibration keeps of each group between its stages, in files that survive a kill: the old one is there or the new, never a part."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fqonnx.calib.solution import GroupSolution, GroupStats
from fqonnx.durable import sync
from fqonnx.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

Arrays = dict[str, npt.NDArray[Any]]


class GroupStore:
    """One file a group; each says itself what it was computed from.

    Args:
        folder: The folder of the files; made where missing.
        names: The groups' names in order.
        key: Digest of all that the content depends on; files of another key do not count as there.
    """

    what: ClassVar[str]
    """What a group has in here, for errors."""

    def __init__(self, folder: Path, names: Sequence[str], key: str) -> None:
        self._key = key
        self._files = {name: folder / f"{index:04d}.safetensors" for index, name in enumerate(names)}
        folder.mkdir(parents=True, exist_ok=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def path(self, name: str) -> Path:
        """Where the group's file is, or will be."""
        return self._files[name]

    def has(self, name: str) -> bool:
        """Whether the group's file is there, readable and of this key."""
        metadata = read_metadata(self._files[name])
        return bool(metadata.get("key") == self._key and metadata.get("group") == name)

    def drop(self, name: str) -> None:
        """Delete one group's file once nobody needs it."""
        self._files[name].unlink(missing_ok=True)

    def _arrays(self, name: str) -> Arrays:
        if name not in self._files or not self.has(name):
            raise CalibrationError(f"group {name!r} has no {self.what}: run the build again")
        return read(self._files[name])


class StatsStore(GroupStore):
    """Statistics of groups."""

    what = "statistics"

    def load(self, name: str) -> GroupStats:
        """Read one group's statistics; nothing is kept.

        Raises:
            CalibrationError: They are not there, or of other data.
        """
        return GroupStats.from_arrays(self._arrays(name))

    def save(self, name: str, stats: GroupStats) -> None:
        """Write one group's statistics."""
        write(self._files[name], stats.to_arrays(), {"key": self._key, "group": name})


class SolutionStore(GroupStore):
    """Solutions of groups; calling it with a group's name reads that solution.

    Args:
        folder: The folder of the files; made where missing. Solutions of one group under other keys lie in it too.
        names: The groups' names in order.
        key: Digest of all that the solutions depend on, one for all or by name.
    """

    what = "solution"

    def __init__(self, folder: Path, names: Sequence[str], key: str | Mapping[str, str]) -> None:
        super().__init__(folder, names, "")
        self._keys = dict.fromkeys(names, key) if isinstance(key, str) else dict(key)
        self._files = {name: folder / f"{_short_digest(name, self._keys[name])}.safetensors" for name in names}

    def key(self, name: str) -> str:
        """The key of the group's solution."""
        return self._keys[name]

    def has(self, name: str) -> bool:
        """Whether the group's file is there, readable and of its key."""
        metadata = read_metadata(self._files[name])
        return bool(metadata.get("key") == self._keys[name] and metadata.get("group") == name)

    def __call__(self, name: str) -> GroupSolution:
        """Read one solution; nothing is kept.

        Raises:
            CalibrationError: It is not there.
        """
        return GroupSolution.from_arrays(name, self._arrays(name), read_metadata(self._files[name])["metrics"])

    def save(self, solution: GroupSolution) -> None:
        """Write one group's solution."""
        write_solution(self._files[solution.group], solution, self._keys[solution.group])


def _short_digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


def write(path: Path, arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any]) -> None:
    """Write arrays and JSON metadata to ``path`` through a sibling, synced to disk before it takes the name.

    Raises:
        OSError: The disk is full, and the like.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # A name of our own: the worker of a build that was killed may still be writing this group when a resumed build does.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()},
            partial,
            {"fqonnx": json.dumps(metadata, sort_keys=True)},
        )
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # its only trace of the errno
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def write_solution(path: Path, solution: GroupSolution, key: str) -> None:
    """Write the file that a ``SolutionStore`` of this key reads, for whoever knows the path but not the store."""
    write(path, solution.to_arrays(), {"key": key, "group": solution.group, "metrics": solution.metrics})


def read(path: Path) -> Arrays:
    """Every array of the file, in memory."""
    from safetensors.numpy import load_file

    arrays: Arrays = load_file(path)
    return arrays


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of ``write``; empty where there is no such file or it is not one of ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, Any] = json.loads((file.metadata() or {}).get("fqonnx", "{}"))
    except (FileNotFoundError, SafetensorError):
        return {}
    return metadata
