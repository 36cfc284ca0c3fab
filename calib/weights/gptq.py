"""GPTQ (Frantar et al., arXiv 2210.17323): rounds column by column and lets later columns make up for each rounding error."""

from __future__ import annotations

from typing import ClassVar

import torch

from fqonnx.calib.quantizers import codes
from fqonnx.calib.weights.rtn import search_scales
from fqonnx.errors import CalibrationError

BLOCK = 128
"""Columns whose updates are applied to the rest of the matrix in one product (the paper's lazy batch updates)."""


class Gptq:
    """GPTQ with activation order: columns in descending order of the Hessian's diagonal, scales fixed beforehand."""

    needs_hessian: ClassVar[bool] = True
    damping: ClassVar[float] = 0.01

    def quantize(
        self, weight: torch.Tensor, *, bits: int, group_size: int, hessian: torch.Tensor | None = None, clip: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``WeightQuantizer.quantize``.

        Scales are set before the first column is rounded ("static groups"), so that the column order and the scale groups are
        independent of each other.

        Raises:
            CalibrationError: No Hessian, or it holds NaN or Inf.
        """
        if hessian is None:
            raise CalibrationError("gptq needs calibration statistics: give calibration data or use --weights rtn")
        if not bool(torch.isfinite(hessian).all()):
            raise CalibrationError("the Hessian of the group's inputs holds NaN or Inf: check the model in float first")
        diagonal = hessian.diagonal()
        scales = search_scales(weight, bits=bits, group_size=group_size, importance=diagonal.clamp_min(0), clip=clip)
        per_column = scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
        order = torch.argsort(diagonal, descending=True, stable=True)
        q = _round_columns(weight[:, order].clone(), per_column[:, order], _inverse_factor(hessian, order, self.damping), bits)
        out = torch.empty_like(q)
        out[:, order] = q
        return out.to(torch.int8), scales


def _inverse_factor(hessian: torch.Tensor, order: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor of the damped inverse Hessian in column order; more damping where the Hessian is too close to singular."""
    h = hessian[order][:, order].double()
    mean = h.diagonal().mean().clamp_min(1e-12)
    eye = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    while True:
        chol, info = torch.linalg.cholesky_ex(h + damping * mean * eye)
        if not int(info):
            inverse = torch.cholesky_inverse(chol)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(info):
                factor: torch.Tensor = upper.float()
                return factor
        damping *= 10  # a Hessian of T < K tokens has rank T: the damping alone makes it definite


def _round_columns(w: torch.Tensor, scales: torch.Tensor, factor: torch.Tensor, bits: int) -> torch.Tensor:
    q = torch.empty_like(w)
    n_columns = w.shape[1]
    for start in range(0, n_columns, BLOCK):
        stop = min(start + BLOCK, n_columns)
        errors = torch.empty_like(w[:, start:stop])
        for column in range(start, stop):
            scale = scales[:, column]
            q[:, column] = codes(w[:, column], scale, bits)
            error = (w[:, column] - q[:, column] * scale) / factor[column, column]
            w[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return q
