"""Graphs in torch against ONNX Runtime: every operator of the table, whole models of the zoo and of the exporters, parts of graphs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fqonnx.calib.torch_graph import Sizes, TorchGraph
from fqonnx.calib.torch_ops import OPERATORS
from fqonnx.errors import ModelError
from fqonnx.passes.linears import find
from fqonnx.passes.prepare import prepare
from tests import zoo
from tests.runtime import run

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Array = npt.NDArray[Any]

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


X, Y, POSITIVE, BOOLS = normal(2, 3, 8), normal(2, 3, 8), np.abs(normal(2, 3, 8)) + 0.1, RANDOM.random((2, 3, 8)) < 0.5
NUMBERS = RANDOM.integers(-9, 9, (2, 3, 8))
TABLE = normal(6, 8)
HEADS = normal(1, 2, 5, 8)
COS, SIN = normal(9, 4), normal(9, 4)

CASES: list[tuple[str, list[Array | None], dict[str, Any]]] = [
    *((op, [X], {}) for op in ("Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "Identity", "LeakyRelu", "Neg", "Relu")),
    *((op, [X], {}) for op in ("Sigmoid", "Sign", "Sin", "Softmax", "Softplus", "Tanh", "Transpose", "Flatten", "Shape", "IsNaN", "IsInf")),
    *((op, [POSITIVE], {}) for op in ("Log", "Reciprocal", "Sqrt")),
    *((op, [X, Y], {}) for op in ("Add", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mul", "Sub")),
    *((op, [X, Y, POSITIVE], {}) for op in ("Max", "Min", "Sum")),
    *((op, [BOOLS, ~BOOLS], {}) for op in ("And", "Or", "Xor")),
    ("Not", [BOOLS], {}),
    ("Div", [NUMBERS, np.abs(NUMBERS) + 1], {}),
    ("Mod", [NUMBERS, np.abs(NUMBERS) + 1], {}),
    ("Mod", [X, POSITIVE], {"fmod": 1}),
    ("Pow", [POSITIVE, np.float32(2)], {}),
    ("Cast", [X], {"to": TensorProto.INT64}),
    ("Cast", [NUMBERS], {"to": TensorProto.FLOAT}),
    ("CastLike", [NUMBERS, X], {}),
    ("Clip", [X, np.float32(-0.5), np.float32(0.5)], {}),
    ("Clip", [X, None, np.float32(0.5)], {}),
    ("Dropout", [X], {}),
    ("Gelu", [X], {"approximate": "tanh"}),
    ("Softmax", [X], {"axis": 1}),
    ("Where", [BOOLS, X, Y], {}),
    ("Transpose", [X], {"perm": [1, 2, 0]}),
    ("Shape", [X], {"start": 1, "end": -1}),
    ("Reshape", [X, ints(0, -1)], {}),
    ("Reshape", [np.zeros((0, 3), np.float32), ints(3, 0)], {"allowzero": 1}),
    ("Squeeze", [normal(1, 3, 1), ints(0)], {}),
    ("Squeeze", [normal(1, 3, 1)], {}),
    ("Unsqueeze", [X, ints(-1, 0)], {}),
    ("Expand", [normal(3, 1), ints(2, 1, 8)], {}),
    ("Concat", [X, Y], {"axis": -1}),
    ("Split", [X, ints(3, 5)], {"axis": 2, "_outputs": 2}),
    ("Split", [X], {"axis": -1, "num_outputs": 3, "_outputs": 3}),
    ("Slice", [X, ints(1), ints(10**9)], {}),
    ("Slice", [X, ints(0, -3), ints(1, -1), ints(0, 2)], {}),
    ("Slice", [X, ints(-1), ints(-(10**9)), ints(2), ints(-2)], {}),
    ("Slice", [X, ints(7), ints(0), ints(2), ints(-1)], {}),
    ("Gather", [TABLE, ints(0, -1, 3)], {}),
    ("Gather", [X, np.array(-1)], {"axis": 1}),
    ("Gather", [X[0, 0], np.array(-1)], {}),
    ("GatherElements", [X, RANDOM.integers(-3, 3, (2, 2, 8))], {"axis": 1}),
    ("GatherND", [X, np.array([[0, 2], [1, -1]])], {}),
    ("Range", [np.array(1), np.array(9), np.array(3)], {}),
    ("ConstantOfShape", [ints(2, 3)], {}),
    ("ConstantOfShape", [ints(2)], {"value": numpy_helper.from_array(np.array([7], np.int64))}),
    ("Trilu", [X], {}),
    ("Trilu", [X, np.array(-1)], {"upper": 0}),
    ("CumSum", [NUMBERS, np.array(1)], {}),
    ("Pad", [X, ints(0, 1, 0, 0, 0, 2), np.float32(3)], {}),
    ("Pad", [X, ints(1, 2), None, ints(-1)], {}),
    ("Tile", [X, ints(1, 2, 1)], {}),
    *((f"Reduce{op}", [X, ints(-1)], {}) for op in ("Mean", "Sum", "Max", "Min", "SumSquare", "L1", "L2")),
    ("ReduceMean", [X, ints(0, 2)], {"keepdims": 0}),
    ("ReduceSum", [X], {}),
    ("ReduceSum", [X], {"noop_with_empty_axes": 1}),
    ("MatMul", [X, normal(8, 5)], {}),
    ("Gemm", [normal(3, 8), normal(5, 8), normal(5)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [normal(8, 3), normal(8, 5)], {"transA": 1}),
    ("Einsum", [X, normal(8, 5)], {"equation": "bsh, ho -> bso"}),
    ("Conv", [normal(1, 3, 8, 8), normal(4, 3, 3, 3), normal(4)], {"strides": [2, 2], "pads": [1, 0, 1, 2]}),
    ("Conv", [normal(2, 4, 9), normal(4, 2, 3)], {"group": 2, "dilations": [2]}),
    ("DequantizeLinear", [np.arange(-8, 8, dtype=np.int8).reshape(2, 8), np.float32([0.5, 2]), np.int8([1, -1])], {"axis": 0}),
    ("DequantizeLinear", [np.arange(-8, 8, dtype=np.int8).reshape(2, 8), normal(2, 2)], {"axis": 1, "block_size": 4}),
    ("DequantizeLinear", [np.arange(8, dtype=np.uint8), np.float32(0.5), np.uint8(3)], {}),
    ("LayerNormalization", [X, normal(8), normal(8)], {}),
    ("LayerNormalization", [X, normal(3, 8)], {"axis": 1, "epsilon": 1e-3}),
    ("RMSNormalization", [X, normal(8)], {"epsilon": 1e-3}),
    ("Attention", [normal(1, 4, 5, 8), HEADS, normal(1, 2, 5, 8)], {"is_causal": 1}),
    ("Attention", [HEADS, HEADS, HEADS, np.tril(np.ones((5, 5), bool))], {"scale": 0.5, "softcap": 2.0}),
    ("Attention", [normal(2, 5, 32), normal(2, 5, 16), normal(2, 5, 16), normal(5, 5)], {"q_num_heads": 4, "kv_num_heads": 2}),
    ("Attention", [normal(1, 2, 3, 8), normal(1, 2, 3, 8), normal(1, 2, 3, 8), None, HEADS, HEADS], {"_outputs": 3}),
    ("RotaryEmbedding", [normal(2, 2, 5, 8), COS, SIN, RANDOM.integers(0, 9, (2, 5))], {}),
    ("RotaryEmbedding", [normal(2, 5, 16), COS, SIN, RANDOM.integers(0, 9, (2, 5))], {"num_heads": 2, "interleaved": 1}),
    ("Swish", [X], {"alpha": 0.7}),
    ("com.microsoft.BiasGelu", [X, normal(8)], {}),
    ("com.microsoft.FastGelu", [X, normal(8)], {}),
    ("com.microsoft.FusedMatMul", [normal(2, 8, 3), normal(2, 5, 8)], {"transA": 1, "transB": 1, "alpha": 0.25}),
    ("com.microsoft.Gelu", [X], {}),
    ("com.microsoft.QuickGelu", [X], {"alpha": 1.5}),
    ("com.microsoft.DequantizeLinear", [np.arange(8, dtype=np.uint8), np.float32(0.5), np.uint8(3)], {}),
    ("SimplifiedLayerNormalization", [X, normal(8)], {"axis": -1}),
    ("com.microsoft.SkipLayerNormalization", [X, Y, normal(8), normal(8), normal(8)], {"_outputs": 4}),
    ("com.microsoft.SkipSimplifiedLayerNormalization", [X, Y, normal(8)], {"_outputs": 4}),
]


def one_node(op: str, operands: Sequence[Array | None], attributes: dict[str, Any]) -> onnx.ModelProto:
    attributes = dict(attributes)
    count = attributes.pop("_outputs", 1)
    domain, _, name = op.rpartition(".")
    names = ["" if array is None else f"i{index}" for index, array in enumerate(operands)]
    outputs = [f"o{index}" if count < 4 or index in (0, 3) else "" for index in range(count)]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, operands, strict=True)
        if array is not None
    ]
    node = helper.make_node(name, names, outputs, name="node", domain=domain, **attributes)
    graph = helper.make_graph([node], "g", inputs, [onnx.ValueInfoProto(name=output) for output in outputs if output])
    newer = name in ("Attention", "RMSNormalization", "RotaryEmbedding", "Swish")
    opsets = [helper.make_opsetid("", 24 if newer else 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def in_torch(model: ir.Model, feeds: dict[str, Array]) -> dict[str, Array]:
    graph = TorchGraph(model.graph.outputs, [])
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
    outputs = graph(tensors)
    again = graph(tensors)  # with what depends on shapes alone from the cache
    assert all(torch.equal(outputs[name], again[name]) or bool(outputs[name].isnan().any()) for name in outputs)
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def close(actual: Array, expected: Array, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    if expected.dtype.kind == "f":
        np.testing.assert_allclose(
            actual, expected.astype(np.float32), rtol=tolerance, atol=tolerance * float(np.abs(expected).max(initial=1e-3))
        )
    else:
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("op", "operands", "attributes"), CASES, ids=[f"{op}-{index}" for index, (op, *_) in enumerate(CASES)])
def test_an_operator_gives_what_onnx_runtime_gives(op: str, operands: list[Array | None], attributes: dict[str, Any]) -> None:
    operands = [None if array is None else np.asarray(array) for array in operands]
    proto = one_node(op, operands, attributes)
    feeds = {f"i{index}": array for index, array in enumerate(operands) if array is not None}
    expected = run(proto, feeds)
    actual = in_torch(ir.from_proto(proto), feeds)
    for name, array in expected.items():
        close(actual[name], array)


def test_every_operator_has_a_case() -> None:
    tested = {tuple(op.rpartition(".")[::2]) for op, *_ in CASES}
    # ONNX Runtime has this one in two domains.
    tested.add(("com.microsoft", "SimplifiedLayerNormalization"))
    assert set(OPERATORS) == tested


REFUSED = {"linear_in_if_body", "linear_in_loop_body", "gain_behind_an_operator_of_the_runtime"}


@pytest.mark.parametrize("name", [name for name, case in zoo.ZOO.items() if case.runs and name not in REFUSED])
def test_models_of_the_zoo_give_what_onnx_runtime_gives(name: str) -> None:
    proto = zoo.proto(name)
    feeds = zoo.feeds(proto)
    expected = run(proto, feeds)
    actual = in_torch(prepare(ir.from_proto(proto)), feeds)
    halves = zoo.ZOO[name].dtype == zoo.FLOAT16
    for output, array in expected.items():
        close(actual[output], array, 3e-3 if halves or array.dtype == np.float16 else 1e-5)


@pytest.mark.parametrize("name", ["linear_in_if_body", "linear_in_loop_body"])
def test_what_is_not_run_is_said_in_one_line(name: str) -> None:
    with pytest.raises(ModelError, match=r"node '.*': operator (If|Loop) is not run in torch: use --reconstruct group"):
        TorchGraph(prepare(zoo.model(name)).graph.outputs, [])


@pytest.mark.parametrize(
    ("op", "operands", "attributes", "said"),
    [
        ("CumSum", [X, np.array(1)], {"reverse": 1}, "CumSum in reverse or exclusive"),
        ("Pad", [X, ints(0, 0, 1, 0, 0, 0)], {"mode": "reflect"}, "Pad other than by a constant"),
        ("GatherND", [X, np.array([[0], [1]])], {"batch_dims": 1}, "GatherND with batch_dims"),
        ("Cast", [X], {"to": TensorProto.STRING}, "Cast"),
        ("Conv", [normal(1, 1, 5), normal(1, 1, 3)], {"auto_pad": "SAME_UPPER"}, "Conv with auto_pad"),
        ("com.microsoft.FusedMatMul", [normal(2, 2, 2), normal(2, 2, 2)], {"transBatchA": 1}, "FusedMatMul with transposed batches"),
    ],
)
def test_forms_that_are_not_run_are_said(op: str, operands: list[Array | None], attributes: dict[str, Any], said: str) -> None:
    model = ir.from_proto(one_node(op, operands, attributes))
    with pytest.raises(ModelError, match=f"{said}.* use --reconstruct group"):
        in_torch(model, {f"i{index}": np.asarray(array) for index, array in enumerate(operands) if array is not None})


def test_groups_are_asked_for_their_outputs_and_gradients_pass() -> None:
    model = prepare(zoo.model("one_gain_two_norms"))
    groups = find(model).groups
    graph = TorchGraph(model.graph.outputs, [], groups)
    assert set(graph.groups) == set(groups)
    feeds = {name: torch.from_numpy(array).requires_grad_() for name, array in zoo.feeds(zoo.proto("one_gain_two_norms")).items()}
    asked = []

    def linears(group: Any, x: torch.Tensor) -> list[torch.Tensor]:
        asked.append(group.name)
        return [x @ torch.from_numpy(np.array(linear.read_weight())).mT * 2 for linear in group.linears]

    doubled = graph(feeds, linears)
    plain = TorchGraph(model.graph.outputs, [])(feeds)
    assert sorted(asked) == sorted(group.name for group in groups)
    assert any(not torch.allclose(doubled[name], plain[name]) for name in plain)
    next(iter(doubled.values())).square().sum().backward()
    assert any(x.grad is not None and bool(x.grad.abs().sum() > 0) for x in feeds.values())


def test_sizes_outlive_the_part_that_made_them() -> None:
    """A part may read the Shape of a value that only the part before it has."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="a"),
        helper.make_node("Shape", ["a"], ["size"], name="size"),
        helper.make_node("Neg", ["a"], ["b"], name="b"),
        helper.make_node("Reshape", ["b", "flat"], ["c"], name="c"),
        helper.make_node("Reshape", ["c", "size"], ["y"], name="y"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "columns"])]
    graph = helper.make_graph(nodes, "g", inputs, [onnx.ValueInfoProto(name="y")], [numpy_helper.from_array(ints(-1), "flat")])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    values = {value.name: value for node in model.graph for value in node.outputs}
    sizes: Sizes = {}
    feeds = [{"x": torch.from_numpy(normal(*shape))} for shape in ((2, 3), (4, 5))]
    first = TorchGraph([values["b"], values["size"]], [], sizes=sizes)
    between = [first(feed)["b"] for feed in feeds]
    second = TorchGraph([values["y"]], [values["b"]], sizes=sizes)
    for feed, b in zip(feeds, between, strict=True):
        assert torch.equal(second({"b": b}, key=feed)["y"], -feed["x"].relu())
    assert [value.name for value in second.inputs] == ["b"]


def test_constants_of_16_bits_are_read_as_fp32() -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16):
        weight = np.array([1.5, -2.25], dtype)
        graph = helper.make_graph(
            [
                helper.make_node("Cast", ["w"], ["wide"], name="c", to=TensorProto.FLOAT),
                helper.make_node("Mul", ["x", "wide"], ["y"], name="m"),
            ],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
            [onnx.ValueInfoProto(name="y")],
            [helper.make_tensor("w", helper.np_dtype_to_tensor_dtype(weight.dtype), [2], weight.tobytes(), raw=True)],
        )
        model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
        assert in_torch(model, {"x": np.float32([2, 2])})["y"].tolist() == [3.0, -4.5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    for name in ("rms_norm_reciprocal", "attention_op_of_opset_23", "layer_norm_then_flattened", "tied_head"):
        model = prepare(zoo.model(name))
        feeds = {key: torch.from_numpy(array) for key, array in zoo.feeds(zoo.proto(name)).items()}
        cpu, gpu = (TorchGraph(model.graph.outputs, [], device=device)(feeds) for device in ("cpu", "cuda"))
        for output, tensor in cpu.items():
            close(gpu[output].cpu().numpy(), tensor.numpy(), 1e-4)


def test_infinite_masks_stay_infinite() -> None:
    mask = np.where(np.tril(np.ones((5, 5), bool)), 0, -math.inf).astype(np.float32)
    proto = one_node("Add", [normal(5, 5), mask], {})
    feeds = {"i0": normal(5, 5), "i1": mask}
    assert np.array_equal(in_torch(ir.from_proto(proto), feeds)["o0"], run(proto, feeds)["o0"])
