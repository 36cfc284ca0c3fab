"""Sources that compute feeds: a Python script, and the inputs that Polygraphy saved."""

from __future__ import annotations

import hashlib
import runpy
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fqonnx.calib.data.base import file_digest
from fqonnx.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fqonnx.calib.data.base import Feeds, Reader, Request

_END = object()


def open_script(path: Path, spec: str, request: Request) -> Reader:
    """``script.py[:function]``: the function (``load_data`` by default) yields or returns feed dicts; it is called anew for each pass.

    Raises:
        DataError: The script raises, or has no such function.
    """
    del request
    _, _, function = spec.rpartition(".py")
    return _Script(spec, path, function.removeprefix(":") or "load_data")


def open_polygraphy(path: Path, spec: str, request: Request) -> Reader:
    """A JSON file of feed dicts as ``polygraphy run --save-inputs`` writes it.

    Raises:
        DataError: Not such a file.
    """
    del request
    from polygraphy.exception import PolygraphyException
    from polygraphy.json import load_json
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):  # it logs to standard output
            content = load_json(str(path))
    except (PolygraphyException, ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(
            f"{path} is not a JSON file of Polygraphy's ({_one_line(error)}): write it with `polygraphy run --save-inputs`"
        ) from None
    if not isinstance(content, list) or not all(isinstance(feed, Mapping) for feed in content):
        raise DataError(f"{path} holds no list of inputs: write it with `polygraphy run --save-inputs`")
    return _Listed(spec, path, content)


class _Listed:
    rows = False

    def __init__(self, name: str, path: Path, feeds: list[Mapping[str, Any]]) -> None:
        self.name = name
        self.length: int | None = len(feeds)
        self._path = path
        self._feeds = feeds

    def __iter__(self) -> Iterator[tuple[str, Feeds]]:
        for index, feed in enumerate(self._feeds):
            yield f"sample {index}", _arrays(f"{self.name}, sample {index}", feed)

    def fingerprint(self) -> str:
        return file_digest(self._path)


class _Script:
    """Feeds of a script's function. That two passes give the same is checked by a digest of each pass that is read to the end."""

    rows = False
    length: int | None = None

    def __init__(self, name: str, path: Path, function: str) -> None:
        self.name = name
        self._path = path
        self._digest: str | None = None
        with _own_errors(path):
            sys.path.insert(0, str(path.resolve().parent))
            try:
                names = runpy.run_path(str(path), run_name="fqonnx_data")
            finally:
                sys.path.remove(str(path.resolve().parent))
        found = names.get(function)
        if not callable(found):
            others = [key for key, value in names.items() if callable(value) and getattr(value, "__module__", "") == "fqonnx_data"]
            raise DataError(
                f"{path} has no function {function!r}: {'it has ' + ', '.join(others) if others else 'define one that yields feeds'}"
            )
        self._function: Callable[[], object] = found

    def __iter__(self) -> Iterator[tuple[str, Feeds]]:
        digest = hashlib.blake2b(digest_size=16)
        with _own_errors(self._path):
            result = self._function()
        if result is None or isinstance(result, Mapping) or not isinstance(result, Iterable):
            raise DataError(f"{self.name} gave {type(result).__name__}, not feeds: yield one dict of arrays by input name for each sample")
        feeds = iter(result)
        index = 0
        while True:
            with _own_errors(self._path):
                feed = next(feeds, _END)
            if feed is _END:
                break
            arrays = _arrays(f"{self.name}, sample {index}", feed)
            for key in sorted(arrays):
                digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape}\0".encode())
                digest.update(np.ascontiguousarray(arrays[key]).tobytes())
            yield f"sample {index}", arrays
            index += 1
        if self._digest not in (None, digest.hexdigest()):
            raise DataError(f"{self.name} gave other data on the second pass: seed its random generator inside the function")
        self._digest = digest.hexdigest()

    def fingerprint(self) -> str:
        """Digest of all feeds: what a script computes cannot be told from its text."""
        if self._digest is None:
            for _ in self:
                pass
        assert self._digest is not None
        return self._digest


class _own_errors:  # noqa: N801  a context manager, used like a function
    """Turns an exception of the user's script into one line with its place in the script."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, (KeyboardInterrupt, GeneratorExit)):
            return
        line = error.lineno if isinstance(error, SyntaxError) else None
        for frame in traceback.extract_tb(error.__traceback__):
            if Path(frame.filename) == self._path:
                line = frame.lineno
        place = f"{self._path}:{line}" if line else str(self._path)
        raise DataError(f"{place} raised {type(error).__name__}: {_one_line(error)}: mend the script") from None


def _arrays(where: str, feed: object) -> Feeds:
    """Own copies of a feed's values: a script may reuse its buffers."""
    if not isinstance(feed, Mapping):
        raise DataError(f"{where}: {type(feed).__name__}, not a dict of arrays by input name")
    arrays: Feeds = {}
    for name, value in feed.items():
        array = value.detach().cpu().numpy() if hasattr(value, "detach") else value.numpy() if hasattr(value, "numpy") else value
        try:
            arrays[str(name)] = np.array(array)
        except ValueError:
            raise DataError(f"{where}, input {name!r}: rows of different lengths: pad them or yield them as samples of their own") from None
    return arrays


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
