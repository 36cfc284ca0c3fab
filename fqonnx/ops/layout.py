"""Storage of int4 codes: two nibbles a byte, and the order of a weight's codes along K that a kernel wants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fqonnx.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

Int8Array = npt.NDArray[np.int8]
UInt8Array = npt.NDArray[np.uint8]

CONTAINERS = ("int8", "packed")
"""How ``FlatQuantize`` hands its codes on: one a byte, or two 4-bit codes a byte (even index in the low nibble)."""


@dataclass(frozen=True)
class Layout:
    """An order of the codes along K, the same in every block of ``math.prod(digits)`` codes.

    A block in storage is an array of shape ``digits``; transposed by ``order`` and flattened it is in the order of K.

    Attributes:
        digits: Shape of one stored block, outermost first; empty where storage is the order of K.
        order: The stored axis that each axis of the logical block comes from.
    """

    digits: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    @property
    def block(self) -> int:
        """Codes in a block; K must be a multiple of it."""
        return math.prod(self.digits)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that stored ``[N, K]`` codes are reshaped to before ``perm``: an ONNX ``Reshape`` shape, 0 keeps N."""
        return (0, -1, *self.digits)

    @property
    def perm(self) -> tuple[int, ...]:
        """Permutation of ``shape`` that gives the order of K once it is flattened to ``[N, K]`` again."""
        return (0, 1, *(2 + axis for axis in self.order))

    def check(self, k: int) -> None:
        """Whether rows of K codes fit.

        Raises:
            ModelError: K is not a multiple of the block.
        """
        if k % self.block:
            raise ModelError(f"rows of {k} codes do not fit a weight layout of blocks of {self.block}: use layout 'plain'")


LAYOUTS = {
    "plain": Layout(),
    # Place (t, j, i, h) holds k = (j, h, t, i): the 16 bytes that thread t of a quad loads are its operands of four K=32 wgmma
    # steps j, and one shift parts the halves h of a step.
    "k128": Layout(digits=(4, 4, 4, 2), order=(1, 3, 0, 2)),
}


def layout_named(name: str) -> Layout:
    """The layout of that name.

    Raises:
        ModelError: There is none; the message lists the names.
    """
    if name not in LAYOUTS:
        raise ModelError(f"unknown weight layout {name!r}: choose from {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def to_layout(codes: Int8Array, layout: str) -> Int8Array:
    """Reorder codes from the order of K to that of storage.

    Args:
        codes: ``[N, K]`` int8.
        layout: A key of ``LAYOUTS``.

    Returns:
        ``[N, K]`` int8, C-contiguous.

    Raises:
        ModelError: An unknown layout, or K is not a multiple of its block.
    """
    chosen = _fitting(codes, layout)
    inverse = tuple(np.argsort(chosen.perm))
    logical = tuple(chosen.digits[axis] for axis in chosen.order)
    return np.ascontiguousarray(codes.reshape(len(codes), codes.shape[1] // chosen.block, *logical).transpose(inverse)).reshape(codes.shape)


def from_layout(stored: Int8Array, layout: str) -> Int8Array:
    """Undo ``to_layout``.

    Args:
        stored: ``[N, K]`` int8 as ``to_layout`` returned it.
        layout: A key of ``LAYOUTS``.

    Returns:
        ``[N, K]`` int8, C-contiguous.

    Raises:
        ModelError: An unknown layout, or K is not a multiple of its block.
    """
    chosen = _fitting(stored, layout)
    blocks = stored.reshape(len(stored), stored.shape[1] // chosen.block, *chosen.digits)
    return np.ascontiguousarray(blocks.transpose(chosen.perm)).reshape(stored.shape)


def _fitting(codes: Int8Array, layout: str) -> Layout:
    chosen = layout_named(layout)
    if codes.ndim != 2:
        raise ValueError(f"weight codes are [N, K], not {list(codes.shape)}")
    chosen.check(codes.shape[1])
    return chosen


def check_container(*, bits: int, packed: bool, k: int) -> None:
    """Whether rows of K codes of that width can be handed on in that container.

    Raises:
        ValueError: ``bits`` is neither 4 nor 8.
        ModelError: Packed codes that are not 4 bits wide, or are odd in number.
    """
    if bits not in (4, 8):
        raise ValueError(f"activation codes have 4 or 8 bits, not {bits}")
    if packed and (bits != 4 or k % 2):
        raise ModelError(f"rows of {k} {bits}-bit codes cannot be packed two a byte: use the int8 container")


def pack_int4(codes: Int8Array) -> UInt8Array:
    """Pack 4-bit codes two a byte in C order, the even index in the low nibble: ONNX's storage of INT4 tensors.

    Args:
        codes: int8 holding -8..7, any shape.

    Returns:
        uint8 ``[ceil(codes.size / 2)]``; the last high nibble of an odd number of codes is 0.

    Raises:
        ValueError: A code is outside -8..7.
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size and (flat.min() < -8 or flat.max() > 7):
        raise ValueError(f"4-bit codes are -8..7, not {flat.min()}..{flat.max()}")
    nibbles = flat.view(np.uint8)
    packed: UInt8Array = nibbles[0::2] & np.uint8(0x0F)
    packed[: flat.size // 2] |= nibbles[1::2] << np.uint8(4)
    return packed


def unpack_int4(packed: UInt8Array, shape: tuple[int, ...]) -> Int8Array:
    """Undo ``pack_int4``.

    Args:
        packed: uint8 ``[ceil(prod(shape) / 2)]``.
        shape: Shape of the codes.

    Returns:
        int8 of ``shape`` holding -8..7.

    Raises:
        ValueError: ``packed`` does not have the bytes of that shape.
    """
    count = math.prod(shape)
    if packed.size != (count + 1) // 2:
        raise ValueError(f"{list(shape)} 4-bit codes take {(count + 1) // 2} bytes, not {packed.size}")
    signed = np.ascontiguousarray(packed).reshape(-1).view(np.int8)
    codes = np.empty(2 * signed.size, np.int8)
    # Arithmetic shifts carry the nibble's sign.
    codes[0::2] = (signed << 4) >> 4
    codes[1::2] = signed >> 4
    return codes[:count].reshape(shape)


def int4_tensor(codes: Int8Array, name: str | None = None) -> ir.TensorProtocol:
    """An ONNX INT4 tensor of the codes' shape.

    Args:
        codes: int8 holding -8..7.
        name: The tensor's name.

    Raises:
        ValueError: A code is outside -8..7.
    """
    return ir.PackedTensor(pack_int4(codes), ir.DataType.INT4, shape=ir.Shape(codes.shape), name=name)


def lazy_int4_tensor(read: Callable[[], Int8Array], shape: tuple[int, ...], name: str | None = None) -> ir.TensorProtocol:
    """An ONNX INT4 tensor whose codes are read when it is written, each time anew, and never kept.

    Args:
        read: Returns the codes, int8 of ``shape`` holding -8..7.
        shape: Shape of the codes.
        name: The tensor's name.
    """

    def tensor() -> ir.TensorProtocol:
        codes = read()
        if codes.shape != shape:
            raise ValueError(f"{name}: codes are {list(codes.shape)} where {list(shape)} was declared")
        return int4_tensor(codes, name)

    return ir.LazyTensor(tensor, dtype=ir.DataType.INT4, shape=ir.Shape(shape), name=name)
