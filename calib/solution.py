"""What calibration knows of a group (statistics) and what it decides (solution)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Mapping

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class GroupStats:
    """Bounded statistics of one group's input over the calibration data.

    Attributes:
        tokens: A uniform random sample of the input's rows without replacement (a reservoir), fp32 ``[T, K]``.
        hessian: ``mean(xᵀ x)`` over every row seen, fp32 ``[K, K]``; None where nothing asked for it.
        absmax: Largest magnitude of each channel over every row, fp32 ``[K]``.
        count: Rows seen.
    """

    tokens: Array
    hessian: Array | None
    absmax: Array
    count: int

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything as arrays, for a file; ``from_arrays`` reads them back."""
        arrays: dict[str, npt.NDArray[Any]] = {"tokens": self.tokens, "absmax": self.absmax, "count": np.array([self.count])}
        return arrays if self.hessian is None else arrays | {"hessian": self.hessian}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> GroupStats:
        """The statistics that ``to_arrays`` took apart."""
        return cls(arrays["tokens"], arrays.get("hessian"), arrays["absmax"], int(arrays["count"][0]))


@dataclass(frozen=True, eq=False)
class GroupSolution:
    """How one group is quantized.

    ``t = (x / channel_scale) · (left ⊗ right)``, ``q = quantize(t, clip)``, ``y = q · codesᵀ · scales + bias``.

    Attributes:
        group: The group's name.
        channel_scale: fp32 ``[K]``; the input is divided by it, or None.
        left: fp32 ``[n1, n1]`` or None where there is no online transform.
        right: fp32 ``[n2, n2]``, ``n1 * n2 == K``; None exactly where ``left`` is.
        clip: Factor in (0, 1] on the row's largest magnitude before the activation scale is taken from it.
        codes: int8 ``[N, K]`` holding -8..7 (4 bits) or -128..127 (8 bits), linears stacked in group order, in the transformed space.
        scales: fp32 ``[N, K / G]``, all positive; ``[N, 1]`` per channel.
        bias: fp32 ``[N]`` that is added to the linears' biases, which may be none, to make up for the mean error; None adds nothing.
        metrics: Figures for the report: ``weight_rel_l2``, ``activation_rel_l2``, ``output_rel_l2``, ``flatness_before``,
            ``flatness_after``, ``seconds``; only what was measured.
        profile_before: Sorted channel magnitudes (descending, at most 256 points) of the input, for the report's picture.
        profile_after: The same of the transformed input.
    """

    group: str
    channel_scale: Array | None
    left: Array | None
    right: Array | None
    clip: float
    codes: npt.NDArray[np.int8]
    scales: Array
    bias: Array | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    profile_before: Array | None = None
    profile_after: Array | None = None

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything but name and metrics as arrays, for a file; ``from_arrays`` reads them back."""
        optional = {
            "channel_scale": self.channel_scale,
            "left": self.left,
            "right": self.right,
            "bias": self.bias,
            "profile_before": self.profile_before,
            "profile_after": self.profile_after,
        }
        arrays = {name: array for name, array in optional.items() if array is not None}
        return {**arrays, "clip": np.array([self.clip]), "codes": self.codes, "scales": self.scales}

    @classmethod
    def from_arrays(cls, group: str, arrays: Mapping[str, npt.NDArray[Any]], metrics: dict[str, float]) -> GroupSolution:
        """The solution that ``to_arrays`` took apart."""
        return cls(
            group=group,
            channel_scale=arrays.get("channel_scale"),
            left=arrays.get("left"),
            right=arrays.get("right"),
            clip=float(arrays["clip"][0]),
            codes=arrays["codes"],
            scales=arrays["scales"],
            bias=arrays.get("bias"),
            metrics=metrics,
            profile_before=arrays.get("profile_before"),
            profile_after=arrays.get("profile_after"),
        )
