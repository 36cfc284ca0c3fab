"""What every data source shares: reading, checking against the model's inputs, casting, batching."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from fqonnx.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from fqonnx.calib.roles import InputRole
    from fqonnx.model import ModelInput

Feeds = dict[str, npt.NDArray[Any]]

logger = logging.getLogger(__name__)

COMMON_INPUTS = frozenset({"attention_mask", "position_ids", "token_type_ids"})
"""What a tokenizer gives beside the ids: left out without complaint where the model does not read it."""


class Source(Protocol):
    """Feeds for a model. Iterating twice gives the same feeds twice."""

    @property
    def length(self) -> int | None:
        """The number of feeds; None where only reading them all would tell."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of the data and of how they are cut into feeds."""
        ...

    def __iter__(self) -> Iterator[Feeds]: ...


class Reader(Protocol):
    """Raw samples of one kind of source, before anything about the model is known.

    Attributes:
        name: The source as the user named it, for messages.
        rows: True where a sample lacks the batch axis (a row of an array), False where it is a feed with every axis the model wants.
        length: The number of samples, None where unknown.
    """

    name: str
    rows: bool
    length: int | None

    def __iter__(self) -> Iterator[tuple[str, Feeds]]:
        """Each sample's label for messages and its arrays by name."""
        ...

    def fingerprint(self) -> str:
        """Digest of the content."""
        ...


@dataclass(frozen=True)
class Request:
    """What the caller of ``open_source`` asked for, for the readers to use.

    Attributes:
        inputs: The model's inputs.
        roles: What the graph does with each of them; empty where the graph is not known.
        tokenizer: ``tokenizer.json`` for text.
        seq_len: Tokens per sample for text.
    """

    inputs: tuple[ModelInput, ...]
    roles: Mapping[str, InputRole]
    tokenizer: Path | None
    seq_len: int | None

    def names(self) -> list[str]:
        """The inputs' names."""
        return [item.name for item in self.inputs]


class CheckedSource:
    """A reader's samples as feeds that the model accepts.

    Rows are stacked to ``batch_size`` (to the model's own batch where that is fixed; left-over rows that do not fill a fixed batch are
    dropped with a warning); samples of different shapes are never stacked together. Feeds that the user formed are fed as they are,
    except that a feed of several fixed batches is cut into them.

    Casts that lose nothing are made and said once in the log: between integers where every value fits, between floats where nothing
    overflows, booleans to integers, and 0/1 integers to booleans or floats. Inputs that the data lack are derived from the ids where the
    graph says what they are (mask: ones; positions: 0, 1, 2, ...; segments: zeros; past keys and values: of no tokens), and said in
    the log.

    Args:
        reader: Where samples come from.
        request: The model's inputs and their roles.
        samples: Samples to read at most; None reads all. Rows count one each, feeds that the user formed count one each too.
        batch_size: Rows per feed.

    Raises:
        DataError: While iterating: names, types, shapes or values do not fit, or there are no samples.
    """

    def __init__(self, reader: Reader, request: Request, *, samples: int | None, batch_size: int) -> None:
        if samples is not None and samples < 1:
            raise UsageError(f"{samples} samples are too few: ask for 1 or more")
        if batch_size < 1:
            raise UsageError(f"batch size {batch_size} is too small: ask for 1 or more")
        self._reader = reader
        self._checker = _Checker(reader.name, request)
        self._samples = samples
        self._fixed = self._checker.fixed_batch
        self._batch_size = self._fixed or batch_size
        self._fingerprint: str | None = None

    @property
    def length(self) -> int | None:
        """The number of feeds; None where only reading them all would tell."""
        available = self._reader.length
        if available is None or (not self._reader.rows and self._fixed):
            return None
        count = available if self._samples is None else min(available, self._samples)
        if not self._reader.rows or self._checker.takes_single(next(iter(self._reader), ("", {}))[1]):
            return count
        return count // self._fixed if self._fixed else -(-count // self._batch_size)

    @property
    def fingerprint(self) -> str:
        """A digest of the data and of how they are cut into feeds."""
        if self._fingerprint is None:
            parts = [self._reader.fingerprint(), self._samples, self._batch_size if self._reader.rows else 0]
            self._fingerprint = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
        return self._fingerprint

    def __iter__(self) -> Iterator[Feeds]:
        empty = True
        for label, feed in self._batched(islice(iter(self._reader), self._samples)):
            self._checker.finish(label, feed)
            empty = False
            yield feed
        if empty:
            raise DataError(f"{self._reader.name} holds no samples: give at least {self._fixed or 1}")

    def _batched(self, samples: Iterator[tuple[str, Feeds]]) -> Iterator[tuple[str, Feeds]]:
        if not self._reader.rows:
            for label, arrays in samples:
                for feed in _cut(self._checker.check(label, arrays), self._fixed):
                    yield label, feed
            return
        pending: list[Feeds] = []
        first = ""
        for label, arrays in samples:
            row = self._checker.check(label, arrays)
            stacks = self._checker.lacks_batch_axis(label, row)
            if pending and (not stacks or any(row[name].shape != array.shape for name, array in pending[0].items())):
                yield from self._stacked(first, pending)
                pending = []
            if not stacks:
                yield label, row
                continue
            first = first if pending else label
            pending.append(row)
            if len(pending) == self._batch_size:
                yield from self._stacked(first, pending)
                pending = []
        yield from self._stacked(first, pending)

    def _stacked(self, label: str, rows: list[Feeds]) -> Iterator[tuple[str, Feeds]]:
        if not rows:
            return
        if self._fixed and len(rows) < self._fixed:
            logger.warning("%s: %d samples left over do not fill the model's fixed batch of %d", self._reader.name, len(rows), self._fixed)
            return
        yield label, {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _cut(feed: Feeds, fixed: int | None) -> Iterator[Feeds]:
    sizes = {len(array) if array.ndim else 0 for array in feed.values()}
    size = sizes.pop() if len(sizes) == 1 else 0
    if fixed and size > fixed and size % fixed == 0:
        for start in range(0, size, fixed):
            yield {name: array[start : start + fixed] for name, array in feed.items()}
    else:
        yield feed


class _Checker:
    """The model's inputs as rules for samples. Every message is one line with the source, the sample and the input."""

    def __init__(self, source: str, request: Request) -> None:
        self._source = source
        self._inputs = {item.name: item for item in request.inputs}
        self._roles = request.roles
        self._said: set[str] = set()
        sizes = [item.shape[0] if item.shape else None for item in request.inputs]
        fixed = sizes[0] if sizes and all(size == sizes[0] for size in sizes) else None
        self.fixed_batch = fixed if isinstance(fixed, int) and fixed > 0 else None

    def check(self, label: str, arrays: Feeds) -> Feeds:
        """Names, types and values; the arrays cast to the model's types."""
        where = f"{self._source}, {label}"
        feed: Feeds = {}
        unknown = []
        for name, array in arrays.items():
            if name in self._inputs:
                feed[name] = self._cast(f"{where}, input {name!r}", array, self._inputs[name])
            elif name in COMMON_INPUTS:
                self._say(f"{self._source}: {name!r} is not an input of the model and is left out")
            else:
                unknown.append(name)
        if unknown:
            raise DataError(f"{where}: the model has no input {unknown[0]!r}{self._meant(unknown[0])}")
        missing = [name for name in self._inputs if name not in feed and not self._derivable(name, feed)]
        if missing:
            raise DataError(
                f"{where}: input {missing[0]!r} is missing (there is {', '.join(sorted(feed)) or 'nothing'}): add it to the data"
            )
        return feed

    def lacks_batch_axis(self, label: str, row: Feeds) -> bool:
        """Whether rows are to be stacked: they have one axis less than the model wants."""
        gaps = {len(self._inputs[name].shape) - array.ndim for name, array in row.items()}
        if gaps in ({0}, {1}):
            return gaps == {1}
        name = next(name for name, array in row.items() if len(self._inputs[name].shape) - array.ndim != 1)
        raise DataError(
            f"{self._source}, {label}, input {name!r}: {row[name].ndim} axes behind the samples' axis, the model wants "
            f"{_shown(self._inputs[name].shape)} with it: reshape the data"
        )

    def takes_single(self, row: Feeds) -> bool:
        """Whether the model takes rows as they are: it has no batch axis."""
        return any(len(self._inputs[name].shape) == array.ndim for name, array in row.items() if name in self._inputs)

    def finish(self, label: str, feed: Feeds) -> None:
        """Derive what is missing, in place; then ranks, sizes and their agreement."""
        for name, item in self._inputs.items():
            if name not in feed:
                feed[name] = self._derived(item, feed)
        symbols: dict[str, tuple[int, str]] = {}
        for name, item in self._inputs.items():
            shape = feed[name].shape
            where = f"{self._source}, {label}, input {name!r}"
            if len(shape) != len(item.shape):
                raise DataError(f"{where}: shape {_shown(shape)}, the model wants {_shown(item.shape)}: reshape the data")
            for size, wanted in zip(shape, item.shape, strict=True):
                if isinstance(wanted, int) and size != wanted:
                    raise DataError(f"{where}: shape {_shown(shape)}, the model wants {_shown(item.shape)}: cut or pad the data")
                if isinstance(wanted, str):
                    other, by = symbols.setdefault(wanted, (size, name))
                    if size != other:
                        raise DataError(f"{where}: {wanted} is {size} here but {other} in {by!r}: give inputs of one sample the same sizes")
            if not feed[name].size and not self._may_be_empty(name):
                raise DataError(f"{where}: shape {_shown(shape)} holds no values: leave the sample out")

    def _cast(self, where: str, array: npt.NDArray[Any], item: ModelInput) -> npt.NDArray[Any]:
        wanted = item.dtype
        if array.dtype.kind in "OUS" or wanted.kind == "O":
            if array.dtype.kind in "OUS" and wanted.kind == "O":
                return array.astype(object)
            raise DataError(f"{where}: type {array.dtype}, the model wants {wanted}: convert the data")
        cast = array
        if array.dtype != wanted:
            cast = _lossless(where, array, wanted)
            self._say(f"{self._source}: input {item.name!r} is cast from {array.dtype} to {wanted}")
        role = self._roles.get(item.name)
        if _is_float(wanted):
            self._finite(where, cast, mask=role.is_mask if role else "mask" in item.name.lower())
        elif role is not None and role.high is not None and cast.size:
            low, high = int(cast.min()), int(cast.max())
            if low < role.low or high >= role.high:
                bad = low if low < role.low else high
                raise DataError(
                    f"{where}: {bad} is outside {role.low}..{role.high - 1}, the rows of the table it looks up: "
                    "use the tokenizer that the model was trained with"
                )
        return cast

    def _finite(self, where: str, array: npt.NDArray[Any], *, mask: bool) -> None:
        values = array.astype(np.float32) if array.dtype.itemsize < 4 else array
        if np.isnan(values).any():
            raise DataError(f"{where}: holds NaN: repair or leave out the sample")
        # An additive mask says "never" with -Inf.
        if (np.isposinf(values) if mask else np.isinf(values)).any():
            raise DataError(f"{where}: holds Inf: repair or leave out the sample")

    def _derivable(self, name: str, feed: Feeds) -> bool:
        return (self._kind(name) in ("mask", "positions", "segments") or self._may_be_empty(name)) and self._ids(feed) is not None

    def _may_be_empty(self, name: str) -> bool:
        """Whether the input is keys or values of earlier tokens, ``[batch, heads, past, size]``, of which there may be none."""
        role, shape = self._roles.get(name), self._inputs[name].shape
        return role is not None and role.kind == "past" and len(shape) == 4 and not isinstance(shape[2], int)

    def _derived(self, item: ModelInput, feed: Feeds) -> npt.NDArray[Any]:
        kind = self._kind(item.name)
        ids = self._ids(feed)
        assert ids is not None
        shape = feed[ids].shape
        if self._may_be_empty(item.name):
            self._say(f"{self._source}: the model's past keys and values are not in the data: every sample starts without a past")
            sizes = [size if isinstance(size, int) else 0 for size in item.shape[1:]]
            return np.zeros([item.shape[0] if isinstance(item.shape[0], int) else shape[0], *sizes], item.dtype)
        made = {"mask": "ones", "positions": "0, 1, 2, ...", "segments": "zeros"}[kind]
        self._say(f"{self._source}: the model's input {item.name!r} is not in the data: taken as {made} like {ids!r}")
        past = next((feed[name].shape[2] for name in feed if self._may_be_empty(name)), 0)
        if kind == "positions":
            return np.broadcast_to(np.arange(past, past + shape[-1], dtype=item.dtype), shape).copy()
        if kind == "mask":  # of a decoder's it covers the past too
            return np.ones((*shape[:-1], past + shape[-1]), item.dtype)
        return np.zeros(shape, item.dtype)

    def _kind(self, name: str) -> str:
        """What an input is, by the graph; by its name alone where the graph is not known."""
        role = self._roles.get(name)
        rank = len(self._inputs[name].shape)
        if rank != 2 or self._inputs[name].dtype.kind not in "iubf":
            return "other"
        if role is not None:
            return role.kind
        names = {"attention_mask": "mask", "position_ids": "positions", "token_type_ids": "segments", "input_ids": "ids"}
        return names.get(name, "other")

    def _ids(self, feed: Feeds) -> str | None:
        """The input that masks and positions are like: the ids, where exactly one input is that."""
        found = [name for name in feed if self._kind(name) == "ids"]
        return found[0] if len(found) == 1 else None

    def _meant(self, name: str) -> str:
        close = difflib.get_close_matches(name, self._inputs, n=1)
        if close:
            return f": did you mean {close[0]!r}?"
        return f": its inputs are {', '.join(self._inputs)}"

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.info(text)


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")


def _lossless(where: str, array: npt.NDArray[Any], wanted: np.dtype[Any]) -> npt.NDArray[Any]:
    integers = array.dtype.kind in "iub"
    if integers and wanted.kind in "iu":
        info = np.iinfo(wanted)
        if array.size and (int(array.min()) < info.min or int(array.max()) > info.max):
            raise DataError(f"{where}: values of type {array.dtype} do not fit {wanted} that the model wants: check the data")
        return array.astype(wanted)
    if integers and (wanted.kind == "b" or _is_float(wanted)):
        if ((array == 0) | (array == 1)).all():
            return array.astype(wanted)
        raise DataError(f"{where}: type {array.dtype}, the model wants {wanted}: convert (and normalise) the data")
    if _is_float(array.dtype) and _is_float(wanted):
        with np.errstate(over="ignore"):
            cast = array.astype(wanted)
        if not (np.isinf(cast.astype(np.float64)) <= np.isinf(array.astype(np.float64))).all():
            raise DataError(f"{where}: values of type {array.dtype} overflow {wanted} that the model wants: scale the data")
        return cast
    raise DataError(f"{where}: type {array.dtype}, the model wants {wanted}: convert the data")


def _shown(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def file_digest(*paths: Path) -> str:
    """Digest of files' names and content."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
