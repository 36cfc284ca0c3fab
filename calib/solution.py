"""What calibration knows of a group (statistics) and what it decides (solution)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True, eq=False)
class GroupSolution:
    """How one group is quantized: ``t = (x / channel_scale) · (left ⊗ right)``, ``q = quantize(t, clip)``, ``y = q · codesᵀ · scales``.

    Attributes:
        group: The group's name.
        channel_scale: fp32 ``[K]``; the input is divided by it, or None.
        left: fp32 ``[n1, n1]`` or None where there is no online transform.
        right: fp32 ``[n2, n2]``, ``n1 * n2 == K``; None exactly where ``left`` is.
        clip: Factor in (0, 1] on the row's largest magnitude before the activation scale is taken from it.
        codes: int8 ``[N, K]`` holding -8..7 (4 bits) or -128..127 (8 bits), linears stacked in group order, in the transformed space.
        scales: fp32 ``[N, K / G]``, all positive; ``[N, 1]`` per channel.
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
    metrics: dict[str, float] = field(default_factory=dict)
    profile_before: Array | None = None
    profile_after: Array | None = None
