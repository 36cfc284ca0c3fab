"""Constructors of the nodes that passes insert: fqonnx ops with all their attributes, and the Q/DQ form's activation side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from fqonnx.errors import ModelError
from fqonnx.ops.bodies import DOMAIN, VERSION
from fqonnx.ops.layout import check_container, layout_named

if TYPE_CHECKING:
    from collections.abc import Mapping

FLOAT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""What ``FlatQuantize`` and the ops that end in it read and ``W4A4Gemm`` writes."""

# By these TensorRT's parser finds the plugin, where its creator is registered.
_PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}

_SplitShape = tuple[tuple[int | ir.SymbolicDim, ...] | None, int | ir.SymbolicDim | None]


def flat_quantize_node(
    x: ir.Value, left: ir.Value, right: ir.Value, clip: ir.Value, *, bits: int = 4, packed: bool = False, name: str
) -> ir.Node:
    """A ``FlatQuantize`` node, as ``fqonnx.ops.reference.flat_quantize`` defines it.

    Args:
        x: ``[.., K]`` fp16, bf16 or fp32.
        left: ``[n1, n1]`` fp32.
        right: ``[n2, n2]`` fp32; ``n1 n2`` divides K. Both ``[1, 1]`` holding 1 for no transform.
        clip: fp32 scalar in (0, 1].
        bits: 4 or 8.
        packed: Two 4-bit codes a byte.
        name: The node's name; its outputs are ``{name}.q`` and ``{name}.scale``.

    Returns:
        The node; outputs ``q`` int8 ``[.., K]`` (``[.., K / 2]`` packed) and ``scale`` fp32 ``[.., 1]``, typed and, where ``x`` is, shaped.

    Raises:
        ModelError: ``x`` is not of a float type, or its K is odd with ``packed``.
        ValueError: ``bits`` is neither 4 nor 8.
    """
    return _quantize_node("FlatQuantize", [x, left, right, clip], _split_shape(x), {}, bits=bits, packed=packed, name=name)


def silu_mul_flat_quantize_node(
    gate_up: ir.Value, left: ir.Value, right: ir.Value, clip: ir.Value, *, gate: int = 0, bits: int = 4, packed: bool = False, name: str
) -> ir.Node:
    """A ``SiluMulFlatQuantize`` node, as ``fqonnx.ops.reference.silu_mul_flat_quantize`` defines it.

    Args:
        gate_up: ``[.., 2 K]`` fp16, bf16 or fp32.
        left: As of ``flat_quantize_node``, for K.
        right: Likewise.
        clip: Likewise.
        gate: Which half is the gate, 0 or 1.
        bits: 4 or 8.
        packed: Two 4-bit codes a byte.
        name: The node's name; its outputs are ``{name}.q`` and ``{name}.scale``.

    Returns:
        The node, with the outputs of ``flat_quantize_node`` for K.

    Raises:
        ModelError: ``gate_up`` is not of a float type, its last dimension is odd, or K is odd with ``packed``.
        ValueError: ``bits`` is neither 4 nor 8, or ``gate`` neither 0 nor 1.
    """
    if gate not in (0, 1):
        raise ValueError(f"gate is 0 or 1, not {gate}")
    lead, merged = _split_shape(gate_up)
    if isinstance(merged, int) and merged % 2:
        raise ModelError(f"the input of {name} has {merged} columns, which are no two halves")
    shape = lead, merged // 2 if isinstance(merged, int) else None
    return _quantize_node("SiluMulFlatQuantize", [gate_up, left, right, clip], shape, {"gate": gate}, bits=bits, packed=packed, name=name)


def rms_norm_flat_quantize_node(
    x: ir.Value,
    gamma: ir.Value,
    left: ir.Value,
    right: ir.Value,
    clip: ir.Value,
    *,
    residual: ir.Value | None = None,
    epsilon: float,
    bits: int = 4,
    packed: bool = False,
    name: str,
) -> ir.Node:
    """A ``RmsNormFlatQuantize`` node, or with ``residual`` an ``AddRmsNormFlatQuantize``, as ``fqonnx.ops.reference`` defines them.

    Args:
        x: ``[.., K]`` fp16, bf16 or fp32.
        gamma: ``[K]`` of x's type.
        left: As of ``flat_quantize_node``.
        right: Likewise.
        clip: Likewise.
        residual: Of x's type and shape: the norm is of ``x + residual``. None for x alone.
        epsilon: Added to the mean of a row's squares.
        bits: 4 or 8.
        packed: Two 4-bit codes a byte.
        name: The node's name; its outputs are ``{name}.q``, ``{name}.scale`` and, with ``residual``, ``{name}.sum``.

    Returns:
        The node, with the outputs of ``flat_quantize_node``, and the sum of x's type and shape.

    Raises:
        ModelError: ``x`` is not of a float type, ``gamma`` or ``residual`` of another, or K is odd with ``packed``.
        ValueError: ``bits`` is neither 4 nor 8.
    """
    for other in (gamma, *([] if residual is None else [residual])):
        if other.dtype != x.dtype:
            raise ModelError(f"{name} adds and multiplies {other.dtype} to {x.dtype}: cast it, or keep the norm as it is")
    attributes = {"epsilon": float(epsilon)}
    if residual is None:
        inputs = [x, gamma, left, right, clip]
        return _quantize_node("RmsNormFlatQuantize", inputs, _split_shape(x), attributes, bits=bits, packed=packed, name=name)
    total = ir.Value(name=f"{name}.sum", type=x.type, shape=None if x.shape is None else ir.Shape(x.shape.dims))
    inputs = [x, residual, gamma, left, right, clip]
    return _quantize_node("AddRmsNormFlatQuantize", inputs, _split_shape(x), attributes, (total,), bits=bits, packed=packed, name=name)


def _quantize_node(
    op: str,
    inputs: list[ir.Value],
    shape: _SplitShape,
    attributes: Mapping[str, int | float],
    more: tuple[ir.Value, ...] = (),
    *,
    bits: int,
    packed: bool,
    name: str,
) -> ir.Node:
    """An op whose outputs are ``q`` and ``scale`` for rows of ``shape``, and ``more``."""
    _check_float(inputs[0].dtype, f"the input of {name}")
    lead, k = shape
    check_container(bits=bits, packed=packed, k=k if isinstance(k, int) else 0)
    q = ir.Value(name=f"{name}.q", type=ir.TensorType(ir.DataType.INT8))
    scale = ir.Value(name=f"{name}.scale", type=ir.TensorType(ir.DataType.FLOAT))
    if lead is not None:
        q.shape = ir.Shape([*lead, k // 2 if packed and isinstance(k, int) else None if packed else k])
        scale.shape = ir.Shape([*lead, 1])
    return ir.node(
        op, inputs, {**attributes, "bits": bits, "packed": int(packed), **_PLUGIN}, domain=DOMAIN, outputs=[q, scale, *more], name=name
    )


def w4a4_gemm_node(
    q: ir.Value,
    scale: ir.Value,
    w: ir.Value,
    w_scale: ir.Value,
    bias: ir.Value,
    *,
    dtype: ir.DataType,
    packed: bool = False,
    layout: str = "plain",
    name: str,
) -> ir.Node:
    """A ``W4A4Gemm`` node, as ``fqonnx.ops.reference.w4a4_gemm`` defines it.

    Args:
        q: int8 ``[.., K]``, or ``[.., K / 2]`` when packed.
        scale: fp32 ``[.., 1]``.
        w: INT4 ``[N, K]`` in the order of ``layout`` (``fqonnx.ops.layout.to_layout``).
        w_scale: fp32 ``[N, K / G]``; ``[N, 1]`` per channel.
        bias: fp32 ``[N]``; zeros where there is none.
        dtype: Type of the output.
        packed: Whether ``q`` holds two codes a byte.
        layout: A key of ``fqonnx.ops.layout.LAYOUTS``.
        name: The node's name; its output is ``{name}.y``.

    Returns:
        The node; its output is ``[.., N]`` of ``dtype``, typed and, where ``q`` and ``w`` are, shaped.

    Raises:
        ModelError: An unknown layout, K that does not fit the layout or ``packed``, or an output type that is no float type.
    """
    _check_float(dtype, f"the output of {name}")
    chosen = layout_named(layout)
    rows, k = (w.shape[0], w.shape[1]) if w.shape is not None else (None, None)
    if isinstance(k, int):
        check_container(bits=4, packed=packed, k=k)
        chosen.check(k)
    y = ir.Value(name=f"{name}.y", type=ir.TensorType(dtype))
    lead, _ = _split_shape(q)
    if lead is not None:
        y.shape = ir.Shape([*lead, rows])
    attributes = {
        "packed": int(packed),
        "layout": layout,
        "layout_shape": chosen.shape,
        "layout_perm": chosen.perm,
        "dtype": dtype.value,
        **_PLUGIN,
    }
    return ir.node("W4A4Gemm", [q, scale, w, w_scale, bias], attributes, domain=DOMAIN, outputs=[y], name=name)


def group_query_attention_node(
    query: ir.Value,
    key: ir.Value | None,
    value: ir.Value | None,
    past_key: ir.Value,
    past_value: ir.Value,
    seqlens_k: ir.Value,
    total_sequence_length: ir.Value,
    cos_cache: ir.Value | None,
    sin_cache: ir.Value | None,
    k_scale: ir.Value | None = None,
    v_scale: ir.Value | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    head: int,
    scale: float = 0.0,
    quant_type: str = "NONE",
    name: str,
) -> ir.Node:
    """A ``GroupQueryAttention`` node: ``com.microsoft.GroupQueryAttention`` (opset 1) with nothing but these inputs, causal.

    Args:
        query: ``[batch, sequence, num_heads head]`` fp16, bf16 or fp32; without ``key`` and ``value`` it holds them behind the queries:
            ``[batch, sequence, (num_heads + 2 kv_num_heads) head]``.
        key: ``[batch, sequence, kv_num_heads head]`` of the same type; None where ``query`` holds them.
        value: Likewise.
        past_key: ``[batch, kv_num_heads, past, head]`` of the same type; int8 where ``quant_type`` is not ``NONE``.
        past_value: Likewise.
        seqlens_k: int32 ``[batch]``: tokens of each sequence, the new ones included, minus one.
        total_sequence_length: int32 scalar: the largest of them plus one.
        cos_cache: ``[positions, head / 2]`` of the same type: rotary embedding of pairs ``i``, ``i + head / 2``; None for none.
        sin_cache: Likewise; None where ``cos_cache`` is.
        k_scale: fp32 scales of an int8 cache's keys, ``[1, kv_num_heads, 1, head]`` or one; None where the cache has the query's type.
        v_scale: Likewise, of values.
        num_heads: Heads of queries, a multiple of ``kv_num_heads``.
        kv_num_heads: Heads of keys and values.
        head: Width of a head.
        scale: Factor of the scores; 0 is ``1 / sqrt(head)``.
        quant_type: ``PER_CHANNEL`` or ``PER_TENSOR`` for an int8 cache with such scales, ``NONE`` for one of the query's type.
        name: The node's name; its outputs are ``{name}.output``, ``{name}.present_key`` and ``{name}.present_value``.

    Returns:
        The node; ``output`` is ``[batch, sequence, num_heads head]`` of the query's type, the others ``[batch, kv_num_heads, past or more,
        head]`` of the cache's, shaped where the inputs are.

    Raises:
        ModelError: ``query`` is not of a float type, or another operand not of the type that goes with it.
        ValueError: One of ``key`` and ``value``, of ``cos_cache`` and ``sin_cache``, or of ``k_scale``, ``v_scale`` and ``quant_type``
            without the others, or heads that do not divide.
    """
    dtype = query.dtype
    _check_float(dtype, f"the input of {name}")
    assert dtype is not None
    if (key is None) != (value is None) or (cos_cache is None) != (sin_cache is None):
        raise ValueError("key and value, and cos_cache and sin_cache, are given together or not at all")
    quantized = quant_type != "NONE"
    if quantized != (k_scale is not None) or quantized != (v_scale is not None) or quant_type not in ("NONE", "PER_CHANNEL", "PER_TENSOR"):
        raise ValueError(f"scales of keys and of values and quant_type {quant_type!r} are given together or not at all")
    if kv_num_heads < 1 or num_heads % kv_num_heads:
        raise ValueError(f"{num_heads} heads are no multiple of {kv_num_heads}")
    cache_dtype = ir.DataType.INT8 if quantized else dtype
    expected = [(operand, dtype) for operand in (key, value, cos_cache, sin_cache)]
    expected += [(operand, cache_dtype) for operand in (past_key, past_value)]
    expected += [(operand, ir.DataType.FLOAT) for operand in (k_scale, v_scale)]
    for operand, wanted in expected:
        if operand is not None and operand.dtype != wanted:
            raise ModelError(f"{name} reads {operand.dtype} beside {dtype}: export the model with keys and values of one type")
    types = {"output": dtype, "present_key": cache_dtype, "present_value": cache_dtype}
    output, present_key, present_value = (ir.Value(name=f"{name}.{part}", type=ir.TensorType(given)) for part, given in types.items())
    lead, _ = _split_shape(query)
    if lead is not None:
        output.shape = ir.Shape([*lead, num_heads * head])
        for present in (present_key, present_value):
            present.shape = ir.Shape([lead[0], kv_num_heads, None, head])
    attributes: dict[str, int | float | str] = {
        "num_heads": num_heads,
        "kv_num_heads": kv_num_heads,
        "scale": float(scale),
        "do_rotary": int(cos_cache is not None),
        "rotary_interleaved": 0,
        **({"k_quant_type": quant_type, "v_quant_type": quant_type, "kv_cache_bit_width": 8} if quantized else {}),
        **_PLUGIN,
    }
    inputs = [query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_cache, sin_cache]
    inputs += [k_scale, v_scale] if quantized else []
    return ir.node("GroupQueryAttention", inputs, attributes, domain=DOMAIN, outputs=[output, present_key, present_value], name=name)


def dequantize_nodes(q: ir.Value, scale: ir.Value, *, dtype: ir.DataType, name: str) -> tuple[ir.Node, ...]:
    """The activation side of the Q/DQ form behind ``FlatQuantize``: ``cast(q) · scale`` in fp32, rounded once to ``dtype``.

    Args:
        q: int8 ``[.., K]``, not packed.
        scale: fp32 ``[.., 1]``.
        dtype: Type of the result.
        name: Prefix of the nodes' and values' names; the result is ``{name}.dequantized``.

    Returns:
        The nodes in order; the last one's only output is the activation ``[.., K]`` of ``dtype``.

    Raises:
        ModelError: ``dtype`` is no float type.
    """
    _check_float(dtype, f"the output of {name}")
    to_float = _unary("Cast", [q], {"to": ir.DataType.FLOAT.value}, ir.DataType.FLOAT, q.shape, f"{name}.cast")
    is_float = dtype == ir.DataType.FLOAT
    scaled = _unary(
        "Mul", [to_float.outputs[0], scale], {}, ir.DataType.FLOAT, q.shape, f"{name}.{'dequantized' if is_float else 'scaled'}"
    )
    if is_float:
        return to_float, scaled
    return to_float, scaled, _unary("Cast", [scaled.outputs[0]], {"to": dtype.value}, dtype, q.shape, f"{name}.dequantized")


def _unary(
    op_type: str, inputs: list[ir.Value], attributes: dict[str, int], dtype: ir.DataType, shape: ir.Shape | None, name: str
) -> ir.Node:
    output = ir.Value(name=name, type=ir.TensorType(dtype), shape=None if shape is None else ir.Shape(shape.dims))
    return ir.node(op_type, inputs, attributes, outputs=[output], name=name)


def _split_shape(value: ir.Value) -> _SplitShape:
    """The leading dimensions and the last; None for both where the rank is unknown."""
    if value.shape is None or not value.shape.rank():
        return None, None
    return tuple(value.shape.dims[:-1]), value.shape.dims[-1]


def _check_float(dtype: ir.DataType | None, what: str) -> None:
    if dtype not in FLOAT_TYPES:
        raise ModelError(f"{what} is {dtype}, not FLOAT, FLOAT16 or BFLOAT16: cast it or leave this linear in float (--keep)")
