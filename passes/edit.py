"""Inserting nodes and constants with names, types and tags: what every rewriting pass does, done once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

GROUP_TAG = "fqonnx.group"
"""Key of a node's metadata: the linear group it was made for. Reports and manifests find their way back through it."""

LINEAR_TAG = "fqonnx.linear"
"""Likewise, the linear."""


LINEARS_TAG = "fqonnx.linears"
"""Likewise, the linears that were merged, as a JSON list in the order of their rows."""

CACHE_TAG = "fqonnx.kv_cache"
"""Likewise, the cache of keys or values (the name of its ``past`` input); its products are no linears of the model."""


class Names:
    """Hands out names that no value (or no node) of the model has.

    ONNX wants one name per value across a graph and its subgraphs, and every runtime wants unique node names; collected once per pass.
    """

    def __init__(self, model: ir.Model) -> None:
        self._values: set[str | None] = set()
        self._nodes: set[str | None] = set()
        for graph in model.graphs():
            self._values.update(value.name for value in graph.inputs)
            self._values.update(graph.initializers)
            for node in graph:
                self._nodes.add(node.name)
                self._values.update(value.name for value in node.outputs)

    def for_value(self, wanted: str) -> str:
        """``wanted``, or ``wanted_1``, ``wanted_2``, ... where a value has it."""
        return _unique(wanted, self._values)

    def for_node(self, wanted: str) -> str:
        """``wanted``, or ``wanted_1``, ``wanted_2``, ... where a node has it."""
        return _unique(wanted, self._nodes)

    def release_value(self, name: str | None) -> None:
        """Lets the name of a value that is about to be removed be used again."""
        self._values.discard(name)

    def release_node(self, node: ir.Node) -> None:
        """Lets the name of a node that is about to be removed be used again."""
        self._nodes.discard(node.name)


def _unique(wanted: str, taken: set[str | None]) -> str:
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name


class Insertion:
    """Inserts nodes right before an anchor node, each with a unique name, typed outputs and tags.

    Args:
        anchor: New nodes come before it, in the order of the calls; constants go to its graph.
        names: The model's names.
        tags: Metadata for every inserted node.
    """

    def __init__(self, anchor: ir.Node, names: Names, tags: Mapping[str, str]) -> None:
        assert isinstance(anchor.graph, ir.Graph)
        self.graph = anchor.graph
        self._anchor = anchor
        self._names = names
        self._tags = dict(tags)

    def constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """An initializer named ``name`` (made unique) that holds ``tensor``."""
        value = ir.Value(
            name=self._names.for_value(name), type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
        *,
        name: str,
        dtype: ir.DataType,
        shape: ir.Shape | None,
    ) -> ir.Value:
        """A standard node with one output, which is named after it.

        Args:
            op_type: An operator of the default domain.
            inputs: Its inputs.
            attributes: Its attributes.
            name: The node's name (made unique).
            dtype: Element type of the output.
            shape: Shape of the output; None where it is not known.

        Returns:
            The output.
        """
        node = ir.node(op_type, inputs, dict(attributes or {}), name=name)
        self.add(node)
        (output,) = node.outputs
        output.type, output.shape = ir.TensorType(dtype), shape
        return output

    def add(self, node: ir.Node) -> Sequence[ir.Value]:
        """Inserts a ready-made node; its name and its outputs' names are made unique, the node is tagged.

        Returns:
            The node's outputs.
        """
        assert node.name
        node.name = self._names.for_node(node.name)
        for index, output in enumerate(node.outputs):
            output.name = self._names.for_value(output.name or (f"{node.name}.out" if index == 0 else f"{node.name}.out{index}"))
        node.metadata_props.update(self._tags)
        self.graph.insert_before(self._anchor, node)
        return node.outputs


def take_over(old: ir.Value, new: ir.Value, obsolete: Iterable[ir.Node]) -> None:
    """Lets ``new`` stand for ``old`` everywhere, graph outputs and the name included, and removes the nodes that made ``old``.

    Args:
        old: The value that its consumers and the graph's outputs give up.
        new: Takes its name, and its type and shape where they are known. Lies in the same graph, before every use of ``old``.
        obsolete: Nodes that only ``old`` was made with, in graph order.
    """
    name = old.name
    new.type, new.shape = old.type or new.type, old.shape if old.shape is not None else new.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    for node in reversed(tuple(obsolete)):
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    new.name = name


def last_dim(shape: ir.Shape | None, size: int) -> ir.Shape | None:
    """``shape`` with its last dimension set to ``size``; None stays None."""
    return None if shape is None else ir.Shape([*shape[:-1], size])
