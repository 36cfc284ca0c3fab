from itertools import pairwise

import pytest
import torch

from fqonnx.calib.moments import corrected_weight
from fqonnx.calib.quantizers import codes as round_codes
from fqonnx.calib.registry import weight_quantizer_named
from fqonnx.calib.weights import WEIGHT_QUANTIZERS
from fqonnx.calib.weights.gptq import Gptq, descend, inverse_factor, quadratic_error
from fqonnx.calib.weights.rtn import search_scales
from fqonnx.errors import CalibrationError


def case(n: int = 24, k: int = 64, t: int = 256, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, correlated inputs and their second moment."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(t, k, generator=g) @ (torch.eye(k) + 0.5 * torch.randn(k, k, generator=g) / k**0.5 * 4)
    return torch.randn(n, k, generator=g), x, x.mT @ x / t


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (codes.float().reshape(*scales.shape, -1) * scales[..., None]).reshape(codes.shape)


def row_errors(weight: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``(ŵ - w) H (ŵ - w)ᵀ`` of each row."""
    return quadratic_error(weight, dequantize(codes, scales), torch.ones_like(weight), hessian)


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 32, 64])
def test_codes_and_scales_have_their_ranges_and_shapes(name: str, bits: int, group_size: int) -> None:
    weight, _, hessian = case()
    weight[3] = 0
    codes, scales = weight_quantizer_named(name).quantize(weight, bits=bits, group_size=group_size, hessian=hessian)
    assert codes.dtype == torch.int8
    assert codes.shape == weight.shape
    assert scales.shape == (24, 64 // group_size if group_size else 1)
    assert bool((scales > 0).all())
    assert int(codes.min()) >= -(2 ** (bits - 1))
    assert int(codes.max()) <= 2 ** (bits - 1) - 1
    assert not codes[3].any()
    # Half a step per weight is RTN's worst; GPTQ trades single weights for the output.
    assert float((dequantize(codes, scales) - weight).norm() / weight.norm()) < {4: 0.25, 8: 0.015}[bits]


def test_rtn_by_hand() -> None:
    weight = torch.tensor([[7.0, -3.4, 0.6, -7.0], [0.0, 1.4, -0.3, 0.1]])
    codes, scales = weight_quantizer_named("rtn").quantize(weight, bits=4, group_size=0)
    assert codes.tolist() == [[7, -3, 1, -7], [0, 7, -2, 0]]  # -0.3 / 0.2 = -1.5 rounds to even
    torch.testing.assert_close(scales, torch.tensor([[1.0], [0.2]]))


def test_rtn_honours_a_given_clip() -> None:
    weight = torch.tensor([[7.0, -3.4, 0.6, -7.0]])
    codes, scales = weight_quantizer_named("rtn").quantize(weight, bits=4, group_size=0, clip=torch.tensor([[0.5]]))
    assert scales.tolist() == [[0.5]]
    assert codes.tolist() == [[7, -7, 1, -8]]


def test_scale_search_clips_an_outlier_that_does_not_matter() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 256, generator=g)
    weight[0, 0] = 6.0
    importance = torch.ones(256)
    importance[0] = 0
    plain = search_scales(weight, bits=4, group_size=0)
    weighted = search_scales(weight, bits=4, group_size=0, importance=importance)
    assert weighted.item() < plain.item() <= 6 / 7


@pytest.mark.parametrize("group_size", [0, 32])
def test_gptq_beats_rtn_on_the_output(group_size: int) -> None:
    weight, x, hessian = case()
    errors = {}
    for name in ("rtn", "gptq"):
        codes, scales = weight_quantizer_named(name).quantize(weight, bits=4, group_size=group_size, hessian=hessian)
        errors[name] = float((x @ (dequantize(codes, scales) - weight).mT).norm())
    assert errors["gptq"] < 0.75 * errors["rtn"]


@pytest.mark.parametrize("group_size", [0, 32])
def test_gptq_is_clipped_rounding_where_columns_are_independent(group_size: int) -> None:
    weight, _, _ = case()
    gptq = weight_quantizer_named("gptq").quantize(weight, bits=4, group_size=group_size, hessian=torch.eye(64))
    nearest = weight_quantizer_named("mse").quantize(weight, bits=4, group_size=group_size)
    assert torch.equal(gptq[0], nearest[0])
    assert torch.equal(gptq[1], nearest[1])


def test_each_row_of_gptq_has_the_clip_that_is_better_for_it() -> None:
    weight, _, hessian = case()
    quantizer = Gptq()
    clip = torch.ones(24, 1)
    clip[::2] = 0.3  # too tight to be of use
    errors = [row_errors(weight, hessian, *quantizer.quantize(weight, bits=4, group_size=0, hessian=hessian, clip=c)) for c in (clip, None)]
    _, scales = quantizer.quantize(weight, bits=4, group_size=0, hessian=hessian, clip=clip)
    assert bool((scales[::2] > 0.5 * weight[::2].abs().amax(1, keepdim=True) / 7).all())
    assert float(errors[0].sum()) <= 1.01 * float(errors[1].sum())


def test_gptq_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, hessian = case(k=96)
    expected, _ = weight_quantizer_named("gptq").quantize(weight, bits=4, group_size=0, hessian=hessian)
    monkeypatch.setattr("fqonnx.calib.weights.gptq.BLOCK", 7)
    codes, _ = weight_quantizer_named("gptq").quantize(weight, bits=4, group_size=0, hessian=hessian)
    assert float((codes != expected).float().mean()) < 0.01  # sums in another order


@pytest.mark.parametrize("damping", [0.001, 0.1])
def test_inverse_factor_is_the_cholesky_factor_of_the_damped_inverse(damping: float) -> None:
    _, _, hessian = case()
    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    torch.testing.assert_close(inverse_factor(hessian, damping), expected, rtol=1e-3, atol=1e-5)


def test_coordinate_descent_by_hand() -> None:
    # Codes (1, 1) for (0.6, 0.6): with H = [[2, 1], [1, 1]] the first gains by moving to 0, behind which the second stays at 1.
    w, hessian = torch.tensor([[0.6, 0.6]]), torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    one = torch.ones(1, 2)
    assert quadratic_error(w, one, one, hessian).item() == pytest.approx(0.8)
    found = descend(w, one, one, hessian, bits=4, sweeps=3)
    assert found.tolist() == [[0.0, 1.0]]
    assert quadratic_error(w, found, one, hessian).item() == pytest.approx(0.4)


@pytest.mark.parametrize("group_size", [0, 16])
def test_coordinate_descent_never_adds_to_an_error_and_ends_where_no_code_gains_by_moving(group_size: int) -> None:
    weight, _, hessian = case(n=8, k=32)
    scales = search_scales(weight, bits=4, group_size=group_size)
    wide = scales.repeat_interleave(32 // scales.shape[1], 1)
    errors, q = [], round_codes(weight, wide, 4)
    for _ in range(40):
        errors.append(quadratic_error(weight, q, wide, hessian))
        q = descend(weight, q, wide, hessian, 4, 1)
    assert all(bool((after <= before * (1 + 1e-5)).all()) for before, after in pairwise(errors))
    assert float(errors[-1].sum()) < 0.6 * float(errors[0].sum())
    for column in range(32):
        for step in (-1, 1):
            other = q.clone()
            other[:, column] = (other[:, column] + step).clamp(-8, 7)
            assert bool((quadratic_error(weight, other, wide, hessian) >= errors[-1] * (1 - 1e-4)).all())


def test_searched_dampings_and_descent_lessen_the_error() -> None:
    weight, _, hessian = case(n=64, k=128, t=512)
    errors = []
    for dampings, sweeps in (((0.01,), 0), (Gptq.dampings, 0), (Gptq.dampings, Gptq.sweeps)):
        quantizer = Gptq()
        quantizer.dampings, quantizer.sweeps = dampings, sweeps  # type: ignore[misc]  # class variables
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(128)
        errors.append(row_errors(weight, damped, *quantizer.quantize(weight, bits=4, group_size=0, hessian=hessian)))
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
    assert bool((errors[2] <= errors[1] * (1 + 1e-5)).all())
    assert float(errors[2].sum()) < 0.95 * float(errors[0].sum())


@pytest.mark.parametrize("kind", ["zero", "rank one", "dead channels", "duplicates"])
def test_gptq_survives_singular_hessians(kind: str) -> None:
    weight, x, hessian = case(t=32)
    if kind == "zero":
        hessian = torch.zeros_like(hessian)
    elif kind == "rank one":
        hessian = x[:1].mT @ x[:1]
    elif kind == "dead channels":
        hessian[:20], hessian[:, :20] = 0, 0
    else:
        x[:, 32:] = x[:, :32]
        hessian = x.mT @ x
    codes, scales = weight_quantizer_named("gptq").quantize(weight, bits=4, group_size=0, hessian=hessian)
    assert torch.isfinite(scales).all()
    assert float((dequantize(codes, scales) - weight).norm() / weight.norm()) < 1.0


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
def test_nan_weights_are_refused(name: str) -> None:
    weight, _, hessian = case()
    weight[1, 1] = float("inf")
    with pytest.raises(CalibrationError, match="weight holds NaN or Inf"):
        weight_quantizer_named(name).quantize(weight, bits=4, group_size=0, hessian=hessian)


@pytest.mark.parametrize("name", [name for name in WEIGHT_QUANTIZERS if weight_quantizer_named(name).needs_hessian])
@pytest.mark.parametrize("hessian", [None, torch.full((64, 64), float("nan"))])
def test_missing_or_broken_statistics_are_refused(name: str, hessian: torch.Tensor | None) -> None:
    with pytest.raises(CalibrationError, match=r"needs calibration statistics|NaN or Inf"):
        weight_quantizer_named(name).quantize(case()[0], bits=4, group_size=0, hessian=hessian)


def test_corrected_weight_is_the_least_squares_fit() -> None:
    weight, x, _ = case(t=4096)
    noisy = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    corrected = corrected_weight(weight, noisy.mT @ noisy / len(x), x.mT @ noisy / len(x), damping=0.0)
    best = torch.linalg.lstsq(noisy.double(), (x @ weight.mT).double()).solution.mT.float()
    torch.testing.assert_close(corrected, best, rtol=1e-2, atol=1e-2)


def test_corrected_weight_without_data_is_the_weight() -> None:
    weight, _, _ = case()
    zero = torch.zeros(64, 64)
    torch.testing.assert_close(corrected_weight(weight, zero, zero), weight)
