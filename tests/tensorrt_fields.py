"""Fields of TensorRT plugins that make no sense, and what is said of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class BadField:
    op: str
    fields: dict[str, Any]
    message: str

    def __str__(self) -> str:
        return f"{self.op}-{'-'.join(f'{name}={value}' for name, value in self.fields.items())}"


_PLAIN_NOT_K128 = "field layout_shape is [0, -1], not [0, -1, 4, 4, 4, 2] of layout k128"

BAD_FIELDS = [
    BadField("FlatQuantize", {"bits": 5}, "field bits is 5, not 4 or 8"),
    BadField("FlatQuantize", {"bits": -4}, "field bits is -4, not 4 or 8"),
    BadField("FlatQuantize", {"bits": np.int64(2**32 + 4)}, "field bits is 4294967300, not 4 or 8"),
    BadField("FlatQuantize", {"bits": 4.0}, "field bits is of type FLOAT32, not INT32"),
    BadField("FlatQuantize", {"bits": b"4"}, "field bits is of type CHAR, not INT32"),
    BadField("FlatQuantize", {"bits": np.int8(4)}, "field bits is of type INT8, not INT32"),
    BadField("FlatQuantize", {"bits": [4, 4]}, "field bits has 2 values, not 1"),
    BadField("FlatQuantize", {"bits": np.zeros(0, np.int32)}, "field bits has 0 values, not 1"),
    BadField("FlatQuantize", {"bits": np.zeros(2000, np.int32)}, "field bits has 2000 values, not 0 to 1024"),
    BadField("FlatQuantize", {"packed": 2}, "field packed is 2, not 0 or 1"),
    BadField("FlatQuantize", {"bits": 8, "packed": 1}, "field packed is 1 and field bits is 8: only codes of 4 bits are packed two a byte"),
    BadField("FlatQuantize", {"gate": 0}, "there is no field gate: fields are bits, packed"),
    BadField("SiluMulFlatQuantize", {"gate": 2}, "field gate is 2, not 0 or 1"),
    BadField("SiluMulFlatQuantize", {"bits": 3}, "field bits is 3, not 4 or 8"),
    BadField("RmsNormFlatQuantize", {"epsilon": -0.5}, "field epsilon is -0.500000, not a finite number from 0 on"),
    BadField("RmsNormFlatQuantize", {"epsilon": float("nan")}, "field epsilon is nan, not a finite number from 0 on"),
    BadField("AddRmsNormFlatQuantize", {"epsilon": float("inf")}, "field epsilon is inf, not a finite number from 0 on"),
    BadField("AddRmsNormFlatQuantize", {"epsilon": 1}, "field epsilon is of type INT32, not FLOAT32"),
    BadField("W4A4Gemm", {"packed": -1}, "field packed is -1, not 0 or 1"),
    BadField("W4A4Gemm", {"dtype": 7}, "field dtype is 7, not 1 or 10 or 16"),
    BadField("W4A4Gemm", {"layout": b"k256"}, "field layout is k256, not plain or k128"),
    BadField("W4A4Gemm", {"layout": b""}, "field layout is , not plain or k128"),
    BadField("W4A4Gemm", {"layout": 1}, "field layout is of type INT32, not CHAR"),
    BadField("W4A4Gemm", {"layout": b"k128"}, _PLAIN_NOT_K128),
    BadField("W4A4Gemm", {"layout_shape": [0, -1, 2]}, "field layout_shape is [0, -1, 2], not [0, -1] of layout plain"),
    BadField("W4A4Gemm", {"layout_perm": [1, 0]}, "field layout_perm is [1, 0], not [0, 1] of layout plain"),
    BadField("W4A4Gemm", {"layout_perm": [0.0, 1.0]}, "field layout_perm is of type FLOAT32, not INT32"),
    BadField("W4A4Gemm", {"bits": 4}, "there is no field bits: fields are packed, layout, layout_shape, layout_perm, dtype"),
]
