"""ONNX Runtime's attention of decoders to the op of a kernel for single tokens: ``GroupQueryAttention`` of domain ``fqonnx``.

A ``com.microsoft.GroupQueryAttention`` whose form the kernel knows becomes ``fqonnx.GroupQueryAttention``, with the same inputs, outputs
and meaning: its body is the node that it replaces. Where the library of kernels is registered a step of one token runs in the kernel, and
whatever the kernel does not take (a prompt) in ONNX Runtime's own from inside the op; elsewhere the body runs.
"""

from __future__ import annotations

import json
import logging
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from fqonnx.errors import EngineError
from fqonnx.ops import CONTRIB, DOMAIN, add_functions, group_query_attention_node
from fqonnx.ops.kernels import kernel_for
from fqonnx.passes.constants import dtype_of, shape_of
from fqonnx.passes.edit import Insertion, Names, take_over

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fqonnx.ops.kernels import Kernel

logger = logging.getLogger(__name__)

KERNEL_TAG = "fqonnx.kernel"
"""Key of an op's metadata: the kernel that it was made for, as JSON ``{"kernel", "instruction"}``."""

_OP = "GroupQueryAttention"
_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_HEADS = (64, 128)
_TABLES = ("cos_cache", "sin_cache")
_INPUTS = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", *_TABLES)
_SCALES = ("k_scale", "v_scale")
_MORE_INPUTS = ("position_ids", "attention_bias", "head_sink", *_SCALES, "q_norm_weight", "k_norm_weight")
_CACHES = ("past_key", "past_value")
_OPTIONAL = ("key", "value", *_TABLES)
_OUTPUTS = 3
_READ = frozenset({"num_heads", "kv_num_heads", "scale", "do_rotary"})
_QUANTIZED = ("k_quant_type", "v_quant_type", "kv_cache_bit_width")
# The values of all other attributes that change nothing: what is meant by them is what is meant by their absence.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "causal": (1,),
    "k_quant_type": ("NONE",),
    "kv_cache_bit_width": (0,),
    "local_window_size": (-1,),
    "qk_output": (0,),
    "sliding_window_cache": (0,),
    "smooth_softmax": (0, -1),
    "softcap": (0.0,),
    "v_quant_type": ("NONE",),
}


class LowerAttention(ir.passes.InPlacePass):
    """Replaces each ``GroupQueryAttention`` of ONNX Runtime that the target has a kernel for.

    Args:
        capability: Compute capability of the GPU that the model is for, such as 90; None for none in particular, which changes nothing.
    """

    def __init__(self, capability: int | None = None) -> None:
        super().__init__()
        self.capability = capability

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace in every graph, subgraphs included; ``modified`` is whether anything was."""
        names = Names(model)
        modified = False
        for graph in model.graphs():
            for node in [node for node in graph if (node.domain, node.op_type) == (CONTRIB, _OP)]:
                try:
                    form, kernel = _match(node, self.capability)
                except _Unfit as unfit:
                    logger.debug("%s stays %s.%s: it %s", node.name, CONTRIB, _OP, unfit)
                else:
                    _lower(node, form, kernel, names)
                    modified = True
        if modified:
            add_functions(model)
        return ir.passes.PassResult(model, modified)


def has_attention(model: ir.Model, capability: int | None) -> bool:
    """Whether ``LowerAttention`` would replace anything."""
    for graph in model.graphs():
        for node in graph:
            if (node.domain, node.op_type) == (CONTRIB, _OP):
                with suppress(_Unfit):
                    _match(node, capability)
                    return True
    return False


def attention_kernels(model: ir.Model) -> list[dict[str, str]]:
    """What the nodes that ``LowerAttention`` made run in, in the order of the graph: ``name``, ``op``, ``kernel``, ``instruction``."""
    nodes = (node for node in ir.traversal.RecursiveGraphIterator(model.graph) if (node.domain, node.op_type) == (DOMAIN, _OP))
    return [{"name": node.name or "", "op": f"{DOMAIN}.{_OP}", **json.loads(node.metadata_props[KERNEL_TAG])} for node in nodes]


class _Unfit(Exception):  # noqa: N818 - no error: a node that stays as it is
    """Why a node stays."""


@dataclass(frozen=True, eq=False)
class _Form:
    """A node in the form that the op has."""

    inputs: Sequence[ir.Value | None]
    num_heads: int
    kv_num_heads: int
    head: int
    scale: float
    quant_type: str = "NONE"


def _match(node: ir.Node, capability: int | None) -> tuple[_Form, Kernel]:
    """What a node does, and the kernel that does it.

    Raises:
        _Unfit: The op does something else, or the GPU has no kernel for it.
    """
    form = _form(node)
    if capability is None:
        raise _Unfit("is for no GPU in particular (no --target)")
    try:
        return form, kernel_for(_OP, capability=capability, k=form.head)
    except EngineError as error:
        raise _Unfit(f"has {error}") from None


def _form(node: ir.Node) -> _Form:
    """What a node does, where it is what the op does.

    Raises:
        _Unfit: It is something else.
    """
    quantized = len(node.inputs) > 4 and all(value is not None and dtype_of(value) == ir.DataType.INT8 for value in node.inputs[3:5])
    given = _given(node, quantized=quantized)
    rotary = bool(node.attributes.get_int("do_rotary", 0))
    read = _READ.union(_QUANTIZED) if quantized else _READ
    for name, attribute in node.attributes.items():
        if name not in read and not _is_plain(name, attribute, rotary):
            raise _Unfit(f"has {name} = {attribute.value}")
    others = ("seqlens_k", "total_sequence_length", *((*_CACHES, *_SCALES) if quantized else ()))
    dtypes = {dtype_of(value) for name, value in given.items() if name not in others}
    if len(dtypes) != 1 or not dtypes.issubset(_TYPES):
        raise _Unfit(f"is of {' and '.join(sorted(str(dtype) for dtype in dtypes))}, not FLOAT16 or BFLOAT16")
    heads, kv_heads = node.attributes.get_int("num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise _Unfit(f"has {heads} heads of queries for {kv_heads} of keys")
    head = _head(given, heads, kv_heads)
    for name in _TABLES if rotary else ():
        width = _dim(given.get(name), 1, 2)
        if width != head // 2:
            raise _Unfit(f"has a {name} of {'unknown' if width is None else width} columns for heads of {head}")
    inputs = [given.get(name) if rotary or name not in _TABLES else None for name in (*_INPUTS, *_SCALES)]
    quant_type = _quant_type(node, given, kv_heads * head) if quantized else "NONE"
    return _Form(inputs, heads, kv_heads, head, node.attributes.get_float("scale", 0.0), quant_type)


def _quant_type(node: ir.Node, given: dict[str, ir.Value], channels: int) -> str:
    """How an int8 cache is scaled.

    Raises:
        _Unfit: Not as the kernel has it.
    """
    attributes = node.attributes
    types = {attributes.get_string(name, "NONE") for name in ("k_quant_type", "v_quant_type")}
    if types not in ({"PER_CHANNEL"}, {"PER_TENSOR"}):
        raise _Unfit(f"scales keys and values {' and '.join(sorted(map(str, types)))}")
    if (bits := attributes.get_int("kv_cache_bit_width", 0)) != 8:
        raise _Unfit(f"has kv_cache_bit_width = {bits} for INT8 keys and values")
    if dtype_of(given["query"]) != ir.DataType.FLOAT16:
        raise _Unfit(f"is of {dtype_of(given['query'])} over INT8 keys and values, not FLOAT16")
    (quant_type,) = types
    count = channels if quant_type == "PER_CHANNEL" else 1
    for name in _SCALES:
        shape = shape_of(given[name])
        if dtype_of(given[name]) != ir.DataType.FLOAT or shape is None or math.prod(shape) != count:
            raise _Unfit(f"has a {name} that is not {count} FLOAT")
    return str(quant_type)


def _given(node: ir.Node, *, quantized: bool) -> dict[str, ir.Value]:
    """A node's inputs by name, where they and the outputs are those of the op, which takes scales of a cache that is ``quantized``.

    Raises:
        _Unfit: They are not.
    """
    given = {name: value for name, value in zip((*_INPUTS, *_MORE_INPUTS), node.inputs, strict=False) if value is not None}
    others = [name for name in given if name not in _INPUTS and not (quantized and name in _SCALES)]
    if others or len(node.inputs) > len(_INPUTS) + len(_MORE_INPUTS):
        raise _Unfit(f"reads {', '.join(others) or 'an unknown input'}")
    missing = [name for name in (*_INPUTS, *(_SCALES if quantized else ())) if name not in given and name not in _OPTIONAL]
    if missing:
        raise _Unfit(f"has no {missing[0]}")
    if ("key" in given) != ("value" in given):
        raise _Unfit("has one of key and value")
    if len(node.outputs) < _OUTPUTS or not all(value.name for value in node.outputs[:_OUTPUTS]):
        raise _Unfit("does not give all keys and values")
    if any(value.name for value in node.outputs[_OUTPUTS:]):
        raise _Unfit("gives its scores")
    return given


def _is_plain(name: str, attribute: ir.Attr, rotary: bool) -> bool:
    """Whether an attribute says what its absence says."""
    if name == "qk_norm_epsilon":
        return True  # of norms whose weights are inputs, which are refused
    if name == "rotary_interleaved":
        return not rotary or attribute.value == 0
    return attribute.value in _PLAIN.get(name, ())


def _head(given: dict[str, ir.Value], heads: int, kv_heads: int) -> int:
    """The size of a head, by the cache or by the width of the queries, where all that is known agrees.

    Raises:
        _Unfit: It is not known, contradicted, or none that the kernel takes.
    """
    packed = "key" not in given
    sizes = {_dim(given[name], 3, 4) for name in _CACHES}
    counts = {_dim(given[name], 1, 4) for name in _CACHES}
    columns = {"query": heads + 2 * kv_heads if packed else heads, **({} if packed else dict.fromkeys(("key", "value"), kv_heads))}
    for name, count in columns.items():
        width = _dim(given[name], 2, 3)
        if width is not None and width % count:
            raise _Unfit(f"has a {name} of {width} columns for {count} heads")
        sizes.add(None if width is None else width // count)
    known = sorted(size for size in sizes if size is not None)
    if not counts <= {None, kv_heads}:
        raise _Unfit(f"has caches of {' and '.join(str(count) for count in counts)} heads for {kv_heads} of keys")
    if len(known) != 1:
        raise _Unfit(f"has heads of {' and '.join(map(str, known)) or 'unknown size'}")
    if known[0] not in _HEADS:
        raise _Unfit(f"has heads of {known[0]}, not {' or '.join(map(str, _HEADS))}")
    return known[0]


def _dim(value: ir.Value | None, axis: int, rank: int) -> int | None:
    """A dimension of a value of ``rank`` dimensions; None where it is not known."""
    if value is None or value.shape is None or len(value.shape) != rank:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def _lower(node: ir.Node, form: _Form, kernel: Kernel, names: Names) -> None:
    """Put the op in the node's place, under its name."""
    query, key, value, past_key, past_value, lengths, total, cos, sin, k_scale, v_scale = form.inputs
    assert query is not None and past_key is not None and past_value is not None and lengths is not None and total is not None  # noqa: PT018
    names.release_node(node)
    tags = {**node.metadata_props, KERNEL_TAG: json.dumps({"kernel": kernel.name, "instruction": kernel.instruction})}
    new = Insertion(node, names, tags).add(
        group_query_attention_node(
            query,
            key,
            value,
            past_key,
            past_value,
            lengths,
            total,
            cos,
            sin,
            k_scale,
            v_scale,
            num_heads=form.num_heads,
            kv_num_heads=form.kv_num_heads,
            head=form.head,
            scale=form.scale,
            quant_type=form.quant_type,
            name=node.name or _OP,
        )
    )
    for old, replaced in zip(node.outputs, new, strict=False):
        take_over(old, replaced, ())
    assert node.graph is not None
    node.graph.remove(node, safe=True)
