"""The kernels on torch tensors, and the C API (``plugins/kernels/fqonnx.h``) that they are called through.

Every function works on the tensors' device and torch's current stream there, and returns before the work is done; all can be captured in
CUDA graphs. They load the library that ``fqonnx plugin build`` made and build nothing themselves. What the operations mean is defined by
``fqonnx.ops.reference``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from fqonnx.calib.kron import factor
from fqonnx.errors import EngineError, UsageError
from fqonnx.ops.kernels import KERNELS
from fqonnx.plugins.library import require_library

if TYPE_CHECKING:
    import torch

ABI_VERSION = 1

DTYPES = {"float32": 1, "float16": 10, "bfloat16": 16}
"""``fq_dtype`` by torch's name."""

CONTAINERS = {"int8": 0, "packed": 1, "int32x8": 2}
"""``fq_container``: a code a byte; two a byte, the even index in the low nibble; eight in an int32, index 0 lowest (the same bytes)."""

LAYOUTS = {"plain": 0, "k128": 1}
"""``fq_layout``: order of a weight's codes along K, see ``fqonnx.ops.layout``."""

CACHES = {"float": 0, "int8": 1}
"""``fq_cache``: keys and values of earlier tokens in the query's type, or int8 codes."""

CACHE_SCALES = {"tensor": 0, "channel": 1}
"""``fq_cache_scales``: what has a scale of its own."""

OK, INVALID_ARGUMENT, UNSUPPORTED, CUDA_ERROR = range(4)
"""``fq_status``."""

MAX_FACTOR = 256
"""Largest n1 and n2 that kernels take."""


class FlatQuantizeParams(ctypes.Structure):
    """``fq_flat_quantize_params``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("clip_ptr", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("n1", ctypes.c_int32),
        ("n2", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("factor_dtype", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("container", ctypes.c_int32),
        ("clip", ctypes.c_float),
        ("variant", ctypes.c_int32),
        ("constant_factors", ctypes.c_int32),
    )


class RmsNormParams(ctypes.Structure):
    """``fq_rms_norm_params``."""

    _fields_ = (
        ("gamma", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
    )


class SiluMulParams(ctypes.Structure):
    """``fq_silu_mul_params``."""

    _fields_ = (("up", ctypes.c_void_p), ("up_stride", ctypes.c_int64))


class DequantizeParams(ctypes.Structure):
    """``fq_dequantize_params``."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("container", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class W4A4GemmParams(ctypes.Structure):
    """``fq_w4a4_gemm_params``."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("w_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("container", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("variant", ctypes.c_int32),
        ("tactic", ctypes.c_int32),
        ("constant_weights", ctypes.c_int32),
    )


class DecodeAttentionParams(ctypes.Structure):
    """``fq_decode_attention_params``."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("past", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("key_scale", ctypes.c_void_p),
        ("value_scale", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("longest", ctypes.c_int64),
        ("q_stride", ctypes.c_int64),
        ("k_stride", ctypes.c_int64),
        ("v_stride", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("cache", ctypes.c_int32),
        ("scales", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("variant", ctypes.c_int32),
    )


class Kernel(ctypes.Structure):
    """``fq_kernel``."""

    _fields_ = (
        ("op", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("instruction", ctypes.c_char_p),
        ("container", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("lowest", ctypes.c_int32),
        ("highest", ctypes.c_int32),
        ("runs_on_lowest", ctypes.c_int32),
        ("runs_on_highest", ctypes.c_int32),
    )


_POINTER = ctypes.POINTER
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "fq_flat_quantize": (ctypes.c_int, (_POINTER(FlatQuantizeParams), ctypes.c_void_p)),
    "fq_rms_norm_flat_quantize": (ctypes.c_int, (_POINTER(FlatQuantizeParams), _POINTER(RmsNormParams), ctypes.c_void_p)),
    "fq_silu_mul_flat_quantize": (ctypes.c_int, (_POINTER(FlatQuantizeParams), _POINTER(SiluMulParams), ctypes.c_void_p)),
    "fq_dequantize": (ctypes.c_int, (_POINTER(DequantizeParams), ctypes.c_void_p)),
    "fq_w4a4_gemm": (ctypes.c_int, (_POINTER(W4A4GemmParams), ctypes.c_void_p)),
    "fq_decode_attention": (ctypes.c_int, (_POINTER(DecodeAttentionParams), ctypes.c_void_p)),
    "fq_w4a4_gemm_tactics": (ctypes.c_int32, (_POINTER(W4A4GemmParams),)),
    "fq_last_error": (ctypes.c_char_p, ()),
    "fq_kernel_count": (ctypes.c_int32, ()),
    "fq_kernels": (_POINTER(Kernel), ()),
    "fq_abi_version": (ctypes.c_int32, ()),
    "fq_build_info": (ctypes.c_char_p, ()),
}


@cache
def library() -> ctypes.CDLL:
    """The library with its C API declared. It is loaded once a process.

    Raises:
        EngineError: It is not built, or cannot be loaded, or is of another version; the message says what to do.
    """
    path = require_library()
    try:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise EngineError(f"the kernels' library does not load: {error}: run `fqonnx plugin build --force`") from error
    version = loaded.fq_abi_version()
    if version != ABI_VERSION:
        raise EngineError(f"{path} has version {version} of the C API, not {ABI_VERSION}: run `fqonnx plugin build`")
    return loaded


def call(function: str, *params: ctypes.Structure, stream: int = 0) -> None:
    """Call a function of the C API that returns a status.

    Args:
        function: Such as ``fq_w4a4_gemm``.
        params: Its structures, in order.
        stream: A ``cudaStream_t``; 0 is the default stream.

    Raises:
        UsageError: It did not accept an argument.
        EngineError: No kernel takes the problem, CUDA refused, or there is no library.
    """
    loaded = library()
    status = getattr(loaded, function)(*map(ctypes.byref, params), stream)
    if status != OK:
        message = loaded.fq_last_error().decode()
        raise (UsageError if status == INVALID_ARGUMENT else EngineError)(f"{function}: {message}")


def variant_of(op: str, kernel: str | None) -> int:
    """A kernel's number for ``variant``; 0, the table's choice, for None.

    Raises:
        UsageError: No kernel of the op has that name; the message lists them.
    """
    if kernel is None:
        return 0
    numbers = {entry.name: 1 + index for index, entry in enumerate(KERNELS) if entry.op == op}
    if kernel not in numbers:
        raise UsageError(f"unknown {op} kernel {kernel!r}: choose from {', '.join(numbers)}")
    return numbers[kernel]


class Quantized(NamedTuple):
    """Codes and scales of rows.

    Attributes:
        q: int8 ``[.., K]``; packed uint8 ``[.., K / 2]``; int32x8 int32 ``[.., K / 8]``.
        scale: fp32 ``[.., 1]``.
    """

    q: torch.Tensor
    scale: torch.Tensor


class NormedQuantized(NamedTuple):
    """Codes and scales of normed rows.

    Attributes:
        q: As in ``Quantized``.
        scale: fp32 ``[.., 1]``.
        sum: ``x + residual`` of x's dtype and shape; None where there was no residual.
        normed: What was quantized, of x's dtype and shape; None where it was not asked for.
    """

    q: torch.Tensor
    scale: torch.Tensor
    sum: torch.Tensor | None
    normed: torch.Tensor | None


def flat_quantize(
    x: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    clip: float | torch.Tensor = 1.0,
    bits: int = 4,
    container: str = "int8",
    kernel: str | None = None,
    constant_factors: bool = False,
) -> Quantized:
    """Transform rows with a Kronecker pair and round them to integers: ``FlatQuantize`` (FlatQuant, arXiv 2410.09426, section 3.1).

    Args:
        x: ``[.., K]`` fp16, bf16 or fp32 on a CUDA device; rows contiguous, with any one stride from row to row.
        left: ``[n1, n1]`` of x's dtype or fp32, n1 up to 256.
        right: ``[n2, n2]`` of the same dtype; ``n1 n2`` divides K.
        clip: In (0, 1]; a tensor is one fp32 on the device, which is read when the kernel runs.
        bits: 4 or 8.
        container: A key of ``CONTAINERS``.
        kernel: Name of a kernel of ``fqonnx.ops.kernels.KERNELS``; None is the table's choice.
        constant_factors: No work that is still under way writes ``left``, ``right``, ``clip`` or a norm's gamma: they may be read while
            x is being made.

    Raises:
        UsageError: An argument that does not fit; the message names it.
        EngineError: No kernel takes this, or there is no library.
    """
    params, out = _quantize_params(x, left, right, clip=clip, bits=bits, container=container, kernel=kernel)
    params.constant_factors = constant_factors
    _enqueue(x, "fq_flat_quantize", params)
    return out


def quantize(
    x: torch.Tensor, *, clip: float | torch.Tensor = 1.0, bits: int = 4, container: str = "int8", kernel: str | None = None
) -> Quantized:
    """Round rows to integers as they are: ``FlatQuantize`` without a transform. Arguments and errors are those of ``flat_quantize``."""
    params, out = _quantize_params(x, None, None, clip=clip, bits=bits, container=container, kernel=kernel)
    _enqueue(x, "fq_flat_quantize", params)
    return out


def rms_norm_flat_quantize(
    x: torch.Tensor,
    gamma: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    *,
    epsilon: float,
    residual: torch.Tensor | None = None,
    want_normed: bool = False,
    clip: float | torch.Tensor = 1.0,
    bits: int = 4,
    container: str = "int8",
    kernel: str | None = None,
    constant_factors: bool = False,
) -> NormedQuantized:
    """``flat_quantize(rms_norm(x + residual) * gamma)`` in one launch; the norm in fp32, rounded once to x's dtype.

    Args:
        x: As in ``flat_quantize``.
        gamma: ``[K]`` of x's dtype.
        left: As in ``flat_quantize``; None, with ``right``, is no transform.
        right: Likewise.
        epsilon: Added to the mean of squares; not negative.
        residual: Of x's shape and dtype, contiguous; added first and rounded to x's dtype, and the sum returned.
        want_normed: Whether to return what is quantized, too.
        clip: As in ``flat_quantize``.
        bits: As in ``flat_quantize``.
        container: As in ``flat_quantize``.
        kernel: As in ``flat_quantize``.
        constant_factors: As in ``flat_quantize``.

    Raises:
        UsageError: An argument that does not fit; the message names it.
        EngineError: No kernel takes this, or there is no library.
    """
    import torch

    _rows(x, "x")
    _require(gamma, "gamma", like=x, shape=(x.shape[-1],), dtype=x.dtype)
    if residual is not None:
        _require(residual, "residual", like=x, shape=tuple(x.shape), dtype=x.dtype)
    params, out = _quantize_params(x, left, right, clip=clip, bits=bits, container=container, kernel=kernel)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device) if want_normed else None
    norm = RmsNormParams(gamma.data_ptr(), _address(residual), _address(total), _address(normed), epsilon)
    params.constant_factors = constant_factors
    _enqueue(x, "fq_rms_norm_flat_quantize", params, norm)
    return NormedQuantized(*out, sum=total, normed=normed)


def silu_mul_flat_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    *,
    clip: float | torch.Tensor = 1.0,
    bits: int = 4,
    container: str = "int8",
    kernel: str | None = None,
    constant_factors: bool = False,
) -> Quantized:
    """``flat_quantize(silu(gate) * up)`` in one launch; the product in fp32, rounded once to gate's dtype.

    Args:
        gate: ``[.., K]`` as x in ``flat_quantize``. ``gate`` and ``up`` may be the halves of one tensor.
        up: Of gate's shape and dtype, with any one stride from row to row.
        left: As in ``flat_quantize``; None, with ``right``, is no transform.
        right: Likewise.
        clip: As in ``flat_quantize``.
        bits: As in ``flat_quantize``.
        container: As in ``flat_quantize``.
        kernel: As in ``flat_quantize``.
        constant_factors: As in ``flat_quantize``.

    Raises:
        UsageError: An argument that does not fit; the message names it.
        EngineError: No kernel takes this, or there is no library.
    """
    _rows(gate, "gate")
    _, stride = _rows(up, "up")
    _require(up, "up", like=gate, shape=tuple(gate.shape), dtype=gate.dtype, contiguous=False)
    params, out = _quantize_params(gate, left, right, clip=clip, bits=bits, container=container, kernel=kernel)
    params.constant_factors = constant_factors
    _enqueue(gate, "fq_silu_mul_flat_quantize", params, SiluMulParams(up.data_ptr(), stride))
    return out


def dequantize(q: torch.Tensor, scale: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``q * scale`` by row.

    Args:
        q: Contiguous codes: int8 ``[.., K]``, packed uint8 ``[.., K / 2]`` or int32x8 int32 ``[.., K / 8]``: the dtype says which.
        scale: fp32, one a row.
        dtype: fp16, bf16 or fp32; None is fp32.

    Returns:
        ``[.., K]`` of ``dtype``.

    Raises:
        UsageError: An argument that does not fit; the message names it.
        EngineError: CUDA refused, or there is no library.
    """
    import torch

    dtype = dtype or torch.float32
    container, number = _container_of(q), _dtype(dtype, "dtype")
    k = q.shape[-1] * _CODES_PER_ITEM[container]
    rows = q.shape[:-1].numel()
    _require(q, "q", like=q, shape=tuple(q.shape), dtype=q.dtype)
    _require_scale(scale, rows, like=q)
    y = torch.empty((*q.shape[:-1], k), dtype=dtype, device=q.device)
    params = DequantizeParams(q.data_ptr(), scale.data_ptr(), y.data_ptr(), rows, k, CONTAINERS[container], number)
    _enqueue(q, "fq_dequantize", params)
    return y


def w4a4_gemm(
    q: torch.Tensor,
    scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    layout: str = "plain",
    kernel: str | None = None,
    tactic: int = 0,
    constant_weights: bool = False,
) -> torch.Tensor:
    """``(q . w^T) * w_scale * scale + bias`` with exact integer sums: ``W4A4Gemm``.

    Args:
        q: Contiguous codes ``[.., K]``: int8 holding -8..7 or -128..127; packed uint8 ``[.., K / 2]``; int32x8 int32 ``[.., K / 8]``.
        scale: fp32, one a row of q.
        w: uint8 or int8 ``[N, K / 2]``: 4-bit codes two a byte, in the order of ``layout``.
        w_scale: fp32 ``[N, groups]``, or ``[N]``: one a channel.
        bias: fp32 ``[N]``.
        dtype: Of the result, fp16, bf16 or fp32; None is fp16.
        layout: A key of ``LAYOUTS``.
        kernel: Name of a kernel of ``fqonnx.ops.kernels.KERNELS``; None is the table's choice.
        tactic: Tile of the kernel, from 1 to ``gemm_tactics``; 0 is chosen from the shape.
        constant_weights: No work that is still under way writes ``w``, ``w_scale`` or ``bias``: they may be read while q is being made.

    Returns:
        ``[.., N]`` of ``dtype``.

    Raises:
        UsageError: An argument that does not fit; the message names it.
        EngineError: No kernel takes this, or there is no library.
    """
    params, y = _gemm_params(q, scale, w, w_scale, bias, dtype=dtype, layout=layout, kernel=kernel, tactic=tactic)
    params.constant_weights = constant_weights
    _enqueue(q, "fq_w4a4_gemm", params)
    return y


def gemm_tactics(
    q: torch.Tensor,
    scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    layout: str = "plain",
    kernel: str | None = None,
) -> int:
    """How many tactics the kernel of such a ``w4a4_gemm`` has.

    Raises:
        UsageError: An argument that does not fit; the message names it.
        EngineError: No kernel takes this, or there is no library.
    """
    import torch

    params, _ = _gemm_params(q, scale, w, w_scale, bias, dtype=dtype, layout=layout, kernel=kernel, tactic=0)
    with torch.cuda.device(q.device):
        count: int = library().fq_w4a4_gemm_tactics(ctypes.byref(params))
    if not count:
        raise EngineError(f"fq_w4a4_gemm_tactics: {library().fq_last_error().decode()}")
    return count


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past: torch.Tensor,
    *,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
    longest: int | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """One token of each sequence attends to those before it and to itself; its key and value are written into the cache.

    That is com.microsoft.GroupQueryAttention with ``sequence_length`` 1 and a cache that stays where it is. Sums are in fp32; the new key
    and value are rounded to what the cache holds before they are used.

    Args:
        q: ``[batch, heads * head]`` fp16 or bf16 on a CUDA device; rows contiguous, with any one stride: q, k and v may be parts of one
            product's output.
        k: ``[batch, kv_heads * head]`` likewise.
        v: ``[batch, kv_heads * head]`` likewise.
        key: ``[batch, kv_heads, capacity, head]`` of q's dtype, or int8 where q is fp16; contiguous; ``key[b, :, past[b]]`` is written.
            head is 64 or 128.
        value: Likewise.
        past: int32 ``[batch]``: tokens that the cache holds. A sequence whose cache is full gets NaN.
        rotary: Cosines and sines ``[positions, head / 2]`` of q's dtype, for the rotary embedding (arXiv 2104.09864) that pairs element i
            with i + head / 2; None is none.
        scales: Of an int8 cache: fp32 scales of keys and of values, one each or ``[kv_heads, head]``; a value is ``code * scale``, and
            codes are ``clamp(round_half_even(x / scale), -128, 127)``.
        scale: Of scores; None is ``head ** -0.5``.
        longest: Largest ``past + 1`` expected, by which work is shared out; None is the capacity.
        kernel: Name of a kernel of ``fqonnx.ops.kernels.KERNELS``; None is the table's choice.

    Returns:
        ``[batch, heads * head]`` of q's dtype.

    Raises:
        UsageError: An argument that does not fit; the message names it.
        EngineError: No kernel takes this, or there is no library.
    """
    import torch

    number = _dtype(q.dtype, "q")
    strides = [_rows(x, name)[1] for x, name in ((q, "q"), (k, "k"), (v, "v"))]
    if q.dim() != 2 or key.dim() != 4 or not key.shape[3] or q.shape[1] % key.shape[3]:
        raise UsageError(f"q {list(q.shape)} and key {list(key.shape)} are not [batch, heads * head] and [batch, kv_heads, capacity, head]")
    batch, (kv_heads, capacity, head) = len(q), key.shape[1:]
    for x, name in ((k, "k"), (v, "v")):
        _require(x, name, like=q, shape=(batch, kv_heads * head), dtype=q.dtype, contiguous=False)
    for x, name in ((key, "key"), (value, "value")):
        _require(x, name, like=q, shape=(batch, kv_heads, capacity, head), dtype=q.dtype if scales is None else torch.int8)
    a_channel = scales is not None and scales[0].numel() > 1
    for x, name in zip(scales or (), ("scale of keys", "scale of values"), strict=False):
        _require(x, name, like=q, shape=(kv_heads, head) if a_channel else tuple(x.shape) if x.numel() == 1 else (), dtype=torch.float32)
    key_scale, value_scale = scales or (None, None)
    _require(past, "past", like=q, shape=(batch,), dtype=torch.int32)
    positions = 0
    for x, name in zip(rotary or (), ("cosines", "sines"), strict=False):
        positions = len(x) if x.dim() else 0
        _require(x, name, like=q, shape=(positions, head // 2), dtype=q.dtype)
    cos, sin = rotary or (None, None)
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    params = DecodeAttentionParams(
        *map(_address, (q, k, v, cos, sin, past, key, value, key_scale, value_scale, y)),
        batch, capacity, positions, capacity if longest is None else longest, *strides, q.shape[1] // head, kv_heads, head, number,
        CACHES["float" if scales is None else "int8"], CACHE_SCALES["channel" if a_channel else "tensor"],
        head**-0.5 if scale is None else scale, variant_of("GroupQueryAttention", kernel),
    )  # fmt: skip
    _enqueue(q, "fq_decode_attention", params)
    return y


def flatquant_dynamic_quantize(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, clip_ratio: float = 1.0, pack_int32: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``flat_quantize`` to 4 bits under the name and arguments by which FlatQuant operators are known.

    Codes are two's complement in int32 too: a nibble holds ``code & 15``, not ``code + 8``.

    Args:
        x: ``[tokens, features]`` fp16, bf16 or fp32 on a CUDA device.
        left: ``[n1, n1]``.
        right: ``[n2, n2]``; ``n1 n2 = features``.
        clip_ratio: In (0, 1].
        pack_int32: Eight codes in an int32, index 0 in the lowest nibble, instead of one a byte; features is a multiple of 8.

    Returns:
        Codes, int8 ``[tokens, features]`` or int32 ``[tokens, features / 8]``; scales, fp32 ``[tokens]``.

    Raises:
        UsageError: An argument that does not fit; the message names it.
        EngineError: No kernel takes this, or there is no library.
    """
    if x.dim() != 2 or left.shape[0] * right.shape[0] != x.shape[1]:
        raise UsageError(f"left {list(left.shape)} and right {list(right.shape)} do not transform the rows of x {list(x.shape)}")
    q, scale = flat_quantize(x, left, right, clip=clip_ratio, container="int32x8" if pack_int32 else "int8")
    return q, scale.reshape(-1)


def dequantize_int4(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``dequantize`` to fp32: what ``flatquant_dynamic_quantize`` returned, ``[tokens, features]`` again."""
    return dequantize(q, scale)


def get_decompose_dim(n: int) -> tuple[int, int]:
    """Sizes ``n1 <= n2`` of the Kronecker pair for n features, ``n1 n2 == n``: ``fqonnx.calib.kron.factor``.

    FlatQuant's function of this name looks for the pair with the smallest sum as a difference of squares, which there is not for
    ``n = 2 (mod 4)``: it then never returns. This one returns for every n (a prime gives ``(1, n)``), and prefers right factors of 128,
    which flatten better for the same memory traffic: 4,096 gives ``(32, 128)``, not ``(64, 64)``.

    Raises:
        ValueError: ``n`` is below 1.
    """
    return factor(n)


_CODES_PER_ITEM = {"int8": 1, "packed": 2, "int32x8": 8}


def _quantize_params(
    x: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    *,
    clip: float | torch.Tensor,
    bits: int,
    container: str,
    kernel: str | None,
) -> tuple[FlatQuantizeParams, Quantized]:
    import torch

    dtype = _dtype(x.dtype, "x")
    rows, stride = _rows(x, "x")
    k = x.shape[-1]
    if container not in CONTAINERS:
        raise UsageError(f"unknown container {container!r}: choose from {', '.join(CONTAINERS)}")
    if k % _CODES_PER_ITEM[container]:
        raise UsageError(f"rows of {k} codes do not fill container {container}: use int8")
    if (left is None) != (right is None):
        raise UsageError("left and right are given together, or neither is")
    factor_dtype = dtype
    for name, matrix in (("left", left), ("right", right)):
        if matrix is not None:
            factor_dtype = _dtype(matrix.dtype, name)
            side = matrix.shape[-1] if matrix.dim() else 1
            _require(matrix, name, like=x, shape=(side, side), dtype=left.dtype if left is not None else None)
    if isinstance(clip, torch.Tensor):
        if clip.numel() != 1:
            raise UsageError(f"clip has {clip.numel()} values, not 1")
        _require(clip, "clip", like=x, shape=tuple(clip.shape), dtype=torch.float32)
    params = FlatQuantizeParams(n1=1, n2=1, factor_dtype=factor_dtype, dtype=dtype, bits=bits, container=CONTAINERS[container])
    params.variant = variant_of("FlatQuantize", kernel)
    if left is not None and right is not None:
        params.left, params.right, params.n1, params.n2 = left.data_ptr(), right.data_ptr(), len(left), len(right)
    if isinstance(clip, torch.Tensor):
        params.clip_ptr = clip.data_ptr()
    else:
        params.clip = clip
    item = {"int8": torch.int8, "packed": torch.uint8, "int32x8": torch.int32}[container]
    q = torch.empty((*x.shape[:-1], k // _CODES_PER_ITEM[container]), dtype=item, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    params.x, params.q, params.scale = x.data_ptr(), q.data_ptr(), scale.data_ptr()
    params.rows, params.k, params.x_stride = rows, k, stride
    return params, Quantized(q, scale)


def _gemm_params(
    q: torch.Tensor,
    scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    dtype: torch.dtype | None,
    layout: str,
    kernel: str | None,
    tactic: int,
) -> tuple[W4A4GemmParams, torch.Tensor]:
    import torch

    dtype = dtype or torch.float16
    container, number = _container_of(q), _dtype(dtype, "dtype")
    if layout not in LAYOUTS:
        raise UsageError(f"unknown weight layout {layout!r}: choose from {', '.join(LAYOUTS)}")
    k, rows = q.shape[-1] * _CODES_PER_ITEM[container], q.shape[:-1].numel()
    n = w.shape[0] if w.dim() else 0
    _require(q, "q", like=q, shape=tuple(q.shape), dtype=q.dtype)
    _require_scale(scale, rows, like=q)
    if w.dtype not in (torch.uint8, torch.int8):
        raise UsageError(f"w is {w.dtype}: two 4-bit codes a byte are uint8 or int8")
    _require(w, "w", like=q, shape=(n, k // 2), dtype=w.dtype)
    groups = w_scale.shape[1] if w_scale.dim() == 2 else 1
    _require(w_scale, "w_scale", like=q, shape=(n, groups) if w_scale.dim() == 2 else (n,), dtype=torch.float32)
    if bias is not None:
        _require(bias, "bias", like=q, shape=(n,), dtype=torch.float32)
    y = torch.empty((*q.shape[:-1], n), dtype=dtype, device=q.device)
    params = W4A4GemmParams(
        *(tensor.data_ptr() for tensor in (q, scale, w, w_scale)), _address(bias), y.data_ptr(), rows, n, k, groups,
        number, CONTAINERS[container], LAYOUTS[layout], variant_of("W4A4Gemm", kernel), tactic, False,
    )  # fmt: skip
    return params, y


def _enqueue(tensor: torch.Tensor, function: str, *params: ctypes.Structure) -> None:
    """Call on the tensor's device and torch's current stream there."""
    import torch

    with torch.cuda.device(tensor.device):
        call(function, *params, stream=torch.cuda.current_stream().cuda_stream)


def _rows(x: torch.Tensor, name: str) -> tuple[int, int]:
    """How many rows x has, and the elements from one to the next, where that is the same everywhere."""
    if not x.is_cuda:
        raise UsageError(f"{name} is on {x.device}: kernels take CUDA tensors")
    if not x.dim():
        raise UsageError(f"{name} is a scalar: kernels take rows, [.., K]")
    k, rows = x.shape[-1], x.shape[:-1].numel()
    if rows <= 1 and (x.stride(-1) == 1 or k <= 1):
        return rows, k
    # From the innermost leading axis on, each axis has to go on where the one inside it ends.
    axes = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1][::-1]
    ends = [stride * size for size, stride in axes]
    joined = all(end == stride for end, (_, stride) in zip(ends, axes[1:], strict=False))
    if rows == 0 or (joined and x.stride(-1) == 1 and axes[0][1] >= k):
        return rows, axes[0][1] if rows else k
    raise UsageError(f"{name} {list(x.shape)} with strides {list(x.stride())} has no one stride from row to row: pass {name}.contiguous()")


def _require(
    tensor: torch.Tensor, name: str, *, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, contiguous: bool = True
) -> None:
    if not tensor.is_cuda:
        raise UsageError(f"{name} is on {tensor.device}: kernels take CUDA tensors")
    if tensor.device != like.device:
        raise UsageError(f"{name} is on {tensor.device} and other operands are on {like.device}: move it there")
    if tuple(tensor.shape) != shape:
        raise UsageError(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise UsageError(f"{name} is {tensor.dtype}, not {dtype}")
    if contiguous and not tensor.is_contiguous():
        raise UsageError(f"{name} {list(tensor.shape)} has strides {list(tensor.stride())}: pass {name}.contiguous()")


def _require_scale(scale: torch.Tensor, rows: int, *, like: torch.Tensor) -> None:
    import torch

    if scale.numel() != rows:
        raise UsageError(f"scale {list(scale.shape)} has {scale.numel()} values for {rows} rows")
    _require(scale, "scale", like=like, shape=tuple(scale.shape), dtype=torch.float32)


def _container_of(q: torch.Tensor) -> str:
    import torch

    containers = {torch.int8: "int8", torch.uint8: "packed", torch.int32: "int32x8"}
    if q.dtype not in containers:
        raise UsageError(f"q is {q.dtype}: codes are int8 (one each), uint8 (two packed) or int32 (eight packed)")
    if not q.dim():
        raise UsageError("q is a scalar: kernels take rows, [.., K]")
    return containers[q.dtype]


def _dtype(dtype: torch.dtype, name: str) -> int:
    number = DTYPES.get(str(dtype).removeprefix("torch."))
    if number is None:
        raise UsageError(f"{name} is {dtype}: kernels take {', '.join(DTYPES)}")
    return number


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
