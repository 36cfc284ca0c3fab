"""Float linears to the Q/DQ form: what calibration decided, written with ordinary operators that any runtime can read.

For each group, in this order:

1. The channel scale ``c`` is folded into the norm before the group (gamma / c, beta / c) where the group names one, else the input is
   multiplied by ``1 / c`` online, in its own element type.
2. The input is transformed and quantized once, ``FlatQuantize -> Cast -> Mul(scale)``. Where activations stay in float only the transform
   is applied, in fp32 whatever the activation's type: in fp16 an outlier's rounding error would be spread over all other channels.
3. Each linear becomes ``MatMul(input, DequantizeLinear(weight)) (+ bias)`` and its output keeps its name, type and consumers. A
   solution's correction of the bias is added to the linear's, and is the bias where it has none.

Two ways to store a weight, each where it serves:

- 4-bit weights under quantized activations are ``[N, K]`` with fp32 scales behind a ``Transpose``: the rows of ``W4A4Gemm``, which
  ``fqonnx.passes.fuse`` makes of it without touching the codes.
- All other schemes stay in this form, as ``[K, N]`` straight into the ``MatMul``: of the ways to write it the one that ONNX Runtime
  fuses into ``MatMulNBits`` for 4 and 8 bits, per channel and per group.

Codes and scales are read from the solutions when the model is written, one group at a time, and never kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fqonnx.errors import CalibrationError
from fqonnx.ops import add_functions, dequantize_nodes, flat_quantize_node, lazy_int4_tensor
from fqonnx.passes.edit import GROUP_TAG, LINEAR_TAG, Insertion, Names, last_dim, take_over

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fqonnx.calib.solution import GroupSolution
    from fqonnx.passes.groups import Linear, LinearGroup, NormSite
    from fqonnx.recipe import Recipe, Scheme

Array = npt.NDArray[np.float32]

MIN_IR_VERSION = 10
"""The first that has INT4 tensors."""


class Quantize(ir.passes.InPlacePass):
    """Rewrites the linears of ``groups`` to the Q/DQ form.

    Args:
        groups: From ``fqonnx.passes.linears.find`` on the very model that the pass is called with.
        solution: Loads a group's solution by the group's name. It is called when the pass runs and again when the model is written;
            the last one loaded is kept.
        recipe: Gives each group's bit widths.

    Raises:
        CalibrationError: A solution does not fit its group, or a channel scale leaves the range of the activation's type.
    """

    def __init__(self, groups: Sequence[LinearGroup], solution: Callable[[str], GroupSolution], recipe: Recipe) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.recipe = recipe
        self._solution = lru_cache(maxsize=1)(solution)

    def requires(self, model: ir.Model) -> None:
        """The groups are of this model, and their inputs' element types are known.

        Raises:
            onnx_ir.passes.PreconditionError: They are not.
        """
        graphs = set(model.graphs())
        for group in self.groups:
            if any(node.graph not in graphs for linear in group.linears for node in linear.nodes):
                raise ir.passes.PreconditionError(f"group {group.name!r} is not of this model, or was rewritten already")
            if group.input.dtype is None:
                raise ir.passes.PreconditionError(f"the element type of {group.input.name!r} is not known: run fqonnx.passes.prepare first")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every group; ``modified`` is whether there were any."""
        names = Names(model)
        replaced: dict[ir.Value, ir.Value] = {}
        for group in self.groups:
            _Rewrite(group, self._solution, self.recipe.scheme_of(group.name), names, replaced).run()
        if self.groups:
            model.ir_version = max(model.ir_version, MIN_IR_VERSION)
            add_functions(model)
        return ir.passes.PassResult(model, modified=bool(self.groups))


@dataclass(frozen=True)
class _Rewrite:
    """One group's rewrite. ``replaced`` maps the outputs of linears that are rewritten already to what stands for them."""

    group: LinearGroup
    solution: Callable[[str], GroupSolution]
    scheme: Scheme
    names: Names
    replaced: dict[ir.Value, ir.Value]

    @property
    def dtype(self) -> ir.DataType:
        """The activation's element type."""
        assert self.group.input.dtype is not None
        return self.group.input.dtype

    @property
    def fusible(self) -> bool:
        """Whether ``fqonnx.passes.fuse`` has an op for the scheme."""
        return self.scheme.weight_bits == 4 and self.scheme.quantizes_activations

    def run(self) -> None:
        solution = self.solution(self.group.name)
        _check_fits(self.group, solution)
        # The input is there at its first reader; whatever reads a linear's output comes after that linear.
        insert = Insertion(self.group.linears[0].nodes[0], self.names, {GROUP_TAG: self.group.name})
        x = self.replaced.get(self.group.input, self.group.input)
        if solution.channel_scale is not None:
            if self.group.norm is not None:
                self._fold_into_norm(self.group.norm, solution.channel_scale)
            else:
                x = self._scale_online(insert, x, solution.channel_scale)
        if self.scheme.quantizes_activations:
            x = self._quantize_input(insert, x, solution)
        elif solution.left is not None and solution.right is not None:
            x = self._transform_input(insert, x, solution.left, solution.right)
        scale_dtype = self._scale_dtype(solution.scales)
        start = 0
        for linear in self.group.linears:
            rows = slice(start, start + linear.out_features)
            correction = None if solution.bias is None else solution.bias[rows]
            self._rewrite_linear(linear, x, rows, solution.scales.shape[1], scale_dtype, correction)
            start += linear.out_features

    def _fold_into_norm(self, norm: NormSite, channel_scale: Array) -> None:
        sites = [(norm.scale_node, norm.scale_index, norm.read_scale)]
        if norm.bias_node is not None and norm.read_bias is not None:
            sites.append((norm.bias_node, norm.bias_index, norm.read_bias))
        for node, index, read in sites:
            old = node.inputs[index]
            assert old is not None and old.dtype is not None and old.shape is not None  # noqa: PT018
            folded = self._cast(read() / channel_scale, old.dtype).reshape(old.shape.numpy())
            insert = Insertion(node, self.names, {})
            node.replace_input_with(index, insert.constant(f"{old.name}.scaled", ir.tensor(folded, dtype=old.dtype)))

    def _scale_online(self, insert: Insertion, x: ir.Value, channel_scale: Array) -> ir.Value:
        name = f"{self.group.name}.channel_scale"
        inverse = insert.constant(f"{name}.inverse", ir.tensor(self._cast(np.reciprocal(channel_scale), self.dtype), dtype=self.dtype))
        return insert.node("Mul", [x, inverse], name=name, dtype=self.dtype, shape=x.shape)

    def _quantize_input(self, insert: Insertion, x: ir.Value, solution: GroupSolution) -> ir.Value:
        name, identity = self.group.name, np.ones((1, 1), np.float32)
        left = insert.constant(f"{name}.left", ir.tensor(identity if solution.left is None else solution.left))
        right = insert.constant(f"{name}.right", ir.tensor(identity if solution.right is None else solution.right))
        clip = insert.constant(f"{name}.clip", ir.tensor(np.float32(solution.clip)))
        q, scale = insert.add(flat_quantize_node(x, left, right, clip, bits=self.scheme.activation_bits, name=f"{name}.flat_quantize"))
        for node in dequantize_nodes(q, scale, dtype=self.dtype, name=f"{name}.input"):
            (x,) = insert.add(node)
        return x

    def _transform_input(self, insert: Insertion, x: ir.Value, left: Array, right: Array) -> ir.Value:
        """``leftᵀ · reshape(x, n1, n2) · right`` in fp32, in the input's type and shape again."""
        name, fp32 = f"{self.group.name}.transform", ir.DataType.FLOAT
        n1, n2 = left.shape[0], right.shape[0]
        shape = x.shape
        folded, swapped = (None if shape is None else ir.Shape([*shape[:-1], *pair]) for pair in ((n1, n2), (n2, n1)))
        # 0 keeps a dimension, so that any number of them may be dynamic; an unknown rank is flattened and restored.
        lead = [-1] if shape is None else [0] * (len(shape) - 1)
        swap = {"perm": [*range(len(lead)), len(lead) + 1, len(lead)]}
        to = insert.constant(f"{name}.shape", ir.tensor([*lead, n1, n2], dtype=ir.DataType.INT64))
        if shape is None:
            back = insert.node("Shape", [x], name=f"{name}.input_shape", dtype=ir.DataType.INT64, shape=None)
        else:
            back = insert.constant(f"{name}.input_shape", ir.tensor([*lead, n1 * n2], dtype=ir.DataType.INT64))
        if self.dtype != fp32:
            x = insert.node("Cast", [x], {"to": fp32.value}, name=f"{name}.cast", dtype=fp32, shape=shape)
        t = insert.node("Reshape", [x, to], name=f"{name}.fold", dtype=fp32, shape=folded)
        # Both products are one large matrix product each: with the left factor on the left there would be one small one per row.
        t = insert.node(
            "MatMul", [t, insert.constant(f"{self.group.name}.right", ir.tensor(right))], name=f"{name}.right", dtype=fp32, shape=folded
        )
        t = insert.node("Transpose", [t], swap, name=f"{name}.transpose", dtype=fp32, shape=swapped)
        t = insert.node(
            "MatMul", [t, insert.constant(f"{self.group.name}.left", ir.tensor(left))], name=f"{name}.left", dtype=fp32, shape=swapped
        )
        t = insert.node("Transpose", [t], swap, name=f"{name}.transpose_back", dtype=fp32, shape=folded)
        t = insert.node("Reshape", [t, back], name=f"{name}.unfold", dtype=fp32, shape=shape)
        if self.dtype != fp32:
            t = insert.node("Cast", [t], {"to": self.dtype.value}, name=f"{name}.cast_back", dtype=self.dtype, shape=shape)
        return t

    def _rewrite_linear(
        self, linear: Linear, x: ir.Value, rows: slice, scales_per_row: int, scale_dtype: ir.DataType, correction: Array | None
    ) -> None:
        tags = {**linear.nodes[0].metadata_props, GROUP_TAG: self.group.name, LINEAR_TAG: linear.name}
        insert = Insertion(linear.nodes[0], self.names, tags)
        for node in linear.nodes:
            self.names.release_node(node)
        weight = self._weight(insert, linear, rows, scales_per_row, scale_dtype)
        shape = last_dim(x.shape, linear.out_features)
        y = insert.node("MatMul", [x, weight], name=linear.name, dtype=self.dtype, shape=shape)
        values = [read for read in (None if linear.read_bias is None else linear.read_bias(), correction) if read is not None]
        if values:
            bias = insert.constant(f"{linear.name}.bias", ir.tensor(self._cast(sum(values[1:], values[0]), self.dtype), dtype=self.dtype))
            y = insert.node("Add", [y, bias], name=f"{linear.name}.add_bias", dtype=self.dtype, shape=shape)
        take_over(linear.output, y, linear.nodes)
        self.replaced[linear.output] = y

    def _weight(self, insert: Insertion, linear: Linear, rows: slice, scales_per_row: int, scale_dtype: ir.DataType) -> ir.Value:
        """The dequantized weight, ``[K, N]`` of the activation's type."""
        name, n, k = linear.name, linear.out_features, linear.in_features
        transposed = not self.fusible
        contraction = 0 if transposed else 1  # the axis of K

        def read_codes() -> npt.NDArray[np.int8]:
            codes = self.solution(self.group.name).codes[rows]
            return np.ascontiguousarray(codes.T if transposed else codes)

        def read_scales() -> ir.TensorProtocol:
            scales = self.solution(self.group.name).scales[rows].astype(scale_dtype.numpy())
            scales = scales[:, 0] if scales_per_row == 1 else scales.T if transposed else scales
            return ir.tensor(np.ascontiguousarray(scales), dtype=scale_dtype)

        shape = (k, n) if transposed else (n, k)
        if self.scheme.weight_bits == 4:
            codes = lazy_int4_tensor(read_codes, shape)
        else:
            codes = ir.LazyTensor(lambda: ir.tensor(read_codes()), ir.DataType.INT8, ir.Shape(shape))
        if scales_per_row == 1:
            scale_shape, attributes = ir.Shape([n]), {"axis": 1 - contraction}
        else:
            scale_shape = ir.Shape([scales_per_row, n] if transposed else [n, scales_per_row])
            attributes = {"axis": contraction, "block_size": k // scales_per_row}
        scales = ir.LazyTensor(read_scales, scale_dtype, scale_shape)
        inputs = [insert.constant(f"{name}.weight_int{self.scheme.weight_bits}", codes), insert.constant(f"{name}.weight_scale", scales)]
        w = insert.node("DequantizeLinear", inputs, attributes, name=f"{name}.dequantize", dtype=scale_dtype, shape=ir.Shape(shape))
        if scale_dtype != self.dtype:
            w = insert.node("Cast", [w], {"to": self.dtype.value}, name=f"{name}.cast_weight", dtype=self.dtype, shape=ir.Shape(shape))
        if not transposed:
            w = insert.node("Transpose", [w], {"perm": [1, 0]}, name=f"{name}.transpose", dtype=self.dtype, shape=ir.Shape([k, n]))
        return w

    def _scale_dtype(self, scales: Array) -> ir.DataType:
        """fp16 where that is the activation's type, the form is final and no scale is rounded to more than fp16's 11 bits; else fp32.

        bf16 is never used: its 8 bits would cost as much as an 8-bit weight's rounding does.
        """
        limits = np.finfo(np.float16)
        fits = scales.min() >= limits.smallest_normal and scales.max() <= limits.max
        return ir.DataType.FLOAT16 if self.dtype == ir.DataType.FLOAT16 and not self.fusible and fits else ir.DataType.FLOAT

    def _cast(self, values: Array, dtype: ir.DataType) -> npt.NDArray[np.generic]:
        with np.errstate(over="ignore", under="ignore"):
            cast = values.astype(dtype.numpy())
        if not np.isfinite(cast).all():
            raise CalibrationError(
                f"group {self.group.name!r}: a channel scale or bias leaves the range of {dtype.name}: keep the group in float (--keep) or "
                "choose a transform without a channel scale (--transform hadamard)"
            )
        return cast


def _check_fits(group: LinearGroup, solution: GroupSolution) -> None:
    expected = (group.out_features, group.in_features)
    if solution.codes.shape != expected:
        raise CalibrationError(
            f"group {group.name!r}: its solution holds a weight of {list(solution.codes.shape)} where the model has {list(expected)}: "
            "calibrate this model anew, without --resume"
        )
