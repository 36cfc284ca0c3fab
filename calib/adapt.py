"""A group's transform taken over to another scheme: which directions are loud does not depend on how many bits there are.

Fitting transforms is most of the time of a calibration. Where the same group is solved in several schemes, to see which it needs, one fit
serves them all; clips, which do depend on the bits, are chosen anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fqonnx.calib import moments
from fqonnx.calib.transforms.base import FittedTransform, Problem

if TYPE_CHECKING:
    from fqonnx.calib.solution import Array, GroupSolution

CLIPS = tuple(1.0 - 0.025 * i for i in range(17))
"""Activation clips that are tried: 1.0 down to 0.6."""

TOKENS = 1024
"""Rows that they are tried on."""


def adapt(base: GroupSolution, problem: Problem) -> FittedTransform:
    """The transform of ``base``, with the activation clip of the smallest output error for the problem's bits; 1 without tokens.

    Weight clips are left to the weight quantizer.
    """

    def tensor(array: Array | None) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(array).to(problem.weight.device)

    fitted = FittedTransform(tensor(base.channel_scale), tensor(base.left), tensor(base.right))
    bits = problem.scheme.activation_bits
    if problem.tokens is None or bits >= 16:
        return fitted
    t, weight = moments.forward(fitted, problem.tokens[:TOKENS]), moments.fold(fitted, problem.weight)
    errors = [float(((moments.quantize_input(t, bits, clip) - t) @ weight.mT).double().square().sum()) for clip in CLIPS]
    clip = CLIPS[min(range(len(CLIPS)), key=errors.__getitem__)]
    return FittedTransform(fitted.channel_scale, fitted.left, fitted.right, clip)
