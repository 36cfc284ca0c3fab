from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper

from fqonnx import model as model_file
from fqonnx.calib import blocks as blocks_module
from fqonnx.calib.blocks import Block, find_blocks
from fqonnx.errors import ModelError
from fqonnx.passes.linears import find
from fqonnx.passes.prepare import prepare
from tests import zoo
from tests.networks import WIDTH, Network
from tests.test_exporters import HIDDEN, Decoder, LayerNorm, export


def blocks_of(net: Network, *outputs: str) -> tuple[Block, ...]:
    return find_blocks(*net.model(*outputs))


def names(blocks: tuple[Block, ...]) -> list[list[str]]:
    return [[linear.name for group in block.groups for linear in group.linears] for block in blocks]


def chained(blocks: tuple[Block, ...], *front: str) -> bool:
    """Whether each block begins where the one before ends, the first at what an operator of ``front`` makes, or at the model's inputs."""
    first = None if blocks[0].input is None else blocks[0].input.producer()
    return (first is None if not front else first is not None and first.op_type in front) and all(
        a.output is b.input for a, b in pairwise(blocks)
    )


def layer(name: str) -> list[str]:
    return [f"{name}.{part}" for part in ("q", "k", "v", "o", "up", "down")]


def test_norms_before_branches() -> None:
    net = Network()
    for name in ("0", "1"):
        net.layer(name)
    found = blocks_of(net, net.graph.op("MatMul", net.norm(net.h), net.graph.weight(WIDTH, 1000), name="/lm_head/MatMul"))
    assert names(found) == [layer("0"), layer("1"), ["lm_head"]]
    assert chained(found)
    node = found[0].output.producer()
    assert node is not None
    assert node.op_type == "Add"


def test_norms_behind_sums_belong_to_the_block_before() -> None:
    net = Network()
    for name in ("0", "1"):
        net.add(net.attention(net.h, name))
        net.h = net.norm(net.h)
        net.add(net.mlp(net.h, name))
        net.h = net.norm(net.h)
    found = blocks_of(net)
    assert names(found) == [layer("0"), layer("1")]
    assert chained(found)
    for block in found:
        node = block.output.producer()
        assert node is not None
        assert node.op_type == "LayerNormalization"


def test_attention_and_mlp_in_parallel() -> None:
    net = Network()
    for name in ("0", "1", "2"):
        x = net.norm(net.h)
        attended, wide = net.attention(x, name), net.mlp(x, name)
        net.add(net.graph.op("Add", attended, wide))
    found = blocks_of(net)
    assert [sorted(block) for block in names(found)] == [sorted(layer(name)) for name in "012"]


def test_without_attention_each_residual_branch_is_a_block() -> None:
    net = Network()
    for name in ("0", "1", "2"):
        net.add(net.mlp(net.norm(net.h), name))
    assert names(blocks_of(net)) == [[f"{name}.up", f"{name}.down"] for name in "012"]


def test_a_branch_before_the_first_attention_is_a_block_of_its_own() -> None:
    net = Network()
    net.add(net.mlp(net.norm(net.h), "first"))
    net.add(net.attention(net.norm(net.h), "0"))
    net.add(net.mlp(net.norm(net.h), "0"))
    assert names(blocks_of(net)) == [["first.up", "first.down"], layer("0")]


def test_keys_and_values_that_are_outputs_do_not_cross() -> None:
    net = Network()
    outputs = []
    for name in ("0", "1"):
        x = net.norm(net.h)
        k, v = net.linear(x, f"{name}.k"), net.linear(x, f"{name}.v")
        outputs += [k, v]
        scores = net.graph.op("MatMul", net.linear(x, f"{name}.q"), net.graph.op("Transpose", k, perm=[0, 2, 1]))
        net.add(net.linear(net.graph.op("MatMul", net.graph.op("Softmax", scores), v), f"{name}.o"))
    assert [len(block) for block in names(blocks_of(net, net.h, *outputs))] == [4, 4]


def test_shapes_that_are_read_later_do_not_cross() -> None:
    net = Network()
    net.add(net.mlp(net.norm(net.h), "0"))
    size = net.graph.op("Shape", net.h)
    net.add(net.mlp(net.norm(net.h), "1"))
    net.add(net.mlp(net.norm(net.h), "2"))
    assert len(blocks_of(net, net.graph.op("Reshape", net.h, size))) == 3


def test_a_memory_that_every_block_reads_makes_them_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder's output, projected for every cross-attention: its projections share one input and so are one group."""
    net = Network()
    net.add(net.mlp(net.norm(net.h), "encoder"))
    memory, net.h = net.h, "x"
    for name in ("0", "1"):
        net.add(net.attention(net.norm(net.h), name, memory))
    assert len(blocks_of(net)) == 1
    monkeypatch.setattr(blocks_module, "MAX_GROUPS", 3)
    with pytest.raises(ModelError, match="the graph does not fall apart into blocks, use --reconstruct group"):
        blocks_of(net)


def test_a_long_chain_of_branches_that_never_meet_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "MAX_GROUPS", 3)
    net = Network()
    branches = [net.mlp(net.norm("x"), name) for name in "012"]
    for branch in branches:
        net.add(branch)
    with pytest.raises(ModelError, match="has 6 groups: the graph does not fall apart into blocks, use --reconstruct group"):
        blocks_of(net)


def test_no_groups_no_blocks() -> None:
    assert find_blocks(prepare(zoo.model("layer_norm")), ()) == ()


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_exported_decoders(tmp_path, dynamo: bool, norm: str) -> None:  # type: ignore[no-untyped-def]
    decoder = Decoder(**({} if norm == "rms" else {"norm": LayerNorm}), blocks=3)
    export(decoder, (torch.randint(0, 99, (2, 7)),), tmp_path / "m.onnx", dynamo=dynamo, opset=21 if dynamo else 17)
    model = prepare(model_file.load(tmp_path / "m.onnx"))
    groups = find(model).groups
    found = find_blocks(model, groups)
    assert len(found) == 3
    assert [group for block in found for group in block.groups] == list(groups)
    assert all(len(block.groups) == 4 for block in found)
    assert chained(found, "Gather", "Cast")


class Vision(torch.nn.Module):
    """Patches by a convolution, a class token, blocks, a head on the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, HIDDEN, 4, 4)
        self.token = torch.nn.Parameter(torch.randn(1, 1, HIDDEN))
        self.layers = Decoder(LayerNorm, blocks=2).layers
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1)
        for block in self.layers:
            h = block(h)
        return self.head(self.norm(h)[:, 0])


def test_an_exported_vision_transformer(tmp_path) -> None:  # type: ignore[no-untyped-def]
    export(Vision(), (torch.randn(2, 3, 16, 16),), tmp_path / "m.onnx", dynamo=True, opset=21, axes={0: "batch"})
    model = prepare(model_file.load(tmp_path / "m.onnx"))
    found = find_blocks(model, find(model).groups)
    assert [len(block.groups) for block in found][:2] == [4, 4]
    assert chained(found, "Concat")
    # The last block aims at all tokens, not at the class token alone.
    assert found[1].output.shape is not None
    assert found[1].output.shape[-1] == HIDDEN
    assert len(found[1].output.shape) == 3


def test_a_graph_without_a_stream_is_one_block() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="/a/MatMul"),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="/b/MatMul"),
    ]
    weight = numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "w")
    inputs = [helper.make_tensor_value_info("x", zoo.FLOAT, ["rows", WIDTH])]
    graph = helper.make_graph(nodes, "g", inputs, [onnx.ValueInfoProto(name="y")], [weight])
    model = prepare(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)))
    found = find_blocks(model, find(model).groups)
    assert [linear for block in names(found) for linear in block] == ["a", "b"]
