from dataclasses import replace

import pytest
import torch

from fqonnx.calib import kron, moments
from fqonnx.calib.registry import transform_named
from fqonnx.calib.transforms.base import FittedTransform, Problem
from fqonnx.calib.transforms.dfrot import massive, unit_rows
from fqonnx.errors import CalibrationError
from fqonnx.recipe import SCHEMES


def problem(k: int = 64, scheme: str = "w4a4", steps: int = 40) -> Problem:
    """Rows whose channels are not alike, a few of them massive in three."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(512, k, generator=g) * torch.rand(k, generator=g) ** 2
    x[::64] *= 0.001
    x[::64, :3] = torch.tensor([30.0, -21.0, 11.0]) + torch.randn(8, 3, generator=g)
    return Problem(torch.randn(8, k, generator=g), x, x.abs().amax(0), SCHEMES[scheme], 0, seed=3, steps=steps)


def rounding_error(p: Problem, fitted: FittedTransform, rows: torch.Tensor) -> float:
    t = moments.forward(fitted, unit_rows(rows))
    clips = [1 - 0.05 * i for i in range(9)]
    return min(float((moments.quantize_input(t, p.scheme.activation_bits, clip) - t).square().sum()) for clip in clips)


@pytest.mark.parametrize("k", [3, 42, 64, 101])
def test_both_factors_are_rotations(k: int) -> None:
    fitted = transform_named("dfrot").fit(problem(k, steps=10))
    assert fitted.left is not None
    assert fitted.right is not None
    assert (len(fitted.left), len(fitted.right)) == kron.factor(k)
    for factor in (fitted.left, fitted.right):
        torch.testing.assert_close(factor @ factor.mT, torch.eye(len(factor)), atol=1e-5, rtol=0)


def test_massive_rows_are_refined_first_and_the_others_not_ruined() -> None:
    p = problem()
    assert p.tokens is not None
    rows = massive(p.tokens)
    assert rows.tolist() == [index % 64 == 0 for index in range(512)]
    start, fitted = transform_named("hadamard").fit(p), transform_named("dfrot").fit(p)
    assert rounding_error(p, fitted, p.tokens[rows]) < 0.5 * rounding_error(p, start, p.tokens[rows])
    assert rounding_error(p, fitted, p.tokens[~rows]) < 1.5 * rounding_error(p, start, p.tokens[~rows])


def test_without_massive_rows_the_error_of_all_is_less_than_hadamards() -> None:
    p = problem()
    assert p.tokens is not None
    p = replace(p, tokens=p.tokens[~massive(p.tokens)])
    assert p.tokens is not None
    start, fitted = transform_named("hadamard").fit(p), transform_named("dfrot").fit(p)
    assert rounding_error(p, fitted, p.tokens) < 0.95 * rounding_error(p, start, p.tokens)


def test_zeros_are_not_massive_and_dead_channels_do_not_count() -> None:
    x = torch.zeros(3, 8)
    x[1, 0] = 5.0  # the only channel that is not dead
    x[2, :4] = torch.tensor([1e-3, 1e-3, 1e-3, 2.0])
    assert massive(x).tolist() == [False, False, True]


def test_float_activations_have_nothing_to_refine_on() -> None:
    p = problem(scheme="w4a16")
    start, fitted = transform_named("hadamard").fit(p), transform_named("dfrot").fit(p)
    assert fitted.left is not None
    assert fitted.right is not None
    assert start.left is not None
    assert start.right is not None
    assert torch.equal(fitted.left, start.left)
    assert torch.equal(fitted.right, start.right)
    assert fitted.clip == 1


def test_the_loss_does_not_depend_on_how_loud_rows_are() -> None:
    p = problem(steps=5)
    assert p.tokens is not None
    loud = transform_named("dfrot").fit(replace(p, tokens=p.tokens * 1e25))
    quiet = transform_named("dfrot").fit(p)
    assert loud.left is not None
    assert quiet.left is not None
    torch.testing.assert_close(loud.left, quiet.left, atol=1e-3, rtol=0)


def test_nan_and_missing_tokens_are_refused() -> None:
    p = problem()
    assert p.tokens is not None
    with pytest.raises(CalibrationError, match="needs calibration statistics"):
        transform_named("dfrot").fit(replace(p, tokens=None))
    p.tokens[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        transform_named("dfrot").fit(p)
