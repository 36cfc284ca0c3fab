"""Calibration data for training: samples of equal shapes together, and the activations of every chunk between two blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from fqonnx.calib.stream import Live

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fqonnx.calib.data.base import Feeds

    Tensors = dict[str, torch.Tensor]

HELD_OUT = 16
"""One chunk in this many is kept from training, where there are as many: the figures of the report are of it."""

DEFAULT_LIVE_BYTES = 2 << 30
"""Activations in memory; what goes beyond it waits on disk."""

DEVICE_SHARE = 0.25
"""Share of a GPU's free memory for activations; what goes beyond it waits in the host's."""


class Chunks:
    """Feeds and streams of activations by chunk.

    Args:
        source: Feeds of the model; read once.
        workdir: Folder for what does not fit in memory.
        tokens: Rows of a chunk, as far as feeds of equal shapes can be stacked.
        stacks: Whether feeds of equal shapes can be: the first axis of every input is the same free axis.
        copies: More feeds to train on, each with the index of the one in ``source`` that it is made of; left out where that is held out.
        mask: The input ``[batch, sequence]`` that is zero where a token is padding, or None.
        live_bytes: Bytes in memory.
        device: Where tensors are given, and on a GPU kept as far as ``DEVICE_SHARE`` goes.
    """

    def __init__(
        self,
        source: Iterable[Feeds],
        workdir: Path,
        *,
        tokens: int,
        stacks: bool,
        copies: Iterable[tuple[int, Feeds]] = (),
        mask: str | None = None,
        live_bytes: int = DEFAULT_LIVE_BYTES,
        device: torch.device | str = "cpu",
    ) -> None:
        self._live = Live(workdir, live_bytes)
        self._device = torch.device(device)
        self._near: dict[tuple[str, int], torch.Tensor] = {}
        self._far: set[str] = set()
        self._room = int(DEVICE_SHARE * torch.cuda.mem_get_info(self._device)[0]) if self._device.type == "cuda" else 0
        self._mask = mask
        self._names: list[str] = []
        self._lasting: set[str] = {"mask"}
        self._padded: set[int] = set()
        self.rows: list[int] = []
        self._stacked = tokens if stacks else 0
        chunk_of = self._read(enumerate(source))
        self._originals = len(self)
        self._read((index, feed) for index, feed in copies if chunk_of[index] not in self.held_out)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.__exit__()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def training(self) -> list[int]:
        """Chunks that are trained on: all but every ``HELD_OUT``-th."""
        return [index for index in range(len(self)) if index not in self.held_out]

    @property
    def held_out(self) -> range:
        """Chunks that are not; empty where there are fewer than ``HELD_OUT``."""
        return range(HELD_OUT - 1, self._originals, HELD_OUT)

    def feeds(self, chunk: int) -> Tensors:
        """The model's inputs, on the device."""
        return {name: self.get(f"feed {name}", chunk) for name in self._names}

    def mask(self, chunk: int) -> torch.Tensor | None:
        """``[batch, sequence]``: what is not padding; None where the data have no padding mask, or it masks nothing."""
        return self.get("mask", chunk) if chunk in self._padded else None

    def put(self, stream: str, chunk: int, activation: torch.Tensor, *, lasting: bool = False) -> None:
        """Keep a chunk's activation, where it is ``lasting`` beyond ``advance``."""
        activation = activation.detach()
        if lasting:
            self._lasting.add(stream)
        if self._device.type == "cuda" and activation.nbytes <= self._room:
            self._room -= activation.nbytes
            self._near[stream, chunk] = activation.to(self._device).clone()
        else:
            self._far.add(stream)
            self._live.put_all({stream: activation.cpu().numpy()}, chunk)

    def get(self, stream: str, chunk: int) -> torch.Tensor:
        """A chunk's activation, on the device."""
        near = self._near.get((stream, chunk))
        return torch.from_numpy(self._live.get(stream, chunk)).to(self._device) if near is None else near

    def advance(self, streams: dict[str, str]) -> None:
        """Drop all streams but lasting ones and some others, and give those new names: ``{new: old}``."""
        renamed = {old: new for new, old in streams.items()} | {name: name for name in self._lasting}
        near = {(renamed[name], chunk): tensor for (name, chunk), tensor in self._near.items() if name in renamed}
        self._room += sum(tensor.nbytes for tensor in self._near.values()) - sum(tensor.nbytes for tensor in near.values())
        self._near = near
        self._live.rename({new: old for new, old in streams.items() if old in self._far}, keep=self._lasting)
        self._far = {renamed[name] for name in self._far if name in renamed}

    def order(self, steps: int, seed: int) -> list[int]:
        """Chunks to train on, one for each step, each as often as it has rows, its turns spread evenly over the steps."""
        chunks = self.training
        rows = torch.tensor([self.rows[chunk] for chunk in chunks], dtype=torch.float64)
        turns = (steps * rows / rows.sum()).tolist()
        starts = torch.rand(len(chunks), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
        # Where in the training each turn comes, as a share of it; two more than fit, so that there are enough in any case.
        places = [
            ((turn + start) / often, chunk)
            for chunk, often, start in zip(chunks, turns, starts, strict=True)
            for turn in range(math.ceil(often) + 2)
        ]
        return [chunk for _, chunk in sorted(places)[:steps]]

    def _read(self, feeds: Iterable[tuple[int, Feeds]]) -> dict[int, int]:
        """Add feeds, those of equal shapes together; returns the chunk by the index of a feed."""
        pending: dict[tuple[tuple[int, ...], ...], list[tuple[int, Feeds]]] = {}
        chunk_of: dict[int, int] = {}

        def add(alike: list[tuple[int, Feeds]]) -> None:
            chunk_of.update((index, len(self)) for index, _ in alike)
            self._add([feed for _, feed in alike])
            alike.clear()

        for index, feed in feeds:
            alike = pending.setdefault(tuple(array.shape for array in feed.values()), [])
            alike.append((index, feed))
            if sum(_rows(one) for _, one in alike) + _rows(feed) > self._stacked:
                add(alike)
        for alike in pending.values():
            if alike:
                add(alike)
        return chunk_of

    def _add(self, alike: list[Feeds]) -> None:
        self._names = list(alike[0])
        stacked = alike[0] if len(alike) == 1 else {name: np.concatenate([feed[name] for feed in alike]) for name in alike[0]}
        chunk = len(self.rows)
        for name, array in stacked.items():
            self.put(f"feed {name}", chunk, torch.from_numpy(np.ascontiguousarray(array)), lasting=True)
        if self._mask is not None and not (shown := stacked[self._mask] != 0).all():
            self._padded.add(chunk)
            self.put("mask", chunk, torch.from_numpy(shown))
        self.rows.append(_rows(stacked))


def _rows(feed: Feeds) -> int:
    """Rows that a linear sees: one for each integer, or each vector of floats."""
    return max((array.size if array.dtype.kind in "iub" else array[..., 0].size for array in feed.values()), default=1) or 1
