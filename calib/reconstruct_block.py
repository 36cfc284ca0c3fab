"""One block of a reconstruction: run in float, trained, rounded, and run as it was solved."""

from __future__ import annotations

import logging
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, overload

import torch

from fqonnx.calib import moments
from fqonnx.calib.block_training import FlatGroup, FloatGroup, MomentsGroup, RoundedGroup, SolvedGroup, kept, prepare
from fqonnx.calib.descent import Descent
from fqonnx.calib.registry import transform_named, weight_quantizer_named
from fqonnx.calib.solve import group_seed
from fqonnx.calib.solve_group import measure
from fqonnx.calib.torch_graph import TorchGraph
from fqonnx.calib.transforms.base import FittedTransform, Problem
from fqonnx.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir
    from torch import nn

    from fqonnx.calib.block_training import Runnable
    from fqonnx.calib.blocks import Block
    from fqonnx.calib.chunks import Chunks
    from fqonnx.calib.solution import GroupSolution
    from fqonnx.calib.stores import SolutionStore
    from fqonnx.calib.torch_graph import Sizes
    from fqonnx.calib.transforms.base import Transform
    from fqonnx.passes.groups import LinearGroup
    from fqonnx.progress import Task
    from fqonnx.recipe import Recipe

    Tensors = Mapping[str, torch.Tensor]
    Rates = list[tuple[list[nn.Parameter], float]]
    Changes = Mapping[ir.Value, Callable[[torch.Tensor], torch.Tensor]]

logger = logging.getLogger(__name__)

MEASURED_ROWS = 1024
"""Input rows of a group that the report's figures are taken on."""

ROWS_PER_CHANNEL = 16
"""Rows for each channel of the widest group at which weights are trained at half their rate."""

INPUT, TARGET, MASK = "stream", "target", "mask"
"""Names of a step's inputs beside the model's own, which begin with ``feed``."""


@dataclass(frozen=True)
class Training:
    """Hyperparameters, chosen on calibration windows of a small Llama that training did not see.

    Attributes:
        tokens: Tokens of a step.
        steps: Steps of a block that train transforms, clips and float weights, at most.
        rounding_steps: Steps of a block that train integers and scales, at most.
        epochs: Passes over the data that either may take: where data are few, there are fewer steps.
        lr: Of transforms; the paper's, as ``clip_lr`` is.
        clip_lr: Of the logits of clips.
        weight_lr: Of float weights, in their standard deviations, where rows are many.
        rounding_lr: Of integers, in steps of the grid, where rows are many.
        scale_lr: Of logarithms of scales.
        model_steps: Steps of the whole model that train integers, scales and clips, at most.
        model_share: Share of the rates above in steps of the whole model.
    """

    tokens: int
    steps: int
    rounding_steps: int
    epochs: int = 15
    lr: float = 5e-3
    clip_lr: float = 5e-2
    weight_lr: float = 1e-3
    rounding_lr: float = 1e-3
    scale_lr: float = 1e-3
    model_steps: int = 0
    model_share: float = 0.1


class BlockReconstruction:
    """One block.

    Streams in ``chunks``: ``float`` and ``quantized`` are the block's inputs from either model, ``target`` its float output.

    Args:
        block: The block.
        chunks: Feeds and streams.
        recipe: How to solve.
        training: Hyperparameters.
        device: Where to train.
        sizes: Sizes that blocks before this one computed; its own are added.
        changes: What the quantized model does to values of the graph besides.

    Attributes:
        told: Share of its work that a progress task was told of.
        flat: Its groups while transforms are trained, by name.
        rounded: Its groups while integers are.

    Raises:
        CalibrationError: A weight holds NaN or Inf.
    """

    def __init__(
        self,
        block: Block,
        chunks: Chunks,
        recipe: Recipe,
        training: Training,
        device: torch.device,
        sizes: Sizes,
        changes: Changes | None = None,
    ) -> None:
        self.told = 0.0
        self.flat: dict[str, FlatGroup] = {}
        self.rounded: dict[str, RoundedGroup] = {}
        self.block = block
        self._chunks, self._training, self._device, self._changes = chunks, training, device, changes
        self._seed = group_seed(recipe.seed, block.name)
        given = [] if block.input is None else [block.input]
        self._graph = TorchGraph([block.output], given, block.groups, device=device, sizes=sizes)
        self.recipes = {group.name: recipe.for_group(group.name) for group in block.groups}
        self._weights = {group.name: _tensor(group.read_weights(), device) for group in block.groups}
        self._biases = {
            group.name: [_tensor(None if linear.read_bias is None else linear.read_bias(), device) for linear in group.linears]
            for group in block.groups
        }
        for name, weight in self._weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise CalibrationError(f"group {name!r}: its weights hold NaN or Inf: the model is damaged")
        self._absmax: dict[str, torch.Tensor] = {}
        self._inputs: dict[str, list[torch.Tensor]] = {name: [] for name in self._weights}
        self._seconds = 0.0

    @torch.no_grad()
    def aim(self) -> None:
        """Run the block in float: what it is to give, and what its groups are fed with.

        Raises:
            CalibrationError: NaN or Inf in a group's input, or no rows.
        """
        floats = {name: FloatGroup(weight) for name, weight in self._weights.items()}
        measured = list(self._chunks.held_out) or [len(self._chunks) - 1]
        share = -(-MEASURED_ROWS // len(measured))
        for chunk in range(len(self._chunks)):
            keep = self._chunks.mask(chunk)
            for module in floats.values():
                module.keep = keep

            def run(group: LinearGroup, x: torch.Tensor, chunk: int = chunk, keep: torch.Tensor | None = keep) -> list[torch.Tensor]:
                if chunk in measured:
                    rows = kept(x, keep)
                    self._inputs[group.name].append(rows[:: max(len(rows) // share, 1)].clone())
                return self._outputs(group, floats[group.name](x))

            x = None if self.block.input is None else self._chunks.get("float", chunk)
            self._chunks.put("target", chunk, self._run(self._chunks.feeds(chunk), x, run))
        for name, module in floats.items():
            if not bool(torch.isfinite(module.absmax).all()):
                raise CalibrationError(f"group {name!r}: NaN or Inf in its input: check the data and the model's own output")
            if not any(len(rows) for rows in self._inputs[name]):
                raise CalibrationError(f"group {name!r} got no rows: the data never reach it, leave it in float with --keep")
            self._absmax[name] = module.absmax

    def solve(self, task: Task) -> None:
        """Train transforms, clips and float weights on the block's output, round the weights, and train which integers they take.

        Raises:
            CalibrationError: Training diverged, or the weight quantizer fails.
        """
        start = time.perf_counter()
        self.train(task)
        self.round()
        self.train_rounding(task)
        self._seconds = time.perf_counter() - start

    def train(self, task: Task) -> None:
        """The first part of ``solve``: ``flat`` is trained."""
        for group, transform in zip(self.block.groups, self.transforms, strict=True):
            self.flat[group.name] = FlatGroup(self._problem(group), transform)
        prepare_step = partial(prepare, list(self.flat.values()), self.transforms)
        self._descend(self.flat, self.flat_rates(), self._training.steps, prepare_step, task, 0.6)

    def round(self) -> None:
        """The second: ``rounded`` is made of ``flat``, for the inputs that the quantized model gives."""
        sums = self._moments()
        self.flat = {}
        for name in list(sums):
            self.rounded[name] = _round(name, sums.pop(name), self.recipes[name])
        prepare_rounded(self.rounded.values())

    def train_rounding(self, task: Task) -> None:
        """The third: ``rounded`` is trained."""
        prepare_step = partial(prepare_rounded, self.rounded.values())
        self._descend(self.rounded, self.rounded_rates(), self._training.rounding_steps, prepare_step, task, 0.3)

    @property
    def transforms(self) -> list[Transform]:
        """The transform of each group."""
        return [transform_named(self.recipes[group.name].transform) for group in self.block.groups]

    def flat_rates(self) -> Rates:
        """What is trained with transforms, and how fast."""
        groups, training = self.flat.values(), self._training
        return [
            ([parameter for group in groups if group.learned is not None for parameter in group.learned.parameters()], training.lr),
            ([clip for group in groups for clip in (group.clip, group.weight_clip)], training.clip_lr),
            ([group.change for group in groups], self._believed() * training.weight_lr),
        ]

    def rounded_rates(self) -> Rates:
        """What is trained with integers, and how fast."""
        groups, training = self.rounded.values(), self._training
        return [
            ([group.latent for group in groups], self._believed() * training.rounding_lr),
            ([group.log_scale for group in groups], training.scale_lr),
            ([group.clip for group in groups], training.clip_lr),
        ]

    def forward(self, feeds: Tensors, x: torch.Tensor | None, groups: Mapping[str, Runnable]) -> torch.Tensor:
        """The block's output with ``groups`` in the place of its linears."""
        return self._run(feeds, x, lambda group, x: self._outputs(group, groups[group.name](x)), self._changes)

    @torch.no_grad()
    def advance(self, groups: Mapping[str, Runnable]) -> None:
        """Run the block with ``groups``: what the next one is fed with."""
        errors = [0.0, 0.0]
        for chunk in range(len(self._chunks)):
            y = self.forward(self._chunks.feeds(chunk), self._quantized(chunk), groups)
            if chunk in self._chunks.held_out:
                target = self._chunks.get("target", chunk)
                errors = [errors[0] + float((y - target).square().sum()), errors[1] + float(target.square().sum())]
            self._chunks.put("ahead", chunk, y)
        if errors[1]:
            logger.info("block of %s: relative error %.4g behind it on held-out samples", self.block.name, math.sqrt(errors[0] / errors[1]))
        self._chunks.advance({"float": "target", "quantized": "ahead"})

    def solved(self, store: SolutionStore) -> dict[str, Runnable]:
        """The block's groups as they were written."""
        found: dict[str, Runnable] = {}
        for group in self.block.groups:
            solution = store(group.name)
            fitted = FittedTransform(
                channel_scale=_tensor(solution.channel_scale, self._device),
                left=_tensor(solution.left, self._device),
                right=_tensor(solution.right, self._device),
                clip=solution.clip,
            )
            codes, scales = _tensor(solution.codes, self._device), _tensor(solution.scales, self._device)
            found[group.name] = SolvedGroup(fitted, codes, scales, self.recipes[group.name].bits.activation_bits)
        return found

    @torch.no_grad()
    def solutions(self) -> list[GroupSolution]:
        """What was found, with figures for the report.

        Raises:
            CalibrationError: Training diverged.
        """
        found = []
        for name, group in self.rounded.items():
            fitted, codes, scales = group.solved()
            if not bool(torch.isfinite(scales).all()) or not 0 < fitted.clip <= 1:
                raise CalibrationError(f"group {name!r}: training diverged: use --reconstruct group or --transform hadamard")
            rows, bits = torch.cat(self._inputs[name]), self.recipes[name].bits.activation_bits
            found.append(measure(name, self._weights[name], fitted, codes, scales, rows, bits, self._seconds / len(self.rounded)))
        return found

    def _descend(
        self,
        groups: Mapping[str, Runnable],
        rates: Rates,
        steps: int,
        prepare_step: Callable[[], None],
        task: Task,
        share: float,
    ) -> None:
        chunks = self._chunks
        steps = min(steps, self._training.epochs * len(chunks.training))

        def loss(inputs: Tensors) -> torch.Tensor:
            prepare_step()
            return relative_error(self.forward(fed(inputs), inputs.get(INPUT), groups), inputs[TARGET], inputs.get(MASK))

        with fast_products(self._device):
            descent = Descent(rates, steps, loss, self._device)
            for chunk in chunks.order(steps, self._seed):
                descent.step(step_inputs(chunks, chunk, {INPUT: self._quantized(chunk), TARGET: chunks.get("target", chunk)}))
                self.told += share / steps
                task.advance(share / steps)
            if not descent.finite:
                raise CalibrationError(
                    f"training diverged in the block of {self.block.name!r}: use --reconstruct group or --transform hadamard"
                )
        with torch.no_grad():
            prepare_step()

    @torch.no_grad()
    def _moments(self) -> dict[str, MomentsGroup]:
        sums = {name: MomentsGroup(group, self.recipes[name].bits.activation_bits) for name, group in self.flat.items()}
        if any(weight_quantizer_named(recipe.weights).needs_hessian for recipe in self.recipes.values()):
            for chunk in self._chunks.training:
                for group in sums.values():
                    group.keep = self._chunks.mask(chunk)
                self.forward(self._chunks.feeds(chunk), self._quantized(chunk), sums)
        return sums

    def _believed(self) -> float:
        """Few rows say little about many weights: what they say of them is followed as slowly as rows are few."""
        rows = sum(self._chunks.rows[chunk] for chunk in self._chunks.training)
        return rows / (rows + ROWS_PER_CHANNEL * max(group.in_features for group in self.block.groups))

    def _problem(self, group: LinearGroup) -> Problem:
        recipe = self.recipes[group.name]
        return Problem(
            weight=self._weights[group.name],
            tokens=torch.cat(self._inputs[group.name]),
            absmax=self._absmax[group.name],
            scheme=recipe.bits,
            group_size=recipe.group_size,
            seed=group_seed(recipe.seed, group.name),
            steps=recipe.steps,
            out_features=tuple(linear.out_features for linear in group.linears),
            width=recipe.width,
        )

    def _quantized(self, chunk: int) -> torch.Tensor | None:
        return None if self.block.input is None else self._chunks.get("quantized", chunk)

    def _run(
        self,
        feeds: Tensors,
        x: torch.Tensor | None,
        linears: Callable[[LinearGroup, torch.Tensor], Sequence[torch.Tensor]],
        changes: Changes | None = None,
    ) -> torch.Tensor:
        given = {} if self.block.input is None or x is None else {self.block.input.name or "": x}
        return self._graph({**feeds, **given}, linears, key=feeds, changes=changes)[self.block.output.name or ""]

    def _outputs(self, group: LinearGroup, y: torch.Tensor) -> list[torch.Tensor]:
        parts = torch.split(y, [linear.out_features for linear in group.linears], -1)
        return [part if bias is None else part + bias for part, bias in zip(parts, self._biases[group.name], strict=True)]


def prepare_rounded(groups: Iterable[RoundedGroup]) -> None:
    """Round the weights of groups for a step."""
    for group in groups:
        group.prepare()


def step_inputs(chunks: Chunks, chunk: int, streams: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """What a step reads: the feeds, which ``fed`` takes out again, the padding mask where there is padding, and ``streams``."""
    inputs = {f"feed {name}": tensor for name, tensor in chunks.feeds(chunk).items()}
    keep = chunks.mask(chunk)
    found = {name: tensor for name, tensor in {**streams, MASK: keep}.items() if tensor is not None}
    return {**inputs, **found}


def fed(inputs: Tensors) -> dict[str, torch.Tensor]:
    """The model's feeds among a step's inputs."""
    return {name.removeprefix("feed "): tensor for name, tensor in inputs.items() if name.startswith("feed ")}


def relative_error(y: torch.Tensor, target: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Mean over tokens of the squared error relative to the token: the norm that reads the stream next divides by its magnitude.

    Args:
        y: ``[.., K]``.
        target: The same shape.
        keep: Which tokens count; None, or where the shape is another one, all do.
    """
    power = target.square().mean(-1)
    # A token that is (nearly) zero counts by the mean of all.
    return mean_over((y - target).square().mean(-1) / power.clamp_min(1e-6 * power.mean() + 1e-30), keep)


def mean_over(values: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """The mean of ``values`` over what ``keep`` says; None, or where the shape is another one, over all."""
    if keep is None or keep.shape != values.shape:
        return values.mean()
    return torch.where(keep, values, 0.0).sum() / keep.sum()


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Products of fp32 matrices in TF32 on a GPU: a third less time, and the error behind a block stays as it is."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _round(name: str, sums: MomentsGroup, recipe: Recipe) -> RoundedGroup:
    quantizer = weight_quantizer_named(recipe.weights)
    target, hessian = sums.target, None
    try:
        if quantizer.needs_hessian:
            hessian, cross = sums.moments()
            target = moments.corrected_weight(target, hessian, cross, moments.damping(sums.count, target.shape[1]))
        codes, scales = quantizer.quantize(
            target, bits=recipe.bits.weight_bits, group_size=recipe.group_size, hessian=hessian, clip=sums.fitted.weight_clip
        )
    except CalibrationError as error:
        raise CalibrationError(f"group {name!r}: {error}") from None
    return RoundedGroup(sums.fitted, target, codes, scales, recipe.bits)


@overload
def _tensor(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor: ...
@overload
def _tensor(array: npt.NDArray[np.generic] | None, device: torch.device) -> torch.Tensor | None: ...
def _tensor(array: npt.NDArray[np.generic] | None, device: torch.device) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)
