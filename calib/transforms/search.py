"""The best of several channel scales, by the error of the quantized group's output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fqonnx.calib import moments
from fqonnx.calib.quantizers import codes, row_scale
from fqonnx.calib.transforms.base import FittedTransform, Problem
from fqonnx.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterable

TOKENS = 1024
"""Input rows that candidates are tried on."""

MAX_LOG_SCALE = 9.21
"""Channel scales stay within 1e-4 .. 1e4: fp16 activations have to bear the division."""


def normalized(log_scale: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Channel scales ``[K]`` from their logarithms: 1 in channels that are not alive, a geometric mean of 1 over the others.

    Normalising changes nothing in exact arithmetic, for weights and activations are scaled per row, but a single outlier then cannot push
    fp16 activations out of range; what is still beyond 1e-4 .. 1e4 is held there.
    """
    if not bool(alive.any()):
        return torch.ones_like(log_scale)
    log = torch.where(alive, log_scale - log_scale[alive].mean(), 0.0)
    return log.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp()


def best_scale(problem: Problem, candidates: Iterable[torch.Tensor]) -> FittedTransform:
    """The channel scale of the smallest output error, with input and weights rounded to nearest in the problem's scheme.

    Each linear counts by its error relative to its own output. Candidates that leave the range of fp32 are passed over.

    Args:
        problem: The group, with ``tokens``.
        candidates: Channel scales ``[K]``, at least one of which leaves everything finite.

    Raises:
        CalibrationError: The tokens hold NaN or Inf.
    """
    assert problem.tokens is not None
    if not bool(torch.isfinite(problem.tokens).all()):
        raise CalibrationError("the calibration activations hold NaN or Inf: check the model in float first")
    x = problem.tokens[:: max(len(problem.tokens) // TOKENS, 1)][:TOKENS]
    y = x @ problem.weight.mT
    best, smallest = FittedTransform(), float("inf")
    for scale in candidates:
        fitted = FittedTransform(channel_scale=scale)
        found = moments.quantize_input(moments.forward(fitted, x), problem.scheme.activation_bits, 1.0) @ _rounded(fitted, problem).mT
        error = moments.relative_error(found - y, y, problem.out_features)
        if error < smallest:
            best, smallest = fitted, error
    return best


def _rounded(fitted: FittedTransform, problem: Problem) -> torch.Tensor:
    """The folded weight, rounded to nearest as plainly as can be: ``[N, K]``."""
    weight, bits = moments.fold(fitted, problem.weight), problem.scheme.weight_bits
    rows = weight.reshape(-1, problem.group_size or weight.shape[1])
    scale = row_scale(rows, bits)
    return (codes(rows, scale, bits) * scale).reshape(weight.shape)
