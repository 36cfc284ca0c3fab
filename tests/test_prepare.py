"""Prepare changes a model's form and never its results; each pass says truthfully whether it changed anything."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from fqonnx.errors import ModelError
from fqonnx.passes.opset import ADAPTERS, TARGET_OPSET, RaiseOpset
from fqonnx.passes.prepare import PREPARE, InlineFunctions, NameNodes, ReadSmallConstants, prepare
from fqonnx.passes.shapes import InferShapes
from tests import zoo
from tests.graph_text import graph_text
from tests.runtime import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

X4 = {"x": (zoo.FLOAT, ("batch", 8, 6, 6))}
X3 = {"x": (zoo.FLOAT, ("batch", "seq", 12))}


def _same_outputs(before: onnx.ModelProto, after: ir.Model, *, exact: bool = True) -> None:
    feeds = zoo.feeds(before)
    expected, actual = run(before, feeds), run(after, feeds)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        if exact:
            np.testing.assert_array_equal(actual[name], value)
        else:
            np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-6)


# --- Opsets -------------------------------------------------------------------------------------------------------------------------


def _reductions(g: zoo.Graph, opset: int) -> onnx.ModelProto:
    h = g.op("Exp", "x")
    for op_type in (
        "ReduceMean",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceSumSquare",
    ):
        h = g.op("Add", h, g.op(op_type, h, axes=[-1]))
    all_axes = g.op("ReduceMean", h, keepdims=0)
    two_axes = g.op("ReduceMax", h, axes=[0, 2], keepdims=0)
    return g.model([g.op("Sub", h, all_axes), two_axes], X3, opset=opset, ir_version=7)


def _split(g: zoo.Graph, opset: int) -> onnx.ModelProto:
    g.op("Split", "x", outputs=["a", "b", "c"], axis=-1)
    g.op("Split", "x", g.constant(np.array([5, 7], np.int64)), outputs=["d", "e"], axis=-1)
    return g.model(["a", "b", "c", "d", "e"], X3, opset=opset, ir_version=7)


def _axes_and_softmax(g: zoo.Graph, opset: int) -> onnx.ModelProto:
    axes = g.constant(np.array([1], np.int64))
    h = g.op("Squeeze", g.op("Unsqueeze", "x", axes), axes)
    h = g.op("Softmax", g.op("ReduceSum", h, g.constant(np.array([-1], np.int64))), axis=1)
    h = g.op("Pad", h, g.constant(np.array([0, 0, 0, 0, 0, 1], np.int64)))
    h = g.op("Clip", g.op("CumSum", h, g.constant(np.array(1, np.int64))), g.constant(np.array(0.1, np.float32)))
    h = g.op("Reshape", h, g.constant(np.array([0, -1], np.int64)))
    shape = g.op("Shape", h)
    return g.model([h, g.op("Cast", g.op("Where", g.op("Equal", shape, shape), shape, shape), to=zoo.FLOAT)], X3, opset=opset, ir_version=7)


def _roi_align(g: zoo.Graph, opset: int) -> onnx.ModelProto:
    rois, which = g.constant(np.array([[0.4, 0.6, 4.3, 5.1]], np.float32)), g.constant(np.array([0], np.int64))
    return g.model([g.op("RoiAlign", "x", rois, which, output_height=3, output_width=3, sampling_ratio=2)], X4, opset=opset, ir_version=7)


def _batch_norm_resize_pool(g: zoo.Graph, opset: int) -> onnx.ModelProto:
    stats = [g.constant(np.abs(g.random.normal(size=8)).astype(np.float32) + 0.5) for _ in range(4)]
    h = g.op("BatchNormalization", "x", *stats)
    h = g.op("Resize", h, "", g.constant(np.array([1, 1, 2, 2], np.float32)), mode="linear")
    return g.model([g.op("GlobalAveragePool", g.op("MaxPool", h, kernel_shape=[2, 2]))], X4, opset=opset, ir_version=7)


def _grid_sample(g: zoo.Graph, opset: int) -> onnx.ModelProto:
    grid = g.constant(g.random.uniform(-1, 1, (2, 4, 4, 2)).astype(np.float32))
    outputs = [g.op("GridSample", "x", grid, mode=mode) for mode in ("bilinear", "bicubic", "nearest")]
    return g.model([*outputs, g.op("GridSample", "x", grid)], {"x": (zoo.FLOAT, (2, 8, 6, 6))}, opset=opset, ir_version=8)


def _dft(g: zoo.Graph, opset: int) -> onnx.ModelProto:
    signal = {"x": (zoo.FLOAT, (2, 8, 4, 1))}
    return g.model([g.op("DFT", "x"), g.op("DFT", "x", axis=2, onesided=0)], signal, opset=opset, ir_version=8)


def _group_norm(g: zoo.Graph, opset: int) -> onnx.ModelProto:
    outputs = [g.op("GroupNormalization", "x", g.weight(groups, mean=1.0), g.weight(groups), num_groups=groups) for groups in (2, 4, 8)]
    return g.model(outputs, X4, opset=opset, ir_version=8)


@pytest.mark.parametrize(
    ("build", "opset"),
    [(build, opset) for build in (_reductions, _split, _axes_and_softmax, _batch_norm_resize_pool) for opset in (13, 14, 15, 16, 17)]
    + [(_roi_align, opset) for opset in (13, 14, 15)]
    + [(_axes_and_softmax, opset) for opset in (18, 19, 20)]
    + [(_grid_sample, opset) for opset in (16, 17, 18, 19)]
    + [(_dft, opset) for opset in (17, 18, 19)]
    + [(_group_norm, opset) for opset in (18, 19, 20)],
)
def test_raised_opset_gives_the_same_results(build: Callable[[zoo.Graph, int], onnx.ModelProto], opset: int) -> None:
    before = build(zoo.Graph(build.__name__), opset)
    after = ir.from_proto(before)
    assert RaiseOpset()(after).modified
    after = prepare(after)
    assert after.opset_imports[""] == TARGET_OPSET
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    _same_outputs(before, after, exact=build is not _group_norm)


@pytest.mark.parametrize("opset", [21, 22, 23, 24])
def test_newer_opsets_are_kept(opset: int) -> None:
    g = zoo.Graph("newer")
    after = prepare(ir.from_proto(g.model([g.op("MatMul", "x", g.weight(zoo.K, zoo.N))], opset=opset, ir_version=9)))
    assert after.opset_imports == {"": opset}
    assert after.ir_version == 10  # the first that knows INT4


def test_raise_opset_reaches_bodies_and_functions() -> None:
    def branch(output: str, node: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph([node], output, [], [helper.make_tensor_value_info(output, zoo.FLOAT, None)])

    body = branch("m", helper.make_node("ReduceMean", ["x"], ["m"], axes=[1]))
    other = branch("f", helper.make_node("Layer", ["x"], ["f"], domain="custom"))
    g = zoo.Graph("bodies")
    reduce = helper.make_node("ReduceMax", ["a"], ["b"], axes=[1])
    g.functions.append(helper.make_function("custom", "Layer", ["a"], ["b"], [reduce], [helper.make_opsetid("", 17)]))
    g.domains.add("custom")
    y = g.op("If", "flag", then_branch=body, else_branch=other)
    proto = g.model([y], {"x": (zoo.FLOAT, (2, 6)), "flag": (zoo.BOOL, ())}, opset=15, ir_version=8)
    model = prepare(ir.from_proto(proto))
    assert not model.functions
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    for flag, expected in ((True, x.mean(1, keepdims=True)), (False, x.max(1, keepdims=True))):
        np.testing.assert_allclose(run(model, {"x": x, "flag": np.array(flag)})[y], expected)


def test_operators_without_adapter_kept_their_schema() -> None:
    """What ``opset.py`` claims: every standard operator without an adapter reads the same at the target as at any opset since 13."""
    for op_type in {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}:
        if not _schema(op_type, TARGET_OPSET):
            continue
        new = onnx.defs.get_schema(op_type, TARGET_OPSET, "")
        for opset in range(13, TARGET_OPSET):
            old = _schema(op_type, opset)
            if old is None or old.since_version == new.since_version:
                continue
            if any(old.since_version < above <= new.since_version for above, _ in ADAPTERS.get(op_type, ())):
                continue
            where = f"{op_type} {old.since_version} -> {new.since_version}"
            for name, attribute in old.attributes.items():
                assert name in new.attributes, f"{where}: attribute {name} is gone"
                assert new.attributes[name].type == attribute.type, f"{where}: type of {name}"
                assert new.attributes[name].default_value == attribute.default_value, f"{where}: default of {name}"
            added = [a for name, a in new.attributes.items() if name not in old.attributes]
            assert not any(a.required for a in added), f"{where}: a new attribute is required"
            assert new.min_input <= old.min_input, f"{where}: a new input is required"
            assert new.min_output <= old.min_output
            assert [i.name for i in new.inputs][: len(old.inputs)] == [i.name for i in old.inputs] or op_type in _RENAMED, (
                f"{where}: inputs"
            )
            for old_input, new_input in zip(old.inputs, new.inputs, strict=False):
                assert set(old_input.types) <= set(new_input.types), f"{where}: {old_input.name} takes fewer types"


_RENAMED = {"BatchNormalization", "ScatterND", "If"}
"""Operators whose inputs were only renamed (``mean`` to ``input_mean``)."""


def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    return None if schema.deprecated else schema


def test_batch_norm_in_training_mode_is_refused() -> None:
    g = zoo.Graph("training")
    stats = [g.weight(8) for _ in range(4)]
    g.op("BatchNormalization", "x", *stats, outputs=["y", "mean", "var", "saved_mean", "saved_var"], name="bn")
    proto = g.model(["y", "mean"], X4, opset=13, ir_version=7)
    with pytest.raises(ModelError, match=r"^BatchNormalization \('bn'\) is in training mode: export the model in eval mode$"):
        prepare(ir.from_proto(proto))


def test_operators_that_are_gone_are_refused() -> None:
    g = zoo.Graph("gone")
    scales = g.constant(np.array([1, 1, 2, 2], np.float32))
    model = ir.from_proto(g.model([g.op("Upsample", "x", scales, name="up")], X4, opset=13, ir_version=7))
    with pytest.raises(ModelError, match=r"^Upsample \('up'\) of opset 13 has no form in opset 21: export the model with opset 21$"):
        prepare(model)


def test_group_norm_of_unknown_channels_is_refused() -> None:
    g = zoo.Graph("channels")
    y = g.op("GroupNormalization", "x", g.weight(2), g.weight(2), num_groups=2, name="gn")
    proto = g.model([y], {"x": (zoo.FLOAT, ("b", "c", 6, 6))}, opset=18, ir_version=8)
    with pytest.raises(ModelError, match="unknown number of channels: export the model with opset 21"):
        prepare(ir.from_proto(proto))


def test_reduce_axes_from_a_function_parameter_are_refused() -> None:
    g = zoo.Graph("ref")
    mean = helper.make_node("ReduceMean", ["a"], ["b"], name="mean")
    mean.attribute.append(onnx.AttributeProto(name="axes", type=onnx.AttributeProto.INTS, ref_attr_name="axes"))
    g.functions.append(helper.make_function("custom", "Mean", ["a"], ["b"], [mean], [helper.make_opsetid("", 17)], ["axes"]))
    model = ir.from_proto(g.model([g.op("Mean", "x", domain="custom", axes=[1])], X3, opset=17, ir_version=8))
    with pytest.raises(ModelError, match=r"ReduceMean \('mean'\) takes 'axes' from its function"):
        prepare(model)


# --- The whole of prepare ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in zoo.ZOO.items() if case.runs])
def test_prepare_keeps_the_results(name: str) -> None:
    before = zoo.proto(name)
    after = prepare(zoo.model(name))
    if name != "simplified_layer_norm":  # ONNX Runtime writes it into the standard domain, where the checker does not know it
        onnx.checker.check_model(ir.to_proto(after), full_check="com.microsoft" not in after.opset_imports)
    _same_outputs(before, after)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_prepare_leaves_one_form(name: str) -> None:
    model = prepare(zoo.model(name))
    nodes = list(model.graph.all_nodes())
    assert not model.functions
    assert model.opset_imports[""] >= TARGET_OPSET
    assert model.ir_version >= 10
    assert not any(node.op_type == "Constant" for node in nodes)
    assert all(node.name for node in nodes)
    assert len({node.name for node in nodes}) == len(nodes)
    for node in nodes:
        if node.op_type in ("MatMul", "Gemm") and node.graph is model.graph:
            x = node.inputs[0]
            assert x is not None
            assert x.dtype is not None
            assert x.shape is not None
            assert isinstance(x.shape[-1], (int, ir.SymbolicDim))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_second_prepare_changes_nothing(name: str) -> None:
    model = prepare(zoo.model(name))
    text = graph_text(model)
    for step in PREPARE:
        assert not step(model).modified, type(step).__name__
    assert graph_text(model) == text


@pytest.mark.parametrize("name", zoo.ZOO)
def test_each_pass_is_truthful(name: str) -> None:
    """A pass that says it changed nothing left the serialized model alone; one that says it did has another text."""
    model = zoo.model(name)
    for step in PREPARE:
        before = ir.to_proto(model).SerializeToString(deterministic=True)
        modified = step(model).modified
        after = ir.to_proto(model).SerializeToString(deterministic=True)
        assert modified or before == after, type(step).__name__
        assert not modified or before != after, type(step).__name__


@pytest.mark.parametrize(
    "name", ["local_functions", "layer_norm_decomposed", "linear_in_if_body", "matmul_weight_in_constant_node", "tied_head"]
)
def test_golden(name: str, golden: Callable[[str, ir.Model], None]) -> None:
    golden(f"prepare_{name}", prepare(zoo.model(name)))


# --- Single passes ------------------------------------------------------------------------------------------------------------------


def test_recursive_functions_are_refused() -> None:
    g = zoo.Graph("recursive")
    opset = [helper.make_opsetid("", 21), helper.make_opsetid("custom", 1)]
    g.functions.append(helper.make_function("custom", "F", ["a"], ["b"], [helper.make_node("F", ["a"], ["b"], domain="custom")], opset))
    model = ir.from_proto(g.model([g.op("F", "x", domain="custom")]))
    with pytest.raises(ModelError, match="cannot be inlined"):
        InlineFunctions()(model)


def test_unused_functions_are_dropped() -> None:
    g = zoo.Graph("unused")
    g.functions.append(
        helper.make_function("custom", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 21)])
    )
    model = ir.from_proto(g.model([g.op("Relu", "x")]))
    assert InlineFunctions()(model).modified
    assert not model.functions


def test_names_are_filled_and_made_unique_without_taking_others() -> None:
    g = zoo.Graph("names")
    a = g.op("Relu", "x", outputs=["a"], name="same")
    b = g.op("Relu", a, outputs=["b"], name="same")
    c = g.op("Relu", b, outputs=["c"])
    d = g.op("Relu", c, outputs=["d"], name="same_2")
    e = g.op("Relu", d, outputs=["e"], name="Relu_c")
    model = ir.from_proto(g.model([e]))
    assert NameNodes()(model).modified
    assert [node.name for node in model.graph] == ["same", "same_3", "Relu_c_2", "same_2", "Relu_c"]
    assert not NameNodes()(model).modified


def test_small_external_constants_are_read_for_shape_inference(tmp_path: Path) -> None:
    g = zoo.Graph("small_external")
    shape = g.constant(np.array([-1, zoo.K], np.int64), "shape")
    proto = g.model(
        [g.op("MatMul", g.op("Reshape", "x", shape, outputs=["flat"]), g.weight(zoo.K, zoo.N, name="w"))],
        {"x": (zoo.FLOAT, ("b", "s", "k"))},
    )
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="m.data")
    model = ir.load(tmp_path / "m.onnx")
    assert isinstance(model.graph.initializers["shape"].const_value, ir.ExternalTensor)
    assert ReadSmallConstants()(model).modified
    assert not ReadSmallConstants()(model).modified
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    model = prepare(model)
    assert re.search(rf"^flat: float\[[^,]+, {zoo.K}\]", graph_text(model), re.MULTILINE)


def test_shapes_go_past_runtime_operators() -> None:
    g = zoo.Graph("contrib")
    outputs = ["normal", "", "", "carried"]
    g.op("SkipSimplifiedLayerNormalization", "x", "x", g.weight(zoo.K), outputs=outputs, domain="com.microsoft")
    h = g.op("Cast", g.op("Add", g.op("FastGelu", "normal", domain="com.microsoft"), "carried"), to=zoo.FLOAT16, outputs=["half"])
    y = g.op("MatMul", h, g.weight(zoo.K, zoo.N, dtype=zoo.FLOAT16), outputs=["y"])
    model = ir.from_proto(g.model([g.op("Cast", y, to=zoo.FLOAT)]))
    assert InferShapes()(model).modified
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name in ("normal", "carried", "half"):
        assert [d if isinstance(d, int) else d.value for d in values[name].shape or ()] == ["batch", "seq", zoo.K]
    assert values["half"].dtype == ir.DataType.FLOAT16
    assert [d if isinstance(d, int) else d.value for d in values["y"].shape or ()] == ["batch", "seq", zoo.N]


def test_one_round_gets_through_many_fused_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ONNX Runtime's optimizer leaves a BERT: an inference round per layer would take minutes."""
    g = zoo.Graph("fused_layers")
    h = "x"
    for _ in range(20):
        q, k, v = (g.op("Add", g.op("MatMul", h, g.weight(zoo.K, zoo.K)), g.weight(zoo.K)) for _ in range(3))
        context = g.op("MultiHeadAttention", q, k, v, domain="com.microsoft", num_heads=4)
        out = g.op("MatMul", context, g.weight(zoo.K, zoo.K))
        h = g.op("SkipLayerNormalization", out, h, g.weight(zoo.K), g.weight(zoo.K), domain="com.microsoft")
    model = ir.from_proto(g.model([g.op("Relu", h)]))
    rounds = 0
    infer = onnx.shape_inference.infer_shapes

    def counted(*args: Any, **kwargs: Any) -> onnx.ModelProto:
        nonlocal rounds
        rounds += 1
        return infer(*args, **kwargs)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", counted)
    assert InferShapes()(model).modified
    assert rounds <= 3
    assert graph_text(model).splitlines()[-1].endswith(f"float[batch, seq, {zoo.K}]")


def test_width_comes_from_the_weight_where_the_graph_hides_it() -> None:
    g = zoo.Graph("hidden")
    y = g.op("MatMul", g.op("Attention", "x", g.weight(zoo.K, 3 * zoo.K), domain="com.microsoft", num_heads=4), g.weight(zoo.K, zoo.N))
    model = prepare(ir.from_proto(g.model([y])))
    attention = model.graph.node(0).outputs[0]
    assert attention.dtype == ir.DataType.FLOAT
    assert attention.shape is not None
    assert attention.shape[-1] == zoo.K


def _values(model: ir.Model) -> dict[str, npt.NDArray[Any]]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value is not None}


def test_constant_nodes_of_every_kind_become_initializers() -> None:
    g = zoo.Graph("constants")
    shape = g.op("Constant", value_ints=[0, 0, -1])
    scale = g.op("Constant", value_float=2.0)
    one = g.op("Constant", value=helper.make_tensor("t", TensorProto.FLOAT, [], [1.0]))
    proto = g.model([g.op("Reshape", g.op("Add", g.op("Mul", "x", scale), one), shape)])
    model = prepare(ir.from_proto(proto))
    assert {k: v.tolist() for k, v in _values(model).items()} == {shape: [0, 0, -1], scale: 2.0, one: 1.0}
    _same_outputs(proto, model)
