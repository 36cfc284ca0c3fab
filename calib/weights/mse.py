"""Round to nearest with scales that clip: for each, the factor on the largest magnitude that leaves the smallest squared error."""

from __future__ import annotations

from typing import ClassVar

import torch

from fqonnx.calib.quantizers import codes
from fqonnx.calib.weights.rtn import search_scales


class MeanSquaredError:
    """RTN behind a clip search on the weights alone, as QuaRot (arXiv 2404.00456, section 5) and GPTQ's code have it; needs no data."""

    needs_hessian: ClassVar[bool] = False

    def quantize(
        self, weight: torch.Tensor, *, bits: int, group_size: int, hessian: torch.Tensor | None = None, clip: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``WeightQuantizer.quantize``; a ``clip`` that the transform has learned on outputs is taken as it is."""
        del hessian
        scales = search_scales(weight, bits=bits, group_size=group_size, clip=clip)
        rows = weight.reshape(weight.shape[0], scales.shape[1], -1)
        return codes(rows, scales[..., None], bits).reshape(weight.shape).to(torch.int8), scales
