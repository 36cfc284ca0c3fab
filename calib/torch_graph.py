"""Runs a part of an ONNX graph in torch, differentiably: what block reconstruction trains through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from fqonnx.calib.torch_ops import DTYPES, OPERATORS, UnsupportedError
from fqonnx.errors import CalibrationError, ModelError
from fqonnx.passes.constants import is_constant, read

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from fqonnx.passes.groups import LinearGroup

Sizes = dict[tuple[object, ...], dict[str, torch.Tensor]]
"""Outputs of ``Shape`` nodes by the shapes of the feeds: they outlive the part of the graph that made them."""

CACHED_SHAPES = 8
"""Shapes of feeds whose masks and position tables are kept; others are computed anew."""

_HOST_ELEMENTS = 64
"""Integer constants up to this size are sizes, axes and indices: they stay on the CPU."""


class TorchGraph:
    """The nodes that compute some values from others, as a function of torch tensors.

    Only what the outputs need is run. Values that depend on the feeds' shapes alone (causal masks, position tables) are computed once
    for each shape. Quantized linears are taken out: a callable gives the outputs of a group for the group's input.

    Args:
        outputs: What to compute.
        given: Values that the caller provides; the graph behind them is not run.
        groups: Groups whose linears the caller computes.
        device: Where to run. Sizes and indices stay on the CPU.
        sizes: Outputs of ``Shape`` nodes of parts that ran before; those made here are added.

    Raises:
        ModelError: The part holds an operator, or a form of one, that is not supported; the message names it.
    """

    def __init__(
        self,
        outputs: Sequence[ir.Value],
        given: Collection[ir.Value],
        groups: Iterable[LinearGroup] = (),
        *,
        device: torch.device | str = "cpu",
        sizes: Sizes | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.outputs = tuple(outputs)
        self._given = frozenset(given)
        self._group_of = {linear.output: group for group in groups for linear in group.linears}
        self._sizes: Sizes = {} if sizes is None else sizes
        self._static: dict[tuple[object, ...], dict[ir.Value, torch.Tensor]] = {}
        self._moved: dict[ir.Value, tuple[torch.Tensor, torch.Tensor]] = {}
        known = {name for made in self._sizes.values() for name in made}
        self._steps, self._constant_values, self._carried = self._plan(known)
        self._constants = {value: self._constant(value) for value in self._constant_values}
        self._is_static = self._static_values()
        self._last_use = self._lifetimes()

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The groups that are needed, in the order in which they run."""
        return tuple(dict.fromkeys(self._group_of[step] for step in self._steps if isinstance(step, ir.Value)))

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """The given values and graph inputs that are read."""
        return self._inputs

    def __call__(
        self,
        feeds: Mapping[str, torch.Tensor],
        linears: Callable[[LinearGroup, torch.Tensor], Sequence[torch.Tensor]] | None = None,
        *,
        key: Mapping[str, torch.Tensor] | None = None,
        changes: Mapping[ir.Value, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run.

        Args:
            feeds: Tensors by the names of given values and graph inputs; those that are not read may be missing.
            linears: Gives the outputs of a group's linears for the group's input.
            key: The sample's graph inputs, whose shapes say which sizes apply; None takes ``feeds``.
            changes: By value, what is done to it before anything reads it: to results of nodes that depend on the feeds' contents.

        Returns:
            The outputs by name.

        Raises:
            CalibrationError: An index that the feeds lead to is out of range.
        """
        changes = changes or {}
        shapes = shapes_of(feeds if key is None else key)
        sizes = self._sizes.setdefault(shapes, {})
        static = self._static.get(shapes)
        ready = static is not None
        if static is None:
            static = {}
        values: dict[ir.Value, torch.Tensor] = dict(self._constants)
        for value in self._inputs:
            values[value] = self._placed(feeds[value.name or ""])
        for value in self._carried:
            values[value] = sizes[value.name or ""]
        for index, step in enumerate(self._steps):
            if isinstance(step, ir.Value):
                if step not in values:
                    assert linears is not None
                    group = self._group_of[step]
                    made = linears(group, values[group.input])
                    values.update((linear.output, y) for linear, y in zip(group.linears, made, strict=True))
            elif ready and step in self._is_static:
                values.update((value, static[value]) for value in step.outputs if value in static)
            else:
                self._run(step, values)
                values.update((value, changes[value](values[value])) for value in step.outputs if value in changes)
                if step in self._is_static:
                    static.update((value, values[value]) for value in step.outputs if value in values)
            for value in self._last_use.get(index, ()):
                values.pop(value, None)
        sizes.update((value.name or "", size) for value, size in static.items() if _is_size(value))
        if not ready and len(self._static) < CACHED_SHAPES:
            # What only static values read is not needed again, but small; large ones that are read are what the cache is for.
            self._static[shapes] = {value: self._placed(tensor) for value, tensor in static.items()}
        return {value.name or "": values[value] for value in self.outputs}

    def _run(self, node: ir.Node, values: dict[ir.Value, torch.Tensor]) -> None:
        operator = OPERATORS[node.domain, node.op_type]
        operands = [None if value is None else values[value] for value in node.inputs]
        try:
            result = operator(node, *self._together(node, operands))
        except UnsupportedError as error:
            raise _unsupported(node, str(error)) from None
        except IndexError as error:
            raise CalibrationError(f"node {node.name!r} ({node.op_type}): {error}: an id or a position lies beyond its table") from None
        results = result if isinstance(result, tuple) else (result,)
        values.update((value, made) for value, made in zip(node.outputs, results, strict=False) if made is not None)

    def _together(self, node: ir.Node, operands: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Operands on one device: those on the CPU follow where an operator reads values, and stay where it reads sizes."""
        if self.device.type == "cpu" or all(x is None or x.device.type == "cpu" for x in operands):
            return operands
        host = _HOST_OPERANDS.get(node.op_type, range(0))
        return [
            x if x is None or value is None or index in host or x.device.type != "cpu" else self._copied(value, x)
            for index, (value, x) in enumerate(zip(node.inputs, operands, strict=True))
        ]

    def _copied(self, value: ir.Value, x: torch.Tensor) -> torch.Tensor:
        """A tensor of the CPU on the device, copied once as long as it stays the same: a CUDA graph cannot hold the copy."""
        known = self._moved.get(value)
        if known is None or known[0] is not x:
            known = self._moved[value] = x, x.to(self.device)
        return known[1]

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        on_host = not tensor.dtype.is_floating_point and tensor.numel() <= _HOST_ELEMENTS
        return tensor if on_host else tensor.to(self.device)

    def _constant(self, value: ir.Value) -> torch.Tensor:
        array = read(value)
        if array.dtype.kind not in "iubf" and array.dtype.name not in ("bfloat16", "float16", "int4", "uint4"):
            raise ModelError(f"constant {value.name!r} is {array.dtype}: use --reconstruct group")
        if array.dtype.name == "float16" or array.dtype.kind not in "iubf":
            array = array.astype(np.float32)
        return self._placed(torch.from_numpy(np.array(array)))

    def _plan(self, known: Collection[str]) -> tuple[list[ir.Node | ir.Value], list[ir.Value], list[ir.Value]]:
        """Steps in an order in which they can run: nodes, and a linear's output for its group; the constants; sizes made before."""
        steps: list[ir.Node | ir.Value] = []
        constants: list[ir.Value] = []
        carried: list[ir.Value] = []
        inputs: list[ir.Value] = []
        done: set[ir.Value] = set()
        stack: list[tuple[ir.Value, bool]] = [(value, False) for value in reversed(self.outputs)]
        while stack:
            value, visited = stack.pop()
            if value in done:
                continue
            if visited:
                step = value if value in self._group_of else value.producer()
                assert step is not None
                steps.append(step)
                done.update([value] if isinstance(step, ir.Value) else step.outputs)
                continue
            node = value.producer()
            if value in self._given or (node is None and not is_constant(value)):
                inputs.append(value)
            elif value in self._group_of:
                stack += [(value, True), (self._group_of[value].input, False)]
                continue
            elif is_constant(value):
                constants.append(value)
            else:
                assert node is not None
                if node.op_type == "Shape" and node.inputs[0] not in done and value.name in known:
                    carried.append(value)
                else:
                    _require(node)
                    stack.append((value, True))
                    stack += [(operand, False) for operand in reversed(node.inputs) if operand is not None]
                    continue
            done.add(value)
        self._inputs = tuple(inputs)
        return _measuring(inputs, steps), constants, carried

    def _static_values(self) -> frozenset[ir.Node]:
        """Nodes whose results depend on nothing but constants and shapes."""
        fixed: set[ir.Value] = {*self._constants, *self._carried}
        found: set[ir.Node] = set()
        for step in self._steps:
            if isinstance(step, ir.Node) and (
                step.op_type == "Shape" or all(operand is None or operand in fixed for operand in step.inputs)
            ):
                found.add(step)
                fixed.update(step.outputs)
        return frozenset(found)

    def _lifetimes(self) -> dict[int, list[ir.Value]]:
        """By step, the values that nothing reads behind it."""
        last: dict[ir.Value, int] = {}
        for index, step in enumerate(self._steps):
            for operand in [self._group_of[step].input] if isinstance(step, ir.Value) else step.inputs:
                if operand is not None:
                    last[operand] = index
        kept = {*self.outputs, *self._constants}
        ends: dict[int, list[ir.Value]] = {}
        for value, index in last.items():
            if value not in kept:
                ends.setdefault(index, []).append(value)
        return ends


def _measuring(inputs: Sequence[ir.Value], steps: Sequence[ir.Node | ir.Value]) -> list[ir.Node | ir.Value]:
    """The steps, and every ``Shape`` of what they read and make: a part behind this one may ask for a size that it cannot measure."""
    present = {step for step in steps if isinstance(step, ir.Node)}

    def sizes(values: Iterable[ir.Value]) -> list[ir.Node]:
        found = dict.fromkeys(node for value in values for node, _ in value.uses() if (node.domain, node.op_type) == ("", "Shape"))
        return [node for node in found if node not in present]

    measuring: list[ir.Node | ir.Value] = [*sizes(inputs)]
    for step in steps:
        measuring += [step, *sizes([step] if isinstance(step, ir.Value) else step.outputs)]
    return measuring


_HOST_OPERANDS: dict[str, range] = {
    **dict.fromkeys(("Reshape", "Expand", "Unsqueeze", "Squeeze", "Split", "Tile", "Trilu", "CumSum"), range(1, 2)),
    **{f"Reduce{kind}": range(1, 2) for kind in ("L1", "L2", "Max", "Mean", "Min", "Sum", "SumSquare")},
    "ConstantOfShape": range(1),
    "Pad": range(1, 4),
    "Range": range(3),
    "Slice": range(1, 5),
}
"""Operands that are read on the CPU."""


def shapes_of(feeds: Mapping[str, torch.Tensor]) -> tuple[object, ...]:
    """The key of ``Sizes``."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(feeds.items()))


def _is_size(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Shape"


def _require(node: ir.Node) -> None:
    if (node.domain, node.op_type) not in OPERATORS:
        raise _unsupported(node, f"operator {node.domain + '.' if node.domain else ''}{node.op_type}")
    for value in node.outputs:
        if value.dtype is not None and value.dtype not in DTYPES:
            raise _unsupported(node, f"{node.op_type} of type {value.dtype.name}")


def _unsupported(node: ir.Node, what: str) -> ModelError:
    return ModelError(f"node {node.name!r}: {what} is not run in torch: use --reconstruct group")
