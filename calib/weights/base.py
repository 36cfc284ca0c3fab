"""What a weight quantizer is given and what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

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
            clip: ``[N, 1]`` factors in (0, 1] on the absmax that a scale is taken from; None lets the quantizer choose.

        Returns:
            int8 codes ``[N, K]`` and positive fp32 scales ``[N, K / group_size]`` (``[N, 1]`` per channel).

        Raises:
            CalibrationError: The weight or the Hessian holds NaN or Inf.
        """
        ...
