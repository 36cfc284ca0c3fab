"""Systems of linear equations in batches, by ``torch.linalg``.

On a CPU one matrix at a time: the batched LU factorization of torch 2.13 (oneMKL 2024.2) fails, or does not return, on several threads for
matrices of more than some 130 rows.
"""

from __future__ import annotations

import torch


def solve(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a⁻¹ b`` of ``[batch, n, n]`` and ``[batch, n, m]``, differentiable.

    Whether ``a`` is singular is not checked, which on a GPU would wait for the result.
    """
    if a.device.type != "cpu":
        solved: torch.Tensor = torch.linalg.solve_ex(a, b)[0]
        return solved
    return torch.stack([torch.linalg.solve_ex(one, other)[0] for one, other in zip(a, b, strict=True)])


def inverse(a: torch.Tensor) -> torch.Tensor:
    """``a⁻¹`` of ``[batch, n, n]``.

    Raises:
        RuntimeError: A matrix is singular.
    """
    if a.device.type != "cpu":
        inverted: torch.Tensor = torch.linalg.inv(a)
        return inverted
    return torch.stack([torch.linalg.inv(one) for one in a])
