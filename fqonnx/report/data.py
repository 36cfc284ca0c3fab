"""The schema of ``report.json``.

Strict JSON: a figure that is NaN or infinite is ``null``, and the object that holds it says which in ``"non_finite"``, for instance
``{"rel_l2": null, "non_finite": {"rel_l2": "nan"}}``. A figure that does not apply is ``null`` without such a mark.
"""

from __future__ import annotations

import json
import math
import types
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from fqonnx.errors import ArtifactError

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
        time: Seconds by stage; ``total`` is the wall clock of the whole command.
        data: What was run.
        recipe: The recipe as plain values.
        environment: Versions and the machine.
        command: The command line, as typed.
        notes: Remarks for the user, one line each.
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
    time: dict[str, float] = field(default_factory=dict)
    data: DataReport | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    command: str = ""
    notes: tuple[str, ...] = ()
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
        encoded = _encode(self)
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
        decoded = _decode(cls, values, "report")
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


def _encode(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        encoded = {}
        non_finite = {}
        for f in fields(value):
            item = getattr(value, f.name)
            encoded[f.name] = _encode(item)
            if isinstance(item, float) and not math.isfinite(item):
                non_finite[f.name] = str(item)
        return encoded | ({"non_finite": non_finite} if non_finite else {})
    if isinstance(value, dict):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _decode(next(a for a in arguments if a is not type(None)), value, where)
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and value is None:
        return math.nan
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise ArtifactError(f"not a report: {where} is {json.dumps(value)[:60]}")


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ArtifactError(f"not a report: {where} is {json.dumps(value)[:60]}")
    value = dict(value)
    non_finite = value.pop("non_finite", {})
    hints = get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ArtifactError(f"not a report: {where} has the unknown key {unknown[0]!r}")
    arguments = {key: _decode(hints[key], item, f"{where}.{key}") for key, item in value.items()}
    if not isinstance(non_finite, dict) or any(k not in arguments or v not in ("nan", "inf", "-inf") for k, v in non_finite.items()):
        raise ArtifactError(f"not a report: {where}.non_finite is {json.dumps(non_finite)[:60]}")
    arguments |= {key: float(item) for key, item in non_finite.items()}
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ArtifactError(f"not a report: {where}: {str(error).partition('__init__() ')[2]}") from None
