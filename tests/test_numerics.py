from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqonnx.numerics import kron_apply, kron_fold
from tests.rewriting import matrix


@settings(max_examples=60, deadline=None)
@given(
    n1=st.integers(1, 9),
    n2=st.integers(1, 9),
    rows=st.integers(0, 5),
    out=st.integers(1, 6),
    scaled=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_folding_leaves_the_product_as_it_was(n1: int, n2: int, rows: int, out: int, scaled: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = matrix(rng, n1), matrix(rng, n2)
    x, w = rng.standard_normal((rows, n1 * n2)), rng.standard_normal((out, n1 * n2))
    c = np.exp2(rng.uniform(-4, 4, n1 * n2)) if scaled else None

    transformed = kron_apply(x if c is None else x / c, left.astype(np.float64), right.astype(np.float64))

    np.testing.assert_allclose(transformed @ kron_fold(w, left, right, c).T, x @ w.T, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(n1=st.integers(1, 6), n2=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_both_are_the_kronecker_product_written_out(n1: int, n2: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((n1, n1)) + 3 * np.eye(n1), rng.standard_normal((n2, n2)) + 3 * np.eye(n2)
    x, w, c = rng.standard_normal((2, 3, n1 * n2)), rng.standard_normal((4, n1 * n2)), rng.uniform(1, 2, n1 * n2)
    product = np.kron(left, right)

    np.testing.assert_allclose(kron_apply(x, left, right), x @ product, rtol=1e-9, atol=1e-9)
    if max(np.linalg.cond(left), np.linalg.cond(right)) < 1e4:
        np.testing.assert_allclose(kron_fold(w, left, right, c), w @ np.diag(c) @ np.linalg.inv(product).T, rtol=1e-6, atol=1e-6)


def test_dtype_and_singular_matrices() -> None:
    eye = np.eye(2, dtype=np.float32)
    assert kron_fold(np.ones((3, 4), np.float32), eye, eye).dtype == np.float32
    with pytest.raises(np.linalg.LinAlgError):
        kron_fold(np.ones((3, 4), np.float32), eye, np.zeros((2, 2), np.float32))
