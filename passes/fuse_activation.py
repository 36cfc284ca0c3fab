"""A gated activation into the quantizer behind it: ``Split``, SiLU, ``Mul`` and ``FlatQuantize`` as one ``SiluMulFlatQuantize``.

Behind ``fqonnx.passes.fuse`` gate and up are the halves of one product's output, or an exporter had merged them already. The op reads that
output itself; between the two products nothing else goes through memory. What is recognised:

    h = silu(gate) * up, with silu(v) as v * Sigmoid(v), com.microsoft's QuickGelu with alpha 1, or Swish with alpha 1

in any order of operands and of the halves, with or without casts to fp32 and back, where nothing else reads a value on the way. The op
computes in fp32 and rounds once, where the nodes that it replaces rounded up to three times.

A channel scale between ``h`` and its quantizer is a factor of ``up`` as well: it goes into the scales and the bias of the product's rows.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fqonnx.ops import DOMAIN, FLOAT_TYPES, add_functions, silu_mul_flat_quantize_node
from fqonnx.passes.constants import is_constant, read, read_tensor, shape_of
from fqonnx.passes.edit import Insertion, Names, last_dim, take_over
from fqonnx.passes.walk import Walk

logger = logging.getLogger(__name__)

HALVES_TAG = "fqonnx.halves"
"""Key of a ``SiluMulFlatQuantize``'s metadata: the names that the halves of its input had, as a JSON list; null where a channel scale went
into a half, which is then not what it was."""

LARGEST_FACTOR = 64.0
"""A channel scale multiplies a half in fp16 by no more than this: where the gate is shut ``up`` is larger than ``h``, and would leave
fp16's range from 1,024 on."""


class FuseActivation(ir.passes.InPlacePass):
    """Replaces each gated activation that only a ``FlatQuantize`` reads, with that."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse in every graph, subgraphs included; ``modified`` is whether anything matched."""
        names = Names(model)
        modified = False
        for graph in model.graphs():
            for flat in [node for node in graph if (node.domain, node.op_type) == (DOMAIN, "FlatQuantize")]:
                gated = _match(flat)
                if gated is not None and (gated.inverse is None or _fold(gated, names)):
                    _fuse(gated, names)
                    modified = True
        if modified:
            add_functions(model)
        return ir.passes.PassResult(model, modified)


def with_halves(model: ir.Model) -> ir.Model:
    """A model that computes the halves again, under the names they had, for whoever compares them.

    Args:
        model: Left as it is; weights are shared with the result.

    Returns:
        ``model`` itself where no activation was fused in its main graph.
    """
    if not any(HALVES_TAG in node.metadata_props for node in model.graph):
        return model
    model = model.clone()
    for node in [node for node in model.graph if HALVES_TAG in node.metadata_props]:
        (merged, *_), halves = node.inputs, json.loads(node.metadata_props[HALVES_TAG])
        assert merged is not None
        split = ir.node("Split", [merged], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{node.name}/halves")
        for output, name in zip(split.outputs, halves, strict=True):
            output.name = name or f"{split.name}.scaled"
            output.type = merged.type
            half = merged.shape[-1] if merged.shape is not None else None
            output.shape = last_dim(merged.shape, half // 2) if isinstance(half, int) else None
        model.graph.insert_before(node, split)
    return model


@dataclass(frozen=True, eq=False)
class _Gated:
    """A match: what is read, and the nodes from ``split`` to ``flat`` that nothing else needs."""

    flat: ir.Node
    split: ir.Node
    gate: int
    inverse: ir.Value | None
    nodes: frozenset[ir.Node]

    @property
    def merged(self) -> ir.Value:
        """Gate and up, ``[.., 2 K]``."""
        merged = self.split.inputs[0]
        assert merged is not None
        return merged

    @property
    def name(self) -> str:
        return self.flat.name or "flat_quantize"


def _silu(walk: Walk, value: ir.Value | None) -> ir.Value | None:
    """What ``value`` is the SiLU of."""
    for kind, alpha in ((("com.microsoft", "QuickGelu"), 1.702), (("", "Swish"), 1.0)):
        if (node := walk.step(value, kind)) is not None:
            return walk.source(node.inputs[0]) if node.attributes.get_float("alpha", alpha) == 1.0 else None
    product = walk.step(value, ("", "Mul"))
    if product is None:
        return None
    for index in (0, 1):
        passed = {*walk.nodes}
        gate, sigmoid = walk.source(product.inputs[1 - index]), walk.step(product.inputs[index], ("", "Sigmoid"))
        if sigmoid is not None and gate is not None and walk.source(sigmoid.inputs[0]) is gate:
            return gate
        walk.nodes = passed
    return None


def _match(flat: ir.Node) -> _Gated | None:
    x = flat.inputs[0]
    if x is None or x.dtype not in FLOAT_TYPES:
        return None
    walk = Walk(flat, x.dtype)
    product = walk.step(x, ("", "Mul"))
    if product is None:
        return None
    inverse, scaled = walk.constant_and_other(product)
    if inverse is not None:
        product = walk.step(scaled, ("", "Mul"))
        if product is None:
            return None
    passed = {*walk.nodes}
    for index in (0, 1):
        walk.nodes = {*passed}
        gate, up = _silu(walk, product.inputs[index]), walk.source(product.inputs[1 - index])
        split = walk.step(gate, ("", "Split"))
        if gate is None or up is None or split is None or not _halves(split, gate, up) or gate.dtype != x.dtype:
            continue
        if walk.is_closed():
            return _Gated(flat, split, split.outputs.index(gate), inverse, frozenset(walk.nodes))
    return None


def _halves(split: ir.Node, gate: ir.Value, up: ir.Value) -> bool:
    """Whether the two are different halves of the last axis."""
    merged = split.inputs[0]
    if merged is None or merged.shape is None or {gate, up} != set(split.outputs) or len(split.outputs) != 2:
        return False
    if split.attributes.get_int("axis", 0) not in (-1, len(merged.shape) - 1):
        return False
    sizes = split.inputs[1] if len(split.inputs) > 1 else None
    if sizes is None:
        width = merged.shape[-1]
        return isinstance(width, int) and width % 2 == 0
    if not is_constant(sizes):
        return False
    first, second = read(sizes).tolist()
    return bool(first == second)


def _fold(gated: _Gated, names: Names) -> bool:
    """Multiplies the rows of ``up`` in the product before by the channel scale; whether that could be done."""
    gemm, inverse = gated.merged.producer(), gated.inverse
    assert inverse is not None
    if gemm is None or gemm.graph is not gated.flat.graph or (gemm.domain, gemm.op_type) != (DOMAIN, "W4A4Gemm"):
        return False
    y, (w_scale, bias) = gated.merged, gemm.inputs[3:5]
    if y.is_graph_output() or set(y.consumers()) != {gated.split} or w_scale is None or bias is None:
        return False
    shape, n = shape_of(inverse), shape_of(w_scale)
    if not all(is_constant(v) and v.is_initializer() for v in (w_scale, bias)) or not shape or not n or n[0] % 2:
        return False
    half = n[0] // 2
    factors = read(inverse).astype(np.float32)
    if shape[-1] not in (1, half) or factors.size != shape[-1] or not (np.isfinite(factors) & (factors > 0)).all():
        return False
    if y.dtype == ir.DataType.FLOAT16 and factors.max() > LARGEST_FACTOR:
        logger.info("%s: its channel scale stays a node of its own: it divides by %g", gated.name, 1 / factors.max())
        return False
    rows = slice(half * (1 - gated.gate), half * (2 - gated.gate))
    for index, value in ((3, w_scale), (4, bias)):
        tensor = _multiplied(value, np.broadcast_to(factors.reshape(-1), half), rows)
        if set(value.consumers()) == {gemm} and not value.is_graph_output():
            value.const_value = tensor
        else:
            gemm.replace_input_with(index, Insertion(gemm, names, {}).constant(f"{value.name}.scaled", tensor))
    return True


def _multiplied(value: ir.Value, factors: npt.NDArray[np.float32], rows: slice) -> ir.TensorProtocol:
    """An initializer with some rows multiplied, computed when the model is written."""
    stored = value.const_value
    assert stored is not None

    def tensor() -> ir.TensorProtocol:
        result = np.array(read_tensor(stored), np.float32)
        result[rows] *= factors.reshape(-1, *(1 for _ in result.shape[1:]))
        return ir.tensor(result)

    return ir.LazyTensor(tensor, ir.DataType.FLOAT, ir.Shape(stored.shape.numpy()))


def _fuse(gated: _Gated, names: Names) -> None:
    flat, split = gated.flat, gated.split
    _, left, right, clip = flat.inputs
    assert left is not None and right is not None and clip is not None  # noqa: PT018
    halves = [None if gated.inverse is not None and index != gated.gate else v.name for index, v in enumerate(split.outputs)]
    for node in gated.nodes:
        names.release_node(node)
        for value in node.outputs:
            names.release_value(value.name)
    insert = Insertion(flat, names, {**flat.metadata_props, HALVES_TAG: json.dumps(halves)})
    fused = insert.add(
        silu_mul_flat_quantize_node(
            gated.merged,
            left,
            right,
            clip,
            gate=gated.gate,
            bits=flat.attributes.get_int("bits", 4),
            packed=bool(flat.attributes.get_int("packed", 0)),
            name=gated.name,
        )
    )
    for old, new in zip(flat.outputs, fused, strict=True):
        take_over(old, new, ())
    insert.graph.remove(list(gated.nodes), safe=True)  # what only they read goes with RemoveUnusedNodesPass
