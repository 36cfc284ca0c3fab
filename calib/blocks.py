"""Cuts a prepared graph into blocks at the residual stream: the places that one value alone crosses.

Followed are the values that the first group's input is made of and those that depend on the output of a group: all else (masks,
position tables) comes from the feeds and is computed anew where it is needed. Between a decoder's attention and its MLP, and between
layers, one such value is alive, the residual sum; in an encoder with norms behind the sums, what the norm makes of it. A block is
attention and what follows up to the next attention; in a network without attention each span between two cuts is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fqonnx.calib.stream import values_read
from fqonnx.errors import ModelError
from fqonnx.passes.constants import is_constant, is_float
from fqonnx.passes.groups import MATRIX_PRODUCTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from fqonnx.passes.groups import LinearGroup

MAX_GROUPS = 64
"""Groups of one block: beyond it the graph is not one that falls apart into blocks, and a block would not fit in memory."""

_PRODUCTS = MATRIX_PRODUCTS | {"Conv", "ConvTranspose"}


@dataclass(frozen=True, eq=False)
class Block:
    """A part of the graph with one value in and one out.

    Attributes:
        name: For messages.
        input: The residual stream before it. None where the first block begins at the model's inputs: nothing that is computed before
            its groups crosses alone.
        output: The residual stream behind it.
        groups: In graph order.
    """

    name: str
    input: ir.Value | None
    output: ir.Value
    groups: tuple[LinearGroup, ...]


def find_blocks(model: ir.Model, groups: Sequence[LinearGroup]) -> tuple[Block, ...]:
    """The blocks that hold ``groups``, in graph order; every group is in exactly one.

    Args:
        model: A prepared model.
        groups: Groups of its main graph.

    Raises:
        ModelError: The graph does not fall apart: nothing like a residual stream is found.
    """
    if not groups:
        return ()
    graph = _Stream(model.graph, groups)
    places = {group: graph.span(group) for group in groups}
    ordered = sorted(groups, key=lambda group: places[group])
    cuts = graph.cuts(ordered, places)
    spans: list[tuple[ir.Value | None, ir.Value, list[LinearGroup]]] = []
    remaining = list(ordered)
    start = graph.entrance(places[ordered[0]][0])
    for cut in cuts:
        inside = [group for group in remaining if places[group][1] <= graph.position(cut)]
        if not inside:
            continue
        remaining = remaining[len(inside) :]
        spans.append((start, cut, inside))
        start = cut
    if remaining:
        raise ModelError(
            f"no value behind group {remaining[-1].name!r} carries all that goes on from there: the graph does not fall apart into "
            "blocks, use --reconstruct group"
        )
    return tuple(_merged(spans, graph))


def _merged(spans: Sequence[tuple[ir.Value | None, ir.Value, list[LinearGroup]]], graph: _Stream) -> list[Block]:
    blocks: list[Block] = []
    with_attention = [graph.attends(start, end) for start, end, _ in spans]
    open_block = False
    for (start, end, inside), attends in zip(spans, with_attention, strict=True):
        # A head behind the last block gives something else than the stream: it is by itself.
        if blocks and open_block and not attends and _width(end) == _width(blocks[-1].output):
            last = blocks.pop()
            blocks.append(Block(last.name, last.input, end, (*last.groups, *inside)))
        else:
            blocks.append(Block(inside[0].name, start, end, tuple(inside)))
            open_block = attends
    for block in blocks:
        if len(block.groups) > MAX_GROUPS:
            raise ModelError(
                f"the block from group {block.name!r} on has {len(block.groups)} groups: the graph does not fall apart into blocks, "
                "use --reconstruct group"
            )
    return blocks


class _Stream:
    """The values of the stream, and which of them cross some place alone."""

    def __init__(self, graph: ir.Graph, groups: Sequence[LinearGroup]) -> None:
        self._nodes = list(graph)
        self._index = {node: index for index, node in enumerate(self._nodes)}
        self._groups = groups
        self._replaced = {node for group in groups for linear in group.linears for node in linear.nodes}
        self._stream: set[ir.Value] = {linear.output for group in groups for linear in group.linears} | self._before(groups)
        for node in self._nodes:
            if any(operand in self._stream for operand in _followed(node)):
                self._stream.update(node.outputs)
        self._single = self._lonely()

    def _before(self, groups: Sequence[LinearGroup]) -> set[ir.Value]:
        """What the first group's input is made of: the stream before the first block."""
        first = min(groups, key=self.span)
        found: set[ir.Value] = set()
        todo = [first.input]
        while todo:
            value = todo.pop()
            # Masks may be made of the token ids, which are not what flows here.
            if value in found or is_constant(value) or not (is_float(value.dtype) or value.dtype is None):
                continue
            found.add(value)
            node = value.producer()
            if node is not None:
                todo += values_read(node)
        return found

    def position(self, value: ir.Value) -> int:
        """Index of the node that makes a value; -1 for an input of the graph."""
        node = value.producer()
        return -1 if node is None else self._index[node]

    def span(self, group: LinearGroup) -> tuple[int, int]:
        """Indices of the first and last node of a group's linears."""
        places = [self._index[node] for linear in group.linears for node in linear.nodes]
        return min(places), max(places)

    def cuts(self, ordered: Sequence[LinearGroup], places: dict[LinearGroup, tuple[int, int]]) -> list[ir.Value]:
        """Values that alone cross some place, in order: of those between two groups the last that still looks like the first."""
        busy = sorted(places[group] for group in ordered)
        chosen: list[ir.Value] = []
        first: ir.Value | None = None
        behind = -1
        for value in self._single:
            place = self.position(value)
            inside = any(low <= place < high for low, high in busy)
            # The number of groups that are done tells whether this is still the same gap.
            done = sum(high <= place for _, high in busy)
            if inside or not done:
                continue
            if done != behind:
                chosen.append(value)
                first, behind = value, done
            elif first is not None and self._alike(first, value):
                chosen[-1] = value
        return chosen

    def entrance(self, first: int) -> ir.Value | None:
        """The last value that crosses alone before the node ``first``: what makes it (embeddings, convolutions) is no block's."""
        return max((value for value in self._single if self.position(value) < first), key=self.position, default=None)

    def attends(self, start: ir.Value | None, end: ir.Value) -> bool:
        """Whether tokens meet between two cuts: a product of two activations, or an attention operator."""
        low = -1 if start is None else self.position(start)
        for node in self._nodes[low + 1 : self.position(end) + 1]:
            if "Attention" in node.op_type:
                return True
            if node.op_type in _PRODUCTS and sum(operand in self._stream for operand in node.inputs) >= 2:
                return True
        return False

    def _lonely(self) -> list[ir.Value]:
        """Stream values that cross some place alone, in order."""
        last: dict[ir.Value, int] = {}
        for index, node in enumerate(self._nodes):
            last.update((output, index) for output in node.outputs if output in self._stream and output.is_graph_output())
            last.update((operand, index) for operand in _followed(node) if operand in self._stream)
        ends: dict[int, list[ir.Value]] = {}
        for value, index in last.items():
            ends.setdefault(index, []).append(value)
        alive = {value for value in last if value.producer() is None}
        found: dict[ir.Value, None] = {}
        for index, node in enumerate(self._nodes):
            alive.difference_update(ends.get(index, ()))
            alive.update(output for output in node.outputs if output in last and last[output] > index)
            final = [output for output in node.outputs if output in self._stream and output.is_graph_output()]
            if len(alive) == 1:
                found.update(dict.fromkeys(alive))
            elif not alive and final:
                found[final[0]] = None
        return sorted((value for value in found if value.producer() is not None), key=self.position)

    def _alike(self, first: ir.Value, later: ir.Value) -> bool:
        """Whether ``later`` is ``first`` normalised: the same shape, and no product with a weight on the way."""
        if first.shape is None or later.shape is None or list(first.shape) != list(later.shape):
            return False
        while later is not first:
            node = later.producer()
            if node is None or node.op_type in _PRODUCTS or node in self._replaced:
                return False
            before = [operand for operand in _followed(node) if operand in self._stream]
            if not before:
                return False
            later = max(before, key=self.position)
        return True


def _width(value: ir.Value) -> object:
    return value.shape[-1] if value.shape else None


def _followed(node: ir.Node) -> list[ir.Value]:
    """What a node's values are made of; sizes are known without the values."""
    return [] if node.op_type == "Shape" else values_read(node)
