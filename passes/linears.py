"""Find the linears of a prepared model: every matrix product with a constant weight, as real exporters write it."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from fqonnx.passes.apart import set_apart
from fqonnx.passes.constants import dtype_of, is_constant, is_float, read, shape_of, sources
from fqonnx.passes.edit import CACHE_TAG
from fqonnx.passes.groups import Array, LeftInFloat, Linear, LinearGroup, Linears
from fqonnx.passes.norms import find_site
from fqonnx.recipe import FLOAT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fqonnx.recipe import Recipe

MIN_FEATURES = 32
"""Linears narrower than this in K or N stay in float: what they cost is not worth an online transform."""

_MAX_NAMED = 6
"""Linears that a group's name spells out; cross attention can make groups of dozens."""


@dataclass(frozen=True, eq=False)
class _Product:
    """A matrix product ``output = alpha · input · W (+ beta · C)`` with a constant 2-D weight."""

    node: ir.Node
    input: ir.Value
    weight: ir.Value
    transposed: bool
    alpha: float = 1.0
    bias: ir.Value | None = None
    beta: float = 1.0


def find(model: ir.Model, *, keep: Sequence[str] = (), quantize_head: bool = False, group_size: int = 0) -> Linears:
    """Find what can be quantized and say why the rest cannot. The model is only looked at; no weight is read.

    A product becomes a ``Linear`` when (1) it is in the main graph, (2) one operand is a 2-D constant expression on the weight's side,
    (3) nothing asks for it to stay in float. A constant bias added to its result, on either side, is part of it when nothing else reads
    the bare product.

    Args:
        model: A prepared model (``passes.prepare``).
        keep: Regular expressions (``re.search``) on linear names or node names; what matches stays in float.
        quantize_head: Take the vocabulary projection too: a linear that shares its weight with an embedding table, or has its shape.
        group_size: Weights along K that share a scale; linears whose K it does not divide stay in float. 0 is per channel.

    Returns:
        Groups in graph order, and everything left in float with its reason: each matrix product of the model is in exactly one.
    """
    tables = _embedding_tables(model)
    bodies = _bodies(model)
    names = _Names()
    linears: list[Linear] = []
    left: list[LeftInFloat] = []
    for node in model.graph.all_nodes():
        matcher = _MATCHERS.get((node.domain, node.op_type))
        if matcher is None or CACHE_TAG in node.metadata_props:
            continue
        name = names.unique(_readable_name(node), node)
        found = matcher(node)
        reason = _kept(keep, name, node)
        if node.graph is not model.graph and isinstance(node.graph, ir.Graph):
            owner = bodies[node.graph]
            reason = f"in the body of {owner.op_type} {owner.name!r}"
        if isinstance(found, str):
            left.append(LeftInFloat(name, node.op_type, reason or found, _constant_shape(node)))
            continue
        reason = reason or _objection(found, group_size) or (None if quantize_head else _head(found, tables))
        if reason is None:
            linears.append(_linear(name, found))
        else:
            left.append(LeftInFloat(name, node.op_type, reason, _constant_shape(node)))
    return Linears(_groups(linears), tuple(left))


def find_for(model: ir.Model, recipe: Recipe) -> Linears:
    """What a build by ``recipe`` quantizes: ``find``, less the groups that the recipe gives the scheme ``float``."""
    found = find(model, keep=recipe.keep, quantize_head=recipe.quantize_head, group_size=recipe.group_size)
    kept = [group for group in found.groups if recipe.scheme_of(group.name) == FLOAT]
    left = [
        LeftInFloat(linear.name, linear.nodes[0].op_type, "its group is given the scheme float", _constant_shape(linear.nodes[0]))
        for group in kept
        for linear in group.linears
    ]
    return Linears(tuple(group for group in found.groups if group not in kept), (*found.left_in_float, *left))


# --- Products: one matcher per op, each a _Product or the reason why the op is none -----------------------------------------------------


def _matmul(node: ir.Node) -> _Product | str:
    return _from_operands(node, node.inputs[0], node.inputs[1])


def _fused_matmul(node: ir.Node) -> _Product | str:
    attributes = node.attributes
    if any(attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")):
        return "FusedMatMul transposes its input: export without ONNX Runtime's graph optimizations"
    transposed = bool(attributes.get_int("transB", 0))
    return _from_operands(node, node.inputs[0], node.inputs[1], transposed=transposed, alpha=attributes.get_float("alpha", 1.0))


def _gemm(node: ir.Node) -> _Product | str:
    attributes = node.attributes
    transposed = bool(attributes.get_int("transB", 0))
    product = _from_operands(node, node.inputs[0], node.inputs[1], transposed=transposed, alpha=attributes.get_float("alpha", 1.0))
    if isinstance(product, str):
        return product
    if attributes.get_int("transA", 0):
        return "Gemm transposes its input (transA=1)"
    c = node.inputs[2] if len(node.inputs) > 2 else None
    beta = attributes.get_float("beta", 1.0)
    if c is None or beta == 0.0:
        return product
    if not is_constant(c):
        return "Gemm adds a value computed at run time (C)"
    if not _is_bias(c, _features(product)[0], rank=2):
        return f"Gemm adds a full matrix (C of shape {list(shape_of(c) or ())})"
    return replace(product, bias=c, beta=beta)


def _einsum(node: ir.Node) -> _Product | str:
    """``..k,kn->..n`` and ``..k,nk->..n``, letters free, operands in either order."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    if len(node.inputs) != 2 or "->" not in equation:
        return f"Einsum {equation!r} is not a linear of two operands"
    terms, output = equation.split("->")
    x, w = zip(node.inputs, terms.split(","), strict=True)
    if is_constant(x[0]):
        x, w = w, x
    contracted = x[1][-1:]
    if is_constant(w[0]) and len(w[1]) == 2 and contracted in w[1] and len(set(w[1])) == 2:
        produced = w[1].replace(contracted, "")
        if output == x[1][:-1] + produced and produced not in x[1] and x[1].count(contracted) == 1:
            return _from_operands(node, x[0], w[0], transposed=w[1][1] == contracted)
    if not is_constant(w[0]) and not is_constant(x[0]):
        return _ACTIVATIONS
    return f"Einsum {equation!r} is not a plain linear"


def _from_operands(
    node: ir.Node, x: ir.Value | None, w: ir.Value | None, *, transposed: bool = False, alpha: float = 1.0
) -> _Product | str:
    assert x is not None
    assert w is not None
    if is_constant(x):
        return "both operands are constants" if is_constant(w) else "the weight is on the left side"
    if not is_constant(w):
        return _run_time_weight(w)
    shape = shape_of(w)
    if x.shape is not None and len(x.shape) == 1:
        return "its input is a vector"
    if shape is None:
        return "the weight's shape is unknown"
    if len(shape) > 2:
        return f"batched weights of shape {list(shape)} (experts)"
    if len(shape) < 2:
        return "the weight is a vector"
    return _Product(node, x, w, transposed, alpha)


_ACTIVATIONS = "both operands are activations"


def _run_time_weight(value: ir.Value) -> str:
    """Tell an attention product from a weight that the model computes in a way that ``constants`` does not evaluate."""
    seen: set[ir.Value] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        node = current.producer()
        if node is None:
            if not current.is_initializer() or current.is_graph_input():
                return _ACTIVATIONS
        else:
            pending.extend(operand for operand in node.inputs if operand is not None)
    producer = value.producer()
    return f"the weight is computed at run time by {producer.op_type if producer else 'an unknown node'}: fold constants before exporting"


def _always(reason: str) -> Callable[[ir.Node], _Product | str]:
    return lambda _node: reason


_MATCHERS: dict[tuple[str, str], Callable[[ir.Node], _Product | str]] = {
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "Einsum"): _einsum,
    ("com.microsoft", "FusedMatMul"): _fused_matmul,
    ("com.microsoft", "TransposeMatMul"): _always("TransposeMatMul is not read: export without ONNX Runtime's graph optimizations"),
    ("com.microsoft", "FusedGemm"): _always("FusedGemm holds an activation function: export without ONNX Runtime's graph optimizations"),
    ("com.microsoft", "GemmFastGelu"): _always(
        "GemmFastGelu holds an activation function: export without ONNX Runtime's graph optimizations"
    ),
    ("com.microsoft", "Attention"): _always("Attention holds its projections: export without ONNX Runtime's graph optimizations"),
    ("com.microsoft", "MoE"): _always("batched weights (experts)"),
    ("", "MatMulInteger"): _always("an integer product"),
    ("", "QLinearMatMul"): _always("an integer product"),
    ("", "Conv"): _always("a convolution"),
    ("", "ConvTranspose"): _always("a convolution"),
    ("", "LSTM"): _always("a recurrent layer"),
    ("", "GRU"): _always("a recurrent layer"),
    ("", "RNN"): _always("a recurrent layer"),
}
"""Every op that multiplies by a matrix. A new form of linear is a new line here."""


# --- From product to linear ----------------------------------------------------------------------------------------------------------


def _features(product: _Product) -> tuple[int, int]:
    """N and K."""
    shape = shape_of(product.weight)
    assert shape is not None
    return (shape[0], shape[1]) if product.transposed else (shape[1], shape[0])


def _linear(name: str, product: _Product) -> Linear:
    n, k = _features(product)
    output = product.node.outputs[0]
    nodes: tuple[ir.Node, ...] = (product.node,)
    bias, scale = product.bias, product.beta
    if bias is None and (added := _bias_add(product.node, n)) is not None:
        add, bias = added
        nodes, output, scale = (product.node, add), add.outputs[0], 1.0
    return Linear(
        name=name,
        input=product.input,
        output=output,
        nodes=nodes,
        out_features=n,
        in_features=k,
        read_weight=partial(_read_weight, product),
        read_bias=partial(_read_bias, bias, n, scale) if bias is not None else None,
    )


def _bias_add(product: ir.Node, n: int) -> tuple[ir.Node, ir.Value] | None:
    """The ``Add`` of a constant bias that is the only reader of a bare product, and that bias."""
    output = product.outputs[0]
    uses = tuple(output.uses())
    if output.is_graph_output() or len(uses) != 1:
        return None
    node = uses[0].node
    if node.op_type != "Add" or node.domain != "" or node.graph is not product.graph:
        return None
    bias = node.inputs[1 - uses[0].idx]
    rank = len(output.shape) if output.shape is not None else 1
    if bias is None or not is_constant(bias) or not _is_bias(bias, n, rank):
        return None
    return node, bias


def _is_bias(value: ir.Value, n: int, rank: int) -> bool:
    """Whether adding the value to ``[.., N]`` of the rank leaves its shape: ``[N]``, ``[1, .., N]``, or one number."""
    shape = shape_of(value)
    return shape is not None and len(shape) <= rank and all(d == 1 for d in shape[:-1]) and (not shape or shape[-1] in (1, n))


def _read_weight(product: _Product) -> Array:
    weight = read(product.weight).astype(np.float32)
    if not product.transposed:
        weight = weight.T
    if product.alpha != 1.0:
        weight = weight * np.float32(product.alpha)
    return np.ascontiguousarray(weight)


def _read_bias(value: ir.Value, n: int, beta: float) -> Array:
    bias = read(value).astype(np.float32).reshape(-1) * np.float32(beta)
    return np.ascontiguousarray(np.broadcast_to(bias, (n,)))


# --- Reasons -------------------------------------------------------------------------------------------------------------------------


def _kept(keep: Sequence[str], name: str, node: ir.Node) -> str | None:
    for pattern in keep:
        if re.search(pattern, name) or re.search(pattern, node.name or ""):
            return f"kept by --keep {pattern}"
    return None


def _bodies(model: ir.Model) -> dict[ir.Graph, ir.Node]:
    """The node that holds each If, Loop or Scan body."""
    owners: dict[ir.Graph, ir.Node] = {}
    for node in model.graph.all_nodes():
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.GRAPH:
                owners[attr.as_graph()] = node
            elif attr.type == ir.AttributeType.GRAPHS:
                owners.update(dict.fromkeys(attr.as_graphs(), node))
    return owners


def _objection(product: _Product, group_size: int) -> str | None:
    n, k = _features(product)
    weight_dtype = dtype_of(product.weight)
    if not is_float(weight_dtype):
        return f"its type is {weight_dtype.name if weight_dtype else 'unknown'}, not fp32, fp16 or bf16"
    if n < MIN_FEATURES or k < MIN_FEATURES:
        return f"too small ({n} x {k}, smaller than {MIN_FEATURES})"
    if group_size and k % group_size:
        return f"--group-size {group_size} does not divide its {k} input features"
    return None


def _embedding_tables(model: ir.Model) -> list[tuple[tuple[int, ...], frozenset[ir.Value]]]:
    """Shape and initializers of every 2-D constant that a ``Gather`` reads rows of by run-time indices."""
    tables = []
    for node in model.graph.all_nodes():
        if node.op_type != "Gather" or node.domain != "" or node.attributes.get_int("axis", 0) != 0:
            continue
        table, ids = node.inputs
        if table is not None and is_constant(table) and not is_constant(ids) and len(shape := shape_of(table) or ()) == 2:
            tables.append((shape, frozenset(sources(table))))
    return tables


def _head(product: _Product, tables: list[tuple[tuple[int, ...], frozenset[ir.Value]]]) -> str | None:
    """Tied by name, or by shape: exporters that transpose a tied weight store it twice.

    By shape only against the tallest table of that width, and only where taller than wide: a square projection may well have the shape of
    a position table.
    """
    own = frozenset(sources(product.weight))
    n, k = _features(product)
    tallest = max((shape[0] for shape, _ in tables if shape[1] == k), default=0)
    if any(own & table for _, table in tables) or (n == tallest and n > k):
        return f"the vocabulary projection ({n} x {k}, as its embedding table): --quantize-head takes it too"
    return None


def _constant_shape(node: ir.Node) -> tuple[int, ...] | None:
    """The shape of the largest constant operand."""
    shapes = [shape for value in node.inputs if value is not None and is_constant(value) and (shape := shape_of(value)) is not None]
    return max(shapes, key=np.prod, default=None)


# --- Names and groups ----------------------------------------------------------------------------------------------------------------


def _readable_name(node: ir.Node) -> str:
    """The module's path where the export tells it, else the weight's or the node's name; a product without weight adds its own name.

    1. torch's dynamo export keeps the module path in the node's metadata;
    2. TorchScript names nodes ``/layers.0/mlp/up/MatMul``;
    3. older ones name nodes ``MatMul_12`` but keep the parameter's name: ``layers.0.mlp.up.weight``.
    """
    own = node.name or ""
    parts = own.strip("/").split("/")
    weights = [value for value in node.inputs if value is not None and is_constant(value)]
    path = _module_path(node)
    if path is None and own.startswith("/") and len(parts) > 1:
        # TorchScript writes a Sequential's child as ``layers/layers.1``.
        scopes = [scope for scope, inner in pairwise(parts) if not inner.startswith(f"{scope}.")]
        path = ".".join(scopes)
    if path is not None:
        return path if weights else f"{path}.{parts[-1]}"
    parameters = [source.name or "" for weight in weights for source in sources(weight)]
    return next((name.removesuffix(".weight") for name in parameters if name.endswith(".weight")), own)


def _module_path(node: ir.Node) -> str | None:
    """From the list of nested scopes that torch writes as text, the last of them the operator's own."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return None
    return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 and scopes[-2] else None


_SCOPES = "pkg.torch.onnx.name_scopes"


class _Names:
    """Hands out each name once; a second taker gets its node's own name behind it."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def unique(self, name: str, node: ir.Node | None = None) -> str:
        candidate = name
        if candidate in self._taken and node is not None:
            candidate = f"{name}.{(node.name or '').strip('/').rsplit('/', 1)[-1]}"
        base, number = candidate, 1
        while candidate in self._taken:
            number += 1
            candidate = f"{base}_{number}"
        self._taken.add(candidate)
        return candidate


def _groups(linears: Sequence[Linear]) -> tuple[LinearGroup, ...]:
    by_input: dict[ir.Value, list[Linear]] = {}
    for linear in linears:
        by_input.setdefault(linear.input, []).append(linear)
    outputs = {node: linear.output for linear in linears for node in linear.nodes}
    graph = linears[0].nodes[0].graph if linears else None
    places = {node: place for place, node in enumerate(graph or ())}
    runs = [run for members in by_input.values() for run in set_apart(members, outputs, places)]
    names = _Names()
    return tuple(
        LinearGroup(
            name=names.unique(_group_name([linear.name for linear in members])),
            input=members[0].input,
            linears=tuple(members),
            norm=find_site(members[0].input, members[0].in_features, [linear.nodes[0] for linear in members]),
        )
        for members in sorted(runs, key=lambda run: places[run[0].nodes[0]])
    )


def _group_name(names: Sequence[str]) -> str:
    """``layers.0.q+k+v``: the shared path once, then what differs."""
    paths = [name.split(".") for name in names]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    rest = [".".join(path[shared:]) for path in paths]
    if len(rest) > _MAX_NAMED:
        rest = [*rest[: _MAX_NAMED - 1], f"{len(rest) - _MAX_NAMED + 1} more"]
    return ".".join([*paths[0][:shared], "+".join(rest)])
