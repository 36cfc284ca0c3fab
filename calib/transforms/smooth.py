"""SmoothQuant's channel scale (arXiv 2211.10438, equation 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fqonnx.calib.transforms.search import best_scale, normalized
from fqonnx.errors import CalibrationError

if TYPE_CHECKING:
    import torch

    from fqonnx.calib.transforms.base import FittedTransform, Problem

ALPHAS = tuple(i / 10 for i in range(11))
"""Shares of the activations that are tried."""


def channel_scale(absmax: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """``max|x|^alpha / max|w|^(1-alpha)`` per channel, ``[K]``: what the input is divided by.

    A channel that is dead on either side says nothing about how to share its range: it keeps the scale 1. The others are ``normalized``.
    """
    w_max = weight.abs().amax(0)
    log = alpha * absmax.clamp_min(1e-30).log() - (1 - alpha) * w_max.clamp_min(1e-30).log()
    return normalized(log, (absmax > 0) & (w_max > 0))


class Smooth:
    """Moves magnitude from activations to weights channel by channel.

    How much is chosen for each group, by the error of its quantized output: the paper has one alpha for a model, 0.5 for most, and
    says to search it; per layer as here it is Intel Neural Compressor's ``alpha="auto"``.
    """

    needs_tokens: ClassVar[bool] = True
    has_pair: ClassVar[bool] = False

    def fit(self, problem: Problem) -> FittedTransform:
        """The channel scale of the group's observed absmax.

        Raises:
            CalibrationError: The problem carries no statistics, or they hold NaN or Inf.
        """
        absmax = problem.absmax
        if problem.tokens is None or absmax is None:
            raise CalibrationError("the smooth transform needs calibration statistics: give calibration data")
        return best_scale(problem, (channel_scale(absmax, problem.weight, alpha) for alpha in ALPHAS))
