"""No transform: plain per-token activation quantization."""

from __future__ import annotations

from typing import ClassVar

from fqonnx.calib.transforms.base import FittedTransform, Problem


class NoTransform:
    """Leaves the group's input as it is."""

    needs_tokens: ClassVar[bool] = False
    has_pair: ClassVar[bool] = False

    def fit(self, problem: Problem) -> FittedTransform:
        """The identity."""
        del problem
        return FittedTransform()
