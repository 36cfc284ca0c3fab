"""The two models of a comparison, and what runs them: one ONNX Runtime session, or segments of a model too large for one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy.typing as npt
import onnx_ir as ir
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

from fqonnx import cache_plan
from fqonnx import model as model_file
from fqonnx.calib.stream import StreamedModel
from fqonnx.engines.onnxruntime import session
from fqonnx.errors import ModelError, UsageError
from fqonnx.ops import CONTRIB, DOMAIN
from fqonnx.passes import kv_cache
from fqonnx.report.data import Report, load_report
from fqonnx.sizes import constants
from fqonnx.verify import limits

if TYPE_CHECKING:
    from fqonnx.recipe import Recipe
    from fqonnx.report.data import EngineReport

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Model = str | Path | ir.Model


class StreamedRunner(BaseRunner):  # type: ignore[misc]  # published without types
    """A Polygraphy runner over ``StreamedModel``: weights pass through memory segment by segment.

    Loading the segments costs the same for many samples as for one, so ``prefetch`` runs several; the following calls of ``infer``
    return their results in order.
    """

    def __init__(self, name: str, model: StreamedModel, inputs: Sequence[model_file.ModelInput], outputs: Sequence[str]) -> None:
        super().__init__(name=name)
        self._model = model
        self._inputs = inputs
        self._outputs = list(outputs)
        self._ready: deque[dict[str, Array]] = deque()
        self._seconds = 0.0

    def get_input_metadata_impl(self) -> Any:
        """Names, dtypes and shapes of the inputs."""
        metadata = TensorMetadata()
        for item in self._inputs:
            metadata.add(item.name, dtype=DataType.from_dtype(item.dtype), shape=list(item.shape))
        return metadata

    def prefetch(self, chunk: Sequence[Feeds]) -> int:
        """Run some samples through all segments; the bytes of their outputs."""
        started = time.perf_counter()
        results = self._run(chunk)
        self._seconds = (time.perf_counter() - started) / len(chunk)
        self._ready.extend(results)
        return sum(array.nbytes for result in results for array in result.values())

    def alone(self, feeds: Feeds) -> dict[str, Array]:
        """The outputs of a sample that is not one of the prefetched."""
        return self._run([feeds])[0]

    def _run(self, chunk: Sequence[Feeds]) -> list[dict[str, Array]]:
        results: list[dict[str, Array]] = [{} for _ in chunk]
        self._model.run(chunk, taps=self._outputs, on_values=lambda sample, values: results[sample].update(values))
        return [{name: result[name] for name in self._outputs} for result in results]

    def infer_impl(self, feed_dict: Feeds) -> dict[str, Array]:
        """The next prefetched result, or this sample alone where there is none."""
        if not self._ready:
            self.prefetch([feed_dict])
        self.inference_time = self._seconds
        return self._ready.popleft()

    def deactivate_impl(self) -> None:
        """Drop results that nobody asked for."""
        self._ready.clear()


class _SomeOutputs(OnnxrtRunner):  # type: ignore[misc]  # published without types
    """ONNX Runtime with some of a session's outputs."""

    def __init__(self, opened: Any, name: str, outputs: Sequence[str]) -> None:
        super().__init__(opened, name=name)
        self._outputs = list(outputs)

    def infer_impl(self, feed_dict: Feeds) -> dict[str, Array]:
        results = super().infer_impl(feed_dict)
        return {name: results[name] for name in self._outputs}


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two models."""

    name: str
    path: Path | None
    model: ir.Model
    report: Report | None = None
    recipe: Recipe | None = None
    engine: tuple[Path, EngineReport] | None = None

    @classmethod
    def open(cls, model: Model) -> Side:
        """Read a model; a build directory brings its report and recipe along.

        Raises:
            ModelError: The file cannot be read.
            ArtifactError: The folder is not a whole build.
        """
        if isinstance(model, ir.Model):
            return cls(model.graph.name or "model", None, model)
        path = Path(model)
        if path.is_dir():
            from fqonnx.artifact import open_artifact
            from fqonnx.engines.tensorrt_run import engine_of

            artifact = open_artifact(path)
            report = load_report(artifact.report) if artifact.report.exists() else None
            engine = engine_of(artifact) if artifact.engine is not None and "plan" in artifact.manifest else None
            return cls(path.name, artifact.model, model_file.load(artifact.model), report, artifact.recipe, engine)
        return cls(path.name, path, model_file.load(path))

    def with_float_cache(self) -> Side:
        """The same with the float model's interface around a quantized cache; itself where there is none.

        Raises:
            ModelError: The cache's transforms are not beside the model.
        """
        if self.path is None or kv_cache.METADATA not in self.model.metadata_props:
            return self
        return replace(self, path=None, model=cache_plan.comparable(self.path))

    @property
    def inputs(self) -> tuple[model_file.ModelInput, ...]:
        """What the model asks to be fed."""
        return model_file.inputs(self.model)

    @property
    def outputs(self) -> list[str]:
        """Names of the model's outputs."""
        return [value.name or "" for value in self.model.graph.outputs]

    @property
    def note(self) -> str | None:
        """What the report should say of how the model was run."""
        return f"{self.name} is bfloat16: it was run in float32 on the CPU" if self._bfloat16 else None

    @property
    def _bfloat16(self) -> bool:
        return any(t.dtype == ir.DataType.BFLOAT16 for t in constants(self.model)) or any(
            value.dtype == ir.DataType.BFLOAT16 for value in (*self.model.graph.inputs, *self.model.graph.outputs)
        )

    def engine_runner(self, name: str, outputs: Sequence[str], workdir: Path) -> BaseRunner:
        """A runner of the engine in the build directory, or, for other outputs than the model's, of one like it that gives these.

        An output at the border of a group changes nothing inside: what the engine fuses there stays fused.

        Raises:
            UsageError: There is no engine.
            EngineError: It does not run here.
        """
        if self.engine is None:
            raise UsageError(f"{self.name} has no engine file: leave out --engine, or build it with --engine tensorrt or tensorrt-rtx")
        from fqonnx.engines.tensorrt_run import runner

        path, built = self.engine
        if list(outputs) != self.outputs:
            path, built = self.marked_engine(outputs, workdir)
        return runner(name, path, built)

    def marked_engine(self, outputs: Sequence[str], workdir: Path) -> tuple[Path, EngineReport]:
        """Build the engine again with other outputs, values of the main graph."""
        from fqonnx.engines import Profile, engine

        assert self.engine is not None
        _, built = self.engine
        model_path, plan_path = workdir / "marked.onnx", workdir / "marked.plan"
        with _outputs_set(self.model, outputs):
            model_file.save(self.model, model_path)
        profiles = [{name: Profile(*shapes) for name, shapes in profile.items()} for profile in built.profiles]
        target = ",".join(built.target) or None
        return plan_path, cast("EngineReport", engine(built.engine).build(model_path, plan_path, profiles=profiles, target=target))

    def runner(self, name: str, outputs: Sequence[str], device: str, workdir: Path) -> BaseRunner:
        """A runner that gives ``outputs``, which may be any values of the main graph."""
        # ONNX Runtime has too few bfloat16 kernels on the CPU, and cannot hand bfloat16 to numpy.
        if self._bfloat16 or (device == "cpu" and _runtime_bytes(self.model) > limits.SESSION_BYTES):
            return StreamedRunner(name, StreamedModel(self.model, workdir, max_bytes=limits.SEGMENT_BYTES), self.inputs, outputs)
        if self.path is not None and list(outputs) == self.outputs:
            return OnnxrtRunner(session(self.path, device=device), name=name)
        # ONNX Runtime (1.31) plans keys and values that nothing reads into one buffer, of the size before; outputs have their own.
        caches = [value.name or "" for value in self.model.graph.outputs if _is_cache(value) and value.name not in outputs]
        proto, folder = _with_outputs(self.model, [*outputs, *caches])
        return _SomeOutputs(session(proto, device=device, external_data=folder), name, outputs)


def require_same_interface(a: Side, b: Side) -> None:
    """Refuse models whose inputs or outputs differ by name.

    Raises:
        ModelError: They do.
    """
    inputs = [i.name for i in a.inputs], [i.name for i in b.inputs]
    for what, (left, right) in (("input", inputs), ("output", (a.outputs, b.outputs))):
        for owner, other, names in ((a, b, sorted(set(left) - set(right))), (b, a, sorted(set(right) - set(left)))):
            if names:
                raise ModelError(f"{other.name} has no {what} {names[0]!r}, {owner.name} has: compare a model with its own quantized form")


def _with_outputs(model: ir.Model, outputs: Sequence[str]) -> tuple[bytes, Path | None]:
    """The model serialized with other outputs (the object is left as it was), and the folder of its external data."""
    folders = {Path(t.base_dir) for t in constants(model) if isinstance(t, ir.ExternalTensor)}
    if len(folders) > 1:
        raise ModelError(f"the model's external data lies in {len(folders)} folders: save it into one first (fqonnx.model.save)")
    with _outputs_set(model, outputs):
        return ir.to_proto(model).SerializeToString(), next(iter(folders), None)


@contextmanager
def _outputs_set(model: ir.Model, outputs: Sequence[str]) -> Iterator[None]:
    """The model with other outputs for the time being."""
    values = {value.name: value for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))}
    kept = list(model.graph.outputs)
    try:
        model.graph.outputs[:] = [values[name] for name in outputs]
        yield
    finally:
        model.graph.outputs[:] = kept


def _is_cache(value: ir.Value) -> bool:
    """Whether attention of ONNX Runtime's, or the op that it becomes, makes the value."""
    node = value.producer()
    return node is not None and node.domain in (CONTRIB, DOMAIN) and node.op_type == "GroupQueryAttention"


def _runtime_bytes(model: ir.Model) -> int:
    """Bytes of the weights in ONNX Runtime's CPU provider, which widens fp16 matrices to fp32."""
    return sum(t.size * 4 if t.dtype == ir.DataType.FLOAT16 else t.nbytes for t in constants(model) if t.dtype != ir.DataType.STRING)
