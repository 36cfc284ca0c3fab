"""An RMSNorm into the quantizer behind it, with the sum of the residual before it: ``RmsNormFlatQuantize``, ``AddRmsNormFlatQuantize``.

    h = gamma * (x / sqrt(mean(x^2) + epsilon))

is recognised where only a ``FlatQuantize`` reads it: decomposed, in the order of exporters, with or without casts to fp32 and back, as
``RMSNormalization`` and ``SimplifiedLayerNormalization``, and with the sum before it as ``SkipSimplifiedLayerNormalization``. Where ``x``
is the sum of two activations of one shape, the op adds them too and gives the sum to whoever reads it.

The op computes in fp32 and rounds ``h`` once, where a decomposed norm rounds before gamma as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from fqonnx.ops import DOMAIN, FLOAT_TYPES, add_functions, rms_norm_flat_quantize_node
from fqonnx.passes.constants import is_constant, read, shape_of
from fqonnx.passes.edit import Insertion, Names, take_over
from fqonnx.passes.walk import Walk

if TYPE_CHECKING:
    from collections.abc import Iterable

_NORMS = (("", "RMSNormalization"), ("", "SimplifiedLayerNormalization"), ("com.microsoft", "SimplifiedLayerNormalization"))
_SKIP_NORM = ("com.microsoft", "SkipSimplifiedLayerNormalization")
_SKIP_SUM = 3
"""The output of the Skip norm that is the sum."""


class FuseNorm(ir.passes.InPlacePass):
    """Replaces each RMSNorm that only a ``FlatQuantize`` reads, with that, and with the sum before it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse in every graph, subgraphs included; ``modified`` is whether anything matched."""
        names = Names(model)
        modified = False
        for graph in model.graphs():
            for flat in [node for node in graph if (node.domain, node.op_type) == (DOMAIN, "FlatQuantize")]:
                norm = _match(flat)
                if norm is not None:
                    _fuse(norm, names)
                    modified = True
        if modified:
            add_functions(model)
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True, eq=False)
class _Norm:
    """A match: its operands, the sum where there is one, and the nodes that nothing else needs."""

    flat: ir.Node
    x: ir.Value
    residual: ir.Value | None
    total: ir.Value | None
    gamma: ir.Value
    epsilon: float
    anchor: ir.Node
    nodes: frozenset[ir.Node]


def _match(flat: ir.Node) -> _Norm | None:
    h = flat.inputs[0]
    if h is None or h.dtype not in FLOAT_TYPES:
        return None
    walk = Walk(flat, h.dtype)
    if (skip := walk.step(h, _SKIP_NORM)) is not None:
        return _skip_norm(walk, skip)
    node = walk.step(h, *_NORMS)
    operands = _decomposed(walk, h) if node is None else _norm_op(node)
    if operands is None:
        return None
    x, gamma, epsilon = operands
    if not _fits(walk, x, gamma) or not walk.is_closed():
        return None
    add = walk.producer(x, ("", "Add"))
    if add is not None and _are_summands(flat, add):
        first, second = add.inputs
        assert first is not None and second is not None  # noqa: PT018
        return _Norm(flat, first, second, x, gamma, epsilon, add, frozenset({*walk.nodes, add}))
    return _Norm(flat, x, None, None, gamma, epsilon, flat, frozenset(walk.nodes))


def _skip_norm(walk: Walk, skip: ir.Node) -> _Norm | None:
    """The Skip norm gives the sum itself: that may have other readers, what else it gives may not."""
    x, residual, gamma = skip.inputs[:3]
    h, *others = skip.outputs
    total = others.pop(_SKIP_SUM - 1) if len(others) >= _SKIP_SUM else None
    unread = [value for value in others if not value.uses() and not value.is_graph_output()]
    if any(operand is not None for operand in skip.inputs[3:]) or unread != others or not _are_summands(walk.flat, skip):
        return None
    assert x is not None  # two summands of one shape
    if gamma is None or not _fits(walk, x, gamma) or h.is_graph_output() or not walk.nodes.issuperset(h.consumers()):
        return None
    if any(not walk.nodes.issuperset(y.consumers()) or y.is_graph_output() for n in walk.nodes - {walk.flat, skip} for y in n.outputs):
        return None
    return _Norm(walk.flat, x, residual, total, gamma, skip.attributes.get_float("epsilon", 1e-12), skip, frozenset(walk.nodes))


def _norm_op(node: ir.Node) -> tuple[ir.Value, ir.Value, float] | None:
    x, gamma = node.inputs[:2]
    rank = None if x is None or x.shape is None else len(x.shape)
    axis = node.attributes.get_int("axis", -1)
    if x is None or gamma is None or len(node.inputs) > 2 or (axis != -1 and (rank is None or axis != rank - 1)):
        return None
    return x, gamma, node.attributes.get_float("epsilon", 1e-5)


def _decomposed(walk: Walk, h: ir.Value) -> tuple[ir.Value, ir.Value, float] | None:
    product = walk.step(h, ("", "Mul"))
    gamma, unit = walk.constant_and_other(product) if product is not None else (None, None)
    division = walk.step(unit, ("", "Div"), ("", "Mul"))
    if gamma is None or division is None:
        return None
    # x / root in any order of a product with the reciprocal root.
    for index in (0,) if division.op_type == "Div" else (0, 1):
        passed = {*walk.nodes}
        x = walk.source(division.inputs[index])
        mean = _mean_under_root(walk, division.inputs[1 - index], reciprocal=division.op_type == "Mul")
        if x is not None and mean is not None and _is_mean_square(walk, mean[0], x):
            return x, gamma, mean[1]
        walk.nodes = passed
    return None


def _mean_under_root(walk: Walk, value: ir.Value | None, *, reciprocal: bool) -> tuple[ir.Value, float] | None:
    """The mean and epsilon of ``sqrt(mean + epsilon)``, or of its reciprocal."""
    if reciprocal:
        if (inverse := walk.step(value, ("", "Reciprocal"))) is not None:
            value = inverse.inputs[0]
        elif (inverse := walk.step(value, ("", "Div"))) is not None:
            if not _holds(inverse.inputs[0], 1.0):
                return None
            value = inverse.inputs[1]
        elif (power := walk.step(value, ("", "Pow"))) is not None:
            return _mean_and_epsilon(walk, power.inputs[0]) if _holds(power.inputs[1], -0.5) else None
        else:
            return None
    root = walk.step(value, ("", "Sqrt"))
    return None if root is None else _mean_and_epsilon(walk, root.inputs[0])


def _mean_and_epsilon(walk: Walk, value: ir.Value | None) -> tuple[ir.Value, float] | None:
    add = walk.step(value, ("", "Add"))
    epsilon, mean = walk.constant_and_other(add) if add is not None else (None, None)
    number = None if epsilon is None else _number(epsilon)
    return None if mean is None or number is None else (mean, number)


def _is_mean_square(walk: Walk, mean: ir.Value, x: ir.Value) -> bool:
    """Whether ``mean`` is the mean of ``x``'s squares over the last axis, which stays."""
    reduce = walk.step(mean, ("", "ReduceMean"))
    if reduce is None or reduce.attributes.get_int("keepdims", 1) != 1 or len(reduce.inputs) != 2:
        return False
    axes, rank = reduce.inputs[1], None if x.shape is None else len(x.shape)
    if axes is None or not is_constant(axes) or read(axes).reshape(-1).tolist() not in ([-1], [None if rank is None else rank - 1]):
        return False
    square = walk.step(reduce.inputs[0], ("", "Mul"), ("", "Pow"))
    if square is None or walk.source(square.inputs[0]) is not x:
        return False
    return _holds(square.inputs[1], 2.0) if square.op_type == "Pow" else walk.source(square.inputs[1]) is x


def _number(value: ir.Value | None) -> float | None:
    if value is None or not is_constant(value):
        return None
    values = read(value)
    return float(values.reshape(-1)[0]) if values.size == 1 else None


def _holds(value: ir.Value | None, number: float) -> bool:
    return _number(value) == number


def _fits(walk: Walk, x: ir.Value, gamma: ir.Value) -> bool:
    """Whether the ops take these: one type, and a gain per column."""
    if x.dtype != walk.dtype or x.shape is None or not len(x.shape) or not is_constant(gamma) or not gamma.is_initializer():
        return False
    return gamma.dtype == x.dtype and shape_of(gamma) == (x.shape[-1],)


def _are_summands(flat: ir.Node, add: ir.Node) -> bool:
    """Whether the first two inputs are activations of one type and shape, and all else that ``flat`` reads is there before them."""
    if not all(value is not None and value.is_initializer() for value in flat.inputs[1:]):
        return False
    first, second = add.inputs[:2]
    if first is None or second is None or is_constant(first) or is_constant(second) or first.dtype != second.dtype:
        return False
    return first.dtype == add.outputs[0].dtype and _same(first.shape, second.shape)


def _same(first: Iterable[int | ir.SymbolicDim] | None, second: Iterable[int | ir.SymbolicDim] | None) -> bool:
    """Whether two shapes are known to be equal."""
    if first is None or second is None:
        return False
    sizes, others = ([dim if isinstance(dim, int) else dim.value for dim in shape] for shape in (first, second))
    return None not in sizes and sizes == others


def _fuse(norm: _Norm, names: Names) -> None:
    flat = norm.flat
    _, left, right, clip = flat.inputs
    assert left is not None and right is not None and clip is not None  # noqa: PT018
    for node in norm.nodes:
        names.release_node(node)
        for value in node.outputs:
            names.release_value(value.name)
    # The sum's other readers come after the node that adds, not after the quantizer.
    insert = Insertion(norm.anchor, names, flat.metadata_props)
    q, scale, *total = insert.add(
        rms_norm_flat_quantize_node(
            norm.x,
            norm.gamma,
            left,
            right,
            clip,
            residual=norm.residual,
            epsilon=norm.epsilon,
            bits=flat.attributes.get_int("bits", 4),
            packed=bool(flat.attributes.get_int("packed", 0)),
            name=flat.name or "flat_quantize",
        )
    )
    replaced = [(flat.outputs[0], q), (flat.outputs[1], scale)]
    if norm.total is not None and (norm.total.uses() or norm.total.is_graph_output()):  # else it may have no name
        replaced.append((norm.total, total[0]))
    for old, new in replaced:
        take_over(old, new, ())
    insert.graph.remove(list(norm.nodes), safe=True)  # what only they read goes with RemoveUnusedNodesPass
