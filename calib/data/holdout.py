"""Parts of a source by sample: what calibration sees, and what is held out from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fqonnx.calib.data.base import Feeds, Source
    from fqonnx.model import ModelInput


def has_free_batch(inputs: Sequence[ModelInput]) -> bool:
    """Whether the first axis of every input is the same dynamic axis, so that any rows of a feed are a feed too."""
    first = {item.shape[0] if item.shape else None for item in inputs}
    return len(first) == 1 and isinstance(next(iter(first)), str)


def count_samples(feed: Feeds, *, free_batch: bool) -> int:
    """Samples in one feed: its rows where the model's batch is free, else the feed is one."""
    sizes = {len(array) if array.ndim else 0 for array in feed.values()}
    return sizes.pop() if free_batch and len(sizes) == 1 else 1


@dataclass(frozen=True)
class Part:
    """Samples ``start`` to ``stop`` of a source, itself a source; a feed that lies across an end is cut between two rows.

    Attributes:
        source: The whole.
        start: First sample.
        stop: The sample after the last.
        sizes: Samples in each feed of the source.
    """

    source: Source
    start: int
    stop: int
    sizes: tuple[int, ...]

    def __iter__(self) -> Iterator[Feeds]:
        for feed, (index, first, last) in zip(self.source, self._cuts(), strict=False):
            if first == 0 and last == self.sizes[index]:
                yield feed
            elif first < last:
                yield {name: array[first:last] for name, array in feed.items()}

    def __len__(self) -> int:
        return self.length

    @property
    def length(self) -> int:
        """Feeds."""
        return sum(first < last for _, first, last in self._cuts())

    @property
    def samples(self) -> int:
        """Samples."""
        return self.stop - self.start

    @property
    def counts(self) -> list[int]:
        """Samples of each feed."""
        return [last - first for _, first, last in self._cuts() if first < last]

    @property
    def fingerprint(self) -> str:
        """That of the source, and which part."""
        return f"{self.source.fingerprint}[{self.start}:{self.stop}]"

    def _cuts(self) -> Iterator[tuple[int, int, int]]:
        """Each feed up to the last that counts: its index, and the rows that belong to the part, none where first >= last."""
        offset = 0
        for index, size in enumerate(self.sizes):
            if offset >= self.stop:
                return
            yield index, max(self.start - offset, 0), min(self.stop - offset, size)
            offset += size
