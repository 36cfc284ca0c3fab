"""RMSNorms into the quantizer behind them: every form in which they are written, and what must stay as it is."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from fqonnx.ops import inline_bodies
from fqonnx.ops.reference import add_rms_norm_flat_quantize, rms_norm_flat_quantize, unpack_rows
from fqonnx.passes.edit import GROUP_TAG
from fqonnx.passes.fuse_norm import FuseNorm
from fqonnx.passes.pipeline import check, quantize_model
from fqonnx.recipe import SCHEMES, Recipe
from tests import rewriting
from tests.graph_text import graph_text
from tests.rewriting import NUMPY, Builder, feed, found, fused_by, left_alone_by, run, solve

if TYPE_CHECKING:
    from collections.abc import Callable

FP32, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
K = 128
SHAPE: list[int | str | None] = ["batch", "tokens", K]
CODES, SCALE = "a+b.flat_quantize.q", "a+b.flat_quantize.scale"


def number(b: Builder, name: str, value: float, dtype: int) -> str:
    return b.constant(name, np.array(value, NUMPY[dtype]))


def gamma(b: Builder, dtype: int | None = None) -> str:
    return b.constant("gamma", (1 + 0.3 * b.rng.standard_normal(K)).astype(NUMPY[b.dtype if dtype is None else dtype]))


def root_mean_square(b: Builder, x: str, dtype: int, *, power: bool = False, axes: int = -1) -> str:
    square = b.node("Pow", [x, number(b, "two", 2, dtype)], "square") if power else b.node("Mul", [x, x], "square")
    mean = b.node("ReduceMean", [square, b.constant("axes", np.array([axes], np.int64))], "mean")
    return b.node("Sqrt", [b.node("Add", [mean, number(b, "eps", 1e-2, dtype)], "add_eps")], "root")


def divided(b: Builder, x: str) -> str:
    return b.node("Mul", [b.node("Div", [x, root_mean_square(b, x, b.dtype)], "unit"), gamma(b)], "normed")


def reciprocal(b: Builder, x: str) -> str:
    inverse = b.node("Reciprocal", [root_mean_square(b, x, b.dtype, power=True, axes=2)], "inverse")
    return b.node("Mul", [gamma(b), b.node("Mul", [inverse, x], "unit")], "normed")


def one_over(b: Builder, x: str) -> str:
    inverse = b.node("Div", [number(b, "one", 1, b.dtype), root_mean_square(b, x, b.dtype)], "inverse")
    return b.node("Mul", [b.node("Mul", [x, inverse], "unit"), gamma(b)], "normed")


def power(b: Builder, x: str) -> str:
    mean = b.node("ReduceMean", [b.node("Mul", [x, x], "square"), b.constant("axes", np.array([-1], np.int64))], "mean")
    added = b.node("Add", [number(b, "eps", 1e-2, b.dtype), mean], "add_eps")
    inverse = b.node("Pow", [added, number(b, "exponent", -0.5, b.dtype)], "inverse")
    return b.node("Mul", [b.node("Mul", [x, inverse], "unit"), gamma(b)], "normed")


def in_fp32(b: Builder, x: str) -> str:
    """As torch writes Llama's norm in fp16: rounded before gamma."""
    wide = b.node("Cast", [x], "wide", to=FP32)
    unit = b.node("Mul", [wide, b.node("Reciprocal", [root_mean_square(b, wide, FP32)], "inverse")], "unit")
    return b.node("Mul", [gamma(b), b.node("Cast", [unit], "narrow", to=b.dtype)], "normed")


def standard(b: Builder, x: str) -> str:
    return b.node("RMSNormalization", [x, gamma(b)], "normed", axis=2, epsilon=1e-2)


FORMS = {f.__name__: f for f in (divided, reciprocal, one_over, power, in_fp32, standard)}


def block(form: Callable[[Builder, str], str] = divided, dtype: int = FP32, *, residual: bool = False, skip: str | None = None) -> Any:
    """A norm, of a sum with ``residual``, and two linears on it; the sum goes on to the output. ``skip`` is the contrib op's sum output."""
    b = Builder(dtype, 23 if form is standard else 21)
    x = b.input("x", SHAPE)
    if skip is not None:
        node = helper.make_node(
            "SkipSimplifiedLayerNormalization",
            [x, b.input("r", SHAPE), gamma(b)],
            ["normed_out", "", "", skip] if skip else ["normed_out"],
            "norm",
            domain="com.microsoft",
            epsilon=1e-2,
        )
        b.nodes.append(node)
        x, h = skip, "normed_out"
    else:
        if residual:
            x = b.node("Add", [x, b.input("r", SHAPE)], "total")
        h = form(b, x)
    first, second = b.linear(h, K, K, "a"), b.linear(h, K, 64, "b", bias="right")
    b.output(b.node("Concat", [x, first], "on", axis=-1), [*SHAPE[:2], 2 * K]) if x else b.output(first, SHAPE)
    b.output(second, [*SHAPE[:2], 64])
    return b.model()


def unfused(proto: onnx.ModelProto, *, scheme: str = "w4a4", target: str | None = None, scaled: bool = True) -> ir.Model:
    """The model as the passes before leave it."""
    model, _, _ = rewriting.unfused(proto, scheme=scheme, target=target, scaled=scaled)
    return model


fused = partial(fused_by, FuseNorm(), "RmsNormFlatQuantize")
left_alone = partial(left_alone_by, FuseNorm())


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_what_it_did(form: str, residual: bool) -> None:
    proto = block(FORMS[form], residual=residual)
    model = unfused(proto)
    arrays = feed(proto)
    before = run(model, arrays, (CODES, SCALE))
    (node,) = fused(model)
    assert node.op_type == ("AddRmsNormFlatQuantize" if residual else "RmsNormFlatQuantize")
    assert node.attributes["epsilon"].as_float() == pytest.approx(1e-2)
    assert node.metadata_props[GROUP_TAG] == "a+b"
    assert Counter(n.op_type for n in model.graph) == {node.op_type: 1, "W4A4Gemm": 1, "Split": 1, "Concat": 1}
    after = run(model, arrays, (CODES, SCALE))
    np.testing.assert_allclose(after[SCALE], before[SCALE], rtol=1e-5)
    assert np.count_nonzero(after[CODES] != before[CODES]) <= 2
    assert np.abs(after[CODES].astype(int) - before[CODES]).max() <= 1
    for value in proto.graph.output:
        assert np.linalg.norm(after[value.name] - before[value.name]) < 1e-2 * np.linalg.norm(before[value.name])


def test_onnx_runtimes_own_norm_computes_what_it_did() -> None:
    """``SimplifiedLayerNormalization``: in the standard domain, where ONNX has no schema of it."""
    model = unfused(block(standard))
    norm = next(node for node in model.graph if node.name == "normed")
    norm.op_type = "SimplifiedLayerNormalization"
    arrays = feed(block(standard))
    before = run(model, arrays, (CODES, SCALE))
    assert [node.op_type for node in fused(model)] == ["RmsNormFlatQuantize"]
    after = run(model, arrays, (CODES, SCALE))
    np.testing.assert_allclose(after[SCALE], before[SCALE], rtol=1e-5)
    assert np.count_nonzero(after[CODES] != before[CODES]) <= 2


@pytest.mark.parametrize("sum_name", ["total_out", ""], ids=["sum", "no_sum"])
def test_the_skip_norm_computes_what_it_did(sum_name: str) -> None:
    """Also where it does not give the sum: the op always does."""
    proto = block(skip=sum_name)
    model = unfused(proto)
    arrays = feed(proto)
    before = run(model, arrays, (CODES, SCALE))
    (node,) = fused(model)
    assert node.op_type == "AddRmsNormFlatQuantize"
    assert (node.outputs[2].name == "total_out") == bool(sum_name)
    assert all(value.name for value in node.outputs)
    after = run(model, arrays, (CODES, SCALE))
    np.testing.assert_allclose(after[SCALE], before[SCALE], rtol=1e-5)
    assert np.count_nonzero(after[CODES] != before[CODES]) <= 2
    for value in proto.graph.output:
        assert np.linalg.norm(after[value.name] - before[value.name]) < 1e-2 * np.linalg.norm(before[value.name])


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("target", [None, "sm86", "sm90"])
@pytest.mark.parametrize("scheme", ["w4a4", "w4a8"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
def test_the_op_is_the_reference(dtype: int, scheme: str, target: str | None, residual: bool) -> None:
    proto = block(in_fp32, dtype, residual=residual)
    model = unfused(proto, scheme=scheme, target=target)
    (node,) = fused(model)
    packed, bits = bool(node.attributes["packed"].as_int()), SCHEMES[scheme].activation_bits
    assert packed == (target == "sm86" and scheme == "w4a4")
    arrays = feed(proto)
    ran = run(model, arrays, tuple(value.name or "" for value in node.outputs))
    weight, left, right, clip = (v.const_value.numpy() for v in node.inputs if v is not None and v.const_value is not None)
    options: dict[str, Any] = {"epsilon": node.attributes["epsilon"].as_float(), "bits": bits}
    if residual:
        q, scale, total = add_rms_norm_flat_quantize(arrays["x"], arrays["r"], weight, left, right, float(clip), **options)
        np.testing.assert_array_equal(ran["total_out"], total)
    else:
        q, scale = rms_norm_flat_quantize(arrays["x"], weight, left, right, float(clip), **options)
    np.testing.assert_allclose(ran[SCALE], scale, rtol=float({FP32: 2.0**-20, FP16: 2.0**-10, BF16: 2.0**-7}[dtype]))
    got = unpack_rows(ran[CODES]) if packed else ran[CODES]
    assert np.abs(got.astype(int) - q).max() <= 1
    assert np.count_nonzero(got != q) <= 0.005 * q.size


def test_the_sum_is_there_for_readers_before_the_quantizer() -> None:
    """What reads the sum may stand anywhere behind the node that adds."""
    proto = block(residual=True)
    model = unfused(proto)
    total = next(value for node in model.graph for value in node.outputs if value.name == "total_out")
    early = ir.node("Neg", [total], name="early")
    (y,) = early.outputs
    y.name, y.type, y.shape = "early_out", total.type, total.shape
    add = total.producer()
    assert add is not None
    model.graph.insert_after(add, early)
    model.graph.outputs.append(y)
    assert len(fused(model)) == 1
    arrays = feed(proto)
    np.testing.assert_array_equal(run(model, arrays)["early_out"], -(arrays["x"] + arrays["r"]))


def test_a_sum_that_broadcasts_stays_a_node() -> None:
    for shape in ([1, 1, K], [None, "tokens", K], [K]):
        b = Builder(FP32)
        total = b.node("Add", [b.input("x", SHAPE), b.input("r", shape)], "total")
        b.output(b.linear(divided(b, total), K, 64, "a"), [*SHAPE[:2], 64])
        model = unfused(b.model())
        assert [node.op_type for node in fused(model)] == ["RmsNormFlatQuantize"]
        assert "total" in {node.name for node in model.graph}


def test_a_sum_with_a_constant_stays_a_node() -> None:
    b = Builder(FP32)
    total = b.node("Add", [b.input("x", [4, K]), b.random("offset", 4, K)], "total")
    b.output(b.linear(divided(b, total), K, 64, "a"), [4, 64])
    assert [node.op_type for node in fused(unfused(b.model()))] == ["RmsNormFlatQuantize"]


@pytest.mark.parametrize("value", ["square_out", "mean_out", "add_eps_out", "root_out", "unit_out", "normed_out"])
@pytest.mark.parametrize("reader", ["output", "node"])
def test_a_value_with_another_reader_stays(value: str, reader: str) -> None:
    model = unfused(block())
    read = next(v for node in model.graph for v in node.outputs if v.name == value)
    if reader == "node":
        negated = ir.node("Neg", [read], name="negated")
        model.graph.append(negated)
        (y,) = negated.outputs
        y.name, y.type, y.shape = "negated_out", read.type, read.shape
        read = y
    model.graph.outputs.append(read)
    assert left_alone(model)


@pytest.mark.parametrize("what", ["normed", "mean", "bias", "broadcast"])
def test_other_skip_norms_stay(what: str) -> None:
    model = unfused(block(skip="total_out"), scaled=False)
    norm = next(node for node in model.graph if node.name == "norm")
    if what == "normed":
        model.graph.outputs.append(norm.outputs[0])
    elif what == "mean":
        norm.outputs[1].name, norm.outputs[1].type = "mean_out", ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(norm.outputs[1])
    elif what == "bias":
        norm.resize_inputs(4)
        norm.replace_input_with(3, norm.inputs[2])
    else:
        (second,) = (value for value in model.graph.inputs if value.name == "r")
        second.shape = ir.Shape([1, "tokens", K])
    before = graph_text(model)
    assert not FuseNorm()(model).modified
    assert graph_text(model) == before


def wrong_axis(b: Builder, x: str) -> str:
    return b.node("Mul", [b.node("Div", [x, root_mean_square(b, x, b.dtype, axes=1)], "unit"), gamma(b)], "normed")


def of_another(b: Builder, x: str) -> str:
    other = b.node("Abs", [x], "other")
    return b.node("Mul", [b.node("Div", [x, root_mean_square(b, other, b.dtype)], "unit"), gamma(b)], "normed")


def upside_down(b: Builder, x: str) -> str:
    return b.node("Mul", [b.node("Div", [root_mean_square(b, x, b.dtype), x], "unit"), gamma(b)], "normed")


def multiplied(b: Builder, x: str) -> str:
    return b.node("Mul", [b.node("Mul", [x, root_mean_square(b, x, b.dtype)], "unit"), gamma(b)], "normed")


def cubed(b: Builder, x: str) -> str:
    square = b.node("Pow", [x, number(b, "three", 3, b.dtype)], "square")
    mean = b.node("ReduceMean", [b.node("Abs", [square], "abs"), b.constant("axes", np.array([-1], np.int64))], "mean")
    root = b.node("Sqrt", [b.node("Add", [mean, number(b, "eps", 1e-2, b.dtype)], "add_eps")], "root")
    return b.node("Mul", [b.node("Div", [x, root], "unit"), gamma(b)], "normed")


def layer_norm(b: Builder, x: str) -> str:
    return b.layer_norm(x, K, "norm")


def without_gamma(b: Builder, x: str) -> str:
    return b.node("Div", [x, root_mean_square(b, x, b.dtype)], "unit")


def one_gain(b: Builder, x: str) -> str:
    return b.node("Mul", [b.node("Div", [x, root_mean_square(b, x, b.dtype)], "unit"), number(b, "gain", 2, b.dtype)], "normed")


@pytest.mark.parametrize("form", [wrong_axis, of_another, upside_down, multiplied, cubed, layer_norm, without_gamma, one_gain])
def test_other_norms_stay(form: Callable[[Builder, str], str]) -> None:
    assert left_alone(unfused(block(form), scaled=False))


def test_a_gain_of_another_type_stays() -> None:
    """Mistral's exports keep it in fp32: rounding it would be another model."""

    def wide_gain(b: Builder, x: str) -> str:
        wide = b.node("Cast", [x], "wide", to=FP32)
        unit = b.node("Div", [wide, root_mean_square(b, wide, FP32)], "unit")
        return b.node("Cast", [b.node("Mul", [unit, gamma(b, FP32)], "normed")], "narrow", to=FP16)

    assert left_alone(unfused(block(wide_gain, FP16)))


def test_a_stream_of_another_type_stays() -> None:
    """Sums in fp32 and linears in fp16."""

    def narrowed(b: Builder, x: str) -> str:
        wide = b.node("Cast", [x], "wide", to=FP32)
        total = b.node("Exp", [wide], "stream")
        unit = b.node("Div", [total, root_mean_square(b, total, FP32)], "unit")
        return b.node("Mul", [b.node("Cast", [unit], "narrow", to=FP16), gamma(b)], "normed")

    assert left_alone(unfused(block(narrowed, FP16)))


def test_two_quantizers_on_one_norm_stay() -> None:
    model = unfused(block())
    flat = next(node for node in model.graph if node.op_type == "FlatQuantize")
    other = ir.node("FlatQuantize", flat.inputs, flat.attributes, domain="fqonnx", num_outputs=2, name="other")
    model.graph.insert_after(flat, other)
    for value, like in zip(other.outputs, flat.outputs, strict=True):
        value.name, value.type, value.shape = f"{like.name}.other", like.type, like.shape
        model.graph.outputs.append(value)
    assert left_alone(model)


def test_fusing_again_changes_nothing() -> None:
    model = unfused(block(residual=True))
    assert len(fused(model)) == 1
    assert left_alone(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_that_quantizes_activations_is_served(scheme: str) -> None:
    """8-bit weights stay in the Q/DQ form; what quantizes their input is the same op."""
    proto = block(residual=True)
    model, groups = found(proto)
    quantize_model(model, groups, solve(groups, SCHEMES[scheme]).__getitem__, Recipe(scheme=scheme, transform="none", weights="rtn"))
    check(model)
    served = sum(node.op_type == "AddRmsNormFlatQuantize" for node in model.graph)
    assert served == SCHEMES[scheme].quantizes_activations
    arrays = feed(proto)
    expected, got = run(proto, arrays)["b_add_out"], run(model, arrays)["b_add_out"]
    assert np.linalg.norm(got - expected) < 0.3 * np.linalg.norm(expected)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_it_builds_in_tensorrt_rtx(residual: bool) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install fqonnx[tensorrt-rtx]")
    proto = block(in_fp32, FP16, residual=residual)
    model, groups = found(proto)
    quantize_model(model, groups, solve(groups, SCHEMES["w4a4"]).__getitem__, Recipe(transform="none", weights="rtn"))
    assert any(node.op_type.endswith("RmsNormFlatQuantize") for node in model.graph)
    inline_bodies(model)
    assert {node.domain for node in model.graph} == {""}
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(ir.to_proto(model).SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for value in proto.graph.input:
        profile.set_shape(value.name, *((batch, 4, K) for batch in (1, 2, 4)))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize("name", ["norm", "sum", "skip"])
def test_golden(name: str, golden: Callable[[str, ir.Model | str], None]) -> None:
    proto = block(in_fp32, FP16, residual=name == "sum") if name != "skip" else block(dtype=FP16, skip="total_out")
    model = unfused(proto, target="sm90")
    fused(model)
    golden(f"fuse_norm_{name}", graph_text(model).partition("\nfunction ")[0])
