"""Running a model through ONNX Runtime piece by piece, so that neither its weights nor its activations need fit in memory at once."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from fqonnx.errors import CalibrationError, ModelError, UsageError

if TYPE_CHECKING:
    import onnxruntime as ort

Feeds = Mapping[str, npt.NDArray[Any]]
Values = dict[str, npt.NDArray[Any]]
Split = Callable[[Sequence[str]], Iterable[Sequence[str]]]

logger = logging.getLogger(__name__)

DEFAULT_SEGMENT_BYTES = 768 << 20
"""Weights of one segment as ONNX Runtime holds them. Its prepacked copies of them come on top, so a segment takes about twice this."""

DEFAULT_LIVE_BYTES = 512 << 20
"""Values that wait in memory for a later segment; what goes beyond it waits on disk."""

_INLINE_BYTES = 4096
_BFLOAT16 = onnx.TensorProto.BFLOAT16
_FLOAT = onnx.TensorProto.FLOAT
_MAPPABLE = frozenset(
    getattr(ir.DataType, name)
    for name in ("FLOAT", "FLOAT16", "DOUBLE", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "BOOL")
)
_ELEM_TYPES = {
    "float": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "double": onnx.TensorProto.DOUBLE,
    "int8": onnx.TensorProto.INT8,
    "int16": onnx.TensorProto.INT16,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
    "uint8": onnx.TensorProto.UINT8,
    "uint16": onnx.TensorProto.UINT16,
    "uint32": onnx.TensorProto.UINT32,
    "uint64": onnx.TensorProto.UINT64,
    "bool": onnx.TensorProto.BOOL,
    "string": onnx.TensorProto.STRING,
}


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive nodes that run in one session.

    Attributes:
        nodes: In graph order.
        inputs: Names of values that earlier segments or the caller provide.
        outputs: Names of values that later segments read, then taps made here that no later segment reads.
        taps: The taps that become available here; those of the first segment may be graph inputs.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    taps: tuple[str, ...]


class Wave:
    """One pass over all samples through one segment. Iterate it once and to its end, before the next wave is asked for.

    Attributes:
        taps: The names that each sample's values hold.
    """

    def __init__(self, taps: tuple[str, ...], samples: Iterator[tuple[int, Values]]) -> None:
        self.taps = taps
        self._samples = samples

    def __iter__(self) -> Iterator[tuple[int, Values]]:
        return self._samples


class StreamedModel:
    """A model that runs in consecutive segments whose weights fit a bound, each sample through one segment before the next is loaded.

    The graph is cut in topological order. Weights are mapped from the file they lie in, not copied; values between segments live only as
    long as a later segment reads them, in memory up to ``max_live_bytes`` and on disk under ``workdir`` beyond it. A small model is one
    segment and one session. Local functions and values captured by ``If``, ``Loop`` and ``Scan`` bodies are supported.

    Peak memory is about twice ``max_bytes`` (ONNX Runtime packs matrices anew), plus ``max_live_bytes``, plus one sample's activations.
    A single node whose weights exceed ``max_bytes`` is a segment of its own.

    ONNX Runtime's CPU provider widens fp16 matrices to fp32, so those count four bytes an element. It has no bf16 kernels for most
    operators: a bf16 model is run as fp32 (weights, casts and constants widened segment by segment; inputs and taps are fp32 then).

    Args:
        model: The model. It is read, never changed.
        workdir: Folder for values that wait on disk; made where missing, and left as it was found.
        max_bytes: Weights of one segment.
        max_live_bytes: Values in memory between segments.
        threads: Threads of one session; 0 takes every core this process may use.

    Raises:
        ModelError: Two values of the main graph share a name.
    """

    def __init__(
        self,
        model: ir.Model,
        workdir: Path,
        *,
        max_bytes: int = DEFAULT_SEGMENT_BYTES,
        max_live_bytes: int = DEFAULT_LIVE_BYTES,
        threads: int = 0,
    ) -> None:
        self._model = model
        self._workdir = Path(workdir)
        self._max_bytes = max_bytes
        self._max_live_bytes = max_live_bytes
        self._threads = threads or len(os.sched_getaffinity(0))
        self._values = _values_by_name(model.graph)
        self._widen = _has_bfloat16(model)
        if self._widen:
            logger.info("ONNX Runtime's CPU provider lacks bfloat16 kernels: the model is run in float32")

    def plan(self, taps: Sequence[str]) -> tuple[Segment, ...]:
        """The segments that compute ``taps`` (nodes that none of them needs are left out).

        Raises:
            UsageError: A tap is not a value of the main graph.
        """
        for name in taps:
            if name not in self._values or _is_constant(self._values[name]):
                raise UsageError(f"the model computes no value {name!r}: choose a graph input, an intermediate value or a graph output")
        nodes = needed_nodes(self._model.graph, [self._values[name] for name in taps])
        cuts = _cuts(nodes, self._max_bytes)
        return _segments(nodes, cuts, tuple(dict.fromkeys(taps)), self._values)

    def run(
        self,
        feeds: Iterable[Feeds],
        *,
        taps: Sequence[str] = (),
        on_values: Callable[[int, Values], None],
        on_sample: Callable[[], None] | None = None,
    ) -> int:
        """Run every sample and hand over tapped values, segment by segment.

        Args:
            feeds: Arrays by graph input; read once.
            taps: Names of values to hand over: graph inputs, intermediate values, graph outputs.
            on_values: Called with the sample's number and its values of one segment. A sample's values come in as many calls as there
                are segments with taps; what it does not keep is freed.
            on_sample: Called after each sample of each segment, for progress.

        Returns:
            The number of samples.

        Raises:
            CalibrationError: ONNX Runtime fails on a sample.
            ModelError: ONNX Runtime cannot load a segment.
            UsageError: A tap is not a value of the main graph.
        """
        count = 0
        for wave in self.waves(feeds, self.plan(taps), on_sample=on_sample):
            for sample, values in wave:
                count = max(count, sample + 1)
                if values:
                    on_values(sample, values)
        return count

    def waves(
        self,
        feeds: Iterable[Feeds],
        segments: Sequence[Segment],
        *,
        wanted: Iterable[str] | None = None,
        inputs: Sequence[str] = (),
        split: Split | None = None,
        on_sample: Callable[[], None] | None = None,
    ) -> Iterator[Wave]:
        """The same as ``run``, pulled by the caller and in smaller portions.

        Sessions depend on ``segments`` alone, whatever is wanted of them: a run that is resumed computes the same bits.

        Args:
            feeds: Arrays by graph input; read once.
            segments: From ``plan``.
            wanted: The taps to hand over; None takes all. Segments behind the last wanted tap are not run.
            inputs: Graph inputs to hand over beside the taps of every wave.
            split: Cuts one segment's wanted taps into waves; None hands them over in one.
            on_sample: Called after each sample of each wave, for progress.

        Yields:
            Waves in order; each must be iterated to its end before the next is taken.

        Raises:
            CalibrationError: ONNX Runtime fails on a sample.
            ModelError: ONNX Runtime cannot load a segment.
        """
        selected = None if wanted is None else set(wanted)
        portions = [_portions(segment.taps, selected, split) for segment in segments]
        while portions and not portions[-1]:
            portions.pop()
        types: dict[str, int] = {}
        with Live(self._workdir, self._max_live_bytes) as live:
            source: Iterable[Feeds] | None = feeds
            for index, waves in enumerate(portions):
                segment, last = segments[index], index == len(portions) - 1
                later = {name for following in segments[index + 1 : len(portions)] for name in following.inputs}
                later.update(() if last else inputs)
                session = self._session(segment, types)
                types.update(_output_types(session))
                for number, taps in enumerate(waves or [()]):
                    closing = number == max(len(waves), 1) - 1
                    keep = later if closing else {*segment.inputs, *segment.taps, *inputs, *later}
                    handed = dict.fromkeys([*taps, *inputs]) if taps else ()
                    passing = self._samples(session, segment, source, live, tuple(handed), keep, crossing=closing and not last)
                    source = None
                    wave = Wave(tuple(taps), _counted(passing, on_sample))
                    if taps:
                        yield wave
                    for _ in wave:  # a wave without taps only feeds later segments; one that was iterated has nothing left
                        pass
                live.retain(later)
                del session

    def passes(self, segments: Sequence[Segment], *, wanted: Iterable[str] | None = None, split: Split | None = None) -> int:
        """How often ``waves`` with the same arguments runs every sample."""
        selected = None if wanted is None else set(wanted)
        counts = [len(_portions(segment.taps, selected, split)) for segment in segments]
        while counts and not counts[-1]:
            counts.pop()
        return sum(max(count, 1) for count in counts)

    def _samples(
        self,
        session: ort.InferenceSession | None,
        segment: Segment,
        source: Iterable[Feeds] | None,
        live: Live,
        handed: Sequence[str],
        keep: set[str],
        *,
        crossing: bool,
    ) -> Iterator[tuple[int, Values]]:
        """Each sample through one session.

        ``keep`` names what later passes read: of the source's feeds, and, where ``crossing`` is set, of this segment's outputs.
        """
        kept = [name for name in segment.outputs if name in keep] if crossing else []
        fetched = list(dict.fromkeys([*kept, *(name for name in handed if name in segment.outputs)]))
        needed = {*segment.inputs, *(name for name in handed if name not in segment.outputs)}
        for sample, feed in enumerate(source) if source is not None else ((i, None) for i in range(live.samples)):
            if feed is None:
                available: Values = {name: live.get(name, sample) for name in needed}
            else:
                available = {name: self._widened(array) for name, array in feed.items()}
                live.put_all({name: array for name, array in available.items() if name in keep}, sample)
            made: Values = {}
            if session is not None and fetched:
                made = _run(session, fetched, {name: available[name] for name in segment.inputs}, sample)
            live.put_all({name: made[name] for name in kept}, sample)
            yield sample, {name: made[name] if name in made else available[name] for name in handed}

    def _widened(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array.astype(np.float32) if array.dtype.name == "bfloat16" else array

    def _session(self, segment: Segment, types: Mapping[str, int]) -> ort.InferenceSession | None:
        """A session of the segment; None where nothing is to be computed (only graph inputs are tapped)."""
        import onnxruntime as ort

        if not segment.outputs:
            return None
        proto, weights = self._proto(segment, types)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong comes as an exception; the log would print it a second time
        options.enable_mem_pattern = False  # a pattern is cached for every shape: ragged samples would pile them up
        # Between two runs the caller works with threads of its own: those of the session must not spin beside them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if weights:
            options.add_external_initializers(list(weights), [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()])
        try:
            session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  ONNX Runtime's exceptions share no base below Exception
            raise ModelError(f"ONNX Runtime cannot load the model: {describe(error)}") from None
        session.fqonnx_weights = weights  # the session reads these buffers: they must live as long
        return session

    def _proto(self, segment: Segment, types: Mapping[str, int]) -> tuple[onnx.ModelProto, dict[str, npt.NDArray[Any]]]:
        """The segment as a model of its own, and the weights it takes by name from outside of it."""
        model = self._model
        proto = onnx.ModelProto(ir_version=model.ir_version)
        for domain, version in model.opset_imports.items():
            proto.opset_import.add(domain=domain, version=version)
        graph = proto.graph
        graph.name = model.graph.name or "segment"
        for name in segment.inputs:
            graph.input.append(self._value_info(name, types))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in segment.outputs)
        for node in segment.nodes:
            node_proto = graph.node.add()
            ir.serde.serialize_node_into(node_proto, node)
            _strip(node_proto)
            if self._widen:
                _widen_node(node_proto)
        proto.functions.extend(ir.serde.serialize_function(function) for function in model.functions.values())
        if self._widen:
            for function in proto.functions:
                for node_proto in function.node:
                    _widen_node(node_proto)
        weights: dict[str, npt.NDArray[Any]] = {}
        for value in _initializers(segment.nodes):
            tensor = value.const_value
            assert tensor is not None
            graph.initializer.append(self._initializer(value.name or "", tensor, weights))
        return proto, weights

    def _initializer(self, name: str, tensor: ir.TensorProtocol, weights: dict[str, npt.NDArray[Any]]) -> onnx.TensorProto:
        if tensor.dtype == ir.DataType.STRING:
            proto = ir.serde.serialize_tensor(tensor)
            proto.name = name
            return proto
        widened = self._widen and tensor.dtype == ir.DataType.BFLOAT16
        data_type = _FLOAT if widened else tensor.dtype.value
        proto = onnx.TensorProto(name=name, data_type=data_type, dims=list(tensor.shape.numpy()))
        if tensor.nbytes > _INLINE_BYTES and (widened or tensor.dtype in _MAPPABLE):
            array = _array(tensor)
            weights[name] = np.ascontiguousarray(array.astype(np.float32) if widened else array)
            proto.data_location = onnx.TensorProto.EXTERNAL
            proto.external_data.add(key="location", value="given by name")
        else:
            proto.raw_data = _array(tensor).astype(np.float32).tobytes() if widened else tensor.tobytes()
        return proto

    def _value_info(self, name: str, types: Mapping[str, int]) -> onnx.ValueInfoProto:
        value = self._values[name]
        info = ir.serde.serialize_value(value)
        if name in types:
            info.type.tensor_type.elem_type = types[name]
        if not info.type.HasField("tensor_type") or not info.type.tensor_type.elem_type:
            raise ModelError(
                f"value {name!r} is {value.type or 'of unknown type'}: only tensors can be passed between parts of a large model"
            )
        if self._widen and info.type.tensor_type.elem_type == _BFLOAT16:
            info.type.tensor_type.elem_type = _FLOAT
        return info


def describe(error: BaseException) -> str:
    """An ONNX Runtime exception as one line that names the node, without codes and source paths."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text)
    text = re.sub(r"\S+\.(?:cc|h):\d+ ", "", text)
    found = re.search(r"running (\S+) node\. Name:'([^']*)' Status Message: (.*)$", text)
    if found:
        op, name, message = found.groups()
        text = f"{op} node {name!r}: {message}"
    return text[:400].rstrip(" .")


class Live:
    """Values that wait for a later pass, by name and sample: in memory up to a bound, the rest as ``.npy`` files."""

    def __init__(self, workdir: Path, max_bytes: int) -> None:
        self.samples = 0
        self._workdir = workdir
        self._max_bytes = max_bytes
        self._folder: Path | None = None
        self._memory: dict[str, Values] = {}
        self._bytes = 0
        self._items: dict[str, dict[int, npt.NDArray[Any] | Path]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._items.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def put_all(self, arrays: Mapping[str, npt.NDArray[Any]], sample: int) -> None:
        """Keep a sample's arrays; one that is there already stays as it is."""
        self.samples = max(self.samples, sample + 1)
        for name, array in arrays.items():
            slot = self._items.setdefault(name, {})
            if sample not in slot:
                slot[sample] = self._placed(array)

    def get(self, name: str, sample: int) -> npt.NDArray[Any]:
        """One sample's array."""
        item = self._items[name][sample]
        if isinstance(item, Path):
            array: npt.NDArray[Any] = np.load(item, allow_pickle=False)
            return array
        return item

    def retain(self, names: set[str]) -> None:
        """Forget every value that is not in ``names``."""
        for name in [name for name in self._items if name not in names]:
            for item in self._items.pop(name).values():
                if isinstance(item, Path):
                    item.unlink()
                else:
                    self._bytes -= item.nbytes

    def rename(self, names: Mapping[str, str], *, keep: set[str]) -> None:
        """Forget every value but those in ``keep`` and those that ``names`` gives new names, ``{new: old}``."""
        self.retain({*keep, *names.values()})
        moved = {new: self._items.pop(old) for new, old in names.items()}
        self._items.update(moved)

    def _placed(self, array: npt.NDArray[Any]) -> npt.NDArray[Any] | Path:
        if self._bytes + array.nbytes <= self._max_bytes or array.dtype.hasobject:
            self._bytes += array.nbytes
            return array
        if self._folder is None:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="live-", dir=self._workdir))
        handle, path = tempfile.mkstemp(suffix=".npy", dir=self._folder)
        with os.fdopen(handle, "wb") as file:
            np.save(file, array, allow_pickle=False)
        return Path(path)


def _counted(samples: Iterator[tuple[int, Values]], on_sample: Callable[[], None] | None) -> Iterator[tuple[int, Values]]:
    for item in samples:
        yield item
        if on_sample is not None:
            on_sample()


def _portions(taps: Sequence[str], selected: set[str] | None, split: Split | None) -> list[Sequence[str]]:
    names = [name for name in taps if selected is None or name in selected]
    if not names:
        return []
    return [tuple(portion) for portion in split(names)] if split is not None else [tuple(names)]


def _run(session: ort.InferenceSession, names: list[str], feed: Values, sample: int) -> Values:
    try:
        return dict(zip(names, session.run(names, feed), strict=True))
    except Exception as error:  # noqa: BLE001  ONNX Runtime's exceptions share no base below Exception
        advice = "check the data"
        if "out of data bounds" in str(error):
            advice = "the data hold an index outside the model's table, such as a token id of another tokenizer"
        elif "allocate memory" in str(error) or "bad_alloc" in str(error):
            advice = "take a smaller batch or shorter samples"
        raise CalibrationError(f"sample {sample}: ONNX Runtime failed in {describe(error)}: {advice}") from None


def _output_types(session: ort.InferenceSession | None) -> dict[str, int]:
    if session is None:
        return {}
    found = ((output.name, re.fullmatch(r"tensor\((\w+)\)", output.type)) for output in session.get_outputs())
    return {name: _ELEM_TYPES[match[1]] for name, match in found if match and match[1] in _ELEM_TYPES}


# --- planning ---------------------------------------------------------------------------------------------------------------------------


def _values_by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    values: dict[str, ir.Value] = {value.name or "": value for value in (*graph.inputs, *graph.initializers.values())}
    for node in graph:
        for value in node.outputs:
            if value.name:
                if value.name in values:
                    raise ModelError(f"two values are named {value.name!r}: the model is not valid, export it again")
                values[value.name] = value
    return values


def values_read(node: ir.Node) -> list[ir.Value]:
    """The values of the enclosing graph that a node reads, captures of its bodies included."""
    found = [value for value in node.inputs if value is not None]
    for attr in node.attributes.values():
        if attr.is_ref():
            continue
        if attr.type == ir.AttributeType.GRAPH:
            found += _captures(attr.as_graph())
        elif attr.type == ir.AttributeType.GRAPHS:
            for graph in attr.as_graphs():
                found += _captures(graph)
    return found


def _captures(graph: ir.Graph) -> list[ir.Value]:
    own = {*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)}
    used = [value for node in graph for value in values_read(node)] + list(graph.outputs)
    return [value for value in used if value not in own]


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None


def needed_nodes(graph: ir.Graph, taps: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes that some values are computed by, in graph order."""
    nodes = list(graph)
    wanted = set(taps)
    kept = []
    for node in reversed(nodes):
        if any(value in wanted for value in node.outputs):
            wanted.update(values_read(node))
            kept.append(node)
    return kept[::-1]


def _initializers(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    return list(dict.fromkeys(value for node in nodes for value in values_read(node) if _is_constant(value)))


def _runtime_bytes(tensor: ir.TensorProtocol) -> int:
    if tensor.dtype == ir.DataType.STRING:
        return 0
    return tensor.size * 4 if tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) else tensor.nbytes


def _cuts(nodes: Sequence[ir.Node], max_bytes: int) -> list[int]:
    """Where segments begin, 0 included: as few as the bound allows, each cut where the fewest values cross."""
    reads = [values_read(node) for node in nodes]
    crossing = _crossing(nodes, reads)
    cuts, start = [0], 0
    while True:
        size, weighty, seen = 0, start, set[ir.Value]()
        for index in range(start, len(nodes)):
            added = 0
            for value in reads[index]:
                if value not in seen and _is_constant(value):
                    seen.add(value)
                    assert value.const_value is not None
                    added += _runtime_bytes(value.const_value)
            if size + added > max_bytes and index > start and size:
                break
            size += added
            if added > _INLINE_BYTES:
                weighty = index
        else:
            return cuts
        # Between the last weight that fits and the first that does not, a cut costs no more segments: take the narrowest place.
        start = min(range(weighty + 1, index + 1), key=lambda cut: (crossing[cut], -cut))
        cuts.append(start)


def _crossing(nodes: Sequence[ir.Node], reads: Sequence[Sequence[ir.Value]]) -> list[int]:
    """For each position, how many values made before it are read at or behind it; what is no tensor counts as very many."""
    made = {value: index for index, node in enumerate(nodes) for value in node.outputs}
    last: dict[ir.Value, int] = {}
    for index, values in enumerate(reads):
        for value in values:
            if value in made:
                last[value] = index
    change = [0] * (len(nodes) + 2)
    for value, end in last.items():
        weight = 1 if value.type is None or isinstance(value.type, ir.TensorType) else 1_000_000
        change[made[value] + 1] += weight
        change[end + 1] -= weight
    total, found = 0, []
    for step in change:
        total += step
        found.append(total)
    return found


def _segments(nodes: Sequence[ir.Node], cuts: Sequence[int], taps: Sequence[str], values: Mapping[str, ir.Value]) -> tuple[Segment, ...]:
    chunks = [tuple(nodes[start:end]) for start, end in zip(cuts, [*cuts[1:], len(nodes)], strict=True)]
    made = [{value.name: None for node in chunk for value in node.outputs if value.name} for chunk in chunks]
    read = []
    for chunk, own in zip(chunks, made, strict=True):
        names = (value.name for node in chunk for value in values_read(node) if value.name and not _is_constant(value))
        read.append(tuple(dict.fromkeys(name for name in names if name not in own)))
    segments = []
    for index, chunk in enumerate(chunks):
        later = {name for names in read[index + 1 :] for name in names}
        here = tuple(name for name in taps if name in made[index] or (index == 0 and values[name].is_graph_input()))
        outputs = [name for name in made[index] if name in later]
        outputs += [name for name in here if name in made[index] and name not in later]
        segments.append(Segment(chunk, read[index], tuple(outputs), here))
    return tuple(segments)


# --- weights ----------------------------------------------------------------------------------------------------------------------------


def _array(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """A tensor's values; those of a file are mapped, and unmapped with the array (``ExternalTensor`` would keep its own map)."""
    if isinstance(tensor, ir.ExternalTensor) and tensor.size and tensor.dtype.bitwidth >= 8:
        shape = tensor.shape.numpy()
        return np.memmap(tensor.path, dtype=tensor.dtype.numpy(), mode="r", offset=tensor.offset or 0, shape=shape)
    return tensor.numpy()


def _strip(node: onnx.NodeProto) -> None:
    node.ClearField("metadata_props")
    node.ClearField("doc_string")


def _has_bfloat16(model: ir.Model) -> bool:
    graphs = [*model.graphs(), *(function.graph for function in model.functions.values())]
    for graph in graphs:
        if any(v.const_value is not None and v.const_value.dtype == ir.DataType.BFLOAT16 for v in graph.initializers.values()):
            return True
        if any(value.dtype == ir.DataType.BFLOAT16 for value in graph.inputs):
            return True
        for node in graph:
            if any(_mentions_bfloat16(attr) for attr in node.attributes.values()):
                return True
    return False


def _mentions_bfloat16(attr: ir.Attr) -> bool:
    if attr.is_ref():
        return False
    if attr.type == ir.AttributeType.TENSOR:
        return attr.as_tensor().dtype == ir.DataType.BFLOAT16
    return attr.type == ir.AttributeType.INT and attr.name in _DTYPE_ATTRS and attr.as_int() == _BFLOAT16


_DTYPE_ATTRS = frozenset({"to", "dtype", "output_dtype", "softmax_precision", "stash_type"})
"""Attributes of standard operators whose integer is a data type."""


def _widen_node(node: onnx.NodeProto) -> None:
    """Turn every mention of bf16 in a node and its bodies into fp32."""
    for attr in node.attribute:
        if attr.type == onnx.AttributeProto.INT and attr.name in _DTYPE_ATTRS and attr.i == _BFLOAT16:
            attr.i = _FLOAT
        elif attr.type == onnx.AttributeProto.TENSOR:
            _widen_tensor(attr.t)
        for graph in (*([attr.g] if attr.type == onnx.AttributeProto.GRAPH else []), *attr.graphs):
            for tensor in graph.initializer:
                _widen_tensor(tensor)
            for info in (*graph.input, *graph.output, *graph.value_info):
                if info.type.tensor_type.elem_type == _BFLOAT16:
                    info.type.tensor_type.elem_type = _FLOAT
            for inner in graph.node:
                _widen_node(inner)


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == _BFLOAT16:
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), name))
