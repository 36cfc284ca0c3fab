"""Find the keys and values that a decoder takes from earlier tokens and gives to later ones, and the attention that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from fqonnx.errors import ModelError
from fqonnx.passes.constants import is_constant, is_float

if TYPE_CHECKING:
    from collections.abc import Iterator

_TOKENS = 2
"""The axis of tokens in ``[batch, heads, tokens, size]``."""
_RANK = 4
_FUSED = {
    ("", "Attention"): (4, 5),
    ("com.microsoft", "Attention"): (4,),
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): (5, 6),
    ("com.microsoft", "DecoderMaskedSelfAttention"): (4,),
    ("com.microsoft", "GroupQueryAttention"): (3, 4),
    ("com.microsoft", "MultiHeadAttention"): (6, 7),
    ("com.microsoft", "PagedAttention"): (3, 4),
    ("com.microsoft", "SparseAttention"): (3, 4),
}
"""Operators that hold the whole attention, and their inputs that are keys and values of earlier tokens."""
_VIEWS = frozenset({"Identity", "Unsqueeze", "Squeeze", "Expand", "Tile"})
"""What repeats heads, or leaves the last two axes alone."""


@dataclass(frozen=True, eq=False)
class Cache:
    """The keys or the values of one layer: ``present = Concat(past, new)`` along the tokens.

    Attributes:
        name: Name of the graph input ``past``; the model's own name for it.
        past: The graph input, ``[batch, heads, tokens, size]``.
        concat: The node that appends the new tokens; its second input is those, its output the graph output.
        product: The matrix product of attention that reads the cache as its second operand.
        interleaved: Whether query heads ``h n .. h n + n - 1`` read head ``h`` of the cache, as far as the graph tells.
    """

    name: str
    past: ir.Value
    concat: ir.Node
    product: ir.Node
    interleaved: bool

    @property
    def heads(self) -> int:
        """Heads of keys and values."""
        assert self.past.shape is not None
        heads = self.past.shape[1]
        assert isinstance(heads, int)
        return heads

    @property
    def size(self) -> int:
        """Values of one head."""
        assert self.past.shape is not None
        size = self.past.shape[3]
        assert isinstance(size, int)
        return size

    @property
    def dtype(self) -> ir.DataType:
        """The cache's float type."""
        assert self.past.dtype is not None
        return self.past.dtype

    @property
    def new(self) -> ir.Value:
        """What the tokens of this run add."""
        value = self.concat.inputs[1]
        assert value is not None
        return value


@dataclass(frozen=True, eq=False)
class CacheLayer:
    """One layer's attention: ``softmax(q · keyᵀ) · value``."""

    key: Cache
    value: Cache
    shift_invariant: bool
    """Whether the scores go into a softmax, scaled and masked at most: the same added to all of them changes nothing."""

    @property
    def queries(self) -> ir.Value:
        """The first operand of ``q · keyᵀ``, ``[.., size]``."""
        value = self.key.product.inputs[0]
        assert value is not None
        return value

    @property
    def query_heads(self) -> int | None:
        """Heads of queries where every ``query_heads / heads`` in a row share a head of the cache; None where that is not known."""
        shape = self.queries.shape
        if not (self.key.interleaved and self.value.interleaved) or shape is None or len(shape) != _RANK:
            return None
        return shape[1] if isinstance(shape[1], int) and shape[1] % self.key.heads == 0 else None


def find(model: ir.Model) -> tuple[CacheLayer, ...]:
    """The layers whose keys and values are passed from run to run, in graph order. The model is only looked at.

    A cache is (1) a float input of rank 4 with known heads and size, (2) read by one ``Concat`` along the tokens, before the new ones, and
    by ``Shape``, (3) whose output is a graph output, and (4) reaches, through what repeats heads or swaps the last two axes, the second
    operand of one ``MatMul``: swapped, that of the scores, which makes it keys; else values. (5) Keys and values of a layer are those
    between whose products lies no other.

    Args:
        model: A prepared model (``passes.prepare``).

    Raises:
        ModelError: There is no cache, or one of another form; the message says which and what to do.
    """
    for node in model.graph.all_nodes():
        slots = _FUSED.get((node.domain, node.op_type), ())
        if any(slot < len(node.inputs) and node.inputs[slot] is not None for slot in slots):
            raise ModelError(
                f"{node.name!r} is {node.op_type}, which keeps its keys and values itself: --kv reads attention in standard operators, "
                "export the model without fused attention (samples/llama.py export --past), or leave out --kv"
            )
    found: dict[str, list[Cache]] = {"key": [], "value": []}
    for value in model.graph.inputs:
        if not _looks_like_past(value):
            continue
        part, cache = _cache(value)
        found[part].append(cache)
    if not found["key"] and not found["value"]:
        raise ModelError(
            "the model takes no past keys and values: export it with them (samples/llama.py export --past, Optimum's "
            "text-generation-with-past), or leave out --kv"
        )
    values = {cache.product: cache for cache in found["value"]}
    layers = [CacheLayer(key, values.pop(_next_product(key, values)), _shift_invariant(key)) for key in found["key"]]
    if values:
        raise ModelError(f"{next(iter(values.values())).name!r} holds values that no keys go with: leave out --kv")
    order = {node: index for index, node in enumerate(model.graph)}
    return tuple(sorted(layers, key=lambda layer: order[layer.key.concat]))


def _looks_like_past(value: ir.Value) -> bool:
    if value.shape is None or len(value.shape) != _RANK or not is_float(value.dtype):
        return False
    return any(node.op_type == "Concat" for node, _ in value.uses()) or "past" in (value.name or "").lower()


def _cache(past: ir.Value) -> tuple[str, Cache]:
    """Whether keys or values, and the cache."""
    name = past.name or ""
    assert past.shape is not None
    concats = [use.node for use in past.uses() if use.node.op_type == "Concat" and use.node.domain == ""]
    others = [use.node for use in past.uses() if use.node.op_type not in ("Concat", "Shape")]
    if not (isinstance(past.shape[1], int) and isinstance(past.shape[3], int)):
        raise _unread(name, f"its shape {past.shape} does not say how many heads there are, or their size")
    if others or len(concats) != 1:
        raise _unread(name, f"it is read by {others[0].op_type if others else f'{len(concats)} Concat'}, not by one Concat with new tokens")
    (concat,) = concats
    if concat.attributes.get_int("axis") not in (_TOKENS, _TOKENS - _RANK) or len(concat.inputs) != 2 or concat.inputs[0] is not past:
        raise _unread(name, f"{concat.name!r} does not append new tokens to it along axis {_TOKENS}")
    present = concat.outputs[0]
    if not present.is_graph_output():
        raise _unread(name, f"what {concat.name!r} makes of it is no output of the model")
    if past.shape[3] % 2:
        raise _unread(name, f"its heads have {past.shape[3]} values, an odd number")
    readers = list(_readers(present, name, past.shape[3]))
    if len(readers) != 1:
        raise _unread(name, f"{len(readers)} matrix products read it, not one")
    ((product, swapped, path),) = readers
    return ("key" if swapped else "value"), Cache(name, past, concat, product, _interleaves(path))


def _readers(value: ir.Value, name: str, size: int) -> Iterator[tuple[ir.Node, bool, tuple[ir.Node, ...]]]:
    """The products that read a cache as their second operand, whether the last two axes are swapped there, and the nodes before them."""
    todo: list[tuple[ir.Value, bool, tuple[ir.Node, ...]]] = [(value, False, ())]
    while todo:
        current, swapped, path = todo.pop()
        for node, index in current.uses():
            op = node.op_type if node.domain == "" else f"{node.domain}.{node.op_type}"
            output = node.outputs[0]
            if op == "Shape":
                continue
            if op == "MatMul" and index == 1:
                yield node, swapped, path
            elif op in _VIEWS or (op == "Cast" and is_float(output.dtype)) or (op in ("Mul", "Div") and _by_scalar(node, index)):
                todo.append((output, swapped, (*path, node)))
            elif op == "Transpose" and (swap := _swaps_last(node)) is not None:
                todo.append((output, swapped != swap, (*path, node)))
            elif op == "Reshape" and index == 0 and output.shape is not None and output.shape[-2 if swapped else -1] == size:
                todo.append((output, swapped, (*path, node)))
            else:
                raise _unread(name, f"{node.name!r} ({op}) reads it, which is no step to a matrix product")


def _interleaves(path: tuple[ir.Node, ...]) -> bool:
    """Whether heads are left alone, or repeated one by one: a new axis behind theirs, expanded, and merged into them."""
    moves = [node for node in path if node.op_type in ("Unsqueeze", "Squeeze", "Expand", "Tile", "Reshape")]
    if not moves:
        return True
    if [node.op_type for node in moves] != ["Unsqueeze", "Expand", "Reshape"]:
        return False
    axes = moves[0].inputs[1]
    return axes is not None and axes.const_value is not None and axes.const_value.numpy().reshape(-1).tolist() in ([2], [-3])


def _swaps_last(node: ir.Node) -> bool | None:
    """Whether a ``Transpose`` swaps the last two axes; None where it moves others into their place."""
    perm = list(node.attributes.get_ints("perm", ()))
    rank = len(perm)
    if set(perm[-2:]) != {rank - 1, rank - 2}:
        return None
    return perm[-1] != rank - 1


def _by_scalar(node: ir.Node, index: int) -> bool:
    other = node.inputs[1 - index]
    tensor = None if other is None else other.const_value
    return is_constant(other) and tensor is not None and tensor.size == 1 and not (node.op_type == "Div" and index == 1)


def _next_product(key: Cache, values: dict[ir.Node, Cache]) -> ir.Node:
    """The product with values behind the scores of these keys."""
    todo, seen = list(key.product.outputs), set[ir.Value]()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for node, index in current.uses():
            if node.op_type == "MatMul":
                if index == 0 and node in values:
                    return node
            else:
                todo += node.outputs
    raise _unread(key.name, "no matrix product with values of earlier tokens follows the scores")


def _shift_invariant(key: Cache) -> bool:
    """Whether every way from the scores leads, by scaling with a constant and adding masks, into a softmax over the keys."""
    todo = list(key.product.outputs)
    while todo:
        current = todo.pop()
        if current.is_graph_output() or not current.uses():
            return False
        for node, index in current.uses():
            op = node.op_type
            if op == "Softmax":
                rank = None if current.shape is None else len(current.shape)
                if node.attributes.get_int("axis", -1) not in (-1, None if rank is None else rank - 1):
                    return False
            elif (
                op in ("Add", "Identity")
                or (op == "Cast" and is_float(node.outputs[0].dtype))
                or (op in ("Mul", "Div") and _by_scalar(node, index))
                or (op == "Where" and index > 0)
            ):
                todo += node.outputs
            else:
                return False
    return True


def _unread(name: str, why: str) -> ModelError:
    return ModelError(f"--kv cannot quantize {name!r}: {why}: export attention in standard operators, or leave out --kv")
