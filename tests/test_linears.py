"""Every form of linear and norm in the zoo is found, read right and accounted for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fqonnx import model as model_file
from fqonnx.passes.linears import find
from fqonnx.passes.prepare import prepare
from tests import zoo
from tests.graph_text import graph_text
from tests.runtime import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fqonnx.passes.groups import Linears

PRODUCTS = {"MatMul", "Gemm", "FusedMatMul", "Einsum", "Conv"}
RUNNABLE = [name for name, case in zoo.ZOO.items() if case.runs]


def found(name: str) -> tuple[ir.Model, Linears]:
    model = prepare(zoo.model(name))
    return model, find(model, **zoo.ZOO[name].options)


def relative(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_finds_what_the_case_states(name: str) -> None:
    case = zoo.ZOO[name]
    _, result = found(name)
    assert tuple(len(group.linears) for group in result.groups) == case.groups
    assert len(result.left_in_float) == len(case.left)
    for left, reason in zip(result.left_in_float, case.left, strict=True):
        assert reason in left.reason
    if case.norms is not None:
        assert tuple(group.norm is not None for group in result.groups) == case.norms


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_product_is_in_exactly_one_place(name: str) -> None:
    model, result = found(name)
    products = [node for node in model.graph.all_nodes() if node.op_type in PRODUCTS]
    taken = [linear.nodes[0] for group in result.groups for linear in group.linears]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(products)
    assert len(taken) + len(result.left_in_float) == len(products)
    names = [linear.name for group in result.groups for linear in group.linears] + [left.name for left in result.left_in_float]
    assert len(set(names)) == len(names)
    assert all(names)
    assert len({group.name for group in result.groups}) == len(result.groups)


@pytest.mark.parametrize("name", RUNNABLE)
def test_weight_and_bias_reproduce_the_output(name: str) -> None:
    model, result = found(name)
    linears = [linear for group in result.groups for linear in group.linears]
    taps = [value.name or "" for linear in linears for value in (linear.input, linear.output)]
    values = run(model, zoo.feeds(ir.to_proto(model)), taps)
    tolerance = 2e-3 if zoo.ZOO[name].dtype == zoo.FLOAT16 else 1e-5
    for linear in linears:
        weight = linear.read_weight()
        assert weight.dtype == np.float32
        assert weight.shape == (linear.out_features, linear.in_features)
        assert weight.flags.c_contiguous
        expected = values[linear.input.name or ""].astype(np.float32) @ weight.T
        if linear.read_bias is not None:
            bias = linear.read_bias()
            assert bias.shape == (linear.out_features,)
            assert bias.dtype == np.float32
            expected = expected + bias
        assert relative(values[linear.output.name or ""], expected) < tolerance


@pytest.mark.parametrize("name", [name for name in RUNNABLE if any(zoo.ZOO[name].norms or ())])
def test_scaling_the_norm_site_scales_the_group_input_and_nothing_else(name: str) -> None:
    """Divide gamma and beta by a channel scale and multiply the weights' columns by it: outputs stay, the group's input is divided."""
    model, result = found(name)
    feeds = zoo.feeds(ir.to_proto(model))
    groups = [group for group in result.groups if group.norm is not None]
    taps = [group.input.name or "" for group in groups]
    before = run(model, feeds, taps)
    channel = np.random.default_rng(1).uniform(0.5, 2.0, zoo.K).astype(np.float32)
    for group in groups:
        assert group.norm is not None
        norm = group.norm
        _replace(norm.scale_node, norm.scale_index, norm.read_scale() / channel)
        if norm.bias_node is not None and norm.read_bias is not None:
            _replace(norm.bias_node, norm.bias_index, norm.read_bias() / channel)
        for linear in group.linears:
            scaled = ir.tensor((linear.read_weight() * channel).T.astype(linear.input.dtype.numpy()))  # type: ignore[union-attr]
            weight = ir.Value(
                name=f"{linear.name}.scaled", const_value=scaled, shape=ir.Shape(scaled.shape), type=ir.TensorType(scaled.dtype)
            )
            model.graph.register_initializer(weight)
            linear.nodes[0].replace_input_with(1, weight)
    after = run(model, feeds, taps)
    tolerance = 1e-2 if zoo.ZOO[name].dtype == zoo.FLOAT16 else 1e-5
    for group in groups:
        assert relative(after[group.input.name or ""] * channel, before[group.input.name or ""]) < tolerance
    for output in model.graph.outputs:
        assert relative(after[output.name or ""], before[output.name or ""]) < tolerance


def _replace(node: ir.Node, index: int, array: np.ndarray[Any, Any]) -> None:
    old = node.inputs[index]
    assert old is not None
    assert old.dtype is not None
    shape = [d for d in old.shape or () if isinstance(d, int)]
    tensor = ir.tensor(array.reshape(shape).astype(old.dtype.numpy()))
    value = ir.Value(name=f"{node.name}.scaled_{index}", const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(old.dtype))
    assert node.graph is not None
    node.graph.register_initializer(value)  # type: ignore[union-attr]
    node.replace_input_with(index, value)


def test_golden(golden: Callable[[str, str], None]) -> None:
    """What ``find`` says of the whole zoo, in one text."""
    lines = []
    for name in zoo.ZOO:
        _, result = found(name)
        lines.append(name)
        for group in result.groups:
            norm = f", norm {group.norm.scale_node.op_type}" if group.norm is not None else ""
            lines.append(f"  {group.name}: {group.out_features} x {group.in_features}, {len(group.linears)} linears{norm}")
        lines += [f"  {left.name} ({left.op_type}, {left.weight_shape}) in float: {left.reason}" for left in result.left_in_float]
    golden("linears_zoo", "\n".join(lines) + "\n")


def test_find_only_looks() -> None:
    for name in zoo.ZOO:
        model = prepare(zoo.model(name))
        before = graph_text(model)
        find(model, **zoo.ZOO[name].options)
        assert graph_text(model) == before


def test_weights_are_not_read() -> None:
    model = prepare(zoo.model("matmul"))
    (weight,) = (value for value in model.graph.initializers.values() if value.const_value is not None and value.const_value.size > 1000)

    def read() -> ir.TensorProtocol:
        pytest.fail("read a weight")

    weight.const_value = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([zoo.K, zoo.N]))
    assert len(find(model).groups) == 1


def test_bias_add_is_obsolete_with_its_product() -> None:
    _, result = found("bias_first")
    (linear,) = result.groups[0].linears
    assert [node.op_type for node in linear.nodes] == ["MatMul", "Add"]
    assert linear.output is linear.nodes[1].outputs[0]


@pytest.mark.parametrize(
    "name",
    [
        "bias_of_higher_rank_stays_outside",
        "bias_add_with_product_also_read_stays_outside",
        "bias_add_with_product_as_output_stays_outside",
        "residual_add_is_no_bias",
    ],
)
def test_add_that_is_not_a_bias_stays(name: str) -> None:
    _, result = found(name)
    (linear,) = result.groups[0].linears
    assert [node.op_type for node in linear.nodes] == ["MatMul"]
    assert linear.read_bias is None


def test_names_come_from_the_export() -> None:
    def names(case: str) -> list[str]:
        return [linear.name for group in found(case)[1].groups for linear in group.linears]

    assert names("matmul") == ["up"]  # TorchScript's node path
    assert names("matmul_transposed_weight") == ["up"]  # the parameter's name
    assert names("bias_first") == ["layer.query"]
    assert names("one_weight_one_input_two_linears") == ["shared", "shared.MatMul_matmul_3"]  # the node's own name where that is taken


def test_group_names_share_their_path() -> None:
    g = zoo.Graph("qkv")
    products = [g.op("MatMul", "x", g.weight(zoo.K, zoo.K), name=f"/layers.0/attn/{p}_proj/MatMul") for p in "qkv"]
    model = prepare(ir.from_proto(g.model([g.op("Sum", *products)])))
    (group,) = find(model).groups
    assert group.name == "layers.0.attn.q_proj+k_proj+v_proj"
    assert group.in_features == zoo.K
    assert group.out_features == 3 * zoo.K
    np.testing.assert_array_equal(group.read_weights(), np.concatenate([linear.read_weight() for linear in group.linears]))


def test_long_group_names_are_cut() -> None:
    g = zoo.Graph("many")
    products = [g.op("MatMul", "x", g.weight(zoo.K, 32), name=f"/cross/k{i}/MatMul") for i in range(9)]
    (group,) = find(prepare(ir.from_proto(g.model([g.op("Sum", *products)])))).groups
    assert group.name == "cross.k0+k1+k2+k3+k4+4 more"


def test_dynamo_metadata_names_the_module() -> None:
    proto = zoo.proto("matmul_2d_input")
    entry = proto.graph.node[0].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'model', 'model.mlp.up', 'linear']"
    (group,) = find(prepare(ir.from_proto(proto))).groups
    assert group.name == "model.mlp.up"


def test_products_without_weight_add_their_own_name() -> None:
    g = zoo.Graph("scores")
    scores = g.op("MatMul", "x", g.op("Transpose", "x", perm=[0, 2, 1]), name="/attn/MatMul")
    model = prepare(ir.from_proto(g.model([g.op("MatMul", scores, "x", name="/attn/MatMul_1")])))
    assert [left.name for left in find(model).left_in_float] == ["attn.MatMul", "attn.MatMul_1"]


def test_names_that_meet_are_numbered() -> None:
    g = zoo.Graph("meet")
    h = "x"
    for name in ("/m/a/MatMul", "/m/a.MatMul/MatMul", "/m/a/Gate/../MatMul"):
        h = g.op("MatMul", h, g.weight(zoo.K, zoo.K), name=name)
    shared = g.weight(zoo.K, zoo.K, name="tied.weight")
    for _ in range(3):
        h = g.op("MatMul", h, shared, name="")
    model = prepare(ir.from_proto(g.model([h])))
    for node in list(model.graph)[3:]:
        node.name = "same"  # as before ``prepare`` names nodes apart
    names = [group.name for group in find(model).groups]
    assert names[3:] == ["tied", "tied.same", "tied.same_2"]
    assert len(set(names)) == 6


def test_unreadable_scopes_are_passed_over() -> None:
    proto = zoo.proto("matmul_transposed_weight")
    for node in proto.graph.node:
        entry = node.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", "not a list ["
    assert find(prepare(ir.from_proto(proto))).groups[0].name == "up"


def test_weight_of_unknown_shape_stays_in_float() -> None:
    model = zoo.model("matmul_transposed_weight")
    model.graph.node(0).outputs[0].shape = None
    assert find(model).left_in_float[0].reason == "the weight's shape is unknown"


def test_external_weights_are_read_in_every_width(tmp_path: Path) -> None:
    """4-bit, 8-bit, fp16 and fp32 from a data file, at offsets other than 0."""
    for name in ("dequantized_blocked_int4", "dequantized_to_fp16", "bias_first", "bf16"):
        proto = zoo.proto(name)
        expected = [linear.read_weight() for group in find(prepare(ir.from_proto(proto))).groups for linear in group.linears]
        onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location=f"{name}.data")
        model = prepare(model_file.load(tmp_path / "m.onnx"))
        weights = [linear.read_weight() for group in find(model).groups for linear in group.linears]
        for weight, reference in zip(weights, expected, strict=True):
            np.testing.assert_array_equal(weight, reference)
        external = [v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
        assert external
        assert all(tensor.raw is None for tensor in external), "a mapping of the data file was left open"


def test_sequential_scopes_of_torchscript() -> None:
    g = zoo.Graph("sequential")
    model = prepare(ir.from_proto(g.model([g.op("MatMul", "x", g.weight(zoo.K, zoo.K), name="/mlp/layers/layers.1/MatMul")])))
    assert find(model).groups[0].name == "mlp.layers.1"


def test_keep_matches_node_names_too() -> None:
    model = prepare(zoo.model("kept"))
    result = find(model, keep=("^/layers.0/up/MatMul$",))
    assert [left.name for left in result.left_in_float] == ["layers.0.up"]
    assert result.left_in_float[0].weight_shape == (zoo.K, zoo.K)


def test_an_initializer_that_is_an_input_is_no_constant_before_prepare() -> None:
    """Its value can be overridden at run time; ``prepare`` settles it."""
    proto = zoo.proto("matmul")
    name = proto.graph.initializer[0].name
    proto.graph.input.append(zoo.helper.make_tensor_value_info(name, zoo.FLOAT, [zoo.K, zoo.N]))
    raw = ir.from_proto(proto)
    assert find(raw).left_in_float[0].reason == "both operands are activations"
    assert len(find(prepare(raw)).groups) == 1
