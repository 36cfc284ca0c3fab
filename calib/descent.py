"""Steps of gradient descent; on a GPU each shape of step is captured once as a CUDA graph and replayed.

A step of a block is a thousand small kernels: launched one by one from Python they take 24 ms on an H200, as a graph 7.
"""

from __future__ import annotations

import gc
import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    Tensors = Mapping[str, torch.Tensor]

logger = logging.getLogger(__name__)

WARM_STEPS = 3
"""Steps of a shape that are launched kernel by kernel before it is captured: caches fill, libraries make their plans."""

GRAPHS = 4
"""Shapes that are captured, each with memory of its own for what a step computes; the steps of others are launched one by one."""


@dataclass
class _Shape:
    """Steps with inputs of the same shapes: how many there were, and the graph with its input buffers."""

    seen: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)


class Descent:
    """AdamW with a cosine schedule.

    On a GPU it has to run on another stream than the default one (``side_stream``).

    Args:
        rates: Parameters and their learning rates.
        steps: Steps of the schedule.
        loss: A step's loss from its inputs: a function of these and of parameters alone. It must not read from the host what a graph
            would not read again.
        device: Where the parameters are.
        capture: Whether to capture graphs on a GPU.
    """

    def __init__(
        self,
        rates: Sequence[tuple[Sequence[nn.Parameter], float]],
        steps: int,
        loss: Callable[[Tensors], torch.Tensor],
        device: torch.device,
        *,
        capture: bool = True,
    ) -> None:
        on_gpu = device.type == "cuda"
        self._steps, self._loss = steps, loss
        self._capture = capture and on_gpu
        self._rates = [rate for members, rate in rates if members]
        parameters = [
            {"params": list(members), "lr": torch.tensor(rate, device=device) if on_gpu else rate} for members, rate in rates if members
        ]
        self._optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True, capturable=on_gpu)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._shapes: dict[tuple[object, ...], _Shape] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._capture else None
        self._done = 0

    @property
    def finite(self) -> bool:
        """Whether every loss so far was."""
        return bool(self._finite)

    @property
    def captured(self) -> int:
        """Graphs."""
        return sum(shape.graph is not None for shape in self._shapes.values())

    def step(self, inputs: Tensors) -> None:
        """One step."""
        self._schedule()
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(inputs.items()))
        shape = self._shapes.setdefault(key, _Shape())
        if shape.graph is not None:
            for name, buffer in shape.inputs.items():
                buffer.copy_(inputs[name])
            shape.graph.replay()
            return
        self._launch(inputs)
        shape.seen += 1
        if self._capture and shape.seen == WARM_STEPS and self.captured < GRAPHS:
            self._record(shape, inputs)

    def _schedule(self) -> None:
        share = 0.5 * (1 + math.cos(math.pi * self._done / self._steps))
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate * share)
            else:
                group["lr"] = rate * share
        self._done += 1

    def _launch(self, inputs: Tensors) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(inputs)
        self._finite.logical_and_(torch.isfinite(loss.detach()))
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        self._optimizer.step()

    def _record(self, shape: _Shape, inputs: Tensors) -> None:
        buffers = {name: tensor.clone() for name, tensor in inputs.items()}
        self._optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        failed: Exception | None = None
        # Not torch.cuda.graph: it empties the cache of memory, which the next step would have to ask the driver for again.
        with _no_collection():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._launch(buffers)
            except Exception as error:  # noqa: BLE001  # whatever it is, the same step ran before without a graph
                failed = error
            try:
                graph.capture_end()
            except RuntimeError as error:
                failed = failed or error
        if failed is None:
            shape.graph, shape.inputs = graph, buffers
            return
        self._capture = False
        self._optimizer.zero_grad(set_to_none=True)
        # A capture that was broken off leaves the device's generator expecting to be captured: drawing from it would fail ever after.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        logger.warning(
            "steps are launched kernel by kernel, which is slow: they cannot be captured as a CUDA graph (%s)", str(failed).splitlines()[0]
        )


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected: what a collection frees on the GPU, a graph of another block say, would break a capture off."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Run what is within on a stream of its own, as capturing graphs needs; on a CPU nothing."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped in torch
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
