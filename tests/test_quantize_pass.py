from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fqonnx.errors import CalibrationError
from fqonnx.ops.reference import flat_quantize
from fqonnx.passes.edit import GROUP_TAG, LINEAR_TAG
from fqonnx.passes.pipeline import check
from fqonnx.passes.quantize import Quantize
from fqonnx.recipe import SCHEMES, Recipe
from tests.graph_text import graph_text
from tests.rewriting import MODELS, NUMPY, Builder, chain, feed, found, gate_up, mlp, qkv, run, shared_norm, solve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

    from fqonnx.calib.solution import GroupSolution
    from fqonnx.passes.groups import LinearGroup

FP32, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
TOLERANCE = {FP32: 2e-6, FP16: 2e-3, BF16: 2e-2}
"""Of a linear's output, relative to its norm: fp32 sums in another order; for 16-bit types, operands and sums rounded to 11 and 8 bits."""


def recipe(scheme: str, group_size: int = 0) -> Recipe:
    return Recipe(scheme=scheme, transform="none", weights="rtn", group_size=group_size)


def quantized(proto: onnx.ModelProto, scheme: str, **solving: Any) -> tuple[ir.Model, tuple[LinearGroup, ...], dict[str, GroupSolution]]:
    model, groups = found(proto)
    solutions = solve(groups, SCHEMES[scheme], **solving)
    assert Quantize(groups, solutions.__getitem__, recipe(scheme, solving.get("group_size", 0)))(model).modified
    assert RemoveUnusedNodesPass()(model).modified
    check(model)
    return model, groups, solutions


def relative(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected)) if expected.size else 0.0


def expected_outputs(group: LinearGroup, solution: GroupSolution, scheme: str, tapped: dict[str, Any], dtype: int) -> list[Any]:
    """The group's outputs in numpy from the rewritten model's own group input and, where there are any, its activation codes."""
    bits, numpy = SCHEMES[scheme], NUMPY[dtype]
    x = tapped[group.input.name]
    if solution.channel_scale is not None and group.norm is None:
        x = x * np.reciprocal(solution.channel_scale).astype(numpy)
    if bits.quantizes_activations:
        one = np.ones((1, 1), np.float32)
        left, right = (one, one) if solution.left is None else (solution.left, solution.right)
        q, scale = flat_quantize(x, left, right, solution.clip, bits=bits.activation_bits)
        q_run, scale_run = tapped[f"{group.name}.flat_quantize.q"], tapped[f"{group.name}.flat_quantize.scale"]
        # The order of summation in the transform may move a value over a rounding boundary, by one step, now and then; so may ONNX
        # Runtime's way with fp16 on the CPU: it computes in fp32 and drops pairs of casts, so that x is not what it was tapped as.
        assert np.abs(q_run.astype(int) - q).max() <= 1
        assert np.mean(q_run != q) < (0.01 if dtype == FP32 else 0.1)
        np.testing.assert_allclose(scale_run, scale, rtol=1e-5 if dtype == FP32 else 1e-3)
        x = (q_run * scale_run).astype(numpy)
    elif solution.left is not None:
        assert solution.right is not None
        x = (x.astype(np.float64) @ np.kron(solution.left, solution.right)).astype(numpy)
    n, k = solution.codes.shape
    weight = (solution.codes.reshape(n, solution.scales.shape[1], -1) * solution.scales[:, :, None].astype(np.float64)).reshape(n, k)
    outputs, start = [], 0
    for linear in group.linears:
        y = x.astype(np.float64) @ weight[start : start + linear.out_features].T
        outputs.append(y if linear.read_bias is None else y + linear.read_bias())
        start += linear.out_features
    return outputs


def assert_each_linear_is_its_math(
    model: ir.Model, groups: tuple[LinearGroup, ...], solutions: dict[str, GroupSolution], scheme: str, arrays: dict[str, Any], dtype: int
) -> None:
    taps = [name for g in groups for name in (g.input.name, *(linear.output.name for linear in g.linears)) if name]
    if SCHEMES[scheme].quantizes_activations:
        taps += [f"{group.name}.flat_quantize.{output}" for group in groups for output in ("q", "scale")]
    tapped = arrays | run(model, arrays, tuple(tap for tap in taps if tap not in arrays))
    for group in groups:
        for linear, expected in zip(group.linears, expected_outputs(group, solutions[group.name], scheme, tapped, dtype), strict=True):
            got = tapped[linear.output.name or ""]
            assert got.dtype == NUMPY[dtype]
            assert got.shape == expected.shape
            assert relative(got, expected) < TOLERANCE[dtype], linear.name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_every_linear_computes_the_quantized_math(name: str, scheme: str) -> None:
    proto = MODELS[name]()
    # Taken before the rewrite, whose names must be the float model's.
    model, groups, solutions = quantized(proto, scheme)
    assert_each_linear_is_its_math(model, groups, solutions, scheme, feed(proto), FP32)


@pytest.mark.parametrize(
    "solving", [{"group_size": 32}, {"transform": False}, {"scaled": False}, {"transform": False, "scaled": False}], ids=str
)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
def test_group_scales_partial_transforms_and_fp16(dtype: int, scheme: str, solving: dict[str, Any]) -> None:
    proto = gate_up(dtype)
    model, groups, solutions = quantized(proto, scheme, **solving)
    assert_each_linear_is_its_math(model, groups, solutions, scheme, feed(proto), dtype)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
def test_every_group_in_its_own_scheme(dtype: int) -> None:
    """Each group of a chain in another scheme, on its way to the ops: each computes its own math."""
    proto, chosen = chain(dtype), ("w4a4", "w8a16", "w4a8")
    model, groups = found(proto)
    schemes = {group.name: scheme for group, scheme in zip(groups, chosen, strict=True)}
    solutions = {name: solve(groups, SCHEMES[scheme])[name] for name, scheme in schemes.items()}
    mixed = Recipe(schemes=tuple(schemes.items()), transform="none", weights="rtn")
    assert Quantize(groups, solutions.__getitem__, mixed)(model).modified
    check(model)
    arrays = feed(proto)
    taps = [name for g in groups for name in (g.input.name, *(linear.output.name for linear in g.linears)) if name]
    quantizing = [group.name for group in groups if SCHEMES[schemes[group.name]].quantizes_activations]
    taps += [f"{name}.flat_quantize.{output}" for name in quantizing for output in ("q", "scale")]
    tapped = arrays | run(model, arrays, tuple(tap for tap in taps if tap not in arrays))
    for group in groups:
        expected = expected_outputs(group, solutions[group.name], schemes[group.name], tapped, dtype)
        for linear, wanted in zip(group.linears, expected, strict=True):
            assert relative(tapped[linear.output.name or ""], wanted) < TOLERANCE[dtype], linear.name
    weights = {name: value.dtype for name, value in model.graph.initializers.items() if ".weight_int" in name}
    assert {name.partition(".weight_int")[2] for name in weights} == {"4", "8"}


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("scheme", ["w4a4", "w4a16"])
def test_inputs_of_any_rank(scheme: str, rank: int) -> None:
    proto = mlp(rank=rank)
    model, groups, solutions = quantized(proto, scheme)
    assert_each_linear_is_its_math(model, groups, solutions, scheme, feed(proto), FP32)


@pytest.mark.parametrize("shape", [(5, 64), (2, 1, 3, 64), (0, 4, 64)], ids=str)
def test_an_input_of_unknown_rank_is_flattened_and_restored(shape: tuple[int, ...]) -> None:
    b = Builder()
    lead = b.input("lead", ["rank"], TensorProto.INT64)
    y = b.linear(b.node("Reshape", [b.input("x", [None]), lead], "reshape", allowzero=1), 64, 32, "fc")
    b.output(b.node("Flatten", [y], "flatten", axis=-1), [None, 32])
    model, groups, solutions = quantized(b.model(), "w4a16")
    assert groups[0].input.shape is None
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert_each_linear_is_its_math(model, groups, solutions, "w4a16", {"x": x.reshape(-1), "lead": np.array(shape)}, FP32)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_rows(scheme: str) -> None:
    model, _, _ = quantized(mlp(), scheme)
    (y,) = run(model, {"x": np.zeros((0, 3, 48), np.float32)}).values()
    assert y.shape == (0, 3, 40)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bf16(scheme: str) -> None:
    """ONNX Runtime has no bf16 MatMul on the CPU: the ONNX reference evaluator runs this one."""
    proto = qkv(BF16)
    model, groups, solutions = quantized(proto, scheme)
    arrays = feed(proto)
    rewritten = ir.to_proto(model)
    taps = [linear.output.name for linear in groups[0].linears] + [groups[0].input.name]
    if SCHEMES[scheme].quantizes_activations:
        taps += [f"{groups[0].name}.flat_quantize.{output}" for output in ("q", "scale")]
    rewritten.graph.output.extend(onnx.ValueInfoProto(name=tap) for tap in taps)
    names = [value.name for value in rewritten.graph.output]
    tapped = dict(zip(names, ReferenceEvaluator(rewritten).run(None, arrays), strict=True))
    for linear, expected in zip(
        groups[0].linears, expected_outputs(groups[0], solutions[groups[0].name], scheme, tapped, BF16), strict=True
    ):
        assert tapped[linear.output.name or ""].dtype == ml_dtypes.bfloat16
        assert relative(tapped[linear.output.name or ""], expected) < TOLERANCE[BF16]


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
@pytest.mark.parametrize("name", MODELS)
def test_with_8_bits_the_model_is_close_to_the_float_one(name: str, scheme: str) -> None:
    proto = MODELS[name]()
    model, _, _ = quantized(proto, scheme)
    arrays = feed(proto)
    reference, got = run(proto, arrays), run(model, arrays)
    assert list(got) == list(reference)
    assert max(relative(got[key], reference[key]) for key in reference) < 0.02


def test_the_channel_scale_folds_into_the_norm_that_only_the_group_reads() -> None:
    proto = qkv()
    model, groups, solutions = quantized(proto, "w8a8")
    arrays, group = feed(proto), groups[0]
    tap = (group.input.name or "",)
    assert group.norm is not None
    folded, before = run(model, arrays, tap)[tap[0]], run(proto, arrays, tap)[tap[0]]
    np.testing.assert_allclose(folded, before / solutions[group.name].channel_scale, rtol=1e-5, atol=1e-6)
    assert [node.name for node in model.graph if "channel_scale" in (node.name or "")] == ["layer.o.channel_scale"]


def test_a_norm_with_other_readers_and_a_shared_gamma_are_left_alone() -> None:
    proto = shared_norm()
    model, groups, _ = quantized(proto, "w8a8")
    gammas = {node.name: node.inputs[1] for node in model.graph if node.op_type == "LayerNormalization"}
    assert groups[0].norm is None
    assert gammas["norm"] is not None and gammas["norm"].name == "norm.gamma"  # noqa: PT018
    assert gammas["norm2"] is not None and gammas["norm2"].name == "norm.gamma.scaled"  # noqa: PT018
    arrays = feed(proto)
    np.testing.assert_array_equal(run(model, arrays, ("norm_out",))["norm_out"], run(proto, arrays, ("norm_out",))["norm_out"])


@pytest.mark.parametrize("name", MODELS)
def test_signature_names_and_tags(name: str) -> None:
    proto = MODELS[name](FP16)
    model, groups, _ = quantized(proto, "w4a8")
    rewritten = ir.to_proto(model)
    assert rewritten.graph.input == proto.graph.input
    assert [(o.name, o.type.tensor_type.elem_type) for o in rewritten.graph.output] == [
        (o.name, o.type.tensor_type.elem_type) for o in proto.graph.output
    ]
    linears = {linear.name for group in groups for linear in group.linears}
    assert {node.metadata_props[LINEAR_TAG] for node in model.graph if LINEAR_TAG in node.metadata_props} == linears
    assert {node.metadata_props[GROUP_TAG] for node in model.graph if GROUP_TAG in node.metadata_props} == {g.name for g in groups}
    assert {node.name for node in model.graph if node.op_type == "MatMul"} == linears
    names = set(model.graph.initializers)
    assert {f"{linear}.{what}" for linear in linears for what in ("weight_int4", "weight_scale")} <= names
    floats = {
        v.name for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT16 and v.shape is not None and len(v.shape) == 2
    }
    assert floats == ({"first.weight"} if name == "tied" else set()), "a float weight is left that nothing else reads"
    assert all(value.uses() for value in model.graph.initializers.values())
    assert all(value.dtype is not None and value.shape is not None for node in model.graph for value in node.outputs)


def test_taken_names_are_not_used_again() -> None:
    b = Builder()
    x = b.input("fc.dequantize.out", ["batch", 64])
    shifted = b.node("Add", [x, b.random("fc.weight_int4", 64)], "fc.dequantize")
    b.output(b.linear(shifted, 64, 32, "fc"), ["batch", 32])
    proto = b.model()
    model, _, _ = quantized(proto, "w8a16")
    arrays = feed(proto)
    assert relative(run(model, arrays)["fc_out"], run(proto, arrays)["fc_out"]) < 0.02


def test_weights_are_read_when_written_and_one_group_at_a_time() -> None:
    model, groups = found(qkv())
    solutions = solve(groups, SCHEMES["w4a4"])
    loaded: Counter[str] = Counter()

    def load(name: str) -> GroupSolution:
        loaded[name] += 1
        return replace(solutions[name])  # a fresh object, as from disk

    Quantize(groups, load, recipe("w4a4"))(model)
    assert loaded == Counter(g.name for g in groups)
    lazy = {name: v.const_value for name, v in model.graph.initializers.items() if name.endswith((".weight_int4", ".weight_scale"))}
    assert len(lazy) == 8
    for tensor in lazy.values():
        assert isinstance(tensor, ir.LazyTensor)
        assert not tensor.cache
    codes = np.concatenate([lazy[f"layer.{part}.weight_int4"].numpy().astype(np.int8) for part in "qkv"])  # type: ignore[union-attr]
    np.testing.assert_array_equal(codes, solutions["layer.q+k+v"].codes)
    assert loaded == {"layer.q+k+v": 2, "layer.o": 1}, "one group is kept, so that its tensors load it once"


@pytest.mark.parametrize("opset", [21, 23, 24])
@pytest.mark.parametrize("group_size", [0, 32, 64])
@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
def test_onnx_runtime_fuses_weight_only_linears(scheme: str, group_size: int, opset: int, tmp_path: Path) -> None:
    b = Builder(FP16, opset)
    b.output(b.linear(b.input("x", ["batch", 64]), 64, 48, "fc"), ["batch", 48])
    model, _, _ = quantized(b.model(), scheme, group_size=group_size, transform=False)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # "saved with optimizations for this machine", which is why it is saved here
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert ops["MatMulNBits"] == 1
    assert not ops.keys() & {"MatMul", "DequantizeLinear", "Transpose"}


def test_scales_that_fp16_cannot_hold_stay_fp32() -> None:
    model, groups = found(mlp(FP16))
    solutions = solve(groups, SCHEMES["w8a16"])
    tiny = {name: replace(s, scales=s.scales * (1e-6 if name == "up" else 1)) for name, s in solutions.items()}
    Quantize(groups, tiny.__getitem__, recipe("w8a16"))(model)
    check(model)
    assert model.graph.initializers["up.weight_scale"].dtype == ir.DataType.FLOAT
    assert model.graph.initializers["down.weight_scale"].dtype == ir.DataType.FLOAT16


def test_a_solution_of_another_shape_is_refused() -> None:
    model, groups = found(mlp())
    solutions = solve(groups, SCHEMES["w4a4"])
    swapped = {"up": solutions["down"], "down": solutions["up"]}
    with pytest.raises(CalibrationError, match=r"group 'up'.*\[40, 64\] where the model has \[64, 48\].*--resume"):
        Quantize(groups, swapped.__getitem__, recipe("w4a4"))(model)


@pytest.mark.parametrize("make", [mlp, qkv], ids=["online", "folded"])
def test_a_channel_scale_beyond_fp16_is_refused(make: Callable[..., onnx.ModelProto]) -> None:
    model, groups = found(make(FP16))
    solutions = solve(groups, SCHEMES["w4a4"])
    tiny = {name: replace(s, channel_scale=np.full_like(s.channel_scale, 1e-6)) for name, s in solutions.items()}
    with pytest.raises(CalibrationError, match=r"leaves the range of FLOAT16.*--keep"):
        Quantize(groups, tiny.__getitem__, recipe("w4a4"))(model)


def test_groups_of_another_model_are_refused_and_none_are_nothing_to_do() -> None:
    model, groups = found(mlp())
    solutions = solve(groups, SCHEMES["w4a4"])
    other, _ = found(mlp())
    with pytest.raises(ir.passes.PreconditionError, match="not of this model"):
        Quantize(groups, solutions.__getitem__, recipe("w4a4"))(other)
    untyped, untyped_groups = found(mlp())
    untyped_groups[0].input.type = None
    with pytest.raises(ir.passes.PreconditionError, match="element type of 'x' is not known"):
        Quantize(untyped_groups, solutions.__getitem__, recipe("w4a4"))(untyped)
    before = graph_text(other)
    assert not Quantize((), solutions.__getitem__, recipe("w4a4"))(other).modified
    assert graph_text(other) == before
    rewrite = Quantize(groups, solutions.__getitem__, recipe("w4a4"))
    rewrite(model)
    with pytest.raises(ir.passes.PreconditionError, match="rewritten already"):
        rewrite(model)


@pytest.mark.parametrize(
    ("name", "scheme", "solving"), [("qkv", "w4a4", {}), ("gate_up", "w4a16", {"group_size": 32}), ("mlp", "w8a8", {"transform": False})]
)
def test_golden(name: str, scheme: str, solving: dict[str, Any], golden: Callable[[str, ir.Model | str], None]) -> None:
    model, _, _ = quantized(MODELS[name](FP16), scheme, **solving)
    golden(f"quantize_{name}_{scheme}", graph_text(model).partition("\nfunction ")[0])
