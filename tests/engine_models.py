"""Models that engines are tried on."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

W = np.random.default_rng(0).normal(size=(32, 48)).astype(np.float32)


def save(path, nodes, inputs, outputs, constants=(), domains=()):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        [numpy_helper.from_array(value, name) for name, value in dict(constants).items()],
    )
    opsets = [helper.make_opsetid("", 21), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def write_linear(path):
    """``y = x W`` for x of ``[b, s, 32]``."""
    return save(
        path,
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")],
        [("x", TensorProto.FLOAT, ["b", "s", 32])],
        [("y", TensorProto.FLOAT, ["b", "s", 48])],
        {"w": W},
    )
