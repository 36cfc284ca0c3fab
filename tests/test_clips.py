from dataclasses import replace

import numpy as np
import pytest
import torch

from fqonnx.calib import moments
from fqonnx.calib.clips import CLIPS, with_clip
from fqonnx.calib.solution import GroupStats
from fqonnx.calib.solve_group import solve_group
from fqonnx.calib.transforms.base import FittedTransform, Problem
from fqonnx.recipe import SCHEMES, Recipe


def problem(scheme: str = "w4a4") -> Problem:
    """Bell-shaped rows: their largest value is far out."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 64, generator=g)
    return Problem(torch.randn(32, 64, generator=g), x, x.abs().amax(0), SCHEMES[scheme], 0, seed=0, out_features=(8, 24))


def test_the_clip_has_the_smallest_output_error_of_those_tried() -> None:
    p = problem()
    assert p.tokens is not None
    y = p.tokens @ p.weight.mT
    errors = {clip: float((moments.quantize_input(p.tokens, 4, clip) @ p.weight.mT - y).norm()) for clip in CLIPS}
    found = with_clip(FittedTransform(), p).clip
    assert errors[found] == pytest.approx(min(errors.values()), rel=1e-2)  # it counts each linear by itself
    assert errors[found] < 0.95 * errors[1.0]


@pytest.mark.parametrize("p", [problem("w4a16"), replace(problem(), tokens=None)])
def test_without_tokens_or_with_float_activations_there_is_none(p: Problem) -> None:
    assert with_clip(FittedTransform(), p).clip == 1


def test_groups_get_it_where_there_are_tokens() -> None:
    p = problem()
    assert p.tokens is not None
    x = p.tokens.numpy()
    stats = GroupStats(x, x.T @ x / len(x), np.abs(x).max(0), len(x))
    clips = {}
    for transform, given in (("hadamard", stats), ("hadamard", None), ("flatquant", stats)):
        clips[transform, given is None] = solve_group(
            "g", p.weight.numpy(), given, Recipe(transform=transform, weights="rtn", steps=2), seed=0
        ).clip
    assert clips["hadamard", False] in CLIPS[1:]
    assert clips["hadamard", True] == 1
    assert clips["flatquant", False] not in CLIPS  # its own
