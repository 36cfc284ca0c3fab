"""FlatQuant with the channel scale that it starts from: only the Kronecker pair and the clips are trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from fqonnx.calib.transforms.flatquant import FlatQuant, LearnedPair, Training

if TYPE_CHECKING:
    from fqonnx.calib.transforms.base import Problem


class FlatQuantFixed(FlatQuant):
    """The scale is SmoothQuant's (arXiv 2211.10438, equation 4), with the share of the activations that FlatQuant starts from.

    The diagonal matrix of the paper (arXiv 2410.09426, section 3.1, "per-channel scaling") held instead of learned: K parameters less
    that follow the calibration data.
    """

    training: ClassVar[Training] = replace(FlatQuant.training, learns_scale=False)

    def learned(self, problem: Problem) -> LearnedPair:
        """See ``FlatQuant.learned``."""
        pair = super().learned(problem)
        pair.log_scale.requires_grad_(False)
        return pair
