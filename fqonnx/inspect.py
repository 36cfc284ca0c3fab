"""What a build would do to a model: what it would quantize, what it would leave in float and why, and what that gains."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fqonnx import model as model_file
from fqonnx.passes import linears as linear_pass
from fqonnx.passes.prepare import prepare
from fqonnx.recipe import Recipe
from fqonnx.report import LeftReport, SizeReport
from fqonnx.sizes import constant_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from fqonnx.passes.groups import LinearGroup

_SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class GroupInspection:
    """One group that would be quantized.

    Attributes:
        name: The group's name.
        linears: Names of its linears.
        in_features: K.
        out_features: Sum of N.
        scale_folds_into_norm: Whether a channel scale costs nothing at run time.
        float_bytes: Of its weights, in the element type of its input.
        quantized_bytes: Of its weights and scales.
    """

    name: str
    linears: tuple[str, ...]
    in_features: int
    out_features: int
    scale_folds_into_norm: bool
    float_bytes: int
    quantized_bytes: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What ``fqonnx inspect`` shows.

    Attributes:
        model: The file.
        opset: Of the file, before it is raised.
        inputs: Name to element type and shape, in words.
        groups: What would be quantized, in graph order.
        left_in_float: Every other matrix product, and why.
        size: Bytes of the model's constants now, and what a build would make of them.
        recipe: The recipe that this holds for.
    """

    model: str
    opset: int
    inputs: dict[str, str]
    groups: tuple[GroupInspection, ...]
    left_in_float: tuple[LeftReport, ...]
    size: SizeReport
    recipe: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"quantized_share": self.quantized_share}

    @property
    def quantized_share(self) -> float:
        """Share of the multiplications by constant weights that would run on integers."""
        quantized = sum(group.in_features * group.out_features for group in self.groups)
        left = sum(_product(item.weight_shape) for item in self.left_in_float if item.weight_shape is not None)
        return quantized / (quantized + left) if quantized + left else 0.0


def inspect(path: Path | str, *, recipe: Recipe | None = None) -> Inspection:
    """Look at a model without running it or reading its weights.

    Args:
        path: An ``.onnx`` file.
        recipe: What a build would be asked for; None is the default recipe.

    Raises:
        ModelError: The file cannot be read, is quantized already, or holds an op that nothing here can run.
    """
    recipe = recipe or Recipe()
    model = model_file.load(path)
    opset = model_file.opset_of(model)
    model_file.require_float(model)
    inputs = {
        item.name: f"{item.dtype} [{', '.join('?' if dim is None else str(dim) for dim in item.shape)}]"
        for item in model_file.inputs(model)
    }
    float_bytes = constant_bytes(model)
    model = prepare(model)
    found = linear_pass.find_for(model, recipe)
    groups = tuple(_inspect_group(group, recipe) for group in found.groups)
    saved = sum(group.float_bytes - group.quantized_bytes for group in groups)
    return Inspection(
        model=str(path),
        opset=opset,
        inputs=inputs,
        groups=groups,
        left_in_float=tuple(LeftReport.of(left) for left in found.left_in_float),
        size=SizeReport(float_bytes=float_bytes, quantized_bytes=max(0, float_bytes - saved)),
        recipe=recipe.to_dict(),
    )


def _inspect_group(group: LinearGroup, recipe: Recipe) -> GroupInspection:
    weights = group.in_features * group.out_features
    scales = group.out_features * (group.in_features // recipe.group_size if recipe.group_size else 1)
    itemsize = 4 if group.input.dtype is None else group.input.dtype.itemsize
    return GroupInspection(
        name=group.name,
        linears=tuple(linear.name for linear in group.linears),
        in_features=group.in_features,
        out_features=group.out_features,
        scale_folds_into_norm=group.norm is not None,
        float_bytes=int(weights * itemsize),
        quantized_bytes=weights * recipe.scheme_of(group.name).weight_bits // 8 + scales * _SCALE_BYTES,
    )


def _alike(groups: tuple[GroupInspection, ...]) -> dict[tuple[str, int, int, bool], list[GroupInspection]]:
    """Groups that differ in the numbers in their names alone, such as the same one of every layer, under a name with ``*`` for those."""
    alike = defaultdict(list)
    for group in groups:
        alike[re.sub(r"\d+", "*", group.name), group.in_features, group.out_features, group.scale_folds_into_norm].append(group)
    return {(found[0].name if len(found) == 1 else key[0], *key[1:]): found for key, found in alike.items()}


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print tables for people: the groups, what stays in float by reason, and the gain."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from fqonnx.report import format as words

    console.print(f"[bold]{escape(inspection.model)}[/bold]  opset {inspection.opset}")
    for name, text in inspection.inputs.items():
        console.print(f"  input {escape(name)}: {escape(text)}")

    table = Table(
        title=f"{len(inspection.groups)} groups to quantize ({inspection.recipe['scheme']})", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("", justify="right")
    table.add_column("group", overflow="fold")
    for heading in ("K × N", "weights"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("scale", no_wrap=True)  # where a channel scale is applied
    for pattern, groups in _alike(inspection.groups).items():
        sizes = f"{words.size(sum(g.float_bytes for g in groups))} -> {words.size(sum(g.quantized_bytes for g in groups))}"
        where = "norm" if groups[0].scale_folds_into_norm else "online"
        table.add_row(str(len(groups)), escape(pattern[0]), f"{groups[0].in_features} × {groups[0].out_features}", sizes, where)
    if inspection.groups:
        console.print(table)

    if inspection.left_in_float:
        reasons = Counter(left.reason for left in inspection.left_in_float)
        example = {left.reason: left.name for left in reversed(inspection.left_in_float)}
        left_table = Table(
            title=f"{len(inspection.left_in_float)} matrix products left in float", title_justify="left", box=box.SIMPLE_HEAD
        )
        left_table.add_column("", justify="right")
        left_table.add_column("reason", overflow="fold")
        left_table.add_column("for example", overflow="fold")
        for reason, count in reasons.most_common():
            left_table.add_row(str(count), escape(reason), escape(example[reason]))
        console.print(left_table)

    size = inspection.size
    console.print(
        f"{words.size(size.float_bytes)} -> {words.size(size.quantized_bytes)} ({words.times(size.ratio)} smaller); "
        f"{words.percent(inspection.quantized_share)} of the weight multiplications quantized"
    )
