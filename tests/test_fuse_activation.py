"""Gated activations into the quantizer behind them: every form in which they are written, and what must stay as it is."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from fqonnx.ops import inline_bodies
from fqonnx.ops.reference import silu_mul_flat_quantize, unpack_rows
from fqonnx.passes.edit import GROUP_TAG
from fqonnx.passes.fuse_activation import HALVES_TAG, LARGEST_FACTOR, FuseActivation, with_halves
from fqonnx.passes.pipeline import check, quantize_model
from fqonnx.recipe import SCHEMES, Recipe
from fqonnx.verify import verify
from tests.graph_text import graph_text
from tests.rewriting import Builder, feed, found, fused_by, gate_up, left_alone_by, run, solve, unfused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


FP32, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
K, WIDE = 128, 96
CODES, SCALE = "down.flat_quantize.q", "down.flat_quantize.scale"


def sigmoid(b: Builder, gate: str) -> str:
    return b.node("Mul", [gate, b.node("Sigmoid", [gate], "sigmoid")], "silu")


def sigmoid_first(b: Builder, gate: str) -> str:
    return b.node("Mul", [b.node("Sigmoid", [gate], "sigmoid"), gate], "silu")


def quick_gelu(b: Builder, gate: str) -> str:
    return b.node("QuickGelu", [gate], "silu", domain="com.microsoft", alpha=1.0)


def swish(b: Builder, gate: str) -> str:
    return b.node("Swish", [gate], "silu")


def in_fp32(b: Builder, gate: str) -> str:
    wide = b.node("Cast", [gate], "wide", to=FP32)
    return b.node("Cast", [b.node("Mul", [wide, b.node("Sigmoid", [wide], "sigmoid")], "silu")], "narrow", to=b.dtype)


FORMS = {f.__name__: f for f in (sigmoid, sigmoid_first, quick_gelu, swish, in_fp32)}


def mlp(
    form: Callable[[Builder, str], str] = sigmoid,
    dtype: int = FP16,
    *,
    opset: int = 21,
    up_first: bool = False,
    reversed_product: bool = False,
) -> onnx.ModelProto:
    """Gate and up on one input, merged in the order in which they stand, and down."""
    b = Builder(dtype, opset)
    x = b.input("x", ["batch", "tokens", K])
    halves = {name: b.linear(x, K, WIDE, name, bias="right") for name in (("up", "gate") if up_first else ("gate", "up"))}
    factors = [form(b, halves["gate"]), halves["up"]]
    h = b.node("Mul", factors[::-1] if reversed_product else factors, "mul")
    b.output(b.linear(h, WIDE, K, "down"), ["batch", "tokens", K])
    return b.model()


fused = partial(fused_by, FuseActivation(), "SiluMulFlatQuantize")
left_alone = partial(left_alone_by, FuseActivation())


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("reversed_product", [False, True], ids=["", "up_times_silu"])
@pytest.mark.parametrize("up_first", [False, True], ids=["", "up_first"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_what_it_did(form: str, up_first: bool, reversed_product: bool, scaled: bool) -> None:
    proto = mlp(FORMS[form], FP32, opset=24 if form == "swish" else 21, up_first=up_first, reversed_product=reversed_product)
    model, _, _ = unfused(proto, scaled=scaled)
    assert ("down.channel_scale" in {node.name for node in model.graph}) == scaled
    arrays = feed(proto)
    before = run(model, arrays, (CODES, SCALE))
    (node,) = fused(model)
    assert Counter(n.op_type for n in model.graph) == {"FlatQuantize": 1, "W4A4Gemm": 2, "SiluMulFlatQuantize": 1} | (
        {"Mul": 1} if scaled else {}  # of the first group, whose input is no norm's
    )
    assert node.attributes["gate"].as_int() == int(up_first)
    assert node.metadata_props[GROUP_TAG] == "down"
    halves: list[str | None] = ["gate_add_out", None if scaled else "up_add_out"]
    assert json.loads(node.metadata_props[HALVES_TAG]) == (halves[::-1] if up_first else halves)
    after = run(model, arrays, (CODES, SCALE))
    np.testing.assert_allclose(after[SCALE], before[SCALE], rtol=1e-5)
    assert np.count_nonzero(after[CODES] != before[CODES]) <= 2
    assert np.abs(after[CODES].astype(int) - before[CODES]).max() <= 1
    for value in proto.graph.output:
        assert np.linalg.norm(after[value.name] - before[value.name]) < 1e-2 * np.linalg.norm(before[value.name])


@pytest.mark.parametrize("target", [None, "sm86", "sm90"])
@pytest.mark.parametrize("scheme", ["w4a4", "w4a8"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
def test_the_op_is_the_reference_on_the_merged_output(dtype: int, scheme: str, target: str | None) -> None:
    proto = mlp(dtype=dtype)
    model, _, solutions = unfused(proto, scheme=scheme, target=target, scaled=False)
    (node,) = fused(model)
    packed, bits = bool(node.attributes["packed"].as_int()), SCHEMES[scheme].activation_bits
    assert packed == (target == "sm86" and scheme == "w4a4")
    merged = node.inputs[0]
    assert merged is not None
    ran = run(model, feed(proto), (merged.name or "", CODES, SCALE))
    solution = solutions["down"]
    assert solution.left is not None and solution.right is not None  # noqa: PT018
    x = ran[merged.name or ""]
    q, scale = silu_mul_flat_quantize(x, solution.left, solution.right, float(np.float32(solution.clip)), bits=bits)
    eps = float({FP32: 2.0**-20, FP16: 2.0**-10, BF16: 2.0**-7}[dtype])
    np.testing.assert_allclose(ran[SCALE], scale, rtol=eps)
    got = unpack_rows(ran[CODES]) if packed else ran[CODES]
    assert np.abs(got.astype(int) - q).max() <= 1
    assert np.count_nonzero(got != q) <= 0.005 * q.size


@pytest.mark.parametrize("group_size", [0, 32])
def test_a_channel_scale_goes_into_the_rows_of_up(group_size: int) -> None:
    proto = mlp(dtype=FP32)
    model, _, solutions = unfused(proto, group_size=group_size)
    before = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value is not None}
    order = list(model.graph.initializers)
    fused(model)
    assert not any("channel_scale" in (node.name or "") and node.metadata_props[GROUP_TAG] == "down" for node in model.graph)
    assert [name for name in order if name in model.graph.initializers] == list(model.graph.initializers)
    scale = solutions["down"].channel_scale
    assert scale is not None
    factors = np.concatenate([np.ones(WIDE, np.float32), np.reciprocal(scale)])
    gone = {"down.channel_scale.inverse", "gate+up.split_sizes"}
    assert set(before) - set(model.graph.initializers) == gone
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        expected = before[name]
        if name in ("gate+up.weight_scale", "gate+up.bias"):
            assert isinstance(value.const_value, ir.LazyTensor)
            assert not value.const_value.cache
            expected = expected * factors.reshape(-1, *(1 for _ in expected.shape[1:]))
        np.testing.assert_array_equal(value.const_value.numpy(), expected, err_msg=name)


def test_constants_of_two_products_are_not_changed_for_one() -> None:
    """Another product reads the same scales and bias: the fused one gets its own."""
    proto = mlp(dtype=FP32)
    model, _, _ = unfused(proto)
    gemm = next(node for node in model.graph if node.name == "gate+up")
    other = ir.node("W4A4Gemm", gemm.inputs, gemm.attributes, domain="fqonnx", name="other")
    (y,) = other.outputs
    y.name, y.type, y.shape = "other_out", gemm.outputs[0].type, gemm.outputs[0].shape
    model.graph.insert_after(gemm, other)
    model.graph.outputs.append(y)
    before = run(model, arrays := feed(proto), (SCALE,))
    assert len(fused(model)) == 1
    after = run(model, arrays, (SCALE,))
    np.testing.assert_array_equal(after["other_out"], before["other_out"])
    np.testing.assert_allclose(after[SCALE], before[SCALE], rtol=1e-5)


def test_a_product_that_was_merged_before() -> None:
    """As Phi-3 is exported: one linear, and its output split."""
    b = Builder(FP16)
    merged = b.linear(b.input("x", ["batch", K]), K, 2 * WIDE, "gate_up")
    b.nodes.append(onnx.helper.make_node("Split", [merged], ["gate", "up"], "split", axis=1, num_outputs=2))
    b.output(b.linear(b.node("Mul", ["up", sigmoid(b, "gate")], "mul"), WIDE, K, "down"), ["batch", K])
    proto = b.model()
    for scaled in (False, True):
        model, _, _ = unfused(proto, scaled=scaled)
        before = run(model, arrays := feed(proto), (SCALE,))
        (node,) = fused(model)
        assert node.attributes["gate"].as_int() == 0
        np.testing.assert_allclose(run(model, arrays, (SCALE,))[SCALE], before[SCALE], rtol=2e-3)


def node_named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


@pytest.mark.parametrize("value", ["gate_add_out", "up_add_out", "sigmoid_out", "silu_out", "mul_out"])
@pytest.mark.parametrize("reader", ["output", "node"])
def test_a_value_with_another_reader_stays(value: str, reader: str) -> None:
    model, _, _ = unfused(mlp(dtype=FP32), scaled=False)
    read = next(v for node in model.graph for v in node.outputs if v.name == value)
    if reader == "output":
        model.graph.outputs.append(read)
    else:
        negated = ir.node("Neg", [read], name="negated")
        (y,) = negated.outputs
        y.name, y.type, y.shape = "negated_out", read.type, read.shape
        model.graph.append(negated)
        model.graph.outputs.append(y)
    assert left_alone(model)


def test_a_reader_in_a_branch_counts() -> None:
    model, _, _ = unfused(mlp(dtype=FP32), scaled=False)
    read = next(v for node in model.graph for v in node.outputs if v.name == "silu_out")
    branches = {}
    for name in ("then_branch", "else_branch"):
        node = ir.node("Neg", [read], name=name)
        node.outputs[0].name, node.outputs[0].type = f"{name}_out", read.type
        branches[name] = ir.Graph([], list(node.outputs), nodes=[node], name=name)
    condition = ir.Value(name="condition", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    model.graph.inputs.append(condition)
    chosen = ir.Value(name="chosen", type=read.type, shape=read.shape)
    model.graph.append(ir.node("If", [condition], branches, name="if", outputs=[chosen]))
    model.graph.outputs.append(chosen)
    assert left_alone(model)


def test_a_merged_output_with_another_reader_is_fused_unless_it_is_scaled() -> None:
    for scaled in (False, True):
        model, _, _ = unfused(mlp(dtype=FP32), scaled=scaled)
        model.graph.outputs.append(node_named(model, "gate+up").outputs[0])
        if scaled:
            assert left_alone(model)
        else:
            assert len(fused(model)) == 1


def test_a_large_channel_scale_stays_in_fp16(caplog: pytest.LogCaptureFixture) -> None:
    for dtype, fits in ((FP16, False), (FP32, True)):
        model, _, _ = unfused(mlp(dtype=dtype))
        inverse = model.graph.initializers["down.channel_scale.inverse"]
        assert inverse.const_value is not None
        values = inverse.const_value.numpy().copy()
        values[3] = 2 * LARGEST_FACTOR
        inverse.const_value = ir.tensor(values)
        with caplog.at_level("INFO", logger="fqonnx"):
            assert fits or left_alone(model)
        assert len(fused(model)) == fits
    assert "down.flat_quantize: its channel scale stays a node of its own" in caplog.text


def gate_of_another(b: Builder, gate: str) -> str:
    return b.node("Mul", [gate, b.node("Sigmoid", ["up_add_out"], "sigmoid")], "silu")


def gelu(b: Builder, gate: str) -> str:
    return b.node("QuickGelu", [gate], "silu", domain="com.microsoft")


def steep(b: Builder, gate: str) -> str:
    return b.node("Swish", [gate], "silu", alpha=2.0)


def rounded_more(b: Builder, gate: str) -> str:
    narrow = b.node("Cast", [gate], "narrow", to=BF16)
    return b.node("Cast", [b.node("Mul", [narrow, b.node("Sigmoid", [narrow], "sigmoid")], "silu")], "wide", to=b.dtype)


@pytest.mark.parametrize("form", [gate_of_another, gelu, steep, rounded_more])
def test_other_activations_stay(form: Callable[[Builder, str], str]) -> None:
    model, _, _ = unfused(mlp(form, FP32, opset=24 if form is steep else 21, up_first=True), scaled=False)
    assert left_alone(model)


@pytest.mark.parametrize("keep", ["gate", "up"])
def test_a_half_that_stays_in_float_is_not_merged(keep: str) -> None:
    model, groups, _ = unfused(mlp(dtype=FP32), keep=(keep,), scaled=False)
    assert [group.name for group in groups] == [{"gate": "up", "up": "gate"}[keep], "down"]
    assert left_alone(model)


def test_a_third_linear_on_the_same_input() -> None:
    b = Builder(FP32)
    x = b.input("x", ["batch", K])
    gate, up, side = (b.linear(x, K, WIDE, name) for name in ("gate", "up", "side"))
    b.output(b.linear(b.node("Mul", [sigmoid(b, gate), up], "mul"), WIDE, K, "down"), ["batch", K])
    b.output(side, ["batch", WIDE])
    model, _, _ = unfused(b.model(), scaled=False)
    assert left_alone(model)


def test_halves_of_other_sizes() -> None:
    """A gate for each channel that is repeated by broadcasting is no half."""
    b = Builder(FP32)
    x = b.input("x", ["batch", K])
    gate, up = b.linear(x, K, 1, "gate"), b.linear(x, K, 95, "up")
    b.output(b.linear(b.node("Mul", [sigmoid(b, gate), up], "mul"), 95, K, "down"), ["batch", K])
    model, _, _ = unfused(b.model(), scaled=False)
    assert "Split" in {node.op_type for node in model.graph}
    assert left_alone(model)


def test_an_activation_of_another_type() -> None:
    """Products in fp32, quantized as fp16: what is rounded is not what the op would round."""
    b = Builder(FP32)
    x = b.input("x", ["batch", K])
    gate, up = b.linear(x, K, WIDE, "gate"), b.linear(x, K, WIDE, "up")
    h = b.node("Cast", [b.node("Mul", [sigmoid(b, gate), up], "mul")], "narrow", to=FP16)
    b.dtype = FP16
    b.output(b.linear(h, WIDE, K, "down"), ["batch", K])
    model, _, _ = unfused(b.model(), scaled=False)
    assert left_alone(model)


def test_fusing_again_changes_nothing() -> None:
    model, _, _ = unfused(mlp())
    assert len(fused(model)) == 1
    assert left_alone(model)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme not in ("w4a4", "w4a8")])
def test_other_schemes_are_left_as_they_are(scheme: str) -> None:
    model, groups = found(gate_up())
    solutions = solve(groups, SCHEMES[scheme])
    quantize_model(model, groups, solutions.__getitem__, Recipe(scheme=scheme, transform="none", weights="rtn"))
    assert "SiluMulFlatQuantize" not in {node.op_type for node in model.graph}


def test_halves_are_computed_again_for_whoever_asks() -> None:
    for scaled in (False, True):
        proto = mlp(dtype=FP32)
        model, _, _ = unfused(proto, scaled=scaled)
        assert with_halves(model) is model
        names = ("gate_add_out",) if scaled else ("gate_add_out", "up_add_out")
        before = run(model, arrays := feed(proto), names)
        fused(model)
        text = graph_text(model)
        whole = with_halves(model)
        check(whole)
        assert graph_text(model) == text
        after = run(whole, arrays, names)
        for name in names:
            np.testing.assert_array_equal(after[name], before[name])
        assert "up_add_out" in {v.name for node in whole.graph for v in node.outputs} or scaled


@pytest.mark.parametrize("scaled", [False, True])
def test_layers_are_compared_behind_the_pass(tmp_path: Path, scaled: bool) -> None:
    proto = gate_up()
    onnx.save(proto, tmp_path / "float.onnx")
    model, groups = found(proto)
    solutions = solve(groups, SCHEMES["w4a4"], scaled=scaled)
    quantize_model(model, groups, solutions.__getitem__, Recipe(transform="none", weights="rtn"), "sm90")
    assert "SiluMulFlatQuantize" in {node.op_type for node in model.graph}
    onnx.save(ir.to_proto(model), tmp_path / "w4a4.onnx")
    samples = [feed(proto, seed) for seed in range(2)]
    report = verify(tmp_path / "float.onnx", tmp_path / "w4a4.onnx", samples, layers=True)
    layers = {group.name: group.layer for group in report.groups}
    assert layers.keys() == {"mlp.gate+up", "mlp.down"}
    for layer in layers.values():
        assert layer is not None
        assert 0.01 < layer.rel_l2 < 0.5
    lost = [note for note in report.notes if "outputs that the candidate lacks" in note]
    assert len(lost) == scaled


def test_it_builds_in_tensorrt_rtx() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install fqonnx[tensorrt-rtx]")
    model, groups = found(gate_up(FP16))
    solutions = solve(groups, SCHEMES["w4a4"])
    quantize_model(model, groups, solutions.__getitem__, Recipe(transform="none", weights="rtn"))
    assert "SiluMulFlatQuantize" in {node.op_type for node in model.graph}
    inline_bodies(model)
    assert {node.domain for node in model.graph} == {""}
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(ir.to_proto(model).SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("x", *((batch, 4, K) for batch in (1, 2, 4)))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_golden(scaled: bool, golden: Callable[[str, ir.Model | str], None]) -> None:
    model, _, _ = unfused(mlp(up_first=True), target="sm90", scaled=scaled)
    fused(model)
    golden(f"fuse_activation_{'scaled' if scaled else 'plain'}", graph_text(model).partition("\nfunction ")[0])
