"""Small models that write linears and norms in every way real exporters do, and what must be found in each."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

K, N = 64, 96
ROWS = ("batch", "seq")
FLOAT, FLOAT16, BFLOAT16, INT64, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT64, TensorProto.BOOL
NUMPY = {FLOAT: np.dtype(np.float32), FLOAT16: np.dtype(np.float16), BFLOAT16: np.dtype(ml_dtypes.bfloat16)}
Shape = Sequence[int | str]


class Graph:
    """Collects nodes and constants; ``op`` returns the name of the first output."""

    def __init__(self, name: str, dtype: int = FLOAT) -> None:
        self.name = name
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.domains: set[str] = set()
        self.random = np.random.default_rng(zlib.crc32(name.encode()))
        self._count = 0

    def op(self, op_type: str, *inputs: str, outputs: int | Sequence[str] = 1, name: str = "", domain: str = "", **attributes: Any) -> str:
        if isinstance(outputs, int):
            self._count += 1
            outputs = [f"{op_type.lower()}_{self._count}" + (f"_{i}" if i else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), list(outputs), name=name, domain=domain, **attributes))
        if domain:
            self.domains.add(domain)
        return outputs[0]

    def weight(self, *shape: int, name: str = "", dtype: int | None = None, scale: float = 0.3, mean: float = 0.0) -> str:
        array = self.random.normal(mean, scale, shape)
        return self.constant(array.astype(NUMPY[dtype or self.dtype]), name)

    def constant(self, array: npt.ArrayLike, name: str = "") -> str:
        self._count += 1
        name = name or f"onnx::{self._count}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def model(
        self, outputs: Sequence[str], inputs: dict[str, tuple[int, Shape]] | None = None, *, opset: int = 21, ir_version: int = 10
    ) -> onnx.ModelProto:
        inputs = inputs or {"x": (self.dtype, (*ROWS, K))}
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [helper.make_tensor_value_info(n, t, list(s)) for n, (t, s) in inputs.items()],
            [helper.make_tensor_value_info(n, self.dtype, None) for n in outputs],
            self.initializers,
        )
        imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in sorted(self.domains))]
        return helper.make_model(graph, opset_imports=imports, functions=self.functions, ir_version=ir_version)


@dataclass(frozen=True)
class Case:
    """A model and what ``find`` must say of it.

    Attributes:
        build: Makes the model.
        groups: Linears per group, in graph order.
        left: For each product left in float, in graph order, a part of its reason.
        norms: For each group, whether a channel scale folds into a norm (None: do not ask).
        options: Keyword arguments of ``find``.
        runs: Whether ONNX Runtime's CPU provider can run it (it lacks bf16 products).
    """

    build: Callable[[Graph], onnx.ModelProto]
    groups: tuple[int, ...] = ()
    left: tuple[str, ...] = ()
    norms: tuple[bool, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    runs: bool = True
    dtype: int = FLOAT


ZOO: dict[str, Case] = {}


def case(*groups: int, **more: Any) -> Callable[[Callable[[Graph], onnx.ModelProto]], Callable[[Graph], onnx.ModelProto]]:
    """Register the builder in ``ZOO`` under its name."""

    def register(build: Callable[[Graph], onnx.ModelProto]) -> Callable[[Graph], onnx.ModelProto]:
        ZOO[build.__name__] = Case(build, groups, **more)
        return build

    return register


def proto(name: str) -> onnx.ModelProto:
    """The model of a case; the same bytes each time."""
    entry = ZOO[name]
    return entry.build(Graph(name, entry.dtype))


def model(name: str) -> ir.Model:
    """The same as onnx-ir."""
    return ir.from_proto(proto(name))


def feeds(model_proto: onnx.ModelProto, seed: int = 0, *, batch: int = 2, seq: int = 5) -> dict[str, npt.NDArray[Any]]:
    """Random inputs: normal floats, ids below 16, true booleans; symbolic axes get the given sizes."""
    random = np.random.default_rng(seed)
    sizes = {"batch": batch, "seq": seq}
    known = {t.name for t in model_proto.graph.initializer}
    fed = {}
    for value in model_proto.graph.input:
        if value.name in known:
            continue
        tensor = value.type.tensor_type
        shape = [sizes.get(d.dim_param, 3) if d.dim_param else d.dim_value for d in tensor.shape.dim]
        if tensor.elem_type in NUMPY:
            fed[value.name] = random.normal(size=shape).astype(NUMPY[tensor.elem_type])
        elif tensor.elem_type == BOOL:
            fed[value.name] = np.ones(shape, bool)
        else:
            fed[value.name] = random.integers(0, 16, shape).astype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return fed


# --- Linears ------------------------------------------------------------------------------------------------------------------------


@case(1)
def matmul(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("MatMul", "x", g.weight(K, N), name="/up/MatMul")])


@case(1)
def matmul_2d_input(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("MatMul", "x", g.weight(K, N))], {"x": (FLOAT, ("seq", K))})


@case(1)
def matmul_transposed_weight(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("MatMul", "x", g.op("Transpose", g.weight(N, K, name="up.weight"), perm=[1, 0]))])


@case(1)
def matmul_twice_transposed_cast_identity(g: Graph) -> onnx.ModelProto:
    w = g.op("Cast", g.weight(K, N, dtype=FLOAT16), to=FLOAT)
    w = g.op("Transpose", g.op("Identity", g.op("Transpose", w, perm=[1, 0])))  # no perm: reversed axes
    return g.model([g.op("MatMul", "x", w)])


@case(1)
def matmul_weight_by_integer_arithmetic(g: Graph) -> onnx.ModelProto:
    """Weight-only storage without DequantizeLinear: (cast(q) - zero) * scale, halves concatenated."""
    halves = [g.op("Cast", g.constant(g.random.integers(0, 16, (K, N // 2)).astype(np.uint8)), to=FLOAT) for _ in range(2)]
    centered = g.op("Sub", g.op("Concat", *halves, axis=1), g.constant(np.array(8.0, np.float32)))
    scale = g.op("Unsqueeze", g.constant(g.random.uniform(10, 20, N).astype(np.float32)), g.constant(np.array([0], np.int64)))
    w = g.op("Mul", g.op("Div", centered, scale), g.op("Squeeze", g.weight(1, K, 1), g.constant(np.array([0], np.int64))))
    return g.model([g.op("MatMul", "x", w)])


@case(1)
def matmul_weight_in_constant_node(g: Graph) -> onnx.ModelProto:
    w = numpy_helper.from_array(g.random.normal(size=(K, N)).astype(np.float32))
    return g.model([g.op("MatMul", "x", g.op("Constant", value=w))])


@case(1)
def matmul_weight_behind_reshape(g: Graph) -> onnx.ModelProto:
    w = g.op("Reshape", g.weight(1, K, N), g.constant(np.array([K, N], np.int64)))
    return g.model([g.op("MatMul", "x", w)])


@case(1)
def bias_first(g: Graph) -> onnx.ModelProto:
    """Optimum's layout."""
    product = g.op("MatMul", "x", g.weight(K, N, name="onnx::MatMul_123"), name="/layer/query/MatMul")
    return g.model([g.op("Add", g.weight(N, name="layer.query.bias"), product, name="/layer/query/Add")])


@case(1)
def bias_last_with_leading_ones(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Add", g.op("MatMul", "x", g.weight(K, N)), g.weight(1, 1, N))])


@case(1)
def bias_scalar_behind_cast(g: Graph) -> onnx.ModelProto:
    bias = g.op("Cast", g.constant(np.array(0.25, np.float16)), to=FLOAT)
    return g.model([g.op("Add", g.op("MatMul", "x", g.weight(K, N)), bias)])


@case(1)
def bias_of_higher_rank_stays_outside(g: Graph) -> onnx.ModelProto:
    product = g.op("MatMul", "x", g.weight(K, N))
    return g.model([g.op("Add", product, g.weight(1, 1, 1, N))])


@case(1)
def bias_add_with_product_also_read_stays_outside(g: Graph) -> onnx.ModelProto:
    product = g.op("MatMul", "x", g.weight(K, N))
    return g.model([g.op("Mul", g.op("Add", product, g.weight(N)), g.op("Sigmoid", product))])


@case(1)
def bias_add_with_product_as_output_stays_outside(g: Graph) -> onnx.ModelProto:
    product = g.op("MatMul", "x", g.weight(K, N))
    return g.model([g.op("Add", product, g.weight(N)), product])


@case(1)
def residual_add_is_no_bias(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Add", g.op("MatMul", "x", g.weight(K, K)), "x")])


@case(1)
def gemm(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Gemm", "x", g.weight(K, N))], {"x": (FLOAT, ("seq", K))})


@case(1)
def gemm_transposed_scaled(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Gemm", "x", g.weight(N, K), g.weight(N), transB=1, alpha=0.5, beta=2.0)], {"x": (FLOAT, ("seq", K))})


@case(1)
def gemm_scalar_bias(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Gemm", "x", g.weight(N, K), g.constant(np.array([0.5], np.float32)), transB=1)], {"x": (FLOAT, ("seq", K))})


@case(1)
def gemm_row_bias_then_add(g: Graph) -> onnx.ModelProto:
    product = g.op("Gemm", "x", g.weight(N, K), g.weight(1, N), transB=1)
    return g.model([g.op("Add", product, g.weight(N))], {"x": (FLOAT, ("seq", K))})


@case(1)
def gemm_beta_zero(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Gemm", "x", g.weight(K, N), g.weight(N), beta=0.0)], {"x": (FLOAT, ("seq", K))})


@case(left=("transA=1",))
def gemm_transposed_input(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Gemm", "x", g.weight(K, N), transA=1)], {"x": (FLOAT, (K, "seq"))})


@case(left=("full matrix",))
def gemm_full_matrix(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Gemm", "x", g.weight(K, N), g.weight(5, N))], {"x": (FLOAT, (5, K))})


@case(left=("at run time",))
def gemm_adds_an_activation(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Gemm", "x", g.weight(K, N), "c")], {"x": (FLOAT, ("seq", K)), "c": (FLOAT, ("seq", N))})


@case(1)
def fused_matmul(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("FusedMatMul", "x", g.weight(N, K), domain="com.microsoft", transB=1, alpha=0.125)])


@case(left=("transposes its input",))
def fused_matmul_transposed_input(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("FusedMatMul", "x", g.weight(K, N), domain="com.microsoft", transA=1)], {"x": (FLOAT, (K, "seq"))})


@case(1)
def einsum(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Einsum", "x", g.weight(K, N), equation="bsh, ho -> bso")])


@case(1)
def einsum_weight_first_transposed(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Einsum", g.weight(N, K), "x", equation="oh,...h->...o")])


@case(left=("not a linear of two operands",))
def einsum_of_one_operand(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Einsum", "x", equation="bsh->bhs")])


@case(left=("not a plain linear",))
def einsum_to_heads(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Einsum", "x", g.weight(K, 4, 32), equation="bsh,hnd->bsnd")])


@case(left=("both operands are activations", "both operands are activations"))
def attention_products(g: Graph) -> onnx.ModelProto:
    scores = g.op("Softmax", g.op("MatMul", "x", g.op("Transpose", "x", perm=[0, 2, 1])), axis=-1)
    return g.model([g.op("Einsum", scores, "x", equation="bqk,bkd->bqd")])


@case(left=("left side",))
def weight_on_the_left(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("MatMul", g.weight(N, K), "x")], {"x": (FLOAT, ("batch", K, "seq"))})


@case(left=("experts",))
def batched_experts(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("MatMul", "x", g.weight(4, K, N))], {"x": (FLOAT, (4, "seq", K))})


@case(left=("a vector",))
def vector_weight(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("MatMul", "x", g.weight(K))])


@case(left=("its input is a vector",))
def vector_input(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("MatMul", "x", g.weight(K, N))], {"x": (FLOAT, (K,))})


@case(1, left=("too small (16 x 64",))
def too_small(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("MatMul", g.op("MatMul", "x", g.weight(K, 64)), g.weight(64, 16))])


@case(left=("computed at run time by Softmax",))
def weight_computed_from_constants(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("MatMul", "x", g.op("Softmax", g.weight(K, N)))])


@case(left=("both operands are constants",))
def constant_product(g: Graph) -> onnx.ModelProto:
    product = g.op("MatMul", g.weight(4, K), g.weight(K, N))
    return g.model([g.op("Concat", "x", product, axis=0)], {"x": (FLOAT, ("seq", N))})


@case(left=("a convolution",))
def convolution_1x1(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Conv", "x", g.weight(N, K, 1))], {"x": (FLOAT, ("batch", K, "seq"))})


@case(1, 1, left=("kept by --keep o_proj",), options={"keep": ("o_proj",)})
def kept(g: Graph) -> onnx.ModelProto:
    h = g.op("MatMul", "x", g.weight(K, K), name="/layers.0/v_proj/MatMul")
    h = g.op("MatMul", h, g.weight(K, K), name="/layers.0/o_proj/MatMul")
    return g.model([g.op("MatMul", h, g.weight(K, K), name="/layers.0/up/MatMul")])


@case(1, left=("--group-size 64 does not divide its 96",), options={"group_size": 64})
def group_size_does_not_divide(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("MatMul", g.op("MatMul", "x", g.weight(K, N)), g.weight(N, K))])


@case(left=("type is DOUBLE",))
def double_weights(g: Graph) -> onnx.ModelProto:
    x = g.op("Cast", "x", to=TensorProto.DOUBLE)
    return g.model([g.op("Cast", g.op("MatMul", x, g.constant(np.ones((K, N)))), to=FLOAT)])


@case(1, dtype=FLOAT16)
def fp16(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Add", g.weight(N), g.op("MatMul", "x", g.weight(K, N)))])


@case(1, dtype=BFLOAT16, runs=False)
def bf16(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("Add", g.weight(N), g.op("MatMul", "x", g.weight(K, N)))])


@case(1)
def dequantized_per_tensor_int8(g: Graph) -> onnx.ModelProto:
    q = g.constant(g.random.integers(-128, 128, (K, N)).astype(np.int8))
    w = g.op("DequantizeLinear", q, g.constant(np.array(0.01, np.float32)), g.constant(np.array(3, np.int8)))
    return g.model([g.op("MatMul", "x", w)])


@case(1)
def dequantized_per_channel_uint8_transposed(g: Graph) -> onnx.ModelProto:
    q = g.constant(g.random.integers(0, 256, (N, K)).astype(np.uint8))
    scale = g.constant(g.random.uniform(0.005, 0.02, N).astype(np.float32))
    zero = g.constant(g.random.integers(100, 150, N).astype(np.uint8))
    return g.model([g.op("MatMul", "x", g.op("Transpose", g.op("DequantizeLinear", q, scale, zero, axis=0), perm=[1, 0]))])


@case(1)
def dequantized_blocked_int4(g: Graph) -> onnx.ModelProto:
    q = g.constant(g.random.integers(-8, 8, (K, N)).astype(ml_dtypes.int4))
    scale = g.constant(g.random.uniform(0.05, 0.2, (K // 16, N)).astype(np.float32))
    return g.model([g.op("MatMul", "x", g.op("DequantizeLinear", q, scale, axis=0, block_size=16))])


@case(1, dtype=FLOAT16)
def dequantized_to_fp16(g: Graph) -> onnx.ModelProto:
    q = g.constant(g.random.integers(-128, 128, (K, N)).astype(np.int8))
    w = g.op("DequantizeLinear", q, g.constant(g.random.uniform(0.005, 0.02, N).astype(np.float16)), axis=1)
    return g.model([g.op("MatMul", "x", w)])


@case(1, 1)
def one_weight_two_linears(g: Graph) -> onnx.ModelProto:
    w = g.weight(K, K)
    return g.model([g.op("MatMul", g.op("Relu", g.op("MatMul", "x", w)), w)])


@case(2)
def one_weight_one_input_two_linears(g: Graph) -> onnx.ModelProto:
    w = g.weight(K, N, name="shared.weight")
    return g.model([g.op("Add", g.op("MatMul", "x", w), g.op("MatMul", "x", w))])


@case(2)
def input_shared_with_other_nodes(g: Graph) -> onnx.ModelProto:
    h = g.op("Relu", "x")
    gate, up = g.op("MatMul", h, g.weight(K, N)), g.op("MatMul", h, g.weight(K, N))
    return g.model([g.op("Mul", g.op("Sigmoid", gate), up), g.op("ReduceMean", h, keepdims=0)])


@case(1, left=("in the body of If",))
def linear_in_if_body(g: Graph) -> onnx.ModelProto:
    def branch(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}_y", FLOAT, None)])

    h, w = g.op("MatMul", "x", g.weight(K, K)), g.weight(K, K)
    then = branch("then", [helper.make_node("MatMul", [h, w], ["then_y"])])
    other = branch("else", [helper.make_node("Relu", [h], ["else_y"])])
    return g.model([g.op("If", "flag", then_branch=then, else_branch=other)], {"x": (FLOAT, (*ROWS, K)), "flag": (BOOL, ())})


@case(1, left=("in the body of Loop",))
def linear_in_loop_body(g: Graph) -> onnx.ModelProto:
    h, w = g.op("MatMul", "x", g.weight(K, K)), g.weight(K, K)
    state = [helper.make_tensor_value_info(name, dtype, []) for name, dtype in (("turn", INT64), ("go", BOOL), ("going", BOOL))]
    carried, made = (helper.make_tensor_value_info(name, FLOAT, [*ROWS, K]) for name in ("h", "made"))
    nodes = [helper.make_node("MatMul", ["h", w], ["made"]), helper.make_node("Identity", ["go"], ["going"])]
    body = helper.make_graph(nodes, "body", [*state[:2], carried], [state[2], made])
    looped = g.op("Loop", g.constant(np.array(2)), "", h, body=body)
    return g.model([g.op("Reshape", looped, g.constant(np.array([-1, K])))])  # inference does not see through a loop


@case(1, 1)
def local_functions(g: Graph) -> onnx.ModelProto:
    """A nested pair: the outer calls the inner, both called twice, the inner with an attribute of its caller."""
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("custom", 1)]
    scaled = helper.make_node("LeakyRelu", ["p"], ["y"])
    scaled.attribute.append(onnx.AttributeProto(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="slope"))
    inner = helper.make_function(
        "custom", "Scaled", ["a", "w"], ["y"], [helper.make_node("MatMul", ["a", "w"], ["p"]), scaled], opset, ["slope"]
    )
    outer = helper.make_function(
        "custom", "Layer", ["a", "w"], ["y"], [helper.make_node("Scaled", ["a", "w"], ["y"], domain="custom", slope=0.25)], opset
    )
    g.functions += [inner, outer]
    h = g.op("Layer", "x", g.weight(K, K), domain="custom", name="layer_0")
    return g.model([g.op("Layer", h, g.weight(K, K), domain="custom", name="layer_1")], opset=18)


@case(1, left=("vocabulary projection",))
def tied_head(g: Graph) -> onnx.ModelProto:
    table = g.weight(200, K, name="embed.weight")
    h = g.op("MatMul", g.op("Gather", table, "ids"), g.weight(K, K))
    return g.model([g.op("MatMul", h, g.op("Transpose", table, perm=[1, 0]), name="head")], {"ids": (INT64, ROWS)})


@case(1, 1, options={"quantize_head": True})
def tied_head_asked_for(g: Graph) -> onnx.ModelProto:
    return tied_head(g)


@case(2, left=("vocabulary projection",))
def untied_head_and_positions(g: Graph) -> onnx.ModelProto:
    """The position table has the shape of two square projections, which must not be taken for heads."""
    words, positions = g.weight(200, K), g.weight(K, K)
    h = g.op("Add", g.op("Gather", words, "ids"), g.op("Gather", positions, "ids"))
    h = g.op("Add", g.op("MatMul", h, g.weight(K, K)), g.op("MatMul", h, g.weight(K, K)))
    return g.model([g.op("MatMul", h, g.weight(K, 200))], {"ids": (INT64, ROWS)})


# --- Norms --------------------------------------------------------------------------------------------------------------------------


def _qk(g: Graph, h: str) -> str:
    """Two linears on one input, so that the norm has two readers."""
    return g.op("Add", g.op("MatMul", h, g.weight(K, N)), g.op("MatMul", h, g.weight(K, N)))


def _gamma(g: Graph, dtype: int | None = None) -> str:
    return g.weight(K, mean=1.0, scale=0.2, dtype=dtype)


def _last_axis(g: Graph) -> str:
    return g.constant(np.array([-1], np.int64))


def _normalised(g: Graph, x: str, form: str, dtype: int = FLOAT) -> str:
    two, eps, one = (g.constant(np.array(v, NUMPY[dtype])) for v in (2.0, 1e-5, 1.0))
    square = g.op("Mul", x, x) if form == "mul_div" else g.op("Pow", x, two)
    mean = g.op("Add", g.op("ReduceMean", square, _last_axis(g)), eps)
    root = g.op("Sqrt", mean)
    if form == "mul_div":
        return g.op("Div", x, root)
    return g.op("Mul", x, g.op("Reciprocal", root) if form == "reciprocal" else g.op("Div", one, root))


@case(2, norms=(True,))
def rms_norm_reciprocal(g: Graph) -> onnx.ModelProto:
    return g.model([_qk(g, g.op("Mul", _gamma(g), _normalised(g, "x", "reciprocal")))])


@case(2, norms=(True,))
def rms_norm_div(g: Graph) -> onnx.ModelProto:
    return g.model([_qk(g, g.op("Mul", _normalised(g, "x", "mul_div"), _gamma(g)))])


@case(2, norms=(True,))
def rms_norm_one_over_sqrt(g: Graph) -> onnx.ModelProto:
    return g.model([_qk(g, g.op("Mul", _normalised(g, "x", "div"), _gamma(g)))])


@case(2, norms=(True,))
def rms_norm_gain_first(g: Graph) -> onnx.ModelProto:
    root = g.op("Sqrt", g.op("ReduceMean", g.op("Mul", "x", "x"), _last_axis(g)))
    return g.model([_qk(g, g.op("Div", g.op("Mul", "x", _gamma(g)), root))])


@case(2, norms=(True,))
def rms_norm_gain_first_then_reciprocal_on_the_left(g: Graph) -> onnx.ModelProto:
    root = g.op("Reciprocal", g.op("Sqrt", g.op("ReduceMean", g.op("Mul", "x", "x"), _last_axis(g))))
    return g.model([_qk(g, g.op("Identity", g.op("Mul", root, g.op("Mul", "x", _gamma(g)))))])


@case(2, norms=(False,))
def gain_behind_an_operator_of_the_runtime(g: Graph) -> onnx.ModelProto:
    return g.model([_qk(g, g.op("QuickGelu", g.op("Mul", "x", _gamma(g)), domain="com.microsoft"))])


@case(2, norms=(True,))
def rms_norm_one_plus_weight(g: Graph) -> onnx.ModelProto:
    """Gemma's gain is 1 + weight."""
    gain = g.op("Add", g.weight(K), g.constant(np.array(1.0, np.float32)))
    return g.model([_qk(g, g.op("Mul", _normalised(g, "x", "reciprocal"), gain))])


@case(2, norms=(True,), dtype=FLOAT16)
def rms_norm_fp32_island_gain_outside(g: Graph) -> onnx.ModelProto:
    """Llama in fp16: the norm in fp32, cast back, then the fp16 gain."""
    normal = _normalised(g, g.op("Cast", "x", to=FLOAT), "reciprocal")
    return g.model([_qk(g, g.op("Mul", _gamma(g), g.op("Cast", normal, to=FLOAT16)))])


@case(2, norms=(True,), dtype=FLOAT16)
def rms_norm_fp32_island_gain_inside(g: Graph) -> onnx.ModelProto:
    gain = g.op("Cast", _gamma(g), to=FLOAT)
    normal = _normalised(g, g.op("Cast", "x", to=FLOAT), "reciprocal")
    return g.model([_qk(g, g.op("Cast", g.op("Mul", gain, normal), to=FLOAT16))])


@case(2, norms=(True,))
def rms_norm_op(g: Graph) -> onnx.ModelProto:
    return g.model([_qk(g, g.op("RMSNormalization", "x", _gamma(g), epsilon=1e-6))], opset=23)


@case(2, norms=(True,))
def simplified_layer_norm(g: Graph) -> onnx.ModelProto:
    return g.model([_qk(g, g.op("SimplifiedLayerNormalization", "x", _gamma(g), axis=-1, epsilon=1e-6, stash_type=1))])


@case(2, 1, norms=(True, False))
def skip_simplified_layer_norm(g: Graph) -> onnx.ModelProto:
    """The sum that goes on is another output of the norm: scaling gamma leaves it alone."""
    outputs = ["normal", "", "", "carried"]
    g.op("SkipSimplifiedLayerNormalization", "x", "x", _gamma(g), outputs=outputs, domain="com.microsoft", epsilon=1e-6)
    return g.model([_qk(g, "normal"), g.op("MatMul", "carried", g.weight(K, N))])


@case(2, norms=(True,))
def skip_layer_norm(g: Graph) -> onnx.ModelProto:
    normal = g.op("SkipLayerNormalization", "x", "x", _gamma(g), g.weight(K), domain="com.microsoft", epsilon=1e-6)
    return g.model([_qk(g, normal)])


@case(2, norms=(True,))
def layer_norm(g: Graph) -> onnx.ModelProto:
    return g.model([_qk(g, g.op("LayerNormalization", "x", _gamma(g), g.weight(K), axis=-1))], opset=17, ir_version=8)


@case(2, norms=(True,))
def layer_norm_positive_axis_no_bias(g: Graph) -> onnx.ModelProto:
    return g.model([_qk(g, g.op("LayerNormalization", "x", _gamma(g), axis=2))])


@case(2, norms=(True,))
def layer_norm_decomposed(g: Graph) -> onnx.ModelProto:
    """As TorchScript writes it below opset 17."""
    mean = g.op("ReduceMean", "x", axes=[-1])
    centered = g.op("Sub", "x", mean)
    variance = g.op("ReduceMean", g.op("Pow", centered, g.constant(np.array(2.0, np.float32))), axes=[-1])
    root = g.op("Sqrt", g.op("Add", variance, g.constant(np.array(1e-5, np.float32))))
    scaled = g.op("Mul", g.op("Div", centered, root), _gamma(g))
    return g.model([_qk(g, g.op("Add", scaled, g.weight(K)))], opset=13, ir_version=7)


@case(2, norms=(True,))
def layer_norm_then_flattened(g: Graph) -> onnx.ModelProto:
    normal = g.op("LayerNormalization", "x", _gamma(g), g.weight(K), axis=-1)
    return g.model([_qk(g, g.op("Reshape", normal, g.constant(np.array([-1, K], np.int64))))])


@case(2, norms=(False,))
def norm_also_read_by_another(g: Graph) -> onnx.ModelProto:
    h = g.op("LayerNormalization", "x", _gamma(g), g.weight(K), axis=-1)
    return g.model([_qk(g, h), g.op("Sigmoid", h)])


@case(2, norms=(False,))
def norm_also_an_output(g: Graph) -> onnx.ModelProto:
    h = g.op("LayerNormalization", "x", _gamma(g), g.weight(K), axis=-1)
    return g.model([_qk(g, h), h])


@case(2, norms=(False,))
def norm_with_gain_of_run_time(g: Graph) -> onnx.ModelProto:
    inputs: dict[str, tuple[int, Shape]] = {"x": (FLOAT, (*ROWS, K)), "gain": (FLOAT, (K,))}
    return g.model([_qk(g, g.op("LayerNormalization", "x", "gain", axis=-1))], inputs)


@case(2, norms=(False,))
def norm_read_before_its_bias(g: Graph) -> onnx.ModelProto:
    scaled = g.op("Mul", _normalised(g, "x", "reciprocal"), _gamma(g))
    return g.model([_qk(g, g.op("Add", scaled, g.weight(K))), g.op("Sigmoid", scaled)])


@case(2, 2, norms=(True, True))
def one_gain_two_norms(g: Graph) -> onnx.ModelProto:
    gain = _gamma(g)
    first = g.op("LayerNormalization", "x", gain, axis=-1)
    h = g.op("Add", g.op("MatMul", first, g.weight(K, K)), g.op("MatMul", first, g.weight(K, K)))
    return g.model([_qk(g, g.op("LayerNormalization", h, gain, axis=-1))])


@case(1, norms=(False,))
def bias_of_a_linear_is_no_norm(g: Graph) -> onnx.ModelProto:
    h = g.op("Add", g.op("Softmax", "x"), g.weight(K))
    return g.model([g.op("MatMul", h, g.weight(K, N))])


@case(1, norms=(False,))
def nonlinearity_after_the_gain_is_no_norm(g: Graph) -> onnx.ModelProto:
    return g.model([g.op("MatMul", g.op("Relu", g.op("Mul", "x", _gamma(g))), g.weight(K, N))])


@case(4, norms=(True,))
def attention_op_of_opset_23(g: Graph) -> onnx.ModelProto:
    h = g.op("RMSNormalization", "x", _gamma(g))
    q, k, v, gate = (g.op("MatMul", h, g.weight(K, K)) for _ in range(4))
    return g.model([g.op("Mul", gate, g.op("Attention", q, k, v, q_num_heads=4, kv_num_heads=4))], opset=24, ir_version=12)
