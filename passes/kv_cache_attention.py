"""An int8 cache of keys and values where ONNX Runtime's ``GroupQueryAttention`` keeps it: the node's own form, with static scales.

``QuantizeAttentionCache`` gives ``past`` inputs and ``present`` outputs of the graph the type int8 under their names, and the nodes that
read and write them one fp32 scale for each channel of keys and of values: ``x`` is stored as
``clamp(round_half_even(x / scale), -128, 127)`` and read as ``code * scale``, new tokens too (com.microsoft.GroupQueryAttention with
``k_quant_type`` and ``v_quant_type`` of ``PER_CHANNEL``). What a node does beside that stays. It runs before ``LowerAttention``, which
knows both forms.

``with_float_cache`` puts the float interface back around such a model, for comparing it with the float one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fqonnx.errors import ModelError
from fqonnx.ops import CONTRIB
from fqonnx.passes.constants import is_float
from fqonnx.passes.edit import CACHE_TAG, Insertion, Names
from fqonnx.passes.kv_cache import METADATA

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Array = npt.NDArray[np.float32]

BITS = 8
LIMIT = 2 ** (BITS - 1) - 1
"""The largest magnitude of calibration becomes this code; -128 is there for what is larger still."""

_OP = "GroupQueryAttention"
_RANK = 4
_PASTS = {"key": 3, "value": 4}
_PRESENTS = {"key": 1, "value": 2}
_LENGTHS = 5
_SCALES = {"key": 12, "value": 13}
_INPUTS = 14


@dataclass(frozen=True, eq=False)
class AttentionCache:
    """The keys or the values of one ``GroupQueryAttention``.

    Attributes:
        part: ``key`` or ``value``.
        node: The node.
        past: The graph input ``[batch, heads, tokens, size]`` of a float type.
        present: The graph output, likewise; rows behind a sequence's tokens mean nothing.
    """

    part: str
    node: ir.Node
    past: ir.Value
    present: ir.Value

    @property
    def name(self) -> str:
        """Name of the graph input; the model's own name for the cache."""
        return self.past.name or ""

    @property
    def heads(self) -> int:
        """Heads of keys and values."""
        assert self.past.shape is not None
        return int(self.past.shape[1])  # type: ignore[arg-type]  # known: ``find`` has looked

    @property
    def size(self) -> int:
        """Values of one head."""
        assert self.past.shape is not None
        return int(self.past.shape[3])  # type: ignore[arg-type]  # known: ``find`` has looked

    @property
    def lengths(self) -> ir.Value:
        """int32 ``[batch]``: the last row of each sequence that attention reads."""
        value = self.node.inputs[_LENGTHS]
        assert value is not None
        return value


def find(model: ir.Model) -> tuple[AttentionCache, ...]:
    """The caches that ``GroupQueryAttention`` keeps from run to run, keys before values, in graph order; none where no such node has one.

    The model is only looked at.

    Args:
        model: A prepared model (``passes.prepare``).

    Raises:
        ModelError: A cache is not float, not the graph's own input and output of known heads and size, or not the node's alone; or only
            some of the model's keys and values are kept so. The message says which and what to do.
    """
    nodes = [node for node in model.graph.all_nodes() if (node.domain, node.op_type) == (CONTRIB, _OP) and _has_past(node)]
    caches = tuple(_cache(model.graph, node, part) for node in nodes for part in _PASTS)
    if caches:
        known = {cache.past for cache in caches}
        for value in model.graph.inputs:
            if value not in known and value.shape is not None and len(value.shape) == _RANK and "past" in (value.name or "").lower():
                raise _unread(value.name or "", f"it is no cache of {_OP}, as others of the model are")
    return caches


def _has_past(node: ir.Node) -> bool:
    return any(slot < len(node.inputs) and node.inputs[slot] is not None for slot in _PASTS.values())


def _cache(graph: ir.Graph, node: ir.Node, part: str) -> AttentionCache:
    slot = _PASTS[part]
    past = node.inputs[slot] if slot < len(node.inputs) else None
    present = node.outputs[_PRESENTS[part]] if len(node.outputs) > _PRESENTS[part] else None
    if past is None or not past.is_graph_input() or past not in graph.inputs:
        raise _unread(node.name or "", f"its past {part} is no input of the model")
    name = past.name or ""
    if not is_float(past.dtype):
        raise _unread(name, f"it is {past.dtype} already")
    if past.shape is None or len(past.shape) != _RANK or not (isinstance(past.shape[1], int) and isinstance(past.shape[3], int)):
        raise _unread(name, f"its shape {past.shape} does not say how many heads there are, or their size")
    if others := [use for use in past.uses() if use.node.op_type != "Shape" and (use.node, use.idx) != (node, slot)]:
        raise _unread(name, f"{others[0].node.name!r} ({others[0].node.op_type}) reads it too")
    if present is None or not present.is_graph_output():
        raise _unread(name, f"the present {part} of {node.name!r} is no output of the model")
    for reader, _ in present.uses():
        raise _unread(name, f"{reader.name!r} ({reader.op_type}) reads what {node.name!r} makes of it")
    if any(slot < len(node.inputs) and node.inputs[slot] is not None for slot in _SCALES.values()):
        raise _unread(name, f"{node.name!r} has scales already")
    return AttentionCache(part, node, past, present)


def _unread(name: str, why: str) -> ModelError:
    return ModelError(f"--kv cannot quantize {name!r}: {why}: export keys and values as inputs and outputs of the model, or leave out --kv")


class QuantizeAttentionCache(ir.passes.InPlacePass):
    """Makes the caches of ``find`` int8, in the nodes and in the model's interface.

    Args:
        caches: From ``find`` on the very model that the pass is called with.
        scales: By cache name fp32 ``[1, heads, 1, size]``, positive and finite.
    """

    def __init__(self, caches: Sequence[AttentionCache], scales: Mapping[str, Array]) -> None:
        super().__init__()
        self.caches = tuple(caches)
        self.scales = scales

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every cache; ``modified`` is whether there were any.

        Raises:
            ModelError: The model's cache is quantized already.
        """
        if METADATA in model.metadata_props:
            raise ModelError("the model's cache is quantized already: give the float model")
        names = Names(model)
        described = [self._quantize(cache, names) for cache in self.caches]
        if described:
            metadata = {"format": "int8", "scales": "static", "size": self.caches[0].size, "caches": described}
            model.metadata_props[METADATA] = json.dumps(metadata)
        return ir.passes.PassResult(model, bool(described))

    def _quantize(self, cache: AttentionCache, names: Names) -> dict[str, str]:
        node, scale = cache.node, self.scales[cache.name]
        assert scale.shape == (1, cache.heads, 1, cache.size)
        assert np.isfinite(scale).all()
        assert (scale > 0).all()
        float_type = cache.past.dtype
        assert float_type is not None
        node.resize_inputs(max(_INPUTS, len(node.inputs)))
        value = Insertion(node, names, {}).constant(f"{cache.name}.scale", ir.tensor(scale.astype(np.float32)))
        node.replace_input_with(_SCALES[cache.part], value)
        node.attributes[f"{cache.part[0]}_quant_type"] = ir.AttrString(f"{cache.part[0]}_quant_type", "PER_CHANNEL")
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", BITS)
        for side in (cache.past, cache.present):
            side.type = ir.TensorType(ir.DataType.INT8)
        return {"past": cache.name, "present": cache.present.name or "", "scale": value.name or "", "float": float_type.name}


def has_static_scales(model: ir.Model) -> bool:
    """Whether the model's cache was quantized by ``QuantizeAttentionCache``."""
    stored = model.metadata_props.get(METADATA)
    return stored is not None and json.loads(stored).get("scales") == "static"


def with_float_cache(model: ir.Model) -> ir.Model:
    """A model whose cache is int8 with the interface of the float model around it: what comes in is rounded, what goes out is scaled.

    Args:
        model: After ``QuantizeAttentionCache``, and ``LowerAttention`` where that was run; it is left as it is.

    Raises:
        ModelError: Its cache is not quantized so.
    """
    if not has_static_scales(model):
        raise ModelError("the model's cache has no static scales: there is nothing to put back")
    model = model.clone()
    described = json.loads(model.metadata_props.pop(METADATA))
    names, graph = Names(model), model.graph
    first = next(iter(graph))
    last = ir.node("Constant", [], {"value_int": 0}, name=names.for_node("end"))
    graph.append(last)
    for cache in described["caches"]:
        tags, scale = {CACHE_TAG: cache["past"]}, graph.initializers[cache["scale"]]
        codes = next(value for value in graph.inputs if value.name == cache["past"])
        given = next(value for value in graph.outputs if value.name == cache["present"])
        places = list(graph.inputs).index(codes), list(graph.outputs).index(given)
        dtype = ir.DataType[cache["float"]]
        for value in (codes, given):
            value.name = names.for_value(f"{value.name}.stored")
        past = ir.Value(name=cache["past"], type=ir.TensorType(dtype), shape=codes.shape)
        start, end = Insertion(first, names, tags), Insertion(last, names, tags)
        ir.convenience.replace_all_uses_with(codes, _some_rows(start, _quantized(start, past, scale, f"{cache['past']}.outer")))
        y = _dequantized(end, given, scale, dtype, f"{cache['present']}.outer")
        y.name = cache["present"]
        graph.inputs[places[0]], graph.outputs[places[1]] = past, y
    graph.remove(last)
    return model


def _quantized(insert: Insertion, x: ir.Value, scale: ir.Value, name: str) -> ir.Value:
    """``clamp(round_half_even(x / scale), -128, 127)`` as int8."""
    ends = {"low": -LIMIT - 1, "high": LIMIT}
    bounds = [insert.constant(f"{name}.{side}", ir.tensor(np.array(bound, np.float32))) for side, bound in ends.items()]
    wide, single = x, ir.DataType.FLOAT
    if x.dtype != single:
        wide = insert.node("Cast", [x], {"to": single.value}, name=f"{name}.wide", dtype=single, shape=x.shape)
    y = insert.node("Div", [wide, scale], name=f"{name}.scaled", dtype=single, shape=x.shape)
    y = insert.node("Round", [y], name=f"{name}.rounded", dtype=single, shape=x.shape)
    y = insert.node("Clip", [y, *bounds], name=f"{name}.clipped", dtype=single, shape=x.shape)
    return insert.node("Cast", [y], {"to": ir.DataType.INT8.value}, name=f"{name}.codes", dtype=ir.DataType.INT8, shape=x.shape)


def _some_rows(insert: Insertion, codes: ir.Value) -> ir.Value:
    """All rows, of which a runtime does not know beforehand how many.

    ONNX Runtime (1.31) takes present keys and values to be as long as past ones, as they are where they share a buffer: what it computes
    from them would be put where too little room is.
    """
    integer, name = ir.DataType.INT64, codes.name or ""
    rows = insert.node("Shape", [codes], {"start": 2, "end": 3}, name=f"{name}.rows", dtype=integer, shape=ir.Shape([1]))
    first, axis = (insert.constant(f"{name}.{what}", ir.tensor(np.array([at], np.int64))) for what, at in (("first", 0), ("axis", 2)))
    dims = [*codes.shape] if codes.shape is not None else [None] * _RANK
    shape = ir.Shape([*dims[:2], None, dims[3]])
    return insert.node("Slice", [codes, first, rows, axis], name=f"{name}.all", dtype=ir.DataType.INT8, shape=shape)


def _dequantized(insert: Insertion, codes: ir.Value, scale: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    """``code * scale``, rounded once to ``dtype``."""
    single = ir.DataType.FLOAT
    y = insert.node("Cast", [codes], {"to": single.value}, name=f"{name}.float", dtype=single, shape=codes.shape)
    y = insert.node("Mul", [y, scale], name=f"{name}.values", dtype=single, shape=codes.shape)
    if dtype == single:
        return y
    return insert.node("Cast", [y], {"to": dtype.value}, name=f"{name}.narrow", dtype=dtype, shape=codes.shape)
