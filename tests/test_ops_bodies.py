"""The ONNX bodies against the numpy reference, on ONNX Runtime's CPU provider."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqonnx.errors import ModelError
from fqonnx.ops import (
    OPSETS,
    add_functions,
    dequantize_nodes,
    flat_quantize_node,
    function_for,
    inline_bodies,
    reference,
    rms_norm_flat_quantize_node,
    silu_mul_flat_quantize_node,
    w4a4_gemm_node,
)
from tests.ops_graphs import Gemm, append_gemm, cast, empty_model, flat_quantize_model, gemm_model, proto, rms_norm_model, run

DTYPES = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16, ir.DataType.BFLOAT16: ml_dtypes.bfloat16}
NONE = np.ones((1, 1), np.float32)
EPS = 2.0**-24  # half an ulp of fp32, relative

# n1, n2, blocks: powers of two, n = 2 mod 4, primes, one factor of 1, no transform, a transform of blocks.
FACTORS = [(16, 24, 1), (8, 8, 1), (2, 23, 1), (7, 11, 1), (1, 31, 1), (31, 1, 1), (1, 1, 14), (4, 8, 3), (3, 5, 2)]
LEADS = [(5,), (), (2, 3), (2, 1, 4), (1,), (0,), (3, 0)]


def typed(x: npt.NDArray[Any], dtype: ir.DataType) -> npt.NDArray[Any]:
    """``x`` rounded to the type, for the reference."""
    return x.astype(DTYPES[dtype])


def exact_case(rng: np.random.Generator, n1: int, n2: int, blocks: int, lead: tuple[int, ...]) -> tuple[npt.NDArray[np.float32], ...]:
    """Small integers and halves: every sum is exact in fp32 in any order, and x in every float type."""
    x = rng.integers(-15, 16, (*lead, n1 * n2 * blocks)).astype(np.float32)
    return x, rng.integers(-2, 3, (n1, n1)).astype(np.float32) / 2, rng.integers(-2, 3, (n2, n2)).astype(np.float32) / 4


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(("n1", "n2", "blocks"), FACTORS)
def test_codes_and_scales_equal_the_reference_bit_for_bit_where_the_transform_is_exact(
    n1: int, n2: int, blocks: int, dtype: ir.DataType
) -> None:
    rng = np.random.default_rng(n1 * 100 + n2)
    for lead, (bits, pack) in zip(LEADS, [(4, False), (8, False), (4, True)] * 3, strict=False):
        x, left, right = exact_case(rng, n1, n2, blocks, lead)
        packed = pack and x.shape[-1] % 2 == 0
        clip = float(rng.uniform(0.5, 1))
        model = flat_quantize_model(left, right, clip, x.shape[-1], lead=[None] * len(lead), dtype=dtype, bits=bits, packed=packed)
        got = run(model, x=x)
        q, scale = reference.flat_quantize(typed(x, dtype), left, right, clip, bits=bits, packed=packed)
        np.testing.assert_array_equal(got["q"], q, strict=True)
        np.testing.assert_array_equal(got["scale"], scale, strict=True)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(1, 3),
    st.integers(1, 9),
    st.floats(0.25, 1),
    st.sampled_from([4, 8]),
    st.sampled_from(list(DTYPES)),
    st.integers(0, 2**32 - 1),
)
def test_codes_differ_only_next_to_a_rounding_boundary(
    n1: int, n2: int, blocks: int, rows: int, clip: float, bits: int, dtype: ir.DataType, seed: int
) -> None:
    """Sums in another order move t by at most (n1 + n2) rounding errors of the sum of magnitudes: a bound that is checked, not assumed."""
    rng = np.random.default_rng(seed)
    x = typed(rng.standard_t(3, (rows, n1 * n2 * blocks)).astype(np.float32), dtype)
    left, right = (rng.normal(size=(n, n)).astype(np.float32) for n in (n1, n2))
    got = run(flat_quantize_model(left, right, clip, x.shape[1], dtype=dtype, bits=bits), x=x.astype(np.float32))
    q, scale = reference.flat_quantize(x, left, right, clip, bits=bits)

    wide = [np.asarray(a, np.float64) for a in (left, x.reshape(-1, n1, n2), right)]
    t = (wide[0].T @ wide[1] @ wide[2]).reshape(x.shape)
    magnitude = (np.abs(wide[0]).T @ np.abs(wide[1]) @ np.abs(wide[2])).reshape(x.shape)
    t_error = (n1 + n2 + 2) * EPS * magnitude
    # Body and reference are each that far from the exact t, and round max|t| · clip, / qmax and t / scale: 4 roundings between them.
    scale_error = 2 * t_error.max(axis=-1, keepdims=True) / np.abs(t).max(axis=-1, keepdims=True) + 4 * EPS
    assert (np.abs(got["scale"] - scale) <= scale_error * scale).all()
    steps = t / scale
    slack = 2 * t_error / scale + np.abs(steps) * (scale_error + 2 * EPS)
    differs = got["q"] != q
    assert (np.abs(got["q"].astype(int) - q)[differs] == 1).all()
    to_boundary = np.abs(steps - (np.floor(steps) + 0.5))
    assert (to_boundary <= slack)[differs].all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("factors", ["none", "identity"])
def test_rows_at_the_edges_of_fp32(factors: str, packed: bool) -> None:
    left, right = (NONE, NONE) if factors == "none" else (np.eye(2, dtype=np.float32), np.eye(4, dtype=np.float32))
    pattern = np.array([1, -1, 0.5, -0.25, 0, 0.125, -0.75, 1], np.float32)
    smallest, largest = np.float32(reference.SMALLEST_SCALE), np.finfo(np.float32).max
    below = np.nextafter(smallest * 7, np.float32(0)) * np.float32(1 - 2**-20)
    rows = {
        "zero": pattern * 0,
        "negative zero": -(pattern * 0),
        "largest": pattern * largest,
        "smallest normal scale": pattern * (7 * smallest),
        "scale below it": pattern * below,
        "denormal": pattern * np.float32(1e-40),
        "least denormal": pattern * np.float32(1e-45),
    }
    x = np.stack(list(rows.values()))
    with np.errstate(under="ignore"):
        q, scale = reference.flat_quantize(x, left, right, 1.0, packed=packed)
        got = run(flat_quantize_model(left, right, 1.0, 8, packed=packed), x=x)
    np.testing.assert_array_equal(got["q"], q)
    np.testing.assert_array_equal(got["scale"], scale)
    # The reference itself, said in numbers.
    codes = reference.unpack_rows(q) if packed else q
    for row, full in zip(rows, [False, False, True, True, False, False, False], strict=True):
        index = list(rows).index(row)
        assert codes[index].tolist() == ([7, -7, 4, -2, 0, 1, -5, 7] if full else [0] * 8), row
    assert scale[:, 0].tolist() == [1, 1, np.float32(largest / 7), smallest, 1, 1, 1]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("gate", [0, 1])
def test_a_gated_product_is_quantized_bit_for_bit_where_it_is_exact(gate: int, dtype: ir.DataType, opset: int) -> None:
    """Far from 0 a sigmoid is 1 or 0 in fp32, and silu(v) is v or 0."""
    rng = np.random.default_rng(gate)
    for (n1, n2, blocks), lead, (bits, pack) in zip(FACTORS, LEADS, [(4, False), (8, False), (4, True)] * 3, strict=False):
        up, left, right = exact_case(rng, n1, n2, blocks, lead)
        passed = rng.choice([128, 0, -256], up.shape).astype(np.float32)
        x = np.concatenate([passed, up] if gate == 0 else [up, passed], axis=-1)
        packed, clip = pack and up.shape[-1] % 2 == 0, float(rng.uniform(0.5, 1))
        model = flat_quantize_model(
            left, right, clip, up.shape[-1], lead=[None] * len(lead), dtype=dtype, bits=bits, packed=packed, gate=gate, opset=opset
        )
        onnx.checker.check_model(proto(model), full_check=True)
        got = run(model, x=x)
        q, scale = reference.silu_mul_flat_quantize(typed(x, dtype), left, right, clip, gate=gate, bits=bits, packed=packed)
        np.testing.assert_array_equal(got["q"], q, strict=True)
        np.testing.assert_array_equal(got["scale"], scale, strict=True)
        h = np.maximum(passed, 0) * up
        np.testing.assert_array_equal(q, reference.flat_quantize(typed(h, dtype), left, right, clip, bits=bits, packed=packed)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_a_gated_product_is_rounded_once(dtype: ir.DataType) -> None:
    """The reference against float64, and the body against the reference: codes as wide as there are, without a transform."""
    rng = np.random.default_rng(0)
    x = typed(rng.normal(size=(50, 128)).astype(np.float32) * 3, dtype)
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    exact = gate / (1 + np.exp(-gate)) * up
    h = reference.silu_mul(x)
    assert h.dtype == DTYPES[dtype]
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) * 2 ** (23 - ml_dtypes.finfo(DTYPES[dtype]).nmant)
    np.testing.assert_array_less(np.abs(h.astype(np.float64) - exact), ulp * (4 if dtype == ir.DataType.FLOAT else 0.51) + 1e-7)
    np.testing.assert_array_equal(h, reference.silu_mul(np.concatenate([x[:, 64:], x[:, :64]], axis=1), gate=1))

    got = run(flat_quantize_model(NONE, NONE, 1.0, 64, dtype=dtype, bits=8, gate=0), x=x.astype(np.float32))
    q, scale = reference.silu_mul_flat_quantize(x, NONE, NONE, 1.0, bits=8)
    # A sigmoid's last bit may move h to the next value of its type, and that a code to its neighbour.
    eps = float(ml_dtypes.finfo(DTYPES[dtype]).eps)
    np.testing.assert_allclose(got["scale"], scale, rtol=eps + 1e-6)
    differs = got["q"] != q
    assert np.abs(got["q"].astype(int) - q).max() <= 1
    assert np.count_nonzero(differs) <= 0.01 * q.size


@pytest.mark.parametrize("gate", [0, 1])
def test_a_gate_at_the_edges(gate: int) -> None:
    """As 0 times infinity is NaN, so is the row of a gate of minus infinity; an up of 0 behind a gate of -1e4 is just 0."""
    rows = np.array([[np.nan, 1, 1, 1], [1, 1, np.inf, 1], [-np.inf, 1, 1, 1], [1e4, 1, 2, 2], [-1e4, 1, 0, 3]], np.float32)
    x = rows if gate == 0 else rows[:, [2, 3, 0, 1]]
    got = run(flat_quantize_model(NONE, NONE, 1.0, 2, gate=gate), x=x)
    q, scale = reference.silu_mul_flat_quantize(x, NONE, NONE, 1.0, gate=gate)
    for scales in (got["scale"], scale):
        assert np.isnan(scales[:, 0]).tolist() == [True, True, True, False, False]
    np.testing.assert_allclose(got["scale"][3:], scale[3:], rtol=1e-6)
    assert got["q"][3:].tolist() == q[3:].tolist() == [[7, 0], [0, 7]]


@pytest.mark.parametrize("residual", [False, True], ids=["norm", "sum"])
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_a_norm_is_quantized_bit_for_bit_where_it_is_exact(dtype: ir.DataType, opset: int, residual: bool) -> None:
    """Rows of 2 and -2, with an epsilon of 12: their root is 4, whatever their order."""
    rng = np.random.default_rng(opset)
    for (n1, n2, blocks), lead, (bits, pack) in zip(FACTORS, LEADS, [(4, False), (8, False), (4, True)] * 3, strict=False):
        gamma, left, right = exact_case(rng, n1, n2, blocks, ())
        total = rng.choice([-2, 2], (*lead, len(gamma))).astype(np.float32)
        added = rng.integers(-9, 9, total.shape).astype(np.float32) if residual else np.zeros_like(total)
        packed, clip = pack and len(gamma) % 2 == 0, float(rng.uniform(0.5, 1))
        model = rms_norm_model(
            gamma,
            left,
            right,
            clip,
            lead=[None] * len(lead),
            dtype=dtype,
            epsilon=12,
            residual=residual,
            bits=bits,
            packed=packed,
            opset=opset,
        )
        onnx.checker.check_model(proto(model), full_check=True)
        got = run(model, x=total - added, **({"residual": added} if residual else {}))
        options: dict[str, Any] = {"epsilon": 12, "bits": bits, "packed": packed}
        weight = typed(gamma, dtype)
        q, scale, summed = reference.add_rms_norm_flat_quantize(
            typed(total - added, dtype), typed(added, dtype), weight, left, right, clip, **options
        )
        np.testing.assert_array_equal(got["q"], q, strict=True)
        np.testing.assert_array_equal(got["scale"], scale, strict=True)
        np.testing.assert_array_equal(summed.astype(np.float32), total)
        if residual:
            np.testing.assert_array_equal(got["sum"], total, strict=True)
        else:
            alone = reference.rms_norm_flat_quantize(typed(total, dtype), weight, left, right, clip, **options)
            for left_out, value in zip(alone, (q, scale), strict=True):
                np.testing.assert_array_equal(left_out, value)
        h = typed(total / 4 * gamma, dtype)
        np.testing.assert_array_equal(q, reference.flat_quantize(h, left, right, clip, bits=bits, packed=packed)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_a_norm_is_rounded_once(dtype: ir.DataType) -> None:
    """The reference against float64, and the body against the reference: codes as wide as there are, without a transform."""
    rng = np.random.default_rng(0)
    x, added = (typed(rng.normal(size=(50, 64)).astype(np.float32) * 3, dtype) for _ in range(2))
    gamma = typed(1 + 0.3 * rng.normal(size=64).astype(np.float32), dtype)
    q, scale, total = reference.add_rms_norm_flat_quantize(x, added, gamma, NONE, NONE, 1.0, epsilon=1e-3, bits=8)
    assert total.dtype == DTYPES[dtype]
    np.testing.assert_array_equal(total, (x.astype(np.float64) + added.astype(np.float64)).astype(DTYPES[dtype]))
    wide = total.astype(np.float64)
    exact = gamma.astype(np.float64) * wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-3)
    h = reference.rms_norm(total, gamma, epsilon=1e-3)
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) * 2 ** (23 - ml_dtypes.finfo(DTYPES[dtype]).nmant)
    np.testing.assert_array_less(np.abs(h.astype(np.float64) - exact), ulp * (4 if dtype == ir.DataType.FLOAT else 0.51) + 1e-7)

    model = rms_norm_model(gamma.astype(np.float32), NONE, NONE, 1.0, dtype=dtype, epsilon=1e-3, residual=True, bits=8)
    got = run(model, x=x.astype(np.float32), residual=added.astype(np.float32))
    np.testing.assert_array_equal(got["sum"], total.astype(np.float32))
    np.testing.assert_allclose(got["scale"], scale, rtol=float(ml_dtypes.finfo(DTYPES[dtype]).eps) + 1e-6)
    assert np.abs(got["q"].astype(int) - q).max() <= 1
    assert np.count_nonzero(got["q"] != q) <= 0.01 * q.size


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("factors", ["none", "pair"])
def test_a_row_with_nan_or_infinity_gives_nan_and_leaves_the_other_rows_alone(bad: float, factors: str) -> None:
    rng = np.random.default_rng(0)
    left, right = (NONE, NONE) if factors == "none" else (rng.normal(size=(n, n)).astype(np.float32) for n in (4, 8))
    x = rng.normal(size=(64, 32)).astype(np.float32)
    for column in range(32):
        x[2 * column, column] = bad
    gemm = Gemm.random(rng, 5, 32)
    got = run(flat_quantize_model(left, right, 0.9, 32, gemms=[gemm]), x=x)
    q, scale = reference.flat_quantize(x, left, right, 0.9)
    for values in (scale, got["scale"], got["y0"]):
        assert np.isnan(values[0::2]).all()
        assert np.isfinite(values[1::2]).all()
    np.testing.assert_allclose(got["scale"][1::2], scale[1::2], rtol=1e-6)
    if factors == "none":
        np.testing.assert_array_equal(got["q"][1::2], q[1::2])


def test_a_transform_that_overflows_gives_nan() -> None:
    x = np.full((1, 16), 3e38, np.float32)
    hadamard = np.array([[1, 1], [1, -1]], np.float32)
    left = right = np.kron(hadamard, hadamard)
    assert np.isnan(reference.flat_quantize(x, left, right, 1.0)[1]).all()
    assert np.isnan(run(flat_quantize_model(left, right, 1.0, 16), x=x)["scale"]).all()


@pytest.mark.parametrize(("bits", "qmax"), [(4, 7), (8, 127)])
def test_ties_go_to_even_and_the_range_is_asymmetric(bits: int, qmax: int) -> None:
    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, qmax, -1]], np.float32)
    want = [[0, 2, 2, 0, -2, -2, qmax, -1]]
    q, scale = reference.flat_quantize(x, NONE, NONE, 1.0, bits=bits)
    assert (q.tolist(), scale.tolist()) == (want, [[1.0]])
    # With a clip of a half, what was qmax saturates: at qmax above, at -qmax - 1 below.
    clipped = np.array([[qmax, -qmax, qmax / 2, -qmax / 2]], np.float32)
    assert reference.flat_quantize(clipped, NONE, NONE, 0.5, bits=bits)[0].tolist() == [[qmax, -qmax - 1, qmax, -qmax]]
    for rows, clip in ((x, 1.0), (clipped, 0.5)):
        got = run(flat_quantize_model(NONE, NONE, clip, rows.shape[1], bits=bits), x=rows)
        np.testing.assert_array_equal(got["q"], reference.flat_quantize(rows, NONE, NONE, clip, bits=bits)[0])


def test_the_transform_is_the_kronecker_product() -> None:
    rng = np.random.default_rng(3)
    x, left, right = exact_case(rng, 3, 4, 2, (6,))
    q, scale = reference.flat_quantize(x, left, right, 1.0, bits=8)
    t = x.reshape(-1, 12) @ np.kron(left, right)
    np.testing.assert_array_equal(q, np.rint(t.reshape(6, 24) / scale))
    np.testing.assert_array_equal(scale[:, 0], np.abs(t).reshape(6, 24).max(axis=1) / np.float32(127))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("layout", ["plain", "k128"])
@pytest.mark.parametrize("packed", [False, True])
def test_gemm_with_channel_scales_equals_the_reference_bit_for_bit(packed: bool, layout: str, dtype: ir.DataType) -> None:
    rng = np.random.default_rng(1)
    for k, lead in [(256, (5,)), (384, (2, 3)), (128, ()), (128, (1,)), (256, (2, 0)), (30 if layout == "plain" else 128, (4,))]:
        gemm = Gemm.random(rng, 33, k, bias=k != 384)
        q = rng.integers(-8, 8, (*lead, k)).astype(np.int8)
        scale = rng.uniform(1e-4, 10, (*lead, 1)).astype(np.float32)
        want = reference.w4a4_gemm(q, scale, gemm.codes, gemm.scales, gemm.bias, dtype=DTYPES[dtype])
        fed = reference.pack_rows(q) if packed else q
        got = run(gemm_model(gemm, dtype=dtype, packed=packed, layout=layout, lead=[None] * len(lead)), q=fed, scale=scale)["y"]
        np.testing.assert_array_equal(got, want.astype(np.float32), strict=True)


def test_reference_gemm_reads_both_containers_and_layouts() -> None:
    from fqonnx.ops import to_layout

    rng = np.random.default_rng(2)
    gemm = Gemm.random(rng, 6, 256, groups=4)
    q, scale = rng.integers(-8, 8, (3, 256)).astype(np.int8), rng.uniform(size=(3, 1)).astype(np.float32)
    weight = gemm.codes * np.repeat(gemm.scales.astype(np.float64), 64, axis=1)
    want = q @ weight.T * scale + gemm.bias
    plain = reference.w4a4_gemm(q, scale, gemm.codes, gemm.scales, gemm.bias)
    np.testing.assert_allclose(plain, want, rtol=1e-5, atol=1e-5)
    stored = to_layout(gemm.codes, "k128")
    packed = reference.w4a4_gemm(reference.pack_rows(q), scale, stored, gemm.scales, gemm.bias, packed=True, layout="k128")
    np.testing.assert_array_equal(packed, plain)


@pytest.mark.parametrize(("k", "bits"), [(14336, 4), (8192, 8)])
def test_integer_sums_are_exact_at_their_largest(k: int, bits: int) -> None:
    """Alternating extremes end in small odd sums behind partial sums near the bound of fp32's integers."""
    low = -(2 ** (bits - 1))
    q = np.full((2, k), low, np.int8)
    q[1, k // 2 :] = -low - 1
    q[1, 0] += 1
    gemm = Gemm(np.full((3, k), -8, np.int8), np.ones((3, 1), np.float32), np.zeros(3, np.float32))
    gemm.codes[1, ::2], gemm.codes[2, : k // 2] = 7, 7
    sums = q.astype(np.int64) @ gemm.codes.astype(np.int64).T
    got = run(gemm_model(gemm), q=q, scale=np.ones((2, 1), np.float32))["y"]
    np.testing.assert_array_equal(got, sums)
    assert sums.max() < 2**24


@pytest.mark.parametrize("group", [1, 5, 32, 64, 128, 640])
@pytest.mark.parametrize("layout", ["plain", "k128"])
def test_gemm_with_group_scales_is_within_float_rounding_of_the_reference(group: int, layout: str) -> None:
    rng = np.random.default_rng(group)
    k = 640
    gemm = Gemm.random(rng, 17, k, k // group)
    q, scale = rng.integers(-8, 8, (9, k)).astype(np.int8), rng.uniform(0.1, 1, (9, 1)).astype(np.float32)
    want = reference.w4a4_gemm(q, scale, gemm.codes, gemm.scales, gemm.bias)
    got = run(gemm_model(gemm, layout=layout), q=q, scale=scale)["y"]
    magnitude = np.abs(q).astype(np.float64) @ (np.abs(gemm.codes) * np.repeat(gemm.scales, group, axis=1)).T * scale + np.abs(gemm.bias)
    assert (np.abs(got - want) <= (k + 8) * EPS * magnitude).all()


def test_a_scale_far_from_one_does_not_overflow_on_the_way() -> None:
    """scale · sum would overflow fp32 where scale · sum · w_scale does not."""
    gemm = Gemm(np.full((1, 128), 7, np.int8), np.full((1, 1), 1e-6, np.float32), np.zeros(1, np.float32))
    q, scale = np.full((1, 128), 7, np.int8), np.full((1, 1), 1e36, np.float32)
    got = run(gemm_model(gemm), q=q, scale=scale)["y"]
    np.testing.assert_allclose(got, 49 * 128 * 1e30, rtol=1e-6)
    np.testing.assert_array_equal(got, reference.w4a4_gemm(q, scale, gemm.codes, gemm.scales, gemm.bias))


@pytest.mark.parametrize("opset", OPSETS)
def test_models_pass_the_full_checker_and_run_at_every_opset(opset: int) -> None:
    rng = np.random.default_rng(opset)
    x, left, right = exact_case(rng, 8, 32, 1, (2, 3))
    for packed, layout, dtype, groups in [
        (False, "plain", ir.DataType.FLOAT, 1),
        (True, "plain", ir.DataType.FLOAT16, 4),
        (False, "k128", ir.DataType.BFLOAT16, 1),
    ]:
        gemm = Gemm.random(rng, 12, 256, groups)
        model = flat_quantize_model(
            left, right, 0.9, 256, lead=["batch", "tokens"], dtype=dtype, packed=packed, opset=opset, gemms=[gemm], layout=layout
        )
        onnx.checker.check_model(proto(model), full_check=True)
        got = run(model, x=x)
        q, scale = reference.flat_quantize(typed(x, dtype), left, right, 0.9, packed=packed)
        np.testing.assert_array_equal(got["q"], q)
        codes = reference.unpack_rows(q) if packed else q
        want = reference.w4a4_gemm(codes, scale, gemm.codes, gemm.scales, gemm.bias, dtype=DTYPES[dtype]).astype(np.float32)
        np.testing.assert_allclose(got["y0"], want, rtol=0 if groups == 1 else 1e-2, atol=0 if groups == 1 else 1e-2)


def test_inferred_shapes_agree_with_the_constructors() -> None:
    gemm = Gemm.random(np.random.default_rng(0), 12, 128)
    model = flat_quantize_model(
        np.eye(8), np.eye(16), 1.0, 128, lead=["batch", "tokens"], dtype=ir.DataType.FLOAT16, packed=True, gemms=[gemm]
    )
    declared = {node.name: [(value.dtype, str(value.shape)) for value in node.outputs] for node in model.graph}
    assert declared["quantize"] == [(ir.DataType.INT8, "[batch,tokens,64]"), (ir.DataType.FLOAT, "[batch,tokens,1]")]
    assert declared["gemm0"] == [(ir.DataType.FLOAT16, "[batch,tokens,12]")]
    inferred = onnx.shape_inference.infer_shapes(proto(model), strict_mode=True, data_prop=True)
    assert [d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim[2:]] == [64]
    gated = flat_quantize_model(np.eye(8), np.eye(16), 1.0, 128, lead=["batch"], packed=True, gate=1)
    assert [(v.dtype, str(v.shape)) for v in gated.graph.outputs] == [(ir.DataType.INT8, "[batch,64]"), (ir.DataType.FLOAT, "[batch,1]")]
    onnx.shape_inference.infer_shapes(proto(gated), strict_mode=True, data_prop=True)


def test_several_nodes_share_one_body() -> None:
    rng = np.random.default_rng(4)
    x, left, right = exact_case(rng, 4, 8, 1, (6,))
    gemms = [Gemm.random(rng, n, 32, groups) for n, groups in ((3, 1), (7, 4), (1, 1))]
    model = flat_quantize_model(left, right, 1.0, 32, gemms=gemms)
    assert list(model.functions) == [("fqonnx", "FlatQuantize", ""), ("fqonnx", "W4A4Gemm", "")]
    got = run(model, x=x)
    q, scale = reference.flat_quantize(x, left, right, 1.0)
    for index, gemm in enumerate(gemms):
        want = reference.w4a4_gemm(q, scale, gemm.codes, gemm.scales, gemm.bias)
        np.testing.assert_allclose(got[f"y{index}"], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["FlatQuantize", "SiluMulFlatQuantize", "RmsNormFlatQuantize", "AddRmsNormFlatQuantize", "W4A4Gemm"])
def test_a_body_has_unique_names_and_standard_ops_at_one_opset_only(op: str) -> None:
    function = function_for(op, 23)
    names = [node.name for node in function]
    assert len(set(names)) == len(names)
    assert {node.domain for node in function} == {""}
    assert function.opset_imports == {"": 23}
    assert function_for(op, 23) is not function


@pytest.mark.parametrize("opset", [20, 26])
def test_an_opset_without_a_proven_body_is_refused(opset: int) -> None:
    with pytest.raises(ModelError, match=f"opset {opset} has no fqonnx ops: export the model at opset 21 to 25"):
        function_for("FlatQuantize", opset)


def test_add_functions_reports_what_it_did() -> None:
    model = flat_quantize_model(NONE, NONE, 1.0, 4)
    assert not add_functions(model)
    del model.opset_imports["fqonnx"]
    assert add_functions(model)
    assert model.opset_imports["fqonnx"] == 1
    plain = empty_model([ir.val("x", ir.DataType.FLOAT, [1])])
    assert not add_functions(plain)
    assert "fqonnx" not in plain.opset_imports


def test_add_functions_finds_calls_in_subgraphs_and_functions() -> None:
    def quantize() -> ir.Node:
        x = ir.val("x", ir.DataType.FLOAT, [2, 4])
        return flat_quantize_node(x, *(ir.val(name, ir.DataType.FLOAT) for name in ("left", "right", "clip")), name="quantize")

    inner = quantize()
    branch = ir.Graph([], list(inner.outputs), nodes=[inner], name="branch")
    outer = empty_model([ir.val("condition", ir.DataType.BOOL, [])])
    outer.graph.append(ir.node("If", [outer.graph.inputs[0]], {"then_branch": branch}, num_outputs=2))
    assert add_functions(outer)
    assert ("fqonnx", "FlatQuantize", "") in outer.functions

    node = quantize()
    function = ir.Function("local", "wrapper", graph=ir.Graph(list(node.inputs), node.outputs, nodes=[node]), attributes=[])
    wrapping = empty_model([])
    wrapping.functions[function.identifier()] = function
    assert add_functions(wrapping)
    assert ("fqonnx", "FlatQuantize", "") in wrapping.functions
    assert function.opset_imports["fqonnx"] == 1


def test_inlined_bodies_compute_the_same_under_names_of_their_calls() -> None:
    rng = np.random.default_rng(8)
    gemms = [Gemm.random(rng, 3, 128, 4), Gemm.random(rng, 5, 128), Gemm.random(rng, 3, 128, 4)]
    x = rng.normal(size=(6, 128)).astype(np.float32)
    model = flat_quantize_model(
        np.eye(8), np.eye(16), 0.9, 128, dtype=ir.DataType.FLOAT16, packed=True, opset=23, gemms=gemms, layout="k128"
    )
    before = run(model, x=x)
    initializers = dict(model.graph.initializers)
    assert inline_bodies(model)
    assert not model.functions
    assert "fqonnx" not in model.opset_imports
    assert {node.domain for node in model.graph} == {""}
    assert dict(model.graph.initializers) == initializers
    names = [node.name or "" for node in model.graph]
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names if "/" in name} == {"quantize", "gemm0", "gemm1", "gemm2"}
    assert [value.name for value in model.graph.outputs] == ["q", "scale", "y0", "y1", "y2"]
    onnx.checker.check_model(proto(model), full_check=True)
    after = run(model, x=x)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, strict=True)
    assert not inline_bodies(model)


def test_an_op_that_does_not_exist_is_refused() -> None:
    model = empty_model([ir.val("x", ir.DataType.FLOAT, [1])])
    model.graph.append(ir.node("W2A2Gemm", [model.graph.inputs[0]], domain="fqonnx"))
    with pytest.raises(ModelError, match=r"there is no op fqonnx.W2A2Gemm: this version has FlatQuantize, .*W4A4Gemm"):
        add_functions(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_the_qdq_form_gives_the_activation_back_in_its_type(dtype: ir.DataType) -> None:
    rng = np.random.default_rng(5)
    x, left, right = exact_case(rng, 4, 8, 1, (3, 5))
    model = flat_quantize_model(left, right, 0.8, 32, lead=["batch", "tokens"], dtype=dtype, bits=8)
    graph = model.graph
    nodes = dequantize_nodes(*graph.outputs[:2], dtype=dtype, name="activation")
    graph.extend(nodes)
    activation = nodes[-1].outputs[0]
    assert (activation.name, activation.dtype, str(activation.shape)) == ("activation.dequantized", dtype, "[batch,tokens,32]")
    graph.outputs[:] = [cast(graph, activation, ir.DataType.FLOAT, "y")]
    onnx.checker.check_model(proto(model), full_check=True)
    (got,) = run(model, x=x).values()
    q, scale = reference.flat_quantize(typed(x, dtype), left, right, 0.8, bits=8)
    np.testing.assert_array_equal(got, (q.astype(np.float32) * scale).astype(DTYPES[dtype]).astype(np.float32))


def node_inputs(dtype: ir.DataType = ir.DataType.FLOAT, k: int | None = 6) -> list[ir.Value]:
    return [ir.val("x", dtype, ["batch", k]), *(ir.val(name, ir.DataType.FLOAT) for name in ("left", "right", "clip"))]


def test_constructors_refuse_what_the_ops_cannot_do() -> None:
    with pytest.raises(ModelError, match=r"the input of fq is INT32, not FLOAT, FLOAT16 or BFLOAT16: .*--keep"):
        flat_quantize_node(*node_inputs(ir.DataType.INT32), name="fq")
    with pytest.raises(ModelError, match="rows of 7 4-bit codes cannot be packed two a byte: use the int8 container"):
        flat_quantize_node(*node_inputs(k=7), packed=True, name="fq")
    with pytest.raises(ModelError, match="rows of 6 8-bit codes cannot be packed two a byte"):
        flat_quantize_node(*node_inputs(), bits=8, packed=True, name="fq")
    with pytest.raises(ValueError, match="4 or 8 bits, not 5"):
        flat_quantize_node(*node_inputs(), bits=5, name="fq")
    with pytest.raises(ModelError, match="the input of fq has 7 columns, which are no two halves"):
        silu_mul_flat_quantize_node(*node_inputs(k=7), name="fq")
    with pytest.raises(ModelError, match="rows of 3 4-bit codes cannot be packed two a byte"):
        silu_mul_flat_quantize_node(*node_inputs(), packed=True, name="fq")
    with pytest.raises(ModelError, match=r"the input of fq is INT32"):
        silu_mul_flat_quantize_node(*node_inputs(ir.DataType.INT32), name="fq")
    x, *factors = node_inputs(ir.DataType.FLOAT16)
    for gamma, residual in ((ir.DataType.FLOAT, ir.DataType.FLOAT16), (ir.DataType.FLOAT16, ir.DataType.FLOAT)):
        with pytest.raises(ModelError, match="fq adds and multiplies FLOAT to FLOAT16"):
            rms_norm_flat_quantize_node(x, ir.val("gamma", gamma), *factors, residual=ir.val("r", residual), epsilon=1e-5, name="fq")
    with pytest.raises(ValueError, match="gate is 0 or 1, not 2"):
        silu_mul_flat_quantize_node(*node_inputs(), gate=2, name="fq")
    q, scale, w = ir.val("q", ir.DataType.INT8), ir.val("s", ir.DataType.FLOAT), ir.val("w", ir.DataType.INT4, [4, 192])
    rest = [w, ir.val("w_scale", ir.DataType.FLOAT), ir.val("bias", ir.DataType.FLOAT)]
    with pytest.raises(ModelError, match="rows of 192 codes do not fit a weight layout of blocks of 128: use layout 'plain'"):
        w4a4_gemm_node(q, scale, *rest, dtype=ir.DataType.FLOAT, layout="k128", name="g")
    with pytest.raises(ModelError, match="unknown weight layout 'k64': choose from plain, k128"):
        w4a4_gemm_node(q, scale, *rest, dtype=ir.DataType.FLOAT, layout="k64", name="g")
    with pytest.raises(ModelError, match="the output of g is INT8"):
        w4a4_gemm_node(q, scale, *rest, dtype=ir.DataType.INT8, name="g")


def test_shapes_stay_unknown_where_the_input_has_none() -> None:
    x = ir.val("x", ir.DataType.FLOAT16)
    q, scale = flat_quantize_node(x, *node_inputs()[1:], packed=True, name="fq").outputs
    assert q.shape is None
    assert scale.shape is None
    q, _ = flat_quantize_node(*node_inputs(k=None), packed=True, name="fq").outputs
    assert q.shape is not None
    assert q.shape.rank() == 2
    assert q.shape.is_dynamic(1)


def test_references_refuse_shapes_that_do_not_fit() -> None:
    x = np.ones((2, 7), np.float32)
    for gate_up, gate in ((x, 0), (np.ones((2, 8), np.float32), 2)):
        with pytest.raises(ValueError, match="is no gate"):
            reference.silu_mul(gate_up, gate=gate)
    with pytest.raises(ValueError, match=r"gamma float32\(6,\) does not fit rows"):
        reference.rms_norm(x, np.ones(6, np.float32), epsilon=1e-5)
    with pytest.raises(ValueError, match=r"residual float16\(2, 7\) does not fit"):
        reference.add_rms_norm_flat_quantize(x, x.astype(np.float16), np.ones(7, np.float32), NONE, NONE, 1.0, epsilon=1e-5)
    with pytest.raises(ValueError, match="do not transform rows of 7"):
        reference.flat_quantize(x, np.eye(2, dtype=np.float32), NONE, 1.0)
    with pytest.raises(ModelError, match="cannot be packed"):
        reference.flat_quantize(x, NONE, NONE, 1.0, packed=True)
    gemm = Gemm.random(np.random.default_rng(0), 4, 8, 2)
    for codes, bias in ((np.zeros((2, 6), np.int8), gemm.bias), (np.zeros((2, 8), np.int8), gemm.bias[:3])):
        with pytest.raises(ValueError, match="do not fit"):
            reference.w4a4_gemm(codes, np.ones((2, 1), np.float32), gemm.codes, gemm.scales, bias)


def test_weights_may_be_fed_at_run_time() -> None:
    """The body does not depend on initializers: a runtime may hand it any value."""
    rng = np.random.default_rng(6)
    gemm = Gemm.random(rng, 5, 12, 3)
    q, scale = ir.val("q", ir.DataType.INT8, ["b", 12]), ir.val("scale", ir.DataType.FLOAT, ["b", 1])
    model = empty_model([q, scale])
    y = append_gemm(model.graph, q, scale, gemm, dtype=ir.DataType.FLOAT, name="gemm")
    model.graph.outputs.append(y)
    for name in ("gemm.w_scale", "gemm.bias"):
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    add_functions(model)
    codes = rng.integers(-8, 8, (4, 12)).astype(np.int8)
    row_scale = np.ones((4, 1), np.float32)
    (got,) = run(model, q=codes, scale=row_scale, **{"gemm.w_scale": gemm.scales, "gemm.bias": gemm.bias}).values()
    np.testing.assert_allclose(got, reference.w4a4_gemm(codes, row_scale, gemm.codes, gemm.scales, gemm.bias), rtol=1e-5, atol=1e-5)
