"""Scales of a cache whose scales do not change: the largest magnitude of each channel of keys and values over the calibration data."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fqonnx.calib import stores
from fqonnx.calib.observe import model_fingerprint
from fqonnx.calib.stream import StreamedModel
from fqonnx.errors import CalibrationError
from fqonnx.passes.constants import is_constant, read
from fqonnx.passes.kv_cache_attention import LIMIT
from fqonnx.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir

    from fqonnx.calib.data.base import Source
    from fqonnx.passes.kv_cache_attention import AttentionCache
    from fqonnx.progress import Progress

Array = npt.NDArray[np.float32]

SMALLEST = 2.0**-126
"""A scale below the smallest normal fp32 counts as zero: a channel that calibration saw nothing in."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CacheScales:
    """Scales of a model's caches.

    Attributes:
        scales: By cache name fp32 ``[1, heads, 1, size]``, all positive.
        dead: By cache name, how many channels were zero in all of the data.
    """

    scales: dict[str, Array] = field(default_factory=dict)
    dead: dict[str, int] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """By cache name its smallest and largest scale, and how many channels were zero."""
        return {
            name: {"scale_min": float(scale.min()), "scale_max": float(scale.max()), "dead_channels": self.dead[name]}
            for name, scale in self.scales.items()
        }

    def save(self, path: Path, key: str = "") -> None:
        """Write it as a safetensors file."""
        stores.write(path, {f"{name}.scale": scale for name, scale in self.scales.items()}, {"key": key, "dead": self.dead})

    @classmethod
    def load(cls, path: Path) -> CacheScales:
        """Read what ``save`` wrote.

        Raises:
            CalibrationError: It is not there, or not such a file.
        """
        metadata = stores.read_metadata(path)
        if "dead" not in metadata:
            raise CalibrationError(f"{path} holds no scales of a cache: run the build again")
        arrays = stores.read(path)
        return cls({name: arrays[f"{name}.scale"] for name in metadata["dead"]}, metadata["dead"])


def fit_scales(
    model: ir.Model, caches: Sequence[AttentionCache], source: Source, *, workdir: Path, progress: Progress | None = None
) -> CacheScales:
    """``scale = max|x| / 127`` for each channel of each head, over all tokens that attention reads in the calibration data.

    The float model is run on the CPU; of what it gives only running maxima are kept. Keys count as they are stored, after the rotary
    embedding; tokens of a sample's past count as new ones do, and padding behind a sequence's tokens does not: the node is told where they
    end (``seqlens_k``), which exporters compute from the attention mask. A channel that is zero throughout gets the mean scale of the
    cache's others, or 1 where all are. A result that ``workdir`` already holds for the same model and data is read.

    Args:
        model: The float model.
        caches: From ``fqonnx.passes.kv_cache_attention.find`` on this very model.
        source: Feeds; all are read.
        workdir: Folder for the result and for values that wait on disk; made where missing.
        progress: Told of every sample.

    Raises:
        CalibrationError: Keys or values hold NaN or Inf, there are no tokens, or ONNX Runtime fails on a sample.
    """
    settings = [model_fingerprint(model), source.fingerprint, [cache.name for cache in caches], LIMIT]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    path = workdir / "kv_cache_scales.safetensors"
    if stores.read_metadata(path).get("key") == key:
        return CacheScales.load(path)
    largest = _observe(model, caches, source, workdir, progress or Silent())
    found = CacheScales()
    for cache in caches:
        scale = largest[cache.name].reshape(1, cache.heads, 1, cache.size) / np.float32(LIMIT)
        dead = scale < SMALLEST
        scale[dead] = scale[~dead].mean() if not dead.all() else 1.0
        found.scales[cache.name], found.dead[cache.name] = scale, int(dead.sum())
    if total := sum(found.dead.values()):
        logger.info("%d channels of keys and values are zero in all of the calibration data", total)
    workdir.mkdir(parents=True, exist_ok=True)
    found.save(path, key)
    return found


def _observe(model: ir.Model, caches: Sequence[AttentionCache], source: Source, workdir: Path, progress: Progress) -> dict[str, Array]:
    """The largest magnitude of each channel, ``[heads, size]`` by cache name."""
    largest: dict[str, Array] = {}
    constant = {cache.lengths.name: read(cache.lengths) for cache in caches if is_constant(cache.lengths)}
    # A model in segments gives a sample's lengths once, and keys and values of later layers after those of all samples before.
    lengths: dict[tuple[int, str | None], npt.NDArray[Any]] = {}
    taps = list(dict.fromkeys([name for c in caches for name in (c.lengths.name, c.present.name) if name and name not in constant]))

    def add(sample: int, values: Mapping[str, npt.NDArray[Any]]) -> None:
        for cache in caches:
            name = cache.lengths.name or ""
            if name in values:
                lengths[sample, name] = values[name]
            if cache.present.name in values:
                last = constant[name] if name in constant else lengths[sample, name]
                found = _largest(values[cache.present.name or ""], last.reshape(-1), cache)
                if found is not None:
                    before = largest.get(cache.name)
                    largest[cache.name] = found if before is None else np.maximum(before, found)

    streamed = StreamedModel(model, workdir)
    passes = len(streamed.plan(taps))
    with progress.task("Observing keys and values", None if source.length is None else source.length * passes) as task:
        streamed.run(source, taps=taps, on_values=add, on_sample=task.advance)
    for cache in caches:
        if cache.name not in largest:
            raise CalibrationError(f"calibration has no tokens for {cache.name!r}: give data with more than padding")
    return largest


def _largest(present: npt.NDArray[Any], last: npt.NDArray[Any], cache: AttentionCache) -> Array | None:
    """The largest magnitudes ``[heads, size]`` in rows ``0 .. last`` of each sequence ``[heads, rows, size]``; None without any."""
    found: list[Array] = []
    for sequence, end in zip(present, last, strict=True):
        rows = sequence[:, : int(end) + 1]
        if rows.shape[1]:
            found.append(np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float32))
    if not found:
        return None
    largest: Array = np.max(found, axis=0)
    # A NaN anywhere is a NaN in the extremes.
    if not np.isfinite(largest).all():
        kind = "NaN" if np.isnan(largest).any() else "Inf"
        raise CalibrationError(f"what goes into {cache.name!r} holds {kind}: check the model in float first")
    return largest
