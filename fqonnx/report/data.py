"""The schema of ``report.json``.

Strict JSON: a figure that is NaN or infinite is ``null``, and the object that holds it says which in ``"non_finite"``, for instance
``{"rel_l2": null, "non_finite": {"rel_l2": "nan"}}``. A figure that does not apply is ``null`` without such a mark.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fqonnx.errors import ArtifactError
from fqonnx.report.mixed import AllocationReport, SensitivityReport  # noqa: TC001  decoding reads annotations
from fqonnx.report.schema import decode, encode

if TYPE_CHECKING:
    from pathlib import Path

    from fqonnx.calib.solution import GroupSolution
    from fqonnx.passes.groups import LeftInFloat, LinearGroup
    from fqonnx.recipe import Recipe

VERSION = 1
"""Version of the schema; a reader refuses a later one."""

Ranking = Literal["layer", "output", "weights"]


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """How far one tensor is from its reference, over every sample. The formulas are those of ``fqonnx.metrics``.

    Attributes:
        dtype: NumPy name of the reference's dtype.
        elements: Elements compared.
        cosine: Cosine of all elements as one vector.
        mean_cosine: Mean cosine of the vectors along the last axis.
        rel_l2: ``|error| / |reference|``.
        sqnr_db: Signal to quantization noise, dB.
        max_abs: Largest absolute error.
        exact: Share of elements that are equal.
        nan: NaNs in the candidate.
        inf: Infinities in the candidate.
        nan_reference: NaNs in the reference.
        inf_reference: Infinities in the reference.
        kl: Mean KL divergence of the softmax over the last axis, nats; of logits only.
        top1: Share of vectors whose largest element is at the same place; of logits only.
        worst_sample: Index of the sample with the largest relative L2.
    """

    dtype: str
    elements: int
    cosine: float
    mean_cosine: float
    rel_l2: float
    sqnr_db: float
    max_abs: float
    exact: float
    nan: int
    inf: int
    nan_reference: int
    inf_reference: int
    kl: float | None = None
    top1: float | None = None
    worst_sample: int | None = None

    @property
    def is_float(self) -> bool:
        """Whether distances mean anything: integers and booleans are told by ``exact``."""
        return self.dtype.startswith(("float", "bfloat"))


@dataclass(frozen=True, kw_only=True)
class LanguageReport:
    """What became of a language model's predictions of the next token.

    Attributes:
        perplexity_reference: Of the float model.
        perplexity: Of the candidate.
        top1: Share of positions where both predict the same token.
        tokens: Tokens predicted.
    """

    perplexity_reference: float
    perplexity: float
    top1: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """One group of linears: how it is quantized and what that costs.

    Attributes:
        name: The group's name.
        linears: Names of its linears.
        in_features: K.
        out_features: Sum of N.
        scheme: Name of the scheme.
        transform: Name of the transform.
        weight_bits: Bits of a weight.
        activation_bits: Bits of an activation; 16 is float.
        group_size: Weights along K that share a scale; 0 is one per output channel.
        weight_rel_l2: Relative L2 of the weights in the transformed space.
        activation_rel_l2: Relative L2 of the quantized input.
        output_rel_l2: Relative L2 of the group's output for float input: the group alone.
        flatness_before: Distance of the input's channel magnitudes from equal ones, relative: 0 is flat, sqrt(2) is one channel alone.
        flatness_after: The same of the transformed input.
        profile_before: Sorted channel magnitudes of the input, descending.
        profile_after: The same of the transformed input.
        seconds: Time to solve.
        layer: The group's worst output inside the whole candidate, errors of earlier groups included; measured by ``--layers``.
    """

    name: str
    linears: tuple[str, ...] = ()
    in_features: int | None = None
    out_features: int | None = None
    scheme: str | None = None
    transform: str | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    group_size: int | None = None
    weight_rel_l2: float | None = None
    activation_rel_l2: float | None = None
    output_rel_l2: float | None = None
    flatness_before: float | None = None
    flatness_after: float | None = None
    profile_before: tuple[float, ...] | None = None
    profile_after: tuple[float, ...] | None = None
    seconds: float | None = None
    layer: TensorReport | None = None

    @classmethod
    def from_solution(cls, group: LinearGroup, solution: GroupSolution, recipe: Recipe, layer: TensorReport | None = None) -> GroupReport:
        """The report of a group as calibration left it."""
        m = solution.metrics
        before, after = solution.profile_before, solution.profile_after
        return cls(
            name=group.name,
            linears=tuple(linear.name for linear in group.linears),
            in_features=group.in_features,
            out_features=group.out_features,
            scheme=recipe.scheme,
            transform=recipe.transform,
            weight_bits=recipe.bits.weight_bits,
            activation_bits=recipe.bits.activation_bits,
            group_size=recipe.group_size,
            weight_rel_l2=m.get("weight_rel_l2"),
            activation_rel_l2=m.get("activation_rel_l2"),
            output_rel_l2=m.get("output_rel_l2"),
            flatness_before=m.get("flatness_before"),
            flatness_after=m.get("flatness_after"),
            profile_before=None if before is None else tuple(round(float(v), 6) for v in before),
            profile_after=None if after is None else tuple(round(float(v), 6) for v in after),
            seconds=m.get("seconds"),
            layer=layer,
        )


@dataclass(frozen=True, kw_only=True)
class LeftReport:
    """A matrix product that stays in float, and why."""

    name: str
    op_type: str
    reason: str
    weight_shape: tuple[int, ...] | None = None

    @classmethod
    def of(cls, left: LeftInFloat) -> LeftReport:
        """From what ``passes.linears.find`` says."""
        shape = None if left.weight_shape is None else tuple(left.weight_shape)
        return cls(name=left.name, op_type=left.op_type, reason=left.reason, weight_shape=shape)


@dataclass(frozen=True, kw_only=True)
class SizeReport:
    """Bytes of the models' constants.

    Attributes:
        float_bytes: Of the reference.
        quantized_bytes: Of the candidate.
        parts: What the candidate's bytes are, e.g. ``{"4-bit weights": .., "32-bit floats": ..}``.
    """

    float_bytes: int
    quantized_bytes: int
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Times smaller."""
        return self.float_bytes / self.quantized_bytes if self.quantized_bytes else math.nan


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What the figures were measured on.

    Attributes:
        source: The data as the user named it, or ``random``.
        samples: Samples run.
        note: In words, e.g. that these samples were not used for calibration.
    """

    source: str
    samples: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class EngineLayer:
    """One layer of a built engine, as the engine inspector lists it.

    Attributes:
        name: The engine's name for it.
        kind: What kind of kernel it is, in the engine's word.
        inputs: Types of the activations it reads, each once.
        constants: Types of the constants it reads.
        outputs: Types it writes.
        nodes: The ONNX nodes that it came from.
        groups: The groups of linears that these belong to.
    """

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EngineGroup:
    """What became of a group of linears in an engine.

    Attributes:
        name: The group's name.
        weights: Type of the weight as the engine stores it; None where it was not found.
        product: Type that is multiplied.
        how: In words.
        layer: The engine's layer that multiplies.
    """

    name: str
    weights: str | None
    product: str | None
    how: str
    layer: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """A built engine.

    Attributes:
        engine: Name of the engine, such as ``tensorrt-rtx``.
        version: Of the library that built it; most engines are only run by the same.
        target: Compute capabilities it was built for, such as ``sm89``; empty for the library's default.
        gpu: The GPU it was built on, where that matters.
        version_compatible: Whether later versions of the library run it.
        file_bytes: Size of the file.
        seconds: Time to build.
        cached: Whether it was found in the cache instead, and ``seconds`` are those of then.
        profiles: Per optimization profile, by input: smallest, usual and largest shape.
        groups: What became of the groups of linears.
        layers: Every layer; empty where the engine does not tell.
    """

    engine: str
    version: str
    target: tuple[str, ...] = ()
    gpu: str | None = None
    version_compatible: bool = False
    file_bytes: int = 0
    seconds: float = 0.0
    cached: bool = False
    profiles: tuple[dict[str, tuple[tuple[int, ...], ...]], ...] = ()
    groups: tuple[EngineGroup, ...] = ()
    layers: tuple[EngineLayer, ...] = ()

    @property
    def fates(self) -> dict[tuple[str, str, str], list[EngineGroup]]:
        """The groups by what became of them: type of the stored weight, type multiplied, and how; the most frequent first."""
        found: dict[tuple[str, str, str], list[EngineGroup]] = {}
        for group in self.groups:
            found.setdefault((group.weights or "?", group.product or "?", group.how), []).append(group)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        encoded: dict[str, Any] = encode(self)
        return encoded

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineReport:
        """What ``to_dict`` wrote.

        Raises:
            ArtifactError: It is none.
        """
        decoded: EngineReport = decode(cls, values, "engine")
        return decoded


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a build or a verification found.

    Attributes:
        model: Name of the float model.
        candidate: Name of what was compared with it.
        passed: Whether it may be used: within ``max_error`` and finite.
        failures: Why not, one line each; empty exactly where it passed.
        max_error: The bound on the worst float output's relative L2, or None where none was asked for.
        outputs: By output name.
        language: Perplexity and agreement of a language model on tokens.
        groups: In graph order; the worst come first with ``worst_groups``.
        left_in_float: What was not quantized.
        size: Bytes before and after.
        engine: What was built for an engine that has a file.
        sensitivity: What each group's quantization does to the model, where a scheme was chosen for each.
        allocation: That choice.
        time: Seconds by stage; ``total`` is the wall clock of the whole command.
        data: What was run.
        recipe: The recipe as plain values.
        environment: Versions and the machine.
        command: The command line, as typed.
        notes: Remarks for the user, one line each.
        polygraphy: Command lines that repeat the comparison by hand, where inputs and outputs were saved.
        version: Of this schema.
    """

    model: str
    candidate: str
    passed: bool
    failures: tuple[str, ...] = ()
    max_error: float | None = None
    outputs: dict[str, TensorReport] = field(default_factory=dict)
    language: LanguageReport | None = None
    groups: tuple[GroupReport, ...] = ()
    left_in_float: tuple[LeftReport, ...] = ()
    size: SizeReport | None = None
    engine: EngineReport | None = None
    sensitivity: SensitivityReport | None = None
    allocation: AllocationReport | None = None
    time: dict[str, float] = field(default_factory=dict)
    data: DataReport | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    command: str = ""
    notes: tuple[str, ...] = ()
    polygraphy: tuple[str, ...] = ()
    version: int = VERSION

    @property
    def ranking(self) -> Ranking | None:
        """The error that groups are ranked by: the closest to the model's outputs that any group has; None where there is none.

        ``layer`` is the output inside the whole candidate, ``output`` that of the group alone, ``weights`` the rounded weights alone.
        """
        kinds: tuple[Ranking, ...] = ("layer", "output", "weights")
        return next((kind for kind in kinds if any(_error(group, kind) is not None for group in self.groups)), None)

    def error_of(self, group: GroupReport) -> float | None:
        """A group's error in the sense of ``ranking``; None where that was not measured for it."""
        return None if self.ranking is None else _error(group, self.ranking)

    @property
    def worst_groups(self) -> list[GroupReport]:
        """Groups by falling ``error_of``, NaN first, unmeasured last; equal ones in graph order."""
        errors = [self.error_of(group) for group in self.groups]
        badness = [-1.0 if error is None else math.inf if math.isnan(error) else error for error in errors]
        return [self.groups[i] for i in sorted(range(len(badness)), key=lambda i: -badness[i])]

    @property
    def worst_output(self) -> str | None:
        """The float output with the largest relative L2 (NaN is largest), or None without float outputs."""
        floats = {name: t.rel_l2 for name, t in self.outputs.items() if t.is_float}
        return max(floats, key=lambda name: math.inf if math.isnan(floats[name]) else floats[name], default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types without NaN or infinities; ``from_dict`` reads it back to an equal report."""
        encoded = encode(self)
        assert isinstance(encoded, dict)
        return encoded

    @classmethod
    def from_dict(cls, values: Any) -> Report:
        """A report from plain JSON types.

        Raises:
            ArtifactError: Not a report: a later version, a missing or unknown key, or a value of the wrong type.
        """
        version = values.get("version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise ArtifactError(f"the report has version {version}, this fqonnx reads up to {VERSION}: upgrade fqonnx")
        decoded = decode(cls, values, "report")
        assert isinstance(decoded, cls)
        return decoded


def _error(group: GroupReport, kind: Ranking) -> float | None:
    if kind == "layer":
        return None if group.layer is None else group.layer.rel_l2
    return group.output_rel_l2 if kind == "output" else group.weight_rel_l2


def save_report(report: Report, path: Path) -> None:
    """Write ``report.json``."""
    path.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def load_report(path: Path) -> Report:
    """Read ``report.json``.

    Raises:
        ArtifactError: There is no such file, or it is not a report.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"no report at {path}: give a build directory") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    return Report.from_dict(values)
