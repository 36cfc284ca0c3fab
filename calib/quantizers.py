"""Symmetric round-to-nearest quantization in torch, with a straight-through gradient for training."""

from __future__ import annotations

from typing import Any

import torch


def levels(bits: int) -> tuple[int, int]:
    """Smallest and largest code of a symmetric ``bits``-bit integer: ``-8, 7`` for 4."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def positive(scale: torch.Tensor) -> torch.Tensor:
    """``scale`` with 1 where it is zero or underflowed: a row without magnitude quantizes to zeros under any scale."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def row_scale(x: torch.Tensor, bits: int, clip: torch.Tensor | float = 1.0) -> torch.Tensor:
    """``clip · max|row| / qmax`` of ``x`` ``[.., K]`` as ``[.., 1]``; 1 for an all-zero row."""
    return positive(x.abs().amax(-1, keepdim=True) * clip / levels(bits)[1])


def codes(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """``clamp(round_half_even(x / scale))`` in ``x``'s dtype."""
    low, high = levels(bits)
    return (x / scale).round_().clamp_(low, high)


class _StraightThrough(torch.autograd.Function):
    """Quantize-dequantize; the gradient passes where nothing is clamped, and the scale gets its exact (LSQ, arXiv 1902.08153) gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
        low, high = levels(bits)
        ratio = x / scale
        rounded = ratio.round()
        q = rounded.clamp(low, high)
        inside = rounded == q
        # d(q · scale)/d(scale) = q - ratio inside the range, q where clamped.
        ctx.save_for_backward(inside, torch.where(inside, q - ratio, q))
        return q * scale

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        inside, slope = ctx.saved_tensors
        (grad,) = grads
        return grad * inside, (grad * slope).sum(-1, keepdim=True), None


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantize-dequantize ``x`` ``[.., K]`` with ``scale`` ``[.., 1]``, differentiable in both by the straight-through estimator."""
    out: torch.Tensor = _StraightThrough.apply(x, scale, bits)  # type: ignore[no-untyped-call]  # untyped in torch
    return out
