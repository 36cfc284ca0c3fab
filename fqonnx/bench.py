"""How fast a model is, and how much faster than another, in one run, on buffers that stay on the device.

Both run in ONNX Runtime, or the model as its TensorRT engine. A run is one call of the session or the engine with every input and output
bound to memory of the device, so that no copy from or to the host is part of it, and it ends when the device is done. The models take turns
in blocks of runs, so that both see the same clocks; within a block runs follow one another, which leaves caches as warm as a server's are.
Inputs are random and fit what the graph does with them.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx.parser
import onnx_ir as ir

from fqonnx import model as model_file
from fqonnx.calib.random_data import RandomSource
from fqonnx.calib.roles import input_roles
from fqonnx.devices import Memory, device_name
from fqonnx.engines.onnxruntime import one_line_errors, run, session
from fqonnx.engines.tensorrt_library import FLAVOURS
from fqonnx.engines.tensorrt_run import BoundEngine, load_engine
from fqonnx.errors import EngineError, UsageError
from fqonnx.profile import Profile, read_calls, recorded_work, summarize
from fqonnx.progress import Silent
from fqonnx.sizes import constant_bytes
from fqonnx.verify.runners import Side, require_same_interface

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from fqonnx.progress import Progress

    Feeds = Mapping[str, npt.NDArray[Any]]
    Inputs = Mapping[str, Any]
    Shapes = Mapping[str, tuple[int, ...]]

BASELINE, CANDIDATE = "baseline", "candidate"

_ROUNDS = 10
"""Blocks that the runs of a model are split into; the models take turns between them."""
_SETTLING_RUNS = 2
"""Runs at the start of a block that are not timed: the caches still hold the other model."""
_CAPTURE_RUNS = 3
"""ONNX Runtime captures a CUDA graph in its second run of a shape and replays it from the third on."""
_PROFILED_RUNS = 10
_PRODUCT = '<ir_version: 10, opset_import: ["": 21]> product (float16[64, 64] x) => (float16[64, 64] y) { y = MatMul (x, x) }'
_ANNOTATION = "gpu_graph_id"
_NO_CAPTURE = "-1"


@dataclass(frozen=True)
class Latency:
    """Times of one model's runs for one set of shapes, in milliseconds.

    Attributes:
        median: Half of the runs took at most this.
        mean: Of all timed runs; its reciprocal is the throughput.
        p90: 90 % of the runs took at most this.
        p99: 99 %.
        minimum: The fastest run.
        runs: How many were timed.
    """

    median: float
    mean: float
    p90: float
    p99: float
    minimum: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Statistics of at least one run."""
        times = np.asarray(seconds) * 1e3
        median, p90, p99 = (float(np.percentile(times, share)) for share in (50, 90, 99))
        return cls(median, float(times.mean()), p90, p99, float(times.min()), len(times))

    @property
    def per_second(self) -> float:
        """Runs a second."""
        return 1e3 / self.mean


@dataclass(frozen=True)
class ShapeResult:
    """Both models on one set of shapes.

    Attributes:
        asked: What the set said.
        inputs: Shapes by input.
        latency: By model, ``baseline`` and ``candidate``.
        profile: Likewise, where asked for.
    """

    asked: dict[str, tuple[int, ...]]
    inputs: dict[str, tuple[int, ...]]
    latency: dict[str, Latency]
    profile: dict[str, Profile] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """The baseline's median over the candidate's; None without a baseline."""
        if BASELINE not in self.latency:
            return None
        return self.latency[BASELINE].median / self.latency[CANDIDATE].median

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        latency = {role: asdict(times) | {"per_second": times.per_second} for role, times in self.latency.items()}
        return {
            "asked": {name: list(shape) for name, shape in self.asked.items()},
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "latency_ms": latency,
            "speedup": self.speedup,
            "profile": {role: asdict(profile) for role, profile in self.profile.items()},
        }


@dataclass(frozen=True)
class ModelResult:
    """What a model takes, whatever the shapes.

    Attributes:
        name: The file or build directory.
        weights: Bytes of its constants.
        memory: Bytes that the device had less after the model was loaded and had run every shape: weights as the runtime holds them,
            workspaces and outputs, but no inputs. None where that cannot be measured.
        load_seconds: Until the session was ready.
    """

    name: str
    weights: int
    memory: int | None
    load_seconds: float


@dataclass(frozen=True)
class Bench:
    """What ``fqonnx bench`` shows.

    Attributes:
        models: ``candidate``, and ``baseline`` where there is one.
        shapes: Results, in the order asked for.
        device: Its name.
        cuda_graphs: Whether runs were replays of captured CUDA graphs.
        kv_cache: Tokens that the buffer shared by past and present keys and values holds; None where they have buffers of their own.
        notes: What a reader should know.
        versions: Of what ran.
    """

    models: dict[str, ModelResult]
    shapes: tuple[ShapeResult, ...]
    device: str
    cuda_graphs: bool
    kv_cache: int | None
    notes: tuple[str, ...]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "models": {role: asdict(model) for role, model in self.models.items()},
            "shapes": [shape.to_dict() for shape in self.shapes],
            "device": self.device,
            "cuda_graphs": self.cuda_graphs,
            "kv_cache": self.kv_cache,
            "notes": list(self.notes),
            "versions": self.versions,
        }


def bench(
    model: Path | str,
    baseline: Path | str | None = None,
    *,
    shapes: Sequence[Shapes] = (),
    device: str = "cpu",
    duration: float = 3.0,
    warm_up: float = 0.2,
    iterations: int = 10,
    cuda_graph: bool | None = None,
    kv_cache: int | None = None,
    engine: bool = False,
    profile: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Bench:
    """Measure a model, beside another one where given.

    Args:
        model: An ``.onnx`` file or a build directory.
        baseline: What to compare with, of the same inputs and outputs; None for nothing.
        shapes: Sets of sizes to measure, by the name of an input (its shape) or of a dynamic dimension (one number); what a set leaves
            open is small: batch 1, sequence 128. None at all is one empty set.
        device: ``cpu`` or ``cuda``.
        duration: Seconds of timed runs for each model and set of shapes.
        warm_up: Seconds of runs before.
        iterations: Timed runs at least.
        cuda_graph: Replay captured CUDA graphs; None where both models allow it.
        kv_cache: Give past and present keys and values one buffer of so many tokens, as decoders are deployed; None gives each its own.
        engine: Run the engine file of the build directory ``model`` in place of its model; the baseline stays in ONNX Runtime.
        profile: Measure where the time goes too, in separate runs.
        seed: Seed of the inputs.
        progress: Where to tell how far it is.

    Raises:
        UsageError: A shape does not fit, or an option does not go with the device or the model.
        ModelError: A model cannot be read, or the two differ in their inputs or outputs.
        ArtifactError: A build directory is not whole.
        EngineError: ONNX Runtime cannot load or run a model on the device, or the engine does not run here.
    """
    progress = progress or Silent()
    if cuda_graph and device != "cuda":
        raise UsageError("CUDA graphs need a CUDA device: give --device cuda, or leave --cuda-graph out")
    sides = {CANDIDATE: Side.open(model)}
    if engine:
        _require_engine(sides[CANDIDATE], device, kv_cache, profile)
    if baseline is not None:
        sides = {BASELINE: Side.open(baseline), **sides}
        require_same_interface(*sides.values())
    sets: list[Shapes] = list(shapes) or [{}]
    # The baseline knows best what its inputs are for: it has the operators that were exported.
    asked = [_feeds(next(iter(sides.values())).model, given, kv_cache, seed) for given in sets]
    feeds = {role: [_typed(side, fed, seed) for fed in asked] for role, side in sides.items()}
    memory = Memory(device)
    if device == "cuda" and not (engine and baseline is None):
        _load_libraries(device)
    notes: list[str] = []
    captured = cuda_graph if cuda_graph is not None else device == "cuda"
    try:
        runners = _load(sides, feeds, device, captured, kv_cache, engine, memory, progress)
    except EngineError as error:
        if not captured or cuda_graph:
            raise
        notes.append(f"without CUDA graphs, which are refused for these models: {error}")
        captured = False
        runners = _load(sides, feeds, device, captured, kv_cache, engine, memory, progress)
    results = _measure(runners, sets, asked, (warm_up, duration, iterations), progress)
    models = {role: runner.result for role, runner in runners.items()}
    runners.clear()
    if profile:
        with progress.task("Profiling", len(sides) * len(sets)) as task:
            for index, result in enumerate(results):
                for role, side in sides.items():
                    result.profile[role] = _profile(side, feeds[role][index], device, kv_cache)
                    task.advance()
        if any(p.measured == "host" for result in results for p in result.profile.values()) and device == "cuda":
            notes.append("PyTorch sees no GPU here: an op's time in the profile is that of its launches, not of its kernels")
    return Bench(models, tuple(results), device_name(device), captured, kv_cache, tuple(notes), _versions(device, sides, engine))


def _measure(
    runners: Mapping[str, Runner], sets: Sequence[Shapes], feeds: Sequence[Feeds], limits: tuple[float, float, int], progress: Progress
) -> list[ShapeResult]:
    """Every model on every set; ``limits`` are warm-up and duration in seconds, and runs at least."""
    results = []
    with progress.task("Measuring", len(sets) * _ROUNDS) as task:
        for index, (given, fed) in enumerate(zip(sets, feeds, strict=True)):
            times: dict[str, list[float]] = {role: [] for role in runners}
            block = {role: _block_size(runner, index, *limits) for role, runner in runners.items()}
            for turn in range(_ROUNDS):
                # There and back again, so that a drift of the clocks hits both alike.
                for role in runners if turn % 2 == 0 else reversed(list(runners)):
                    times[role] += runners[role].time(index, block[role])
                task.advance()
            latency = {role: Latency.of(seconds) for role, seconds in times.items()}
            results.append(ShapeResult(dict(given), {name: array.shape for name, array in fed.items()}, latency))
    return results


# --- Inputs ------------------------------------------------------------------------------------------------------------------------------


def _feeds(model: ir.Model, given: Shapes, kv_cache: int | None, seed: int) -> Feeds:
    """Random inputs of the sizes given that fit the graph."""
    fixed = resolve_shapes(model_file.inputs(model), given)
    heads = _heads(model, fixed)
    if kv_cache is not None and not heads:
        raise UsageError("--kv-cache: the model takes no past keys and values [batch, heads, tokens, size]: leave the option out")
    values = {value.name: value for value in model.graph.inputs}
    before = {name: values[name].shape for name in fixed}
    try:
        for name, shape in fixed.items():
            # Keys and values of large batches are billions of numbers: those of one head stand for all.
            values[name].shape = ir.Shape((shape[0], 1, *shape[2:]) if name in heads else shape)
        (fed,) = RandomSource(model, seed=seed, samples=1)
    finally:
        for name, shape_before in before.items():
            values[name].shape = shape_before
    longest = max((fed[name].shape[2] for name in heads), default=0)
    if kv_cache is not None and kv_cache <= longest:
        raise UsageError(f"--kv-cache {kv_cache} has no room for {longest} tokens and the next: give a larger one")
    return {name: _past(array, heads[name], kv_cache) if name in heads else array for name, array in fed.items()}


def _heads(model: ir.Model, shapes: Mapping[str, Sequence[int | str | None]]) -> dict[str, int]:
    """How many heads each input of past keys or values ``[batch, heads, tokens, size]`` has."""
    past = [name for name, role in input_roles(model).items() if role.kind == "past" and len(shapes[name]) == 4]
    return {name: heads for name in past if isinstance(heads := shapes[name][1], int)}


def _past(one_head: npt.NDArray[Any], heads: int, kv_cache: int | None) -> npt.NDArray[Any]:
    """Past keys or values of all heads, in a buffer of ``kv_cache`` tokens where given."""
    batch, _, tokens, size = one_head.shape
    shape = (batch, heads, tokens if kv_cache is None else kv_cache, size)
    return np.resize(one_head if one_head.size else _some_past(one_head.dtype, 0), shape)


def _some_past(dtype: np.dtype[Any], seed: int) -> npt.NDArray[Any]:
    """Random keys and values, or codes of them: enough to be repeated."""
    random = np.random.default_rng(seed)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return random.integers(limits.min, limits.max, 1 << 16, dtype, endpoint=True)
    return random.standard_normal(1 << 16, np.float32).astype(dtype)


def _typed(side: Side, fed: Feeds, seed: int) -> Feeds:
    """The same inputs in the types that a model has for them: keys and values that it keeps as codes are random ones.

    Raises:
        UsageError: Any other input is of another type.
    """
    expected = {item.name: np.dtype(item.dtype) for item in side.inputs}
    roles = input_roles(side.model)
    typed: dict[str, npt.NDArray[Any]] = dict(fed)
    for name, array in fed.items():
        if array.dtype == expected[name]:
            continue
        if roles[name].kind != "past":
            raise UsageError(
                f"{side.name} takes {name!r} as {expected[name]}, the other as {array.dtype}: compare a model with its own quantized form"
            )
        typed[name] = np.resize(_some_past(expected[name], seed), array.shape)
    return typed


def resolve_shapes(inputs: Sequence[model_file.ModelInput], given: Shapes) -> dict[str, tuple[int | str | None, ...]]:
    """The inputs' shapes with what is given put in.

    A dynamic dimension has one size wherever its name stands, and dimensions that are sums of others (``past + sequence``) follow them.

    Args:
        inputs: What the model asks for.
        given: By the name of an input its shape, by that of a dynamic dimension one number.

    Returns:
        By input name its shape; dimensions that nothing was said of are left as they are.

    Raises:
        UsageError: An unknown name, a shape that does not fit its input, or two sizes for one dimension.
    """
    by_name = {item.name: item for item in inputs}
    names = {part for item in inputs for dim in item.shape if isinstance(dim, str) for part in (dim, *_summands(dim))}
    sizes: dict[str, int] = {}

    def bind(name: str, size: int, where: str) -> None:
        if sizes.setdefault(name, size) != size:
            raise UsageError(f"{where}: dimension {name!r} is {size} here and {sizes[name]} elsewhere: give one size for it")

    shapes: dict[str, tuple[int | str | None, ...]] = {item.name: item.shape for item in inputs}
    for name, shape in given.items():
        said = f"--shapes {name}:{'x'.join(map(str, shape))}"
        if name in by_name:
            expected = by_name[name].shape
            if len(expected) != len(shape) or any(isinstance(dim, int) and dim != size for dim, size in zip(expected, shape, strict=True)):
                raise UsageError(f"{said} does not fit the input, which is {shape_in_words(expected)}")
            for dim, size in zip(expected, shape, strict=True):
                if isinstance(dim, str):
                    bind(dim, size, said)
            shapes[name] = tuple(size if dim is None else dim for dim, size in zip(expected, shape, strict=True))
        elif name in names and len(shape) == 1:
            bind(name, shape[0], said)
        else:
            known = ", ".join([*by_name, *sorted(names)])
            raise UsageError(f"{said} names neither an input nor a dynamic dimension: choose from {known}")

    def size_of(dim: int | str | None) -> int | str | None:
        if not isinstance(dim, str):
            return dim
        parts = [int(part) if part.isdigit() else sizes.get(part) for part in _summands(dim)]
        total = None if None in parts or len(parts) < 2 else sum(part for part in parts if part is not None)
        if dim in sizes and total is not None and sizes[dim] != total:
            raise UsageError(f"--shapes: dimension {dim!r} is {sizes[dim]}, but its parts sum to {total}: give sizes that agree")
        return sizes.get(dim, dim if total is None else total)

    return {name: tuple(size_of(dim) for dim in shape) for name, shape in shapes.items()}


def _summands(dim: str) -> list[str]:
    return [part.strip() for part in dim.split("+")]


def shape_in_words(shape: Sequence[int | str | None]) -> str:
    """``1x128``; ``?`` for what is open."""
    return "x".join("?" if dim is None else str(dim) for dim in shape) or "a scalar"


# --- Models ------------------------------------------------------------------------------------------------------------------------------


def _load(
    sides: Mapping[str, Side],
    feeds: Mapping[str, Sequence[Feeds]],
    device: str,
    captured: bool,
    kv_cache: int | None,
    engine: bool,
    memory: Memory,
    progress: Progress,
) -> dict[str, Runner]:
    """Every model, loaded and warm for every set of shapes."""
    runners: dict[str, Runner] = {}
    # One copy for all sessions, before any is loaded: inputs are no part of a model's memory. Arrays of one role may be those of another.
    copies: dict[int, Any] = {}
    inputs: dict[str, list[Inputs]] = {}
    for role in sides:
        if not (engine and role == CANDIDATE):
            for array in (array for fed in feeds[role] for array in fed.values()):
                if id(array) not in copies:
                    copies[id(array)] = _to_device(array, device)
            inputs[role] = [{name: copies[id(array)] for name, array in fed.items()} for fed in feeds[role]]
    with progress.task("Loading", len(sides)) as task:
        for role, side in sides.items():
            if engine and role == CANDIDATE:
                runners[role] = _EngineRunner(side, feeds[role], captured=captured, memory=memory)
            else:
                runners[role] = _Runner(side, inputs[role], device, captured=captured, kv_cache=kv_cache, memory=memory)
            task.advance()
    return runners


def _load_libraries(device: str) -> None:
    """Have the runtime load what it loads once a process, cuBLAS above all: it is no part of the first model's memory."""
    model = onnx.parser.parse_model(_PRODUCT)
    run(session(model.SerializeToString(), device=device), {"x": np.ones((64, 64), np.float16)})


class Runner(Protocol):
    """A model that is loaded and warm for every set of shapes."""

    result: ModelResult

    def time(self, index: int, runs: int) -> list[float]:
        """Seconds of each of so many runs of a set, after a few that are not timed."""
        ...


def _time(execute: Callable[[], None], runs: int) -> list[float]:
    clock = time.perf_counter
    for _ in range(_SETTLING_RUNS):
        execute()
    seconds = []
    for _ in range(runs):
        start = clock()
        execute()
        seconds.append(clock() - start)
    return seconds


class _Runner:
    """A session, and for each set of shapes its bound inputs and outputs.

    Args:
        side: The model.
        inputs: Of every set, on the device.
        device: Where to run.
        captured: Whether to capture CUDA graphs.
        kv_cache: As in ``bench``.
        memory: What measures the device's memory.
        profile_to: Prefix of the profile's file, to have one written.
    """

    def __init__(
        self,
        side: Side,
        inputs: Sequence[Inputs],
        device: str,
        *,
        captured: bool,
        kv_cache: int | None,
        memory: Memory,
        profile_to: Path | None = None,
    ) -> None:
        self._device, self._captured = device, captured
        assert side.path is not None, "opened from a file"
        before, started = memory.used(), time.perf_counter()
        # An arena that grows by what is asked for makes the memory a figure of the model, not of powers of two.
        provider_options = (
            {"arena_extend_strategy": "kSameAsRequested", "enable_cuda_graph": str(int(captured))} if device == "cuda" else {}
        )
        self.session = session(side.path, device=device, provider_options=provider_options, profile_to=profile_to)
        seconds = time.perf_counter() - started
        with one_line_errors(f"ONNX Runtime cannot run {side.name}", hint="check --shapes and --kv-cache"):
            self._runs = [self._bind(index, bound, kv_cache is not None) for index, bound in enumerate(inputs)]
            for binding, options in self._runs:
                for _ in range(_CAPTURE_RUNS):
                    self.session.run_with_iobinding(binding, options)
        used = memory.used()
        self.result = ModelResult(side.name, constant_bytes(side.model), None if used is None or before is None else used - before, seconds)

    def time(self, index: int, runs: int) -> list[float]:
        """Seconds of each of so many runs, after a few that are not timed."""
        return _time(partial(self.session.run_with_iobinding, *self._runs[index]), runs)

    def _bind(self, index: int, inputs: Inputs, in_place: bool) -> tuple[Any, Any]:
        """Bound inputs and outputs for one set of shapes, and how to run it."""
        import onnxruntime as ort

        shared = self._shared(inputs) if in_place else {}
        names = [output.name for output in self.session.get_outputs()]
        # A first run tells the outputs' sizes and leaves their buffers.
        binding, once = self._binding(inputs, {name: shared.get(name) for name in names}), ort.RunOptions()
        once.add_run_config_entry(_ANNOTATION, _NO_CAPTURE)
        self.session.run_with_iobinding(binding, once)
        outputs = dict(zip(names, binding.get_outputs(), strict=True))
        options = ort.RunOptions()
        options.add_run_config_entry(_ANNOTATION, str(index + 1) if self._captured else _NO_CAPTURE)
        return self._binding(inputs, outputs), options

    def _binding(self, inputs: Inputs, outputs: Inputs) -> Any:
        binding = self.session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            if value is None:
                binding.bind_output(name, self._device)
            else:
                binding.bind_ortvalue_output(name, value)
        return binding

    def _shared(self, inputs: Inputs) -> dict[str, Any]:
        """By the name of each output of present keys or values, the input's buffer that it shares: they come in the same order."""
        past = [item.name for item in self.session.get_inputs() if "past" in item.name.lower() and len(item.shape) == 4]
        present = [item.name for item in self.session.get_outputs() if "present" in item.name.lower() and len(item.shape) == 4]
        if not past or len(past) != len(present):
            raise UsageError(f"--kv-cache: {len(past)} past inputs and {len(present)} present outputs do not pair: leave the option out")
        return {target: inputs[source] for source, target in zip(past, present, strict=True)}


class _EngineRunner:
    """An engine, and for each set of shapes a context with its inputs and outputs bound.

    Args:
        side: The build directory.
        feeds: Of every set.
        captured: Whether to capture CUDA graphs.
        memory: What measures the device's memory.
        device: Where torch puts the inputs.
    """

    def __init__(self, side: Side, feeds: Sequence[Feeds], *, captured: bool, memory: Memory, device: str = "cuda") -> None:
        assert side.engine is not None, "asked before"
        path, built = side.engine
        tensors = [{name: _to_torch(array, device) for name, array in fed.items()} for fed in feeds]
        before, started = memory.used(), time.perf_counter()
        self._loaded = load_engine(path, built)
        seconds = time.perf_counter() - started
        self._runs = [BoundEngine(self._loaded.engine, built, bound, graph=captured) for bound in tensors]
        for bound in self._runs:
            bound.run()
        used = memory.used()
        name = f"{side.name} ({FLAVOURS[built.engine].title} {built.version})"
        self.result = ModelResult(name, constant_bytes(side.model), None if used is None or before is None else used - before, seconds)

    def time(self, index: int, runs: int) -> list[float]:
        """Seconds of each of so many runs, after a few that are not timed."""
        return _time(self._runs[index].run, runs)


def _require_engine(side: Side, device: str, kv_cache: int | None, profile: bool) -> None:
    if side.engine is None:
        raise UsageError(f"{side.name} has no engine file: leave out --engine, or build it with --engine tensorrt or tensorrt-rtx")
    if device != "cuda":
        raise UsageError("--engine runs on a CUDA device: give --device cuda")
    for given, option in ((kv_cache is not None, "--kv-cache"), (profile, "--profile")):
        if given:
            raise UsageError(f"{option} is for models in ONNX Runtime: leave it or --engine out")


def _to_torch(array: npt.NDArray[Any], device: str) -> Any:
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype.kind in "biuf":
        return torch.from_numpy(array).to(device)
    # bfloat16 and the like are no types of numpy's own.
    kind = getattr(torch, array.dtype.name)
    return torch.from_numpy(array.view(f"u{array.dtype.itemsize}")).view(kind).to(device)


def _to_device(array: npt.NDArray[Any], device: str) -> Any:
    import onnxruntime as ort

    if array.dtype.kind in "biuf":
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)
    # bfloat16 and the like are no types of numpy's own.
    kind = ir.DataType.from_numpy(array.dtype).value
    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, kind, device, 0)
    value.update_inplace(array.view(f"u{array.dtype.itemsize}"))
    return value


def _block_size(runner: Runner, index: int, warm_up: float, duration: float, iterations: int) -> int:
    """Runs a block, from what runs take during the warm-up."""
    started, seconds = time.perf_counter(), list[float]()
    while not seconds or time.perf_counter() - started < warm_up:
        seconds += runner.time(index, 1)
    return max(1, math.ceil(iterations / _ROUNDS), math.ceil(duration / _ROUNDS / float(np.median(seconds))))


# --- Profile -----------------------------------------------------------------------------------------------------------------------------


def _profile(side: Side, fed: Feeds, device: str, kv_cache: int | None) -> Profile:
    inputs = {name: _to_device(array, device) for name, array in fed.items()}
    with tempfile.TemporaryDirectory(prefix="fqonnx-bench-") as folder:
        to = Path(folder) / "profile"
        runner = _Runner(side, [inputs], device, captured=False, kv_cache=kv_cache, memory=Memory(device), profile_to=to)
        with recorded_work() if device == "cuda" else nullcontext() as work:
            runner.time(0, _PROFILED_RUNS)
        begin = runner.session.get_profiling_start_time_ns()
        written = Path(runner.session.end_profiling())
        calls = read_calls(json.loads(written.read_text(encoding="utf-8")), _PROFILED_RUNS, begin)
        return summarize(calls, _PROFILED_RUNS, work)


def _versions(device: str, sides: Mapping[str, Side], engine: bool) -> dict[str, str]:
    import onnxruntime as ort

    from fqonnx import __version__

    versions = {"fqonnx": __version__, "onnxruntime": ort.__version__, "python": platform.python_version()}
    if engine and (built := sides[CANDIDATE].engine) is not None:
        versions[built[1].engine] = built[1].version
    return versions | ({"cuda": ort.cuda_version} if device == "cuda" else {})
