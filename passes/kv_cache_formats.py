"""How keys and values are stored in a quantized cache: the formats, what they mean in numpy, and their nodes in standard operators.

A cache ``[batch, heads, tokens, size]`` is quantized per head and token: every vector of ``size`` values has a scale of its own, and in
the integer formats a zero point, since keys and values are not symmetric about zero. In ``int4`` every 32 values of a vector have, where
its size is a multiple of that: with four bits the width of a range is what counts. Parts of the cache, per format:

| format | codes | scale | zero point |
|---|---|---|---|
| ``int8`` | uint8 ``[.., size]`` | ``[.., 1]`` | uint8 ``[.., 1]`` |
| ``int4`` | uint8 ``[.., size / 2]``: channel ``i`` in the low nibble, ``i + size / 2`` in the high one | ``[.., size / 32]`` | uint8 |
| ``fp8`` | uint8 ``[.., size]``, the bits of FLOAT8E4M3FN | ``[.., 1]`` | |

A value is ``(code - zero_point) * scale``, where the code of ``int4`` is 16 times the nibble: so the zero point falls on sixteenths of a
step, which 16 cells of equal width over a vector's range need. Scales have the cache's own float type. fp8 is stored as bytes because
ONNX's ``Concat`` takes no float8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fqonnx.passes.edit import last_dim

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fqonnx.passes.edit import Insertion

Array = npt.NDArray[Any]
UINT8, FLOAT = ir.DataType.UINT8, ir.DataType.FLOAT
GROUP = 32
"""Values of a vector that share a scale in ``int4``."""
E4M3_MAX = 448.0
"""Largest FLOAT8E4M3FN."""


@dataclass(frozen=True)
class Format:
    """One way to store keys and values.

    Attributes:
        name: As ``--kv`` takes it.
        bits: Bits of a code.
        zero_point: Whether there is a zero point beside the scale.
    """

    name: str
    bits: int
    zero_point: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """What a cache consists of: ``codes`` first, the others' names are suffixes of the interface's names."""
        return ("codes", "scale", "zero_point") if self.zero_point else ("codes", "scale")

    @property
    def steps(self) -> int:
        """Scales in the range of a vector: 255 between the ends, or 16 cells of 16."""
        return 256 if self.bits == 4 else 255

    def groups(self, size: int) -> int:
        """Scales of one vector of ``size`` values."""
        return size // GROUP if self.bits == 4 and size % GROUP == 0 else 1

    def columns(self, part: str, size: int) -> int:
        """Elements of a part that one vector of ``size`` values takes."""
        return size * self.bits // 8 if part == "codes" else self.groups(size)

    def dtype(self, part: str, cache: ir.DataType) -> ir.DataType:
        """A part's element type where the float cache has type ``cache``."""
        return cache if part == "scale" else UINT8

    def bytes_per_vector(self, size: int, cache: ir.DataType) -> int:
        """Bytes that one head's key or value of one token takes, scale and zero point included."""
        return sum(self.columns(part, size) * self.dtype(part, cache).bitwidth // 8 for part in self.parts)


FORMATS = {f.name: f for f in (Format("int8", 8, True), Format("int4", 4, True), Format("fp8", 8, False))}


# --- The meaning --------------------------------------------------------------------------------------------------------------------------


def quantize(x: Array, form: Format) -> dict[str, Array]:
    """The parts of a cache that holds ``x``.

    The range of a vector is widened to hold zero, ``low = min(min x, 0)``, ``high = max(max x, 0)``.

    - int8: ``scale = (high - low) / 255``, ``zero_point = round(-low / scale)``, ``code = clamp(round(x / scale) + zero_point)``: both ends
      are met.
    - int4: 16 cells of equal width, values at their centres: ``scale = (high - low) / 256``, ``zero_point = round(-low / scale) - 8``,
      ``nibble = round((x / scale + zero_point) / 16)``, clamped. The error is 6 % less than with both ends met.
    - fp8: ``scale = max |x| / 448``.

    The scale is computed in fp32, held above the smallest normal number, and rounded to ``x``'s type before the codes are taken. Rounding
    is half to even.

    Args:
        x: ``[.., size]`` fp32, fp16 or bf16; a row with a NaN or an infinity gets the scale NaN.
        form: The format.

    Returns:
        By part, as the module says.
    """
    wide = x.astype(np.float32).reshape(*x.shape[:-1], form.groups(x.shape[-1]), -1)
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = np.minimum(wide.min(-1, keepdims=True), 0), np.maximum(wide.max(-1, keepdims=True), 0)
        step = (high - low) / np.float32(form.steps) if form.zero_point else np.maximum(high, -low) / np.float32(E4M3_MAX)
        scale = (np.maximum(step, _smallest(x.dtype)) + wide.sum(-1, keepdims=True) * np.float32(0)).astype(x.dtype)
        divisor = scale.astype(np.float32)
        if not form.zero_point:
            ratio = np.clip(wide / divisor, -E4M3_MAX, E4M3_MAX)
            return {"codes": ratio.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).reshape(x.shape), "scale": scale[..., 0]}
        if form.bits == 4:
            zero = np.clip(np.round(-low / divisor) - 8, 0, 255)
            codes = np.clip(np.round((wide / divisor + zero) / 16), 0, 15)
        else:
            zero = np.clip(np.round(-low / divisor), 0, 255)
            codes = np.clip(np.round(wide / divisor) + zero, 0, 255)
        codes, zero = (np.nan_to_num(a).astype(np.uint8) for a in (codes.reshape(x.shape), zero[..., 0]))
    if form.bits == 4:
        half = codes.shape[-1] // 2
        codes = codes[..., :half] | (codes[..., half:] << 4)
    return {"codes": codes, "scale": scale[..., 0], "zero_point": zero}


def dequantize(parts: Mapping[str, Array], form: Format) -> Array:
    """The values of a cache in its scales' type; the inverse of ``quantize`` up to rounding."""
    codes, scale = parts["codes"], parts["scale"]
    if not form.zero_point:
        values: Array = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale.astype(np.float32)
        return values.astype(scale.dtype)
    if form.bits == 4:
        codes = np.concatenate([codes << 4, codes & 0xF0], axis=-1)
    rows = codes.astype(np.float32).reshape(*scale.shape, -1)
    rows = (rows - parts["zero_point"].astype(np.float32)[..., None]) * scale.astype(np.float32)[..., None]
    return rows.reshape(codes.shape).astype(scale.dtype)


def _smallest(dtype: np.dtype[Any]) -> np.float32:
    return np.float32(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]  # published without types


# --- The nodes ----------------------------------------------------------------------------------------------------------------------------


class Emitter:
    """Writes the nodes of one cache in front of an anchor.

    Args:
        insert: Where nodes go.
        name: What their names begin with.
        form: The format.
        dtype: Float type of the cache.
        size: Size of a head.
    """

    def __init__(self, insert: Insertion, name: str, form: Format, dtype: ir.DataType, size: int) -> None:
        self._insert, self._name, self._form, self._dtype, self._size = insert, name, form, dtype, size
        self._groups = form.groups(size)

    def quantize(self, x: ir.Value) -> dict[str, ir.Value]:
        """Nodes from ``x`` ``[.., size]`` to the parts of ``quantize``."""
        form = self._form
        wide = x if self._dtype == FLOAT else self._node("Cast", [x], "wide", FLOAT, x.shape, to=FLOAT.value)
        if self._groups > 1:
            sizes = (self._groups, self._size // self._groups)
            grouped = None if x.shape is None else ir.Shape([*x.shape[:-1], *sizes])
            wide = self._node("Reshape", [wide, self._ints("groups", [0, 0, 0, *sizes])], "grouped", FLOAT, grouped)
        narrow = last_dim(wide.shape, 1)
        axis, zero = self._ints("axis", [-1]), self._floats("nought", 0.0)
        low = self._node("Min", [self._node("ReduceMin", [wide, axis], "min", FLOAT, narrow, keepdims=1), zero], "low", FLOAT, narrow)
        high = self._node("Max", [self._node("ReduceMax", [wide, axis], "max", FLOAT, narrow, keepdims=1), zero], "high", FLOAT, narrow)
        if form.zero_point:
            span, steps = self._node("Sub", [high, low], "span", FLOAT, narrow), float(form.steps)
        else:
            span, steps = self._node("Max", [high, self._node("Neg", [low], "depth", FLOAT, narrow)], "span", FLOAT, narrow), E4M3_MAX
        step = self._node("Div", [span, self._floats("steps", steps)], "step", FLOAT, narrow)
        smallest = self._floats("smallest", float(_smallest(self._dtype.numpy())))
        # Not every runtime's ReduceMax sees a NaN; a sum does.
        poison = self._node("Mul", [self._node("ReduceSum", [wide, axis], "sum", FLOAT, narrow, keepdims=1), zero], "poison", FLOAT, narrow)
        bounded = self._node("Max", [step, smallest], "bounded", FLOAT, narrow)
        scale = divisor = self._first(self._node("Add", [bounded, poison], "poisoned", FLOAT, narrow), "divisor")
        if self._dtype != FLOAT:
            scale = self._node("Cast", [divisor], "scale", self._dtype, narrow, to=self._dtype.value)
            divisor = self._node("Cast", [scale], "rounded_divisor", FLOAT, narrow, to=FLOAT.value)
        scale = self._flat(scale, "scales")
        if not form.zero_point:
            return {"codes": self._e4m3(self._node("Div", [wide, divisor], "ratio", FLOAT, x.shape)), "scale": scale}
        depth = self._node("Neg", [self._node("Div", [low, divisor], "low_ratio", FLOAT, narrow)], "depth", FLOAT, narrow)
        rounded = self._node("Round", [depth], "rounded", FLOAT, narrow)
        if form.bits == 4:
            rounded = self._node("Sub", [rounded, self._floats("half_a_step", 8.0)], "centred", FLOAT, narrow)
        clipped = self._node("Clip", [rounded, zero, self._floats("highest", 255.0)], "clipped", FLOAT, narrow)
        whole = self._first(clipped, "zero")
        zero_point = self._flat(self._node("Cast", [whole], "zero_point", UINT8, narrow, to=UINT8.value), "zero_points")
        if form.bits == 4:
            nibbles = self._nibbles(self._node("Div", [wide, divisor], "ratio", FLOAT, wide.shape), whole)
            codes = self._pack(self._flat(nibbles, "nibbles_in_a_row"))
        else:
            codes = self._node("QuantizeLinear", [x, scale, zero_point], "codes", UINT8, x.shape, axis=-1, block_size=self._size)
        return {"codes": codes, "scale": scale, "zero_point": zero_point}

    def dequantize(self, parts: Mapping[str, ir.Value]) -> ir.Value:
        """Nodes from the parts to the float cache."""
        codes, scale = parts["codes"], parts["scale"]
        shape = last_dim(codes.shape, self._size)
        if not self._form.zero_point:
            index = self._node("Cast", [codes], "index", ir.DataType.INT32, shape, to=ir.DataType.INT32.value)
            values = self._node("Gather", [self._table(), index], "values", self._dtype, shape)
            return self._node("Mul", [values, scale], "dequantized", self._dtype, shape)
        if self._form.bits == 4:
            low = self._node("BitShift", [codes, self._bytes("low_up", 4)], "low_nibbles", UINT8, codes.shape, direction="LEFT")
            high = self._node("BitwiseAnd", [codes, self._bytes("high_mask", 0xF0)], "high_nibbles", UINT8, codes.shape)
            codes = self._node("Concat", [low, high], "unpacked", UINT8, shape, axis=-1)
        inputs = [codes, scale, parts["zero_point"]]
        return self._node("DequantizeLinear", inputs, "dequantized", self._dtype, shape, axis=-1, block_size=self._size // self._groups)

    def _first(self, x: ir.Value, name: str) -> ir.Value:
        """The first column: ONNX Runtime (1.31) leaves a tensor without tokens unreduced; elsewhere this is all there is."""
        bounds = [self._ints(f"{name}_{word}", [value]) for word, value in (("begin", 0), ("end", 1), ("axis", -1))]
        return self._node("Slice", [x, *bounds], name, FLOAT, x.shape)

    def _flat(self, x: ir.Value, name: str) -> ir.Value:
        """Groups of a vector, or what there is one of for each of them, side by side again."""
        if self._groups == 1:
            return x
        shape = x.shape
        assert x.dtype is not None
        flat = None if shape is None else ir.Shape([*shape[:-2], self._size if shape[-1] != 1 else self._groups])
        columns = -1 if flat is None else flat[-1]
        assert isinstance(columns, int)
        return self._node("Reshape", [x, self._ints(f"{name}_shape", [0, 0, 0, columns])], name, x.dtype, flat)

    def _nibbles(self, ratio: ir.Value, zero: ir.Value) -> ir.Value:
        shape = ratio.shape
        moved = self._node("Add", [ratio, zero], "moved", FLOAT, shape)
        steps = self._node("Div", [moved, self._floats("sixteen", 16.0)], "cells", FLOAT, shape)
        rounded = self._node("Round", [steps], "rounded_cells", FLOAT, shape)
        limits = [self._floats("lowest_nibble", 0.0), self._floats("highest_nibble", 15.0)]
        clipped = self._node("Clip", [rounded, *limits], "clipped_cells", FLOAT, shape)
        return self._node("Cast", [clipped], "nibbles", UINT8, shape, to=UINT8.value)

    def _pack(self, codes: ir.Value) -> ir.Value:
        half = last_dim(codes.shape, self._size // 2)
        split = ir.node("Split", [codes], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{self._name}.halves")
        low, high = self._insert.add(split)
        for value in (low, high):
            value.type, value.shape = ir.TensorType(UINT8), half
        shifted = self._node("BitShift", [high, self._bytes("up", 4)], "shifted", UINT8, half, direction="LEFT")
        return self._node("BitwiseOr", [low, shifted], "packed", UINT8, half)

    def _e4m3(self, ratio: ir.Value) -> ir.Value:
        """The bits of ``ratio`` rounded to E4M3: sign, four bits of exponent (bias 7), three of fraction.

        With ``e = max(floor(log2 |v|), -6)`` the lower seven bits are ``8 (e + 6) + |v| 2^(3 - e)``, subnormals included. An ``e`` that the
        logarithm puts one too low gives the same number.
        """
        shape = ratio.shape
        limits = [self._floats("e4m3_lowest", -E4M3_MAX), self._floats("e4m3_highest", E4M3_MAX)]
        clipped = self._node("Clip", [ratio, *limits], "ratio_clipped", FLOAT, shape)
        f8 = ir.DataType.FLOAT8E4M3FN
        narrow = self._node("Cast", [clipped], "narrow", f8, shape, to=f8.value)
        v = self._node("Cast", [narrow], "narrowed", FLOAT, shape, to=FLOAT.value)
        magnitude = self._node("Abs", [v], "magnitude", FLOAT, shape)
        normal = self._node("Max", [magnitude, self._floats("e4m3_normal", 2.0**-6)], "normal", FLOAT, shape)
        log2 = self._node("Div", [self._node("Log", [normal], "log", FLOAT, shape), self._floats("ln2", np.log(2.0))], "log2", FLOAT, shape)
        floored = self._node("Floor", [log2], "floor", FLOAT, shape)
        e = self._node("Max", [floored, self._floats("lowest_exponent", -6.0)], "exponent", FLOAT, shape)
        places = self._node("Sub", [self._floats("three", 3.0), e], "places", FLOAT, shape)
        power = self._node("Pow", [self._floats("two", 2.0), places], "power", FLOAT, shape)
        fraction = self._node("Mul", [magnitude, power], "fraction", FLOAT, shape)
        biased = self._node("Add", [e, self._floats("six", 6.0)], "biased", FLOAT, shape)
        exponent_bits = self._node("Mul", [biased, self._floats("eight", 8.0)], "exponent_bits", FLOAT, shape)
        bits = self._node("Add", [exponent_bits, fraction], "magnitude_bits", FLOAT, shape)
        negative = self._node("Less", [v, self._floats("e4m3_zero", 0.0)], "negative", ir.DataType.BOOL, shape)
        sign = self._node("Where", [negative, self._floats("sign_bit", 128.0), self._floats("no_bit", 0.0)], "sign", FLOAT, shape)
        exact = self._node("Round", [self._node("Add", [bits, sign], "signed_bits", FLOAT, shape)], "exact_bits", FLOAT, shape)
        return self._node("Cast", [exact], "codes", UINT8, shape, to=UINT8.value)

    def _table(self) -> ir.Value:
        values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(self._dtype.numpy())
        return self._insert.constant(f"{self._name}.e4m3", ir.tensor(values, dtype=self._dtype))

    def _node(
        self, op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, shape: ir.Shape | None, **attributes: int | str
    ) -> ir.Value:
        return self._insert.node(op, inputs, attributes, name=f"{self._name}.{name}", dtype=dtype, shape=shape)

    def _floats(self, name: str, value: float) -> ir.Value:
        return self._insert.constant(f"{self._name}.{name}", ir.tensor(np.float32(value)))

    def _ints(self, name: str, values: list[int]) -> ir.Value:
        return self._insert.constant(f"{self._name}.{name}", ir.tensor(np.array(values, np.int64)))

    def _bytes(self, name: str, value: int) -> ir.Value:
        return self._insert.constant(f"{self._name}.{name}", ir.tensor(np.uint8(value)))
