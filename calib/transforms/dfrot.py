"""DFRot: a rotation refined on the rounding error of activations, massive ones weighted (Xiang and Zhang, arXiv 2412.00648)."""

from __future__ import annotations

from typing import ClassVar

import torch

from fqonnx.calib import kron, moments
from fqonnx.calib.transforms.base import FittedTransform, Problem
from fqonnx.calib.transforms.hadamard import Hadamard
from fqonnx.errors import CalibrationError

ROWS = 2048
"""Input rows that the rotation is refined on."""

STEPS = 50
"""Alternations; the paper's code takes 100, of which the last half changes little."""

GAMMA = 100.0
"""Weight of the error of a row with massive activations, the default of the paper's code; in the loss it is squared."""

MASSIVE = 1000.0
"""A row is massive where its largest magnitude is this many times its median one (Sun et al., arXiv 2402.17762, section 2)."""

CLIPS = tuple(1.0 - 0.05 * i for i in range(9))
"""Clips that are tried: 1.0 down to 0.6."""

CLIP_EVERY = 10
"""Alternations between two searches of the clip."""

MAX_REFINED = 512
"""Factors beyond this (K with a large prime in it) stay the random rotation they start as: a step costs n³."""


class DFRot:
    """A Kronecker pair of rotations, from the randomised Hadamard pair on.

    With rows ``x`` scaled to a root mean square of 1, as the norm before a group leaves them in the paper, it lessens
    ``L = Σ ‖x R - Q(x R)‖²`` over rows without massive activations ``+ γ²`` times the same over those with them. In turn, the rounded
    rows ``Q(x R)`` are held while the rotation that brings ``x`` nearest to them is found (orthogonal Procrustes, Schönemann 1966:
    ``U Vᵀ`` of the singular value decomposition of ``Σ xᵀ Q(x R)``), and rows are rounded anew. The paper refines one ``[K, K]`` matrix;
    here ``R = left ⊗ right`` and each factor has a Procrustes problem of its own while the other is held. Rounding follows the largest
    value of a row, so that an alternation may also go up: the best is kept. Weights and outputs play no part. The clip that rows are
    rounded with meanwhile is searched for the same loss now and then; which is used in the end is chosen by outputs, not here.
    """

    needs_tokens: ClassVar[bool] = True
    has_pair: ClassVar[bool] = True

    def fit(self, problem: Problem) -> FittedTransform:
        """Refine the rotation drawn from the problem's seed; where activations stay in float there is nothing to refine it on.

        Raises:
            CalibrationError: The problem carries no tokens, or they hold NaN or Inf.
        """
        if problem.tokens is None:
            raise CalibrationError("the dfrot transform needs calibration statistics: give calibration data")
        if not bool(torch.isfinite(problem.tokens).all()):
            raise CalibrationError("the calibration activations hold NaN or Inf: check the model in float first")
        start, bits = Hadamard().fit(problem), problem.scheme.activation_bits
        assert start.left is not None
        assert start.right is not None
        if bits >= 16:
            return start
        left, right = start.left, start.right
        rows = problem.tokens[:: max(len(problem.tokens) // ROWS, 1)][:ROWS]
        x = unit_rows(rows)
        weight = torch.where(massive(rows), GAMMA, 1.0)[:, None]
        best, smallest, clip = start, float("inf"), 1.0
        for step in range((problem.steps or STEPS) + 1):
            t = kron.apply(x, left, right)
            if step % CLIP_EVERY == 0:
                clip = min(CLIPS, key=lambda clip: _loss(t, bits, clip, weight))
            loss = _loss(t, bits, clip, weight)
            if loss < smallest:
                best, smallest = FittedTransform(left=left, right=right), loss
            left = _refined_left(x, left, right, weight, bits, clip)
            right = _refined_right(x, left, right, weight, bits, clip)
        return best


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows ``[T, K]`` scaled to a root mean square of 1; zeros stay."""
    power = x.double().square().mean(1, keepdim=True).sqrt()  # fp64: squares beyond 1e38 overflow fp32
    return torch.where(power > 0, x / power, torch.zeros_like(power)).float()


def massive(x: torch.Tensor) -> torch.Tensor:
    """Which rows of ``[T, K]`` have massive activations: the largest magnitude is more than ``MASSIVE`` times the median, ``[T]``.

    The median is that of channels that are not zero. The source also asks for a magnitude of 100, which depends on how a model is
    scaled; behind a norm it says nothing.
    """
    magnitude = x.abs()
    return magnitude.amax(1) > MASSIVE * magnitude.masked_fill(magnitude == 0, float("nan")).nanmedian(1).values


def _loss(t: torch.Tensor, bits: int, clip: float, weight: torch.Tensor) -> float:
    return float(((moments.quantize_input(t, bits, clip) - t) * weight).double().square().sum())


def _refined_left(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor, bits: int, clip: float) -> torch.Tensor:
    """The orthogonal ``L`` for which ``Lᵀ · (x · right)`` is nearest to the rounded rows, each row being ``[n1, n2]``."""
    n1, n2 = len(left), len(right)
    if n1 > MAX_REFINED:
        return left
    rounded = moments.quantize_input(kron.apply(x, left, right), bits, clip)
    given = (x.reshape(-1, n1, n2) @ right).transpose(0, 1).reshape(n1, -1)
    wanted = (rounded * weight.square()).reshape(-1, n1, n2).transpose(0, 1).reshape(n1, -1)
    return _nearest_rotation(given @ wanted.mT)


def _refined_right(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor, bits: int, clip: float) -> torch.Tensor:
    """The orthogonal ``R`` for which ``(leftᵀ · x) · R`` is nearest to the rounded rows."""
    n1, n2 = len(left), len(right)
    if n2 > MAX_REFINED:
        return right
    rounded = moments.quantize_input(kron.apply(x, left, right), bits, clip)
    given = (left.mT @ x.reshape(-1, n1, n2)).reshape(-1, n2)
    wanted = (rounded * weight.square()).reshape(-1, n2)
    return _nearest_rotation(given.mT @ wanted)


def _nearest_rotation(product: torch.Tensor) -> torch.Tensor:
    """The orthogonal ``R`` with the largest ``trace(Rᵀ · product)``, fp32 ``[n, n]``."""
    u, _, v = torch.linalg.svd(product.double())
    rotation: torch.Tensor = (u @ v).float()
    return rotation
