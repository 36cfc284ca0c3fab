"""Random inputs that respect what the graph does with them, for ``--random-calibration``."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fqonnx import model as model_file
from fqonnx.calib.roles import InputRole, input_roles, sequence_limit
from fqonnx.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from fqonnx.calib.data.base import Feeds
    from fqonnx.model import ModelInput

DEFAULT_SEQUENCE = 128
DEFAULT_PAST = 16
_DEFAULT_IMAGE = 224
_FREE_IDS = 2
"""Integers of unknown use are below this: 0 and 1 are good for flags, counts and ids alike."""


class RandomSource:
    """Random feeds that fit the graph.

    Token ids, positions and segments stay within every table they look up; positions count up; masks keep every token; past keys and
    values, images and other floats are standard normal. Dynamic axes of one name get one size: batch 1, sequence 128 (or what
    tables of positions allow), past 16, images 224 x 224. Sample ``i`` depends on ``seed`` and ``i`` alone.

    Args:
        model: The model, its shapes inferred (see ``fqonnx.passes.prepare``): a table of unknown size bounds nothing.
        seed: Seed.
        samples: Number of feeds.

    Raises:
        DataError: An input is of a type that has no random values (strings), or no value at all is valid for it.
    """

    def __init__(self, model: ir.Model, *, seed: int = 0, samples: int = 1) -> None:
        self._inputs = model_file.inputs(model)
        self._roles = input_roles(model)
        self._seed = seed
        self.length: int | None = samples
        self._sizes = _Sizes(self._inputs, self._roles, sequence_limit(model))
        for item in self._inputs:
            role = self._roles[item.name]
            if item.dtype.kind not in "iubf" and not _narrow_float(item.dtype):
                raise DataError(f"input {item.name!r} of type {item.dtype} has no random values: give --calib-data")
            if role.high is not None and role.high <= role.low:
                raise DataError(f"input {item.name!r} looks up a table without a valid row: give --calib-data")

    @property
    def fingerprint(self) -> str:
        """A digest of the inputs, their roles and sizes, and the seed."""
        parts = [(item.name, str(item.dtype), self._sizes.shape(item), str(self._roles[item.name])) for item in self._inputs]
        return hashlib.blake2b(json.dumps([parts, self._seed, self.length]).encode(), digest_size=16).hexdigest()

    def __iter__(self) -> Iterator[Feeds]:
        assert self.length is not None
        for sample in range(self.length):
            random = np.random.default_rng([self._seed, sample])
            yield {item.name: self._values(item, self._roles[item.name], random) for item in self._inputs}

    def _values(self, item: ModelInput, role: InputRole, random: np.random.Generator) -> npt.NDArray[Any]:
        shape = self._sizes.shape(item)
        kind = role.kind
        if kind in ("mask", "flag"):
            return np.ones(shape, item.dtype)
        if kind == "additive_mask":
            return np.zeros(shape, item.dtype)
        if kind == "positions":
            last = shape[-1] if shape else 1
            first = self._sizes.past
            counted = np.clip(first + np.arange(last), role.low, None if role.high is None else role.high - 1)
            return np.broadcast_to(counted, shape).astype(item.dtype)
        if kind in ("kv_lengths", "kv_total"):
            total = self._sizes.past + self._sizes.sequence
            return np.full(shape, total - 1 if kind == "kv_lengths" else total, item.dtype)
        if item.dtype.kind in "iu":
            high = role.high if role.high is not None else role.low + _FREE_IDS
            return random.integers(role.low, high, shape).astype(item.dtype)
        return random.standard_normal(shape).astype(np.float32).astype(item.dtype)


class _Sizes:
    """One size for every dynamic axis, the same for the same name."""

    def __init__(self, inputs: tuple[ModelInput, ...], roles: dict[str, InputRole], limit: int | None) -> None:
        self._roles = roles
        has_past = any(role.kind == "past" for role in roles.values())
        positions = [role.high for role in roles.values() if role.kind == "positions" and role.high is not None]
        room = min([*positions, *([] if limit is None else [limit])], default=None)
        self.past = DEFAULT_PAST if has_past else 0
        if room is not None and self.past >= room:
            self.past = room // 2
        self.sequence = DEFAULT_SEQUENCE if room is None else max(1, min(DEFAULT_SEQUENCE, room - self.past))
        for item in inputs:
            kind = roles[item.name].kind
            axis = {"ids": 1, "positions": 1, "segments": 1}.get(kind)
            if axis is not None and len(item.shape) == 2 and isinstance(item.shape[1], int):
                self.sequence = item.shape[1]
            if kind == "past" and len(item.shape) == 4 and isinstance(item.shape[2], int):
                self.past = item.shape[2]
        ids = [item.shape[1] for item in inputs if roles[item.name].kind == "ids" and len(item.shape) == 2]
        self._sequence_names = {dim for dim in ids if isinstance(dim, str)}
        pasts = [item.shape[2] for item in inputs if roles[item.name].kind == "past" and len(item.shape) == 4]
        self._past_names = {dim for dim in pasts if isinstance(dim, str)}

    def shape(self, item: ModelInput) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else self._size(item, axis, dim) for axis, dim in enumerate(item.shape))

    def _size(self, item: ModelInput, axis: int, name: str | None) -> int:
        kind = self._roles[item.name].kind
        if name in self._sequence_names:
            return self.sequence
        if name in self._past_names:
            return self.past
        by_name = None if name is None else self._named(name.lower())
        if by_name is not None:
            return by_name
        if axis == 0:
            return 1
        if kind == "past":
            return self.past if axis == 2 else 1
        if kind in ("mask", "additive_mask"):
            # A mask covers the past too; in [batch, heads, queries, keys] only its last axis does.
            whole = axis == len(item.shape) - 1
            return 1 if len(item.shape) == 4 and axis == 1 else self.sequence + (self.past if whole else 0)
        if len(item.shape) == 4 and item.dtype.kind not in "iub":
            return 3 if axis == 1 else _DEFAULT_IMAGE
        return self.sequence

    def _named(self, name: str) -> int | None:
        """The size that a name tells: sums of names too, as exporters write ``past_sequence_length + sequence_length``."""
        if "+" in name:
            parts = [int(part) if part.isdigit() else self._named(part) for part in (part.strip() for part in name.split("+"))]
            return None if None in parts else sum(part for part in parts if part is not None)
        if "batch" in name:
            return 1
        for word, size in (("total", self.past + self.sequence), ("past", self.past), ("channel", 3), ("height", _DEFAULT_IMAGE)):
            if word in name:
                return size
        if "width" in name:
            return _DEFAULT_IMAGE
        return self.sequence if "seq" in name else None


def _narrow_float(dtype: np.dtype[Any]) -> bool:
    return dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
