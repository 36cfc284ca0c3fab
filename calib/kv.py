"""Transforms of keys and values for a 4-bit cache: computed from calibration data, trained, and kept where they win on data held out.

Of one head, ``x`` ``[size]`` is stored as ``x P`` and read back with an error ``e P⁻¹``. What that does to attention is known without
running it: an error in a key changes the scores of queries ``q`` by ``q · e``, so that its square counts as ``e S eᵀ`` with
``S = Σ qᵀ q``; an error in a value reaches the output through ``o_proj``, ``S = W Wᵀ`` of that head's rows. Candidates for ``P``:

- the identity;
- a randomised Hadamard matrix, one for all heads;
- learned, for each head of keys or values: ``P = (C⁻¹ # S) ^ ½ · Hadamard`` first, where ``#`` is the geometric mean of matrices and
  ``C = Σ xᵀ x``. Of all linear transforms it minimises ``|x P|² · tr(P⁻¹ S P⁻ᵀ)``, the error of a quantizer whose step goes with the
  vector's norm. Training by the straight-through estimator goes on from there (FlatQuant, arXiv 2410.09426, section 3.1, learns one ``P``
  for all heads by the block's error).

Keys are transformed less their mean, where nothing but a softmax follows the scores: what a mean adds to them is the same for all keys.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fqonnx.calib import stores
from fqonnx.calib.observe import model_fingerprint
from fqonnx.calib.stream import StreamedModel
from fqonnx.errors import CalibrationError
from fqonnx.passes.kv_cache import FORMATS, CacheTransform, output_importance
from fqonnx.passes.kv_cache_formats import E4M3_MAX
from fqonnx.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir
    import torch

    from fqonnx.calib.data.base import Source
    from fqonnx.passes.kv_cache import Cache, CacheLayer
    from fqonnx.passes.kv_cache_formats import Format
    from fqonnx.progress import Progress

Array = npt.NDArray[np.float32]

METHODS = ("learned", "hadamard", "none")
"""What ``fit`` may choose from: all candidates, the Hadamard matrix, or nothing."""

TRANSFORMED_BITS = 4
"""Formats of more bits need no transform: without one, int8 loses 300 times less than int4, and fp8's error goes with each value."""

SAMPLES = 32
"""Feeds that are run for statistics."""

TOKENS = 4096
"""Tokens kept of each cache at most."""

CACHE_BYTES = 16 << 20
"""Bytes that the kept tokens of one cache may take; fewer tokens of a model with many heads."""

HELD_OUT = 0.25
"""Share of the tokens that training does not see, from the last feeds, and that decides between the candidates."""

_RIDGE = 1e-4
"""Share of the mean variance that is added to every direction, so that dead ones have a finite scale."""

logger = logging.getLogger(__name__)


def method_for(transform: str) -> str:
    """The method that goes with a recipe's transform of linears: learned with learned, a rotation with a rotation."""
    return {"none": "none", "smooth": "none", "hadamard": "hadamard"}.get(transform, "learned")


@dataclass(frozen=True)
class Training:
    """Hyperparameters of a learned transform; 200 steps of 256 tokens are where held-out errors stop falling."""

    steps: int = 200
    batch: int = 256
    lr: float = 5e-3


@dataclass(frozen=True, eq=False)
class CacheSolution:
    """How the caches of a model are transformed before they are rounded.

    Attributes:
        transforms: By cache name, or None for none.
        metrics: By cache name ``transform`` (the candidate's name) and ``error``: the share of the squared norm, as attention sees it, that
            rounding costs on held-out tokens; with more than one candidate also ``error_<candidate>``. Empty where nothing was measured.
    """

    transforms: dict[str, CacheTransform | None]
    metrics: dict[str, dict[str, Any]]

    @property
    def summary(self) -> str:
        """Which transforms there are and how often, in words."""
        names = [self.metrics.get(name, {}).get("transform", "none") for name in self.transforms]
        return ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))

    def save(self, path: Path, key: str = "") -> None:
        """Write it as a safetensors file."""
        arrays = {f"{name}.matrix": found.matrix for name, found in self.transforms.items() if found is not None}
        arrays |= {f"{name}.mean": found.mean for name, found in self.transforms.items() if found is not None and found.mean is not None}
        stores.write(path, arrays, {"key": key, "metrics": self.metrics, "caches": list(self.transforms)})

    @classmethod
    def load(cls, path: Path) -> CacheSolution:
        """Read what ``save`` wrote.

        Raises:
            CalibrationError: It is not there, or not such a file.
        """
        metadata = stores.read_metadata(path)
        if "caches" not in metadata:
            raise CalibrationError(f"{path} holds no transforms of a cache: run the build again")
        arrays = stores.read(path)
        matrices = {name: arrays.get(f"{name}.matrix") for name in metadata["caches"]}
        transforms = {name: None if m is None else CacheTransform(m, arrays.get(f"{name}.mean")) for name, m in matrices.items()}
        return cls(transforms, metadata["metrics"])


def fit(
    model: ir.Model,
    layers: Sequence[CacheLayer],
    source: Source,
    form: Format,
    *,
    method: str = "learned",
    workdir: Path,
    seed: int = 0,
    steps: int | None = None,
    device: str = "cpu",
    mask: str | None = None,
    progress: Progress | None = None,
) -> CacheSolution:
    """Choose the transforms of a model's caches.

    Formats of more than ``TRANSFORMED_BITS`` bits get none, and with the methods ``hadamard`` and ``none`` nothing is run. A result that
    ``workdir`` already holds for the same model, data and settings is read.

    Args:
        model: The float model.
        layers: From ``fqonnx.passes.kv_cache.find`` on this very model.
        source: Feeds; the first ``SAMPLES`` are read.
        form: How the cache is going to be stored.
        method: One of ``METHODS``.
        workdir: Folder for the result and for values that wait on disk.
        seed: Seed of the Hadamard matrix, the sample of tokens and the order of training.
        steps: Training steps; None is ``Training.steps``.
        device: ``cpu`` or ``cuda``, for training.
        mask: An input ``[batch, tokens]`` that is zero where a token is padding.
        progress: Told of every sample and every cache.

    Raises:
        CalibrationError: Keys or values hold NaN or Inf, or there are no tokens.
    """
    caches = [cache for layer in layers for cache in (layer.key, layer.value)]
    if method == "none" or form.bits > TRANSFORMED_BITS:
        return CacheSolution(dict.fromkeys(cache.name for cache in caches), {})
    rotation = _rotation(caches[0].size, seed)
    if method == "hadamard":
        chosen: dict[str, CacheTransform | None] = {cache.name: CacheTransform(rotation) for cache in caches}
        return CacheSolution(chosen, {name: {"transform": "hadamard"} for name in chosen})
    training = Training() if steps is None else Training(steps=steps)
    settings = [
        model_fingerprint(model),
        source.fingerprint,
        [cache.name for cache in caches],
        form.name,
        seed,
        str(training),
        mask,
        device,
    ]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    path = workdir / "kv_cache.safetensors"
    if stores.read_metadata(path).get("key") == key:
        return CacheSolution.load(path)
    progress = progress or Silent()
    statistics = _observe(model, layers, source, workdir, seed, mask, progress)
    solution = CacheSolution({}, {})
    with progress.task("Solving the KV cache", len(caches)) as task, _one_thread():
        for number, cache in enumerate(caches):
            solved = _solve(statistics[cache.name], rotation, training, seed + number, device)
            solution.transforms[cache.name], solution.metrics[cache.name] = solved
            task.advance()
    solution.save(path, key)
    return solution


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small matrices do not gain by more, and the result does not depend on how many there are."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rotation(size: int, seed: int) -> Array:
    import torch

    from fqonnx.calib.transforms.hadamard import hadamard

    matrix: Array = hadamard(size, torch.Generator().manual_seed(seed)).numpy()[None]
    return matrix


# --- Statistics ---------------------------------------------------------------------------------------------------------------------------


class _Statistics:
    """Of one cache sampled tokens, in the order of the feeds, ``S`` ``[heads or 1, size, size]``, and whether a mean does not matter."""

    def __init__(self, cache: Cache, importance: Array | None, *, centred: bool) -> None:
        self.centred = centred
        self.name, self.heads, self.size = cache.name, cache.heads, cache.size
        self.importance: npt.NDArray[np.float64] | None = None if importance is None else importance.astype(np.float64)
        self.parts: dict[int, Array] = {}

    def tokens(self) -> Array:
        """``[T, heads, size]``."""
        parts = [self.parts[sample] for sample in sorted(self.parts)]
        return np.concatenate(parts) if parts else np.zeros((0, self.heads, self.size), np.float32)


def _observe(
    model: ir.Model, layers: Sequence[CacheLayer], source: Source, workdir: Path, seed: int, mask: str | None, progress: Progress
) -> dict[str, _Statistics]:
    feeds = [feed for _, feed in zip(range(SAMPLES), source, strict=False)]
    statistics: dict[str, _Statistics] = {}
    by_tap: dict[str, list[tuple[str, CacheLayer]]] = {}
    for layer in layers:
        importance = output_importance(layer)
        statistics[layer.key.name] = _Statistics(layer.key, None, centred=layer.shift_invariant)
        statistics[layer.value.name] = _Statistics(layer.value, importance, centred=False)
        for what, value in (("key", layer.key.new), ("value", layer.value.new), ("queries", layer.queries)):
            by_tap.setdefault(value.name or "", []).append((what, layer))

    def add(sample: int, values: Mapping[str, npt.NDArray[Any]]) -> None:
        for tap, uses in by_tap.items():
            if tap not in values:
                continue
            for what, layer in uses:
                cache = layer.value if what == "value" else layer.key
                found = statistics[cache.name]
                kept = _kept(feeds[sample], mask, values[tap])
                if what == "queries":
                    moment = _moment(values[tap], kept, cache, layer.query_heads)
                    found.importance = moment if found.importance is None else found.importance + moment
                else:
                    wanted = min(TOKENS, CACHE_BYTES // (4 * cache.heads * cache.size))
                    found.parts[sample] = _sampled(values[tap], kept, -(-wanted // len(feeds)), [seed, sample])

    streamed = StreamedModel(model, workdir)
    passes = len(streamed.plan(list(by_tap)))
    with progress.task("Observing keys and values", len(feeds) * passes) as task:
        streamed.run(feeds, taps=list(by_tap), on_values=add, on_sample=task.advance)
    return statistics


def _kept(feed: Mapping[str, npt.NDArray[Any]], mask: str | None, tensor: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which tokens ``[batch, tokens]`` of ``tensor`` ``[batch, heads, tokens, size]`` are none of the padding."""
    batch, tokens = tensor.shape[0], tensor.shape[-2]
    if mask is None:
        return np.ones((batch, tokens), bool)
    shown: npt.NDArray[np.bool_] = np.asarray(feed[mask])[:, -tokens:] != 0
    return np.broadcast_to(shown, (batch, tokens))


def _sampled(tensor: npt.NDArray[Any], kept: npt.NDArray[np.bool_], count: int, seed: list[int]) -> Array:
    rows: Array = tensor.transpose(0, 2, 1, 3)[kept].astype(np.float32)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    return rows[np.sort(chosen)]


def _moment(queries: npt.NDArray[Any], kept: npt.NDArray[np.bool_], cache: Cache, heads: int | None) -> npt.NDArray[np.float64]:
    """``Σ qᵀ q`` for each head of keys, or of all queries where the heads that share one are not known."""
    if heads is None:
        flat = queries.reshape(-1, cache.size).astype(np.float32)  # padding counts: its rows cannot be told apart here
        return (flat.T @ flat).astype(np.float64)[None]
    rows: Array = queries.transpose(0, 2, 1, 3)[kept].astype(np.float32)
    grouped = rows.reshape(len(rows), cache.heads, -1, cache.size).transpose(1, 0, 2, 3).reshape(cache.heads, -1, cache.size)
    moment: npt.NDArray[np.float64] = (grouped.mT @ grouped).astype(np.float64)
    return moment


# --- Solving ------------------------------------------------------------------------------------------------------------------------------


def _solve(
    statistics: _Statistics, rotation: Array, training: Training, seed: int, device: str
) -> tuple[CacheTransform | None, dict[str, Any]]:
    import torch

    tokens = torch.from_numpy(statistics.tokens()).to(device).transpose(0, 1).contiguous()  # [heads, T, size]
    if not tokens.shape[1]:
        raise CalibrationError(f"calibration has no tokens for {statistics.name!r}: give data with more than padding")
    if not bool(torch.isfinite(tokens).all()):
        raise CalibrationError(f"what goes into {statistics.name!r} holds NaN or Inf: check the model in float first")
    size = statistics.size
    importance = np.eye(size)[None] if statistics.importance is None else statistics.importance
    weight = torch.from_numpy(importance).to(device)
    weight = weight / weight.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-30)
    cut = max(1, round(tokens.shape[1] * (1 - HELD_OUT)))
    seen, unseen = tokens[:, :cut], tokens[:, cut:] if cut < tokens.shape[1] else tokens
    mean = seen.mean(1, keepdim=True) if statistics.centred else torch.zeros_like(seen[:, :1])
    identity, fixed = torch.eye(size, device=device)[None], torch.from_numpy(rotation).to(device)
    matrices = {"none": identity, "hadamard": fixed, "learned": _learned(seen - mean, weight, fixed, training, seed)}
    power = _power(unseen, weight.float()).clamp_min(1e-30)
    moved = {"none": unseen}
    errors = {name: float(_error(moved.get(name, unseen - mean), weight.float(), matrix) / power) for name, matrix in matrices.items()}
    best = min(errors, key=errors.__getitem__)
    metrics = {"transform": best, "error": errors[best], **{f"error_{name}": error for name, error in errors.items()}}
    if best == "none":
        return None, metrics
    return CacheTransform(matrices[best].cpu().numpy(), mean[:, 0].cpu().numpy() if statistics.centred else None), metrics


def _learned(tokens: torch.Tensor, weight: torch.Tensor, rotation: torch.Tensor, training: Training, seed: int) -> torch.Tensor:
    """``[heads, size, size]``, or ``[1, size, size]`` where the heads share one importance and so one transform."""
    import torch

    from fqonnx.calib import batched

    wide = tokens.double()
    moment = wide.mT @ wide / tokens.shape[1]
    if len(weight) == 1:
        moment = moment.mean(0, keepdim=True)
    start = torch.stack([_balanced(c, s) for c, s in zip(moment, weight, strict=True)]).float() @ rotation
    undo = batched.inverse(start.double()).float()
    # U diag(exp s) Vᵀ with orthogonal U and V (Cayley): invertible wherever training goes.
    skews = torch.zeros(2, *start.shape, device=tokens.device, requires_grad=True)
    scales = torch.zeros(len(start), 1, start.shape[-1], device=tokens.device, requires_grad=True)

    def matrices() -> tuple[torch.Tensor, torch.Tensor]:
        u, v = batched.cayley(skews.flatten(0, 1)).reshape(skews.shape)
        return start @ (u * scales.exp()) @ v.mT, v @ ((u * (-scales).exp()).mT @ undo)

    optimizer = torch.optim.AdamW([skews, scales], lr=training.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps, eta_min=training.lr * 1e-3)
    generator = torch.Generator().manual_seed(seed)
    metric = weight.float()
    power = _power(tokens, metric).clamp_min(1e-30)
    for _ in range(training.steps):
        rows = torch.randint(tokens.shape[1], (min(training.batch, tokens.shape[1]),), generator=generator)
        loss = _power(_rounding(tokens[:, rows.to(tokens.device)], *matrices()), metric) / power
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return matrices()[0]


def _balanced(moment: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The symmetric ``P`` with ``P Pᵀ = C⁻¹ # S``, fp64: ``C^-½ (C^½ S C^½)^½ C^-½``."""
    c, s = _ridged(moment), _ridged(weight)
    root, inverse = _matrix_power(c, 0.5), _matrix_power(c, -0.5)
    return _matrix_power(inverse @ _matrix_power(root @ s @ root, 0.5) @ inverse, 0.5)


def _matrix_power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """A power of a symmetric matrix without negative eigenvalues."""
    import torch

    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    powered: torch.Tensor = (vectors * values.clamp_min(0) ** exponent) @ vectors.mT
    return powered


def _ridged(matrix: torch.Tensor) -> torch.Tensor:
    import torch

    mean = matrix.diagonal().mean().clamp_min(1e-30)
    return matrix / mean + _RIDGE * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _power(x: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Mean of ``x S xᵀ`` over heads and tokens, of ``x`` ``[heads, T, size]``."""
    return ((x @ metric) * x).sum(-1).mean()


def stored(x: torch.Tensor, form: Format) -> torch.Tensor:
    """``x`` ``[.., size]`` as a cache of the format gives it back, scales in fp32; differentiable by the straight-through estimator.

    What ``quantize`` and ``dequantize`` of ``fqonnx.passes.kv_cache_formats`` come to, but for vectors that are not finite.
    """
    import torch

    def rounded(value: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        return value + (to - value).detach()

    groups = form.groups(x.shape[-1])
    y = x.reshape([*x.shape[:-1], groups, x.shape[-1] // groups])
    low, high = y.amin(-1, keepdim=True).clamp_max(0), y.amax(-1, keepdim=True).clamp_min(0)
    smallest = torch.finfo(y.dtype).tiny
    if not form.zero_point:
        scale = (torch.maximum(high, -low) / E4M3_MAX).clamp_min(smallest)
        ratio = (y / scale).clamp(-E4M3_MAX, E4M3_MAX)
        return (rounded(ratio, ratio.to(torch.float8_e4m3fn).to(ratio.dtype)) * scale).reshape(x.shape)
    scale = ((high - low) / form.steps).clamp_min(smallest)
    if form.bits == 4:
        zero = ((-low / scale).round() - 8).clamp(0, 255).detach()
        cells = (y / scale + zero) / 16
        codes = 16 * rounded(cells, cells.round()).clamp(0, 15)
    else:
        zero = (-low / scale).round().clamp(0, 255).detach()
        steps = y / scale
        codes = (rounded(steps, steps.round()) + zero).clamp(0, 255)
    values: torch.Tensor = ((codes - zero) * scale).reshape(x.shape)
    return values


def _rounding(x: torch.Tensor, forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
    """What storing ``x`` ``[heads, T, size]`` as int4 adds to it; differentiable by the straight-through estimator."""
    y = x @ forward
    return (stored(y, FORMATS["int4"]) - y) @ backward


def _error(tokens: torch.Tensor, metric: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """What storing tokens costs, squared, as attention sees it."""
    import torch

    from fqonnx.calib import batched

    with torch.no_grad():
        return _power(_rounding(tokens, matrix, batched.inverse(matrix.double()).float()), metric)
