"""``Shape`` moves up to the value whose shape it measures, and no further: results stay the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest

from fqonnx.passes.linears import find
from fqonnx.passes.move_shapes import MoveShapes
from fqonnx.passes.prepare import prepare
from fqonnx.passes.shapes import InferShapes
from tests import zoo
from tests.runtime import run

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

K = 12
INPUTS = {"x": (zoo.FLOAT, ("batch", "seq", K)), "one": (zoo.FLOAT, ("b1", "s1", 1)), "same": (zoo.FLOAT, ("batch", "seq", K))}
FEEDS = {
    "x": np.random.default_rng(0).standard_normal((2, 3, K)).astype(np.float32),
    "one": np.ones((2, 3, 1), np.float32),
    "same": np.ones((2, 3, K), np.float32),
}


def rms(g: zoo.Graph) -> str:
    mean = g.op("ReduceMean", g.op("Mul", "x", "x"), g.constant(np.array([-1])), keepdims=1)
    return g.op("Mul", g.op("Div", "x", g.op("Sqrt", mean)), g.weight(K))


# What makes the value that is measured, and the value whose shape is to be measured instead; None: its own.
CASES: dict[str, tuple[Callable[[zoo.Graph], str], str | None]] = {
    "norm": (lambda g: g.op("LayerNormalization", "x", g.weight(K), g.weight(K)), "x"),
    "skip norm": (lambda g: g.op("SkipLayerNormalization", "x", "same", g.weight(K), g.weight(K), domain="com.microsoft"), "x"),
    "decomposed norm": (rms, "x"),
    "chain": (lambda g: g.op("Softmax", g.op("Cast", g.op("Gelu", "x"), to=zoo.FLOAT), axis=-1), "x"),
    "scalar on the left": (lambda g: g.op("Sub", g.constant(np.float32(1)), "x"), "x"),
    "row": (lambda g: g.op("Add", "x", g.weight(K)), "x"),
    "equal shapes": (lambda g: g.op("Mul", "x", "same"), "x"),
    "a row that widens": (lambda g: g.op("Add", "one", g.weight(K)), None),
    "rows that widen": (lambda g: g.op("Add", g.op("Slice", "x", *(g.constant(np.array([n])) for n in (0, 1, 1))), g.weight(3, K)), None),
    "a higher rank": (lambda g: g.op("Mul", "x", g.weight(1, 1, 1, K)), None),
    "unknown broadcast": (lambda g: g.op("Mul", "one", "one2"), None),
    "a bias": (lambda g: g.op("Add", g.op("MatMul", "x", g.weight(K, K)), g.weight(K)), None),
    "a product": (lambda g: g.op("MatMul", "x", g.weight(K, K)), None),
    "another output": (lambda g: g.op("Split", "x", outputs=["first", "second"], axis=-1, num_outputs=2), None),
}


def model_of(build: Callable[[zoo.Graph], str]) -> onnx.ModelProto:
    g = zoo.Graph("shapes")
    y = build(g)
    shape = g.op("Shape", y)
    numbers = g.op("Cast", shape, to=zoo.FLOAT)
    return g.model([y, numbers, g.op("Cast", g.op("Size", y), to=zoo.FLOAT)], {**INPUTS, "one2": (zoo.FLOAT, ("b2", "s2", 1))})


@pytest.mark.parametrize("name", CASES)
def test_shape_is_measured_where_it_first_occurs(name: str) -> None:
    build, expected = CASES[name]
    proto = model_of(build)
    feeds = {**FEEDS, "one2": np.ones((1, 3, 1), np.float32)}
    before = run(proto, feeds)
    model = ir.from_proto(proto)
    InferShapes()(model)
    own = {node.op_type: node.inputs[0].name for node in model.graph if node.op_type in ("Shape", "Size")}
    assert MoveShapes()(model).modified is (expected is not None)
    measured = {node.op_type: node.inputs[0].name for node in model.graph if node.op_type in ("Shape", "Size")}
    assert measured == (own if expected is None else dict.fromkeys(own, expected))
    assert not MoveShapes()(model).modified
    for output, value in run(model, feeds).items():
        np.testing.assert_array_equal(value, before[output])


def test_a_norm_whose_size_is_asked_for_still_takes_a_channel_scale() -> None:
    g = zoo.Graph("view")
    mean = g.op("ReduceMean", g.op("Mul", "x", "x"), g.constant(np.array([-1])), keepdims=1)
    h = g.op("Mul", g.op("Div", "x", g.op("Sqrt", mean)), g.weight(64))
    rows = g.op("Slice", g.op("Shape", h), g.constant(np.array([0])), g.constant(np.array([2])))
    sizes = g.op("Concat", rows, g.constant(np.array([4, 16])), axis=0)
    y = g.op("Reshape", g.op("MatMul", h, g.weight(64, 64), name="/q/MatMul"), sizes)
    model = prepare(ir.from_proto(g.model([y], {"x": (zoo.FLOAT, ("batch", "seq", 64))})))
    (group,) = find(model).groups
    assert group.norm is not None
