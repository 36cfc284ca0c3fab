"""Types and shapes of every value, as far as they can be known without running the model."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from fqonnx.passes.constants import dtype_of, is_constant, shape_of

# ONNX knows no schema of ONNX Runtime's operators, and its inference ends at them. These keep their first input's type; the first set
# keeps its shape too, the second all of it but the last axis.
_SAME_SHAPE = frozenset({
    "BiasGelu", "BiasSplitGelu", "FastGelu", "Gelu", "LayerNormalization", "QuickGelu", "RotaryEmbedding", "SimplifiedLayerNormalization",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
})  # fmt: skip
_SAME_ROWS = frozenset({"Attention", "FusedMatMul", "GroupQueryAttention", "MultiHeadAttention"})
_RESIDUAL_OUTPUT = 3
"""The output of the Skip norms that carries the sum on."""


class InferShapes(ir.passes.InPlacePass):
    """Fill in types and shapes: by ONNX's inference, past ONNX Runtime's operators, and from weights.

    1. ``onnx.shape_inference`` on the model without its weights;
    2. the outputs of ONNX Runtime's operators that keep their input's shape;
    3. the input of a product with a constant weight has the weight's type and its K.

    Repeated while 2 or 3 find something new for 1 to go on from.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run to the fixed point; a value that stays unknown is left so."""
        inference = ShapeInferencePass(check_type=False, strict_mode=False)
        modified = False
        for _ in range(len(_SAME_SHAPE | _SAME_ROWS) + model.graph.num_nodes()):
            modified |= inference(model).modified
            found = False
            for node in model.graph.all_nodes():
                found |= _past_runtime_op(node) or _from_weight(node)
            modified |= found
            if not found:
                break
        return ir.passes.PassResult(model, modified)


def _past_runtime_op(node: ir.Node) -> bool:
    known = node.op_type in _SAME_SHAPE or node.op_type in _SAME_ROWS
    if not known or (node.domain != "com.microsoft" and node.op_type != "SimplifiedLayerNormalization") or not node.inputs:
        return False
    source = node.inputs[0]
    if source is None:
        return False
    shape = source.shape
    if shape is not None and node.op_type in _SAME_ROWS:
        shape = ir.Shape([*tuple(shape)[:-1], None])
    found = _describe(node.outputs[0], source.dtype, shape)
    if node.op_type.startswith("Skip") and len(node.outputs) > _RESIDUAL_OUTPUT:
        found |= _describe(node.outputs[_RESIDUAL_OUTPUT], source.dtype, shape)
    return found


def _from_weight(node: ir.Node) -> bool:
    if node.op_type != "MatMul" or node.domain != "" or not is_constant(node.inputs[1]):
        return False
    x, weight = node.inputs
    assert x is not None
    assert weight is not None
    shape = None
    dims = shape_of(weight)
    if x.shape is not None and len(x.shape) and dims is not None and len(dims) > 1 and not isinstance(x.shape[-1], int):
        shape = ir.Shape([*tuple(x.shape)[:-1], dims[-2]])
        x.shape = None
    return _describe(x, dtype_of(weight), shape)


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
