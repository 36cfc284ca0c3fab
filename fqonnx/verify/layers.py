"""How far apart the outputs of the quantized linears are, group by group."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from fqonnx import model as model_file
from fqonnx.errors import DataError, ModelError
from fqonnx.metrics import is_floating
from fqonnx.recipe import Recipe
from fqonnx.report.data import GroupReport, TensorReport
from fqonnx.verify import limits
from fqonnx.verify.comparison import Comparison, arrays_of, iterate, length_of
from fqonnx.verify.runners import Feeds, Side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir

    from fqonnx.progress import Progress


def find_layers(a: Side, b: Side) -> tuple[Side, dict[str, list[str]]]:
    """The reference as a build prepares it, and by group the outputs of the linears that the candidate's recipe quantizes.

    Raises:
        ModelError: The reference has no such linears.
    """
    from fqonnx.passes import linears
    from fqonnx.passes.prepare import prepare

    # Preparing changes the model in place, so it is read again; one that was given as an object is the caller's to prepare.
    model = prepare(model_file.load(a.path)) if a.path is not None else a.model
    recipe = b.recipe or Recipe(quantize_head=True)
    found = linears.find(model, keep=recipe.keep, quantize_head=recipe.quantize_head, group_size=recipe.group_size)
    if not found.groups:
        raise ModelError(f"{a.name} has no linears to compare: leave out --layers")
    groups = {group.name: [linear.output.name or "" for linear in group.linears] for group in found.groups}
    return Side(a.name, None, model), groups


def compare_layers(
    sides: tuple[Side, Side],
    values: Mapping[str, Sequence[str]],
    source: Iterable[Feeds],
    reports: Sequence[GroupReport],
    device: str,
    workdir: Path,
    progress: Progress,
    notes: list[str],
    *,
    engine: bool = False,
) -> list[GroupReport]:
    """The groups' reports with the figures of their worst linear; groups that were not known come last.

    Args:
        sides: The reference, as the values are named in it, and the candidate.
        values: By group name, the values to compare.
        source: Feed dicts, iterable more than once.
        reports: What is known of the groups already.
        device: ``cpu`` or ``cuda``.
        workdir: Where streamed models keep their segments' values.
        progress: Told of every sample of every pass.
        notes: Gets a line where the candidate lacks values.
        engine: Run the candidate in an engine that gives the values.

    Raises:
        ModelError: The candidate has none of the values.
        DataError: The source can be read only once.
    """
    from fqonnx.passes.fuse_activation import with_halves

    a, b = sides
    if (model := with_halves(b.model)) is not b.model:
        b = replace(b, path=None, model=model)
    there = [_value_names(side.model) for side in (a, b)]
    common = {group: [name for name in names if name in there[0] and name in there[1]] for group, names in values.items()}
    lost = [group for group, names in common.items() if len(names) < len(values[group])]
    if not any(common.values()):
        raise ModelError(f"{b.name} has none of the {len(values)} groups' outputs of {a.name}: compare a model with its own quantized form")
    if lost:
        notes.append(f"{len(lost)} of {len(values)} groups have outputs that the candidate lacks, the first is {lost[0]!r}")

    comparison = Comparison()
    names = [name for group in common.values() for name in group]
    passes = _portions(names, _widths(a.model), source)
    length = length_of(source)
    with progress.task("Comparing layers", None if length is None else length * len(passes)) as task:
        for portion in passes:
            runners = (
                a.runner("reference", portion, device, workdir),
                b.engine_runner("candidate", portion, workdir) if engine else b.runner("candidate", portion, device, workdir),
            )
            for _, results in iterate(runners, source, a.inputs):
                comparison(*(arrays_of(result) for result in results))
                task.advance()
    measured = comparison.reports()
    worst = {group: _worst([measured[name] for name in found]) for group, found in common.items() if found}
    by_name = {report.name: report for report in reports} | {
        group: GroupReport(name=group) for group in values if group not in {report.name for report in reports}
    }
    return [replace(report, layer=worst.get(name, report.layer)) for name, report in by_name.items()]


def _worst(reports: Sequence[TensorReport]) -> TensorReport:
    return max(reports, key=lambda t: math.inf if math.isnan(t.rel_l2) else t.rel_l2)


def _value_names(model: ir.Model) -> set[str]:
    return {value.name for node in model.graph for value in node.outputs if value.name}


def _widths(model: ir.Model) -> Callable[[str], int]:
    """The last dimension of a value, 1 where nothing is known of it."""
    values = {value.name: value for node in model.graph for value in node.outputs}

    def width(name: str) -> int:
        shape = values[name].shape
        last = shape[-1] if shape is not None and len(shape) else 1
        return last if isinstance(last, int) else 1

    return width


def _portions(names: Sequence[str], width: Callable[[str], int], source: Iterable[Feeds]) -> list[list[str]]:
    """Cut the values into passes that hold about ``TAP_BYTES`` of one sample in fp32, by the rows of the first sample."""
    first = next(iter(source), None)
    if first is None:
        raise DataError("the data can be read only once: give a source that can be iterated again")
    rows = max((a.size if not is_floating(a) else a.size // max(1, a.shape[-1] if a.ndim else 1) for a in first.values()), default=1)
    portions: list[list[str]] = []
    room = 0
    for name in names:
        size = max(1, rows) * width(name) * 4
        if not portions or size > room:
            portions.append([])
            room = limits.TAP_BYTES
        portions[-1].append(name)
        room -= size
    return portions
