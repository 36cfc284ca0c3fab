"""Bring a model into the one form that the other passes know: no functions, opset 21 or newer, constants as initializers, names, shapes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import (
    InlinePass,
    LiftConstantsToInitializersPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from fqonnx.errors import ModelError
from fqonnx.model import require_float
from fqonnx.passes.move_shapes import MoveShapes
from fqonnx.passes.opset import RaiseOpset
from fqonnx.passes.shapes import InferShapes

_SMALL_BYTES = 1024


class InlineFunctions(ir.passes.InPlacePass):
    """Inline the model's local functions and drop them; metadata of a call goes to the nodes that take its place."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inline every call.

        Raises:
            ModelError: A function calls itself or takes a graph as its attribute.
        """
        had_functions = bool(model.functions)
        for function in model.functions.values():
            for node in function:
                node.name = node.name or node.op_type  # the inliner would call it "node"
        try:
            InlinePass()(model)
        except (ir.passes.InvariantError, ValueError) as error:
            raise ModelError(f"the model's functions cannot be inlined ({error}): export it without functions") from None
        model.functions.clear()
        return ir.passes.PassResult(model, had_functions)


class ReadSmallConstants(ir.passes.InPlacePass):
    """Take external tensors up to 1 KiB into memory: shapes, axes and epsilons, which shape inference has to see."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Read them in every graph of the model."""
        modified = False
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= _SMALL_BYTES:
                    value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
                    tensor.release()
                    modified = True
        return ir.passes.PassResult(model, modified)


class NameNodes(ir.passes.InPlacePass):
    """Give every node of the model a unique name.

    Exporters' names stay. A missing name becomes ``<op type>_<first output>``, a repeated one gets a number: both depend on the graph
    alone, so the same model always gets the same names.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Name the nodes of the main graph and of every body in it."""
        nodes = list(model.graph.all_nodes())
        taken = {node.name for node in nodes if node.name}
        seen: set[str] = set()
        modified = False
        for node in nodes:
            base = node.name or f"{node.op_type}_{node.outputs[0].name or 'unused'}"
            name = base
            number = 1
            # A generated name must not take one that a later node already carries.
            while name in seen or (name != node.name and name in taken):
                number += 1
                name = f"{base}_{number}"
            seen.add(name)
            if node.name != name:
                node.name = name
                modified = True
        return ir.passes.PassResult(model, modified)


PREPARE: tuple[ir.passes.InPlacePass, ...] = (
    RaiseOpset(),
    InlineFunctions(),
    RemoveInitializersFromInputsPass(),
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    ReadSmallConstants(),
    RemoveUnusedNodesPass(),
    RemoveUnusedOpsetsPass(),
    NameNodes(),
    InferShapes(),
    MoveShapes(),
)
"""The passes of ``prepare``, in order. Opsets come first: a function can only be inlined into a graph of its own opset."""


def prepare(model: ir.Model) -> ir.Model:
    """Check that the model is one that can be quantized and run ``PREPARE`` on it, in place.

    Returns:
        The same model, with the same inputs, outputs and results.

    Raises:
        ModelError: What ``fqonnx.model.require_float`` refuses, or something that has no form at opset 21.
    """
    require_float(model)
    for step in PREPARE:
        model = step(model).model
    return model
