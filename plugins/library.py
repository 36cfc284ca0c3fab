"""Where the kernels' library is: in the user's cache, under the hash of the sources it was made of."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fqonnx.errors import EngineError

FOLDER = Path(__file__).resolve().parent
"""Of the sources: the package's folder, or the repository's."""

SOURCE_LIST = "sources.txt"
EXPORTS = "libfqonnx.map"
LIBRARY = "libfqonnx.so"
VARIABLE = "FQONNX_LIBRARY"
"""Environment variable that names another library, such as one that CMake built."""

_SUFFIXES = {".cpp", ".cu", ".cuh", ".def", ".h"}


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/fqonnx``, by default ``~/.cache/fqonnx``."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "fqonnx"


def source_files(folder: Path = FOLDER) -> list[Path]:
    """Everything that the library is made of, in a fixed order."""
    return [folder / SOURCE_LIST, folder / EXPORTS, *sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)]


def source_hash(folder: Path = FOLDER) -> str:
    """SHA-256 of all source files with their names: another hash, another library."""
    digest = hashlib.sha256()
    for path in source_files(folder):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def default_path() -> Path:
    """Where ``fqonnx plugin build`` puts the library of these sources."""
    return cache_folder() / "plugin" / source_hash()[:16] / LIBRARY


def library_path() -> Path | None:
    """The library: the file that ``FQONNX_LIBRARY`` names, else what was built of these very sources; None where nothing was.

    Raises:
        EngineError: ``FQONNX_LIBRARY`` names no file.
    """
    named = os.environ.get(VARIABLE, "")
    if named:
        path = Path(named).absolute()
        if not path.is_file():
            raise EngineError(f"{VARIABLE} is {named}, and there is no such file: correct it, or unset it and run `fqonnx plugin build`")
        return path
    path = default_path()
    return path if path.is_file() else None


def require_library() -> Path:
    """The library's path.

    Raises:
        EngineError: There is none; the message says how to make it.
    """
    path = library_path()
    if path is None:
        raise EngineError("the kernels' library is not built, or not of these sources: run `fqonnx plugin build`")
    return path
