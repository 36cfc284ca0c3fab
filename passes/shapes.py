"""Types and shapes of every value, as far as they can be known without running the model."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from fqonnx.passes.constants import dtype_of, is_constant, shape_of

# ONNX knows no schema of ONNX Runtime's operators, and its inference ends at them. These keep their first input's type; the first set
# keeps its shape too, the second all of it but the last axis.
_SAME_SHAPE = frozenset(
    {("", "GroupNormalization"), ("", "SimplifiedLayerNormalization")}
    | {("com.microsoft", name) for name in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "RotaryEmbedding", "SimplifiedLayerNormalization")}
    | {("com.microsoft", name) for name in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")}
)
_SAME_ROWS = frozenset(("com.microsoft", name) for name in ("Attention", "FusedMatMul", "GroupQueryAttention", "MultiHeadAttention"))
_MAX_ROUNDS = 32
_RESIDUAL_OUTPUT = 3
"""The output of the Skip norms that carries the sum on."""


class InferShapes(ir.passes.InPlacePass):
    """Fill in types and shapes: by ONNX's inference, past ONNX Runtime's operators, and from weights.

    1. ``onnx.shape_inference`` on the model without its weights;
    2. the outputs of ONNX Runtime's operators that keep their input's shape;
    3. the input of a product with a constant weight has the weight's type and its K, the output its N; a bias keeps that;
    4. a ``Reshape`` to a shape computed at run time has the rank that this shape has entries (TorchScript's ``flatten``).

    Repeated while 2 to 4 find something new for 1 to go on from. Rule 3's outputs are there so that one round gets through the many layers
    of a model that ONNX Runtime fused.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run to the fixed point; a value that stays unknown is left so."""
        inference = ShapeInferencePass(check_type=False, strict_mode=False)
        modified = inference(model).modified
        for _ in range(_MAX_ROUNDS):
            advanced = [node for node in model.graph.all_nodes() if _advance(node)]
            if not advanced:
                break
            modified = True
            inference(model)
        return ir.passes.PassResult(model, modified)


def _advance(node: ir.Node) -> bool:
    """Apply rules 2 to 4 to one node; True where something new was found."""
    identity = (node.domain, node.op_type)
    first = node.inputs[0] if node.inputs else None
    if first is None:
        return False
    if identity in _SAME_SHAPE:
        found = _describe(node.outputs[0], first.dtype, first.shape)
        if node.op_type.startswith("Skip") and len(node.outputs) > _RESIDUAL_OUTPUT:
            found |= _describe(node.outputs[_RESIDUAL_OUTPUT], first.dtype, first.shape)
        return found
    if identity in _SAME_ROWS:
        return _describe(node.outputs[0], first.dtype, _with_last(first.shape, None))
    if identity == ("", "MatMul") and is_constant(node.inputs[1]):
        return _from_weight(node)
    if identity == ("", "Add"):
        return _from_bias(node)
    if identity == ("", "Reshape") and node.inputs[1] is not None:
        entries = shape_of(node.inputs[1])
        return _describe(node.outputs[0], first.dtype, ir.Shape([None] * entries[0]) if entries else None)
    return False


def _from_weight(node: ir.Node) -> bool:
    x, weight = node.inputs
    assert x is not None
    assert weight is not None
    found = _describe(x, dtype_of(weight), None)
    dims = shape_of(weight)
    if dims is None or len(dims) != 2:
        return found
    if x.shape is not None and len(x.shape) and not isinstance(x.shape[-1], int):
        x.shape = _with_last(x.shape, dims[0])
        found = True
    return found | _describe(node.outputs[0], x.dtype, _with_last(x.shape, dims[1]))


def _from_bias(node: ir.Node) -> bool:
    for index, bias in enumerate(node.inputs):
        x = node.inputs[1 - index]
        if bias is not None and x is not None and x.shape is not None and len(x.shape) and is_constant(bias):
            dims = shape_of(bias)
            if dims is not None and len(dims) == 1 and dims[0] == x.shape[-1]:
                return _describe(node.outputs[0], x.dtype, x.shape)
    return False


def _with_last(shape: ir.Shape | None, last: int | None) -> ir.Shape | None:
    return None if shape is None or not len(shape) else ir.Shape([*tuple(shape)[:-1], last])


def _describe(value: ir.Value, dtype: ir.DataType | None, shape: ir.Shape | None) -> bool:
    """Set what is not known yet; True where that was something."""
    found = False
    if value.dtype is None and dtype is not None:
        value.dtype = dtype
        found = True
    if value.shape is None and shape is not None:
        value.shape = shape.copy()
        found = True
    return found
