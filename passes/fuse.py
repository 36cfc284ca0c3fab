"""The Q/DQ form to kernels: ``FlatQuantize`` and ``W4A4Gemm``, as the target's kernels want their operands.

Recognition is by pattern (``PatternBase`` of ``onnxscript.rewriter``: ``pattern`` / ``check``, which says why not), on the form alone, so
that a graph in this form is fused whoever wrote it. Replacement is not by rewrite rule, for a rule replaces one match at a time and q, k
and v are three: a plain pass takes all matches that read one quantized input and writes

    FlatQuantize -> W4A4Gemm (weights, scales and biases stacked along N) -> Split

with the input quantized once. The matches share its dequantization, which is why nodes are not asked to be removable when they are matched;
what nothing reads any more afterwards is removed. Weights stay lazy: the stacked, re-laid codes are computed when the model is written.

Integer sums are exact in ``W4A4Gemm``; the two forms differ by the rounding of the Q/DQ form's operands and sums in the activation's type.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, pattern

from fqonnx.errors import UsageError
from fqonnx.ops import DOMAIN, FLOAT_TYPES, add_functions, flat_quantize_node, lazy_int4_tensor, to_layout, w4a4_gemm_node
from fqonnx.ops.layout import LAYOUTS
from fqonnx.passes.edit import GROUP_TAG, LINEAR_TAG, LINEARS_TAG, Insertion, Names, take_over

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

LOWERING_TAG = "fqonnx.lowering"
"""Key of a ``W4A4Gemm``'s metadata: its container and layout, and why they are not the target's first choice where they are not."""


@dataclass(frozen=True)
class Lowering:
    """How the operands of ``W4A4Gemm`` are stored.

    Attributes:
        container: ``int8`` (one activation code a byte) or ``packed`` (two 4-bit codes a byte).
        layout: Order of the weight's codes along K, a key of ``fqonnx.ops.layout.LAYOUTS``.
    """

    container: str
    layout: str

    def fit(self, in_features: int, activation_bits: int) -> tuple[Lowering, str | None]:
        """The nearest lowering that a group of this shape allows.

        A layout reorders blocks of K, a packed container holds pairs of 4-bit codes: what does not divide, or does not fit a nibble, is
        stored plainly, which every kernel family reads too.

        Returns:
            The lowering, and why it is not this one; None where it is.
        """
        container, layout, reasons = self.container, self.layout, []
        if in_features % LAYOUTS[layout].block:
            reasons.append(f"K = {in_features} is no multiple of {LAYOUTS[layout].block}, which layout {layout} wants")
            layout = "plain"
        if container == "packed" and (activation_bits != 4 or in_features % 2):
            what = f"{activation_bits}-bit activations" if activation_bits != 4 else f"K = {in_features} is odd and"
            reasons.append(f"{what} cannot be packed two a byte")
            container = "int8"
        return Lowering(container, layout), "; ".join(reasons) or None


PORTABLE = Lowering("int8", "plain")
"""For no target in particular: what a runtime without kernels evaluates fastest."""

_LOWERINGS = (
    # (lowest compute capability, lowering): no int4 matrix instruction from 9.0 on, so packing activations buys nothing there.
    (90, Lowering("int8", "k128")),
    (80, Lowering("packed", "plain")),
)


def lowering_for(target: str | None) -> Lowering:
    """The lowering for a GPU's compute capability.

    Args:
        target: ``sm80``, ``sm89``, ``sm90``, ``sm100``, ...; None for no target in particular.

    Raises:
        UsageError: Not a compute capability, or one below 8.0, for which there is no kernel.
    """
    if target is None:
        return PORTABLE
    match = re.fullmatch(r"sm_?(\d{2,3})[af]?", target)
    if match is None:
        raise UsageError(f"unknown target {target!r}: give a compute capability, such as sm80, sm89 or sm90")
    for lowest, lowering in _LOWERINGS:
        if int(match[1]) >= lowest:
            return lowering
    raise UsageError(f"there is no kernel for target {target!r}: choose sm{_LOWERINGS[-1][0]} or later")


class QdqProduct(pattern.PatternBase):
    """``MatMul(dequantized activation, transposed dequantized INT4 weight)``, with or without casts to the activation's type."""

    def pattern(self, op, q, scale, w, w_scale):  # type: ignore[no-untyped-def]  # noqa: D102
        x = op.Mul(op.Cast(q, to=ir.DataType.FLOAT.value, _allow_other_attributes=False), scale)
        x = pattern.OrValue([op.Cast(x, _allow_other_attributes=True), x])
        weight = op.DequantizeLinear(w, w_scale, _allow_other_attributes=True, _outputs=["dequantized"])
        weight = pattern.OrValue([op.Cast(weight, _allow_other_attributes=True), weight])
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]), _outputs=["product"])

    def check(  # type: ignore[override]
        self,
        context: MatchResult,
        *,
        q: ir.Value,
        scale: ir.Value,
        w: ir.Value,
        w_scale: ir.Value,
        dequantized: ir.Value,
        product: ir.Value,
        **_: ir.Value,
    ) -> MatchResult:
        """The activation is a ``FlatQuantize``'s, the weight a constant of 4 bits with a scale per row or per group along K."""
        del context
        result = MatchResult()
        flat = q.producer()
        if flat is None or (flat.domain, flat.op_type) != (DOMAIN, "FlatQuantize") or tuple(flat.outputs[:2]) != (q, scale):
            return result.fail("the activation is not the dequantized output of a FlatQuantize", q)
        if flat.graph is not product.graph:
            return result.fail("the activation is quantized outside of this graph", q)
        if flat.attributes.get_int("packed", 0):
            return result.fail("the activation is packed already", q)
        if w.const_value is None or w.is_graph_input() or w.dtype != ir.DataType.INT4 or w.shape is None or len(w.shape) != 2:
            return result.fail("the weight is not a constant INT4 matrix", w)
        if w_scale.const_value is None or w_scale.dtype != ir.DataType.FLOAT or w_scale.shape is None:
            return result.fail("the weight's scale is not constant fp32", w_scale)
        if product.dtype not in FLOAT_TYPES:
            return result.fail("the product is not known to be fp32, fp16 or bf16", product)
        node = dequantized.producer()
        assert node is not None
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        expected = (0, 1) if len(w_scale.shape) == 1 else (1, 2)  # a scale per row, or blocks along K
        if (axis % 2, len(w_scale.shape)) != expected:
            return result.fail("the weight's scales are neither per row nor per group along K", dequantized)
        return result


@dataclass(frozen=True, eq=False)
class _QdqLinear:
    """One linear in the Q/DQ form: its operands, its output, and the nodes that compute it, readers before what they read."""

    flat: ir.Node
    product: ir.Node
    w: ir.Value
    w_scale: ir.Value
    bias: ir.Value | None
    output: ir.Value
    nodes: tuple[ir.Node, ...]

    @property
    def out_features(self) -> int:
        """N."""
        return _sizes(self.w)[0]

    @property
    def in_features(self) -> int:
        """K."""
        return _sizes(self.w)[1]

    @property
    def dtype(self) -> ir.DataType:
        """Element type of the product."""
        dtype = self.product.outputs[0].dtype
        assert dtype is not None
        return dtype

    @property
    def scales_per_row(self) -> int:
        """K / G; 1 per channel."""
        sizes = _sizes(self.w_scale)
        return 1 if len(sizes) == 1 else sizes[1]

    @property
    def name(self) -> str:
        """The linear's name where the product says it, else the product's."""
        return self.product.metadata_props.get(LINEAR_TAG) or self.product.name or "linear"

    def read_codes(self) -> npt.NDArray[np.int8]:
        """``[N, K]``."""
        return _read(self.w).astype(np.int8)

    def read_scales(self) -> npt.NDArray[np.float32]:
        """``[N, K / G]``."""
        return _read(self.w_scale).reshape(self.out_features, self.scales_per_row)

    def read_bias(self) -> npt.NDArray[np.float32]:
        """``[N]``, zeros where there is none."""
        return np.zeros(self.out_features, np.float32) if self.bias is None else _read(self.bias).astype(np.float32)


def _sizes(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return value.shape.numpy()


def _read(value: ir.Value) -> npt.NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


class Fuse(ir.passes.InPlacePass):
    """Merges the linears of the Q/DQ form that read one quantized input into one ``W4A4Gemm``.

    Args:
        lowering: How the target wants the operands stored; a group that it does not fit is stored plainly and its node says why.
    """

    def __init__(self, lowering: Lowering = PORTABLE) -> None:
        super().__init__()
        self.lowering = lowering

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse in every graph, subgraphs included; ``modified`` is whether anything matched."""
        names = Names(model)
        modified = False
        for graph in model.graphs():
            for linears in _find(model, graph):
                _fuse(linears, self.lowering, names)
                modified = True
        if modified:
            add_functions(model)
        return ir.passes.PassResult(model, modified)


def _find(model: ir.Model, graph: ir.Graph) -> list[list[_QdqLinear]]:
    """The linears in the Q/DQ form, by what one GEMM can serve: one quantized input, one output type, as many scales per row."""
    product = QdqProduct()
    found: dict[tuple[ir.Node, ir.DataType, int], list[_QdqLinear]] = {}
    for node in graph:
        if (node.domain, node.op_type) != ("", "MatMul"):
            continue
        match = product.match(model, graph, node, check_nodes_are_removable=False)
        if not match:
            continue
        flat = match.bindings["q"].producer()
        add, bias = _bias_of(node, _sizes(match.bindings["w"])[0])
        linear = _QdqLinear(
            flat=flat,
            product=node,
            w=match.bindings["w"],
            w_scale=match.bindings["w_scale"],
            bias=bias,
            output=(add or node).outputs[0],
            nodes=(*([add] if add else ()), node, *(n for n in match.nodes if n is not node), flat),
        )
        found.setdefault((flat, linear.dtype, linear.scales_per_row), []).append(linear)
    return list(found.values())


def _bias_of(product: ir.Node, out_features: int) -> tuple[ir.Node | None, ir.Value | None]:
    """The ``Add`` of a constant ``[N]`` that is the product's only reader, and that constant."""
    (y,) = product.outputs
    readers = list(y.uses())
    if y.is_graph_output() or len(readers) != 1 or (readers[0].node.domain, readers[0].node.op_type) != ("", "Add"):
        return None, None
    add, index = readers[0]
    bias = add.inputs[1 - index]
    if bias is None or bias.const_value is None or bias.shape is None or tuple(bias.shape) != (out_features,):
        return None, None
    return add, bias


def _fuse(linears: Sequence[_QdqLinear], lowering: Lowering, names: Names) -> None:
    first = linears[0]
    flat, k, n = first.flat, first.in_features, sum(part.out_features for part in linears)
    bits = flat.attributes.get_int("bits", 4)
    fitted, reason = lowering.fit(k, bits)
    packed = fitted.container == "packed"
    name = first.name if len(linears) == 1 else flat.metadata_props.get(GROUP_TAG) or first.name
    tags = {
        **dict(set.intersection(*(set(part.product.metadata_props.items()) for part in linears))),  # the exporter's, where they agree
        GROUP_TAG: flat.metadata_props.get(GROUP_TAG) or name,
        LINEARS_TAG: json.dumps([part.name for part in linears]),
        LOWERING_TAG: f"{fitted.container}/{fitted.layout}" + (f" ({reason})" if reason else ""),
    }
    if reason:
        logger.info("%s: stored as %s/%s: %s", name, fitted.container, fitted.layout, reason)
    obsolete = _retire(linears, names)
    # The input is there at the first product, and whatever reads an output comes after it.
    insert = Insertion(first.product, names, tags)

    x, left, right, clip = flat.inputs
    assert x is not None and left is not None and right is not None and clip is not None  # noqa: PT018
    flat_name = flat.name or f"{name}.flat_quantize"
    q, scale = insert.add(flat_quantize_node(x, left, right, clip, bits=bits, packed=packed, name=flat_name))
    weight = lazy_int4_tensor(lambda: to_layout(np.concatenate([part.read_codes() for part in linears]), fitted.layout), (n, k))
    scales = ir.LazyTensor(
        lambda: ir.tensor(np.concatenate([part.read_scales() for part in linears])), ir.DataType.FLOAT, ir.Shape([n, first.scales_per_row])
    )
    bias = ir.tensor(np.concatenate([part.read_bias() for part in linears]))
    constants = [insert.constant(f"{name}.{what}", t) for what, t in (("weight_int4", weight), ("weight_scale", scales), ("bias", bias))]
    gemm = w4a4_gemm_node(q, scale, *constants, packed=packed, layout=fitted.layout, dtype=first.dtype, name=name)
    (y,) = insert.add(gemm)
    outputs: Sequence[ir.Value] = (y,)
    if len(linears) > 1:
        sizes = insert.constant(f"{name}.split_sizes", ir.tensor([part.out_features for part in linears], dtype=ir.DataType.INT64))
        outputs = insert.add(ir.node("Split", [y, sizes], {"axis": -1}, num_outputs=len(linears), name=f"{name}.split"))
    for part, output in zip(linears, outputs, strict=True):
        take_over(part.output, output, ())
    insert.graph.remove(obsolete, safe=True)


def _retire(linears: Sequence[_QdqLinear], names: Names) -> list[ir.Node]:
    """The matched nodes that nothing else reads; their names and their constants' are released for the new nodes, the constants dropped."""
    heads = {part.nodes[0] for part in linears}  # their outputs live on under their names
    gone = set(heads)
    candidates = {node for part in linears for node in part.nodes}
    while more := {n for n in candidates - gone if all(not y.is_graph_output() and gone.issuperset(y.consumers()) for y in n.outputs)}:
        gone |= more
    for node in gone:
        names.release_node(node)
        for value in node.outputs if node not in heads else ():
            names.release_value(value.name)
    for constant in (constant for part in linears for constant in (part.w, part.w_scale, part.bias)):
        if constant is not None and constant.is_initializer() and not constant.is_graph_output() and gone.issuperset(constant.consumers()):
            assert constant.graph is not None
            assert constant.name is not None
            names.release_value(constant.name)
            del constant.graph.initializers[constant.name]
    return list(gone)
