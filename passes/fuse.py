"""The Q/DQ form to kernels: ``FlatQuantize`` and ``W4A4Gemm``, as the target's kernels want their operands.

Recognition is by pattern (``PatternBase`` of ``onnxscript.rewriter``: ``pattern`` / ``check``, which says why not), on the form alone, so
that a graph in this form is fused whoever wrote it. Replacement is not by rewrite rule, for a rule replaces one match at a time and q, k
and v are three: a plain pass takes all matches that read one quantized input and writes

    FlatQuantize -> W4A4Gemm (weights, scales and biases stacked along N) -> Split

with the input quantized once. The matches share its dequantization, which is why nodes are not asked to be removable when they are matched;
what nothing reads any more afterwards is removed. Weights stay lazy: the stacked, re-laid codes are computed when the model is written.

How the operands are stored is asked of the table of kernels (``fqonnx.ops.kernels``), for the target's compute capability. Kernels take N
and K in sixteens: rows of a weight are filled up with zeros and split off its output, columns with zeros that whatever code may meet.

Integer sums are exact in ``W4A4Gemm``; the two forms differ by the rounding of the Q/DQ form's operands and sums in the activation's type.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, pattern

from fqonnx.errors import EngineError, UsageError
from fqonnx.ops import DOMAIN, FLOAT_TYPES, add_functions, flat_quantize_node, lazy_int4_tensor, to_layout, w4a4_gemm_node
from fqonnx.ops.kernels import KERNELS, Kernel, kernel_for
from fqonnx.passes.edit import GROUP_TAG, LINEAR_TAG, LINEARS_TAG, Insertion, Names, last_dim, take_over

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

LOWERING_TAG = "fqonnx.lowering"
"""Key of a ``W4A4Gemm``'s metadata: its ``Lowering`` as JSON."""

_OP = "W4A4Gemm"
_TILE = 16
"""N and K are multiples of this in every kernel (``plugins/kernels/fqonnx.h``)."""


@dataclass(frozen=True)
class Lowering:
    """How the operands of one ``W4A4Gemm`` are stored, and for which kernel.

    Attributes:
        kernel: The kernel's name in the table; None where no kernel takes them and only the body runs.
        container: ``int8`` (one activation code a byte) or ``packed`` (two 4-bit codes a byte).
        layout: Order of the weight's codes along K, a key of ``fqonnx.ops.layout.LAYOUTS``.
        n: Rows of the stored weight.
        k: Columns of the stored weight.
        why: Why the kernel is not the target's first choice; None where it is.
    """

    kernel: str | None
    container: str
    layout: str
    n: int
    k: int
    why: str | None = None


@dataclass(frozen=True)
class Target:
    """The GPU that operands are stored for.

    Attributes:
        capability: Its compute capability, such as 90; None for none in particular: int8 codes and weights in the order of K, which
            ONNX Runtime evaluates fastest without kernels and one kernel reads on every GPU.
    """

    capability: int | None

    def lower(self, *, n: int, k: int, activation_bits: int, group_size: int = 0) -> Lowering:
        """How operands of this shape are stored.

        Args:
            n: Output channels.
            k: Columns of the activation.
            activation_bits: 4 or 8.
            group_size: Columns per weight scale; 0 is one scale per channel.

        Raises:
            EngineError: The target has no kernel for them; the message says why for each.
        """
        filled_n, filled_k = -(-n // _TILE) * _TILE, k if group_size else -(-k // _TILE) * _TILE
        if self.capability is None:
            return self._portable(filled_n, filled_k, group_size)
        # Two codes share a byte only where there are pairs of nibbles.
        unpackable = f"{activation_bits}-bit activations" if activation_bits != 4 else f"K = {k} is odd" if k % 2 else None
        container = None if unpackable is None else "int8"
        kernel = kernel_for(_OP, capability=self.capability, container=container, n=filled_n, k=filled_k, group_size=group_size)
        first, why = kernel_for(_OP, capability=self.capability), None
        if kernel != first:
            why = first.why_not(self.capability, n=filled_n, k=filled_k, group_size=group_size)
            why = f"{first.name} {why or f'wants container {first.container}: {unpackable}'}"
        return Lowering(kernel.name, kernel.container or "int8", kernel.layout or "plain", filled_n, filled_k, why)

    def _portable(self, n: int, k: int, group_size: int) -> Lowering:
        kernels = [
            kernel for kernel in KERNELS if kernel.op == _OP and kernel.container in (None, "int8") and kernel.layout in (None, "plain")
        ]
        reasons = [_why_not(kernel, n=n, k=k, group_size=group_size) for kernel in kernels]
        fitting = next((kernel for kernel, reason in zip(kernels, reasons, strict=True) if reason is None), None)
        if fitting is not None:
            return Lowering(fitting.name, "int8", "plain", n, k)
        why = "; ".join(f"{kernel.name} {reason}" for kernel, reason in zip(kernels, reasons, strict=True))
        return Lowering(None, "int8", "plain", n, k, f"no kernel takes it: {why}")


def _why_not(kernel: Kernel, *, n: int, k: int, group_size: int) -> str | None:
    return kernel.why_not(kernel.chosen[0], container="int8", layout="plain", n=n, k=k, group_size=group_size)


PORTABLE = Target(None)


def target_named(target: str | None) -> Target:
    """The GPU of that name.

    Args:
        target: ``sm80``, ``sm89``, ``sm90``, ``sm100``, ...; None for none in particular.

    Raises:
        UsageError: Not a compute capability, or one that no kernel is chosen for.
    """
    if target is None:
        return PORTABLE
    match = re.fullmatch(r"sm_?(\d{2,3})[af]?", target)
    if match is None:
        raise UsageError(f"unknown target {target!r}: give a compute capability, such as sm80, sm89 or sm90")
    try:
        kernel_for(_OP, capability=int(match[1]))
    except EngineError:
        lowest, highest = zip(*(kernel.chosen for kernel in KERNELS if kernel.op == _OP), strict=True)
        raise UsageError(f"there is no kernel for target {target!r}: choose sm{min(lowest)} to sm{max(highest)}") from None
    return Target(int(match[1]))


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
        target: The GPU whose kernels the operands are stored for.

    Raises:
        EngineError: The target has no kernel for a group.
    """

    def __init__(self, target: Target = PORTABLE) -> None:
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse in every graph, subgraphs included; ``modified`` is whether anything matched."""
        names = Names(model)
        modified = False
        for graph in model.graphs():
            for linears in _find(model, graph):
                _fuse(linears, self.target, names)
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


def _fuse(linears: Sequence[_QdqLinear], target: Target, names: Names) -> None:
    first = linears[0]
    flat, k, n = first.flat, first.in_features, sum(part.out_features for part in linears)
    bits, groups = flat.attributes.get_int("bits", 4), first.scales_per_row
    name = first.name if len(linears) == 1 else flat.metadata_props.get(GROUP_TAG) or first.name
    try:
        lowering = target.lower(n=n, k=k, activation_bits=bits, group_size=0 if groups == 1 else k // groups)
    except EngineError as error:
        raise EngineError(f"{name!r}: {error}") from None
    packed = lowering.container == "packed"
    tags = {
        **dict(set.intersection(*(set(part.product.metadata_props.items()) for part in linears))),  # the exporter's, where they agree
        GROUP_TAG: flat.metadata_props.get(GROUP_TAG) or name,
        LINEARS_TAG: json.dumps([part.name for part in linears]),
        LOWERING_TAG: json.dumps(asdict(lowering)),
    }
    if lowering.why:
        logger.info("%s: %s, stored as %s/%s: %s", name, lowering.kernel or "body", lowering.container, lowering.layout, lowering.why)
    obsolete = _retire(linears, names)
    # The input is there at the first product, and whatever reads an output comes after it.
    insert = Insertion(first.product, names, tags)

    x, left, right, clip = flat.inputs
    assert x is not None and left is not None and right is not None and clip is not None  # noqa: PT018
    flat_name = flat.name or f"{name}.flat_quantize"
    q, scale = insert.add(flat_quantize_node(x, left, right, clip, bits=bits, packed=packed, name=flat_name))
    if lowering.k > k:
        q = _fill_columns(insert, q, k // (1 + packed), lowering.k // (1 + packed), f"{name}.fill")
    constants = [
        insert.constant(f"{name}.{what}", tensor)
        for what, tensor in zip(("weight_int4", "weight_scale", "bias"), _stack(linears, lowering), strict=True)
    ]
    (y,) = insert.add(w4a4_gemm_node(q, scale, *constants, packed=packed, layout=lowering.layout, dtype=first.dtype, name=name))
    outputs: Sequence[ir.Value] = (y,)
    sizes = [part.out_features for part in linears] + [lowering.n - n] * (lowering.n > n)
    if len(sizes) > 1:
        split = insert.constant(f"{name}.split_sizes", ir.tensor(sizes, dtype=ir.DataType.INT64))
        outputs = insert.add(ir.node("Split", [y, split], {"axis": -1}, num_outputs=len(sizes), name=f"{name}.split"))
        for output, size in zip(outputs, sizes, strict=True):
            output.type, output.shape = ir.TensorType(first.dtype), last_dim(y.shape, size)
    for part, output in zip(linears, outputs, strict=False):
        take_over(part.output, output, ())
    insert.graph.remove(obsolete, safe=True)


def _stack(linears: Sequence[_QdqLinear], lowering: Lowering) -> tuple[ir.TensorProtocol, ir.TensorProtocol, ir.TensorProtocol]:
    """Weights, their scales and biases of all linears along N, filled up to the stored size: codes with 0, scales with 1, biases with 0."""
    first, n = linears[0], sum(part.out_features for part in linears)
    rows, columns = lowering.n - n, lowering.k - first.in_features

    def codes() -> npt.NDArray[np.int8]:
        stacked = np.concatenate([part.read_codes() for part in linears])
        return to_layout(np.pad(stacked, ((0, rows), (0, columns))) if rows or columns else stacked, lowering.layout)

    def scales() -> ir.TensorProtocol:
        stacked = np.concatenate([part.read_scales() for part in linears])
        return ir.tensor(np.pad(stacked, ((0, rows), (0, 0)), constant_values=1))

    return (
        lazy_int4_tensor(codes, (lowering.n, lowering.k)),
        ir.LazyTensor(scales, ir.DataType.FLOAT, ir.Shape([lowering.n, first.scales_per_row])),
        ir.tensor(np.pad(np.concatenate([part.read_bias() for part in linears]), (0, rows))),
    )


def _fill_columns(insert: Insertion, q: ir.Value, columns: int, filled: int, name: str) -> ir.Value:
    """Codes with more columns. Weights are zero there, so they may repeat others: ``Gather`` takes int8 everywhere, ``Pad`` does not."""
    index = insert.constant(f"{name}.index", ir.tensor(np.arange(filled, dtype=np.int64) % columns))
    return insert.node("Gather", [q, index], {"axis": -1}, name=name, dtype=ir.DataType.INT8, shape=last_dim(q.shape, filled))


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
