"""Which scheme each group gets: the smallest error for an average of bits, or the fewest bits for an error.

Every group is an item of a knapsack with one option per scheme: a cost in bits, and the error of the model when that group alone is
quantized so. Errors are taken to add up, which they do to first order where they are squares (noise of independent roundings) or KL
divergences (quadratic in a small change of the logits).

**Average bits** are those of both operands of the multiplications: a scheme's bits are the mean of its weight bits and its activation
bits, and a group counts by its parameters, which are its multiplications per token. w4a4 is 4, w4a8 6, w8a8 8, w8a16 12, float 16. An
average of weight bits alone would make w4a8 as cheap as w4a4. Only the groups that the schemes are chosen for count: not what ``--keep``
leaves in float, no embeddings, no scales or transforms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fqonnx.errors import UsageError
from fqonnx.recipe import GROUP_SCHEMES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Bits:
    """Average bits over groups, weighted by their parameters.

    Attributes:
        weights: Of a weight.
        activations: Of an activation.
    """

    weights: float
    activations: float

    @property
    def average(self) -> float:
        """Of both operands; what ``--avg-bits`` bounds."""
        return (self.weights + self.activations) / 2


def average_bits(parameters: Mapping[str, int], schemes: Mapping[str, str]) -> Bits:
    """The average bits of groups.

    Args:
        parameters: Weights of each group, by name.
        schemes: The scheme of each, a key of ``GROUP_SCHEMES``.
    """
    total = sum(parameters.values())
    chosen = [(parameters[name], GROUP_SCHEMES[scheme]) for name, scheme in schemes.items()]
    return Bits(sum(n * s.weight_bits for n, s in chosen) / total, sum(n * s.activation_bits for n, s in chosen) / total)


@dataclass(frozen=True)
class Option:
    """A scheme that a group may get.

    Attributes:
        scheme: Its name.
        cost: Bits of both operands of the group's multiplications, ``parameters · (weight bits + activation bits)``.
        error: What it does to the model, in a measure that adds up; NaN and infinite where it ruins it.
    """

    scheme: str
    cost: int
    error: float


@dataclass(frozen=True)
class Item:
    """A group and its options."""

    name: str
    options: tuple[Option, ...]

    @classmethod
    def of(cls, name: str, parameters: int, errors: Mapping[str, float]) -> Item:
        """The item of a group with so many parameters, from its error in each scheme."""
        bits = {scheme: GROUP_SCHEMES[scheme].weight_bits + GROUP_SCHEMES[scheme].activation_bits for scheme in errors}
        return cls(name, tuple(Option(scheme, parameters * bits[scheme], error) for scheme, error in errors.items()))


@dataclass(frozen=True)
class Point:
    """An allocation as a whole.

    Attributes:
        cost: Sum of the options' costs.
        error: Sum of their errors.
        schemes: The scheme of each group by name.
    """

    cost: int
    error: float
    schemes: dict[str, str]


class Frontier:
    """Every allocation that no other one beats in cost and error both, found exactly.

    Dynamic programming over the groups with dominated states dropped (Nemhauser and Ullmann, Management Science 15, 1969): costs need no
    common grid, and one pass answers every budget. There are at most as many states as distinct costs.

    Args:
        items: The groups.

    Raises:
        UsageError: A group has no option with a finite error.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = _usable(items)
        self._stages: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]] = []
        costs: npt.NDArray[np.int64] = np.zeros(1, np.int64)
        errors: npt.NDArray[np.float64] = np.zeros(1)
        for item in self._items:
            all_costs = (costs[:, None] + np.array([option.cost for option in item.options], np.int64)).ravel()
            all_errors = (errors[:, None] + [option.error for option in item.options]).ravel()
            order = np.lexsort((all_errors, all_costs))
            best = np.minimum.accumulate(all_errors[order])
            kept = order[np.r_[True, best[1:] < best[:-1]]]
            costs, errors = all_costs[kept], all_errors[kept]
            parent, choice = np.divmod(kept, len(item.options))
            self._stages.append((parent.astype(np.int32), choice.astype(np.int16)))
        self.costs = costs
        """Rising, int64."""
        self.errors = errors
        """Of the same points, falling."""

    def __len__(self) -> int:
        return len(self.costs)

    def point(self, index: int) -> Point:
        """The allocation at ``index``, from the cheapest up."""
        cost, error, schemes = int(self.costs[index]), float(self.errors[index]), {}
        for item, (parent, choice) in zip(reversed(self._items), reversed(self._stages), strict=True):
            schemes[item.name] = item.options[int(choice[index])].scheme
            index = int(parent[index])
        return Point(cost, error, dict(reversed(schemes.items())))

    def within_cost(self, budget: float) -> Point | None:
        """The smallest error that costs at most ``budget``; None where nothing does."""
        count = int(np.searchsorted(self.costs, budget, side="right"))
        return self.point(count - 1) if count else None

    def within_error(self, bound: float) -> Point | None:
        """The lowest cost with an error of at most ``bound``; None where nothing has one."""
        fitting = np.flatnonzero(self.errors <= bound)
        return self.point(int(fitting[0])) if len(fitting) else None


def greedy(items: Sequence[Item], *, budget: float = math.inf, bound: float = 0.0) -> Point | None:
    """From the cheapest option of every group, take the upgrade that saves the most error per bit until nothing fits or helps any more.

    Args:
        items: The groups.
        budget: Cost at most.
        bound: Stop once the error is this small.

    Returns:
        The allocation; None where the cheapest one exceeds the budget already. Whether it is within ``bound`` is for the caller to see.

    Raises:
        UsageError: A group has no option with a finite error.
    """
    items = _usable(items)
    chosen = [min(item.options, key=lambda option: (option.cost, option.error)) for item in items]
    cost, error = sum(option.cost for option in chosen), math.fsum(option.error for option in chosen)
    if cost > budget:
        return None
    while error > bound:
        upgrades = [
            ((now.error - option.error) / max(option.cost - now.cost, 1e-9), index, option)
            for index, (item, now) in enumerate(zip(items, chosen, strict=True))
            for option in item.options
            if option.error < now.error and cost + option.cost - now.cost <= budget
        ]
        if not upgrades:
            break
        _, index, option = max(upgrades, key=lambda upgrade: upgrade[:1])
        cost += option.cost - chosen[index].cost
        chosen[index] = option
        error = math.fsum(option.error for option in chosen)
    return Point(cost, error, {item.name: option.scheme for item, option in zip(items, chosen, strict=True)})


def allocate(items: Sequence[Item], parameters: int, *, avg_bits: float | None = None, error: float | None = None, method: str) -> Point:
    """Choose a scheme per group.

    Args:
        items: The groups.
        parameters: Of all of them.
        avg_bits: Bound on the average bits; the error is made as small as it allows.
        error: Bound on the error; the cost is made as small as it allows. Exactly one of the two is given.
        method: One of ``fqonnx.recipe.ALLOCATIONS``.

    Raises:
        UsageError: Nothing is within the bound, or a group has no option with a finite error.
    """
    point: Point | None
    if avg_bits is not None:
        budget = 2 * avg_bits * parameters * (1 + 1e-12)  # 4.3 in binary is a little below 4.3
        point = Frontier(items).within_cost(budget) if method == "dynamic" else greedy(items, budget=budget)
        if point is None:
            least = sum(min(option.cost for option in item.options) for item in _usable(items)) / (2 * parameters)
            raise UsageError(
                f"--avg-bits {avg_bits:g} is less than the schemes allow: give {_up(least)} or more, or --mix schemes of fewer bits"
            )
        return point
    assert error is not None
    point = Frontier(items).within_error(error) if method == "dynamic" else greedy(items, bound=error)
    if point is None or point.error > error:
        raise UsageError("no choice among the schemes keeps the error within --max-error: allow more, or let --mix include float")
    return point


def _up(bits: float) -> str:
    """Rounded up, so that what is told to be enough is."""
    return f"{math.ceil(bits * 100 - 1e-9) / 100:g}"


def _usable(items: Sequence[Item]) -> list[Item]:
    usable = [Item(item.name, tuple(option for option in item.options if math.isfinite(option.error))) for item in items]
    for item in usable:
        if not item.options:
            raise UsageError(f"group {item.name!r} ruins the model in every scheme: let --mix include float, or leave it alone with --keep")
    return usable
