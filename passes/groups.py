"""What the passes hand to calibration and back: linears, groups of linears that share an input, and what stays in float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

Array = npt.NDArray[np.float32]

MATRIX_PRODUCTS = frozenset({"Einsum", "FusedMatMul", "Gemm", "MatMul"})
"""Operators that multiply matrices: two activations, or one with a weight."""


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear ``output = input · weightᵀ + bias`` as the exporter wrote it.

    Attributes:
        name: Unique name: the module's path where the export tells it (``layers.0.mlp.up``), else the parameter's or the node's name;
            what ``--keep`` matches (it matches node names too) and reports show.
        input: The activation, ``[.., K]``, fp16, bf16 or fp32.
        output: The value that a replacement must produce, ``[.., N]``; behind the bias ``Add`` when that is folded in.
        nodes: The nodes a replacement makes obsolete, in graph order: the product, then the bias ``Add`` where there is one.
        out_features: N.
        in_features: K.
        read_weight: Reads the weight as fp32 ``[N, K]`` with every transpose, cast, alpha and dequantization applied. Reads from
            disk on each call and keeps nothing: call it once and drop the array.
        read_bias: Reads the bias as fp32 ``[N]`` (beta applied), or None where there is no constant bias.
    """

    name: str
    input: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]
    out_features: int
    in_features: int
    read_weight: Callable[[], Array]
    read_bias: Callable[[], Array] | None = None


@dataclass(frozen=True, eq=False)
class NormSite:
    """Where a group's channel scale folds into the norm before it: the one node input that holds gamma, and the one that holds beta.

    ``input = cast(normalised · scale + bias)`` and only the group reads it, so dividing scale and bias by ``c`` divides the input by ``c``.
    The values at the two places may be shared with other norms: give ``scale_node`` a new constant there (``ir.Node.replace_input_with``)
    of the dtype and shape that the old value has, and leave the old value alone.

    Attributes:
        scale_node: The node that multiplies by gamma: ``Mul``, ``LayerNormalization``, ``RMSNormalization``, ...
        scale_index: Which of its inputs gamma is.
        read_scale: Reads gamma as fp32 ``[K]``.
        bias_node: The node that adds beta (``Add``, or ``scale_node`` itself for an op that does both); None where there is no beta.
        bias_index: Which of ``bias_node``'s inputs beta is.
        read_bias: Reads beta as fp32 ``[K]``; None where there is none.
    """

    scale_node: ir.Node
    scale_index: int
    read_scale: Callable[[], Array]
    bias_node: ir.Node | None = None
    bias_index: int = 0
    read_bias: Callable[[], Array] | None = None

    @property
    def scale(self) -> ir.Value:
        """The value at ``scale_node.inputs[scale_index]``: its dtype and shape (``[K]``, ``[1, K]``, ...) are what a new one must have."""
        value = self.scale_node.inputs[self.scale_index]
        assert value is not None
        return value

    @property
    def bias(self) -> ir.Value | None:
        """The value at ``bias_node.inputs[bias_index]``, or None."""
        return None if self.bias_node is None else self.bias_node.inputs[self.bias_index]


@dataclass(frozen=True, eq=False)
class LinearGroup:
    """Linears of one layer that read the same value: they share one transform, one clip and one quantized input.

    Attributes:
        name: Unique and stable across runs; joins the linears' names (``layers.0.q_proj+k_proj+v_proj`` where a prefix is shared).
        input: The shared activation, ``[.., K]``.
        linears: In graph order.
        norm: The norm right before ``input`` when its gamma (and beta) are constant and only ``linears`` read its result, so that a
            channel scale can be folded into it; else None: multiply online.
    """

    name: str
    input: ir.Value
    linears: tuple[Linear, ...]
    norm: NormSite | None = None

    @property
    def in_features(self) -> int:
        """K."""
        return self.linears[0].in_features

    @property
    def out_features(self) -> int:
        """The sum of the linears' N."""
        return sum(linear.out_features for linear in self.linears)

    def read_weights(self) -> Array:
        """The linears' weights stacked along the rows, fp32 ``[sum N, K]``. Read anew on each call."""
        return np.concatenate([linear.read_weight() for linear in self.linears])


@dataclass(frozen=True)
class LeftInFloat:
    """A matrix product that is not quantized, and why, in words for the user."""

    name: str
    op_type: str
    reason: str
    weight_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Linears:
    """The result of ``passes.linears.find``: every matrix product of the model is in exactly one of the two."""

    groups: tuple[LinearGroup, ...]
    left_in_float: tuple[LeftInFloat, ...]
