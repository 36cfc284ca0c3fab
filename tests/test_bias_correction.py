"""What a linear's output lacks on average is added to its bias (arXiv 1906.04721, section 4.2), from the statistics to the model's file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from onnx_ir.passes.common import RemoveUnusedNodesPass
from safetensors.numpy import load_file

from fqonnx import artifact
from fqonnx.build import build
from fqonnx.calib import moments
from fqonnx.calib.registry import weight_quantizer_named
from fqonnx.calib.solution import GroupSolution, GroupStats
from fqonnx.calib.solve_group import solve_group
from fqonnx.calib.transforms.base import FittedTransform
from fqonnx.errors import CalibrationError, UsageError
from fqonnx.passes.fuse import Fuse
from fqonnx.passes.quantize import Quantize
from fqonnx.recipe import SCHEMES, Recipe
from tests.cli_support import K, run, write_data, write_mlp
from tests.rewriting import MODELS, feed, found, solve
from tests.rewriting import run as evaluate

if TYPE_CHECKING:
    from pathlib import Path

    import onnx


def test_mean_error_by_hand() -> None:
    """Rows (7, 1.2) and (-7, 3.4) are rounded to (7, 1) and (-7, 3); the weight (1, 10) stands for (1, 11)."""
    rows, weight, rounded = torch.tensor([[7.0, 1.2], [-7.0, 3.4]]), torch.tensor([[1.0, 11.0]]), torch.tensor([[1.0, 10.0]])
    # E[W x] = 11 · 2.3, E[Ŵ x̂] = 10 · 2
    torch.testing.assert_close(moments.mean_error(FittedTransform(), weight, rounded, rows, 4), torch.tensor([5.3]))
    # Float activations leave the weight's error: 11 · 2.3 - 10 · 2.3
    torch.testing.assert_close(moments.mean_error(FittedTransform(), weight, rounded, rows, 16), torch.tensor([2.3]))


def test_relative_error_by_hand() -> None:
    error, target = torch.tensor([[3.0, 1.0, 5.0]]), torch.tensor([[6.0, 2.0, 0.0]])
    assert moments.relative_error(error, target, (1, 1, 1)) == pytest.approx(0.25 + 0.25)
    assert moments.relative_error(error, target, (2, 1)) == pytest.approx(10 / 40)
    assert moments.relative_error(error, target, None) == pytest.approx(35 / 40)


def statistics(t: int = 800, k: int = 48) -> GroupStats:
    """Rows whose channels have means, as those behind an activation have."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.standard_normal((t, k)) + 0.5 * rng.standard_normal(k), -0.2).astype(np.float32)
    return GroupStats(x, x.T @ x / t, np.abs(x).max(0), t)


@pytest.mark.parametrize("weights", ["rtn", "mse", "awq", "gptq"])
@pytest.mark.parametrize("scheme", ["w4a4", "w4a16"])
def test_the_mean_of_the_output_is_that_of_the_float_linear(weights: str, scheme: str) -> None:
    stats, weight = statistics(), np.random.default_rng(1).standard_normal((40, 48), np.float32)
    plain, corrected = (
        solve_group("g", weight, stats, Recipe(scheme=scheme, transform="none", weights=weights, bias_correction=on), seed=0)
        for on in (False, True)
    )
    assert plain.bias is None
    assert corrected.bias is not None
    assert np.array_equal(plain.codes, corrected.codes)
    assert corrected.clip == plain.clip or weight_quantizer_named(weights).needs_hessian is False
    training = torch.from_numpy(np.delete(stats.tokens, np.s_[::16], 0))  # the others are for the figures
    rows = moments.quantize_input(training, SCHEMES[scheme].activation_bits, corrected.clip).double().numpy()
    outputs = rows @ (corrected.codes * corrected.scales.astype(np.float64)).T + corrected.bias
    np.testing.assert_allclose(outputs.mean(0), (training.double().numpy() @ weight.T.astype(np.float64)).mean(0), atol=1e-4)
    if not weight_quantizer_named(weights).needs_hessian:
        assert corrected.metrics["output_rel_l2"] < 0.97 * plain.metrics["output_rel_l2"]
    else:  # their weights make up for the mean already
        assert corrected.metrics["output_rel_l2"] < 1.01 * plain.metrics["output_rel_l2"]


def test_solutions_keep_their_bias_in_a_file() -> None:
    stats = statistics()
    solution = solve_group("g", np.eye(48, dtype=np.float32), stats, Recipe(transform="none", weights="rtn", bias_correction=True), seed=0)
    again = GroupSolution.from_arrays("g", solution.to_arrays(), {})
    assert solution.bias is not None
    assert again.bias is not None
    assert np.array_equal(again.bias, solution.bias)


def test_without_data_it_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="--bias-correction needs calibration statistics: give calibration data"):
        solve_group("g", np.eye(8, dtype=np.float32), None, Recipe(transform="none", weights="rtn", bias_correction=True), seed=0)


@pytest.mark.parametrize(("scheme", "dtype"), [("w4a4", TensorProto.FLOAT), ("w4a4", TensorProto.FLOAT16), ("w4a16", TensorProto.FLOAT)])
@pytest.mark.parametrize("name", MODELS)
def test_the_rewritten_model_adds_it_with_a_bias_and_without(name: str, dtype: int, scheme: str) -> None:
    """One group at a time: its linears' outputs move by what is added, before fusing and behind it."""
    proto = MODELS[name](dtype)
    _, groups = found(proto)
    taps = tuple(linear.output.name or "" for group in groups for linear in group.linears)
    before = corrected(proto, scheme, {}, taps)
    for group in groups:
        shift = np.arange(group.out_features, dtype=np.float32) % 5 + 1
        after = corrected(proto, scheme, {group.name: shift}, taps)
        parts = np.split(shift, np.cumsum([linear.out_features for linear in group.linears])[:-1])
        for linear, part in zip(group.linears, parts, strict=True):
            expected = before[linear.output.name].astype(np.float32) + part
            tolerance = (1e-5 if dtype == TensorProto.FLOAT else 3e-3) * float(np.abs(expected).max())
            np.testing.assert_allclose(after[linear.output.name].astype(np.float32), expected, atol=tolerance)


def corrected(proto: onnx.ModelProto, scheme: str, shifts: dict[str, np.ndarray], taps: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What the model gives with these corrections by group."""
    model, groups = found(proto)
    solutions = {
        name: GroupSolution.from_arrays(name, {**found.to_arrays(), **({"bias": shifts[name]} if name in shifts else {})}, {})
        for name, found in solve(groups, SCHEMES[scheme]).items()
    }
    Quantize(groups, solutions.__getitem__, Recipe(scheme=scheme, transform="none", weights="rtn"))(model)
    RemoveUnusedNodesPass()(model)
    if scheme == "w4a4":
        assert Fuse()(model).modified
        RemoveUnusedNodesPass()(model)
    return evaluate(model, feed(proto), taps)


def test_a_build_is_nearer_with_it_and_its_record_holds_it(tmp_path: Path) -> None:
    model, data = write_mlp(tmp_path / "m.onnx", layers=2), write_data(tmp_path / "d.npz", samples=400)
    errors, shared = (
        {},
        ("--transform", "none", "--weights", "rtn", "--calib-samples", "400", "--batch-size", "40", "--max-error", "1", "-q"),
    )
    for flag in ("--no-bias-correction", "--bias-correction"):
        out = tmp_path / flag
        assert run("build", model, "-o", out, "--calib-data", data, flag, *shared).code == 0
        session = ort.InferenceSession(out / artifact.MODEL, providers=["CPUExecutionProvider"])
        reference = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        x = np.random.default_rng(7).normal(size=(500, K)).astype(np.float32)
        y, expected = (s.run(None, {"x": x})[0] for s in (session, reference))
        errors[flag] = float(np.linalg.norm(y - expected) / np.linalg.norm(expected)), float(np.abs((y - expected).mean(0)).max())
        parts = load_file(out / artifact.CALIBRATION)
        assert {name.rpartition(".")[2] for name in parts} >= {"weight_scale", "clip"}
        assert sum(name.endswith(".bias_correction") for name in parts) == (4 if flag == "--bias-correction" else 0)
    assert errors["--bias-correction"][0] < errors["--no-bias-correction"][0]
    assert errors["--bias-correction"][1] < 0.6 * errors["--no-bias-correction"][1]
    assert math.isfinite(errors["--bias-correction"][0])


def test_it_is_for_groups_that_are_solved_alone() -> None:
    with pytest.raises(UsageError, match="not for --reconstruct block: leave out --bias-correction"):
        Recipe(reconstruct="block", bias_correction=True)


def test_recipes_with_it_are_read_back(tmp_path: Path) -> None:
    recipe = Recipe(bias_correction=True)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(UsageError, match="'bias_correction' is 1: give true or false"):
        Recipe.from_dict({"bias_correction": 1})
    model, data = write_mlp(tmp_path / "m.onnx"), write_data(tmp_path / "d.npz", samples=40)
    report = build(model, tmp_path / "out", recipe=Recipe(transform="none", weights="rtn", bias_correction=True), calib_data=str(data))
    assert report.recipe["bias_correction"] is True
