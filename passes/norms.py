"""Find the norm before a group of linears whose gain can take a channel scale."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fqonnx.passes.constants import is_constant, is_float, read, shape_of
from fqonnx.passes.groups import Array, NormSite

if TYPE_CHECKING:
    from collections.abc import Collection

    import onnx_ir as ir

# Where the ops keep gamma and beta: input indices, None for no beta. All normalise the last axis unless `axis` says otherwise.
_NORM_OPS: dict[tuple[str, str], tuple[int, int | None]] = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1, None),
    ("", "SimplifiedLayerNormalization"): (1, None),
    ("com.microsoft", "SimplifiedLayerNormalization"): (1, None),
    ("com.microsoft", "SkipLayerNormalization"): (2, 3),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (2, None),
    ("com.microsoft", "EmbedLayerNormalization"): (5, 6),
}


def find_site(value: ir.Value, width: int, consumers: Collection[ir.Node]) -> NormSite | None:
    """The place where dividing constants divides ``value`` channel by channel.

    Walks up from ``value`` over steps that a channel scale commutes with (1-4) to a constant gain (5, 6):

    1. ``Cast`` between float types, ``Identity``;
    2. ``Reshape`` that keeps the last axis;
    3. ``Mul`` or ``Div`` by one factor per row (``[.., 1]``): the reciprocal deviation, where gamma was multiplied first;
    4. ``Add`` of a constant ``[K]``: beta, at most once;
    5. ``Mul`` by a constant ``[K]``: gamma. The decomposed LayerNorm and RMSNorm of any exporter end so, whatever comes before;
    6. a norm op with constant gamma (and beta).

    Args:
        value: The group's input, ``[.., K]``.
        width: K.
        consumers: The group's nodes.

    Returns:
        None where there is no such place, or where anything but ``consumers`` sees a value on the way.
    """
    if value.is_graph_output() or not set(value.consumers()) <= set(consumers):
        return None
    beta: tuple[ir.Node, int] | None = None
    while (node := value.producer()) is not None:
        if (position := _NORM_OPS.get((node.domain, node.op_type))) is not None:
            return _op_site(node, value, position, width) if beta is None else None
        if (gain := _constant_row(node, "Mul", width)) is not None:
            return _site(width, (node, gain), beta)
        if (offset := _constant_row(node, "Add", width)) is not None and beta is None:
            beta = (node, offset)
            step = node.inputs[1 - offset]
        else:
            step = _commuting_input(node, width)
        if step is None or step.is_graph_output() or len(step.uses()) != 1:
            return None
        value = step
    return None


def _commuting_input(node: ir.Node, width: int) -> ir.Value | None:
    """The activation of steps 1 to 3, or None."""
    if node.domain != "":
        return None
    first = node.inputs[0] if node.inputs else None
    if node.op_type == "Identity":
        return first
    if node.op_type == "Cast":
        return first if first is not None and is_float(first.dtype) and is_float(node.outputs[0].dtype) else None
    if node.op_type == "Reshape":
        return first if _last(first) == width and _last(node.outputs[0]) == width else None
    if node.op_type in ("Mul", "Div"):
        second = node.inputs[1]
        if _last(second) == 1 and _last(first) == width:
            return first
        if node.op_type == "Mul" and _last(first) == 1 and _last(second) == width:
            return second
    return None


def _last(value: ir.Value | None) -> int | None:
    dim = value.shape[-1] if value is not None and value.shape else None
    return dim if isinstance(dim, int) else None


def _constant_row(node: ir.Node, op_type: str, width: int) -> int | None:
    """The index of the constant ``[K]`` (or ``[1, .., K]``) operand of a binary node whose other operand varies, or None."""
    if node.domain != "" or node.op_type != op_type:
        return None
    for index, operand in enumerate(node.inputs):
        if _is_row(operand, width) and not is_constant(node.inputs[1 - index]):
            return index
    return None


def _is_row(value: ir.Value | None, width: int) -> bool:
    if value is None or not is_constant(value):
        return False
    shape = shape_of(value)
    return bool(shape) and shape is not None and shape[-1] == width and all(d == 1 for d in shape[:-1])


def _op_site(node: ir.Node, value: ir.Value, position: tuple[int, int | None], width: int) -> NormSite | None:
    rank = len(value.shape) if value.shape is not None else None
    axis = node.attributes.get_int("axis", -1)
    if value is not node.outputs[0] or (axis != -1 and (rank is None or axis != rank - 1)):
        return None
    scale, bias = position
    beta = (node, bias) if bias is not None and bias < len(node.inputs) and node.inputs[bias] is not None else None
    return _site(width, (node, scale), beta)


def _site(width: int, gamma: tuple[ir.Node, int], beta: tuple[ir.Node, int] | None) -> NormSite | None:
    gain = gamma[0].inputs[gamma[1]]
    offset = beta[0].inputs[beta[1]] if beta else None
    if gain is None or not _is_row(gain, width) or (beta and not _is_row(offset, width)):
        return None
    return NormSite(
        scale_node=gamma[0],
        scale_index=gamma[1],
        read_scale=partial(_read_row, gain),
        bias_node=beta[0] if beta else None,
        bias_index=beta[1] if beta else 0,
        read_bias=partial(_read_row, offset) if offset is not None else None,
    )


def _read_row(value: ir.Value) -> Array:
    return read(value).astype(np.float32).reshape(-1)
