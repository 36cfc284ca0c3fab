"""AWQ's weight clipping (Lin et al., arXiv 2306.00978, section 3.2, and its code): round to nearest, clipped where outputs gain by it."""

from __future__ import annotations

from typing import ClassVar

import torch

from fqonnx.calib.quantizers import codes, levels, positive
from fqonnx.calib.weights.base import checked_hessian
from fqonnx.errors import CalibrationError

CLIPS = tuple(1.0 - 0.05 * i for i in range(10))
"""Factors on the absmax that are tried, those of AWQ's code: 1.0 down to 0.55."""


class Awq:
    """RTN whose scales are chosen by the squared error of the output that their weights have a part in.

    For the weights ``w_g`` that share a scale this is ``E‖x_g (ŵ_g - w_g)ᵀ‖² = (ŵ_g - w_g) H_gg (ŵ_g - w_g)ᵀ`` with the block ``H_gg`` of
    the Hessian, where AWQ's code takes a sample of rows. The channel scale of the method is the transform of this name.
    """

    needs_hessian: ClassVar[bool] = True

    def quantize(
        self, weight: torch.Tensor, *, bits: int, group_size: int, hessian: torch.Tensor | None = None, clip: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``WeightQuantizer.quantize``; ``clip`` is one more factor to try.

        Raises:
            CalibrationError: No Hessian, or it or the weight holds NaN or Inf.
        """
        hessian = checked_hessian(hessian, "awq")
        if not bool(torch.isfinite(weight).all()):
            raise CalibrationError("the weight holds NaN or Inf in the transformed space: check the model's weights")
        n, k = weight.shape
        size = group_size or k
        factors: list[float | torch.Tensor] = [*CLIPS, *([] if clip is None else [clip])]
        all_codes, all_scales = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(n, k // size)
        for group in range(k // size):
            part = slice(group * size, (group + 1) * size)
            w, h = weight[:, part], hessian[part, part]
            full = w.abs().amax(1, keepdim=True) / levels(bits)[1]
            smallest = torch.full_like(full, float("inf"), dtype=torch.float64)
            for factor in factors:
                scale = positive(full * factor)
                q = codes(w, scale, bits)
                error = q * scale - w
                loss = ((error @ h) * error).sum(1, keepdim=True, dtype=torch.float64)
                better = loss < smallest
                smallest = torch.where(better, loss, smallest)
                all_codes[:, part] = torch.where(better, q.to(torch.int8), all_codes[:, part])
                all_scales[:, group : group + 1] = torch.where(better, scale, all_scales[:, group : group + 1])
        return all_codes, all_scales
