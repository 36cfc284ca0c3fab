"""Sources of numpy files: one ``.npz``, or a folder of ``.npy`` or ``.npz`` files."""

from __future__ import annotations

import difflib
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fqonnx.calib.data.base import file_digest
from fqonnx.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fqonnx.calib.data.base import Feeds, Reader, Request


def open_npz(path: Path, spec: str, request: Request) -> Reader:
    """An ``.npz``: arrays by input name, first axis = samples. They are held in memory while they are read.

    Raises:
        DataError: Unreadable, pickled objects, arrays of different lengths.
    """
    del request
    return _Rows(spec, {path: None})


def open_folder(path: Path, spec: str, request: Request) -> Reader:
    """A folder in one of three forms.

    - ``.npz`` files: each one feed, arrays by input name with every axis the model wants; samples may differ in shape;
    - ``.npy`` files named after inputs: each one input, first axis = samples;
    - ``.npy`` files of any other names, where the model has one input: each one feed of it.

    Files are taken in the order of their names.

    Raises:
        DataError: No such files, both kinds, or names that are no inputs of a model with several.
    """
    npz, npy = (sorted(path.glob(pattern)) for pattern in ("*.npz", "*.npy"))
    if npz and npy:
        raise DataError(f"{spec} holds both .npz and .npy files: keep one kind")
    if npz:
        return _Files(spec, npz, None)
    if not npy:
        raise DataError(f"{spec} holds no .npy or .npz files: give a folder of them")
    names = request.names()
    if all(file.stem in names for file in npy):
        return _Rows(spec, {file: file.stem for file in npy})
    if len(names) == 1:
        return _Files(spec, npy, names[0])
    stray = next(file for file in npy if file.stem not in names)
    close = difflib.get_close_matches(stray.stem, names, n=1)
    hint = f"did you mean {close[0]}.npy?" if close else f"name the files after the inputs ({', '.join(names)})"
    raise DataError(f"{stray} is not named after an input of the model: {hint}")


class _Rows:
    """Arrays whose first axis is the samples."""

    rows = True

    def __init__(self, name: str, files: dict[Path, str | None]) -> None:
        self.name = name
        self._files = files
        self._arrays: Feeds = {}
        for path, input_name in files.items():
            self._arrays |= read_arrays(path, input_name)
        if not self._arrays:
            raise DataError(f"{name} holds no arrays: save one array for each input of the model")
        lengths = {key: len(array) if array.ndim else None for key, array in self._arrays.items()}
        for key, length in lengths.items():
            if length is None:
                raise DataError(f"{name}: array {key!r} is a single value: its first axis must be the samples")
        first, expected = next(iter(lengths.items()))
        for key, length in lengths.items():
            if length != expected:
                raise DataError(f"{name}: {first!r} has {expected} samples but {key!r} has {length}: give as many of each")
        self.length = expected

    def __iter__(self) -> Iterator[tuple[str, Feeds]]:
        for index in range(self.length or 0):
            yield f"sample {index}", {key: array[index, ...] for key, array in self._arrays.items()}

    def fingerprint(self) -> str:
        return file_digest(*self._files)


class _Files:
    """One feed a file, read when its turn comes."""

    rows = False

    def __init__(self, name: str, files: list[Path], input_name: str | None) -> None:
        self.name = name
        self.length: int | None = len(files)
        self._files = files
        self._input_name = input_name

    def __iter__(self) -> Iterator[tuple[str, Feeds]]:
        for path in self._files:
            yield f"file {path.name}", read_arrays(path, self._input_name)

    def fingerprint(self) -> str:
        return file_digest(*self._files)


def read_arrays(path: Path, name: str | None = None) -> Feeds:
    """The arrays of an ``.npz`` by name, or the array of an ``.npy`` under ``name``. Pickled objects are refused: reading them runs code.

    Raises:
        DataError: Not such a file, cut short, or pickled objects.
    """
    key = name
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return {key or path.stem: content}
            arrays: dict[str, npt.NDArray[Any]] = {}
            for key in content.files:
                arrays[key] = content[key]
            return arrays
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}: check the file") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError) as error:
        if "allow_pickle" in str(error) or "Object arrays" in str(error):
            what = f"array {key!r} of {path}" if key else str(path)
            raise DataError(
                f"{what} holds pickled objects, which can run code when read: save plain arrays (ragged ones: a folder of .npz)"
            ) from None
        raise DataError(f"{path} is not a whole .npy or .npz file ({' '.join(str(error).split())}): save it again") from None
