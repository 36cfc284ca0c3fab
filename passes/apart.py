"""Which linears of one input belong to different layers.

A decoder's layers all read what the encoder gives, for the keys and values of their cross attention. As one group they would share one
transform over all layers, and no layer could be told from the next. So linears of one input are set apart where attention puts one behind
another: q, k and v of one attention, gate and up, an MLP beside its attention, and a linear around others stay together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fqonnx.passes.groups import MATRIX_PRODUCTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from fqonnx.passes.groups import Linear


def set_apart(members: Sequence[Linear], outputs: Mapping[ir.Node, ir.Value], places: Mapping[ir.Node, int]) -> list[list[Linear]]:
    """Split linears that read the same value into those of one layer each.

    One is of another layer if attention multiplies its result, before any other linear takes it, with something that other linears have
    made of the layer's: the keys of the second layer meet queries that come from the first.

    Args:
        members: Linears of one input, in graph order.
        outputs: The result of every linear of the model, by its nodes.
        places: Every node's place in the graph's order.

    Returns:
        The members by layer, in graph order.
    """

    def lies_behind(later: Linear, earlier: Linear) -> bool:
        met = _operands_met(later, outputs)
        last = max((places.get(node, -1) for value in met if (node := value.producer()) is not None), default=-1)
        return bool(met & _behind(earlier, outputs, places, last))

    runs: list[list[Linear]] = []
    for member in members:
        for run in runs:
            if not any(lies_behind(member, other) or lies_behind(other, member) for other in run):
                run.append(member)
                break
        else:
            runs.append([member])
    return runs


def _behind(linear: Linear, outputs: Mapping[ir.Node, ir.Value], places: Mapping[ir.Node, int], last: int) -> set[ir.Value]:
    """What depends on a linear's result through at least one other linear, as far as the node at ``last``."""
    _, next_linears = _reach(linear, outputs)
    found: set[ir.Value] = set()
    todo = list(next_linears)
    while todo:
        value = todo.pop()
        if value not in found:
            found.add(value)
            todo += [output for node in _readers(value) if places.get(node, last) <= last for output in node.outputs]
    return found


def _operands_met(linear: Linear, outputs: Mapping[ir.Node, ir.Value]) -> set[ir.Value]:
    """What a linear's result is multiplied with as a matrix, by all nodes up to the next linears."""
    made, _ = _reach(linear, outputs)
    nodes = {node for value in made for node in _readers(value) if node not in outputs and _multiplies(node)}
    return {operand for node in nodes for operand in node.inputs if operand is not None and operand not in made}


def _reach(linear: Linear, outputs: Mapping[ir.Node, ir.Value]) -> tuple[set[ir.Value], set[ir.Value]]:
    """What is made of a linear's result without another one, itself included; and the results of the linears that take it next."""
    found: set[ir.Value] = set()
    ends: set[ir.Value] = set()
    todo = [linear.output]
    while todo:
        value = todo.pop()
        if value in found:
            continue
        found.add(value)
        for node in _readers(value):
            if node in outputs:
                ends.add(outputs[node])
            else:
                todo += node.outputs
    return found, ends


def _readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, not its size alone."""
    return [node for node in value.consumers() if node.op_type not in ("Shape", "Size")]


def _multiplies(node: ir.Node) -> bool:
    return node.op_type in MATRIX_PRODUCTS or "Attention" in node.op_type
