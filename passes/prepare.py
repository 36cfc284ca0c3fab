"""Bring a model into the one form that the other passes know: no functions, opset 21 or newer, constants as initializers, names, shapes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import (
    InlinePass,
    LiftConstantsToInitializersPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
    ShapeInferencePass,
)

TARGET_OPSET = 21


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


PREPARE: tuple[ir.passes.PassBase, ...] = (
    InlinePass(),
    RemoveInitializersFromInputsPass(),
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    RemoveUnusedNodesPass(),
    RemoveUnusedOpsetsPass(),
    NameNodes(),
    ShapeInferencePass(check_type=False, strict_mode=False),
)
"""The passes of ``prepare``, in order."""


def prepare(model: ir.Model) -> ir.Model:
    """Run ``PREPARE`` on the model, in place.

    Raises:
        ModelError: The model uses something that has no form at opset 21.
    """
    for step in PREPARE:
        model = step(model).model
    return model
