"""What ONNX operators compute, in differentiable torch: the table that ``fqonnx.calib.torch_graph`` runs a graph by.

Semantics are those of opset 21 and newer (prepared models are), and of ONNX Runtime's operators in ``com.microsoft``. Each function takes
the node (for its attributes) and its inputs, ``None`` where one is absent, and gives one tensor, or a tuple of all outputs. Sizes and axes
come in small integer tensors that lie on the CPU. Floats of 16 bits are fp32 here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch.nn import functional

from fqonnx.errors import ModelError

T = torch.Tensor
Operator = Callable[..., Any]

DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float32,
    ir.DataType.BFLOAT16: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}
"""What a value of an ONNX type is in torch."""


class UnsupportedError(ModelError):
    """A form of an operator that is not run here."""


def _ints(value: T | None) -> list[int]:
    assert value is not None
    return [int(item) for item in value.reshape(-1).tolist()]


def _optional_ints(value: T | None) -> list[int] | None:
    return None if value is None else _ints(value)


def _dtype(node: ir.Node, name: str) -> torch.dtype:
    wanted = ir.DataType(node.attributes.get_int(name))
    if wanted not in DTYPES:
        raise UnsupportedError(f"{node.op_type} to {wanted.name}")
    return DTYPES[wanted]


def _unary(function: Callable[[T], T]) -> Callable[..., T]:
    return lambda _node, x: function(x)


def _binary(function: Callable[[T, T], T]) -> Callable[..., T]:
    return lambda _node, a, b: function(a, b)


def _div(_node: ir.Node, a: T, b: T) -> T:
    return a / b if a.dtype.is_floating_point else torch.div(a, b, rounding_mode="trunc")


def _mod(node: ir.Node, a: T, b: T) -> T:
    return torch.fmod(a, b) if node.attributes.get_int("fmod", 0) else torch.remainder(a, b)


def _fold(function: Callable[[T, T], T]) -> Callable[..., T]:
    def run(_node: ir.Node, first: T, *others: T) -> T:
        for other in others:
            first = function(first, other)
        return first

    return run


def _cast(node: ir.Node, x: T) -> T:
    return x.to(_dtype(node, "to"))


def _clip(_node: ir.Node, x: T, low: T | None = None, high: T | None = None) -> T:
    return x if low is None and high is None else torch.clamp(x, low, high)


def _gelu(node: ir.Node, x: T) -> T:
    return functional.gelu(x, approximate=node.attributes.get_string("approximate", "none"))


def _quick_gelu(node: ir.Node, x: T) -> T:
    return x * torch.sigmoid(node.attributes.get_float("alpha", 1.702) * x)


def _swish(node: ir.Node, x: T) -> T:
    return x * torch.sigmoid(node.attributes.get_float("alpha", 1.0) * x)


def _bias_gelu(_node: ir.Node, x: T, bias: T) -> T:
    return functional.gelu(x + bias)


def _fast_gelu(_node: ir.Node, x: T, bias: T | None = None) -> T:
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


def _softmax(node: ir.Node, x: T) -> T:
    return torch.softmax(x, node.attributes.get_int("axis", -1))


# --- shapes -----------------------------------------------------------------------------------------------------------------------------


def _shape(node: ir.Node, x: T) -> T:
    sizes = list(x.shape)
    return torch.tensor(sizes[slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", len(sizes)))], dtype=torch.int64)


def _reshape(node: ir.Node, x: T, shape: T) -> T:
    keep_zero = node.attributes.get_int("allowzero", 0)
    return x.reshape([x.shape[i] if size == 0 and not keep_zero else size for i, size in enumerate(_ints(shape))])


def _flatten(node: ir.Node, x: T) -> T:
    axis = node.attributes.get_int("axis", 1) % (x.ndim + 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _transpose(node: ir.Node, x: T) -> T:
    return x.permute(list(node.attributes.get_ints("perm", ())) or list(range(x.ndim))[::-1])


def _squeeze(_node: ir.Node, x: T, axes: T | None = None) -> T:
    return x.squeeze() if axes is None else x.squeeze(tuple(_ints(axes)))


def _unsqueeze(_node: ir.Node, x: T, axes: T) -> T:
    places = _ints(axes)
    for axis in sorted(axis % (x.ndim + len(places)) for axis in places):
        x = x.unsqueeze(axis)
    return x


def _expand(_node: ir.Node, x: T, shape: T) -> T:
    wanted = _ints(shape)
    rank = max(x.ndim, len(wanted))
    pairs = zip([1] * (rank - x.ndim) + list(x.shape), [1] * (rank - len(wanted)) + wanted, strict=True)
    return x.expand([size if asked == 1 else asked for size, asked in pairs])


def _concat(node: ir.Node, *parts: T) -> T:
    return torch.cat(parts, node.attributes.get_int("axis"))


def _split(node: ir.Node, x: T, sizes: T | None = None) -> tuple[T, ...]:
    axis = node.attributes.get_int("axis", 0)
    if sizes is not None:
        return torch.split(x, _ints(sizes), axis)
    return torch.split(x, -(-x.shape[axis] // len(node.outputs)), axis)


def _slice(_node: ir.Node, x: T, starts: T, ends: T, axes: T | None = None, steps: T | None = None) -> T:
    places = _optional_ints(axes) or list(range(starts.numel()))
    for axis, start, end, step in zip(places, _ints(starts), _ints(ends), _optional_ints(steps) or [1] * len(places), strict=True):
        picked = range(x.shape[axis])[slice(start, None if step < 0 and end < -x.shape[axis] else end, step)]
        if step > 0:
            index: list[slice] = [slice(None)] * (axis % x.ndim) + [slice(picked.start, max(picked.stop, picked.start), step)]
            x = x[tuple(index)]
        else:
            x = x.index_select(axis, torch.arange(len(picked), device=x.device) * step + picked.start)
    return x


def _gather(node: ir.Node, x: T, indices: T) -> T:
    axis = node.attributes.get_int("axis", 0) % x.ndim
    flat = indices.reshape(-1).long().to(x.device)
    taken = x.index_select(axis, torch.where(flat < 0, flat + x.shape[axis], flat))
    return taken.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _gather_elements(node: ir.Node, x: T, indices: T) -> T:
    axis = node.attributes.get_int("axis", 0)
    indices = indices.long()
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices))


def _gather_nd(node: ir.Node, x: T, indices: T) -> T:
    if node.attributes.get_int("batch_dims", 0):
        raise UnsupportedError("GatherND with batch_dims")
    return x[tuple(indices.long().unbind(-1))]


def _range(_node: ir.Node, start: T, limit: T, delta: T) -> T:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _constant_of_shape(node: ir.Node, shape: T) -> T:
    value = node.attributes.get("value")
    fill = torch.zeros(1) if value is None else torch.from_numpy(value.as_tensor().numpy().copy())
    return torch.full(_ints(shape), fill.reshape(-1)[0].item(), dtype=torch.float32 if fill.dtype == torch.float16 else fill.dtype)


def _trilu(node: ir.Node, x: T, k: T | None = None) -> T:
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if node.attributes.get_int("upper", 1) else torch.tril(x, diagonal)


def _cumsum(node: ir.Node, x: T, axis: T) -> T:
    if node.attributes.get_int("reverse", 0) or node.attributes.get_int("exclusive", 0):
        raise UnsupportedError("CumSum in reverse or exclusive")
    return torch.cumsum(x, int(axis), dtype=x.dtype)


def _pad(node: ir.Node, x: T, pads: T, value: T | None = None, axes: T | None = None) -> T:
    if node.attributes.get_string("mode", "constant") != "constant":
        raise UnsupportedError("Pad other than by a constant")
    sizes = _ints(pads)
    places = [axis % x.ndim for axis in _optional_ints(axes) or range(x.ndim)]
    spread = [0] * (2 * x.ndim)
    for i, axis in enumerate(places):
        spread[2 * (x.ndim - 1 - axis)], spread[2 * (x.ndim - 1 - axis) + 1] = sizes[i], sizes[i + len(places)]
    return functional.pad(x, spread, value=0 if value is None else value.item())


# --- reductions -------------------------------------------------------------------------------------------------------------------------


def _reduce(function: Callable[[T, list[int], bool], T]) -> Callable[..., T]:
    def run(node: ir.Node, x: T, axes: T | None = None) -> T:
        places = _optional_ints(axes)
        if not places:
            if node.attributes.get_int("noop_with_empty_axes", 0):
                return x
            places = list(range(x.ndim))
        return function(x, places, bool(node.attributes.get_int("keepdims", 1)))

    return run


# --- products ---------------------------------------------------------------------------------------------------------------------------


def _gemm(node: ir.Node, a: T, b: T, c: T | None = None) -> T:
    a = a.mT if node.attributes.get_int("transA", 0) else a
    b = b.mT if node.attributes.get_int("transB", 0) else b
    y = node.attributes.get_float("alpha", 1.0) * (a @ b)
    return y if c is None else y + node.attributes.get_float("beta", 1.0) * c


def _fused_matmul(node: ir.Node, a: T, b: T) -> T:
    if node.attributes.get_int("transBatchA", 0) or node.attributes.get_int("transBatchB", 0):
        raise UnsupportedError("FusedMatMul with transposed batches")
    a = a.mT if node.attributes.get_int("transA", 0) else a
    b = b.mT if node.attributes.get_int("transB", 0) else b
    return node.attributes.get_float("alpha", 1.0) * (a @ b)


def _einsum(node: ir.Node, *operands: T) -> T:
    return torch.einsum(node.attributes.get_string("equation").replace(" ", ""), *operands)


def _conv(node: ir.Node, x: T, w: T, bias: T | None = None) -> T:
    spatial = x.ndim - 2
    pads = list(node.attributes.get_ints("pads", ())) or [0] * (2 * spatial)
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or not 1 <= spatial <= 3:
        raise UnsupportedError("Conv with auto_pad or more than three axes")
    x = functional.pad(x, [size for axis in reversed(range(spatial)) for size in (pads[axis], pads[axis + spatial])])
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[spatial - 1]
    ones = [1] * spatial
    result: T = convolve(
        x,
        w,
        bias,
        stride=tuple(node.attributes.get_ints("strides", ()) or ones),
        dilation=tuple(node.attributes.get_ints("dilations", ()) or ones),
        groups=node.attributes.get_int("group", 1),
    )
    return result


def _dequantize(node: ir.Node, q: T, scale: T, zero_point: T | None = None) -> T:
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)

    def spread(parameter: T) -> T:
        if parameter.numel() == 1:
            return parameter.reshape(())
        if block:
            return parameter.repeat_interleave(block, axis).narrow(axis, 0, q.shape[axis])
        return parameter.reshape([-1 if place == axis % q.ndim else 1 for place in range(q.ndim)])

    x = q.to(torch.float32)
    return (x if zero_point is None else x - spread(zero_point.to(torch.float32))) * spread(scale)


# --- norms ------------------------------------------------------------------------------------------------------------------------------


def _layer_norm(node: ir.Node, x: T, scale: T, bias: T | None = None) -> T:
    axis = node.attributes.get_int("axis", -1) % x.ndim
    shape = x.shape[axis:]
    return functional.layer_norm(
        x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), node.attributes.get_float("epsilon", 1e-5)
    )


def _rms(x: T, axes: list[int], epsilon: float) -> T:
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon)


def _rms_norm(node: ir.Node, x: T, scale: T) -> T:
    axis = node.attributes.get_int("axis", -1) % x.ndim
    return _rms(x, list(range(axis, x.ndim)), node.attributes.get_float("epsilon", 1e-5)) * scale


def _skip_layer_norm(node: ir.Node, x: T, skip: T, gamma: T, beta: T | None = None, bias: T | None = None) -> tuple[T | None, ...]:
    total = x + skip if bias is None else x + skip + bias
    y = functional.layer_norm(total, total.shape[-1:], gamma, beta, node.attributes.get_float("epsilon", 1e-5))
    return y, None, None, total


def _skip_rms_norm(node: ir.Node, x: T, skip: T, gamma: T, bias: T | None = None) -> tuple[T | None, ...]:
    total = x + skip if bias is None else x + skip + bias
    return _rms(total, [-1], node.attributes.get_float("epsilon", 1e-5)) * gamma, None, None, total


# --- attention --------------------------------------------------------------------------------------------------------------------------


def _to_heads(x: T, heads: int) -> T:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _attention(node: ir.Node, q: T, k: T, v: T, *optional: T | None) -> T | tuple[T, ...]:
    """``Attention`` of opset 23, ``[batch, heads, tokens, size]`` or ``[batch, tokens, heads · size]``."""
    mask, past_k, past_v, *more = (*optional, None, None, None)[: max(len(optional), 3)]
    if any(item is not None for item in more) or len(node.outputs) > 3:
        raise UnsupportedError("Attention that gives its scores or takes lengths of key values")
    rows = q.ndim == 3
    if rows:
        heads, kv_heads = node.attributes.get_int("q_num_heads"), node.attributes.get_int("kv_num_heads")
        q, k, v = (_to_heads(x, n) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if past_k is not None and past_v is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    present = k, v
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.mT * node.attributes.get_float("scale", q.shape[-1] ** -0.5)
    softcap = node.attributes.get_float("softcap", 0.0)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if node.attributes.get_int("is_causal", 0):
        past = k.shape[2] - q.shape[2] if past_k is not None else 0
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
        scores = scores.masked_fill(~visible, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    y = torch.softmax(scores, -1) @ v
    y = y.transpose(1, 2).flatten(2) if rows else y
    return y if len(node.outputs) == 1 else (y, *present)


def _rotary(x: T, cos: T, sin: T, *, interleaved: bool, heads: int, width: int) -> T:
    """``x`` ``[batch, heads, tokens, size]`` or ``[batch, tokens, heads · size]``; tables ``[batch, tokens, width / 2]``."""
    rows = x.ndim == 3
    if rows:
        x = _to_heads(x, heads)
    width = width or x.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    y = torch.cat([turned, rest], -1) if rest.shape[-1] else turned
    return y.transpose(1, 2).flatten(2) if rows else y


def _rotary_embedding(node: ir.Node, x: T, cos: T, sin: T, positions: T | None = None) -> T:
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    attributes = node.attributes
    return _rotary(
        x,
        cos,
        sin,
        interleaved=bool(attributes.get_int("interleaved", 0)),
        heads=attributes.get_int("num_heads", 0),
        width=attributes.get_int("rotary_embedding_dim", 0),
    )


OPERATORS: dict[tuple[str, str], Operator] = {
    ("", "Abs"): _unary(torch.abs),
    ("", "Add"): _binary(torch.add),
    ("", "And"): _binary(torch.logical_and),
    ("", "Attention"): _attention,
    ("", "Cast"): _cast,
    ("", "CastLike"): lambda _node, x, like: x.to(like.dtype),
    ("", "Ceil"): _unary(torch.ceil),
    ("", "Clip"): _clip,
    ("", "Concat"): _concat,
    ("", "ConstantOfShape"): _constant_of_shape,
    ("", "Conv"): _conv,
    ("", "Cos"): _unary(torch.cos),
    ("", "CumSum"): _cumsum,
    ("", "DequantizeLinear"): _dequantize,
    ("", "Div"): _div,
    ("", "Dropout"): lambda _node, x, *_: x,
    ("", "Einsum"): _einsum,
    ("", "Elu"): lambda node, x: functional.elu(x, node.attributes.get_float("alpha", 1.0)),
    ("", "Equal"): _binary(torch.eq),
    ("", "Erf"): _unary(torch.erf),
    ("", "Exp"): _unary(torch.exp),
    ("", "Expand"): _expand,
    ("", "Flatten"): _flatten,
    ("", "Floor"): _unary(torch.floor),
    ("", "Gather"): _gather,
    ("", "GatherElements"): _gather_elements,
    ("", "GatherND"): _gather_nd,
    ("", "Gelu"): _gelu,
    ("", "Gemm"): _gemm,
    ("", "Greater"): _binary(torch.gt),
    ("", "GreaterOrEqual"): _binary(torch.ge),
    ("", "Identity"): _unary(lambda x: x),
    ("", "IsInf"): _unary(torch.isinf),
    ("", "IsNaN"): _unary(torch.isnan),
    ("", "LayerNormalization"): _layer_norm,
    ("", "LeakyRelu"): lambda node, x: functional.leaky_relu(x, node.attributes.get_float("alpha", 0.01)),
    ("", "Less"): _binary(torch.lt),
    ("", "LessOrEqual"): _binary(torch.le),
    ("", "Log"): _unary(torch.log),
    ("", "MatMul"): _binary(torch.matmul),
    ("", "Max"): _fold(torch.maximum),
    ("", "Min"): _fold(torch.minimum),
    ("", "Mod"): _mod,
    ("", "Mul"): _binary(torch.mul),
    ("", "Neg"): _unary(torch.neg),
    ("", "Not"): _unary(torch.logical_not),
    ("", "Or"): _binary(torch.logical_or),
    ("", "Pad"): _pad,
    ("", "Pow"): lambda _node, a, b: torch.pow(a, b).to(a.dtype),
    ("", "RMSNormalization"): _rms_norm,
    ("", "Range"): _range,
    ("", "Reciprocal"): _unary(torch.reciprocal),
    ("", "ReduceL1"): _reduce(lambda x, axes, keep: torch.sum(x.abs(), axes, keep, dtype=x.dtype)),
    ("", "ReduceL2"): _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    ("", "ReduceMax"): _reduce(torch.amax),
    ("", "ReduceMean"): _reduce(torch.mean),
    ("", "ReduceMin"): _reduce(torch.amin),
    ("", "ReduceSum"): _reduce(lambda x, axes, keep: torch.sum(x, axes, keep, dtype=x.dtype)),
    ("", "ReduceSumSquare"): _reduce(lambda x, axes, keep: torch.sum(x.square(), axes, keep, dtype=x.dtype)),
    ("", "Relu"): _unary(torch.relu),
    ("", "Reshape"): _reshape,
    ("", "RotaryEmbedding"): _rotary_embedding,
    ("", "Shape"): _shape,
    ("", "Sigmoid"): _unary(torch.sigmoid),
    ("", "Sign"): _unary(torch.sign),
    ("", "SimplifiedLayerNormalization"): _rms_norm,
    ("", "Sin"): _unary(torch.sin),
    ("", "Slice"): _slice,
    ("", "Softmax"): _softmax,
    ("", "Softplus"): _unary(functional.softplus),
    ("", "Split"): _split,
    ("", "Sqrt"): _unary(torch.sqrt),
    ("", "Squeeze"): _squeeze,
    ("", "Sub"): _binary(torch.sub),
    ("", "Sum"): _fold(torch.add),
    ("", "Swish"): _swish,
    ("", "Tanh"): _unary(torch.tanh),
    ("", "Tile"): lambda _node, x, repeats: x.repeat(_ints(repeats)),
    ("", "Transpose"): _transpose,
    ("", "Trilu"): _trilu,
    ("", "Unsqueeze"): _unsqueeze,
    ("", "Where"): lambda _node, condition, a, b: torch.where(condition, a, b),
    ("", "Xor"): _binary(torch.logical_xor),
    ("com.microsoft", "BiasGelu"): _bias_gelu,
    ("com.microsoft", "DequantizeLinear"): _dequantize,
    ("com.microsoft", "FastGelu"): _fast_gelu,
    ("com.microsoft", "FusedMatMul"): _fused_matmul,
    ("com.microsoft", "Gelu"): _unary(functional.gelu),
    ("com.microsoft", "QuickGelu"): _quick_gelu,
    ("com.microsoft", "SimplifiedLayerNormalization"): _rms_norm,
    ("com.microsoft", "SkipLayerNormalization"): _skip_layer_norm,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _skip_rms_norm,
}
"""(domain, op) -> function."""
