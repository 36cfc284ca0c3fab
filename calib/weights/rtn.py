"""Round to nearest."""

from __future__ import annotations

from typing import ClassVar

import torch

from fqonnx.calib.quantizers import codes, levels, positive
from fqonnx.errors import CalibrationError

CLIP_GRID = tuple(1.0 - 0.025 * i for i in range(17))
"""Factors on the absmax that ``search_scales`` tries: 1.0 down to 0.6."""


def search_scales(
    weight: torch.Tensor, *, bits: int, group_size: int, importance: torch.Tensor | None = None, clip: torch.Tensor | None = None
) -> torch.Tensor:
    """Scales ``[N, K / G]`` of ``weight`` ``[N, K]``: ``clip · absmax / qmax`` per scale.

    Args:
        weight: fp32 ``[N, K]``.
        bits: 4 or 8.
        group_size: Values that share a scale; 0 is a whole row.
        importance: ``[K]`` non-negative weights of the squared error, such as a Hessian's diagonal; None is uniform.
        clip: ``[N, 1]`` factors to use as they are; None searches ``CLIP_GRID`` for the smallest weighted squared error.

    Raises:
        CalibrationError: The weight holds NaN or Inf.
    """
    if not bool(torch.isfinite(weight).all()):
        raise CalibrationError("the weight holds NaN or Inf in the transformed space: check the model's weights")
    n, k = weight.shape
    rows = weight.reshape(n, -1, group_size or k)
    full = rows.abs().amax(-1, keepdim=True) / levels(bits)[1]
    if clip is not None:
        return positive(full * clip.reshape(n, 1, 1)).squeeze(-1)
    per_value = torch.ones_like(rows[:1]) if importance is None else importance.reshape(1, -1, group_size or k)
    best_scale, best_error = positive(full), torch.full_like(full, float("inf"))
    for factor in CLIP_GRID:
        scale = positive(full * factor)
        error = ((codes(rows, scale, bits) * scale - rows).square_() * per_value).sum(-1, keepdim=True)
        better = error < best_error
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    return best_scale.squeeze(-1)


class RoundToNearest:
    """Each weight to its nearest code, independent of its neighbours and of the data."""

    needs_hessian: ClassVar[bool] = False

    def quantize(
        self, weight: torch.Tensor, *, bits: int, group_size: int, hessian: torch.Tensor | None = None, clip: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``WeightQuantizer.quantize``; without ``clip`` the scale is the absmax, as the field understands plain RTN."""
        del hessian
        if clip is None:
            clip = torch.ones(weight.shape[0], 1, device=weight.device)
        scales = search_scales(weight, bits=bits, group_size=group_size, clip=clip)
        rows = weight.reshape(weight.shape[0], scales.shape[1], -1)
        return codes(rows, scales[..., None], bits).reshape(weight.shape).to(torch.int8), scales
