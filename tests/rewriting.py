"""Small float models in the forms that rewriting meets, and a solver for them: rotations, channel scales and rounding to nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fqonnx.calib.solution import GroupSolution
from fqonnx.passes import linears
from fqonnx.passes.fuse import Fuse, target_named
from fqonnx.passes.pipeline import check
from fqonnx.passes.prepare import prepare
from fqonnx.passes.quantize import Quantize
from fqonnx.recipe import SCHEMES, Recipe
from tests.graph_text import graph_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fqonnx.passes.groups import LinearGroup
    from fqonnx.recipe import Scheme

Arrays = dict[str, npt.NDArray[Any]]

NUMPY = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16}


class Builder:
    """Writes a model as an exporter does: nodes, initializers, inputs, outputs."""

    def __init__(self, dtype: int = TensorProto.FLOAT, opset: int = 21, seed: int = 0) -> None:
        self.dtype, self.opset = dtype, opset
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: list[int | str | None] | None, dtype: int | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, self.dtype if dtype is None else dtype, shape))
        return name

    def output(self, name: str, shape: list[int | str | None] | None) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, self.dtype, shape))

    def constant(self, name: str, values: npt.NDArray[Any]) -> str:
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def random(self, name: str, *shape: int, scale: float = 1.0) -> str:
        return self.constant(name, (self.rng.standard_normal(shape) * scale).astype(NUMPY[self.dtype]))

    def node(self, op_type: str, inputs: list[str], name: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}_out"], name=name, domain=domain, **attributes))
        return f"{name}_out"

    def linear(self, x: str, k: int, n: int, name: str, bias: str | None = None) -> str:
        """``MatMul`` with a ``[K, N]`` weight; the bias ``Add`` has it on the ``left`` or ``right``."""
        y = self.node("MatMul", [x, self.random(f"{name}.weight", k, n, scale=k**-0.5)], name)
        if bias is None:
            return y
        b = self.random(f"{name}.b", n, scale=0.1)
        return self.node("Add", [b, y] if bias == "left" else [y, b], f"{name}_add")

    def layer_norm(self, x: str, k: int, name: str) -> str:
        gamma = self.constant(f"{name}.gamma", (1 + 0.5 * self.rng.standard_normal(k)).astype(NUMPY[self.dtype]))
        return self.node("LayerNormalization", [x, gamma, self.random(f"{name}.beta", k)], name, axis=-1, epsilon=1e-5)

    def rms_norm(self, x: str, k: int, name: str) -> str:
        eps = self.constant(f"{name}.eps", np.array(1e-5, NUMPY[self.dtype]))
        axes = self.constant(f"{name}.axes", np.array([-1], np.int64))
        square = self.node("Mul", [x, x], f"{name}_square")
        mean = self.node("ReduceMean", [square, axes], f"{name}_mean", keepdims=1)
        root = self.node("Sqrt", [self.node("Add", [mean, eps], f"{name}_eps")], f"{name}_sqrt")
        unit = self.node("Div", [x, root], f"{name}_unit")
        gamma = self.constant(f"{name}.gamma", (1 + 0.5 * self.rng.standard_normal(k)).astype(NUMPY[self.dtype]))
        return self.node("Mul", [unit, gamma], f"{name}_gamma")

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "main", self.inputs, self.outputs, self.initializers)
        opsets = [
            helper.make_opsetid(domain, 1 if domain else self.opset) for domain in sorted({"", *(node.domain for node in self.nodes)})
        ]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


def mlp(dtype: int = TensorProto.FLOAT, rank: int = 3, opset: int = 21) -> onnx.ModelProto:
    """Two linears in a row, the first one's input a graph input, the last one's output a graph output; a bias on either side."""
    b = Builder(dtype, opset)
    lead: list[int | str | None] = ["batch", "tokens", 2, 1][: rank - 1]  # type: ignore[list-item]
    x = b.input("x", [*lead, 48])
    hidden = b.node("Relu", [b.linear(x, 48, 64, "up", bias="left")], "relu")
    b.node("Identity", [x], "unrelated")
    y = b.linear(hidden, 64, 40, "down", bias="right")
    b.output(y, [*lead, 40])
    return b.model()


def qkv(dtype: int = TensorProto.FLOAT, opset: int = 21) -> onnx.ModelProto:
    """A LayerNorm read by three linears alone, of different widths, one without bias, and a fourth linear behind them."""
    b = Builder(dtype, opset)
    x = b.input("x", ["batch", "tokens", 64])
    normed = b.layer_norm(x, 64, "norm")
    q = b.linear(normed, 64, 64, "layer.q", bias="left")
    k = b.linear(normed, 64, 32, "layer.k")
    gate = b.node("Sigmoid", [k], "gate")
    v = b.linear(normed, 64, 32, "layer.v", bias="right")
    mixed = b.node("Concat", [b.node("Mul", [gate, v], "mul"), q], "concat", axis=-1)
    y = b.node("Add", [x, b.linear(mixed, 96, 64, "layer.o", bias="right")], "residual")
    b.output(y, ["batch", "tokens", 64])
    return b.model()


def gate_up(dtype: int = TensorProto.FLOAT, opset: int = 21) -> onnx.ModelProto:
    """A decomposed RMSNorm, two linears on it, a third on their product, residual."""
    b = Builder(dtype, opset)
    x = b.input("x", ["batch", "tokens", 128])
    normed = b.rms_norm(x, 128, "norm")
    gate = b.linear(normed, 128, 96, "mlp.gate")
    up = b.linear(normed, 128, 96, "mlp.up")
    act = b.node("Mul", [gate, b.node("Sigmoid", [gate], "sigmoid")], "silu")
    y = b.node("Add", [b.linear(b.node("Mul", [act, up], "mul"), 96, 128, "mlp.down"), x], "residual")
    b.output(y, ["batch", "tokens", 128])
    return b.model()


def shared_norm(dtype: int = TensorProto.FLOAT, opset: int = 21) -> onnx.ModelProto:
    """A norm that the residual reads too (post-norm), so that no channel scale folds into it; its gamma serves a second norm."""
    b = Builder(dtype, opset)
    x = b.input("x", ["batch", "tokens", 64])
    normed = b.layer_norm(x, 64, "norm")
    z = b.node("Add", [normed, b.linear(normed, 64, 64, "fc1", bias="right")], "residual")
    second = b.node("LayerNormalization", [z, "norm.gamma", "norm.beta"], "norm2", axis=-1, epsilon=1e-5)
    b.output(b.linear(second, 64, 64, "fc2"), ["batch", "tokens", 64])
    return b.model()


def outputs(dtype: int = TensorProto.FLOAT, opset: int = 21) -> onnx.ModelProto:
    """Linears of one input far apart; products that are graph outputs themselves and read on; a Gemm with a transposed weight."""
    b = Builder(dtype, opset)
    x = b.input("x", ["batch", 64])
    first = b.linear(x, 64, 32, "first")
    b.output(first, ["batch", 32])
    bias = b.random("gemm.b", 48, scale=0.1)
    h = b.node("Gemm", [b.node("Relu", [x], "relu"), b.random("gemm.weight", 48, 64, scale=0.1), bias], "gemm", transB=1)
    last = b.node("Add", [b.linear(x, 64, 48, "last", bias="right"), h], "sum")
    b.output(last, ["batch", 48])
    b.output(b.node("Neg", [first], "neg"), ["batch", 32])
    return b.model()


def chain(dtype: int = TensorProto.FLOAT, opset: int = 21) -> onnx.ModelProto:
    """Linears that read other linears' outputs directly, two of them the same one's."""
    b = Builder(dtype, opset)
    down = b.linear(b.input("x", ["batch", 64]), 64, 32, "low_rank.down")
    first = b.linear(b.linear(down, 32, 64, "low_rank.up", bias="left"), 64, 32, "after", bias="right")
    b.output(b.node("Add", [first, b.linear(down, 32, 32, "beside")], "sum"), ["batch", 32])
    return b.model()


def tied(dtype: int = TensorProto.FLOAT, opset: int = 21) -> onnx.ModelProto:
    """One weight behind two linears of different inputs, and one that an elementwise node reads too."""
    b = Builder(dtype, opset)
    x = b.input("x", [None, 64])
    y = b.node("Tanh", [b.linear(x, 64, 64, "first", bias="right")], "tanh")
    z = b.node("MatMul", [y, "first.weight"], "second")
    row = b.node("Gather", [b.node("Abs", ["first.weight"], "abs"), b.constant("index", np.array(3, np.int64))], "row", axis=0)
    b.output(b.node("Add", [z, row], "sum"), [None, 64])
    return b.model()


MODELS: dict[str, Callable[..., onnx.ModelProto]] = {
    "mlp": mlp,
    "qkv": qkv,
    "gate_up": gate_up,
    "shared_norm": shared_norm,
    "outputs": outputs,
    "chain": chain,
    "tied": tied,
}


def found(proto: onnx.ModelProto) -> tuple[ir.Model, tuple[LinearGroup, ...]]:
    """The prepared model and its groups."""
    model = prepare(ir.from_proto(proto))
    return model, linears.find(model).groups


def solve(
    groups: tuple[LinearGroup, ...], scheme: Scheme, *, group_size: int = 0, transform: bool = True, scaled: bool = True, seed: int = 0
) -> dict[str, GroupSolution]:
    """Random channel scales and Kronecker pairs with condition numbers up to 2.25, weights rounded to nearest."""
    rng = np.random.default_rng(seed)
    solutions = {}
    for group in groups:
        n, k = group.out_features, group.in_features
        n1 = next(d for d in range(int(k**0.5), 0, -1) if k % d == 0)
        channel_scale = np.exp2(rng.uniform(-1, 1, k)).astype(np.float32) if scaled else None
        left, right = (matrix(rng, n1), matrix(rng, k // n1)) if transform else (None, None)
        weight = group.read_weights() * (1 if channel_scale is None else channel_scale)
        if left is not None and right is not None:
            weight = (weight @ np.linalg.inv(np.kron(left, right).astype(np.float64)).T).astype(np.float32)
        blocks = weight.reshape(n, -1, group_size or k)
        qmax = 2 ** (scheme.weight_bits - 1) - 1
        scales = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(qmax)
        codes = np.clip(np.rint(blocks / scales), -qmax - 1, qmax).astype(np.int8).reshape(n, k)
        solutions[group.name] = GroupSolution(
            group.name, channel_scale, left, right, 0.9 if scheme.activation_bits == 4 else 1.0, codes, scales[:, :, 0]
        )
    return solutions


def matrix(rng: np.random.Generator, n: int) -> npt.NDArray[np.float32]:
    """A well-conditioned random matrix: two rotations with singular values from 1 to 1.5 between them."""
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    return (u * rng.uniform(1, 1.5, n) @ v).astype(np.float32)


def feed(proto: onnx.ModelProto, seed: int = 1) -> Arrays:
    """Inputs with outlier channels; free dimensions get 2, 3, ..."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for value in proto.graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value or 2 + i for i, d in enumerate(tensor.shape.dim)]
        x = rng.standard_normal(shape) * np.where(rng.random(shape[-1]) < 0.05, 8, 1)
        arrays[value.name] = x.astype(NUMPY[tensor.elem_type])
    return arrays


def run(model: ir.Model | onnx.ModelProto, arrays: Mapping[str, npt.NDArray[Any]], taps: tuple[str, ...] = ()) -> Arrays:
    """The outputs under ONNX Runtime, unoptimised, and the values named ``taps``."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else onnx.ModelProto.FromString(model.SerializeToString())
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=tap) for tap in taps if tap not in known)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    bf16 = [value.name for value in session.get_outputs() if value.type == "tensor(bfloat16)"]
    if bf16:  # which ONNX Runtime does not hand to numpy: as fp32, without loss
        plain = [value for value in proto.graph.output if value.name not in bf16]
        del proto.graph.output[:]
        proto.graph.output.extend([*plain, *(onnx.ValueInfoProto(name=f"{name}/fp32") for name in bf16)])
        proto.graph.node.extend(helper.make_node("Cast", [name], [f"{name}/fp32"], to=TensorProto.FLOAT) for name in bf16)
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fed = {name: _ort_value(array) for name, array in arrays.items()}
    names = [value.name for value in session.get_outputs()]
    ran = dict(zip(names, session.run_with_ort_values(names, fed), strict=True))
    return {
        name.removesuffix("/fp32"): value.numpy().astype(ml_dtypes.bfloat16) if name.endswith("/fp32") else value.numpy()
        for name, value in ran.items()
    }


def unfused(
    proto: onnx.ModelProto, *, scheme: str = "w4a4", target: str | None = None, keep: tuple[str, ...] = (), **solving: Any
) -> tuple[ir.Model, tuple[LinearGroup, ...], dict[str, GroupSolution]]:
    """The model as the passes before the fusing ones leave it, its groups and their solutions."""
    model = prepare(ir.from_proto(proto))
    groups = linears.find(model, keep=keep).groups
    solutions = solve(groups, SCHEMES[scheme], **solving)
    Quantize(groups, solutions.__getitem__, Recipe(scheme=scheme, transform="none", weights="rtn"))(model)
    RemoveUnusedNodesPass()(model)
    Fuse(target_named(target))(model)
    RemoveUnusedNodesPass()(model)
    check(model)
    return model, groups, solutions


def fused_by(fuse: ir.passes.PassBase, op: str, model: ir.Model) -> list[ir.Node]:
    """Run a pass that makes nodes whose type ends in ``op``; the model is valid before and after what became unused is gone."""
    result = fuse(model)
    check(model)
    RemoveUnusedNodesPass()(model)
    check(model)
    nodes = [node for graph in model.graphs() for node in graph if node.op_type.endswith(op)]
    assert result.modified == bool(nodes)
    return nodes


def left_alone_by(fuse: ir.passes.PassBase, model: ir.Model) -> bool:
    """Whether a pass changes nothing, as it says."""
    before = graph_text(model)
    assert not fuse(model).modified
    return graph_text(model) == before


def _ort_value(array: npt.NDArray[Any]) -> ort.OrtValue:
    if array.dtype == ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)
