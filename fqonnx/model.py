"""Reading and writing ONNX files without holding their weights in memory, and what a model must be before it can be quantized."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # published without types

from fqonnx.errors import ArtifactError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

    import numpy as np

MIN_OPSET = 13
"""The oldest opset read: older ones have per-tensor ops (Softmax, Squeeze, quantization) of other meaning."""

EXTERNAL_ABOVE_BYTES = 1_500_000_000
"""Weights above this go to a file of their own; a protobuf message cannot exceed 2 GiB."""

_EXTERNAL_TENSOR_ABOVE_BYTES = 1024
"""In a model with external data, tensors up to this size stay in the model file, where shape inference reads them."""

_QUANTIZED_OPS = frozenset(
    {
        ("", "QuantizeLinear"), ("", "DynamicQuantizeLinear"), ("", "QLinearMatMul"), ("", "QLinearConv"), ("", "MatMulInteger"),
        ("", "ConvInteger"), ("com.microsoft", "QuantizeLinear"), ("com.microsoft", "MatMulNBits"), ("com.microsoft", "MatMulBnb4"),
        ("com.microsoft", "MatMulFpQ4"), ("com.microsoft", "QGemm"), ("com.microsoft", "QAttention"), ("com.microsoft", "QMoE"),
        ("com.microsoft", "DynamicQuantizeMatMul"), ("com.microsoft", "DynamicQuantizeLSTM"), ("com.microsoft", "MatMulIntegerToFloat"),
        ("com.microsoft", "MatMulInteger16"), ("com.microsoft", "QOrderedMatMul"),
    }
)  # fmt: skip
_FQONNX_DOMAIN = "fqonnx"
_RUNTIME_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc")
_RUNTIME_OPS_IN_DEFAULT_DOMAIN = frozenset({"SimplifiedLayerNormalization", "FusedGemm", "FusedConv", "FusedMatMul"})
"""What ONNX Runtime registers in (or its exporters write to) the standard domain without a schema in the ONNX standard."""


@dataclass(frozen=True)
class ModelInput:
    """What a model asks to be fed.

    Attributes:
        name: The input's name.
        dtype: Its numpy dtype (bfloat16 and the like are ``ml_dtypes``).
        shape: Per axis a size, a symbolic name or None where nothing is known of it.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


def load(path: str | Path) -> ir.Model:
    """Read a model; external weights stay on disk and are read when asked for.

    Args:
        path: An ``.onnx`` protobuf file; its external data lies where the file says, beside it.

    Returns:
        The model. It has been checked to be whole, not to be one that can be quantized: see ``require_float``.

    Raises:
        ModelError: No such file, a folder, not ONNX, cut short, or external data that is missing or too short.
    """
    path = Path(path)
    proto = _read_proto(path)
    try:
        model = ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path} is not a valid ONNX model ({_one_line(error)}): export it again") from None
    # An absolute folder keeps the weights readable after a change of the working directory.
    ir.external_data.set_base_dir(model.graph, path.absolute().parent)
    for function in model.functions.values():
        ir.external_data.set_base_dir(function.graph, path.absolute().parent)
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            _require_data(tensor, path)
    return model


def save(model: ir.Model, path: str | Path, *, external: bool | None = None) -> None:
    """Write a model, one tensor at a time: peak memory is near the largest tensor, however large the model.

    The model object is left as it is. Files appear whole or not at all.

    Args:
        model: The model; lazy tensors are evaluated one by one and dropped.
        path: The file to write; external data goes to ``<path's name>.data`` beside it.
        external: Whether weights go to the data file; None decides by ``EXTERNAL_ABOVE_BYTES``.

    Raises:
        ArtifactError: The file cannot be written: no such folder, no permission, disk full.
    """
    path = Path(path)
    if external is None:
        external = sum(t.nbytes for t in _tensors(model) if t.dtype != ir.DataType.STRING) > EXTERNAL_ABOVE_BYTES
    try:
        if external:
            _save_external(model, path)
        else:
            _save_single(model, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}: free space or choose another place") from None


def inputs(model: ir.Model) -> tuple[ModelInput, ...]:
    """The model's inputs in order, without the initializers that old exporters list among them.

    Raises:
        ModelError: An input is not a tensor of known type and rank.
    """
    found = []
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        if not isinstance(value.type, ir.TensorType) or value.shape is None:
            raise ModelError(f"input {value.name!r} is {value.type or 'of unknown type'}, not a tensor of known rank: export it with one")
        shape = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
        found.append(ModelInput(value.name or "", value.type.dtype.numpy(), shape))
    return tuple(found)


def opset_of(model: ir.Model) -> int:
    """The version of the standard operators that the model imports.

    Raises:
        ModelError: The model imports none.
    """
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if version is None:
        raise ModelError("the model imports no standard ONNX operators: export it again with opset 13 or newer")
    return version


def require_float(model: ir.Model) -> None:
    """Refuse what cannot be quantized at all, before any time is spent on it.

    A weight behind ``DequantizeLinear`` is fine: it is a float model stored small, read back and quantized anew. Anything that rounds
    activations or multiplies integers is not: what it lost cannot be calibrated away.

    Raises:
        ModelError: An opset outside ``MIN_OPSET`` and what the installed onnx knows; an already quantized model; an operator that
            ONNX Runtime cannot run.
    """
    opset = opset_of(model)
    newest = onnx.defs.onnx_opset_version()
    if opset < MIN_OPSET:
        raise ModelError(f"opset {opset} is too old: export the model with opset {MIN_OPSET} or newer")
    if opset > newest:
        raise ModelError(f"opset {opset} is newer than onnx {onnx.__version__} knows: upgrade onnx, or export with opset {newest}")
    for node in _nodes(model):
        identity = (_standard(node.domain), node.op_type)
        where = f" in node {node.name!r}" if node.name else ""
        if node.domain == _FQONNX_DOMAIN or identity in _QUANTIZED_OPS:
            raise ModelError(f"the model is already quantized ({node.op_type}{where}): start from the float export it was made from")
        if node.op_identifier() in model.functions:
            continue
        if node.domain not in _RUNTIME_DOMAINS:
            raise ModelError(
                f"unknown operator {node.op_type} of domain {node.domain!r}{where}: ONNX Runtime cannot run it for calibration; "
                "export it as standard operators or as a model-local function"
            )
        if identity[0] == "" and node.op_type not in _RUNTIME_OPS_IN_DEFAULT_DOMAIN and not _in_standard(node.op_type):
            raise ModelError(f"{node.op_type}{where} is not an ONNX operator: export the model with standard operators")


def _standard(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _in_standard(op_type: str) -> bool:
    return bool(onnx.defs.has(op_type))


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every constant: initializers of all graphs, and tensors in node attributes."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    for node in _nodes(model):
        for attr in node.attributes.values():
            if attr.is_ref():
                continue
            if attr.type == ir.AttributeType.TENSOR:
                yield attr.as_tensor()
            elif attr.type == ir.AttributeType.TENSORS:
                yield from attr.as_tensors()


def _read_proto(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        models = sorted(p.name for p in path.glob("*.onnx"))
        raise ModelError(f"{path} is a folder: give the .onnx file in it{f' ({models[0]})' if models else ''}")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise ModelError(f"no such file: {path}: check the path") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}: check its permissions") from None
    if not start:
        raise ModelError(f"{path} is empty: export or copy it again")
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the model: run `git lfs pull` in its repository")
    try:
        proto = onnx.load_model(path, format="protobuf", load_external_data=False)
    except DecodeError:
        raise ModelError(
            f"{path} is not an ONNX protobuf, or is cut short ({path.stat().st_size} bytes): export or copy it again"
        ) from None
    # Protobuf accepts many a foreign file as a message of unknown fields.
    if not proto.ir_version or not proto.HasField("graph") or not proto.graph.output:
        raise ModelError(f"{path} holds no ONNX graph: give an .onnx model")
    return proto


def _require_data(tensor: ir.ExternalTensor, model_path: Path) -> None:
    """Check that the file holds the tensor's bytes: a read past the end would surface hours later, in the middle of calibration."""
    where = f"external data of tensor {tensor.name!r} in {model_path}"
    folder = os.path.realpath(tensor.base_dir)
    target = os.path.realpath(tensor.path)
    if os.path.commonpath([folder, target]) != folder:
        raise ModelError(f"{where} lies outside the model's folder ({tensor.path} is {target}): copy the real file beside the model")
    try:
        status = Path(tensor.path).stat()
    except OSError:
        raise ModelError(f"{where} is missing: {tensor.path}: copy it beside the model") from None
    size = status.st_size
    if status.st_nlink > 1:
        # onnx and onnx_ir take it for an attack, though only when they come to read it.
        raise ModelError(f"{where} has several hard links, which onnx refuses to read: {tensor.path}: make it a plain copy")
    offset = tensor.offset or 0
    if tensor.length is not None and tensor.length != tensor.nbytes:
        raise ModelError(f"{where} is {tensor.length} bytes but its shape and type need {tensor.nbytes}: export the model again")
    if offset + tensor.nbytes > size:
        raise ModelError(f"{where} is cut short: {tensor.path} has {size} bytes, needs {offset + tensor.nbytes}: copy it again")


def _save_external(model: ir.Model, path: Path) -> None:
    _attribute_tensors_to_memory(model)
    # onnx_ir writes tensor after tensor, a lazy or external one read and dropped, to a temporary file that it renames.
    ir.save(model, path.absolute(), external_data=f"{path.name}.data", size_threshold_bytes=_EXTERNAL_TENSOR_ABOVE_BYTES, format="protobuf")


def _save_single(model: ir.Model, path: Path) -> None:
    """Write one protobuf without ever building it whole: the graph's small part, then its initializers one by one."""
    _attribute_tensors_to_memory(model)
    initializers = list(model.graph.initializers.values())
    streamed = [(v.name or "", v.const_value) for v in initializers if v.const_value and v.const_value.dtype != ir.DataType.STRING]
    try:
        for name, _ in streamed:
            model.graph.initializers.pop(name)
        proto = ir.to_proto(model)
    finally:
        model.graph.initializers.clear()
        for value in initializers:
            model.graph.initializers.add(value)
    head = proto.graph.SerializeToString()
    prefixes = [_initializer_prefix(name, tensor) for name, tensor in streamed]
    length = len(head) + sum(len(prefix) + tensor.nbytes for prefix, (_, tensor) in zip(prefixes, streamed, strict=True))
    proto.ClearField("graph")
    with _replacing(path) as file:
        file.write(proto.SerializeToString() + _length_delimited(onnx.ModelProto.GRAPH_FIELD_NUMBER, length) + head)
        for prefix, (_, tensor) in zip(prefixes, streamed, strict=True):
            file.write(prefix)
            _write_bytes(tensor, file)


def _attribute_tensors_to_memory(model: ir.Model) -> None:
    """Read external tensors that sit outside the main graph's initializers: serialization would keep their old file's name."""
    for graph in model.graphs():
        if graph is not model.graph:
            for value in graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value = _in_memory(value.const_value)
    for node in _nodes(model):
        for name, attr in list(node.attributes.items()):
            if attr.is_ref():
                continue
            if attr.type == ir.AttributeType.TENSOR and isinstance(attr.value, ir.ExternalTensor):
                node.attributes[name] = ir.AttrTensor(name, _in_memory(attr.value))


def _in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    array = tensor.numpy().copy()
    tensor.release()
    return ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)


def _initializer_prefix(name: str, tensor: ir.TensorProtocol) -> bytes:
    """All of a ``GraphProto.initializer`` entry up to its raw bytes, per the protobuf wire format."""
    header: bytes = onnx.TensorProto(name=name, data_type=tensor.dtype.value, dims=tensor.shape.numpy()).SerializeToString()
    header += _length_delimited(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, tensor.nbytes)
    return _length_delimited(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(header) + tensor.nbytes) + header


def _length_delimited(field: int, length: int) -> bytes:
    """A field's tag (wire type 2) and its length, each as a base-128 varint."""
    return _varint(field << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _write_bytes(tensor: ir.TensorProtocol, file: IO[bytes]) -> None:
    before = file.tell()
    write = getattr(tensor, "tofile", None)  # optional in the tensor protocol
    if write is None:
        file.write(tensor.tobytes())
    else:
        write(file)
    # A numpy tensor is written through the file's descriptor: tell() is only right again after a flush.
    file.flush()
    written = file.tell() - before
    if written != tensor.nbytes:
        raise AssertionError(f"tensor {tensor.name!r} wrote {written} bytes, its shape and type say {tensor.nbytes}")


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes ``path``'s place when all went well and leaves nothing behind when it did not."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
