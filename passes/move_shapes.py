"""Let ``Shape`` look at the earliest value of the shape that it measures.

TorchScript writes ``x.size()`` as ``Shape`` of the value at hand: in a Llama's attention the norm's output. That reader would keep the
norm from being fused, and a channel scale from being folded into it, though it does not care for the values.
"""

from __future__ import annotations

import onnx_ir as ir

from fqonnx.passes.constants import is_constant, shape_of
from fqonnx.passes.groups import MATRIX_PRODUCTS

_ELEMENTWISE = frozenset(
    {"Abs", "Cast", "Ceil", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log"}
    | {"LogSoftmax", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softmax", "Softplus", "Sqrt"}
    | {"Swish", "Tanh"}
)
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
_CONTRIB = frozenset(
    {"BiasGelu", "FastGelu", "Gelu", "QuickGelu", "SimplifiedLayerNormalization", "SkipLayerNormalization"}
    | {"SkipSimplifiedLayerNormalization"}
)
_UNARY = {"": _ELEMENTWISE | _NORMS, "com.microsoft": _CONTRIB}
"""Operators whose first output has their first input's shape, whatever else they read, by domain."""

_BINARY = frozenset({"Add", "Div", "Mul", "Pow", "Sub"})


class MoveShapes(ir.passes.InPlacePass):
    """Replace what ``Shape`` and ``Size`` read by what that was made of, as long as the shape is sure to be the same.

    It is behind operators that work on one operand, element by element or as norms, and behind binary ones with a constant that cannot
    widen the other operand, or where the shapes of an operand and the output are known to be equal.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Move every ``Shape`` of every graph as far as it goes."""
        modified = False
        for node in model.graph.all_nodes():
            if node.domain != "" or node.op_type not in ("Shape", "Size"):
                continue
            value = node.inputs[0]
            while value is not None and (earlier := _alike(value)) is not None:
                value = earlier
            if value is not node.inputs[0]:
                node.replace_input_with(0, value)
                modified = True
        return ir.passes.PassResult(model, modified)


def _alike(value: ir.Value) -> ir.Value | None:
    """An operand of what makes ``value`` that has its shape; None where there is none, or it is not sure."""
    node = value.producer()
    if node is None or value is not node.outputs[0] or is_constant(value):
        return None
    if node.op_type in _UNARY.get(node.domain, ()):
        return node.inputs[0]
    if node.domain == "" and node.op_type in _BINARY:
        for x, other in (node.inputs, reversed(node.inputs)):
            if x is not None and other is not None and not is_constant(x) and (_narrow(other, x) or _known_equal(x, value)):
                return None if is_constant(other) and _is_product(x) else x  # a bias is a part of its linear where nothing else reads x
    return None


def _is_product(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type in MATRIX_PRODUCTS


def _narrow(other: ir.Value, x: ir.Value) -> bool:
    """Whether ``other`` is a constant that cannot widen ``x`` in broadcasting: one value, or a row as long as the last axis of ``x``."""
    dims = shape_of(other) if is_constant(other) else None
    if dims is None or x.shape is None or len(dims) > len(x.shape):
        return dims == ()
    return all(d == 1 for d in dims[:-1]) and (not dims or dims[-1] in (1, x.shape[-1]))


def _known_equal(x: ir.Value, value: ir.Value) -> bool:
    """Whether both shapes are known, by numbers and names, and the same."""
    if x.shape is None or value.shape is None or len(x.shape) != len(value.shape):
        return False
    pairs = zip(x.shape, value.shape, strict=True)
    return all(a == b and (isinstance(a, int) or a.value is not None) for a, b in pairs)
