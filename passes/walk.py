"""Steps up from a node whose inputs' producers it may take over."""

from __future__ import annotations

import onnx_ir as ir

from fqonnx.passes.constants import is_constant


class Walk:
    """Steps from a ``FlatQuantize`` up to what it could read instead, and the nodes passed: the ones it would take over.

    Args:
        flat: Where the walk begins; it stays in its graph.
        dtype: The activation's type.
    """

    def __init__(self, flat: ir.Node, dtype: ir.DataType) -> None:
        self.flat = flat
        self.dtype = dtype
        self.nodes = {flat}

    def source(self, value: ir.Value | None) -> ir.Value | None:
        """What stands behind casts to fp32 and back: they round to the activation's type at most, as the ops do once."""
        while value is not None and (node := self.producer(value, ("", "Cast"))) is not None:
            before, dtypes = node.inputs[0], (ir.DataType.FLOAT, self.dtype)
            if before is None or before.dtype not in dtypes or node.attributes.get_int("to", 0) not in [dtype.value for dtype in dtypes]:
                break
            self.nodes.add(node)
            value = before
        return value

    def producer(self, value: ir.Value | None, *kinds: tuple[str, str]) -> ir.Node | None:
        """The node that makes ``value`` where it is of one of the kinds (domain, op) and in the same graph."""
        node = None if value is None else value.producer()
        if node is None or node.graph is not self.flat.graph or (node.domain, node.op_type) not in kinds:
            return None
        return node

    def step(self, value: ir.Value | None, *kinds: tuple[str, str]) -> ir.Node | None:
        """The producer behind casts, passed."""
        node = self.producer(self.source(value), *kinds)
        if node is not None:
            self.nodes.add(node)
        return node

    def constant_and_other(self, node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
        """The constant operand of a binary node, and the one that varies; None for both where there are not one of each."""
        first, second = node.inputs
        for constant, other in ((second, first), (first, second)):
            if is_constant(constant) and not is_constant(other):
                return constant, other
        return None, None

    def is_closed(self, *kept: ir.Node) -> bool:
        """Whether nothing but the nodes passed (and those kept) reads what they compute, ``flat``'s own outputs aside."""
        readers = {*self.nodes, *kept}
        return all(
            not value.is_graph_output() and readers.issuperset(value.consumers())
            for node in self.nodes - {self.flat}
            for value in node.outputs
        )
