"""Schemes per group: exact against trying everything, within the budget, and what cannot be is told."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from fqonnx.allocation import Bits, Frontier, Item, Option, Point, allocate, average_bits, greedy
from fqonnx.errors import UsageError
from fqonnx.recipe import ALLOCATIONS, GROUP_SCHEMES, SCHEMES, Recipe

CHOICES = ("w4a4", "w4a8", "w8a8", "w8a16", "float")


def random_items(seed: int, groups: int = 5, *, ordered: bool = True) -> tuple[list[Item], int]:
    """Groups of odd sizes; errors fall with the bits, or are anything at all."""
    rng = np.random.default_rng(seed)
    items, parameters = [], 0
    for index in range(groups):
        size = int(rng.integers(100, 1000))
        errors = rng.exponential(size=len(CHOICES))
        parameters += size
        items.append(Item.of(f"g{index}", size, dict(zip(CHOICES, sorted(errors, reverse=True) if ordered else errors, strict=True))))
    return items, parameters


def everything(items: list[Item]) -> list[Point]:
    found = []
    for options in product(*(item.options for item in items)):
        schemes = {item.name: option.scheme for item, option in zip(items, options, strict=True)}
        found.append(Point(sum(option.cost for option in options), sum(option.error for option in options), schemes))
    return found


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "any"])
@pytest.mark.parametrize("seed", range(6))
def test_the_dynamic_programme_finds_what_trying_everything_finds(seed: int, ordered: bool) -> None:
    items, parameters = random_items(seed, ordered=ordered)
    every, frontier = everything(items), Frontier(items)
    for avg_bits in (4, 4.1, 4.5, 5, 6.3, 8, 11, 16, 20):
        best = min(p.error for p in every if p.cost <= 2 * avg_bits * parameters)
        point = frontier.within_cost(2 * avg_bits * parameters)
        assert point is not None
        assert point.error == pytest.approx(best, abs=1e-12)
        assert point.cost <= 2 * avg_bits * parameters
        chosen = {item.name: {o.scheme: o for o in item.options}[point.schemes[item.name]] for item in items}
        assert sum(o.cost for o in chosen.values()) == point.cost
        assert sum(o.error for o in chosen.values()) == pytest.approx(point.error)
    for bound in (0.5, 1, 2, 4):
        cheapest = min((p.cost for p in every if p.error <= bound), default=None)
        point = frontier.within_error(bound)
        assert (point and point.cost) == cheapest


def test_the_frontier_is_every_allocation_that_none_beats() -> None:
    items, _ = random_items(9, groups=4)
    every = everything(items)
    unbeaten = {p.cost for p in every if not any(q.cost <= p.cost and q.error < p.error for q in every)}
    frontier = Frontier(items)
    assert list(frontier.costs) == sorted(unbeaten)
    assert all(np.diff(frontier.errors) < 0)
    assert [frontier.point(i).cost for i in range(len(frontier))] == list(frontier.costs)


def test_a_large_model_is_exact_too() -> None:
    """128 groups of a 7B's shapes: more allocations than can be tried; a bound from both sides instead."""
    rng = np.random.default_rng(0)
    sizes = [3 * 4096 * 4096, 4096 * 4096, 2 * 4096 * 11008, 11008 * 4096] * 32
    items = [Item.of(f"g{i}", size, dict(zip(CHOICES, sorted(rng.exponential(size=5))[::-1], strict=True))) for i, size in enumerate(sizes)]
    frontier, parameters = Frontier(items), sum(sizes)
    for avg_bits in (4.5, 6):
        exact, quick = frontier.within_cost(2 * avg_bits * parameters), greedy(items, budget=2 * avg_bits * parameters)
        assert exact is not None
        assert quick is not None
        assert exact.error <= quick.error
        assert quick.error < 1.05 * exact.error
        assert max(exact.cost, quick.cost) <= 2 * avg_bits * parameters


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ALLOCATIONS)
def test_the_budget_is_obeyed_and_used(method: str, seed: int) -> None:
    items, parameters = random_items(seed, groups=40)
    sizes = {item.name: item.options[0].cost // 8 for item in items}
    before = math.inf
    for avg_bits in (4, 4.3, 4.5, 5, 7, 16):
        point = allocate(items, parameters, avg_bits=avg_bits, method=method)
        bits = average_bits(sizes, point.schemes)
        assert bits.average <= avg_bits + 1e-9
        assert bits.average > avg_bits - 0.3
        assert point.error <= before
        before = point.error


@pytest.mark.parametrize("method", ALLOCATIONS)
def test_the_fewest_bits_within_an_error(method: str) -> None:
    items, parameters = random_items(3, groups=20)
    costs = []
    for error in (6.0, 10.0, 20.0):
        point = allocate(items, parameters, error=error, method=method)
        assert point.error <= error
        costs.append(point.cost)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_greedy_takes_the_upgrade_that_saves_most_per_bit_and_skips_what_does_not_fit() -> None:
    large = Item("large", (Option("w4a4", 80, 5.0), Option("w4a8", 120, 1.0)))  # 0.1 per bit
    small = Item("small", (Option("w4a4", 8, 2.0), Option("w4a8", 12, 1.0), Option("w8a8", 16, 0.9)))  # 0.25, then 0.025
    assert greedy([large, small], budget=130) == Point(96, 5.9, {"large": "w4a4", "small": "w8a8"})
    assert greedy([large, small], budget=132) == Point(132, 2.0, {"large": "w4a8", "small": "w4a8"})
    assert greedy([large, small], budget=87) is None
    assert greedy([large, small], bound=6.0) == Point(92, 6.0, {"large": "w4a4", "small": "w4a8"})


@pytest.mark.parametrize("method", ALLOCATIONS)
def test_what_ruins_the_model_is_never_chosen(method: str) -> None:
    items = [Item.of("a", 10, {"w4a4": math.nan, "w4a8": math.inf, "w8a8": 0.5}), Item.of("b", 10, {"w4a4": 0.1, "w8a8": 0.01})]
    assert allocate(items, 20, avg_bits=6, method=method).schemes == {"a": "w8a8", "b": "w4a4"}
    with pytest.raises(UsageError, match=r"--avg-bits 5 is less than the schemes allow: give 6 or more"):
        allocate(items, 20, avg_bits=5, method=method)
    with pytest.raises(UsageError, match="group 'a' ruins the model in every scheme"):
        allocate([Item.of("a", 10, {"w4a4": math.nan})], 10, avg_bits=4, method=method)
    with pytest.raises(UsageError, match="no choice among the schemes keeps the error within --max-error"):
        allocate(items, 20, error=0.4, method=method)


def test_average_bits_are_those_of_both_operands_weighted_by_parameters() -> None:
    assert average_bits({"a": 300, "b": 100}, {"a": "w4a4", "b": "w4a8"}) == Bits(4.0, 5.0)
    assert average_bits({"a": 300, "b": 100}, {"a": "w4a4", "b": "w4a8"}).average == 4.5
    assert {name: average_bits({"a": 7}, {"a": name}).average for name in CHOICES} == {
        "w4a4": 4,
        "w4a8": 6,
        "w8a8": 8,
        "w8a16": 12,
        "float": 16,
    }
    # The bound is the strictest of the three: no scheme has more weight bits than activation bits.
    assert all(scheme.weight_bits <= scheme.activation_bits for scheme in GROUP_SCHEMES.values())


def test_a_recipe_resolves_each_groups_scheme() -> None:
    recipe = Recipe(scheme="w4a4", schemes=(("down", "w4a8"), ("layers.1.up", "float"), ("layers.1", "w8a16"), ("up", "w8a8")))
    schemes = {name: recipe.scheme_of(name).name for name in ("layers.0.down", "layers.1.up", "layers.1.q", "layers.11.up", "layers.0.q")}
    assert schemes == {
        "layers.0.down": "w4a8",
        "layers.1.up": "float",  # its very name
        "layers.1.q": "w8a16",
        "layers.11.up": "w8a16",  # the first pattern that matches
        "layers.0.q": "w4a4",
    }
    assert recipe.for_group("layers.0.down") == Recipe(scheme="w4a8")
    assert recipe.for_group("layers.1.q") == Recipe(scheme="w8a16", transform="none")
    assert Recipe(scheme="w8a16").for_group("any") == Recipe(scheme="w8a16")
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("schemes", "words"),
    [
        ({"a": "w2a2"}, f"unknown scheme of group 'a' 'w2a2': choose from {', '.join([*SCHEMES, 'float'])}"),
        ({"(": "w4a8"}, r"--group-scheme '(' is not a regular expression"),
        (["a"], "recipe key 'schemes' is ['a']: give a table of schemes by group"),
        ({"a": 4}, "give a table of schemes by group"),
    ],
)
def test_bad_schemes_are_told(schemes: object, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_dict({"schemes": schemes})
    assert words in str(caught.value)
