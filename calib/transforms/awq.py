"""AWQ's channel scale (Lin et al., arXiv 2306.00978, section 3.2): channels that activations make important are rounded more finely."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fqonnx.calib.transforms.search import best_scale, normalized
from fqonnx.errors import CalibrationError

if TYPE_CHECKING:
    from fqonnx.calib.transforms.base import FittedTransform, Problem

ALPHAS = tuple(i / 20 for i in range(20))
"""Exponents that are tried, the paper's grid; 0 is no scale at all."""


class Awq:
    """``s = mean|x|^alpha`` per channel, weights times ``s`` and input over ``s``; alpha by the smallest output error (equation 5).

    The paper rounds weights only. Where the scheme rounds activations too, the error that alpha is chosen by includes theirs. The other
    half of the method, clipping each scale's weights by the same error, is the weight quantizer of this name.
    """

    needs_tokens: ClassVar[bool] = True
    has_pair: ClassVar[bool] = False

    def fit(self, problem: Problem) -> FittedTransform:
        """Search alpha on the problem's tokens.

        Raises:
            CalibrationError: The problem carries no tokens, or they hold NaN or Inf.
        """
        if problem.tokens is None:
            raise CalibrationError("the awq transform needs calibration statistics: give calibration data")
        magnitude = problem.tokens.double().abs().mean(0).float()  # fp64: the sum of magnitudes near fp32's largest overflows
        alive = magnitude > 0
        log = magnitude.clamp_min(1e-30).log()
        return best_scale(problem, (normalized(alpha * log, alive) for alpha in ALPHAS))
