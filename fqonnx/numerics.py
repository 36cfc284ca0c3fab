"""The algebra of a Kronecker transform in numpy: what happens to the input online, and to the weight ahead of time.

With ``x`` reshaped to ``X [n1, n2]`` a row is transformed to ``T = leftᵀ · X · right``, which is ``vec(T) = vec(X) · (left ⊗ right)``
(FlatQuant, arXiv 2410.09426, equation 3). The weight takes the inverse, so that the product is unchanged:
``(x / c) (left ⊗ right) · (W diag(c) (left ⊗ right)⁻ᵀ)ᵀ = x Wᵀ``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def kron_apply(x: Array, left: Array, right: Array) -> Array:
    """``x · (left ⊗ right)`` without forming the Kronecker product.

    Args:
        x: ``[.., K]``.
        left: ``[n1, n1]``.
        right: ``[n2, n2]``, ``n1 * n2 == K``.

    Returns:
        ``[.., K]``, in the promoted dtype of the three.
    """
    folded = x.reshape(*x.shape[:-1], left.shape[0], right.shape[0])
    return (left.T @ (folded @ right)).reshape(x.shape)


def kron_fold(weight: Array, left: Array, right: Array, channel_scale: Array | None = None) -> Array:
    """The weight that undoes the transform: ``weight · diag(channel_scale) · (left ⊗ right)⁻ᵀ``.

    Solved in float64, so that the result is as good as the conditioning of ``left`` and ``right`` allows.

    Args:
        weight: ``[N, K]``.
        left: ``[n1, n1]``, invertible.
        right: ``[n2, n2]``, invertible, ``n1 * n2 == K``.
        channel_scale: ``[K]``, what the input is divided by before the transform; None is all ones.

    Returns:
        ``[N, K]`` in the dtype of ``weight``; a row reshaped to ``[n1, n2]`` is ``left⁻¹ · W · right⁻ᵀ``.

    Raises:
        numpy.linalg.LinAlgError: ``left`` or ``right`` is singular.
    """
    scaled = weight.astype(np.float64)
    if channel_scale is not None:
        scaled *= channel_scale
    folded = np.linalg.solve(left.astype(np.float64), scaled.reshape(-1, left.shape[0], right.shape[0]))
    return (folded @ np.linalg.inv(right.astype(np.float64)).T).reshape(weight.shape).astype(weight.dtype)
