"""safetensors files that survive a kill: after any interruption the old file is there, or the new one, never a part."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Arrays = dict[str, npt.NDArray[Any]]


def write(path: Path, arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any]) -> None:
    """Write arrays and JSON metadata to ``path`` through a sibling, synced to disk before it takes the name.

    Raises:
        OSError: The disk is full, and the like.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    partial = path.with_suffix(".partial")
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
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
