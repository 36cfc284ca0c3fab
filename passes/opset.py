"""Raise a model to a newer opset: a table of the operators whose meaning or form changed, bodies and functions included.

onnxscript's converter starts at opset 18 and goes on after a failure; onnx's own takes the model as one protobuf, drops the nodes' metadata
and does not look into bodies. Between 13 and 21 only the few operators below changed; every other one kept its attributes, their defaults
and its inputs (``tests/test_prepare.py`` proves that from the schemas).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from fqonnx.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

TARGET_OPSET = 21
"""The first opset whose ``DequantizeLinear`` takes INT4 and block sizes."""

_TARGET_IR_VERSION = 10
"""The first IR version with INT4 tensors; the one of ``TARGET_OPSET``."""


class RaiseOpset(ir.passes.InPlacePass):
    """Bring the main graph, its bodies and the model's functions to one opset: the highest among theirs and ``TARGET_OPSET``."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Adapt the nodes, then the imports.

        Raises:
            ModelError: An operator has no form in the new opset.
        """
        scopes: list[ir.Model | ir.Function] = [model, *model.functions.values()]
        target = max(TARGET_OPSET, *(_version(scope) or 0 for scope in scopes))
        modified = False
        for scope in scopes:
            version = _version(scope)
            if version is None or version == target:
                continue
            nodes = scope.graph.all_nodes() if isinstance(scope, ir.Model) else scope.all_nodes()
            for node in list(nodes):
                if node.domain == "":
                    _raise_node(node, version, target)
            scope.opset_imports.pop("ai.onnx", None)
            scope.opset_imports[""] = target
            modified = True
        if model.ir_version < _TARGET_IR_VERSION:
            model.ir_version = _TARGET_IR_VERSION
            modified = True
        return ir.passes.PassResult(model, modified)


def _version(scope: ir.Model | ir.Function) -> int | None:
    return scope.opset_imports.get("", scope.opset_imports.get("ai.onnx"))


def _raise_node(node: ir.Node, version: int, target: int) -> None:
    if onnx.defs.has(node.op_type) and not _exists(node.op_type, target):
        raise ModelError(
            f"{node.op_type} ({node.name!r}) of opset {version} has no form in opset {target}: export the model with opset {target}"
        )
    for above, adapt in ADAPTERS.get(node.op_type, ()):
        if version < above <= target:
            adapt(node)


def _exists(op_type: str, opset: int) -> bool:
    try:
        return not onnx.defs.get_schema(op_type, opset, "").deprecated
    except onnx.defs.SchemaError:
        return False


def _constant(node: ir.Node, values: list[int], suffix: str, *, scalar: bool = False) -> ir.Value:
    """A new int64 constant before the node; the pass that lifts constants makes it an initializer."""
    tensor = ir.tensor(values[0] if scalar else values, dtype=ir.DataType.INT64)
    constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], name=f"{node.name or node.outputs[0].name}.{suffix}")
    output = constant.outputs[0]
    output.name = f"{node.outputs[0].name}.{suffix}"
    output.dtype = ir.DataType.INT64
    output.shape = ir.Shape(tensor.shape.numpy())
    assert node.graph is not None
    node.graph.insert_before(node, constant)
    return output


def _insert(node: ir.Node, op_type: str, inputs: list[ir.Value], suffix: str) -> ir.Value:
    new = ir.Node("", op_type, inputs, name=f"{node.name or node.outputs[0].name}.{suffix}")
    new.outputs[0].name = f"{node.outputs[0].name}.{suffix}"
    assert node.graph is not None
    node.graph.insert_before(node, new)
    return new.outputs[0]


def _own(node: ir.Node, name: str) -> ir.Attr | None:
    """The attribute; one that refers to a function's parameter has no value here."""
    attr = node.attributes.get(name)
    if attr is not None and attr.is_ref():
        raise ModelError(
            f"{node.op_type} ({node.name!r}) takes {name!r} from its function, which is of an older opset: export with opset {TARGET_OPSET}"
        )
    return attr


def _batch_normalization_14(node: ir.Node) -> None:
    """Training was told by the number of outputs; those outputs are gone."""
    if len([v for v in node.outputs if v.name]) > 1:
        raise ModelError(f"BatchNormalization ({node.name!r}) is in training mode: export the model in eval mode")


def _roi_align_16(node: ir.Node) -> None:
    """The default became ``half_pixel``; before, there was only this."""
    if "coordinate_transformation_mode" not in node.attributes:
        node.attributes["coordinate_transformation_mode"] = ir.AttrString("coordinate_transformation_mode", "output_half_pixel")


def _reduce_18(node: ir.Node) -> None:
    """``axes`` became an input."""
    axes = _own(node, "axes")
    if axes is not None:
        del node.attributes["axes"]
        node.resize_inputs(2)
        node.replace_input_with(1, _constant(node, list(axes.as_ints()), "axes"))


def _split_18(node: ir.Node) -> None:
    """Equal parts must be asked for by number."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _dft_20(node: ir.Node) -> None:
    """``axis`` became an input; its default moved from 1 to -2."""
    axis = _own(node, "axis")
    node.attributes.pop("axis", None)
    node.resize_inputs(3)
    node.replace_input_with(2, _constant(node, [1 if axis is None else axis.as_int()], "axis", scalar=True))


def _grid_sample_20(node: ir.Node) -> None:
    """Two modes were renamed."""
    mode = _own(node, "mode")
    renamed = {"bilinear": "linear", "bicubic": "cubic"}
    if mode is not None and mode.as_string() in renamed:
        node.attributes["mode"] = ir.AttrString("mode", renamed[mode.as_string()])


def _group_normalization_21(node: ir.Node) -> None:
    """Scale and bias went from one per group to one per channel."""
    groups = _own(node, "num_groups")
    x = node.inputs[0]
    channels = x.shape[1] if x is not None and x.shape is not None and len(x.shape) > 1 else None
    if groups is None or not isinstance(channels, int):
        raise ModelError(
            f"GroupNormalization ({node.name!r}) has an unknown number of channels: export the model with opset {TARGET_OPSET}"
        )
    repeat = channels // groups.as_int()
    if repeat == 1:
        return
    for index, what in ((1, "scale"), (2, "bias")):
        value = node.inputs[index]
        assert value is not None
        column = _insert(node, "Reshape", [value, _constant(node, [-1, 1], f"{what}_column")], f"{what}_as_column")
        wide = _insert(node, "Expand", [column, _constant(node, [1, repeat], f"{what}_repeat")], f"{what}_repeated")
        row = _insert(node, "Reshape", [wide, _constant(node, [-1], f"{what}_row")], f"{what}_per_channel")
        node.replace_input_with(index, row)


ADAPTERS: dict[str, tuple[tuple[int, Callable[[ir.Node], None]], ...]] = {
    "BatchNormalization": ((14, _batch_normalization_14),),
    "RoiAlign": ((16, _roi_align_16),),
    **dict.fromkeys(
        (
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSumSquare",
        ),
        ((18, _reduce_18),),
    ),
    "Split": ((18, _split_18),),
    "DFT": ((20, _dft_20),),
    "GridSample": ((20, _grid_sample_20),),
    "GroupNormalization": ((21, _group_normalization_21),),
}
"""Per operator: the opset that changed it, and how a node of an older one is brought there."""
