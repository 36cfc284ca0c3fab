"""The stage behind the blocks: all groups of a model trained together on what the model puts out.

The loss is the KL divergence from the float model's predictions, or without logits the error of its outputs. All weights of the model's
groups are in memory with gradients and the optimizer's state, 36 bytes each; activations of one step are those between blocks and of one
block, which is run again where gradients pass it, and the outputs.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from fqonnx.calib.descent import Descent
from fqonnx.calib.front import FRONT
from fqonnx.calib.reconstruct_block import INPUT, MASK, fast_products, fed, mean_over, prepare_rounded, relative_error, step_inputs
from fqonnx.calib.solve import group_seed
from fqonnx.calib.torch_graph import TorchGraph
from fqonnx.errors import CalibrationError, ModelError
from fqonnx.passes.constants import is_float

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir
    from torch import nn

    from fqonnx.calib.blocks import Block
    from fqonnx.calib.chunks import Chunks
    from fqonnx.calib.reconstruct_block import BlockReconstruction, Rates, Tensors, Training
    from fqonnx.calib.torch_graph import Sizes
    from fqonnx.passes.groups import LinearGroup
    from fqonnx.progress import Task

logger = logging.getLogger(__name__)

CHECKS = 4
"""Times in a training that the held-out chunks are looked at; what does best on them is kept."""


class Tail:
    """What follows the last block, in float: from its output to those of the model.

    Args:
        model: The prepared model.
        last: The last block.
        groups: All groups.
        device: Where to run.
        sizes: Sizes that the blocks computed.

    Raises:
        ModelError: No float output follows the last block alone, or it holds an operator that is not run in torch.
    """

    def __init__(self, model: ir.Model, last: Block, groups: Sequence[LinearGroup], device: torch.device, sizes: Sizes) -> None:
        behind = _behind(last.output)
        outputs = [value for value in model.graph.outputs if value in behind and is_float(value.dtype)]
        logits = [value for value in outputs if "logit" in (value.name or "").lower()]
        self._logits = bool(logits)
        self._outputs = logits or outputs
        self._stream = last.output.name or ""
        self._graph = TorchGraph(self._outputs, [last.output], groups, device=device, sizes=sizes)
        if not self._outputs or self._graph.groups:
            raise ModelError(f"no output of the model is made of {self._stream!r} alone, behind the last block: use --reconstruct block")

    def error(self, feeds: Tensors, y: torch.Tensor, target: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """How far the outputs for the stream ``y`` are from those for the float model's ``target``; mean over tokens, sum over outputs."""
        with torch.no_grad():
            wanted = self._run(feeds, target)
        found = self._run(feeds, y)
        measure = _divergence if self._logits else relative_error
        return torch.stack([measure(found[name], wanted[name], keep) for name in found]).sum()

    def _run(self, feeds: Tensors, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._graph({**feeds, self._stream: y}, key=feeds)


def _divergence(found: torch.Tensor, wanted: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """KL divergence of the distributions that logits ``[.., V]`` stand for, in nats."""
    expected = torch.log_softmax(wanted, -1)
    return mean_over((expected.exp() * (expected - torch.log_softmax(found, -1))).sum(-1), keep)


def _behind(value: ir.Value) -> set[ir.Value]:
    found, todo = {value}, [value]
    while todo:
        for node, _ in todo.pop().uses():
            todo += [output for output in node.outputs if output not in found]
            found.update(node.outputs)
    return found


class ModelReconstruction:
    """The blocks of a model, trained together.

    Streams in ``chunks``: ``float`` is what the last block gives in the float model, ``FRONT`` what the first one is given, if anything.

    Args:
        parts: The blocks, each trained and rounded by itself before.
        tail: What follows them.
        chunks: Feeds and the stream.
        training: Hyperparameters.
        device: Where to train.
        seed: Seed of the order of chunks.
    """

    def __init__(
        self, parts: Sequence[BlockReconstruction], tail: Tail, chunks: Chunks, training: Training, device: torch.device, seed: int
    ) -> None:
        self._parts, self._tail, self._chunks = parts, tail, chunks
        self._training, self._device, self._seed = training, device, group_seed(seed, "model")

    def train(self, task: Task, share: float) -> None:
        """Train integers, scales and clips.

        Args:
            task: Told of progress.
            share: Of the task's units that this is.

        Raises:
            CalibrationError: Training diverged.
        """
        groups = {name: group for part in self._parts for name, group in part.rounded.items()}
        rates = [pair for part in self._parts for pair in part.rounded_rates()]
        chunks, training = self._chunks, self._training
        steps = min(training.model_steps, training.epochs * len(chunks.training))
        if not steps:
            return
        rates = _joined([(members, training.model_share * rate) for members, rate in rates])
        parameters = [parameter for members, _ in rates for parameter in members]

        def loss(inputs: Tensors) -> torch.Tensor:
            prepare_rounded(groups.values())
            feeds = fed(inputs)
            y = inputs.get(FRONT)
            for part in self._parts:
                y = checkpoint(part.forward, feeds, y, groups, use_reentrant=False, preserve_rng_state=False)
            assert y is not None
            return self._tail.error(feeds, y, inputs[INPUT], inputs.get(MASK))

        def inputs_of(chunk: int) -> dict[str, torch.Tensor]:
            front = None if self._parts[0].block.input is None else chunks.get(FRONT, chunk)
            return step_inputs(chunks, chunk, {INPUT: chunks.get("float", chunk), FRONT: front})

        @torch.no_grad()
        def held_out() -> float:
            return sum(float(loss(inputs_of(chunk))) for chunk in chunks.held_out) / len(chunks.held_out)

        with fast_products(self._device):
            checks = {round(steps * (check + 1) / CHECKS) for check in range(CHECKS)} if chunks.held_out else set()
            start = best = held_out() if checks else 0.0
            kept = [parameter.detach().clone() for parameter in parameters] if checks else []
            descent = Descent(rates, steps, loss, self._device)
            for done, chunk in enumerate(chunks.order(steps, self._seed), 1):
                descent.step(inputs_of(chunk))
                task.advance(share / steps)
                if done in checks:
                    now = held_out()
                    logger.info("whole model: %.4g on held-out samples after %d steps, %.4g before", now, done, start)
                    if now < best:
                        best = now
                        for mine, parameter in zip(kept, parameters, strict=True):
                            mine.copy_(parameter.detach())
            if not descent.finite:
                raise CalibrationError("training of the whole model diverged: use --reconstruct block")
            with torch.no_grad():
                for mine, parameter in zip(kept, parameters if kept else [], strict=True):
                    parameter.copy_(mine)
                prepare_rounded(groups.values())


def _joined(rates: Rates) -> Rates:
    """Parameters of one rate together: the optimizer takes each rate by itself."""
    found: dict[float, list[nn.Parameter]] = {}
    for members, rate in rates:
        found.setdefault(rate, []).extend(members)
    return [(members, rate) for rate, members in found.items()]
