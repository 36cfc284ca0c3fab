"""Systems of linear equations in batches, by ``torch.linalg``.

On a CPU one matrix at a time: the batched LU factorization of torch 2.13 (oneMKL 2024.2) fails, or does not return, on several threads for
matrices of more than some 130 rows. On a GPU in blocks: there the batched one of larger matrices waits for the host, which no CUDA graph
takes.
"""

from __future__ import annotations

import torch

BLOCK = 128
"""Rows up to which a GPU factors a batch without the host."""


def cayley(raw: torch.Tensor) -> torch.Tensor:
    """``(I + A)⁻¹ (I - A)``, orthogonal: ``A`` is skew-symmetric with the upper triangle of ``raw`` ``[batch, n, n]``."""
    skew = raw.triu(1)
    skew = skew - skew.mT
    eye = torch.eye(raw.shape[-1], dtype=raw.dtype, device=raw.device)
    return 2 * inverse_by_blocks(eye + skew, len(eye) if raw.device.type == "cpu" else BLOCK) - eye


def inverse(a: torch.Tensor) -> torch.Tensor:
    """``a⁻¹`` of ``[batch, n, n]``.

    Raises:
        RuntimeError: A matrix is singular.
    """
    if a.device.type != "cpu":
        inverted: torch.Tensor = torch.linalg.inv(a)
        return inverted
    return torch.stack([torch.linalg.inv(one) for one in a])


def inverse_by_blocks(a: torch.Tensor, block: int) -> torch.Tensor:
    """``a⁻¹`` where the symmetric part of each matrix is positive definite, which its blocks' and Schur complements' then are too.

    So no block is singular, and whether it is need not be checked, which on a GPU would wait for the result.

    Args:
        a: ``[batch, n, n]``.
        block: Rows up to which a matrix is factored whole.
    """
    n = a.shape[-1]
    if n <= block:
        eye = torch.eye(n, dtype=a.dtype, device=a.device)
        if a.device.type == "cpu":
            return torch.stack([torch.linalg.solve_ex(one, eye)[0] for one in a])
        solved: torch.Tensor = torch.linalg.solve_ex(a, eye.expand_as(a))[0]
        return solved
    half = -(-n // 2)
    upper, lower = a[:, :half], a[:, half:]
    first = inverse_by_blocks(upper[..., :half], block)
    across, back = first @ upper[..., half:], lower[..., :half] @ first
    last = inverse_by_blocks(lower[..., half:] - lower[..., :half] @ across, block)
    shared = across @ last
    return torch.cat([torch.cat([first + shared @ back, -shared], -1), torch.cat([-last @ back, last], -1)], -2)
