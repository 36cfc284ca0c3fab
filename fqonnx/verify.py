"""Accuracy of a candidate model against its float reference: outputs, layers, and predictions of a language model.

Both models run side by side through Polygraphy's runners and its streaming comparator, one sample at a time: memory holds one sample's
outputs, however many samples there are. Models whose weights are too large for a session run segment by segment instead.
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, IterationResult
from polygraphy.datatype import DataType
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from fqonnx import model as model_file
from fqonnx.calib.stream import StreamedModel
from fqonnx.engines.onnxruntime import one_line_errors, session
from fqonnx.errors import DataError, ModelError
from fqonnx.metrics import Divergence, LogitsDivergence, MeanCosine, Perplexity, is_floating
from fqonnx.progress import Silent
from fqonnx.recipe import Recipe
from fqonnx.report.data import DataReport, GroupReport, LanguageReport, Report, SizeReport, TensorReport, load_report

if TYPE_CHECKING:
    from fqonnx.progress import Progress

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Model = str | Path | ir.Model

SESSION_BYTES = 1 << 30
"""Weights, as ONNX Runtime's CPU provider holds them, above which a model runs segment by segment instead of in one session."""

SEGMENT_BYTES = 256 << 20
"""Weights of one such segment: small, since the other model stays in memory beside it."""

TAP_BYTES = 256 << 20
"""Layer outputs of one model that a single pass over the data holds at once; more of them take more passes."""

_PART_NAMES = {
    ir.DataType.INT4: "4-bit weights",
    ir.DataType.UINT4: "4-bit weights",
    ir.DataType.INT8: "8-bit weights",
    ir.DataType.UINT8: "8-bit weights",
    ir.DataType.FLOAT16: "16-bit floats",
    ir.DataType.BFLOAT16: "16-bit floats",
    ir.DataType.FLOAT: "32-bit floats",
    ir.DataType.DOUBLE: "64-bit floats",
}
_SAME_ELEMENTS = {
    "Cast",
    "Identity",
    "Reshape",
    "Unsqueeze",
    "Squeeze",
    "Flatten",
    "Transpose",
    "Expand",
    "Slice",
    "Concat",
    "Where",
    "Clip",
}


def verify(
    reference: Model,
    candidate: Model,
    source: Iterable[Feeds],
    *,
    layers: bool | Mapping[str, Sequence[str]] = False,
    groups: Sequence[GroupReport] = (),
    max_error: float | None = None,
    tokens: bool | None = None,
    device: str = "cpu",
    data: DataReport | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run both models on the same data and report how far they are apart.

    Args:
        reference: The float model, or its path.
        candidate: A model, its path, or a build directory.
        source: Feed dicts, iterable more than once where ``layers`` is asked for.
        layers: Also compare the output of every linear. A mapping gives, by group name, the values to compare, which bear the same name
            in both models; True finds the groups in the reference.
        groups: What is known of the groups already; the figures of ``layers`` are added to it. A build directory brings its own.
        max_error: Bound on the relative L2 of the worst float output; of a model without one, on the share of elements that differ.
        tokens: Whether the integer inputs are text, so that predicting the next token means something; None finds out by the graph and
            by whether the logits of earlier tokens ignore the last one. Random data should say False.
        device: ``cpu`` or ``cuda``.
        data: What the report says of the data; where it counts no samples, each feed is one.
        progress: Told of every sample.

    Returns:
        The report. It has ``passed`` where every output is finite wherever the reference is, and within ``max_error``.

    Raises:
        ModelError: The models' inputs or outputs differ in name or shape, or no layer is common to both.
        DataError: No samples, or a sample without an input.
        EngineError: ONNX Runtime cannot load or run a model, or CUDA is not usable.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    a, b = _Side.open(reference), _Side.open(candidate)
    _require_same_interface(a, b)
    known = b.report
    notes: list[str] = [side.note for side in (a, b) if side.note]
    comparison = Comparison()
    language: _Language | None = None
    seconds = {"reference": 0.0, "candidate": 0.0}

    with _workdir() as workdir:
        runners = (a.runner("reference", a.outputs, device, workdir), b.runner("candidate", a.outputs, device, workdir))
        with progress.task("Comparing outputs", _length(source)) as task:
            for index, (feeds, results) in enumerate(_iterate(runners, source, a.inputs)):
                expected, actual = (_arrays(result) for result in results)
                for name, result in zip(("reference", "candidate"), results, strict=True):
                    seconds[name] += result.runtime or 0.0
                if index == 0:
                    language = None if tokens is False else _Language.find(a.model, runners[0], feeds, expected)
                    comparison.logits = {n for n in expected if "logit" in n.lower()} | ({language.logits} if language else set())
                comparison(expected, actual)
                if language is not None:
                    language.update(feeds, expected, actual)
                task.advance()
        if comparison.samples == 0:
            raise DataError("no data to verify on: the source has no samples")
        reports = list(groups) or list(known.groups if known else ())
        if layers is not False:
            tapped, values = (a, dict(layers)) if isinstance(layers, Mapping) else _find_layers(a, b)
            before = time.perf_counter()
            reports = _compare_layers((tapped, b), values, source, reports, device, workdir, progress, notes)
            seconds["layers"] = time.perf_counter() - before

    outputs = comparison.reports()
    notes += [f"output {name!r} holds text and is not compared" for name in sorted(comparison.skipped)]
    failures = tuple(_failures(outputs, max_error))
    seconds["total"] = time.perf_counter() - started
    data = data or DataReport(source="", samples=0)
    data = replace(data, samples=data.samples or comparison.samples)
    return Report(
        model=a.name,
        candidate=b.name,
        passed=not failures,
        failures=failures,
        max_error=max_error,
        outputs=outputs,
        language=language.report() if language is not None else None,
        groups=tuple(reports),
        left_in_float=known.left_in_float if known else (),
        size=measure_size(a.model, b.model),
        time=seconds,
        data=data,
        recipe=known.recipe if known else {},
        environment=environment(),
        notes=tuple(notes),
    )


class Comparison:
    """A Polygraphy ``compare_func`` that keeps running figures of every output.

    Each call takes one iteration's outputs of both runners (any mapping of arrays by name, such as an ``IterationResult``) and returns by
    output whether this iteration is finite wherever the reference is. The figures over all of them are in ``reports``.

    It is driven by ``verify`` instead of ``Comparator.compare_accuracy``, which computes medians and histograms of every array for a log
    that nobody reads.

    Attributes:
        logits: Names of outputs whose last axis is classes.
        samples: Calls so far.
        skipped: Outputs that hold no numbers.
    """

    def __init__(self, logits: Iterable[str] = ()) -> None:
        self.logits = set(logits)
        self.samples = 0
        self.skipped: set[str] = set()
        self._dtypes: dict[str, str] = {}
        self._divergence: dict[str, Divergence] = {}
        self._cosine: dict[str, MeanCosine] = {}
        self._of_logits: dict[str, LogitsDivergence] = {}

    def __call__(self, expected: Mapping[str, Array], actual: Mapping[str, Array]) -> OrderedDict[str, bool]:
        """Add one iteration.

        Raises:
            ModelError: An output's shapes differ between the two.
        """
        matches: OrderedDict[str, bool] = OrderedDict()
        for name, r in expected.items():
            c = actual[name]
            if not (isinstance(r, np.ndarray) and isinstance(c, np.ndarray)) or r.dtype.kind in "OSU":
                self.skipped.add(name)
                continue
            if r.shape != c.shape:
                raise ModelError(
                    f"sample {self.samples}: {name!r} has shape {list(r.shape)} in the reference and {list(c.shape)} in the candidate: "
                    "compare a model with its own quantized form"
                )
            self._dtypes.setdefault(name, r.dtype.name)
            matches[name] = not math.isnan(self._divergence.setdefault(name, Divergence()).update(r, c))
            if is_floating(r):
                self._cosine.setdefault(name, MeanCosine()).update(r, c)
                if name in self.logits and r.ndim:
                    self._of_logits.setdefault(name, LogitsDivergence()).update(r, c)
        self.samples += 1
        return matches

    def reports(self) -> dict[str, TensorReport]:
        """The figures over every iteration so far, by output."""
        return {name: self._report(name) for name in self._divergence}

    def _report(self, name: str) -> TensorReport:
        d, logits = self._divergence[name], self._of_logits.get(name)
        return TensorReport(
            dtype=self._dtypes[name],
            elements=d.elements,
            cosine=d.cosine,
            mean_cosine=self._cosine[name].value if name in self._cosine else d.cosine,
            rel_l2=d.rel_l2,
            sqnr_db=d.sqnr_db,
            max_abs=d.max_abs,
            exact=d.exact / d.elements if d.elements else math.nan,
            nan=d.nan,
            inf=d.inf,
            nan_reference=d.nan_reference,
            inf_reference=d.inf_reference,
            kl=logits.kl if logits is not None else None,
            top1=logits.top1 if logits is not None else None,
            worst_sample=d.worst_sample,
        )


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


@dataclass(frozen=True, eq=False)
class _Side:
    """One of the two models."""

    name: str
    path: Path | None
    model: ir.Model
    report: Report | None = None
    recipe: Recipe | None = None

    @classmethod
    def open(cls, model: Model) -> _Side:
        if isinstance(model, ir.Model):
            return cls(model.graph.name or "model", None, model)
        path = Path(model)
        if path.is_dir():
            from fqonnx.artifact import open_artifact

            artifact = open_artifact(path)
            report = load_report(artifact.report) if artifact.report.exists() else None
            return cls(path.name, artifact.model, model_file.load(artifact.model), report, artifact.recipe)
        return cls(path.name, path, model_file.load(path))

    @property
    def inputs(self) -> tuple[model_file.ModelInput, ...]:
        return model_file.inputs(self.model)

    @property
    def outputs(self) -> list[str]:
        return [value.name or "" for value in self.model.graph.outputs]

    @property
    def note(self) -> str | None:
        return f"{self.name} is bfloat16: it was run in float32 on the CPU" if self._bfloat16 else None

    @property
    def _bfloat16(self) -> bool:
        return any(t.dtype == ir.DataType.BFLOAT16 for t in _constants(self.model)) or any(
            value.dtype == ir.DataType.BFLOAT16 for value in (*self.model.graph.inputs, *self.model.graph.outputs)
        )

    def runner(self, name: str, outputs: Sequence[str], device: str, workdir: Path) -> BaseRunner:
        """A runner that gives ``outputs``, which may be any values of the main graph."""
        # ONNX Runtime has too few bfloat16 kernels on the CPU, and cannot hand bfloat16 to numpy.
        if self._bfloat16 or (device == "cpu" and _runtime_bytes(self.model) > SESSION_BYTES):
            return StreamedRunner(name, StreamedModel(self.model, workdir, max_bytes=SEGMENT_BYTES), self.inputs, outputs)
        if self.path is not None and list(outputs) == self.outputs:
            return OnnxrtRunner(session(self.path, device=device), name=name)
        proto, folder = _with_outputs(self.model, outputs)
        return OnnxrtRunner(session(proto, device=device, external_data=folder), name=name)


def _with_outputs(model: ir.Model, outputs: Sequence[str]) -> tuple[bytes, Path | None]:
    """The model serialized with other outputs (the object is left as it was), and the folder of its external data."""
    folders = {Path(t.base_dir) for t in _constants(model) if isinstance(t, ir.ExternalTensor)}
    if len(folders) > 1:
        raise ModelError(f"the model's external data lies in {len(folders)} folders: save it into one first (fqonnx.model.save)")
    values = {value.name: value for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))}
    kept = list(model.graph.outputs)
    try:
        model.graph.outputs[:] = [values[name] for name in outputs]
        return ir.to_proto(model).SerializeToString(), next(iter(folders), None)
    finally:
        model.graph.outputs[:] = kept


def _constants(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every initializer, once, however many values it is bound to."""
    seen = set()
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and id(value.const_value) not in seen:
                seen.add(id(value.const_value))
                yield value.const_value


def _runtime_bytes(model: ir.Model) -> int:
    """Bytes of the weights in ONNX Runtime's CPU provider, which widens fp16 matrices to fp32."""
    return sum(t.size * 4 if t.dtype == ir.DataType.FLOAT16 else t.nbytes for t in _constants(model) if t.dtype != ir.DataType.STRING)


def measure_size(reference: ir.Model, candidate: ir.Model) -> SizeReport:
    """Bytes of both models' constants, and what the candidate's are."""
    parts: dict[str, int] = {}
    for tensor in _constants(candidate):
        if tensor.dtype != ir.DataType.STRING:
            part = _PART_NAMES.get(tensor.dtype, "other")
            parts[part] = parts.get(part, 0) + tensor.nbytes
    total = sum(t.nbytes for t in _constants(reference) if t.dtype != ir.DataType.STRING)
    return SizeReport(float_bytes=total, quantized_bytes=sum(parts.values()), parts=dict(sorted(parts.items())))


def environment() -> dict[str, str]:
    """Versions and the machine, for the report."""
    found = {"python": platform.python_version()}
    for package in ("fqonnx", "onnx", "onnx-ir", "onnxruntime-gpu", "onnxruntime", "polygraphy", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"platform": platform.platform(), "cpus": str(len(os.sched_getaffinity(0)))}


def _require_same_interface(a: _Side, b: _Side) -> None:
    inputs = [i.name for i in a.inputs], [i.name for i in b.inputs]
    for what, (left, right) in (("input", inputs), ("output", (a.outputs, b.outputs))):
        for owner, other, names in ((a, b, sorted(set(left) - set(right))), (b, a, sorted(set(right) - set(left)))):
            if names:
                raise ModelError(f"{other.name} has no {what} {names[0]!r}, {owner.name} has: compare a model with its own quantized form")


@contextmanager
def _workdir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fqonnx-verify-") as folder:
        yield Path(folder)


def _length(source: object) -> int | None:
    try:
        return len(source)  # type: ignore[arg-type]  # asked, not assumed
    except TypeError:
        return None


def _iterate(
    runners: Sequence[BaseRunner], source: Iterable[Feeds], inputs: Sequence[model_file.ModelInput]
) -> Iterator[tuple[Feeds, list[IterationResult]]]:
    """Each sample with every runner's result."""
    current: deque[Feeds] = deque()

    def remembered() -> Iterator[Feeds]:
        for feeds in _prefetched(_checked(source, inputs), runners):
            current.append(feeds)
            yield feeds

    stream = Comparator.run(list(runners), data_loader=remembered(), streaming=True)
    try:
        while True:
            with _polygraphy("the data do not fit the model"):
                results = next(stream, None)
            if results is None:
                return
            yield current.popleft(), [iterations[0] for _, iterations in results]
    finally:
        with _polygraphy("the models cannot be closed"):
            stream.close()


@contextmanager
def _polygraphy(what: str) -> Iterator[None]:
    """Polygraphy without its log on standard output, which belongs to results, and with its exceptions as one line."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), one_line_errors("ONNX Runtime failed", hint="check the data's shapes and values"):
        try:
            yield
        except PolygraphyException as error:
            raise DataError(f"{what}: {' '.join(str(error).split())}") from None


def _arrays(result: IterationResult) -> dict[str, Array]:
    return dict(result.items())


def _checked(source: Iterable[Feeds], inputs: Sequence[model_file.ModelInput]) -> Iterator[Feeds]:
    names = {item.name for item in inputs}
    for index, feeds in enumerate(source):
        missing, unknown = sorted(names - set(feeds)), sorted(set(feeds) - names)
        if missing or unknown:
            what = f"lacks input {missing[0]!r}" if missing else f"has {unknown[0]!r}, which is no input"
            raise DataError(f"sample {index} {what}: the model's inputs are {', '.join(sorted(names))}")
        yield feeds


def _prefetched(feeds: Iterator[Feeds], runners: Sequence[BaseRunner]) -> Iterator[Feeds]:
    """Hand streamed runners several samples at a time: as many as keep their outputs within ``TAP_BYTES``, told by the first."""
    streamed = [runner for runner in runners if isinstance(runner, StreamedRunner)]
    if not streamed:
        yield from feeds
        return
    size = 1
    while chunk := [item for _, item in zip(range(size), feeds, strict=False)]:
        largest = max(runner.prefetch(chunk) for runner in streamed) // len(chunk)
        size = max(1, min(64, TAP_BYTES // max(1, largest)))
        yield from chunk


def _failures(outputs: Mapping[str, TensorReport], max_error: float | None) -> Iterator[str]:
    floats = {name: t for name, t in outputs.items() if t.is_float}
    for name, t in floats.items():
        if math.isnan(t.rel_l2) and t.elements:
            yield (f"output {name!r} is not finite: {t.nan} NaN and {t.inf} Inf, the reference has {t.nan_reference} and {t.inf_reference}")
        elif t.elements == 0:
            yield f"output {name!r} had no elements to compare"
        elif max_error is not None and t.rel_l2 > max_error:
            yield f"output {name!r} has a relative L2 error of {t.rel_l2:.4g}, above the bound of {max_error:g}"
    if not floats and max_error is not None:
        for name, t in outputs.items():
            if not 1 - t.exact <= max_error:
                yield f"output {name!r} differs in {1 - t.exact:.2%} of its elements, above the bound of {max_error:g}"


# --- layers ---------------------------------------------------------------------------------------------------------------------------


def _find_layers(a: _Side, b: _Side) -> tuple[_Side, dict[str, list[str]]]:
    """The reference as a build prepares it, and by group the outputs of the linears that the candidate's recipe quantizes."""
    from fqonnx.passes import linears
    from fqonnx.passes.prepare import prepare

    # Preparing changes the model in place, so it is read again; one that was given as an object is the caller's to prepare.
    model = prepare(model_file.load(a.path)) if a.path is not None else a.model
    recipe = b.recipe or Recipe(quantize_head=True)
    found = linears.find(model, keep=recipe.keep, quantize_head=recipe.quantize_head, group_size=recipe.group_size)
    if not found.groups:
        raise ModelError(f"{a.name} has no linears to compare: leave out --layers")
    groups = {group.name: [linear.output.name or "" for linear in group.linears] for group in found.groups}
    return _Side(a.name, None, model), groups


def _compare_layers(
    sides: tuple[_Side, _Side],
    values: Mapping[str, Sequence[str]],
    source: Iterable[Feeds],
    reports: Sequence[GroupReport],
    device: str,
    workdir: Path,
    progress: Progress,
    notes: list[str],
) -> list[GroupReport]:
    """The groups' reports with the figures of their worst linear; groups that were not known come last."""
    a, b = sides
    there = [_value_names(side.model) for side in sides]
    common = {group: [name for name in names if name in there[0] and name in there[1]] for group, names in values.items()}
    lost = [group for group, names in common.items() if len(names) < len(values[group])]
    if not any(common.values()):
        raise ModelError(f"{b.name} has none of the {len(values)} groups' outputs of {a.name}: compare a model with its own quantized form")
    if lost:
        notes.append(f"{len(lost)} of {len(values)} groups have outputs that the candidate lacks, the first is {lost[0]!r}")

    comparison = Comparison()
    names = [name for group in common.values() for name in group]
    passes = _portions(names, _widths(a.model), source)
    length = _length(source)
    with progress.task("Comparing layers", None if length is None else length * len(passes)) as task:
        for portion in passes:
            runners = (a.runner("reference", portion, device, workdir), b.runner("candidate", portion, device, workdir))
            for _, results in _iterate(runners, source, a.inputs):
                comparison(*(_arrays(result) for result in results))
                task.advance()
    measured = comparison.reports()
    worst = {group: _worst([measured[name] for name in found]) for group, found in common.items() if found}
    by_name = {report.name: report for report in reports} | {
        group: GroupReport(name=group) for group in values if group not in {report.name for report in reports}
    }
    return [replace(report, layer=worst.get(name, report.layer)) for name, report in by_name.items()]


def _worst(reports: Sequence[TensorReport]) -> TensorReport:
    return max(reports, key=lambda t: math.inf if math.isnan(t.rel_l2) else t.rel_l2)


def _value_names(model: ir.Model) -> set[str]:
    return {value.name for node in model.graph for value in node.outputs if value.name}


def _widths(model: ir.Model) -> Callable[[str], int]:
    """The last dimension of a value, 1 where nothing is known of it."""
    values = {value.name: value for node in model.graph for value in node.outputs}

    def width(name: str) -> int:
        shape = values[name].shape
        last = shape[-1] if shape is not None and len(shape) else 1
        return last if isinstance(last, int) else 1

    return width


def _portions(names: Sequence[str], width: Callable[[str], int], source: Iterable[Feeds]) -> list[list[str]]:
    """Cut the values into passes that hold about ``TAP_BYTES`` of one sample in fp32, by the rows of the first sample."""
    first = next(iter(source), None)
    if first is None:
        raise DataError("the data can be read only once: give a source that can be iterated again")
    rows = max((a.size if not is_floating(a) else a.size // max(1, a.shape[-1] if a.ndim else 1) for a in first.values()), default=1)
    portions: list[list[str]] = []
    room = 0
    for name in names:
        size = max(1, rows) * width(name) * 4
        if not portions or size > room:
            portions.append([])
            room = TAP_BYTES
        portions[-1].append(name)
        room -= size
    return portions


# --- language models ------------------------------------------------------------------------------------------------------------------


class _Language:
    """Perplexity and agreement of a model that predicts the next token."""

    def __init__(self, ids: str, logits: str) -> None:
        self.ids = ids
        self.logits = logits
        self._reference, self._candidate, self._agreement = Perplexity(), Perplexity(), LogitsDivergence()

    @classmethod
    def find(cls, model: ir.Model, runner: BaseRunner, feeds: Feeds, outputs: Mapping[str, Array]) -> _Language | None:
        """Recognise a language model by its graph and by what it does; None where it is none.

        (1) A 2-D integer input looks rows up in a constant table. (2) An output has a row of floats for each of its elements, as many as
        the table has rows, or is called logits. (3) Those of earlier elements do not depend on the last one: a masked language model,
        which has the same shapes, does not predict the next token.

        Args:
            model: The reference.
            runner: It, active.
            feeds: One sample.
            outputs: The runner's outputs of that sample.
        """
        for ids, tokens in feeds.items():
            if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
                continue
            rows = _table_rows(model, ids)
            for name, logits in outputs.items():
                if not isinstance(logits, np.ndarray) or not is_floating(logits) or logits.shape[:-1] != tokens.shape:
                    continue
                named = "logit" in name.lower() and logits.shape[-1] > int(tokens.max())
                if rows and (logits.shape[-1] in rows or named) and _is_causal(runner, feeds, ids, name, logits):
                    return cls(ids, name)
        return None

    def update(self, feeds: Feeds, expected: Mapping[str, Array], actual: Mapping[str, Array]) -> None:
        tokens = feeds[self.ids]
        mask = next((a for n, a in feeds.items() if "mask" in n.lower() and a.shape == tokens.shape), None)
        r, c = expected[self.logits], actual[self.logits]
        self._reference.update(r, tokens, mask)
        self._candidate.update(c, tokens, mask)
        if mask is None:
            self._agreement.update(r[:, :-1], c[:, :-1])
        else:
            keep = (mask[:, :-1] != 0) & (mask[:, 1:] != 0)
            self._agreement.update(r[:, :-1][keep], c[:, :-1][keep])

    def report(self) -> LanguageReport | None:
        if not self._reference.count:
            return None
        return LanguageReport(
            perplexity_reference=self._reference.value,
            perplexity=self._candidate.value,
            top1=self._agreement.top1,
            tokens=self._reference.count,
        )


def _is_causal(runner: BaseRunner, feeds: Feeds, ids: str, name: str, logits: Array) -> bool:
    """Whether another last token leaves the logits before it as they are."""
    changed = np.array(feeds[ids])
    changed[:, -1] = np.where(changed[:, -1] > 0, changed[:, -1] - 1, 1)
    probe = OrderedDict({**feeds, ids: changed})
    with _polygraphy("the data do not fit the model"):
        outputs = runner.alone(probe) if isinstance(runner, StreamedRunner) else runner.infer(probe)
    before, after = logits[:, :-1].astype(np.float64), outputs[name][:, :-1].astype(np.float64)
    # Equal up to rounding: the same shapes take the same kernels, but blocks of a matrix product may be summed in another order.
    return bool(np.allclose(before, after, rtol=1e-3, atol=1e-4 * float(np.abs(before).max(initial=0.0))))


def _table_rows(model: ir.Model, name: str) -> set[int]:
    """Rows of the constant tables that a Gather of the model looks up by this input."""
    start = next((value for value in model.graph.inputs if value.name == name), None)
    queue = [start] if start is not None else []
    seen, rows = set(queue), set[int]()
    while queue:
        for use in queue.pop().uses():
            table = use.node.inputs[0]
            if use.node.op_type == "Gather" and use.idx == 1 and table is not None and table.const_value is not None:
                rows.update(dim for dim in table.const_value.shape[:1] if isinstance(dim, int))
            elif use.node.op_type in _SAME_ELEMENTS:
                new = [value for value in use.node.outputs if value not in seen]
                seen.update(new)
                queue += new
    return rows
