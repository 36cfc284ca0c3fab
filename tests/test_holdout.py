from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqonnx.calib.data.holdout import Part, count_samples, has_free_batch
from fqonnx.model import ModelInput

if TYPE_CHECKING:
    from collections.abc import Iterator


class Listed:
    def __init__(self, sizes: list[int]) -> None:
        rows = iter(range(sum(sizes)))
        self.feeds = [{"x": np.array([[next(rows)] for _ in range(size)]), "m": np.ones((size, 2))} for size in sizes]
        self.length = len(sizes)
        self.fingerprint = "all"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.feeds)


def item(name: str, *shape: int | str | None) -> ModelInput:
    return ModelInput(name, np.dtype(np.float32), shape)


@pytest.mark.parametrize(
    ("inputs", "free"),
    [
        ([item("a", "batch", 4), item("b", "batch")], True),
        ([item("a", "batch", 4), item("b", "other")], False),
        ([item("a", 4, 4)], False),
        ([item("a", None, 4)], False),
        ([item("a")], False),
        ([item("a", "batch", 4), item("b")], False),
    ],
)
def test_batch_is_free_where_every_input_has_the_same_dynamic_first_axis(inputs: list[ModelInput], free: bool) -> None:
    assert has_free_batch(inputs) is free


def test_a_feed_counts_its_rows_only_where_the_batch_is_free() -> None:
    feed = {"x": np.ones((3, 2)), "m": np.ones((3, 1))}
    assert count_samples(feed, free_batch=True) == 3
    assert count_samples(feed, free_batch=False) == 1
    assert count_samples({**feed, "scalar": np.float32(1)}, free_batch=True) == 1


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_two_parts_are_the_whole(sizes: list[int], data: st.DataObject) -> None:
    source, total = Listed(sizes), sum(sizes)
    cut = data.draw(st.integers(0, total))
    parts = Part(source, 0, cut, tuple(sizes)), Part(source, cut, total, tuple(sizes))
    seen = [row for part in parts for feed in part for row in feed["x"][:, 0].tolist()]
    assert seen == list(range(total))
    for part in parts:
        feeds = list(part)
        assert part.length == len(part) == len(feeds)
        assert part.counts == [len(feed["x"]) for feed in feeds]
        assert part.samples == sum(len(feed["x"]) for feed in feeds)
        assert all(len(feed["m"]) == len(feed["x"]) for feed in feeds)
    assert parts[0].fingerprint != parts[1].fingerprint


def test_a_whole_feed_is_handed_on_as_it_is() -> None:
    source = Listed([2, 2])
    assert next(iter(Part(source, 0, 3, (2, 2)))) is source.feeds[0]
