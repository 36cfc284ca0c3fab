"""Where a quantized model's error comes from: the part of each group, what becomes of attention, where numbers stop being finite."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from fqonnx import model as model_file
from fqonnx.cache_plan import comparable
from fqonnx.errors import ModelError
from fqonnx.metrics import Divergence, LogitsDivergence, is_floating
from fqonnx.passes import linears
from fqonnx.passes.constants import is_constant, is_float
from fqonnx.passes.edit import GROUP_TAG
from fqonnx.passes.fuse_activation import with_halves
from fqonnx.passes.prepare import prepare
from fqonnx.progress import Silent
from fqonnx.verify.comparison import arrays_of, iterate
from fqonnx.verify.runners import Side

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from fqonnx.progress import Progress
    from fqonnx.verify.runners import Feeds

VALUES_A_PASS = 16
"""Values that one pass over the samples takes out of a model at most."""


@dataclass(frozen=True)
class Contribution:
    """The float model with only some groups as the candidate has them.

    Attributes:
        groups: Their names; more than one where the candidate has merged what lies between them.
        rel_l2: Relative L2 error of the outputs taken together.
        kl: Mean KL divergence of the logits, nats; None for a model without logits.
        share: Of the sum over all contributions, in KL where there are logits and in squared error else.
    """

    groups: tuple[str, ...]
    rel_l2: float
    kl: float | None
    share: float


@dataclass(frozen=True)
class AttentionError:
    """How far the attention distributions of one layer are from the float model's.

    Attributes:
        name: The value that goes into the softmax.
        kl: Mean KL divergence, nats.
        js: Mean Jensen-Shannon divergence, nats.
        total_variation: Mean share of attention that goes elsewhere, 0 to 1.
        top1: Share of queries that attend most to the same key.
    """

    name: str
    kl: float
    js: float
    total_variation: float
    top1: float


@dataclass(frozen=True)
class Watched:
    """A value that is not finite, or comes near the end of its type's range.

    Attributes:
        name: The value.
        op: The operator that makes it.
        nan: NaNs.
        inf: Infinities.
        largest: Largest finite magnitude.
        headroom: The type's largest number over ``largest``.
    """

    name: str
    op: str
    nan: int
    inf: int
    largest: float
    headroom: float


def open_pair(reference: Path, candidate: Path) -> tuple[ir.Model, ir.Model]:
    """The float model as a build prepares it, and the candidate with the float model's interface.

    Raises:
        ModelError: One cannot be read.
    """
    return prepare(model_file.load(reference)), with_halves(comparable(candidate))


# --- Contributions ------------------------------------------------------------------------------------------------------------------------


def contributions(
    reference: ir.Model, candidate: ir.Model, samples: Sequence[Feeds], *, device: str = "cpu", progress: Progress | None = None
) -> list[Contribution]:
    """What each group's quantization does to the outputs by itself, worst first.

    For each group a model is put together: the float one, in which the group's outputs are computed by the candidate's nodes from the
    float model's other groups. Groups that cannot be told apart in the candidate (a scale of one moved into another) count together.

    Args:
        reference: From ``open_pair``.
        candidate: Likewise; both are left as they are.
        samples: Feed dicts.
        device: ``cpu`` or ``cuda``.
        progress: Told of every group.

    Raises:
        ModelError: The candidate has none of the reference's linears, or nodes that hold graphs before one of them.
    """
    units = _units(reference, candidate)
    found: list[tuple[tuple[str, ...], float, float | None]] = []
    with (progress or Silent()).task("Groups one by one", len(units)) as task:
        for groups, outputs, cuts in units:
            mixed = _mixed(reference, candidate, outputs, cuts)
            found.append((groups, *_outputs_apart(reference, mixed, samples, device)))
            task.advance()
    damages = [kl if kl is not None else rel_l2**2 for _, rel_l2, kl in found]
    total = sum(damages)
    shares = [damage / total if total else 0.0 for damage in damages]
    result = [Contribution(*figures, share) for figures, share in zip(found, shares, strict=True)]
    return sorted(result, key=lambda c: -c.share if not math.isnan(c.share) else -math.inf)


def _units(reference: ir.Model, candidate: ir.Model) -> list[tuple[tuple[str, ...], list[str], set[str]]]:
    """What is measured together: names of groups, their outputs, and the values at which the candidate is cut off before them."""
    there = {value.name: value for node in candidate.graph for value in node.outputs if value.name}
    found = linears.find(reference, quantize_head=True)
    outputs = {group.name: [linear.output.name or "" for linear in group.linears] for group in found.groups}
    quantized = {node.metadata_props.get(GROUP_TAG) for node in candidate.graph}
    outputs = {name: values for name, values in outputs.items() if name in quantized}
    common = {name: [value for value in values if value in there] for name, values in outputs.items()}
    if not any(common.values()):
        raise ModelError("the candidate has none of the reference's quantized linears: compare a model with its own build")
    lost = {name for name, values in outputs.items() if len(common[name]) < len(values)}
    names = {value for values in common.values() for value in values}
    units: dict[str, set[str]] = {}
    for name in outputs:
        cone = _cone([there[value] for value in common[name]], names - set(common[name]))
        inside = {tag for node in cone if (tag := node.metadata_props.get(GROUP_TAG)) in lost}
        units[name] = {name, *inside}
    # A group that lost an output is measured with the one whose cone it is in.
    merged = [members for name, members in units.items() if name not in lost or not _inside_another(name, units)]
    order = list(outputs)
    result = []
    for members in merged:
        groups = tuple(sorted(members, key=order.index))
        taken = [value for group in groups for value in common[group]]
        result.append((groups, taken, names - set(taken)))
    return result


def _inside_another(name: str, units: Mapping[str, set[str]]) -> bool:
    return any(name in members for other, members in units.items() if other != name)


def _cone(values: Sequence[ir.Value], cuts: set[str]) -> list[ir.Node]:
    """The nodes that compute the values from those named in ``cuts`` and from the graph's inputs."""
    todo, nodes = list(values), set[ir.Node]()
    while todo:
        value = todo.pop()
        node = value.producer()
        if node is None or node in nodes or (value.name in cuts and value not in values):
            continue
        nodes.add(node)
        todo += [operand for operand in node.inputs if operand is not None]
    graph = values[0].graph if values else None
    return [] if graph is None else [node for node in graph if node in nodes]


def _mixed(reference: ir.Model, candidate: ir.Model, outputs: Sequence[str], cuts: set[str]) -> ir.Model:
    """The reference with ``outputs`` computed by the candidate's nodes from the reference's values named in ``cuts``."""
    there = {value.name: value for node in candidate.graph for value in node.outputs}
    mixed = reference.clone()
    here = {value.name: value for value in (*mixed.graph.inputs, *(v for node in mixed.graph for v in node.outputs))}
    copies: dict[ir.Value, ir.Value] = {}

    def copied(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in copies:
            return None if value is None else copies[value]
        if value.is_initializer():
            assert value.name
            copy = ir.Value(name=f"candidate/{value.name}", type=value.type, shape=value.shape, const_value=value.const_value)
            mixed.graph.register_initializer(copy)
            copies[value] = copy
            return copy
        return here[value.name]

    for node in _cone([there[name] for name in outputs], cuts):
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()):
            raise ModelError(f"{node.name!r} ({node.op_type}) holds a graph: groups behind it cannot be told apart")
        copy = ir.Node(
            node.domain,
            node.op_type,
            [copied(operand) for operand in node.inputs],
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=f"candidate/{node.name}",
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name = f"candidate/{old.name}" if old.name else ""
            new.type, new.shape = old.type, old.shape
            copies[old] = new
        mixed.graph.append(copy)
    for name in outputs:
        ir.convenience.replace_all_uses_with(here[name], copies[there[name]], replace_graph_outputs=True)
    kept = [value.name or "" for value in reference.graph.outputs]
    for value, name in zip(mixed.graph.outputs, kept, strict=True):
        if value.name != name:
            here[name].name = f"reference/{name}"
            value.name = name
    mixed.functions.update(candidate.functions)
    mixed.opset_imports.update(candidate.opset_imports)
    mixed.ir_version = max(mixed.ir_version, candidate.ir_version)
    mixed.graph.sort()
    return mixed


def _outputs_apart(reference: ir.Model, mixed: ir.Model, samples: Sequence[Feeds], device: str) -> tuple[float, float | None]:
    names = [value.name or "" for value in reference.graph.outputs if is_float(value.dtype)]
    logits = [name for name in names if "logit" in name.lower()]
    error, divergence = Divergence(), LogitsDivergence()
    for expected, actual in _both(reference, mixed, logits or names, samples, device):
        for name in logits or names:
            error.update(expected[name], actual[name])
            if name in logits:
                divergence.update(expected[name], actual[name])
    return error.rel_l2, divergence.kl if logits else None


# --- Attention ----------------------------------------------------------------------------------------------------------------------------


def attention(
    reference: ir.Model, candidate: ir.Model, samples: Sequence[Feeds], *, device: str = "cpu", progress: Progress | None = None
) -> list[AttentionError]:
    """How far the softmax of attention is from the float model's, layer by layer in graph order.

    Args:
        reference: From ``open_pair``.
        candidate: Likewise.
        samples: Feed dicts.
        device: ``cpu`` or ``cuda``.
        progress: Told of every pass over the samples.

    Raises:
        ModelError: There is no attention in standard operators that both have.
    """
    there = {value.name for node in candidate.graph for value in node.outputs}
    names = [name for name in _scores(reference) if name in there]
    if not names:
        raise ModelError("no softmax of scores that both models have: export attention in standard operators")
    found = {name: LogitsDivergence() for name in names}
    parts = [names[start : start + VALUES_A_PASS] for start in range(0, len(names), VALUES_A_PASS)]
    with (progress or Silent()).task("Comparing attention", len(parts)) as task:
        for part in parts:
            for expected, actual in _both(reference, candidate, part, samples, device):
                for name in part:
                    found[name].update(expected[name], actual[name])
            task.advance()
    return [AttentionError(name, d.kl, d.js, d.total_variation, d.top1) for name, d in found.items()]


def _scores(model: ir.Model) -> Iterator[str]:
    """What goes into a softmax over the last axis whose result is multiplied by a value that is computed."""
    for node in model.graph:
        value = node.inputs[0] if node.inputs else None
        if node.op_type != "Softmax" or value is None or value.shape is None:
            continue
        if node.attributes.get_int("axis", -1) not in (-1, len(value.shape) - 1):
            continue
        todo, seen = [node.outputs[0]], 0
        while todo and seen < 32:
            seen += 1
            for reader, index in todo.pop().uses():
                if reader.op_type == "MatMul":
                    if index == 0 and not is_constant(reader.inputs[1]):
                        yield value.name or ""
                        todo = []
                        break
                else:
                    todo += reader.outputs


# --- Numbers that are not finite ----------------------------------------------------------------------------------------------------------


def watch(
    model: ir.Model, samples: Sequence[Feeds], *, reference: ir.Model | None = None, device: str = "cpu", progress: Progress | None = None
) -> list[Watched]:
    """Every float value of the main graph that holds NaN or Inf, in graph order, and the value nearest to the end of its range.

    Args:
        model: The model to watch.
        samples: Feed dicts.
        reference: Values that bear the same name here and are infinite too (masks) are in order.
        device: ``cpu`` or ``cuda``.
        progress: Told of every pass over the samples.

    Returns:
        The values that are not finite, the first of them being where it began; then the one with the least headroom, if it is finite.
    """
    made = {value.name or "": node for node in model.graph for value in node.outputs if value.name and is_float(value.dtype)}
    names = list(made)
    excused = set() if reference is None else {value.name for node in reference.graph for value in node.outputs}
    counts = {name: np.zeros(2, np.int64) for name in names}
    largest, limits = dict.fromkeys(names, 0.0), dict.fromkeys(names, math.inf)
    allowed: dict[str, np.ndarray[Any, Any]] = {}
    parts = [names[start : start + VALUES_A_PASS] for start in range(0, len(names), VALUES_A_PASS)]
    with (progress or Silent()).task("Watching values", len(parts)) as task:
        for part in parts:
            for values in _alone(model, part, samples, device):
                for name in part:
                    _count(values[name], counts[name], name, largest, limits)
            task.advance()
    suspects = [name for name in names if counts[name].any()]
    if reference is not None and (shared := [name for name in suspects if name in excused]):
        allowed = {name: np.zeros(2, np.int64) for name in shared}
        for values in _alone(reference, shared, samples, device):
            for name in shared:
                _count(values[name], allowed[name], name, {}, {})
    bad = [name for name in suspects if name not in allowed or (counts[name] != allowed[name]).any()]
    headroom = {name: limits[name] / largest[name] if largest[name] else math.inf for name in names}
    tightest = min(headroom, key=headroom.__getitem__, default=None)
    shown = [*bad, *([tightest] if tightest is not None and tightest not in bad else [])]
    return [Watched(name, made[name].op_type, int(counts[name][0]), int(counts[name][1]), largest[name], headroom[name]) for name in shown]


def _count(array: Any, counts: Any, name: str, largest: dict[str, float], limits: dict[str, float]) -> None:
    if not is_floating(array):
        return
    wide = array.astype(np.float64)
    counts += (int(np.isnan(wide).sum()), int(np.isinf(wide).sum()))
    if name in largest:
        finite = np.abs(wide[np.isfinite(wide)])
        largest[name] = max(largest[name], float(finite.max(initial=0.0)))
        limits[name] = float(ml_dtypes.finfo(array.dtype).max)  # type: ignore[no-untyped-call]  # published without types


# --- Running ------------------------------------------------------------------------------------------------------------------------------


def _both(
    reference: ir.Model, candidate: ir.Model, names: Sequence[str], samples: Iterable[Feeds], device: str
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    sides = Side("reference", None, reference), Side("candidate", None, candidate)
    with tempfile.TemporaryDirectory(prefix="fqonnx-evaluate-") as folder:
        runners = [side.runner(side.name, names, device, Path(folder)) for side in sides]
        for _, (expected, actual) in iterate(runners, samples, sides[0].inputs):
            yield arrays_of(expected), arrays_of(actual)


def _alone(model: ir.Model, names: Sequence[str], samples: Iterable[Feeds], device: str) -> Iterator[Mapping[str, Any]]:
    side = Side("model", None, model)
    with tempfile.TemporaryDirectory(prefix="fqonnx-evaluate-") as folder:
        for _, (values,) in iterate([side.runner(side.name, names, device, Path(folder))], samples, side.inputs):
            yield arrays_of(values)
