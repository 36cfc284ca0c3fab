"""A quantized cache of keys and values in the graph's interface, with transforms that make keys and values flat before.

Two passes, so that calibration of the linears sees the model in between:

1. ``TransformCache`` multiplies keys after RoPE by ``P_h`` and queries by ``P_h⁻ᵀ``, and values by ``P_v``, undone behind attention
   (FlatQuant, arXiv 2410.09426, section 3.1). ``P_v`` disappears in the weights of ``v_proj`` and ``o_proj`` where these are linears right
   there, else it is a product of its own. Keys may also be moved by a constant: it adds the same to all scores of a query, which the
   softmax does not see. What the model computes, inputs and outputs included, stays the same.
2. ``QuantizeCache`` gives the cache the type of a ``Format``: an input ``past`` and an output ``present`` of floats become codes of the
   same names, with scales and zero points beside them (``past.scale``, ``past.zero_point``). They hold transformed keys and values.
   Attention reads new tokens, too, as the cache gives them back: how a text is cut into runs makes no difference.

``with_float_cache`` puts the float interface back around such a model, for comparing it with the float one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fqonnx.errors import ModelError
from fqonnx.passes.constants import dtype_of, is_constant, read, shape_of
from fqonnx.passes.edit import CACHE_TAG, Insertion, Names, last_dim
from fqonnx.passes.kv_cache_find import Cache, CacheLayer, find
from fqonnx.passes.kv_cache_formats import FORMATS, Emitter, Format

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "FORMATS",
    "METADATA",
    "Cache",
    "CacheLayer",
    "CacheTransform",
    "QuantizeCache",
    "TransformCache",
    "find",
    "output_importance",
    "with_float_cache",
]

Array = npt.NDArray[np.float32]

METADATA = "fqonnx.kv_cache"
"""Key of the model's metadata: how the cache is stored, as JSON ``{"format", "size", "caches": [{"past", "present"}]}``."""


@dataclass(frozen=True, eq=False)
class CacheTransform:
    """``y = (x - mean) · matrix`` of each head's vectors, row by row.

    Attributes:
        matrix: Invertible, fp32 ``[heads, size, size]``, or ``[1, size, size]`` for all heads.
        mean: fp32 ``[heads, size]``, for keys alone; None for zero.
    """

    matrix: Array
    mean: Array | None = None


@dataclass(frozen=True, eq=False)
class _Pair:
    """A transform ``x · forward - offset`` and what undoes it, ``y · inverse + mean``."""

    forward: Array
    inverse: Array
    mean: Array | None = None

    @classmethod
    def of(cls, transform: CacheTransform) -> _Pair:
        mean = None if transform.mean is None else transform.mean[:, None, :].astype(np.float32)
        matrix = transform.matrix.astype(np.float32)
        return cls(matrix, np.linalg.inv(matrix.astype(np.float64)).astype(np.float32), mean)

    def apply(self, insert: Insertion, x: ir.Value, heads: int | None, name: str) -> ir.Value:
        """Nodes for the transform."""
        y = _product(insert, x, _for_heads(self.forward, heads), name)
        return y if self.mean is None else _moved(insert, "Sub", y, self.mean @ self.forward, f"{name}.moved")

    def undo(self, insert: Insertion, y: ir.Value, heads: int | None, name: str) -> ir.Value:
        """Nodes for what undoes it."""
        x = _product(insert, y, _for_heads(self.inverse, heads), name)
        return x if self.mean is None else _moved(insert, "Add", x, self.mean, f"{name}.moved")


def _for_heads(matrix: Array, heads: int | None) -> Array:
    """``[size, size]`` for all heads, or one for each of ``heads`` that share those of the cache in a row."""
    if len(matrix) == 1:
        shared: Array = matrix[0]
        return shared
    assert heads is not None
    return np.repeat(matrix, heads // len(matrix), axis=0)


class TransformCache(ir.passes.InPlacePass):
    """Inserts ``P_h`` and ``P_v``; the model computes the same as before.

    Args:
        layers: From ``find`` on the very model that the pass is called with. They stay valid.
        transforms: By cache name; what is missing or None is left as it is. One matrix for all heads where ``CacheLayer.query_heads`` is
            None, a mean only for keys where ``CacheLayer.shift_invariant`` holds.
    """

    def __init__(self, layers: Sequence[CacheLayer], transforms: Mapping[str, CacheTransform | None]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.transforms = {name: _Pair.of(transform) for name, transform in transforms.items() if transform is not None}

    def requires(self, model: ir.Model) -> None:
        """The transforms are such as the layers bear.

        Raises:
            onnx_ir.passes.PreconditionError: They are not.
        """
        del model
        for layer in self.layers:
            for cache in (layer.key, layer.value):
                pair = self.transforms.get(cache.name)
                if pair is None:
                    continue
                if len(pair.forward) > 1 and layer.query_heads is None:
                    raise ir.passes.PreconditionError(f"{cache.name!r}: which queries share a head is not known, give one matrix for all")
                if pair.mean is not None and (cache is layer.value or not layer.shift_invariant):
                    raise ir.passes.PreconditionError(f"{cache.name!r} cannot be moved by a mean: attention would see it")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert them; ``modified`` is whether there were any."""
        names = Names(model)
        modified = False
        for layer in self.layers:
            if (pair := self.transforms.get(layer.key.name)) is not None:
                _transform_keys(layer, pair, names)
            if (pair := self.transforms.get(layer.value.name)) is not None:
                _transform_values(layer, pair, names)
            modified |= bool({layer.key.name, layer.value.name} & set(self.transforms))
        return ir.passes.PassResult(model, modified)


def _transform_keys(layer: CacheLayer, pair: _Pair, names: Names) -> None:
    cache = layer.key
    _transform_boundary(cache, pair, names)
    insert = Insertion(cache.concat, names, {CACHE_TAG: cache.name})
    cache.concat.replace_input_with(1, pair.apply(insert, cache.new, cache.heads, f"{cache.name}.transform"))
    insert = Insertion(cache.product, names, {CACHE_TAG: cache.name})
    undo = _for_heads(pair.inverse.mT, layer.query_heads)
    cache.product.replace_input_with(0, _product(insert, layer.queries, undo, f"{cache.name}.queries"))


def _transform_values(layer: CacheLayer, pair: _Pair, names: Names) -> None:
    cache = layer.value
    _transform_boundary(cache, pair, names)
    source = _linear_before(cache.new, cache.size)
    if source is None:
        insert = Insertion(cache.concat, names, {CACHE_TAG: cache.name})
        cache.concat.replace_input_with(1, pair.apply(insert, cache.new, cache.heads, f"{cache.name}.transform"))
    else:
        source.fold_outputs(partial(_columns_times, pair.forward), names)
        output = source.output
        output.name = names.for_value(f"{output.name}.transformed")  # it is not what the float model calls so
    attended = cache.product.outputs[0]
    readers = _linears_behind(attended, cache.size)
    if readers is None:
        after = attended.uses()
        insert = Insertion(_first(cache.product.graph, [node for node, _ in after]), names, {CACHE_TAG: cache.name})
        restored = pair.undo(insert, attended, layer.query_heads, f"{cache.name}.attended")
        for node, index in after:
            node.replace_input_with(index, restored)
    else:
        for reader in readers:
            reader.fold_weight(partial(_rows_times, pair.inverse), names)


def _transform_boundary(cache: Cache, pair: _Pair, names: Names) -> None:
    """The interface stays as it is: what comes in is transformed, what goes out is put back."""
    tags = {CACHE_TAG: cache.name}
    insert = Insertion(cache.concat, names, tags)
    cache.concat.replace_input_with(0, pair.apply(insert, cache.past, cache.heads, f"{cache.name}.past"))
    present = cache.concat.outputs[0]
    graph = insert.graph
    place = list(graph.outputs).index(present)
    name = present.name
    present.name = names.for_value(f"{name}.transformed")
    following = Insertion(_node_after(cache.concat), names, tags)
    restored = pair.undo(following, present, cache.heads, f"{cache.name}.present")
    restored.name = name
    graph.outputs[place] = restored


def _product(insert: Insertion, x: ir.Value, matrix: Array, name: str) -> ir.Value:
    dtype = x.dtype
    assert dtype is not None
    constant = insert.constant(f"{name}.matrix", ir.tensor(np.ascontiguousarray(matrix).astype(dtype.numpy()), dtype=dtype))
    return insert.node("MatMul", [x, constant], name=name, dtype=dtype, shape=x.shape)


def _moved(insert: Insertion, op: str, x: ir.Value, offset: Array, name: str) -> ir.Value:
    dtype = x.dtype
    assert dtype is not None
    constant = insert.constant(f"{name}.offset", ir.tensor(np.ascontiguousarray(offset).astype(dtype.numpy()), dtype=dtype))
    return insert.node(op, [x, constant], name=name, dtype=dtype, shape=x.shape)


def _node_after(node: ir.Node) -> ir.Node:
    """The next node of the graph; attention comes behind every Concat of its cache, so there is one."""
    assert node.graph is not None
    nodes = iter(node.graph)
    for current in nodes:
        if current is node:
            break
    return next(nodes)


def _first(graph: ir.Graph | ir.Function | None, nodes: Sequence[ir.Node]) -> ir.Node:
    assert graph is not None
    wanted = set(nodes)
    return next(node for node in graph if node in wanted)


# --- Folding into linears -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Site:
    """A product with a constant weight, and its bias where it has one.

    Attributes:
        node: ``MatMul`` or ``Gemm``.
        transposed: Whether the weight is ``[N, K]`` instead of ``[K, N]``.
        bias: The node and the index of the input that is the bias.
    """

    node: ir.Node
    transposed: bool
    bias: tuple[ir.Node, int] | None = None

    @property
    def output(self) -> ir.Value:
        """What the linear gives, its bias included."""
        return (self.node if self.bias is None else self.bias[0]).outputs[0]

    def fold_outputs(self, change: Callable[[Array], Array], names: Names) -> None:
        """Apply ``change`` to rows of outputs: the weight as ``[K, N]``, and the bias."""
        self.fold_weight(change, names)
        if self.bias is not None:
            node, index = self.bias
            value, n = node.inputs[index], self.features[0]
            assert value is not None
            _replace_constant(node, index, (n,), partial(_changed_bias, value, n, change), names)

    def fold_weight(self, change: Callable[[Array], Array], names: Names) -> None:
        """Apply ``change`` to the weight as ``[K, N]``."""
        value = self.node.inputs[1]
        shape = None if value is None else shape_of(value)
        assert value is not None
        assert shape is not None
        _replace_constant(self.node, 1, shape, partial(_changed_weight, value, change, transposed=self.transposed), names)

    @property
    def features(self) -> tuple[int, int]:
        """N and K."""
        value = self.node.inputs[1]
        shape = None if value is None else shape_of(value)
        assert shape is not None
        return (shape[0], shape[1]) if self.transposed else (shape[1], shape[0])


def _changed_weight(value: ir.Value, change: Callable[[Array], Array], *, transposed: bool) -> Array:
    weight = read(value).astype(np.float32)
    return change(weight.T).T if transposed else change(weight)


def _changed_bias(value: ir.Value, n: int, change: Callable[[Array], Array]) -> Array:
    row: Array = np.broadcast_to(read(value).astype(np.float32).reshape(1, -1), (1, n))
    changed: Array = change(row)[0]
    return changed


def _replace_constant(node: ir.Node, index: int, shape: tuple[int, ...], compute: Callable[[], Array], names: Names) -> None:
    """A new constant in the place of one; evaluated when it is read, so that no weight is held.

    It takes the name of the old one where that goes with it: linears are named after their weights.
    """
    old = node.inputs[index]
    dtype = None if old is None else dtype_of(old)
    assert old is not None
    assert dtype is not None
    name = old.name or f"{node.name}.constant"

    def evaluate() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(compute()).astype(dtype.numpy()), dtype=dtype, name=name)

    insert = Insertion(node, names, {})
    if old.is_initializer() and len(old.uses()) == 1 and not old.is_graph_output() and old.graph is insert.graph:
        del insert.graph.initializers[name]
        names.release_value(name)
    tensor = ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)
    node.replace_input_with(index, insert.constant(name, tensor))


def _columns_times(matrix: Array, weight: Array) -> Array:
    """``[K, heads * size]`` with each head's columns multiplied by its ``matrix``."""
    rotated: Array = weight.reshape(len(weight), -1, 1, matrix.shape[1]) @ matrix
    return rotated.reshape(weight.shape)


def _rows_times(matrix: Array, weight: Array) -> Array:
    """``[query heads * size, N]`` with each head's rows multiplied by its ``matrix`` from the left."""
    heads = weight.reshape(-1, matrix.shape[1], weight.shape[1])
    rotated: Array = _for_heads(matrix, len(heads)) @ heads
    return rotated.reshape(weight.shape)


def _linear_before(value: ir.Value, size: int) -> _Site | None:
    """The linear whose outputs are the heads ``value`` ``[.., size]``, split and moved about; None where anything else is on the way."""
    while (node := value.producer()) is not None and len(value.uses()) == 1 and not value.is_graph_output() and node.domain == "":
        source = node.inputs[0]
        if _moves(node, size):
            assert source is not None
            value = source
            continue
        bias: tuple[ir.Node, int] | None = None
        if node.op_type == "Add":
            place = next((i for i, operand in enumerate(node.inputs) if is_constant(operand)), None)
            source = None if place is None else node.inputs[1 - place]
            if place is None or source is None or source.is_graph_output() or len(source.uses()) != 1:
                return None
            bias, node = (node, place), source.producer()
        site = None if node is None else _site(node, bias)
        if site is None or site.features[0] % size or not _is_bias(site):
            return None
        return site
    return None


def _linears_behind(value: ir.Value, size: int) -> list[_Site] | None:
    """The linears that read ``value`` ``[.., size]``, its heads moved about and merged; None where anything else does, or nothing."""
    sites: list[_Site] = []
    while not value.is_graph_output():
        uses = value.uses()
        moves = [node for node, index in uses if index == 0 and node.domain == "" and _moves(node, size)]
        if len(moves) == 1 and len(uses) == 1:
            value = moves[0].outputs[0]
            continue
        for node, index in uses:
            site = _site(node, None) if index == 0 else None
            if site is None or site.features[1] % size:
                return None
            sites.append(site)
        return sites or None
    return None


def _moves(node: ir.Node, size: int) -> bool:
    """Whether the node leaves the order of a head's channels as it is, innermost."""
    if node.op_type == "Transpose":
        return _keeps_last(node)
    if node.op_type == "Reshape":
        last = _last(node.outputs[0])
        return last is not None and last % size == 0
    return node.op_type == "Identity"


def _keeps_last(node: ir.Node) -> bool:
    perm = node.attributes.get_ints("perm", None)
    return bool(perm) and perm is not None and perm[-1] == len(perm) - 1


def _last(value: ir.Value) -> int | None:
    dim = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return dim if isinstance(dim, int) else None


def _site(node: ir.Node, bias: tuple[ir.Node, int] | None) -> _Site | None:
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm") or not is_constant(node.inputs[1]):
        return None
    weight = node.inputs[1]
    shape = None if weight is None else shape_of(weight)
    if shape is None or len(shape) != 2 or node.attributes.get_int("transA", 0) != 0:
        return None
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        if bias is not None:
            return None
        bias = (node, 2)
    return _Site(node, bool(node.attributes.get_int("transB", 0)), bias)


def _is_bias(site: _Site) -> bool:
    """Whether the bias, if any, is one row."""
    if site.bias is None:
        return True
    node, index = site.bias
    value = node.inputs[index]
    shape = None if value is None or not is_constant(value) else shape_of(value)
    return shape is not None and all(dim == 1 for dim in shape[:-1]) and (not shape or shape[-1] in (1, site.features[0]))


# --- The interface ------------------------------------------------------------------------------------------------------------------------


class QuantizeCache(ir.passes.InPlacePass):
    """Gives the caches of ``layers`` the type of a format, in the graph and in its interface.

    Args:
        layers: From ``find`` on the very model that the pass is called with, before or after ``TransformCache``.
        form: The format.
    """

    def __init__(self, layers: Sequence[CacheLayer], form: Format) -> None:
        super().__init__()
        self.caches = tuple(cache for layer in layers for cache in (layer.key, layer.value))
        self.form = form

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every cache; ``modified`` is whether there were any.

        Raises:
            ModelError: The cache was quantized before.
        """
        if METADATA in model.metadata_props:
            raise ModelError("the model's cache is quantized already: give the float model")
        names = Names(model)
        presents = [_quantize(cache, self.form, names, model.graph) for cache in self.caches]
        if self.caches:
            caches = [{"past": cache.name, "present": present} for cache, present in zip(self.caches, presents, strict=True)]
            model.metadata_props[METADATA] = json.dumps({"format": self.form.name, "size": self.caches[0].size, "caches": caches})
        return ir.passes.PassResult(model, bool(self.caches))


def _quantize(cache: Cache, form: Format, names: Names, graph: ir.Graph) -> str:
    """Rewrite one cache; the name of its output."""
    past, concat = cache.past, cache.concat
    present = concat.outputs[0]
    output = present if present.is_graph_output() else _restored(present, cache)
    name = output.name or ""
    place_in, place_out = list(graph.inputs).index(past), list(graph.outputs).index(output)
    new = cache.new
    insert = Insertion(concat, names, {CACHE_TAG: cache.name})
    emitter = Emitter(insert, f"{cache.name}.{form.name}", form, cache.dtype, cache.size)
    fresh = emitter.quantize(new)
    pasts: dict[str, ir.Value] = {}
    joined: dict[str, ir.Value] = {}
    past.name, output.name = names.for_value(f"{cache.name}.float"), names.for_value(f"{name}.float")
    for part in form.parts:
        dtype, columns = form.dtype(part, cache.dtype), form.columns(part, cache.size)
        suffix = "" if part == "codes" else f".{part}"
        pasts[part] = ir.Value(name=f"{cache.name}{suffix}", type=ir.TensorType(dtype), shape=last_dim(past.shape, columns))
        joined[part] = insert.node(
            "Concat",
            [pasts[part], fresh[part]],
            {"axis": 2},
            name=f"{cache.name}.{part}",
            dtype=dtype,
            shape=last_dim(output.shape, columns),
        )
        joined[part].name = f"{name}{suffix}"
    graph.inputs[place_in : place_in + 1] = list(pasts.values())
    graph.outputs[place_out : place_out + 1] = list(joined.values())
    dequantized = emitter.dequantize(joined)
    for node, index in present.uses():
        if node.metadata_props.get(CACHE_TAG) != cache.name:
            node.replace_input_with(index, dequantized)
    _remove_back_to(output, present)
    before = concat.inputs[0]
    graph.remove(concat, safe=True)
    _remove_back_to(before, past)
    _shapes_of(past, pasts["codes"], cache.size // form.columns("codes", cache.size), names)
    return name


def _restored(present: ir.Value, cache: Cache) -> ir.Value:
    """The graph output that ``TransformCache`` makes of the transformed cache."""
    value = next(node.outputs[0] for node, _ in present.uses() if node.metadata_props.get(CACHE_TAG) == cache.name)
    while not value.is_graph_output():
        value = next(iter(value.uses())).node.outputs[0]
    return value


def _remove_back_to(value: ir.Value | None, start: ir.Value) -> None:
    """Remove the chain of nodes from ``start`` to ``value``, which nothing reads any more."""
    while value is not None and value is not start:
        node = value.producer()
        assert node is not None
        assert node.graph is not None
        value = node.inputs[0]
        node.graph.remove(node, safe=True)


def _shapes_of(past: ir.Value, codes: ir.Value, packed: int, names: Names) -> None:
    """Let what asks for the shape of the cache ask the codes, which are ``packed`` times narrower."""
    for node, _ in past.uses():
        start, end = node.attributes.get("start"), node.attributes.get("end")
        axes = range(4)[0 if start is None else start.as_int() : 4 if end is None else end.as_int()]
        shape = node.outputs[0]
        node.replace_input_with(0, codes)
        if 3 in axes and packed > 1 and shape.uses():
            insert = Insertion(_first(node.graph, [use.node for use in shape.uses()]), names, {})
            factors = insert.constant(f"{node.name}.unpacked", ir.tensor(np.array([packed if axis == 3 else 1 for axis in axes], np.int64)))
            uses = shape.uses()
            wide = insert.node("Mul", [shape, factors], name=f"{node.name}.columns", dtype=ir.DataType.INT64, shape=shape.shape)
            for reader, index in uses:
                reader.replace_input_with(index, wide)


def with_float_cache(model: ir.Model, transforms: Mapping[str, CacheTransform | None]) -> ir.Model:
    """A model whose cache is quantized, with the interface of the float model around it.

    What comes in is quantized, what goes out is dequantized, and both are in the space of the float model's keys and values.

    Args:
        model: After ``QuantizeCache``; it is left as it is.
        transforms: By cache name, as for ``TransformCache``.

    Raises:
        ModelError: The model's cache is not quantized.
    """
    stored = model.metadata_props.get(METADATA)
    if stored is None:
        raise ModelError("the model's cache is not quantized: there is nothing to put back")
    described = json.loads(stored)
    form = FORMATS[described["format"]]
    model = model.clone()
    del model.metadata_props[METADATA]
    names, graph = Names(model), model.graph
    first = next(iter(graph))
    last = ir.node("Constant", [], {"value_int": 0}, name=names.for_node("end"))
    graph.append(last)
    for cache in described["caches"]:
        transform = transforms.get(cache["past"])
        pair = None if transform is None else _Pair.of(transform)
        tags = {CACHE_TAG: cache["past"]}
        pasts, presents = (_parts(values, cache[side], form) for values, side in ((graph.inputs, "past"), (graph.outputs, "present")))
        dtype, size = pasts["scale"].dtype, described["size"]
        assert dtype is not None
        places = [list(values).index(parts["codes"]) for values, parts in ((graph.inputs, pasts), (graph.outputs, presents))]
        for value in (*pasts.values(), *presents.values()):
            value.name = names.for_value(f"{value.name}.stored")
        start, end = Insertion(first, names, tags), Insertion(last, names, tags)
        past = x = ir.Value(name=cache["past"], type=ir.TensorType(dtype), shape=last_dim(pasts["codes"].shape, size))
        if pair is not None:
            x = pair.apply(start, x, len(pair.forward), f"{cache['past']}.outer")
        for part, value in Emitter(start, f"{cache['past']}.outer", form, dtype, size).quantize(x).items():
            ir.convenience.replace_all_uses_with(pasts[part], value)
        y = Emitter(end, f"{cache['present']}.outer", form, dtype, size).dequantize(presents)
        if pair is not None:
            y = pair.undo(end, y, len(pair.inverse), f"{cache['present']}.outer")
        y.name = cache["present"]
        graph.inputs[places[0] : places[0] + len(form.parts)] = [past]
        graph.outputs[places[1] : places[1] + len(form.parts)] = [y]
    graph.remove(last)
    return model


def _parts(values: Sequence[ir.Value], name: str, form: Format) -> dict[str, ir.Value]:
    by_name = {value.name: value for value in values}
    return {part: by_name[name if part == "codes" else f"{name}.{part}"] for part in form.parts}


def output_importance(layer: CacheLayer) -> Array | None:
    """How errors in values add up behind ``o_proj``: ``Σ W Wᵀ`` over its rows ``W`` ``[size, N]`` of the query heads that share a head.

    Returns:
        fp32 ``[heads, size, size]``, ``[1, size, size]`` where the heads that share one are not known; None where no linear follows.
    """
    size, heads = layer.value.size, layer.value.heads
    readers = _linears_behind(layer.value.product.outputs[0], size)
    if readers is None:
        return None
    total = np.zeros((heads if layer.query_heads else 1, size, size), np.float32)
    for reader in readers:
        value = reader.node.inputs[1]
        assert value is not None
        weight = read(value).astype(np.float32)
        rows = (weight.T if reader.transposed else weight).reshape(-1, size, reader.features[0])
        total += (rows @ rows.mT).reshape(len(total), -1, size, size).sum(1)
    return total
