"""What a graph does with each of its inputs: looks rows up by it, masks with it, counts positions with it.

Found by following the input through the graph. Names only decide between things that the graph cannot tell apart (positions and
segments are rows of a table, as token ids are).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fqonnx.passes.constants import is_float

if TYPE_CHECKING:
    from collections.abc import Iterator

_INTEGERS = frozenset(getattr(ir.DataType, name) for name in ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"))

_CODES: dict[ir.DataType | None, tuple[int, int]] = {ir.DataType.INT8: (-128, 128), ir.DataType.UINT8: (0, 256)}
"""Keys and values that attention keeps as integers: the lowest, and one above the highest."""

_MOVES: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(
        ("Cast", "CastLike", "Clip", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Slice"),
        (0,),
    ),
    **dict.fromkeys(("Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze"), (0,)),
    **dict.fromkeys(("ScatterElements", "ScatterND"), (0, 2)),
    **dict.fromkeys(("Concat", "Max", "Min"), None),
    "Where": (1, 2),
}
"""Operators whose outputs hold values of these inputs, moved but not changed; None is every input."""
_COMPARES = frozenset({"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Xor"})
_SCALES = frozenset({"Div", "Einsum", "MatMul", "Mul"})
_CONTRIB = "com.microsoft"
_TABLES_OF_POSITIONS = {"EmbedLayerNormalization": 3, "GroupQueryAttention": 7}
"""Contrib operators with positions of their own, and the input that has a row for each: an embedding, the cosines of a rotary one."""
_SLOTS: dict[str, dict[tuple[str, str], tuple[int, ...]]] = {
    "mask": {
        ("", "Attention"): (3,),
        (_CONTRIB, "Attention"): (3, 5),
        (_CONTRIB, "DecoderMaskedMultiHeadAttention"): (3, 4),
        (_CONTRIB, "EmbedLayerNormalization"): (7,),
        (_CONTRIB, "GroupQueryAttention"): (10,),
        (_CONTRIB, "MultiHeadAttention"): (4, 5),
    },
    "past": {
        ("", "Attention"): (4, 5),
        (_CONTRIB, "Attention"): (4,),
        (_CONTRIB, "DecoderMaskedMultiHeadAttention"): (5, 6),
        (_CONTRIB, "GroupQueryAttention"): (3, 4),
        (_CONTRIB, "MultiHeadAttention"): (6, 7),
    },
}
"""Inputs of attention operators, by domain and operator: masks and what is added to scores; keys and values of earlier tokens."""
_ROTARY_TABLES = {"": ("RotaryEmbedding", 3, 1), _CONTRIB: ("RotaryEmbedding", 1, 2)}
"""Per domain: operator, slot of the position ids, slot of the table."""


@dataclass(frozen=True)
class InputRole:
    """What an input is for.

    Attributes:
        kind: ``ids`` (rows of a table), ``positions``, ``segments`` (token types), ``mask`` (1 keeps, 0 drops),
            ``additive_mask`` (0 keeps, large negative drops), ``past`` (keys and values of earlier tokens, or codes of them),
            ``kv_lengths`` (last valid index of each sequence), ``kv_total`` (their maximum plus one), ``flag`` (a boolean),
            ``integers`` or ``floats`` (nothing more is known).
        low: Smallest integer that every lookup accepts.
        high: One above the largest; None where nothing bounds it.
    """

    kind: str
    low: int = 0
    high: int | None = None

    @property
    def is_mask(self) -> bool:
        """Whether it says which tokens count."""
        return self.kind in ("mask", "additive_mask")


@dataclass
class _Evidence:
    low: int = 0
    high: int | None = None
    looked_up: bool = False
    masks: bool = False
    adds: bool = False
    rotary: bool = False
    concatenated: bool = False
    slots: set[str] = field(default_factory=set)
    counts: bool = False
    """The values followed are counts: a product with a mask of 0 and 1 keeps them below what they were."""

    def bound(self, rows: int | None, offset: int) -> None:
        self.looked_up = True
        self.low = max(self.low, -offset)
        if rows is not None:
            self.high = rows - offset if self.high is None else min(self.high, rows - offset)


def input_roles(model: ir.Model) -> dict[str, InputRole]:
    """The role of every input of the main graph.

    Args:
        model: A model; local functions and bodies of ``If``, ``Loop`` and ``Scan`` are followed into.

    Returns:
        Roles by input name, in the graph's order, without initializers.
    """
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    return {value.name or "": _role(value, _Walk(model).evidence(value)) for value in inputs}


def padding_mask(model: ir.Model) -> str | None:
    """The input ``[batch, sequence]`` that is zero where a token is padding; None where there is none, or more than one."""
    ranks = {value.name: len(value.shape) for value in model.graph.inputs if value.shape is not None}
    found = [name for name, role in input_roles(model).items() if role.kind == "mask" and ranks.get(name) == 2]
    return found[0] if len(found) == 1 else None


def sequence_limit(model: ir.Model) -> int | None:
    """The longest sequence that tables of positions inside the graph allow; None where nothing in it does.

    Sizes of inputs (``Shape``) are followed into ``Range`` and on to lookups, and into ends of ``Slice`` on constants; running sums
    (``CumSum`` of a mask) likewise.
    """
    walk = _Walk(model)
    evidence = _Evidence(counts=True)
    limits: list[int] = []
    for value in _derived_from_shapes(model, limits):
        walk.follow(value, evidence)
    for node in model.graph.all_nodes():
        # A running sum counts from 1 on, where Range does from 0.
        if node.op_type == "CumSum" and (node.outputs[0].dtype in _INTEGERS or is_float(node.outputs[0].dtype)):
            walk.follow(node.outputs[0], evidence, offset=1)
    if evidence.high is not None:
        limits.append(evidence.high)
    for node in model.graph.all_nodes():
        # These contrib operators count positions themselves: the ids, or what the keys' lengths say.
        table = _TABLES_OF_POSITIONS.get(node.op_type) if node.domain == _CONTRIB else None
        if table is not None and len(node.inputs) > table:
            rows = _size(node.inputs[table], 0)
            limits += [] if rows is None else [rows]
    return min(limits, default=None)


def _role(value: ir.Value, found: _Evidence) -> InputRole:
    name = (value.name or "").lower()
    rank = None if value.shape is None else len(value.shape)
    if value.dtype == ir.DataType.BOOL:
        return InputRole("flag" if not rank else "mask")
    if value.dtype in _CODES and "past" in found.slots:
        return InputRole("past", *_CODES[value.dtype])
    if value.dtype in _INTEGERS:
        return _integer_role(name, found)
    if "past" in found.slots or (found.concatenated and rank is not None and rank >= 3 and ("past" in name or "cache" in name)):
        return InputRole("past")
    if "mask" in found.slots or ("mask" in name and found.adds and not found.masks):
        return InputRole("additive_mask")
    return InputRole("mask" if found.masks and "mask" in name else "floats")


def _integer_role(name: str, found: _Evidence) -> InputRole:
    for slot in ("kv_lengths", "kv_total"):
        if slot in found.slots:
            return InputRole(slot)
    if found.looked_up:
        if found.rotary or "position" in name:
            return InputRole("positions", found.low, found.high)
        if "token_type" in name or "segment" in name:
            return InputRole("segments", found.low, found.high)
        return InputRole("ids", found.low, found.high)
    if found.rotary or "position" in name:
        return InputRole("positions")
    if found.masks or found.slots or "mask" in name:
        return InputRole("mask")
    return InputRole("integers")


class _Walk:
    """Follows a value to everything that reads it, through what moves it, adds a constant to it, and into functions and bodies."""

    def __init__(self, model: ir.Model) -> None:
        self._functions = model.functions
        self._calls: dict[ir.OperatorIdentifier, list[ir.Node]] = {}
        self._bodies: dict[ir.Graph, ir.Node] = {}
        self._function_of: dict[ir.Graph, ir.OperatorIdentifier] = {
            function.graph: identifier for identifier, function in model.functions.items()
        }
        nodes = [*model.graph.all_nodes(), *(node for function in model.functions.values() for node in function.all_nodes())]
        for node in nodes:
            if node.op_identifier() in self._functions:
                self._calls.setdefault(node.op_identifier(), []).append(node)
            for graph in bodies(node):
                self._bodies[graph] = node

    def evidence(self, value: ir.Value) -> _Evidence:
        """What is found on the way from ``value``."""
        found = _Evidence()
        self.follow(value, found)
        return found

    def follow(self, value: ir.Value, found: _Evidence, offset: int = 0) -> None:
        """Add what is found on the way from ``value``, whose values are to be taken ``offset`` larger."""
        seen: set[tuple[ir.Value, int, bool]] = set()
        todo = [(value, offset, False)]
        while todo:
            state = todo.pop()
            if state in seen:
                continue
            seen.add(state)
            current, shift, scaled = state
            for node, index in current.uses():
                todo += self._step(node, index, shift, scaled=scaled, found=found)
            todo += [(output, shift, scaled) for output in self._leaving(current)]

    def _step(self, node: ir.Node, index: int, offset: int, *, scaled: bool, found: _Evidence) -> Iterator[tuple[ir.Value, int, bool]]:
        """What a node's outputs, or its bodies' inputs, hold of the value it reads at ``index``."""
        op = node.op_type
        if node.op_identifier() in self._functions:
            yield (self._functions[node.op_identifier()].inputs[index], offset, scaled)
        elif op in ("Loop", "Scan"):
            body = next(bodies(node))
            shift = len(body.inputs) - len(node.inputs)
            if 0 <= index + shift < len(body.inputs) and not (op == "Loop" and index < 2):
                yield (body.inputs[index + shift], offset, scaled)
        elif scaled:
            yield from self._scaled_step(node, index, offset, found)
        elif not self._looks_up(node, index, offset, found):
            yield from self._plain_step(node, index, offset, found)

    def _plain_step(self, node: ir.Node, index: int, offset: int, found: _Evidence) -> Iterator[tuple[ir.Value, int, bool]]:
        op = node.op_type
        if op in _MOVES and ((slots := _MOVES[op]) is None or index in slots):
            found.concatenated |= op == "Concat"
            for output in node.outputs:
                yield (output, offset, False)
        elif op in _COMPARES or (op == "Where" and index == 0):
            found.masks = True
        elif op in ("Add", "Sub"):
            other = node.inputs[1 - index]
            constant = _scalar(other)
            if op == "Sub" and index == 1:
                found.masks |= constant == 1
                yield (node.outputs[0], 0, True)
            elif constant is None:
                found.adds = True
            elif float(constant).is_integer():
                yield (node.outputs[0], offset + (int(constant) if op == "Add" else -int(constant)), False)
        elif op in _SCALES:
            masked = found.counts and op == "Mul" and _scalar(node.inputs[1 - index]) is None
            yield (node.outputs[0], offset, False) if masked else (node.outputs[0], 0, True)
        elif op in ("CumSum", "ReduceSum", "ReduceMax", "ReduceMin"):
            found.masks = True
        elif op in ("Cos", "Sin"):
            found.rotary = True
        else:
            found.slots |= {kind for kind, slots in _SLOTS.items() if index in slots.get(_key(node), ())}

    @staticmethod
    def _scaled_step(node: ir.Node, index: int, offset: int, found: _Evidence) -> Iterator[tuple[ir.Value, int, bool]]:
        """Behind a product the values themselves are gone: only angles of rotary positions and added masks are still told apart."""
        op = node.op_type
        if op in ("Cos", "Sin"):
            found.rotary = True
        elif op in _SCALES or (op in _MOVES and ((slots := _MOVES[op]) is None or index in slots)):
            if op not in ("MatMul", "Einsum") or found.masks is False:
                for output in node.outputs:
                    yield (output, offset, True)
        elif op == "Where" and index == 0:
            found.masks = True

    @staticmethod
    def _looks_up(node: ir.Node, index: int, offset: int, found: _Evidence) -> bool:
        """Whether the node takes the value as an index; bounds it by the table's rows then."""
        domain, op = _key(node)
        table: ir.Value | None = None
        axis = 0
        if op in ("Gather", "GatherElements", "ScatterElements", "GatherBlockQuantized") and index == 1:
            table = node.inputs[0]
            axis = node.attributes["gather_axis" if op == "GatherBlockQuantized" else "axis"].as_int() if node.attributes else 0
        elif op in ("GatherND", "ScatterND") and index == 1:
            sizes = [_size(node.inputs[0], place) for place in range(_rank(node.inputs[0]))]
            found.bound(min((size for size in sizes if size is not None), default=None), offset)
            return True
        elif op == "OneHot" and index == 0:
            depth = _scalar(node.inputs[1])
            found.bound(None if depth is None else int(depth), offset)
            return True
        elif op == "EmbedLayerNormalization" and domain == _CONTRIB and index in (0, 1, 8):
            table = node.inputs[{0: 2, 1: 4, 8: 3}[index]]
        elif op == "GroupQueryAttention" and index in (5, 6):
            found.slots.add("kv_lengths" if index == 5 else "kv_total")
            return True
        elif domain in _ROTARY_TABLES and (op, index) == _ROTARY_TABLES[domain][:2]:
            table = node.inputs[_ROTARY_TABLES[domain][2]]
            found.rotary = True
        else:
            return False
        found.bound(_size(table, axis), offset)
        return True

    def _leaving(self, value: ir.Value) -> Iterator[ir.Value]:
        """Where a value that is an output of a body or a function comes out."""
        if not value.is_graph_output() or value.graph is None:
            return
        graph = value.graph
        places = [place for place, output in enumerate(graph.outputs) if output is value]
        if graph in self._function_of:
            callers = self._calls.get(self._function_of[graph], [])
            skipped = 0
        elif graph in self._bodies:
            callers = [self._bodies[graph]]
            skipped = 1 if callers[0].op_type == "Loop" else 0  # a Loop's body gives its condition first
        else:
            return
        for place in places:
            for caller in callers:
                if 0 <= place - skipped < len(caller.outputs):
                    yield caller.outputs[place - skipped]


def _key(node: ir.Node) -> tuple[str, str]:
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in a node's attributes."""
    for attr in node.attributes.values():
        if attr.is_ref():
            continue
        if attr.type == ir.AttributeType.GRAPH:
            yield attr.as_graph()
        elif attr.type == ir.AttributeType.GRAPHS:
            yield from attr.as_graphs()


def _derived_from_shapes(model: ir.Model, limits: list[int]) -> Iterator[ir.Value]:
    """Values of ``Range`` over sizes of inputs; ends of slices of constants go to ``limits``."""
    sizes = {node.outputs[0] for node in model.graph.all_nodes() if node.op_type in ("Shape", "Size")}
    todo = list(sizes)
    while todo:
        value = todo.pop()
        for node, index in value.uses():
            if node.op_type == "Range":
                yield node.outputs[0]
            elif node.op_type == "Slice" and index == 2:
                limits += _slice_limit(node)
            elif node.op_type in ("Add", "Sub") and _scalar(node.inputs[1 - index]) is None:
                continue
            elif node.op_type in ("Add", "Sub") or (node.op_type in _MOVES and index == 0) or node.op_type == "Concat":
                for output in node.outputs:
                    if output not in sizes:
                        sizes.add(output)
                        todo.append(output)


def _slice_limit(node: ir.Node) -> list[int]:
    data = node.inputs[0]
    if data is None or _constant(data) is None:
        return []
    axes = _array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else np.zeros(1)
    if axes is None:
        return []
    found = [_size(data, int(axis)) for axis in axes.reshape(-1)]
    return [size for size in found if size is not None and size > 1]


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant":
        return None
    attr = node.attributes.get("value")
    return attr.as_tensor() if attr is not None and not attr.is_ref() else None


def _array(value: ir.Value | None) -> np.ndarray[Any, np.dtype[Any]] | None:
    tensor = _constant(value)
    return None if tensor is None or tensor.dtype == ir.DataType.STRING else tensor.numpy()


def _scalar(value: ir.Value | None) -> float | None:
    """The one value of a constant; None for anything else."""
    tensor = _constant(value)
    if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
        return None
    return float(tensor.numpy().astype(np.float64).reshape(()))


def _rank(value: ir.Value | None) -> int:
    return 0 if value is None or value.shape is None else len(value.shape)


def _size(value: ir.Value | None, axis: int) -> int | None:
    """A value's size along an axis, looked up behind what only changes its type where nothing was inferred."""
    while value is not None:
        shape = value.shape if value.shape is not None else None if value.const_value is None else value.const_value.shape
        if shape is not None and -len(shape) <= axis < len(shape) and isinstance(shape[axis], int):
            size = shape[axis]
            assert isinstance(size, int)
            return size
        node = value.producer()
        if node is None or node.op_type not in ("Cast", "CastLike", "DequantizeLinear", "Identity"):
            return None
        value = node.inputs[0]
    return None
