import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fqonnx.calib import kron


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, (1, 1)),
        (7, (1, 7)),
        (64, (4, 16)),
        (96, (3, 32)),
        (384, (3, 128)),
        (512, (4, 128)),
        (1536, (12, 128)),
        (4096, (32, 128)),
        (4099, (1, 4099)),
        (11008, (86, 128)),
        (14336, (112, 128)),
        (28672, (128, 224)),
        (2 * 131, (2, 131)),
    ],
)
def test_factor_takes_the_widest_right_factor_within_bounds(k: int, expected: tuple[int, int]) -> None:
    assert kron.factor(k) == expected


@pytest.mark.parametrize(
    ("k", "expected"),
    [(64, (2, 32)), (384, (2, 192)), (512, (2, 256)), (1536, (6, 256)), (4096, (16, 256)), (11008, (43, 256)), (14336, (56, 256))],
)
def test_a_wider_right_factor_is_taken_where_it_is_asked_for(k: int, expected: tuple[int, int]) -> None:
    assert kron.factor(k, 256) == expected


@given(st.integers(1, 5000))
def test_factor_always_ends_with_a_pair(k: int) -> None:
    n1, n2 = kron.factor(k)
    assert 1 <= n1 <= n2
    assert n1 * n2 == k
    allowed = [
        (d, k // d) for d in range(1, n2 + 1) if k % d == 0 and d * d <= k and k // d <= kron.WIDTH and 8 * (d**2 + (k // d) ** 2) <= k**2
    ]
    cheapest = next((d, k // d) for d in range(math.isqrt(k), 0, -1) if k % d == 0)
    assert (n1, n2) == max(allowed, key=lambda pair: pair[1], default=cheapest)


def test_factor_refuses_zero() -> None:
    with pytest.raises(ValueError, match="cannot factor 0"):
        kron.factor(0)


@settings(max_examples=40, deadline=None)
@given(n1=st.integers(1, 9), n2=st.integers(1, 9), rows=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_apply_is_the_kronecker_product(n1: int, n2: int, rows: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, n, generator=g, dtype=torch.float64) for n in (n1, n2))
    x = torch.randn(rows, n1 * n2, generator=g, dtype=torch.float64)
    torch.testing.assert_close(kron.apply(x, left, right), x @ torch.kron(left, right))


@settings(max_examples=40, deadline=None)
@given(n1=st.integers(1, 9), n2=st.integers(1, 9), scaled=st.booleans(), seed=st.integers(0, 2**31))
def test_fold_undoes_the_transform(n1: int, n2: int, scaled: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.eye(n, dtype=torch.float64) * 2 + 0.3 * torch.randn(n, n, generator=g, dtype=torch.float64) / n for n in (n1, n2))
    weight, x = (torch.randn(4, n1 * n2, generator=g, dtype=torch.float64) for _ in range(2))
    scale = torch.rand(n1 * n2, generator=g, dtype=torch.float64) + 0.1 if scaled else None
    t = kron.apply(x if scale is None else x / scale, left, right)
    torch.testing.assert_close(t @ kron.fold(weight, left, right, scale).mT, x @ weight.mT)
