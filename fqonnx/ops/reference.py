"""What the fqonnx ops mean, in numpy: the one reference that bodies, kernels and passes are tested and benchmarked against."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fqonnx.ops.layout import check_container, from_layout, pack_int4, unpack_int4

FloatArray = npt.NDArray[np.floating]
Array = npt.NDArray[np.float32]
Int8Array = npt.NDArray[np.int8]

SMALLEST_SCALE = 2.0**-126
"""The smallest normal fp32. A row whose scale would be below it counts as all zero, so that a runtime may flush denormals."""


def flat_quantize(x: FloatArray, left: Array, right: Array, clip: float, *, bits: int = 4, packed: bool = False) -> tuple[Int8Array, Array]:
    """``FlatQuantize``: transform each row with a Kronecker pair and round it to symmetric integers (FlatQuant, section 3.1).

    For each row, in fp32, with ``qmax = 2^(bits - 1) - 1``:

    - ``t = leftᵀ · reshape(x, n1, n2) · right``, flattened again; where ``n1 n2`` is a proper divisor of K each run of ``n1 n2``
      columns is transformed so. ``left = right = [[1]]`` is no transform;
    - ``step = (max|t| · clip) / qmax``; ``scale = step``, or 1 where ``step < 2^-126`` (an all-zero row, and one so small that its
      scale would be denormal: its codes are 0);
    - ``q = clamp(round_half_even(t / scale), -qmax - 1, qmax)``.

    Where ``t`` overflows or holds NaN, ``scale`` is NaN, so that whatever is computed from the row is too; its codes are not specified.

    Args:
        x: ``[.., K]`` fp16, bf16 (``ml_dtypes``) or fp32, rank 1 or more.
        left: ``[n1, n1]`` fp32.
        right: ``[n2, n2]`` fp32; ``n1 n2`` divides K.
        clip: In (0, 1].
        bits: 4 or 8.
        packed: Store two 4-bit codes a byte, the even index in the low nibble.

    Returns:
        ``q`` int8 ``[.., K]``, or ``[.., K / 2]`` when packed; ``scale`` fp32 ``[.., 1]``.

    Raises:
        ModelError: ``packed`` with an odd K.
        ValueError: Shapes or bits that do not fit.
    """
    check_container(bits=bits, packed=packed, k=x.shape[-1])
    n1, n2, k = len(left), len(right), x.shape[-1]
    if left.shape != (n1, n1) or right.shape != (n2, n2) or k % (n1 * n2):
        raise ValueError(f"left {left.shape} and right {right.shape} do not transform rows of {k}")
    qmax = np.float32(2 ** (bits - 1) - 1)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        blocks = x.astype(np.float32).reshape(math.prod(x.shape[:-1]), k // (n1 * n2), n1, n2)
        t = np.matmul(left.T, np.matmul(blocks, right)).reshape(x.shape)
        step = np.abs(t).max(axis=-1, keepdims=True) * np.float32(clip) / qmax
        scale = np.where(step < np.float32(SMALLEST_SCALE), np.float32(1), step)
        scale = np.where(np.isfinite(step), scale, np.float32(np.nan))
        q = np.nan_to_num(np.clip(np.rint(t / scale), -qmax - 1, qmax)).astype(np.int8)
    return pack_rows(q) if packed else q, scale


def silu_mul(gate_up: FloatArray, *, gate: int = 0) -> FloatArray:
    """What ``SiluMulFlatQuantize`` quantizes: ``h = silu(gate) · up`` in fp32, rounded once to the input's type.

    Args:
        gate_up: ``[.., 2 K]`` fp16, bf16 (``ml_dtypes``) or fp32: a merged product's output.
        gate: Which half is the gate: 0, columns ``0 .. K - 1``, or 1, columns ``K .. 2 K - 1``. The other one is ``up``.

    Returns:
        ``h``, ``[.., K]`` of the input's type; ``silu(v) = v / (1 + exp(-v))``.

    Raises:
        ValueError: An odd number of columns, or ``gate`` is neither 0 nor 1.
    """
    if gate_up.shape[-1] % 2 or gate not in (0, 1):
        raise ValueError(f"half {gate} of {gate_up.shape[-1]} columns is no gate")
    halves = np.split(gate_up.astype(np.float32), 2, axis=-1)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        h: FloatArray = (halves[gate] / (1 + np.exp(-halves[gate])) * halves[1 - gate]).astype(gate_up.dtype)
    return h


def silu_mul_flat_quantize(
    gate_up: FloatArray, left: Array, right: Array, clip: float, *, gate: int = 0, bits: int = 4, packed: bool = False
) -> tuple[Int8Array, Array]:
    """``SiluMulFlatQuantize``: ``flat_quantize`` of ``silu_mul``; arguments, results and errors are theirs."""
    return flat_quantize(silu_mul(gate_up, gate=gate), left, right, clip, bits=bits, packed=packed)


def rms_norm(x: FloatArray, gamma: FloatArray, *, epsilon: float) -> FloatArray:
    """What ``RmsNormFlatQuantize`` quantizes: ``h = gamma · (x / sqrt(mean(x²) + epsilon))`` in fp32, rounded once to x's type.

    Args:
        x: ``[.., K]`` fp16, bf16 (``ml_dtypes``) or fp32.
        gamma: ``[K]`` of the same type.
        epsilon: Added to the mean of a row's squares.

    Returns:
        ``h``, of x's shape and type.

    Raises:
        ValueError: ``gamma`` does not fit ``x``.
    """
    if gamma.shape != x.shape[-1:] or gamma.dtype != x.dtype:
        raise ValueError(f"gamma {gamma.dtype}{gamma.shape} does not fit rows {x.dtype}{x.shape}")
    wide = x.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        root = np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + np.float32(epsilon))
        h: FloatArray = (gamma.astype(np.float32) * (wide / root)).astype(x.dtype)
    return h


def rms_norm_flat_quantize(
    x: FloatArray, gamma: FloatArray, left: Array, right: Array, clip: float, *, epsilon: float, bits: int = 4, packed: bool = False
) -> tuple[Int8Array, Array]:
    """``RmsNormFlatQuantize``: ``flat_quantize`` of ``rms_norm``; arguments, results and errors are theirs."""
    return flat_quantize(rms_norm(x, gamma, epsilon=epsilon), left, right, clip, bits=bits, packed=packed)


def add_rms_norm_flat_quantize(
    x: FloatArray,
    residual: FloatArray,
    gamma: FloatArray,
    left: Array,
    right: Array,
    clip: float,
    *,
    epsilon: float,
    bits: int = 4,
    packed: bool = False,
) -> tuple[Int8Array, Array, FloatArray]:
    """``AddRmsNormFlatQuantize``: ``rms_norm_flat_quantize`` of ``x + residual`` rounded to their type, and this sum.

    ``residual`` is of x's shape and type; the rest is as there.

    Raises:
        ValueError: It is not, or something does not fit as there.
    """
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual {residual.dtype}{residual.shape} does not fit {x.dtype}{x.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        total: FloatArray = (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype)
    return (*rms_norm_flat_quantize(total, gamma, left, right, clip, epsilon=epsilon, bits=bits, packed=packed), total)


def w4a4_gemm(
    q: Int8Array,
    scale: Array,
    w: Int8Array,
    w_scale: Array,
    bias: Array,
    *,
    packed: bool = False,
    layout: str = "plain",
    dtype: npt.DTypeLike = np.float32,
) -> FloatArray:
    """``W4A4Gemm``: ``y = (q · wᵀ) · scale · w_scale + bias`` with exact integer sums.

    With ``s0`` a channel's largest ``w_scale``, ``y = ((Σ_g (q_g · w_gᵀ) · (w_scale_g / s0)) · s0) · scale + bias``: the sum over
    groups is exact here (fp64), the rest fp32 in this order, then one rounding to ``dtype``. With one scale per channel a body or
    kernel whose sums are exact and whose epilogue is this one gives the same bits.

    Args:
        q: int8 ``[.., K]``, or ``[.., K / 2]`` when packed.
        scale: fp32 ``[.., 1]``.
        w: int8 ``[N, K]`` holding -8..7, in the order of ``layout``.
        w_scale: fp32 ``[N, K / G]``, positive; ``[N, 1]`` per channel.
        bias: fp32 ``[N]``.
        packed: Whether ``q`` holds two codes a byte.
        layout: A key of ``fqonnx.ops.layout.LAYOUTS``.
        dtype: fp16, bf16 (``ml_dtypes``) or fp32.

    Returns:
        ``[.., N]`` of ``dtype``.

    Raises:
        ModelError: An unknown layout, or K does not fit it.
        ValueError: Shapes that do not fit.
    """
    n, k = w.shape
    codes = unpack_rows(q) if packed else q
    groups = w_scale.shape[1]
    if codes.shape[-1] != k or w_scale.shape[0] != n or k % groups or bias.shape != (n,) or scale.shape != (*q.shape[:-1], 1):
        raise ValueError(f"q {q.shape}, scale {scale.shape}, w {w.shape}, w_scale {w_scale.shape}, bias {bias.shape} do not fit")
    channel_scale = w_scale.max(axis=1)
    share = (w_scale / channel_scale[:, None]).astype(np.float64)
    weights = (from_layout(w, layout).reshape(n, groups, k // groups) * share[:, :, None]).reshape(n, k)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        sums = (codes.astype(np.float64) @ weights.T).astype(np.float32)
        y: FloatArray = (sums * channel_scale * scale + bias).astype(dtype)
    return y


def group_query_attention(
    query: FloatArray,
    key: FloatArray | None,
    value: FloatArray | None,
    past_key: FloatArray | Int8Array,
    past_value: FloatArray | Int8Array,
    seqlens_k: npt.NDArray[np.int32],
    cos_cache: FloatArray | None = None,
    sin_cache: FloatArray | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float = 0.0,
) -> tuple[FloatArray, FloatArray | Int8Array, FloatArray | Int8Array]:
    """``GroupQueryAttention``: causal attention over a cache, as ``com.microsoft.GroupQueryAttention`` (opset 1) has it, without padding.

    The new tokens of sequence b are at positions ``seqlens_k[b] + 1 - sequence .. seqlens_k[b]``. With ``g = h // (num_heads //
    kv_num_heads)``, in fp32, new keys rounded to their type before they are used:

    - ``present[b, g, position] = rotary(key)``, or ``value``; earlier rows are those of ``past``;
    - ``output[b, s, h] = softmax(scale · rotary(query) · present_keyᵀ) · present_value`` over the positions up to the token's own;
    - ``rotary`` turns elements i and ``i + head / 2`` by the angle whose cosine and sine are in the position's row (arXiv 2104.09864).

    With scales the cache holds codes ``clamp(round_half_even(x / scale), -128, 127)`` and is read as ``code * scale``, new tokens too.

    Args:
        query: ``[batch, sequence, num_heads head]``, or with keys and values behind the queries where ``key`` and ``value`` are None.
        key: ``[batch, sequence, kv_num_heads head]`` or None.
        value: Likewise.
        past_key: ``[batch, kv_num_heads, past, head]``, with scales int8.
        past_value: Likewise.
        seqlens_k: int32 ``[batch]``: a sequence's tokens, the new ones included, minus one.
        cos_cache: ``[positions, head / 2]``; None for no rotary embedding.
        sin_cache: Likewise.
        k_scale: fp32 scales of keys, ``kv_num_heads * head`` of them or one, of any shape; None for a cache of the query's type.
        v_scale: Likewise, of values.
        num_heads: Heads of queries, a multiple of ``kv_num_heads``.
        kv_num_heads: Heads of keys and values.
        scale: Of the scores; 0 is ``1 / sqrt(head)``.

    Returns:
        ``output [batch, sequence, num_heads head]`` and the present keys and values ``[batch, kv_num_heads, rows, head]``, where ``rows``
        is the larger of ``past`` and the longest sequence; rows behind a sequence's tokens are zeros. All of the query's type,
        the cache with scales int8.

    Raises:
        ValueError: Shapes that do not fit, or a sequence of fewer tokens than are new.
    """
    dtype, (batch, sequence, _), (_, _, rows, head) = query.dtype, query.shape, past_key.shape
    widths = [num_heads * head, kv_num_heads * head, kv_num_heads * head]
    parts = np.split(query, np.cumsum(widths)[:2], axis=-1) if key is None or value is None else [query, key, value]
    first = seqlens_k.astype(np.int64) + 1 - sequence
    if [part.shape[-1] for part in parts] != widths or num_heads % kv_num_heads or first.min(initial=0) < 0:
        raise ValueError(f"query {query.shape}, past {past_key.shape} and lengths {seqlens_k} do not fit {num_heads}/{kv_num_heads} heads")
    q, k, v = (part.astype(np.float32).reshape(batch, sequence, -1, head).swapaxes(1, 2) for part in parts)
    rows = max(rows, int(seqlens_k.max(initial=-1)) + 1)
    keys: npt.NDArray[Any] = np.zeros((batch, kv_num_heads, rows, head), past_key.dtype)
    values: npt.NDArray[Any] = np.zeros_like(keys)
    flat = [np.ones(1, np.float32) if given is None else given.reshape(-1) for given in (k_scale, v_scale)]
    steps = [np.broadcast_to(step, kv_num_heads * head).reshape(kv_num_heads, 1, head) for step in flat]
    output = np.empty((batch, sequence, num_heads, head), dtype)
    group = num_heads // kv_num_heads
    for b in range(batch):
        before, end = int(first[b]), int(first[b]) + sequence
        angles = None if cos_cache is None or sin_cache is None else (cos_cache[before:end], sin_cache[before:end])
        for cache, past, new, step in ((keys, past_key, _rotated(k[b], angles), steps[0]), (values, past_value, v[b], steps[1])):
            cache[b, :, :before] = past[b, :, :before]
            cache[b, :, before:end] = np.clip(np.rint(new / step), -128, 127) if cache.dtype == np.int8 else new.astype(dtype)
        caches = ((keys, steps[0]), (values, steps[1]))
        seen_keys, seen_values = ((cache[b, :, :end].astype(np.float32) * step).repeat(group, axis=0) for cache, step in caches)
        scores = (_rotated(q[b], angles) @ seen_keys.swapaxes(1, 2)) * np.float32(scale or head**-0.5)
        scores = np.where(np.arange(end) <= before + np.arange(sequence)[:, None], scores, np.float32(-np.inf))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        output[b] = (weights / weights.sum(axis=-1, keepdims=True) @ seen_values).swapaxes(0, 1).astype(dtype)
    return output.reshape(batch, sequence, -1), keys, values


def _rotated(x: Array, angles: tuple[FloatArray, FloatArray] | None) -> Array:
    """Vectors ``[heads, sequence, head]`` turned by cosines and sines ``[sequence, head / 2]``."""
    if angles is None:
        return x
    cos, sin = (table.astype(np.float32) for table in angles)
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def pack_rows(q: Int8Array) -> Int8Array:
    """Codes ``[.., K]`` two a byte: int8 ``[.., K / 2]``, K even."""
    return pack_int4(q).view(np.int8).reshape(*q.shape[:-1], q.shape[-1] // 2)


def unpack_rows(q: Int8Array) -> Int8Array:
    """Undo ``pack_rows``: int8 ``[.., K / 2]`` to ``[.., K]``."""
    return unpack_int4(q.view(np.uint8).reshape(-1), (*q.shape[:-1], q.shape[-1] * 2))
