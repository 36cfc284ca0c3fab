"""Running a built engine.

One that is not for this machine is refused in plain words. ``runner`` is for ``verify``, by Polygraphy; ``BoundEngine`` for measuring, with
inputs and outputs that stay on the GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fqonnx.engines.tensorrt_library import FLAVOURS, RTX, first_line, load_plugins, one_line_errors, this_gpu
from fqonnx.errors import ArtifactError, DataError, EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    from polygraphy.backend.base import BaseRunner

    from fqonnx.artifact import Artifact
    from fqonnx.engines.tensorrt_library import Gpu
    from fqonnx.report.data import EngineReport

_REBUILD = "build it again here, or on such a machine"
_DIAGNOSTICS = {
    "VERSION_MISMATCH": "another version built it",
    "UNSUPPORTED_CC": "it was not built for this GPU",
    "OLD_CUDA_DRIVER": "the CUDA driver is too old for it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it",
    "MALFORMED_ENGINE": "the file is damaged",
    "CUDA_ERROR": "CUDA fails here",
}
"""What the flags of ``EngineInvalidityDiagnostics`` mean to the user."""
_TORCH_TYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32", "INT64": "int64",
    "BOOL": "bool", "FP8": "float8_e4m3fn",
}  # fmt: skip
"""torch's type by TensorRT's."""


def engine_of(artifact: Artifact) -> tuple[Path, EngineReport]:
    """A build directory's plan, and what it was built as.

    Raises:
        ArtifactError: It has none.
    """
    from fqonnx.report.data import EngineReport

    if artifact.engine is None or "plan" not in artifact.manifest:
        raise ArtifactError(f"{artifact.path} has no engine file: build it with --engine tensorrt or tensorrt-rtx")
    return artifact.engine, EngineReport.from_dict(artifact.manifest["plan"])


def require_runs_here(built: EngineReport, version: str, gpu: Gpu) -> None:
    """Refuse an engine of another GPU or version.

    Args:
        built: What the engine was built as.
        version: Of the library that is to run it.
        gpu: That is to run it.

    Raises:
        EngineError: It does not run here; the message says why and what to do.
    """
    title = FLAVOURS[built.engine].title
    if version != built.version and not (built.version_compatible and _later(version, built.version)):
        later = " or a later one" if built.version_compatible else ""
        raise EngineError(
            f"{title} {built.version} built this engine, and {version} is installed: {_REBUILD}, or install {built.version}{later}"
        )
    if built.target and gpu.target not in built.target:
        raise EngineError(f"this engine is for {' and '.join(built.target)}, and here is {gpu.name} ({gpu.target}): {_REBUILD}")


def runs_here(built: EngineReport) -> bool:
    """Whether this machine has the library and a GPU for the engine."""
    try:
        require_runs_here(built, FLAVOURS[built.engine].load().__version__, this_gpu())
    except EngineError:
        return False
    return True


def _later(version: str, built: str) -> bool:
    """Whether TensorRT promises that ``version`` runs version-compatible plans of ``built``: the same major or, from 10, the next one."""
    new, old = ([int(part) for part in re.findall(r"\d+", text)[:3]] for text in (version, built))
    return new >= old and (new[0] == old[0] or (old[0], new[0]) in ((8, 10), (10, 11)))


@dataclass(frozen=True)
class Loaded:
    """An ``ICudaEngine`` with what must live as long."""

    engine: Any
    runtime: Any
    logger: Any


def load_engine(path: Path, built: EngineReport) -> Loaded:
    """Deserialize an engine.

    Args:
        path: The ``.plan`` file.
        built: What it was built as.

    Raises:
        EngineError: The library or the GPU is missing or not the engine's, or it refuses the file.
    """
    flavour = FLAVOURS[built.engine]
    trt = flavour.load()
    require_runs_here(built, trt.__version__, this_gpu())
    logger = _make_logger(trt)
    if flavour.plugins and not built.version_compatible:
        load_plugins(trt)
    runtime = trt.Runtime(logger)
    plan = path.read_bytes()
    if flavour is RTX:
        require_valid(trt, runtime, plan)
    if built.version_compatible:
        runtime.engine_host_code_allowed = True  # the plan holds the library of plugins
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"{flavour.title} cannot load {path}: {_reason(logger)}: {_REBUILD}")
    return Loaded(engine, runtime, logger)


def require_valid(trt: Any, runtime: Any, plan: bytes) -> None:
    """Ask the library itself whether it runs the plan, by the plan's head.

    Raises:
        EngineError: It does not; the message says why.
    """
    validity, flags = runtime.get_engine_validity(plan[: max(64, runtime.engine_header_size)])
    if validity != trt.EngineValidity.INVALID:
        return
    members = trt.EngineInvalidityDiagnostics.__members__
    reasons = [words for name, words in _DIAGNOSTICS.items() if name in members and int(members[name].value) & int(flags)]
    raise EngineError(f"TensorRT-RTX {trt.__version__} refuses this engine: {' and '.join(reasons) or 'it does not say why'}: {_REBUILD}")


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # untyped base
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(first_line(message))

    return Logger()


def _reason(logger: Any) -> str:
    return logger.errors[0] if logger.errors else "no reason given"


def profile_for(built: EngineReport, shapes: Mapping[str, Sequence[int]]) -> int:
    """The optimization profile for inputs of these shapes: of those that take them the one whose usual shapes are nearest.

    Raises:
        DataError: None takes them; the message says what they take.
    """
    best: tuple[int, int] | None = None
    for index, profile in enumerate(built.profiles):
        given = {name: (tuple(shapes[name]), bounds) for name, bounds in profile.items() if name in shapes}
        if all(
            len(shape) == len(low) and all(a <= dim <= b for a, dim, b in zip(low, shape, high, strict=True))
            for shape, (low, _, high) in given.values()
        ):
            distance = sum(abs(dim - usual) for shape, (_, optimum, _) in given.values() for dim, usual in zip(shape, optimum, strict=True))
            if best is None or distance < best[0]:
                best = distance, index
    if best is None and built.profiles:
        name = next((name for name in shapes if name in built.profiles[0]), next(iter(shapes), "?"))
        given_words = ", ".join(f"{key} {_in_words(shape)}" for key, shape in shapes.items())
        said = "; ".join(f"{_in_words(p[name][0])} to {_in_words(p[name][2])}" for p in built.profiles if name in p)
        raise DataError(
            f"the engine has no profile for {given_words}: {name} may be {said}; build it with other --min-shapes and --max-shapes"
        )
    return 0 if best is None else best[1]


def _in_words(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def runner(name: str, path: Path, built: EngineReport) -> BaseRunner:
    """A Polygraphy runner of an engine; every sample takes the profile that fits it.

    Raises:
        EngineError: The engine does not run here.
    """
    loaded = load_engine(path, built)
    from polygraphy.backend.trt import TrtRunner

    class EngineRunner(TrtRunner):  # type: ignore[misc]  # published without types
        def infer_impl(self, feed_dict: Mapping[str, npt.NDArray[np.generic]], **options: Any) -> Any:
            """Run one sample."""
            if len(built.profiles) > 1:
                self.set_profile(profile_for(built, {name: array.shape for name, array in feed_dict.items()}))
            elif built.profiles:
                profile_for(built, {name: array.shape for name, array in feed_dict.items()})
            with one_line_errors(f"{path.name} failed", loaded.logger, lambda _: "check the data's shapes and values"):
                return super().infer_impl(feed_dict, **options)

    return EngineRunner(loaded.engine, name=name)


class BoundEngine:
    """An engine's context with inputs and outputs bound to memory of the GPU: a run copies nothing from or to the host.

    Args:
        engine: An ``ICudaEngine``, and what it was built as.
        inputs: torch tensors on the device by input name.
        stream: The CUDA stream that runs go to (``torch.cuda.Stream``); None makes one.
        graph: Capture a CUDA graph at once, which runs replay.

    Raises:
        DataError: No profile takes the inputs' shapes.
        EngineError: The engine does not run, an output's shape is not known before a run, or the graph cannot be captured.
    """

    def __init__(self, engine: Any, built: EngineReport, inputs: Mapping[str, Any], *, stream: Any = None, graph: bool = False) -> None:
        import torch

        self._inputs = dict(inputs)
        device = next(iter(self._inputs.values())).device
        self._stream = stream if stream is not None else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._context = engine.create_execution_context()
        if self._context is None:
            raise EngineError("the engine has no room to run: free memory of the GPU, or give smaller --max-shapes when it is built")
        index = profile_for(built, {name: tuple(tensor.shape) for name, tensor in self._inputs.items()})
        if not self._context.set_optimization_profile_async(index, self._stream.cuda_stream):
            raise EngineError(f"the engine does not take its optimization profile {index}: {_REBUILD}")
        self._stream.synchronize()
        for name, tensor in self._inputs.items():
            if not tensor.is_contiguous() or not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(f"the engine does not take input {name!r} of shape {_in_words(tuple(tensor.shape))}")
            self._context.set_tensor_address(name, tensor.data_ptr())
        self.outputs = {}
        for name in _outputs(engine):
            shape = tuple(self._context.get_tensor_shape(name))
            if any(dim < 0 for dim in shape):
                raise EngineError(f"the shape of output {name!r} depends on the input's values: such an engine cannot be measured")
            dtype = getattr(torch, _TORCH_TYPES[engine.get_tensor_dtype(name).name])
            self.outputs[name] = torch.empty(shape, dtype=dtype, device=device)
            self._context.set_tensor_address(name, self.outputs[name].data_ptr())
        self._graph: Any = None
        if graph:
            self._capture(torch)

    def enqueue(self) -> None:
        """Start a run on the stream.

        Raises:
            EngineError: The engine refuses.
        """
        if self._graph is not None:
            self._graph.replay()
        elif not self._context.execute_async_v3(self._stream.cuda_stream):
            raise EngineError("the engine failed to run: check the inputs' values")

    def run(self) -> None:
        """A run, to its end."""
        self.enqueue()
        self._stream.synchronize()

    def _capture(self, torch: Any) -> None:
        self.run()  # what is done once, in the first run of a shape, is no part of the graph
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, stream=self._stream):
                self.enqueue()
        except RuntimeError as error:
            raise EngineError(f"no CUDA graph can be captured of this engine ({first_line(str(error))}): run it without") from None
        self._graph = captured


def _outputs(engine: Any) -> list[str]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name).name == "OUTPUT"]
