"""Constant expressions: values that depend on initializers alone, read from disk when asked for and never kept.

Exporters put weights, biases and norm gains behind casts, transposes and dequantization. Folding those would hold every weight in
memory; here they are recognised and evaluated one at a time in numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AnyArray = npt.NDArray[Any]
_FLOAT_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def is_float(dtype: ir.DataType | None) -> bool:
    """Whether it is one of the float types of weights and activations: fp32, fp16, bf16."""
    return dtype in _FLOAT_DTYPES


def is_constant(value: ir.Value | None) -> bool:
    """Whether ``read`` can evaluate the value."""
    if value is None:
        return False
    if value.is_initializer():
        # An initializer that is also an input can be overridden when the model runs.
        return value.const_value is not None and not value.is_graph_input()
    node = value.producer()
    if node is None or (node.domain, node.op_type) not in _EVALUATORS or len(node.outputs) != 1:
        return False
    return all(operand is None or is_constant(operand) for operand in node.inputs)


def sources(value: ir.Value) -> Iterator[ir.Value]:
    """The initializers that a constant value is made of."""
    node = value.producer()
    if node is None:
        yield value
        return
    for operand in node.inputs:
        if operand is not None:
            yield from sources(operand)


def shape_of(value: ir.Value) -> tuple[int, ...] | None:
    """The value's shape where every axis is known, else None."""
    shape = value.const_value.shape if value.const_value is not None else value.shape
    if shape is None:
        return None
    dims = tuple(shape)
    return tuple(int(d) for d in dims if isinstance(d, int)) if all(isinstance(d, int) for d in dims) else None


def dtype_of(value: ir.Value) -> ir.DataType | None:
    """The value's element type where known."""
    return value.const_value.dtype if value.const_value is not None else value.dtype


def read(value: ir.Value) -> AnyArray:
    """Evaluate a constant value; reads from disk on each call.

    Args:
        value: A value for which ``is_constant`` holds.

    Returns:
        The array in the value's own type (bf16 and 4-bit types as ``ml_dtypes``).
    """
    node = value.producer()
    if node is None:
        assert value.const_value is not None
        return read_tensor(value.const_value)
    operands = [None if operand is None else read(operand) for operand in node.inputs]
    return _EVALUATORS[node.domain, node.op_type](node, *operands)


def read_tensor(tensor: ir.TensorProtocol) -> AnyArray:
    """The tensor's values. External data is read with ordinary file reads: mapped pages would count as resident until released."""
    if not isinstance(tensor, ir.ExternalTensor):
        return np.asarray(tensor.numpy())
    if tensor.dtype.bitwidth < 8:
        array = tensor.numpy().copy()
        tensor.release()
        return array
    with Path(tensor.path).open("rb") as file:
        file.seek(tensor.offset or 0)
        data = np.fromfile(file, dtype=np.uint8, count=tensor.nbytes)
    return data.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())


def _cast(node: ir.Node, x: AnyArray) -> AnyArray:
    return x.astype(ir.DataType(node.attributes.get_int("to")).numpy())


def _transpose(node: ir.Node, x: AnyArray) -> AnyArray:
    perm = node.attributes.get_ints("perm", None)
    return np.transpose(x, perm)


def _dequantize(node: ir.Node, q: AnyArray, scale: AnyArray, zero_point: AnyArray | None = None) -> AnyArray:
    """ONNX ``DequantizeLinear``: per tensor, per axis or blocked along the axis; computed in fp32, returned in the scale's type."""
    axis = node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)

    def spread(parameter: AnyArray) -> AnyArray:
        wide = parameter.astype(np.float32)
        if wide.ndim == 0 or wide.size == 1:
            return wide.reshape(())
        if block:
            return np.repeat(wide, block, axis=axis).take(np.arange(q.shape[axis]), axis=axis)
        shape = [1] * q.ndim
        shape[axis] = -1
        return wide.reshape(shape)

    x = q.astype(np.float32)
    if zero_point is not None:
        x -= spread(zero_point)
    x *= spread(scale)
    return x.astype(scale.dtype)


def _binary(function: Callable[[AnyArray, AnyArray], AnyArray]) -> Callable[..., AnyArray]:
    return lambda _node, a, b: function(a, b).astype(a.dtype)


def _reshape(node: ir.Node, x: AnyArray, shape: AnyArray) -> AnyArray:
    keep_zero = node.attributes.get_int("allowzero", 0)
    dims = [x.shape[i] if d == 0 and not keep_zero else int(d) for i, d in enumerate(shape)]
    return x.reshape(dims)


def _concat(node: ir.Node, *operands: AnyArray) -> AnyArray:
    return np.concatenate(operands, axis=node.attributes.get_int("axis", 0))


def _unsqueeze(_node: ir.Node, x: AnyArray, axes: AnyArray) -> AnyArray:
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


def _squeeze(_node: ir.Node, x: AnyArray, axes: AnyArray | None = None) -> AnyArray:
    return np.squeeze(x, None if axes is None else tuple(int(axis) for axis in axes))


# Division is for floats: of integers, ONNX truncates where numpy does not. No exporter divides integer weights.
_EVALUATORS: dict[tuple[str, str], Callable[..., AnyArray]] = {
    ("", "Identity"): lambda _node, x: x,
    ("", "Cast"): _cast,
    ("", "Transpose"): _transpose,
    ("", "DequantizeLinear"): _dequantize,
    ("com.microsoft", "DequantizeLinear"): _dequantize,
    ("", "Reshape"): _reshape,
    ("", "Add"): _binary(np.add),
    ("", "Mul"): _binary(np.multiply),
    ("", "Sub"): _binary(np.subtract),
    ("", "Div"): _binary(np.divide),
    ("", "Concat"): _concat,
    ("", "Unsqueeze"): _unsqueeze,
    ("", "Squeeze"): _squeeze,
}
