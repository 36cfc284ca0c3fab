"""What ``fqonnx sensitivity`` finds, and which scheme each group was given for it: parts of the schema of ``report.json``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SchemeError:
    """One group quantized in one scheme, all others in float.

    Attributes:
        scheme: Its name.
        rel_l2: Relative L2 of the model's worst float output, measured; None where only estimates were asked for.
        kl: Mean KL divergence of its next-token distributions in nats, measured; None for a model without logits.
        estimate: Relative L2 to first order: the group's gain times the relative error of the group's own output.
    """

    scheme: str
    rel_l2: float | None = None
    kl: float | None = None
    estimate: float | None = None

    @property
    def error(self) -> float:
        """The relative L2, measured where it was; NaN where there is neither."""
        known = self.estimate if self.rel_l2 is None else self.rel_l2
        return math.nan if known is None else known


@dataclass(frozen=True, kw_only=True)
class GroupSensitivity:
    """One group.

    Attributes:
        name: The group's name.
        parameters: Its weights, which are its multiplications per token.
        gain: Relative L2 of the model's worst output per relative L2 of the group's output, for small errors.
        errors: One per scheme.
    """

    name: str
    parameters: int
    gain: float
    errors: tuple[SchemeError, ...]

    def of(self, scheme: str) -> SchemeError:
        """The error in a scheme of the report."""
        return next(error for error in self.errors if error.scheme == scheme)


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A choice of schemes for all groups: its size and its error.

    Attributes:
        average_bits: Of both operands, weighted by parameters (``fqonnx.allocation``).
        weight_bits: Of a weight.
        activation_bits: Of an activation.
        weight_bytes: Of all groups' weights: their codes, or 16 bits where they stay in float.
        predicted: The sum over groups, in the report's measure.
        measured: The same of the model with all groups quantized so; None where it was not run.
        label: What it is, such as the scheme that all groups have; empty for a best choice at its size.
    """

    average_bits: float
    weight_bits: float
    activation_bits: float
    weight_bytes: int
    predicted: float
    measured: float | None = None
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class SensitivityReport:
    """How much each group's quantization does to the model.

    Attributes:
        model: Name of the float model.
        fingerprint: Of that model.
        recipe: What groups were solved with.
        schemes: Of the columns.
        measure: What allocations minimise: ``kl`` of a model with logits, else ``rel_l2``.
        samples: Samples that errors were measured on; calibration's own, not those that verification runs on.
        groups: In graph order.
        curve: Best choices by rising size, and all groups in one scheme.
        seconds: Time by stage.
        command: The command line, as typed.
    """

    model: str
    fingerprint: str
    recipe: dict[str, Any]
    schemes: tuple[str, ...]
    measure: str
    samples: int
    groups: tuple[GroupSensitivity, ...]
    curve: tuple[CurvePoint, ...] = ()
    seconds: dict[str, float] | None = None
    command: str = ""

    @property
    def worst_groups(self) -> list[GroupSensitivity]:
        """By falling error in the scheme that hurts most, NaN first; equal ones in graph order."""

        def badness(group: GroupSensitivity) -> float:
            return max((math.inf if math.isnan(e.error) else e.error for e in group.errors), default=0.0)

        return sorted(self.groups, key=lambda group: -badness(group))


@dataclass(frozen=True, kw_only=True)
class AllocationReport:
    """Which scheme each group was given, and why.

    Attributes:
        method: ``dynamic`` or ``greedy``.
        avg_bits: The bound on average bits, or None.
        max_error: The bound on the relative L2 that schemes were chosen for, or None.
        average_bits: Of both operands, weighted by parameters.
        weight_bits: Of a weight.
        activation_bits: Of an activation.
        measure: ``kl`` or ``rel_l2``: of the next two.
        predicted: Of the model, from the groups' own errors.
        measured: Of the model with all groups quantized so, on the samples of the sensitivities.
        schemes: The scheme of each group by name.
    """

    method: str
    avg_bits: float | None
    max_error: float | None
    average_bits: float
    weight_bits: float
    activation_bits: float
    measure: str
    predicted: float
    measured: float
    schemes: dict[str, str]
