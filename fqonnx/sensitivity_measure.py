"""The float model with some of its groups quantized, beside the float model itself, on the same samples.

For one group only what comes behind it is run: the float model's values at that point are kept, and move on from group to group. The
quantized linears are in the Q/DQ form, which ``Fuse`` changes by no more than rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fqonnx.calib.stream import StreamedModel, values_read
from fqonnx.errors import DataError
from fqonnx.passes.linears import find_for
from fqonnx.passes.quantize import Quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from fqonnx.calib.solution import GroupSolution
    from fqonnx.passes.groups import LinearGroup
    from fqonnx.recipe import Recipe

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

NOISE = 0.01
"""Size of the noise that a gain is measured with, relative to the group's output: small enough that the model answers linearly."""


@dataclass(frozen=True)
class OutputError:
    """How far the model's outputs are from the float model's.

    Attributes:
        rel_l2: ``|error| / |reference|`` of the worst float output; NaN where one is not finite while the reference is.
        kl: Mean KL divergence of the next-token distributions, nats; None for a model without logits.
    """

    rel_l2: float
    kl: float | None = None

    @property
    def damage(self) -> float:
        """In a measure that adds up over groups: the KL divergence, or the square of the relative error."""
        return self.rel_l2**2 if self.kl is None else self.kl


class Probe:
    """A float model on its samples. Use it as a context manager: reference outputs wait on disk in ``workdir`` meanwhile.

    Args:
        model: The prepared float model; left as it is.
        recipe: What its groups are found by.
        feeds: The samples; all are kept in memory, so give few.
        workdir: Folder for reference outputs; made where missing.

    Raises:
        DataError: There are no samples.
    """

    def __init__(self, model: ir.Model, recipe: Recipe, feeds: Iterable[Feeds], workdir: Path) -> None:
        self.model, self.recipe, self._workdir = model, recipe, workdir
        self.feeds: list[Feeds] = list(feeds)
        if not self.feeds:
            raise DataError("there are no samples to measure on: give at least one")
        self._outputs = [value.name or "" for value in model.graph.outputs]
        self._references: list[dict[str, Path]] = []

    @property
    def has_logits(self) -> bool:
        """Whether an output is named like logits, so that errors are also KL divergences."""
        return any(map(_is_logits, self._outputs))

    def __enter__(self) -> Self:
        """Run the float model and keep its outputs."""
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._references = [{} for _ in self.feeds]

        def keep(sample: int, values: Mapping[str, Array]) -> None:
            for name, array in values.items():
                path = self._workdir / f"reference_{sample}_{self._outputs.index(name)}.npy"
                np.save(path, array)
                self._references[sample][name] = path

        StreamedModel(self.model, self._workdir).run(self.feeds, taps=self._outputs, on_values=keep)
        return self

    def __exit__(self, *_: object) -> None:
        for reference in self._references:
            for path in reference.values():
                path.unlink(missing_ok=True)

    def quantized(self, solution: Callable[[str], GroupSolution], recipe: Recipe) -> OutputError:
        """The error with every group in the scheme that ``recipe`` gives it."""
        model = self.model.clone()
        groups = find_for(model, recipe).groups
        if not groups:
            return OutputError(0.0, 0.0 if self.has_logits else None)
        Quantize(groups, solution, recipe)(model)
        RemoveUnusedNodesPass()(model)
        return self.compare(model, self.feeds, self._outputs)

    def groups(self) -> Iterator[tuple[str, Cut]]:
        """Each group's name and the place in front of it, in the order of the graph; use one before the next is taken."""
        groups = find_for(self.model, self.recipe).groups
        nodes = list(self.model.graph)
        position = {node: index for index, node in enumerate(nodes)}
        dynamic = _dynamic(self.model.graph, nodes)
        starts = {group.name: _start(group, position) for group in groups}
        live: list[Feeds] = self.feeds
        for name in sorted(starts, key=starts.__getitem__):
            start = starts[name]
            crossing = [value.name or "" for value in _crossing(nodes, start, dynamic)]
            behind = {output.name for node in nodes[start:] for output in node.outputs}
            live = self.advance(live, crossing)
            yield name, Cut(self, name, live, crossing, [output for output in self._outputs if output in behind])

    def advance(self, live: Sequence[Feeds], names: Sequence[str]) -> list[Feeds]:
        """The float model's values ``names`` of each sample, from values that lie before them."""
        missing = [name for name in names if name not in live[0]]
        advanced: list[dict[str, Array]] = [{name: values[name] for name in names if name in values} for values in live]
        if missing:
            part = _part(self.model, list(live[0]), missing)
            StreamedModel(part, self._workdir).run(
                _read_by(part, live), taps=missing, on_values=lambda i, values: advanced[i].update(values)
            )
        return list(advanced)

    def compare(self, model: ir.Model, feeds: Sequence[Feeds], outputs: Sequence[str]) -> OutputError:
        """The error of a model's outputs, which bear the float model's names, on feeds of the same samples."""
        errors = {name: RunningError(logits=_is_logits(name)) for name in outputs}

        def compare(sample: int, values: Mapping[str, Array]) -> None:
            for name, array in values.items():
                errors[name].add(np.load(self._references[sample][name], mmap_mode="r"), array)

        StreamedModel(model, self._workdir).run(_read_by(model, feeds), taps=outputs, on_values=compare)
        floats = [error for error in errors.values() if error.is_float]
        worst = max((error.rel_l2 for error in floats), key=lambda value: math.inf if math.isnan(value) else value, default=math.nan)
        divergences = [error.kl for error in floats if error.logits]
        return OutputError(worst, max(divergences, default=None))


@dataclass(frozen=True)
class Cut:
    """The place in front of a group: the float model's values there, and the model behind it."""

    probe: Probe
    group: str
    live: Sequence[Feeds]
    crossing: Sequence[str]
    outputs: Sequence[str]

    def quantized(self, solution: Callable[[str], GroupSolution], recipe: Recipe) -> OutputError:
        """The error with this group alone quantized, in the scheme that ``recipe`` gives it."""
        model = self.probe.model.clone()
        group = next(g for g in find_for(model, self.probe.recipe).groups if g.name == self.group)
        Quantize([group], solution, recipe)(model)
        RemoveUnusedNodesPass()(model)
        return self.probe.compare(_part(model, self.crossing, self.outputs), self.live, self.outputs)

    def gain(self) -> float:
        """Relative error of the model's output per relative error of the group's output, for small errors without a direction.

        Gaussian noise of ``NOISE`` times each output's root mean square is added to the group's outputs: the answer's mean square is the
        Jacobian's squared Frobenius norm (Hutchinson 1990), for which one draw does where it has thousands of elements.
        """
        probe = self.probe
        group = next(g for g in find_for(probe.model, probe.recipe).groups if g.name == self.group)
        exact = [linear.output.name or "" for linear in group.linears]
        random = np.random.default_rng(0)
        feeds: list[Feeds] = []
        for values, made in zip(self.live, probe.advance(self.live, exact), strict=True):
            feeds.append({**values, **{name: _with_noise(made[name], random) for name in exact}})
        behind = [output for output in self.outputs if output not in exact]
        answer = probe.compare(_part(probe.model, [*self.crossing, *exact], behind), feeds, behind).rel_l2 if behind else 0.0
        # An output of the model that is one of the group's own is off by the noise itself.
        return max(answer, NOISE if len(behind) < len(self.outputs) else 0.0) / NOISE


def _with_noise(y: Array, random: np.random.Generator) -> Array:
    wide = y.astype(np.float32)
    size = NOISE * np.sqrt(np.mean(np.square(wide))) if wide.size else 0.0
    noisy: Array = (wide + size * random.standard_normal(wide.shape, np.float32)).astype(y.dtype)
    return noisy


class RunningError:
    """One output's error over samples; float outputs only, others are told by ``is_float``."""

    def __init__(self, *, logits: bool) -> None:
        self.logits = logits
        self.is_float = True
        self._ee = self._rr = self._kl = 0.0
        self._rows = 0

    def add(self, reference: Array, candidate: Array) -> None:
        """One sample."""
        import torch

        self.is_float = reference.dtype.kind == "f"
        if not self.is_float:
            return
        r = torch.from_numpy(np.array(reference, np.float32))
        c = torch.from_numpy(np.asarray(candidate, np.float32))
        d = torch.where(r == c, 0.0, c - r)  # infinities that are equal (masks) are no difference
        self._ee += float(torch.linalg.vector_norm(d, dtype=torch.float64)) ** 2
        self._rr += float(torch.linalg.vector_norm(torch.where(torch.isfinite(r), r, 0.0), dtype=torch.float64)) ** 2
        if self.logits and d.numel():
            # KL(p‖q) = log Σ p exp(d) - Σ p d: in the difference d of the logits, so that nothing cancels where it is small.
            p = torch.softmax(r.flatten(0, -2), -1)
            d = d.flatten(0, -2)
            kl = torch.log1p((p * torch.expm1(d)).sum(-1)) - (p * d).sum(-1)
            self._kl += float(kl.double().sum())
            self._rows += len(p)

    @property
    def rel_l2(self) -> float:
        """``|error| / |reference|``; NaN where one side is not finite alone, infinite where only the reference is zero."""
        if self._rr == 0:
            return 0.0 if self._ee == 0 else math.inf if math.isfinite(self._ee) else math.nan
        return math.sqrt(self._ee / self._rr) if math.isfinite(self._ee) else math.nan

    @property
    def kl(self) -> float:
        """Mean KL divergence of the softmax over the last axis, nats."""
        return max(0.0, self._kl / self._rows) if self._rows and math.isfinite(self._kl) else math.nan


def _is_logits(name: str) -> bool:
    return "logit" in name.lower()


def _part(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """The nodes that compute ``outputs`` from ``inputs`` (those of them that are read) and constants, as a model of their own."""
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    known = {values[name] for name in inputs}
    needed = _behind(known, [values[name] for name in outputs])
    graph = ir.convenience.extract(model.graph, [value.name or "" for value in known & needed], list(outputs))
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)


def _read_by(model: ir.Model, feeds: Sequence[Feeds]) -> list[Feeds]:
    read = {value.name for value in model.graph.inputs}
    return [{name: array for name, array in values.items() if name in read} for values in feeds]


def _behind(known: set[ir.Value], outputs: Sequence[ir.Value]) -> set[ir.Value]:
    """Every value that ``outputs`` are computed from, without looking behind ``known``."""
    found, waiting = set(outputs), list(outputs)
    while waiting:
        value = waiting.pop()
        node = None if value in known else value.producer()
        for read in [] if node is None else values_read(node):
            if read not in found:
                found.add(read)
                waiting.append(read)
    return found


def _start(group: LinearGroup, position: Mapping[ir.Node, int]) -> int:
    """Before the first node that a rewrite of the group changes: its linears, and the norm that takes a channel scale."""
    touched = [linear.nodes[0] for linear in group.linears]
    if group.norm is not None:
        touched += [node for node in (group.norm.scale_node, group.norm.bias_node) if node is not None]
    return min(position[node] for node in touched if node in position)


def _dynamic(graph: ir.Graph, nodes: Sequence[ir.Node]) -> set[ir.Value]:
    """The values that depend on the inputs; all others are constants, which are computed again wherever they are read."""
    found = {value for value in graph.inputs if not value.is_initializer()}
    for node in nodes:
        if any(value in found for value in values_read(node)):
            found.update(node.outputs)
    return found


def _crossing(nodes: Sequence[ir.Node], start: int, dynamic: set[ir.Value]) -> list[ir.Value]:
    """The values made before ``start`` that are read at or behind it, in the order in which they are read."""
    made = {output for node in nodes[start:] for output in node.outputs}
    return list(dict.fromkeys(value for node in nodes[start:] for value in values_read(node) if value in dynamic and value not in made))
