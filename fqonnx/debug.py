"""Finding the group that ruins an output: groups of a build put back to float until the error is gone.

The parts of the build directory are put together again as calibration left them: transforms, clips and scales from
``calibration.safetensors``, codes from ``model.onnx``. The float model is then rewritten with the first k groups alone, for as few k as
tell which group pushes the output past the threshold.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fqonnx import artifact as artifact_file
from fqonnx import model as model_file
from fqonnx.artifact import Artifact, open_artifact
from fqonnx.calib.solution import GroupSolution
from fqonnx.errors import ArtifactError, ModelError, UsageError
from fqonnx.ops import DOMAIN, from_layout
from fqonnx.passes.edit import LINEAR_TAG, LINEARS_TAG
from fqonnx.passes.fuse import LOWERING_TAG
from fqonnx.passes.linears import find_for
from fqonnx.progress import Silent
from fqonnx.recipe import FLOAT
from fqonnx.sensitivity_measure import Probe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt

    from fqonnx.passes.groups import LinearGroup
    from fqonnx.progress import Progress
    from fqonnx.recipe import Recipe
    from fqonnx.verify.runners import Feeds

THRESHOLD = 0.5
"""Share of the whole build's error that is the threshold where none is given."""


@dataclass(frozen=True)
class Step:
    """One measurement: the relative L2 of the worst output with the first ``quantized`` groups as they are and the rest in float."""

    quantized: int
    error: float


@dataclass(frozen=True)
class Bisection:
    """What ``fqonnx debug bisect`` shows.

    Attributes:
        groups: Every quantized group, in graph order.
        threshold: Relative L2 of the worst output.
        steps: What was measured, by how many groups were quantized.
        first: The group whose quantization pushes the output past the threshold; None where the whole build stays below.
        without: The error of the whole build with that group alone in float; None likewise.
    """

    groups: tuple[str, ...]
    threshold: float
    steps: tuple[Step, ...]
    first: str | None
    without: float | None

    @property
    def before(self) -> float | None:
        """The error with the groups before ``first``; None without one."""
        return None if self.first is None else self._error(self.groups.index(self.first))

    @property
    def after(self) -> float | None:
        """The error with the groups up to ``first``; None without one."""
        return None if self.first is None else self._error(self.groups.index(self.first) + 1)

    @property
    def whole(self) -> float:
        """The error of the whole build."""
        return self._error(len(self.groups))

    def _error(self, quantized: int) -> float:
        return next(step.error for step in self.steps if step.quantized == quantized)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what is not finite is None."""

        def finite(value: float | None) -> float | None:
            return value if value is not None and math.isfinite(value) else None

        return {
            "groups": list(self.groups),
            "threshold": self.threshold,
            "steps": [asdict(step) | {"error": finite(step.error)} for step in self.steps],
            "first": self.first,
            "before": finite(self.before),
            "after": finite(self.after),
            "whole": finite(self.whole),
            "without": finite(self.without),
        }


def bisect(
    reference: Path | str,
    out: Path | str,
    feeds: Iterable[Feeds],
    *,
    threshold: float | None = None,
    every: bool = False,
    progress: Progress | None = None,
) -> Bisection:
    """Find the first group whose quantization pushes an output past a threshold.

    Errors are those of the outputs, in fp32 on the CPU, with groups in the Q/DQ form. Where they do not grow steadily from group to group
    there may be several that cross the threshold, and one of them is found; ``every`` finds the first.

    Args:
        reference: The float model that ``out`` was built from.
        out: The build directory.
        feeds: Samples; all are kept in memory, so give few.
        threshold: Relative L2 of the worst output; None is ``THRESHOLD`` of the whole build's error.
        every: Measure after every group, instead of as few as bisecting takes.
        progress: Told of every measurement.

    Raises:
        ModelError: The reference is not the model that ``out`` was built from.
        ArtifactError: The build directory is damaged.
        DataError: There are no samples, or they do not fit.
        UsageError: The threshold is not positive.
    """
    if threshold is not None and not threshold > 0:
        raise UsageError(f"threshold {threshold:g} is out of range: give a relative error above 0")
    artifact, progress = open_artifact(out), progress or Silent()
    model = _reference(Path(reference), artifact)
    recipe = artifact.recipe
    groups = find_for(model, recipe).groups
    names = tuple(group.name for group in groups)
    solutions = StoredSolutions(artifact, groups)
    errors = {0: 0.0}
    with tempfile.TemporaryDirectory(prefix="fqonnx-bisect-") as folder, Probe(model, recipe, feeds, Path(folder)) as probe:
        total = len(names) + 1 if every else math.ceil(math.log2(len(names) + 1)) + 2
        with progress.task("Measuring", total) as task:

            def measure(kept: Sequence[str]) -> float:
                task.advance()
                return probe.quantized(solutions, _in_float(recipe, set(names) - set(kept))).rel_l2

            errors[len(names)] = measure(names)
            limit = threshold if threshold is not None else THRESHOLD * errors[len(names)]
            if every:
                errors |= {count: measure(names[:count]) for count in range(1, len(names))}
            crossing = _crossing(errors, len(names), limit, lambda count: measure(names[:count]))
            without = None if crossing is None else measure([name for name in names if name != names[crossing - 1]])
    steps = tuple(Step(count, error) for count, error in sorted(errors.items()))
    return Bisection(names, limit, steps, None if crossing is None else names[crossing - 1], without)


def _crossing(errors: dict[int, float], count: int, limit: float, measure: Any) -> int | None:
    """How many groups it takes to pass the limit; what is measured goes to ``errors``. None where all together do not."""
    if len(errors) == count + 1:
        return next((k for k in range(1, count + 1) if not errors[k] <= limit), None)
    if errors[count] <= limit:
        return None
    below, above = 0, count
    while above - below > 1:
        middle = (below + above) // 2
        errors[middle] = measure(middle)
        if errors[middle] <= limit:  # a NaN is past any limit
            below = middle
        else:
            above = middle
    return above


def _in_float(recipe: Recipe, names: Iterable[str]) -> Recipe:
    return replace(recipe, schemes=(*recipe.schemes, *((name, FLOAT.name) for name in sorted(names))))


def _reference(path: Path, artifact: Artifact) -> ir.Model:
    from fqonnx.build import FloatModel

    found = FloatModel.read(path, artifact.recipe)
    built = artifact.manifest.get("model", {})
    if built.get("sha256") != found.fingerprint:
        raise ModelError(f"{path} is not the model that {artifact.path} was built from ({built.get('name', 'unknown')}): give that one")
    return found.model


class StoredSolutions:
    """The solutions of a build directory's groups, by name, put together from its files.

    Args:
        artifact: The build directory.
        groups: Its quantized groups, as the float model has them.

    Raises:
        ArtifactError: A file does not hold what belongs to a group.
    """

    def __init__(self, artifact: Artifact, groups: Sequence[LinearGroup]) -> None:
        self._path = artifact.path
        self._groups = {group.name: group for group in groups}
        rows = {linear.name: linear.out_features for group in groups for linear in group.linears}
        self._codes = _codes(model_file.load(artifact.model), rows)
        for group in groups:
            for linear in group.linears:
                if linear.name not in self._codes:
                    raise ArtifactError(f"{artifact.model} holds no codes of {linear.name!r}: build it again")

    def __call__(self, name: str) -> GroupSolution:
        """The solution of a group."""
        from safetensors import SafetensorError, safe_open

        group = self._groups[name]
        try:
            with safe_open(self._path / artifact_file.CALIBRATION, framework="numpy") as file:
                found = {part: file.get_tensor(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in file.keys()}  # noqa: SIM118 - no dict
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{self._path / artifact_file.CALIBRATION} cannot be read ({error}): build it again") from None
        if not {"clip", "weight_scale"} <= set(found):
            raise ArtifactError(f"{self._path / artifact_file.CALIBRATION} holds nothing of group {name!r}: build it again")
        codes = np.concatenate([self._codes[linear.name].read(linear.out_features, linear.in_features) for linear in group.linears])
        return GroupSolution(
            group=name,
            channel_scale=found.get("channel_scale"),
            left=found.get("left"),
            right=found.get("right"),
            clip=float(found["clip"][0]),
            codes=codes,
            scales=found["weight_scale"],
            bias=found.get("bias_correction"),
        )


_PARTS = ("left", "right", "channel_scale", "clip", "weight_scale", "bias_correction")
"""Of ``calibration.safetensors``, see ``fqonnx.calib.record``."""


@dataclass(frozen=True)
class _Codes:
    """Where the codes of a linear are: a tensor, how it is laid out, and the linear's first row."""

    tensor: ir.TensorProtocol
    layout: str
    first_row: int | None
    transposed: bool

    def read(self, n: int, k: int) -> npt.NDArray[np.int8]:
        """``[n, k]``."""
        stored = self.tensor.numpy().astype(np.int8)
        if self.transposed:
            stored = stored.T
        if self.first_row is not None:
            # A sum of linears, filled up to the kernel's tiles.
            stored = from_layout(stored, self.layout)[self.first_row : self.first_row + n, :k]
        return np.ascontiguousarray(stored)


def _codes(model: ir.Model, rows: Mapping[str, int]) -> dict[str, _Codes]:
    """By name of a linear; ``rows`` says how many each has."""
    found: dict[str, _Codes] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        tags = node.metadata_props
        if (node.domain, node.op_type) == (DOMAIN, "W4A4Gemm") and {LINEARS_TAG, LOWERING_TAG} <= set(tags):
            weight, row = node.inputs[2], 0
            for name in json.loads(tags[LINEARS_TAG]):
                if weight is None or weight.const_value is None or name not in rows:
                    break
                found[name] = _Codes(weight.const_value, json.loads(tags[LOWERING_TAG])["layout"], row, transposed=False)
                row += rows[name]
        elif (node.domain, node.op_type) == ("", "DequantizeLinear") and LINEAR_TAG in tags:
            codes, scale = node.inputs[0], node.inputs[1]
            if codes is None or codes.const_value is None or scale is None or scale.shape is None:
                continue
            # [N, K] has its scales along axis 0, or blocks along axis 1; [K, N] the other way round.
            by_rows = node.attributes.get_int("axis", 1) == (0 if len(scale.shape) == 1 else 1)
            found[tags[LINEAR_TAG]] = _Codes(codes.const_value, "plain", None, transposed=not by_rows)
    return found
