"""Randomised Hadamard rotation of any size, as a Kronecker pair (QuaRot, arXiv 2404.00456, section 3)."""

from __future__ import annotations

from typing import ClassVar

import torch

from fqonnx.calib.kron import factor
from fqonnx.calib.transforms.base import FittedTransform, Problem


def hadamard(n: int, generator: torch.Generator) -> torch.Tensor:
    """An orthogonal ``[n, n]`` fp32 matrix that mixes all channels, with random signs.

    Sylvester's construction covers the power of two in ``n``; the odd rest is a random orthogonal matrix (QR of a Gaussian, signs
    fixed by R's diagonal, so that it is Haar distributed), since Hadamard matrices exist only for 1, 2 and multiples of 4.
    """
    odd = n
    while odd % 2 == 0:
        odd //= 2
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    for _ in range((n // odd).bit_length() - 1):
        matrix = torch.kron(matrix, step)
    if odd > 1:
        q, r = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
        matrix = torch.kron((q * r.diagonal().sign()).contiguous(), matrix)
    signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) * 2 - 1
    return (signs[:, None] * matrix).float()


class Hadamard:
    """A data-free rotation: spreads every outlier over all channels."""

    needs_tokens: ClassVar[bool] = False
    has_pair: ClassVar[bool] = True

    def fit(self, problem: Problem) -> FittedTransform:
        """A random rotation drawn from the problem's seed."""
        generator = torch.Generator().manual_seed(problem.seed)
        n1, n2 = factor(problem.weight.shape[1], problem.width)
        device = problem.weight.device
        return FittedTransform(left=hadamard(n1, generator).to(device), right=hadamard(n2, generator).to(device))
