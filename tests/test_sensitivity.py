"""Sensitivity: what a group alone does to the model's outputs, in every form of graph; the estimate; allocations that builds obey."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fqonnx.metrics import Divergence
from fqonnx.passes.linears import find_for
from fqonnx.passes.prepare import prepare
from fqonnx.passes.quantize import Quantize
from fqonnx.recipe import SCHEMES, Recipe
from fqonnx.sensitivity_measure import Probe
from tests import rewriting, runtime, zoo

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

PLAIN = Recipe(transform="none", weights="rtn")
SEVERAL = [name for name, case in zoo.ZOO.items() if case.runs and case.groups]


def prepared(name: str) -> tuple[ir.Model, Recipe, list[dict[str, npt.NDArray[Any]]]]:
    proto = zoo.proto(name)
    options = zoo.ZOO[name].options
    recipe = Recipe(
        transform="none",
        weights="rtn",
        keep=tuple(options.get("keep", ())),
        quantize_head=options.get("quantize_head", False),
        group_size=options.get("group_size", 0),
    )
    return prepare(ir.from_proto(proto)), recipe, [zoo.feeds(proto, seed) for seed in (0, 1)]


@pytest.mark.parametrize("name", SEVERAL)
def test_a_group_alone_is_measured_as_in_the_whole_model(name: str, tmp_path: Path) -> None:
    """Only what lies behind a group is run; the figure is that of the whole model with this group quantized."""
    model, recipe, feeds = prepared(name)
    groups = find_for(model, recipe).groups
    solutions = rewriting.solve(groups, SCHEMES["w4a4"], group_size=recipe.group_size)
    outputs = [value.name or "" for value in model.graph.outputs]
    references = [runtime.run(model, feed) for feed in feeds]
    measured = {}
    with Probe(model, recipe, feeds, tmp_path) as probe:
        for group, cut in probe.groups():
            measured[group] = cut.quantized(solutions.__getitem__, recipe)
            assert cut.gain() >= 0
    assert set(measured) == {group.name for group in groups}
    assert not list(tmp_path.iterdir())
    for name_, error in measured.items():
        whole = model.clone()
        Quantize([g for g in find_for(whole, recipe).groups if g.name == name_], solutions.__getitem__, recipe)(whole)
        RemoveUnusedNodesPass()(whole)
        errors = {output: Divergence() for output in outputs}
        for feed, reference in zip(feeds, references, strict=True):
            found = runtime.run(whole, feed)
            for output in outputs:
                errors[output].update(reference[output], found[output])
        assert error.rel_l2 == pytest.approx(max(e.rel_l2 for e in errors.values()), rel=1e-3, abs=1e-6)
