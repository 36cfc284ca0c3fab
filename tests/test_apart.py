"""Linears of one input: those of one layer stay together, those of layers behind one another are apart."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fqonnx.calib.blocks import find_blocks
from fqonnx.passes.linears import find
from fqonnx.passes.prepare import prepare
from tests import zoo
from tests.networks import WIDTH, Network

SIZES = ("batch", "seq", WIDTH)


def groups(net: Network, **inputs: tuple[int, tuple[str | int, ...]]) -> list[list[str]]:
    model = prepare(ir.from_proto(net.graph.model([net.h], {"x": (zoo.FLOAT, SIZES), **inputs})))
    return [[linear.name for linear in group.linears] for group in find(model).groups]


def cross_attention(layers: int) -> Network:
    net = Network()
    for index in range(layers):
        net.add(net.attention(net.norm(net.h), f"{index}.self"))
        net.add(net.attention(net.norm(net.h), f"{index}.cross", "memory"))
        net.add(net.mlp(net.norm(net.h), str(index)))
    return net


def test_keys_and_values_of_cross_attention_are_groups_of_their_layers() -> None:
    found = groups(cross_attention(3), memory=(zoo.FLOAT, ("batch", "source", WIDTH)))
    assert [group for group in found if "cross.k" in group[0]] == [[f"{i}.cross.k", f"{i}.cross.v"] for i in range(3)]
    # In the order in which they come in the graph.
    assert found[:3] == [["0.self.q", "0.self.k", "0.self.v"], ["0.self.o"], ["0.cross.q"]]


def test_a_decoder_falls_apart_at_its_layers() -> None:
    net = cross_attention(2)
    model = prepare(ir.from_proto(net.graph.model([net.h], {"x": (zoo.FLOAT, SIZES), "memory": (zoo.FLOAT, ("batch", "source", WIDTH))})))
    blocks = find_blocks(model, find(model).groups)
    assert [len(block.groups) for block in blocks] == [2, 5, 2, 5]


def test_keys_that_are_computed_before_all_layers_are_apart_too() -> None:
    """Where the exporter put them does not matter."""
    net = Network()
    keys = [net.linear("x", f"{index}.k") for index in range(2)]
    for index in range(2):
        q = net.linear(net.h, f"{index}.q")
        scores = net.graph.op("Softmax", net.graph.op("MatMul", q, net.graph.op("Transpose", keys[index], perm=[0, 2, 1])), axis=-1)
        net.add(net.linear(net.graph.op("MatMul", scores, "x"), f"{index}.o"))
    assert groups(net) == [["0.k", "0.q"], ["1.k"], ["0.o"], ["1.q"], ["1.o"]]


def test_an_mlp_beside_attention_shares_its_input() -> None:
    net = Network()
    for index in range(2):
        h = net.norm(net.h)
        attended, mlp = net.attention(h, str(index)), net.mlp(h, str(index))
        net.add(net.graph.op("Add", attended, mlp))
    layers = [[[f"{i}.q", f"{i}.k", f"{i}.v", f"{i}.up"], [f"{i}.o"], [f"{i}.down"]] for i in range(2)]
    assert groups(net) == [*layers[0], *layers[1]]


def test_a_linear_around_others_shares_their_input() -> None:
    """A low-rank branch that was not merged into its weight."""
    net = Network()
    down = net.linear("x", "lora_a")
    net.h = net.graph.op("Add", net.linear("x", "base"), net.linear(down, "lora_b"))
    assert groups(net) == [["lora_a", "base"], ["lora_b"]]


def test_a_size_is_no_dependence() -> None:
    """T5 makes the bias of all layers' scores from the size of the first layer's keys."""
    net = Network()
    g = net.graph
    q, k, v = (net.linear("x", name) for name in "qkv")
    count = g.op("Gather", g.op("Shape", k), g.constant(np.array(1)), axis=0)
    bias = g.op("Cast", g.op("Range", g.constant(np.array(0)), count, g.constant(np.array(1))), to=zoo.FLOAT)
    for index in range(2):
        scores = g.op("Add", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 2, 1])), bias)
        net.add(net.linear(g.op("MatMul", g.op("Softmax", scores, axis=-1), v), f"{index}.o"))
        if not index:
            q, k, v = (net.linear(net.h, f"1.{name}") for name in "qkv")
    assert groups(net) == [["q", "k", "v"], ["0.o"], ["1.q", "1.k", "1.v"], ["1.o"]]
