"""Statistics of every group's input, streamed from the float model, on disk group by group so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fqonnx.calib.solution import GroupStats
from fqonnx.calib.stores import StatsStore
from fqonnx.calib.stream import DEFAULT_LIVE_BYTES, DEFAULT_SEGMENT_BYTES, StreamedModel
from fqonnx.errors import CalibrationError
from fqonnx.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from fqonnx.calib.data.base import Source
    from fqonnx.passes.groups import LinearGroup
    from fqonnx.progress import Progress

Array = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)

RESERVOIR_BYTES = 256 << 20
"""Bytes of one group's reservoir at most: 16,384 rows up to 4,096 channels, 4,681 rows of 14,336."""

RESERVOIR_TOKENS = 16384
"""Rows of one group's reservoir at most."""

DEFAULT_MEMORY_BUDGET = 2 << 30
"""Bytes of statistics in memory at a time."""

_BLOCK_ROWS = 2048
_PANEL = 512


def observe(
    model: ir.Model,
    groups: Sequence[LinearGroup],
    source: Source,
    *,
    workdir: Path,
    needs_tokens: bool = True,
    needs_hessian: bool = True,
    reservoir_tokens: int = RESERVOIR_TOKENS,
    seed: int = 0,
    mask: str | None = None,
    progress: Progress | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    live_bytes: int = DEFAULT_LIVE_BYTES,
    threads: int = 0,
) -> StatsStore:
    """Run the float model over the data and gather each group's statistics.

    Memory, all of it bounded: the model in segments (see ``StreamedModel``), one sample's tapped inputs, and statistics of at most
    ``memory_budget`` bytes: a group takes ``4 (K² + (reservoir_tokens + 2048) K)`` with a Hessian and ``4 reservoir_tokens K`` without.
    Groups beyond the budget wait for another pass over the same segment; one group that exceeds the budget by itself gets a pass alone.

    What a group's statistics are depends on the model, the data and ``seed``, not on how samples are batched (up to the rounding of
    the activations themselves) nor on which groups were done before: the reservoir draws by the row's number from a generator of its
    own per group. Groups that ``workdir`` already holds for the same model, data and settings are not computed again.

    Args:
        model: The float model.
        groups: Groups of the main graph of ``model``.
        source: Feeds; read once.
        workdir: Folder of the statistics (``stats/``) and of values that wait on disk.
        needs_tokens: Keep a reservoir of rows; else ``GroupStats.tokens`` is ``[0, K]``.
        needs_hessian: Keep ``mean(xᵀ x)``; else it is None.
        reservoir_tokens: Rows of the reservoir at most; a wide group keeps fewer, as many as ``RESERVOIR_BYTES`` hold.
        seed: Seed of the reservoir.
        mask: An input ``[batch, sequence]``; rows of inputs ``[batch, sequence, K]`` where it is zero are padding and do not count.
        progress: Where to tell how far it is.
        memory_budget: Bytes of statistics in memory at a time.
        segment_bytes: Weights in memory at a time, see ``StreamedModel``.
        live_bytes: Values in memory between segments, see ``StreamedModel``.
        threads: Threads of ONNX Runtime; 0 takes all.

    Returns:
        The store, which holds every group.

    Raises:
        CalibrationError: NaN or Inf in a group's input, no rows for a group, or ONNX Runtime fails on a sample.
        DataError: The source's own errors.
        ModelError: ONNX Runtime cannot load the model.
    """
    names = list(dict.fromkeys(group.input.name or "" for group in groups))  # graph order: the first bad group is the one named
    key = _digest(
        model_fingerprint(model), source.fingerprint, names, mask, needs_tokens, needs_hessian, reservoir_tokens, seed, _versions()
    )
    store = StatsStore(Path(workdir) / "stats", [group.name for group in groups], key)
    missing = [group for group in groups if not store.has(group.name)]
    if len(missing) < len(groups):
        logger.info("%d of %d groups were observed before", len(groups) - len(missing), len(groups))
    if not missing:
        return store
    by_input: dict[str, list[LinearGroup]] = {}
    for group in missing:
        by_input.setdefault(group.input.name or "", []).append(group)
    hessian_rows = _BLOCK_ROWS if needs_hessian else 0
    limit = reservoir_tokens if needs_tokens else 0
    tokens = {name: reservoir_rows(g[0].in_features, limit) for name, g in by_input.items()}
    costs = {name: len(g) * _cost(g[0].in_features, tokens[name], hessian=needs_hessian) for name, g in by_input.items()}

    few: list[tuple[str, int, int]] = []

    def split(taps: Sequence[str]) -> Iterator[Sequence[str]]:
        return _split(taps, costs, memory_budget)

    streamed = StreamedModel(model, Path(workdir), max_bytes=segment_bytes, max_live_bytes=live_bytes, threads=threads)
    segments = streamed.plan(names)
    passes = streamed.passes(segments, wanted=by_input, split=split)
    total = None if source.length is None else source.length * passes
    with (progress or Silent()).task("Observing activations", total) as task:
        inputs = () if mask is None else (mask,)
        for wave in streamed.waves(source, segments, wanted=by_input, inputs=inputs, split=split, on_sample=task.advance):
            running = {group.name: _Running(group, tokens[name], hessian_rows, seed) for name in wave.taps for group in by_input[name]}
            for sample, values in wave:
                rows_mask = None if mask is None else values[mask]
                for name in wave.taps:
                    rows = _rows(values[name], rows_mask)
                    for group in by_input[name]:
                        running[group.name].add(rows, sample)
            for name in list(running):
                gathered = running.pop(name).finish()
                store.save(name, gathered)
                if gathered.count < len(gathered.absmax):
                    few.append((name, gathered.count, len(gathered.absmax)))
    if few:
        name, seen, channels = max(few, key=lambda group: group[2] / max(group[1], 1))
        logger.warning(
            "%d of %d groups saw fewer rows than they have channels, the worst is %r (%d rows, %d channels): what is learned from so few "
            "does not hold on other data; give more samples, or --transform hadamard --weights rtn, which learn nothing",
            len(few),
            len(groups),
            name,
            seen,
            channels,
        )
    return store


def reservoir_rows(features: int, limit: int = RESERVOIR_TOKENS) -> int:
    """Rows of the reservoir of a group with so many channels: ``limit``, or as many as ``RESERVOIR_BYTES`` hold."""
    return min(limit, RESERVOIR_BYTES // (4 * features))


class _Running:
    """Statistics of one group while rows come in.

    The Hessian is a fp32 sum of fp32 products of 2,048 rows each. Fp64 would double the largest allocation for nothing: n sums err by
    about sqrt(n) 2⁻²⁴ of each entry's scale, 1e-6 at a million rows, against the 1e-2 that GPTQ's damping adds; and the activations'
    own rounding is of the same order. Rows are blocked by their number, so that the sum does not depend on the batches they came in.
    Only the panels on and right of the diagonal are computed.
    """

    def __init__(self, group: LinearGroup, tokens: int, block_rows: int, seed: int) -> None:
        import torch

        features = group.in_features
        self._name = group.name
        self._count = 0
        self._absmax = torch.zeros(features)
        self._tokens = np.empty((tokens, features), np.float32)
        name_seed = int.from_bytes(hashlib.blake2b(group.name.encode(), digest_size=8).digest(), "little")
        self._random = np.random.default_rng([seed, name_seed])
        self._hessian = torch.zeros(features, features) if block_rows else None
        self._block = torch.empty(block_rows, features)
        self._filled = 0

    def add(self, rows: torch.Tensor, sample: int) -> None:
        """Take the next rows, fp32 ``[rows, K]``.

        Raises:
            CalibrationError: NaN or Inf among them, or their width is not K.
        """
        import torch

        if rows.shape[1] != len(self._absmax):
            raise CalibrationError(
                f"group {self._name!r}: its input has {rows.shape[1]} channels, its weights {len(self._absmax)}: export it again"
            )
        if not len(rows):
            return
        largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=0)
        if not bool(torch.isfinite(largest).all()):
            kind = "NaN" if bool(torch.isnan(rows).any()) else "Inf"
            raise CalibrationError(
                f"group {self._name!r}: {kind} in its input at sample {sample}: check that sample and the model's own output"
            )
        torch.maximum(self._absmax, largest, out=self._absmax)
        if len(self._tokens):
            self._sample(rows.numpy())
        if self._hessian is not None:
            self._accumulate(rows)
        self._count += len(rows)

    def finish(self) -> GroupStats:
        """The statistics; this object is spent.

        Raises:
            CalibrationError: There were no rows.
        """
        if not self._count:
            raise CalibrationError(f"group {self._name!r} got no rows: the data never reach it, leave it in float with --keep")
        hessian = None
        if self._hessian is not None:
            self._product(self._block[: self._filled])
            _mirror(self._hessian)
            hessian = self._hessian.div_(self._count).numpy()
        tokens = self._tokens[: self._count]
        return GroupStats(tokens, hessian, self._absmax.numpy(), self._count)

    def _sample(self, rows: Array) -> None:
        """Algorithm R (Vitter 1985): row i replaces slot floor(u (i + 1)) where there is such a slot, one u per row behind the first."""
        size = len(self._tokens)
        fill = min(max(size - self._count, 0), len(rows))
        self._tokens[self._count : self._count + fill] = rows[:fill]
        numbers = np.arange(self._count + fill, self._count + len(rows))
        slots = (self._random.random(len(numbers)) * (numbers + 1)).astype(np.int64)
        hits = np.flatnonzero(slots < size)[::-1]
        # Of several rows for one slot the last stays.
        taken, first = np.unique(slots[hits], return_index=True)
        self._tokens[taken] = rows[fill + hits[first]]

    def _accumulate(self, rows: torch.Tensor) -> None:
        size = len(self._block)
        while len(rows):
            if not self._filled and len(rows) >= size:
                self._product(rows[:size])
                rows = rows[size:]
                continue
            part = rows[: size - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rows = rows[len(part) :]
            if self._filled == size:
                self._product(self._block)
                self._filled = 0

    def _product(self, rows: torch.Tensor) -> None:
        assert self._hessian is not None
        for start in range(0, len(self._hessian), _PANEL):
            self._hessian[start : start + _PANEL, start:].addmm_(rows[:, start : start + _PANEL].T, rows[:, start:])


def _mirror(matrix: torch.Tensor) -> None:
    """Copy what lies above the diagonal below it, in place."""
    for start in range(0, len(matrix), _PANEL):
        end = start + _PANEL
        diagonal = matrix[start:end, start:end]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
        matrix[end:, start:end] = matrix[start:end, end:].T


def _rows(values: npt.NDArray[Any], mask: npt.NDArray[Any] | None) -> torch.Tensor:
    """An activation ``[.., K]`` as fp32 rows, without those that the mask says are padding."""
    import torch

    array = np.asarray(values, dtype=np.float32)
    if mask is not None and array.ndim == 3 and array.shape[:2] == mask.shape and not mask.all():
        array = array[mask != 0]
    array = array.reshape(-1, array.shape[-1])
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _cost(features: int, tokens: int, *, hessian: bool) -> int:
    return 4 * features * (tokens + (features + _BLOCK_ROWS if hessian else 0))


def _split(taps: Sequence[str], costs: dict[str, int], budget: int) -> Iterator[Sequence[str]]:
    portion: list[str] = []
    size = 0
    for name in taps:
        if portion and size + costs[name] > budget:
            yield portion
            portion, size = [], 0
        portion.append(name)
        size += costs[name]
    if portion:
        yield portion


def model_fingerprint(model: ir.Model) -> str:
    """A digest of what a model computes, cheap for gigabytes.

    Nodes, inputs, outputs and in-memory weights are hashed by content; external weights by file, offset, size and time of modification,
    so that a file written anew counts as another one, whatever it holds.
    """
    digest = hashlib.blake2b(digest_size=16)

    def feed(*parts: object) -> None:
        digest.update(json.dumps(parts, default=str).encode() + b"\0")

    feed(model.ir_version, sorted(model.opset_imports.items()))
    stats: dict[str, tuple[int, int]] = {}
    functions = [function.graph for function in model.functions.values()]
    feed([str(identifier) for identifier in model.functions])
    for graph in (model.graph, *functions):
        for value in (*graph.inputs, *graph.outputs):
            feed(value.name, value.type, value.shape)
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                continue
            feed(name, tensor.dtype, tensor.shape)
            if isinstance(tensor, ir.ExternalTensor):
                path = os.path.realpath(tensor.path)
                if path not in stats:
                    stat = Path(path).stat()
                    stats[path] = (stat.st_size, stat.st_mtime_ns)
                feed(path, tensor.offset, tensor.length, *stats[path])
            elif tensor.dtype == ir.DataType.STRING:
                feed(ir.serde.serialize_tensor(tensor).SerializeToString().hex())
            else:
                digest.update(tensor.tobytes())
        for node in graph:
            proto = ir.serde.serialize_node(node)
            proto.ClearField("metadata_props")
            proto.ClearField("doc_string")
            digest.update(proto.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _digest(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import onnxruntime as ort

    return {"onnxruntime": ort.__version__, "torch": version("torch"), "numpy": np.__version__}
