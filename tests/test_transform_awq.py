from dataclasses import replace

import pytest
import torch

from fqonnx.calib import moments
from fqonnx.calib.quantizers import codes, row_scale
from fqonnx.calib.registry import transform_named
from fqonnx.calib.transforms.awq import ALPHAS
from fqonnx.calib.transforms.base import FittedTransform, Problem
from fqonnx.calib.transforms.search import normalized
from fqonnx.errors import CalibrationError
from fqonnx.recipe import SCHEMES


def problem(scheme: str = "w4a16", group_size: int = 0) -> Problem:
    """A linear whose input has a few channels that matter more than the others."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(256, 64, generator=g)
    x[:, ::16] *= 20
    weight = torch.randn(32, 64, generator=g) / 8
    return Problem(weight, x, x.abs().amax(0), SCHEMES[scheme], group_size, seed=0)


def output_error(p: Problem, fitted: FittedTransform) -> float:
    assert p.tokens is not None
    w = moments.fold(fitted, p.weight)
    rows = w.reshape(-1, p.group_size or w.shape[1])
    scale = row_scale(rows, p.scheme.weight_bits)
    rounded = (codes(rows, scale, p.scheme.weight_bits) * scale).reshape(w.shape)
    x = moments.quantize_input(moments.forward(fitted, p.tokens), p.scheme.activation_bits, 1.0)
    return float((x @ rounded.mT - p.tokens @ p.weight.mT).norm())


@pytest.mark.parametrize(("scheme", "group_size"), [("w4a16", 0), ("w4a16", 32), ("w4a4", 0), ("w4a8", 0)])
def test_the_scale_is_that_power_of_the_mean_magnitude_that_has_the_smallest_output_error(scheme: str, group_size: int) -> None:
    p = problem(scheme, group_size)
    assert p.tokens is not None
    fitted = transform_named("awq").fit(p)
    assert fitted.channel_scale is not None
    log = p.tokens.abs().mean(0).log()
    candidates = [normalized(alpha * log, torch.ones(64, dtype=torch.bool)) for alpha in ALPHAS]
    errors = [output_error(p, FittedTransform(channel_scale=scale)) for scale in candidates]
    torch.testing.assert_close(fitted.channel_scale, candidates[errors.index(min(errors))])
    assert min(errors) < 0.9 * errors[0]  # alpha 0 is no scale


def test_linears_of_a_group_count_by_their_relative_error() -> None:
    """A loud linear does not decide for a quiet one."""
    p = problem("w4a4")
    loud = replace(p, weight=torch.cat([p.weight * 1e4, p.weight]), out_features=(32, 32))
    scales = [transform_named("awq").fit(q).channel_scale for q in (p, loud)]
    assert scales[0] is not None
    assert scales[1] is not None
    torch.testing.assert_close(scales[0], scales[1])


def test_dead_channels_keep_the_scale_1_and_the_others_a_geometric_mean_of_1() -> None:
    p = problem()
    assert p.tokens is not None
    p.tokens[:, 3:9] = 0
    scale = transform_named("awq").fit(p).channel_scale
    assert scale is not None
    assert torch.equal(scale[3:9], torch.ones(6))
    assert float(scale.log().mean()) == pytest.approx(0, abs=1e-5)


def test_nothing_but_zeros_is_no_scale() -> None:
    p = problem()
    scale = transform_named("awq").fit(replace(p, tokens=torch.zeros(9, 64))).channel_scale
    assert scale is None or torch.equal(scale, torch.ones(64))


@pytest.mark.parametrize("name", ["awq", "smooth"])
def test_nan_is_refused(name: str) -> None:
    p = problem()
    assert p.tokens is not None
    p.tokens[3, 3] = float("nan")
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        transform_named(name).fit(p)
