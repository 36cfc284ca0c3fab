"""SmoothQuant's channel scale (arXiv 2211.10438, equation 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fqonnx.calib.transforms.base import FittedTransform, Problem
from fqonnx.errors import CalibrationError

if TYPE_CHECKING:
    import torch


def channel_scale(absmax: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """``max|x|^alpha / max|w|^(1-alpha)`` per channel, ``[K]``: what the input is divided by.

    A channel that is dead on either side says nothing about how to share its range: it keeps the scale 1. Scales are normalised to
    a geometric mean of 1 and held within 1e-4 .. 1e4, so that a single outlier cannot push fp16 activations out of range.
    """
    import torch

    w_max = weight.abs().amax(0)
    alive = (absmax > 0) & (w_max > 0)
    if not bool(alive.any()):
        return torch.ones_like(absmax)
    log = torch.where(alive, alpha * absmax.clamp_min(1e-30).log() - (1 - alpha) * w_max.clamp_min(1e-30).log(), 0.0)
    log = torch.where(alive, log - log[alive].mean(), 0.0)
    return log.clamp(-9.21, 9.21).exp()


class Smooth:
    """Moves magnitude from activations to weights channel by channel, half each way (alpha 0.5, the paper's default)."""

    needs_tokens: ClassVar[bool] = True
    alpha: ClassVar[float] = 0.5

    def fit(self, problem: Problem) -> FittedTransform:
        """The channel scale of the group's observed absmax.

        Raises:
            CalibrationError: The problem carries no statistics.
        """
        if problem.absmax is None:
            raise CalibrationError("the smooth transform needs calibration statistics: give calibration data")
        return FittedTransform(channel_scale=channel_scale(problem.absmax, problem.weight, self.alpha))
