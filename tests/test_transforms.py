from dataclasses import replace

import numpy as np
import pytest
import torch

from fqonnx.calib import moments
from fqonnx.calib.quantizers import codes, row_scale
from fqonnx.calib.registry import transform_named
from fqonnx.calib.transforms import TRANSFORMS, FittedTransform, Problem
from fqonnx.calib.transforms.flatquant import InvertibleFactor
from fqonnx.calib.transforms.hadamard import hadamard
from fqonnx.calib.transforms.smooth import channel_scale
from fqonnx.errors import CalibrationError
from fqonnx.recipe import SCHEMES


def problem(
    k: int = 48, n: int = 40, t: int = 512, *, outliers: float = 30.0, scheme: str = "w4a4", group_size: int = 0, steps: int = 60
) -> Problem:
    """A linear whose input has a few large channels, as transformers have."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(t, k, generator=g)
    x[:, :: max(k // 3, 1)] *= outliers
    weight = torch.randn(n, k, generator=g) / k**0.5
    return Problem(weight=weight, tokens=x, absmax=x.abs().amax(0), scheme=SCHEMES[scheme], group_size=group_size, seed=3, steps=steps)


def output_error(p: Problem, fitted: FittedTransform) -> float:
    assert p.tokens is not None
    t = moments.forward(fitted, p.tokens)
    w = moments.fold(fitted, p.weight)
    clip = 1.0 if fitted.weight_clip is None else fitted.weight_clip
    scale = row_scale(w, p.scheme.weight_bits, clip)
    y = moments.quantize_input(t, p.scheme.activation_bits, fitted.clip) @ (codes(w, scale, p.scheme.weight_bits) * scale).mT
    reference = p.tokens @ p.weight.mT
    return float((y - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("k", [1, 2, 31, 42, 48, 101])
def test_transform_leaves_the_float_output_unchanged_for_any_k(name: str, k: int) -> None:
    p = problem(k, steps=5)
    fitted = transform_named(name).fit(p)
    assert p.tokens is not None
    y = moments.forward(fitted, p.tokens) @ moments.fold(fitted, p.weight).mT
    torch.testing.assert_close(y, p.tokens @ p.weight.mT, rtol=1e-3, atol=1e-3 * float(y.abs().max()))
    assert 0 < fitted.clip <= 1
    assert (fitted.left is not None) == (fitted.right is not None) == transform_named(name).has_pair


def test_each_transform_beats_the_one_before_on_outliers() -> None:
    p = problem(steps=200)
    errors = [output_error(p, transform_named(name).fit(p)) for name in ("none", "hadamard", "flatquant")]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.7 * errors[1]


@pytest.mark.parametrize(("scheme", "group_size"), [("w4a4", 16), ("w4a16", 0), ("w8a8", 0), ("w4a8", 24)])
def test_flatquant_helps_in_every_scheme(scheme: str, group_size: int) -> None:
    p = problem(scheme=scheme, group_size=group_size, steps=100)
    errors = [output_error(p, transform_named(name).fit(p)) for name in ("none", "flatquant")]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("case", ["constant", "dead", "duplicate", "one token", "huge", "zero weight"])
def test_flatquant_survives_degenerate_inputs(case: str) -> None:
    p = problem(steps=20)
    assert p.tokens is not None
    x, weight = p.tokens.clone(), p.weight.clone()
    if case == "constant":
        x = torch.ones_like(x)
    elif case == "dead":
        x[:, 5:20] = 0
        weight[:, 18:30] = 0
    elif case == "duplicate":
        x[:, 1::2] = x[:, ::2]
    elif case == "one token":
        x = x[:1]
    elif case == "huge":
        x *= 1e6
    else:
        weight = torch.zeros_like(weight)
    fitted = transform_named("flatquant").fit(Problem(weight, x, x.abs().amax(0), p.scheme, 0, seed=0, steps=20))
    for tensor in (fitted.left, fitted.right, fitted.channel_scale, fitted.weight_clip):
        assert tensor is not None
        assert torch.isfinite(tensor).all()
    assert torch.isfinite(moments.fold(fitted, weight)).all()
    assert torch.isfinite(moments.forward(fitted, x)).all()


def test_flatquant_is_the_same_for_the_same_seed_only() -> None:
    transform = transform_named("flatquant")
    p = problem(steps=5)
    first, second = transform.fit(p), transform.fit(p)
    other = transform.fit(Problem(p.weight, p.tokens, p.absmax, p.scheme, 0, seed=4, steps=5))
    assert first.left is not None
    assert other.left is not None
    assert second.left is not None
    assert torch.equal(first.left, second.left)
    assert not torch.equal(first.left, other.left)


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if transform_named(name).needs_tokens])
def test_learned_transforms_ask_for_statistics(name: str) -> None:
    p = problem()
    with pytest.raises(CalibrationError, match="needs calibration statistics"):
        transform_named(name).fit(Problem(p.weight, None, None, p.scheme, 0, seed=0))


def test_flatquant_refuses_nan() -> None:
    p = problem()
    assert p.tokens is not None
    p.tokens[3, 3] = float("nan")
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        transform_named("flatquant").fit(p)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 16, 28, 37, 86])
def test_hadamard_is_orthogonal_and_spreads_one_channel_over_all(n: int) -> None:
    matrix = hadamard(n, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(n), atol=1e-5, rtol=0)
    if n & (n - 1) == 0:
        torch.testing.assert_close(matrix.abs(), torch.full((n, n), n**-0.5))


def test_smooth_scale_by_hand() -> None:
    absmax = torch.tensor([4.0, 1.0, 0.0])
    weight = torch.tensor([[1.0, -1.0, 3.0], [0.5, 4.0, 1.0]])
    # sqrt(4/1), sqrt(1/4), dead -> 1; their geometric mean over living channels is 1 already.
    np.testing.assert_allclose(channel_scale(absmax, weight, 0.5).numpy(), [2.0, 0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(channel_scale(torch.zeros(3), weight, 0.5).numpy(), [1.0, 1.0, 1.0])


@pytest.mark.parametrize("scheme", ["w4a4", "w8a8", "w4a16"])
def test_smooth_takes_the_share_of_the_smallest_output_error(scheme: str) -> None:
    p = problem(scheme=scheme)
    assert p.absmax is not None
    fixed = [output_error(p, FittedTransform(channel_scale=channel_scale(p.absmax, p.weight, i / 10))) for i in range(11)]
    assert output_error(p, transform_named("smooth").fit(p)) == pytest.approx(min(fixed), rel=1e-5)
    assert min(fixed) < 0.9 * output_error(p, FittedTransform())


def test_invertible_factor_stays_invertible_wherever_training_takes_it() -> None:
    factor = InvertibleFactor(hadamard(12, torch.Generator().manual_seed(0)))
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in factor.parameters():
            parameter.copy_(100 * torch.randn(parameter.shape, generator=g))
        matrix, inverse = factor()
    torch.testing.assert_close(matrix @ inverse, torch.eye(12), atol=2e-3, rtol=0)
    assert float(torch.linalg.cond(matrix.double())) < np.exp(2 * InvertibleFactor.bound) * 1.01


def test_a_large_prime_factor_is_a_rotation_that_is_not_trained() -> None:
    p = problem(521, t=64, steps=3)
    fitted = transform_named("flatquant").fit(p)
    assert fitted.right is not None
    assert fitted.right.shape == (521, 521)
    torch.testing.assert_close(fitted.right @ fitted.right.mT, torch.eye(521), atol=1e-4, rtol=0)


def test_learned_channel_scales_stay_within_what_fp16_bears() -> None:
    p = problem(steps=2)
    assert p.tokens is not None
    fitted = transform_named("flatquant").fit(replace(p, tokens=p.tokens * 1e8, absmax=p.tokens.abs().amax(0) * 1e30))
    assert fitted.channel_scale is not None
    assert 0.99e-4 < float(fitted.channel_scale.min()) <= float(fitted.channel_scale.max()) < 1.01e4
