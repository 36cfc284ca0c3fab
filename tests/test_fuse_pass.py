from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter import MatchingTracer

from fqonnx.errors import EngineError, UsageError
from fqonnx.ops import DOMAIN, inline_bodies, to_layout
from fqonnx.ops.reference import unpack_rows, w4a4_gemm
from fqonnx.passes.edit import GROUP_TAG, LINEARS_TAG
from fqonnx.passes.fuse import LOWERING_TAG, PORTABLE, Fuse, Lowering, QdqProduct, Target, target_named
from fqonnx.passes.pipeline import DEBUG_VARIABLE, check, quantize_model
from fqonnx.passes.quantize import Quantize
from fqonnx.recipe import SCHEMES, Recipe
from tests.graph_text import graph_text
from tests.rewriting import MODELS, NUMPY, Builder, feed, found, gate_up, mlp, outputs, qkv, run, solve

if TYPE_CHECKING:
    from collections.abc import Callable

    from fqonnx.calib.solution import GroupSolution
    from fqonnx.passes.groups import LinearGroup

FP32, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
FUSIBLE = ("w4a4", "w4a8")


def recipe(scheme: str) -> Recipe:
    return Recipe(scheme=scheme, transform="none", weights="rtn")


def qdq(proto: onnx.ModelProto, scheme: str, **solving: Any) -> tuple[ir.Model, tuple[LinearGroup, ...], dict[str, GroupSolution]]:
    model, groups = found(proto)
    solutions = solve(groups, SCHEMES[scheme], **solving)
    Quantize(groups, solutions.__getitem__, recipe(scheme))(model)
    RemoveUnusedNodesPass()(model)
    return model, groups, solutions


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def gemms(model: ir.Model) -> dict[str, ir.Node]:
    return {node.name or "": node for node in model.graph if node.op_type == "W4A4Gemm"}


@pytest.mark.parametrize("target", [None, "sm86", "sm90"])
@pytest.mark.parametrize("scheme", FUSIBLE)
@pytest.mark.parametrize("name", MODELS)
def test_codes_are_those_of_the_qdq_form_and_outputs_agree(name: str, scheme: str, target: str | None) -> None:
    proto = MODELS[name]()
    arrays = feed(proto)
    model, groups, _ = qdq(proto, scheme)
    codes = tuple(f"{group.name}.flat_quantize.q" for group in groups)
    before = run(model, arrays, codes)
    assert Fuse(target_named(target))(model).modified
    check(model)
    after = run(model, arrays, codes)
    flips = 0
    for code in codes:
        (flat,) = (node for node in model.graph if code in (value.name for value in node.outputs))
        packed = flat.attributes["packed"].as_int() == 1
        assert packed == (target == "sm86" and scheme == "w4a4" and before[code].shape[-1] % 32 == 0)
        unpacked = unpack_rows(after[code]) if packed else after[code]
        if code == codes[0]:
            np.testing.assert_array_equal(unpacked, before[code])
        # Behind the first group an input may differ by an ulp, and so lie on the other side of a rounding boundary.
        flips += np.count_nonzero(unpacked != before[code])
    assert flips <= 2
    for value in proto.graph.output:
        difference = np.linalg.norm(after[value.name] - before[value.name]) / np.linalg.norm(before[value.name])
        assert difference < (1e-2 if flips else 1e-6)


@pytest.mark.parametrize("group_size", [0, 32, 128])
@pytest.mark.parametrize("target", [None, "sm80", "sm90"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("scheme", FUSIBLE)
def test_every_merged_linear_is_the_reference(scheme: str, dtype: int, target: str | None, group_size: int) -> None:
    b = Builder(dtype)
    x = b.input("x", ["batch", 2, 256])
    b.output(b.linear(x, 256, 64, "a", bias="left"), ["batch", 2, 64])
    b.output(b.linear(x, 256, 32, "b"), ["batch", 2, 32])
    proto = b.model()
    model, (group,), solutions = qdq(proto, scheme, group_size=group_size, scaled=False)
    Fuse(target_named(target))(model)
    check(model)
    (gemm,) = gemms(model).values()
    packed, layout = bool(gemm.attributes["packed"].as_int()), gemm.attributes["layout"].as_string()
    assert (packed, layout) == {
        None: (False, "plain"),
        "sm80": (scheme == "w4a4", "plain"),
        "sm90": (False, "plain" if group_size == 32 else "k128"),
    }[target]
    arrays = feed(proto)
    q, scale = f"{group.name}.flat_quantize.q", f"{group.name}.flat_quantize.scale"
    ran = run(model, arrays, (q, scale))
    solution = solutions[group.name]
    bias = np.concatenate(
        [np.zeros(linear.out_features, np.float32) if linear.read_bias is None else linear.read_bias() for linear in group.linears]
    )
    expected = w4a4_gemm(
        ran[q], ran[scale], to_layout(solution.codes, layout), solution.scales, bias, packed=packed, layout=layout, dtype=NUMPY[dtype]
    )
    got = np.concatenate([ran["a_add_out"], ran["b_out"]], axis=-1)
    assert got.dtype == NUMPY[dtype]
    if group_size == 0:
        np.testing.assert_array_equal(got, expected)
    else:
        eps = float(np.finfo(np.float32).eps) * 16 if dtype == FP32 else {FP16: 2.0**-10, BF16: 2.0**-7}[dtype]
        np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), rtol=eps, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_each_group_becomes_one_quantizer_and_one_gemm(name: str) -> None:
    proto = MODELS[name](FP16)
    model, groups, _ = qdq(proto, "w4a4")
    Fuse()(model)
    found_ops = ops(model)
    assert found_ops["FlatQuantize"] == found_ops["W4A4Gemm"] == len(groups)
    assert found_ops["Split"] == sum(len(group.linears) > 1 or group.out_features % 16 > 0 for group in groups)
    assert not found_ops.keys() & {"DequantizeLinear", "MatMul", "Gemm", "Cast", "Transpose"}
    assert all(value.uses() for value in model.graph.initializers.values()), "a constant that nothing reads"
    assert ir.to_proto(model).graph.input == proto.graph.input
    assert [o.name for o in model.graph.outputs] == [o.name for o in proto.graph.output]
    for node, group in zip(gemms(model).values(), groups, strict=True):
        assert node.metadata_props[GROUP_TAG] == group.name
        assert json.loads(node.metadata_props[LINEARS_TAG]) == [linear.name for linear in group.linears]
        lowering = Lowering(**json.loads(node.metadata_props[LOWERING_TAG]))
        assert lowering == Lowering("mma_s8", "int8", "plain", -(-group.out_features // 16) * 16, -(-group.in_features // 16) * 16)
    for group in groups:
        for linear in group.linears:
            (value,) = [v for node in model.graph for v in node.outputs if v.name == linear.output.name]
            assert (value.dtype, value.shape) == (linear.output.dtype, linear.output.shape)


def test_the_exporters_metadata_stays_where_it_holds_for_all_that_is_merged() -> None:
    model, groups = found(gate_up())
    for group in groups:
        for linear in group.linears:
            linear.nodes[0].metadata_props.update(scope=linear.name, layer="mlp")
    solutions = solve(groups, SCHEMES["w4a4"])
    quantize_model(model, groups, solutions.__getitem__, recipe("w4a4"))
    merged, single = gemms(model).values()
    assert merged.metadata_props["layer"] == single.metadata_props["layer"] == "mlp"
    assert "scope" not in merged.metadata_props
    assert single.metadata_props["scope"] == "mlp.down"


def test_weights_stay_lazy_and_are_stacked_in_the_layout_of_the_target() -> None:
    model, groups = found(gate_up())
    solutions = solve(groups, SCHEMES["w4a4"], scaled=False)
    loads: Counter[str] = Counter()

    def load(name: str) -> GroupSolution:
        loads[name] += 1
        return solutions[name]

    quantize_model(model, groups, load, recipe("w4a4"), "sm90")
    assert loads == Counter(dict.fromkeys(solutions, 1))
    for name, layout in (("mlp.gate+up", "k128"), ("mlp.down", "plain")):
        weight, scale = (model.graph.initializers[f"{name}.{what}"].const_value for what in ("weight_int4", "weight_scale"))
        assert isinstance(weight, ir.LazyTensor) and not weight.cache  # noqa: PT018
        assert isinstance(scale, ir.LazyTensor) and not scale.cache  # noqa: PT018
        assert weight.dtype == ir.DataType.INT4
        np.testing.assert_array_equal(weight.numpy().astype(np.int8), to_layout(solutions[name].codes, layout))
        np.testing.assert_array_equal(scale.numpy(), solutions[name].scales)
    assert loads == Counter(dict.fromkeys(solutions, 2)), "merging reads a group once, however many linears it has"


def test_what_does_not_fit_the_first_kernel_says_so() -> None:
    model, _, _ = qdq(gate_up(), "w4a4")
    Fuse(target_named("sm90"))(model)
    assert [json.loads(node.metadata_props[LOWERING_TAG]) for node in gemms(model).values()] == [
        {"kernel": "wgmma_s8", "container": "int8", "layout": "k128", "n": 192, "k": 128, "why": None},
        {
            "kernel": "mma_s8",
            "container": "int8",
            "layout": "plain",
            "n": 128,
            "k": 96,
            "why": "wgmma_s8 wants a K that is a multiple of 128, not 96",
        },
    ]


@pytest.mark.parametrize(
    ("capability", "n", "k", "bits", "group_size", "expected"),
    [
        (90, 512, 256, 4, 0, Lowering("wgmma_s8", "int8", "k128", 512, 256)),
        (90, 512, 256, 8, 0, Lowering("wgmma_s8", "int8", "k128", 512, 256)),
        (90, 512, 256, 4, 128, Lowering("wgmma_s8", "int8", "k128", 512, 256)),
        (90, 1000, 256, 4, 0, Lowering("wgmma_s8", "int8", "k128", 1008, 256)),
        (90, 64, 192, 4, 0, Lowering("mma_s8", "int8", "plain", 64, 192, "wgmma_s8 wants a K that is a multiple of 128, not 192")),
        (
            90,
            64,
            256,
            4,
            64,
            Lowering("mma_s8", "int8", "plain", 64, 256, "wgmma_s8 wants weight groups of whole channels or 128, not 64"),
        ),
        (89, 64, 96, 4, 0, Lowering("mma_s4", "packed", "plain", 64, 96)),
        (89, 64, 90, 4, 0, Lowering("mma_s4", "packed", "plain", 64, 96)),
        (89, 64, 97, 4, 0, Lowering("mma_s8", "int8", "plain", 64, 112, "mma_s4 wants a K that is a multiple of 32, not 112")),
        (89, 64, 95, 4, 0, Lowering("mma_s8", "int8", "plain", 64, 96, "mma_s4 wants container packed: K = 95 is odd")),
        (89, 64, 96, 8, 0, Lowering("mma_s8", "int8", "plain", 64, 96, "mma_s4 wants container packed: 8-bit activations")),
        (120, 33, 50, 4, 0, Lowering("mma_s8", "int8", "plain", 48, 64)),
        (None, 33, 50, 4, 0, Lowering("mma_s8", "int8", "plain", 48, 64)),
        (
            None,
            32,
            48,
            4,
            16,
            Lowering(
                None,
                "int8",
                "plain",
                32,
                48,
                "no kernel takes it: mma_s8 wants weight groups of whole channels or any multiple of 32, not 16",
            ),
        ),
    ],
)
def test_lowering_follows_from_the_table_of_kernels(
    capability: int | None, n: int, k: int, bits: int, group_size: int, expected: Lowering
) -> None:
    assert Target(capability).lower(n=n, k=k, activation_bits=bits, group_size=group_size) == expected


def test_a_group_without_a_kernel_is_refused() -> None:
    model, _, _ = qdq(gate_up(), "w4a4", group_size=16)
    with pytest.raises(
        EngineError, match=r"'mlp.gate\+up': no kernel for this W4A4Gemm on compute capability 9.0: wgmma_s8 wants .* not 16"
    ):
        Fuse(target_named("sm90"))(model)


@pytest.mark.parametrize(
    ("target", "capability"),
    [(None, None), ("sm80", 80), ("sm86", 86), ("sm89", 89), ("sm90", 90), ("sm_90a", 90), ("sm100", 100), ("sm103", 103), ("sm120", 120)],
)
def test_names_of_targets(target: str | None, capability: int | None) -> None:
    assert target_named(target) == Target(capability)
    assert target_named(None) == PORTABLE


@pytest.mark.parametrize("target", ["sm75", "sm70", "hopper", "90", "", "sm9", "sm90x", "sm1000"])
def test_a_target_without_kernels_is_refused(target: str) -> None:
    with pytest.raises(UsageError, match=f"{target!r}.*sm80"):
        target_named(target)


@pytest.mark.parametrize("target", [None, "sm80", "sm90"])
@pytest.mark.parametrize("k", [40, 45, 150])
def test_sizes_that_kernels_do_not_take_are_filled_up(k: int, target: str | None) -> None:
    """One linear and two merged ones."""
    b = Builder()
    x = b.input("x", ["batch", 3, k])
    first = b.linear(x, k, 33, "first", bias="right")
    b.output(first, ["batch", 3, 33])
    second = b.linear(x, k, 40, "second")
    b.output(second, ["batch", 3, 40])
    b.output(b.linear(b.node("Relu", [second], "relu"), 40, 35, "last"), ["batch", 3, 35])
    proto = b.model()
    arrays = feed(proto)
    model, _, _ = qdq(proto, "w4a4")
    before = run(model, arrays)
    Fuse(target_named(target))(model)
    check(model)
    RemoveUnusedNodesPass()(model)
    check(model)
    for node in gemms(model).values():
        assert node.inputs[2] is not None
        assert [size % 16 for size in node.inputs[2].shape or ()] == [0, 0]
    assert ops(model)["Gather"] == ops(model)["Split"] == 2
    after = run(model, arrays)
    for name, value in before.items():
        assert after[name].shape == value.shape
        np.testing.assert_allclose(after[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "w8a16"])
def test_other_schemes_are_left_as_they_are(scheme: str) -> None:
    model, _, _ = qdq(qkv(), scheme)
    before = graph_text(model)
    assert not Fuse()(model).modified
    assert graph_text(model) == before


def test_fusing_again_changes_nothing() -> None:
    model, _, _ = qdq(qkv(), "w4a4")
    assert Fuse(target_named("sm80"))(model).modified
    before = graph_text(model)
    assert not Fuse(target_named("sm80"))(model).modified
    assert graph_text(model) == before


def test_a_dequantized_input_with_other_readers_stays() -> None:
    model, groups, _ = qdq(mlp(), "w4a4")
    dequantized = next(node.outputs[0] for node in model.graph if node.name == "up.input.dequantized")
    model.graph.outputs.append(dequantized)
    before = run(model, arrays := feed(mlp()))
    Fuse()(model)
    check(model)
    after = run(model, arrays)
    np.testing.assert_array_equal(after["up.input.dequantized"], before["up.input.dequantized"])
    np.testing.assert_allclose(after["down_add_out"], before["down_add_out"], rtol=1e-4, atol=1e-4)
    assert len(groups) == 2
    assert ops(model)["FlatQuantize"] == 3, "the integers are needed twice: packed or not is the kernel's own affair"


@pytest.mark.parametrize("reader", ["output", "node", "shape"])
def test_a_bias_is_only_folded_when_it_is_one(reader: str) -> None:
    """The product is an output or has a second reader, or what is added is no constant ``[N]``: then the ``Add`` stays."""
    model, _, _ = qdq(outputs(), "w4a4")
    product = next(node.outputs[0] for node in model.graph if node.name == "last")
    (add,) = product.consumers()
    if reader == "output":
        model.graph.outputs.append(product)
    elif reader == "node":
        negated = ir.node("Neg", [product], name="negated")
        negated.outputs[0].name, negated.outputs[0].type, negated.outputs[0].shape = "negated", product.type, product.shape
        model.graph.insert_after(add, negated)
        model.graph.outputs.append(negated.outputs[0])
    else:
        wide = ir.Value(name="wide", type=product.type, shape=ir.Shape([1, 48]), const_value=ir.tensor(np.ones((1, 48), np.float32)))
        model.graph.register_initializer(wide)
        add.replace_input_with(1, wide)
    before = run(model, arrays := feed(outputs()))
    Fuse()(model)
    check(model)
    assert "last.add_bias" in {node.name for node in model.graph}
    after = run(model, arrays)
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_inside_a_branch() -> None:
    """A whole group in an ``If`` body is fused there."""
    model, _, _ = qdq(mlp(), "w4a4")
    (x,), (y,) = model.graph.inputs, model.graph.outputs
    nodes = list(model.graph)
    model.graph.outputs.clear()
    model.graph.remove(nodes)
    branch = ir.Graph([], [y], nodes=nodes, name="then")
    negated = ir.node("Neg", [model.graph.initializers["down.bias"]], name="other", outputs=[ir.Value(name="else_out", type=y.type)])
    condition = ir.Value(name="condition", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    model.graph.inputs.append(condition)
    result = ir.Value(name="result", type=y.type, shape=y.shape)
    other = ir.Graph([], [negated.outputs[0]], nodes=[negated], name="else")
    model.graph.append(ir.node("If", [condition], {"then_branch": branch, "else_branch": other}, name="if", outputs=[result]))
    model.graph.outputs.append(result)
    assert x.uses()
    arrays = feed(mlp()) | {"condition": np.array(True)}
    check(model)
    before = run(model, arrays)
    assert Fuse(target_named("sm80"))(model).modified
    check(model)
    assert Counter(node.op_type for node in branch)["W4A4Gemm"] == 2
    np.testing.assert_allclose(run(model, arrays)["result"], before["result"], rtol=1e-4, atol=1e-4)


class _Reasons(MatchingTracer):
    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []

    def log(self, rule: object, container: object, node: object, match_result: Any, status: object) -> None:
        self.reasons.append(match_result.reason)


def test_the_pattern_says_why_not() -> None:
    def reasons(change: Callable[[ir.Model], None]) -> str:
        model, _, _ = qdq(mlp(), "w4a4")
        change(model)
        product = next(node for node in model.graph if node.name == "up")
        tracer = _Reasons()
        assert not QdqProduct().match(model, model.graph, product, check_nodes_are_removable=False, tracer=tracer)
        (reason,) = tracer.reasons
        return reason

    def node(model: ir.Model, name: str) -> ir.Node:
        return next(n for n in model.graph if n.name == name)

    def packed(model: ir.Model) -> None:
        node(model, "up.flat_quantize").attributes["packed"] = ir.AttrInt64("packed", 1)

    def other_op(model: ir.Model) -> None:
        node(model, "up.flat_quantize").op_type = "Other"

    def other_graph(model: ir.Model) -> None:
        flat = node(model, "up.flat_quantize")
        model.graph.remove(flat)
        ir.Graph([], [], nodes=[flat], name="outer")

    def int8(model: ir.Model) -> None:
        model.graph.initializers["up.weight_int4"].dtype = ir.DataType.INT8

    def computed_scale(model: ir.Model) -> None:
        model.graph.initializers.pop("up.weight_scale").const_value = None

    def per_column(model: ir.Model) -> None:
        node(model, "up.dequantize").attributes["axis"] = ir.AttrInt64("axis", 1)

    def untyped(model: ir.Model) -> None:
        node(model, "up").outputs[0].type = None

    def zero_point(model: ir.Model) -> None:
        dequantize = node(model, "up.dequantize")
        dequantize.resize_inputs(3)
        dequantize.replace_input_with(2, model.graph.initializers["up.weight_int4"])

    for change, expected in (
        (packed, "packed already"),
        (other_op, "not the dequantized output of a FlatQuantize"),
        (other_graph, "quantized outside of this graph"),
        (int8, "not a constant INT4 matrix"),
        (computed_scale, "not constant fp32"),
        (per_column, "neither per row nor per group along K"),
        (untyped, "not known to be fp32, fp16 or bf16"),
        (zero_point, "Number of inputs"),
    ):
        assert expected in reasons(change), change.__name__


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_pipeline_under_an_optimizing_runtime(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass is followed by the checker here, and ONNX Runtime may inline and fold as it likes."""
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    proto = qkv()
    model, groups = found(proto)
    solutions = solve(groups, SCHEMES[scheme])
    rewritten = quantize_model(model, groups, solutions.__getitem__, recipe(scheme), "sm90")
    assert (DOMAIN in rewritten.opset_imports) == SCHEMES[scheme].quantizes_activations
    arrays = feed(proto)
    reference = run(rewritten, arrays)
    options = ort.SessionOptions()
    # ONNX Runtime's default for fused weight-only products rounds activations to 8 bits; 0 keeps them.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = ort.InferenceSession(ir.to_proto(rewritten).SerializeToString(), options, providers=["CPUExecutionProvider"])
    for value, got in zip(session.get_outputs(), session.run(None, arrays), strict=True):
        assert np.linalg.norm(got - reference[value.name]) < 1e-2 * np.linalg.norm(got)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["qkv", "gate_up"])
def test_every_scheme_builds_in_tensorrt_rtx(name: str, scheme: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install fqonnx[tensorrt-rtx]")
    model, groups = found(MODELS[name](FP16))
    solutions = solve(groups, SCHEMES[scheme], group_size=32)
    inline_bodies(quantize_model(model, groups, solutions.__getitem__, recipe(scheme)))
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(ir.to_proto(model).SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("x", *((batch, 4, groups[0].in_features) for batch in (1, 2, 4)))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


def test_validation_names_the_pass_that_broke_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups = found(mlp())
    solutions = solve(groups, SCHEMES["w4a4"])

    def broken(self: Fuse, model: ir.Model) -> ir.passes.PassResult:
        nodes = list(model.graph)
        model.graph.remove(nodes[0])
        model.graph.append(nodes[0])
        return ir.passes.PassResult(model, True)

    monkeypatch.setattr(Fuse, "call", broken)
    with pytest.raises(ir.passes.PostconditionError, match=r"Fuse left an invalid model: node .* reads .* before it is computed"):
        quantize_model(model, groups, solutions.__getitem__, recipe("w4a4"), validate=True)


def test_check_looks_at_names_and_order() -> None:
    def broken(change: Callable[[ir.Graph], None]) -> ir.Model:
        model, _ = found(qkv())
        check(model)
        change(model.graph)
        return model

    def rename_node(graph: ir.Graph) -> None:
        graph[1].name = graph[0].name

    def rename_value(graph: ir.Graph) -> None:
        graph[1].outputs[0].name = graph[0].outputs[0].name

    def lose_output(graph: ir.Graph) -> None:
        graph.outputs[0] = ir.Value(name="nowhere", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))

    def share_input(graph: ir.Graph) -> None:
        graph.inputs.append(ir.Value(name=graph.inputs[0].name, type=graph.inputs[0].type, shape=graph.inputs[0].shape))

    for change, message in (
        (rename_node, "used twice"),
        (rename_value, "used twice"),
        (lose_output, "does not compute its output 'nowhere'"),
        (share_input, "two inputs or initializers of one name"),
    ):
        with pytest.raises(ValueError, match=message):
            check(broken(change))


@pytest.mark.parametrize(("name", "target"), [("qkv", "sm80"), ("gate_up", "sm90"), ("outputs", None)])
def test_golden(name: str, target: str | None, golden: Callable[[str, ir.Model | str], None]) -> None:
    model, _, _ = qdq(MODELS[name](FP16), "w4a4")
    Fuse(target_named(target))(model)
    golden(f"fuse_{name}_{target or 'portable'}", graph_text(model).partition("\nfunction ")[0])
