"""What a model's constants take, told without reading them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from fqonnx.report.data import SizeReport

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def constants(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every initializer, once, however many values it is bound to."""
    seen = set()
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and id(value.const_value) not in seen:
                seen.add(id(value.const_value))
                yield value.const_value


def constant_bytes(model: ir.Model) -> int:
    """Bytes of a model's initializers, those in ``If`` and ``Loop`` bodies included. Reads none of them."""
    return sum(tensor.nbytes for tensor in constants(model))


def measure_size(reference: ir.Model, candidate: ir.Model) -> SizeReport:
    """Bytes of both models' constants, and what the candidate's are."""
    parts: dict[str, int] = {}
    for tensor in constants(candidate):
        if tensor.dtype != ir.DataType.STRING:
            part = _PART_NAMES.get(tensor.dtype, "other")
            parts[part] = parts.get(part, 0) + tensor.nbytes
    total = sum(t.nbytes for t in constants(reference) if t.dtype != ir.DataType.STRING)
    return SizeReport(float_bytes=total, quantized_bytes=sum(parts.values()), parts=dict(sorted(parts.items())))
