"""Every registered transform with every registered weight quantizer on what calibration data may hold, and a build of each kind.

A new entry of a registry is covered by being there.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from fqonnx import artifact
from fqonnx.build import build
from fqonnx.calib.solution import GroupStats
from fqonnx.calib.solve_group import solve_group
from fqonnx.calib.transforms import TRANSFORMS
from fqonnx.calib.weights import WEIGHT_QUANTIZERS
from fqonnx.ops.reference import flat_quantize
from fqonnx.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from fqonnx.calib.solution import GroupSolution

    Array = npt.NDArray[np.float32]

CASES = ("outliers of 1e4", "k mod 4 is 2", "one row", "duplicate channels", "dead channels", "constant rows", "equal rows", "zeros")
SEEDS = (0, 1, 2)
N = 40
STEPS = 8

WORSE = 1.2
"""What a combination may err more than plain rounding, which has neither a transform nor data, on rows that calibration did not see."""

ONE_DIRECTION = ("one row", "constant rows", "equal rows", "zeros")
"""Cases that show a single direction, which plain rounding may hit by chance: they have an error of their own, relative to the output."""

LARGEST = 0.3
"""That error."""


def case(kind: str, seed: int, rows: int = 96) -> tuple[Array, Array, Array]:
    """Rows to calibrate on, as many others of the same kind, and a weight ``[N, K]``."""
    rng = np.random.default_rng(seed)
    k = (34, 38, 46)[seed] if kind == "k mod 4 is 2" else 32
    x = rng.standard_normal((2 * rows, k)) * np.where(np.arange(k) % 11 == 0, 8, 1)
    weight = rng.standard_normal((N, k)) / k**0.5
    if kind == "constant rows":
        x[:] = 0.7
    elif kind == "equal rows":
        x[:] = x[0]
    elif kind == "dead channels":
        x[:, 3:14] = 0
        weight[:, 10:20] = 0
    elif kind == "duplicate channels":
        x[:, 1::2] = x[:, ::2]
    elif kind == "outliers of 1e4":
        x[:, 5] = 1e4 * np.sign(x[:, 5])
        x[1::8, 17] = -1e4
    elif kind == "zeros":
        x[:] = 0
    x, weight = x.astype(np.float32), weight.astype(np.float32)
    return (x[:1], x[:1], weight) if kind == "one row" else (x[:rows], x[rows:], weight)


def statistics(x: Array) -> GroupStats:
    return GroupStats(x, (x.T @ x / len(x)).astype(np.float32), np.abs(x).max(0), len(x))


def outputs(solution: GroupSolution, x: Array, activation_bits: int) -> npt.NDArray[np.float64]:
    """What the deployed group gives, by the numpy reference of its op."""
    one = np.ones((1, 1), np.float32)
    left, right = (one, one) if solution.left is None or solution.right is None else (solution.left, solution.right)
    x = x if solution.channel_scale is None else (x / solution.channel_scale).astype(np.float32)
    q, scale = flat_quantize(x, left, right, solution.clip, bits=activation_bits)
    n, k = solution.codes.shape
    weight = (solution.codes.reshape(n, solution.scales.shape[1], -1) * solution.scales[..., None].astype(np.float64)).reshape(n, k)
    y: npt.NDArray[np.float64] = (q * scale.astype(np.float64)) @ weight.T
    return y if solution.bias is None else y + solution.bias


def relative_error(y: npt.NDArray[np.float64], x: Array, weight: Array) -> float:
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    norm = float(np.linalg.norm(exact))
    return float(np.linalg.norm(y - exact)) / norm if norm else float(np.abs(y).max())


def sound(solution: GroupSolution) -> None:
    """Finite, in range, and invertible."""
    arrays = solution.to_arrays()
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert all(np.isfinite(value) for value in solution.metrics.values())
    assert (solution.scales > 0).all()
    assert solution.codes.min() >= -8
    assert solution.codes.max() <= 7
    assert 0 < solution.clip <= 1
    if solution.channel_scale is not None:
        assert solution.channel_scale.min() > 0.99e-4
        assert solution.channel_scale.max() < 1.01e4
    for factor in (solution.left, solution.right):
        assert factor is None or np.linalg.cond(factor.astype(np.float64)) < 1e4


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize(("transform", "weights"), list(product(TRANSFORMS, WEIGHT_QUANTIZERS)))
def test_every_combination_bears_it_and_is_not_worse_than_plain_rounding(transform: str, weights: str, kind: str) -> None:
    for seed in SEEDS:
        x, unseen, weight = case(kind, seed)
        for bias_correction in (False, True):
            recipe = Recipe(transform=transform, weights=weights, steps=STEPS, bias_correction=bias_correction)
            solution = solve_group("g", weight, statistics(x), recipe, seed=seed)
            sound(solution)
            y = outputs(solution, unseen, recipe.bits.activation_bits)
            assert np.isfinite(y).all()
            plain = solve_group("g", weight, None, Recipe(transform="none", weights="rtn"), seed=seed)
            error, bound = (relative_error(out, unseen, weight) for out in (y, outputs(plain, unseen, 4)))
            assert error <= (LARGEST if kind in ONE_DIRECTION else WORSE * bound), (seed, bias_correction, error, bound)


def covering() -> list[tuple[str, str, str]]:
    """Cases, transforms and weight quantizers so that each of them occurs."""
    count = max(len(CASES), len(TRANSFORMS), len(WEIGHT_QUANTIZERS))
    choices = (list(CASES), list(reversed(TRANSFORMS)), list(reversed(WEIGHT_QUANTIZERS)))
    return [tuple(names[i % len(names)] for names in choices) for i in range(count)]  # type: ignore[misc]  # as many as choices


def write_model(path: Path, weight: Array, elem_type: int) -> Path:
    """``x [batch, K] -> y [batch, K]``: a linear without a bias, Relu, and one with a bias."""
    rng, dtype = np.random.default_rng(1), helper.tensor_dtype_to_np_dtype(elem_type)
    n, k = weight.shape
    constants = {"w1": weight.T, "w2": rng.standard_normal((n, k)) / n**0.5, "b2": rng.standard_normal(k)}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["a"], name="relu"),
        helper.make_node("MatMul", ["a", "w2"], ["p"], name="second"),
        helper.make_node("Add", ["p", "b2"], ["y"], name="bias"),
    ]
    value = [helper.make_tensor_value_info(name, elem_type, ["batch", k]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(array.astype(dtype), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "linears", value[:1], value[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(("kind", "transform", "weights"), covering())
def test_builds_bear_it(tmp_path: Path, kind: str, transform: str, weights: str) -> None:
    """In fp16 where activations come near its range: what is written runs in ONNX Runtime, and is near the float model where that is."""
    x, unseen, weight = case(kind, seed=1)
    elem_type = TensorProto.FLOAT16 if kind == "outliers of 1e4" else TensorProto.FLOAT
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    model = write_model(tmp_path / "m.onnx", weight, elem_type)
    np.savez(tmp_path / "d.npz", x=x.astype(dtype))
    recipe = Recipe(transform=transform, weights=weights, steps=STEPS, bias_correction=True, seed=1)
    out = tmp_path / "out"
    report = build(model, out, recipe=recipe, calib_data=str(tmp_path / "d.npz"), batch_size=32, max_error=1.0)
    assert report.passed
    sessions = [ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (model, out / artifact.MODEL)]
    expected, y = (session.run(None, {"x": unseen.astype(dtype)})[0].astype(np.float64) for session in sessions)
    assert np.isfinite(y).all()
    assert np.linalg.norm(y - expected) < 0.5 * np.linalg.norm(expected)
