"""Small models of fqonnx ops for the tests: built with the node constructors, run on ONNX Runtime's CPU provider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fqonnx.ops import (
    add_functions,
    flat_quantize_node,
    int4_tensor,
    rms_norm_flat_quantize_node,
    silu_mul_flat_quantize_node,
    to_layout,
    w4a4_gemm_node,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import onnx

IR_VERSIONS = {21: 10, 22: 10, 23: 11, 24: 12, 25: 13}


@dataclass(frozen=True)
class Gemm:
    """Constants of one ``W4A4Gemm``: codes ``[N, K]`` in the order of K, scales ``[N, K / G]``, bias ``[N]``."""

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    @classmethod
    def random(cls, rng: np.random.Generator, n: int, k: int, groups: int = 1, *, bias: bool = True) -> Gemm:
        return cls(
            rng.integers(-8, 8, (n, k)).astype(np.int8),
            rng.uniform(0.01, 0.1, (n, groups)).astype(np.float32),
            (rng.normal(size=n) if bias else np.zeros(n)).astype(np.float32),
        )


def constant(graph: ir.Graph, name: str, value: npt.NDArray[Any] | ir.TensorProtocol) -> ir.Value:
    tensor = value if isinstance(value, ir.TensorProtocol) else ir.tensor(value, name=name)
    result = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
    graph.register_initializer(result)
    return result


def empty_model(inputs: Sequence[ir.Value], opset: int = 21) -> ir.Model:
    return ir.Model(ir.Graph(inputs, [], nodes=[], opset_imports={"": opset}, name="test"), ir_version=IR_VERSIONS[opset])


def cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    """``value`` itself where it is of ``dtype``."""
    if value.dtype == dtype:
        return value
    output = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
    graph.append(ir.node("Cast", [value], {"to": dtype.value}, outputs=[output], name=f"{name}_cast"))
    return output


def flat_quantize_model(
    left: npt.NDArray[np.float32],
    right: npt.NDArray[np.float32],
    clip: float,
    k: int,
    *,
    lead: Sequence[int | str | None] = ("batch",),
    dtype: ir.DataType = ir.DataType.FLOAT,
    bits: int = 4,
    packed: bool = False,
    opset: int = 21,
    gemms: Sequence[Gemm] = (),
    layout: str = "plain",
    gate: int | None = None,
) -> ir.Model:
    """``x`` (fed as fp32, cast to ``dtype``) -> ``q``, ``scale`` and the output ``y0``, ``y1``.. of each GEMM, cast back to fp32.

    With ``gate``, ``x`` is ``[.., 2 k]``, a gate and its factor, of which that half is the gate.
    """
    x = ir.val("x", ir.DataType.FLOAT, [*lead, k if gate is None else 2 * k])
    model = empty_model([x], opset)
    graph = model.graph
    factors = [
        constant(graph, name, np.asarray(value, np.float32)) for name, value in (("left", left), ("right", right), ("clip", np.array(clip)))
    ]
    typed = cast(graph, x, dtype, "x_typed")
    if gate is None:
        quantize = flat_quantize_node(typed, *factors, bits=bits, packed=packed, name="quantize")
    else:
        quantize = silu_mul_flat_quantize_node(typed, *factors, gate=gate, bits=bits, packed=packed, name="quantize")
    graph.append(quantize)
    graph.outputs.extend(quantize.outputs)
    for index, gemm in enumerate(gemms):
        graph.outputs.append(append_gemm(graph, *quantize.outputs, gemm, dtype=dtype, packed=packed, layout=layout, name=f"gemm{index}"))
    for output, name in zip(graph.outputs, ("q", "scale", *(f"y{index}" for index in range(len(gemms)))), strict=True):
        output.name = name
    add_functions(model)
    return model


def rms_norm_model(
    gamma: npt.NDArray[np.float32],
    left: npt.NDArray[np.float32],
    right: npt.NDArray[np.float32],
    clip: float,
    *,
    lead: Sequence[int | str | None] = ("batch",),
    dtype: ir.DataType = ir.DataType.FLOAT,
    epsilon: float = 1e-5,
    residual: bool = False,
    bits: int = 4,
    packed: bool = False,
    opset: int = 21,
) -> ir.Model:
    """``x`` (and ``residual``), fed as fp32 and cast to ``dtype``, -> ``q``, ``scale`` (and ``sum``, cast back to fp32)."""
    fed = [ir.val(name, ir.DataType.FLOAT, [*lead, len(gamma)]) for name in ("x", "residual")[: 1 + residual]]
    model = empty_model(fed, opset)
    graph = model.graph
    factors = [
        constant(graph, name, np.asarray(value, np.float32)) for name, value in (("left", left), ("right", right), ("clip", np.array(clip)))
    ]
    x, *more = (cast(graph, value, dtype, f"{value.name}_typed") for value in fed)
    weight = constant(graph, "gamma", gamma.astype(dtype.numpy()))
    quantize = rms_norm_flat_quantize_node(
        x, weight, *factors, residual=more[0] if more else None, epsilon=epsilon, bits=bits, packed=packed, name="quantize"
    )
    graph.append(quantize)
    q, scale, *sums = quantize.outputs
    graph.outputs.extend([q, scale, *(cast(graph, total, ir.DataType.FLOAT, "sum_float") for total in sums)])
    for output, name in zip(graph.outputs, ("q", "scale", "sum"), strict=False):
        output.name = name
    add_functions(model)
    return model


def append_gemm(
    graph: ir.Graph, q: ir.Value, scale: ir.Value, gemm: Gemm, *, dtype: ir.DataType, packed: bool = False, layout: str = "plain", name: str
) -> ir.Value:
    node = w4a4_gemm_node(
        q,
        scale,
        constant(graph, f"{name}.w", int4_tensor(to_layout(gemm.codes, layout), f"{name}.w")),
        constant(graph, f"{name}.w_scale", gemm.scales),
        constant(graph, f"{name}.bias", gemm.bias),
        dtype=dtype,
        packed=packed,
        layout=layout,
        name=name,
    )
    graph.append(node)
    return cast(graph, node.outputs[0], ir.DataType.FLOAT, f"{name}.float")


def gemm_model(
    gemm: Gemm,
    *,
    dtype: ir.DataType = ir.DataType.FLOAT,
    packed: bool = False,
    layout: str = "plain",
    lead: Sequence[int | str | None] = ("batch",),
    opset: int = 21,
) -> ir.Model:
    """``q`` and ``scale`` -> ``y``, cast to fp32."""
    k = gemm.codes.shape[1]
    q = ir.val("q", ir.DataType.INT8, [*lead, k // 2 if packed else k])
    scale = ir.val("scale", ir.DataType.FLOAT, [*lead, 1])
    model = empty_model([q, scale], opset)
    model.graph.outputs.append(append_gemm(model.graph, q, scale, gemm, dtype=dtype, packed=packed, layout=layout, name="gemm"))
    model.graph.outputs[0].name = "y"
    add_functions(model)
    return model


def proto(model: ir.Model) -> onnx.ModelProto:
    return ir.serde.serialize_model(model)


def run(model: ir.Model, **feeds: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """All outputs by name."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip((output.name for output in session.get_outputs()), session.run(None, feeds), strict=True))
