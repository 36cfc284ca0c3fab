"""What a weight quantizer is given and what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from fqonnx.errors import CalibrationError

if TYPE_CHECKING:
    import torch


class WeightQuantizer(Protocol):
    """Rounds a matrix to symmetric integers with one scale per row or per ``group_size`` values of a row."""

    needs_hessian: ClassVar[bool]
    """Whether ``quantize`` reads ``hessian``."""

    def quantize(
        self, weight: torch.Tensor, *, bits: int, group_size: int, hessian: torch.Tensor | None = None, clip: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round ``weight`` ``[N, K]`` fp32.

        Args:
            weight: In the space that the integers will live in.
            bits: 4 or 8; codes lie in ``-2**(bits-1) .. 2**(bits-1) - 1``.
            group_size: Values along K that share a scale; 0 is a whole row. Divides K.
            hessian: ``[K, K]`` mean of ``x̂ᵀ x̂`` over the quantized inputs that will meet these weights.
            clip: ``[N, 1]`` factors in (0, 1] on the absmax that a scale is taken from, found by the transform for weights that are
                rounded to nearest; None lets the quantizer choose. Those with a Hessian try others besides.

        Returns:
            int8 codes ``[N, K]`` and positive fp32 scales ``[N, K / group_size]`` (``[N, 1]`` per channel).

        Raises:
            CalibrationError: The weight or the Hessian holds NaN or Inf.
        """
        ...


def checked_hessian(hessian: torch.Tensor | None, name: str) -> torch.Tensor:
    """The Hessian that the quantizer ``name`` needs.

    Raises:
        CalibrationError: There is none, or it holds NaN or Inf.
    """
    import torch

    if hessian is None:
        raise CalibrationError(f"{name} needs calibration statistics: give calibration data or use --weights rtn")
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError("the Hessian of the group's inputs holds NaN or Inf: check the model in float first")
    return hessian
