"""From a float model and its groups' solutions to the model that is deployed: the passes in order, as a plain tuple."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes.common import CheckerPass, RemoveUnusedNodesPass

from fqonnx.passes.attention import LowerAttention
from fqonnx.passes.fuse import Fuse, target_named
from fqonnx.passes.fuse_activation import FuseActivation
from fqonnx.passes.fuse_norm import FuseNorm
from fqonnx.passes.quantize import Quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fqonnx.calib.solution import GroupSolution
    from fqonnx.passes.groups import LinearGroup
    from fqonnx.recipe import Recipe

DEBUG_VARIABLE = "FQONNX_DEBUG"
"""Set to 1, every pass is followed by ``check``."""


def rewrite_passes(
    groups: Sequence[LinearGroup],
    solution: Callable[[str], GroupSolution],
    recipe: Recipe,
    target: str | None = None,
    engine: str = "onnxruntime",
) -> tuple[ir.passes.PassBase, ...]:
    """The passes that ``quantize_model`` runs; see there."""
    return (
        Quantize(groups, solution, recipe),
        RemoveUnusedNodesPass(),
        Fuse(target_named(target)),
        FuseActivation(),
        FuseNorm(),
        *([LowerAttention(target_named(target).capability)] if engine == "onnxruntime" else []),
        RemoveUnusedNodesPass(),
    )


def quantize_model(
    model: ir.Model,
    groups: Sequence[LinearGroup],
    solution: Callable[[str], GroupSolution],
    recipe: Recipe,
    target: str | None = None,
    engine: str = "onnxruntime",
    *,
    validate: bool | None = None,
) -> ir.Model:
    """Rewrites a prepared float model in place.

    Schemes with 4-bit weights and quantized activations end in ``W4A4Gemm`` behind ``FlatQuantize`` or an op that ends in it, all others
    in the Q/DQ form. ONNX Runtime's attention becomes the op of its kernel where the target has one. Weights are lazy: they are read from
    ``solution`` when the model is written, so ``solution`` must outlive that.

    Args:
        model: From ``fqonnx.passes.prepare``.
        groups: From ``fqonnx.passes.linears.find`` on this very model.
        solution: Loads a group's solution by the group's name.
        recipe: Gives each group's bit widths.
        target: GPU whose kernels the operands are stored for, such as ``sm90``; None for none in particular.
        engine: A key of ``fqonnx.engines.ENGINES``: attention has a kernel in ONNX Runtime alone.
        validate: Check the model after every pass; None does so where the environment sets ``FQONNX_DEBUG=1``.

    Returns:
        ``model``.

    Raises:
        UsageError: There is no kernel for ``target``.
        EngineError: There is none for a group on ``target``.
        CalibrationError: A solution does not fit its group or its numbers leave the range of the activation's type.
        ModelError: The model's opset has no fqonnx ops.
        onnx_ir.passes.PostconditionError: With ``validate``, a pass left an invalid model.
    """
    validate = os.environ.get(DEBUG_VARIABLE) == "1" if validate is None else validate
    for rewrite in rewrite_passes(groups, solution, recipe, target, engine):
        rewrite(model)
        if validate:
            try:
                check(model)
            except Exception as error:
                raise ir.passes.PostconditionError(f"{type(rewrite).__name__} left an invalid model: {error}") from error
    return model


def check(model: ir.Model) -> None:
    """Whether a model is valid: ``onnx.checker`` with shape inference, and what it does not look at.

    Weights above 1 kB are not read, the model is left as it is.

    Raises:
        onnx.checker.ValidationError: The standard is violated.
        onnx.shape_inference.InferenceError: Types or shapes contradict each other.
        ValueError: A name is used twice, or a node reads what is not there yet.
    """
    _check_scope(model.graph, set(), set())
    # On a copy: the checker pass moves initializers about to keep weights out of the protobuf.
    CheckerPass(full_check=True)(model.clone())


def _check_scope(graph: ir.Graph, visible: set[ir.Value], nodes: set[str | None]) -> None:
    visible = visible | set(graph.inputs) | set(graph.initializers.values())
    names = {value.name for value in visible}
    if len(names) != len(visible):
        raise ValueError(f"graph {graph.name!r} has two inputs or initializers of one name")
    for node in graph:
        if not node.name or node.name in nodes:
            raise ValueError(f"node name {node.name!r} is empty or used twice")
        nodes.add(node.name)
        for value in node.inputs:
            if value is not None and value not in visible:
                raise ValueError(f"node {node.name!r} reads {value.name!r} before it is computed")
        for body in (body for attribute in node.attributes.values() for body in _bodies(attribute)):
            _check_scope(body, visible, nodes)
        for value in node.outputs:
            if value.name and value.name in names:
                raise ValueError(f"value name {value.name!r} is used twice")
            names.add(value.name)
            visible.add(value)
    if missing := [value.name for value in graph.outputs if value not in visible]:
        raise ValueError(f"graph {graph.name!r} does not compute its output {missing[0]!r}")


def _bodies(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()
