"""Block reconstruction: the transforms, clips and weights of a block's groups are trained together on the block's output.

FlatQuant (arXiv 2410.09426, section 3.2) trains block by block. Two things differ here. A block is fed with what the quantized blocks
before it give, and aims at what the float model has behind it, so that each block makes up for the errors of those before. And weights
are trained too: with the transform, as floats that round well, and behind the weight quantizer, which integer each of them takes.

One block is in memory at a time, and of the data what ``Chunks`` keeps there. A block's solutions are written when it is done, and what
the next block is fed with is computed from what was written: a build that goes on after a kill gives the same bytes on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, overload

import torch

from fqonnx.calib import moments
from fqonnx.calib.block_training import FlatGroup, FloatGroup, MomentsGroup, RoundedGroup, SolvedGroup, kept, prepare
from fqonnx.calib.blocks import find_blocks
from fqonnx.calib.chunks import Chunks
from fqonnx.calib.registry import transform_named, weight_quantizer_named
from fqonnx.calib.solve import group_seed, library_versions
from fqonnx.calib.solve_group import measure
from fqonnx.calib.stores import SolutionStore
from fqonnx.calib.torch_graph import Sizes, TorchGraph
from fqonnx.calib.transforms.base import FittedTransform, Problem
from fqonnx.errors import CalibrationError
from fqonnx.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir
    from torch import nn

    from fqonnx.calib.block_training import Runnable
    from fqonnx.calib.blocks import Block
    from fqonnx.calib.data.base import Source
    from fqonnx.calib.solution import GroupSolution
    from fqonnx.passes.groups import LinearGroup
    from fqonnx.progress import Progress, Task
    from fqonnx.recipe import Recipe

logger = logging.getLogger(__name__)

MEASURED_ROWS = 1024
"""Input rows of a group that the report's figures are taken on."""


ROWS_PER_CHANNEL = 16
"""Rows for each channel of the widest group at which weights are trained at half their rate."""


@dataclass(frozen=True)
class Training:
    """Hyperparameters, chosen on calibration windows of a small Llama that training did not see.

    Attributes:
        tokens: Tokens of a step.
        steps: Steps that train transforms, clips and float weights, at most.
        rounding_steps: Steps that train integers and scales, at most.
        epochs: Passes over the data that either may take: where data are few, there are fewer steps.
        lr: Of transforms; the paper's, as ``clip_lr`` is.
        clip_lr: Of the logits of clips.
        weight_lr: Of float weights, in their standard deviations, where rows are many.
        rounding_lr: Of integers, in steps of the grid, where rows are many.
        scale_lr: Of logarithms of scales.
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


TRAINING = {
    "cpu": Training(tokens=1024, steps=220, rounding_steps=120),
    "cuda": Training(tokens=4096, steps=300, rounding_steps=150, weight_lr=3.6e-3, rounding_lr=2.4e-3),
}
"""By device: a GPU takes four times the tokens in little more than the time that it takes to launch a step."""


def reconstruct(
    model: ir.Model,
    groups: Sequence[LinearGroup],
    source: Source,
    recipe: Recipe,
    *,
    workdir: Path,
    fingerprint: str,
    device: str = "cpu",
    mask: str | None = None,
    stacks: bool = False,
    training: Training | None = None,
    progress: Progress | None = None,
) -> SolutionStore:
    """Solve every group that ``workdir`` does not hold yet, block by block.

    Args:
        model: The prepared float model.
        groups: What to solve.
        source: Feeds; read once.
        recipe: How to solve.
        workdir: Folder of the solutions (``groups/``), and of activations that do not fit in memory.
        fingerprint: Digest of the model and the data; solutions of another one are not reused.
        device: ``cpu`` or ``cuda``.
        mask: An input ``[batch, sequence]`` that is zero where a token is padding.
        stacks: Whether feeds of equal shapes may be stacked along the first axis of every input.
        training: Hyperparameters; None takes those of the device, with the recipe's steps where it says so.
        progress: Where to tell how far it is.

    Returns:
        The store, which holds every group.

    Raises:
        ModelError: The graph does not fall apart into blocks, or holds an operator that is not run in torch.
        CalibrationError: NaN or Inf in the model or its activations, training diverged, or memory is out.
    """
    training = training or _training(recipe, device)
    depends_on = [fingerprint, recipe.to_dict(), device, repr(training), mask, stacks, library_versions()]
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    store = SolutionStore(workdir / "groups", [group.name for group in groups], key)
    blocks = find_blocks(model, groups)
    while blocks and all(store.has(group.name) for group in blocks[-1].groups):
        blocks = blocks[:-1]  # what nobody needs the activations of
    if not blocks:
        return store
    sizes: Sizes = {}
    with (
        (progress or Silent()).task("Reconstructing blocks", len(blocks)) as task,
        Chunks(source, workdir, tokens=training.tokens, stacks=stacks, mask=mask) as chunks,
        _errors_of_memory(blocks),
    ):
        for block in blocks:
            reconstruction = _Reconstruction(block, chunks, recipe, training, torch.device(device), sizes)
            reconstruction.aim()
            if not all(store.has(group.name) for group in block.groups):
                for solution in reconstruction.solve(task):
                    store.save(solution)
            reconstruction.advance(store)
            task.advance(1 - reconstruction.told)
    return store


def _training(recipe: Recipe, device: str) -> Training:
    default = TRAINING[device]
    if recipe.steps is None:
        return default
    return replace(default, steps=recipe.steps, rounding_steps=max(recipe.steps // 2, 1), epochs=10**9)


@contextmanager
def _errors_of_memory(blocks: Sequence[Block]) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise CalibrationError("the GPU is out of memory: use --device cpu, shorter samples or --reconstruct group") from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch has no type for it on the CPU
            raise
        raise CalibrationError(
            f"out of memory in a block of {len(blocks[0].groups)} groups: use shorter samples, a machine with more, or --reconstruct group"
        ) from None


@contextmanager
def _fast_products(device: torch.device) -> Iterator[None]:
    """Products of fp32 matrices in TF32 on a GPU: a third less time, and the error behind a block stays as it is."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Reconstruction:
    """One block.

    Streams in ``chunks``: ``float`` and ``quantized`` are the block's inputs from either model, ``target`` its float output.
    """

    def __init__(self, block: Block, chunks: Chunks, recipe: Recipe, training: Training, device: torch.device, sizes: Sizes) -> None:
        self.told = 0.0
        self._block, self._chunks, self._recipe, self._training, self._device = block, chunks, recipe, training, device
        given = [] if block.input is None else [block.input]
        self._graph = TorchGraph([block.output], given, block.groups, device=device, sizes=sizes)
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
            keep = self._keep(chunk)
            for module in floats.values():
                module.keep = keep

            def run(group: LinearGroup, x: torch.Tensor, chunk: int = chunk, keep: torch.Tensor | None = keep) -> list[torch.Tensor]:
                if chunk in measured:
                    rows = kept(x, keep)
                    self._inputs[group.name].append(rows[:: max(len(rows) // share, 1)].clone())
                return self._outputs(group, floats[group.name](x))

            self._chunks.put("target", chunk, self._run("float", chunk, run))
        for name, module in floats.items():
            if not bool(torch.isfinite(module.absmax).all()):
                raise CalibrationError(f"group {name!r}: NaN or Inf in its input: check the data and the model's own output")
            if not any(len(rows) for rows in self._inputs[name]):
                raise CalibrationError(f"group {name!r} got no rows: the data never reach it, leave it in float with --keep")
            self._absmax[name] = module.absmax

    def solve(self, task: Task) -> list[GroupSolution]:
        """Train the block and round its weights.

        Raises:
            CalibrationError: Training diverged.
        """
        start = time.perf_counter()
        recipes = {group.name: self._recipe.for_group(group.name) for group in self._block.groups}
        transforms = [transform_named(recipe.transform) for recipe in recipes.values()]
        flat = {
            group.name: FlatGroup(self._problem(group, recipes[group.name]), transform)
            for group, transform in zip(self._block.groups, transforms, strict=True)
        }
        training = self._training
        # Few rows say little about many weights: what they say of them is followed as slowly as rows are few.
        rows = sum(self._chunks.rows[chunk] for chunk in self._chunks.training)
        believed = rows / (rows + ROWS_PER_CHANNEL * max(group.in_features for group in self._block.groups))
        learned = [parameter for group in flat.values() if group.learned is not None for parameter in group.learned.parameters()]
        rates: list[tuple[list[nn.Parameter], float]] = [
            (learned, training.lr),
            ([clip for group in flat.values() for clip in (group.clip, group.weight_clip)], training.clip_lr),
            ([group.change for group in flat.values()], believed * training.weight_lr),
        ]
        with _fast_products(self._device):
            self._train(flat, rates, training.steps, partial(prepare, list(flat.values()), transforms), task, 0.6)
        sums = self._moments(flat, recipes)
        rounded: dict[str, RoundedGroup] = {}
        for name in list(sums):
            rounded[name] = _round(name, sums.pop(name), recipes[name])
        del flat, learned, rates
        rounding_rates: list[tuple[list[nn.Parameter], float]] = [
            ([group.latent for group in rounded.values()], believed * training.rounding_lr),
            ([group.log_scale for group in rounded.values()], training.scale_lr),
            ([group.clip for group in rounded.values()], training.clip_lr),
        ]

        def round_all() -> None:
            for group in rounded.values():
                group.prepare()

        with _fast_products(self._device):
            self._train(rounded, rounding_rates, training.rounding_steps, round_all, task, 0.3)
        seconds = (time.perf_counter() - start) / len(rounded)
        return [self._solution(name, group, recipes[name], seconds) for name, group in rounded.items()]

    @torch.no_grad()
    def advance(self, store: SolutionStore) -> None:
        """Run the block as it was solved: what the next one is fed with."""
        solved: dict[str, Runnable] = {}
        for group in self._block.groups:
            solution = store(group.name)
            fitted = FittedTransform(
                channel_scale=_tensor(solution.channel_scale, self._device),
                left=_tensor(solution.left, self._device),
                right=_tensor(solution.right, self._device),
                clip=solution.clip,
            )
            codes, scales = _tensor(solution.codes, self._device), _tensor(solution.scales, self._device)
            solved[group.name] = SolvedGroup(fitted, codes, scales, self._recipe.for_group(group.name).bits.activation_bits)
        errors = [0.0, 0.0]
        for chunk in range(len(self._chunks)):
            y = self._run("quantized", chunk, lambda group, x: self._outputs(group, solved[group.name](x)))
            if chunk in self._chunks.held_out:
                target = self._chunks.get("target", chunk).to(y)
                errors = [errors[0] + float((y - target).square().sum()), errors[1] + float(target.square().sum())]
            self._chunks.put("ahead", chunk, y)
        if errors[1]:
            logger.info(
                "block of %s: relative error %.4f behind it on held-out samples", self._block.name, math.sqrt(errors[0] / errors[1])
            )
        self._chunks.advance({"float": "target", "quantized": "ahead"})

    def _train(
        self,
        groups: Mapping[str, Runnable],
        rates: Sequence[tuple[list[nn.Parameter], float]],
        steps: int,
        prepare_step: Callable[[], None],
        task: Task,
        share: float,
    ) -> None:
        training, chunks = self._training, self._chunks
        steps = min(steps, training.epochs * len(chunks.training))
        parameters = [{"params": list(members), "lr": rate} for members, rate in rates if members]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        finite = torch.ones((), dtype=torch.bool, device=self._device)
        for chunk in chunks.order(steps, group_seed(self._recipe.seed, self._block.name)):
            prepare_step()
            y = self._run("quantized", chunk, lambda group, x: self._outputs(group, groups[group.name](x)))
            loss = self._loss(y, chunk)
            finite &= torch.isfinite(loss.detach())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
            optimizer.step()
            schedule.step()
            self.told += share / steps
            task.advance(share / steps)
        if not bool(finite):
            raise CalibrationError(
                f"training diverged in the block of {self._block.name!r}: use --reconstruct group or --transform hadamard"
            )
        with torch.no_grad():
            prepare_step()

    def _loss(self, y: torch.Tensor, chunk: int) -> torch.Tensor:
        """Mean over tokens of the error relative to the token: the norm that reads the stream next divides by the token's magnitude."""
        target = self._chunks.get("target", chunk).to(y)
        power = target.square().mean(-1)
        # A token that is (nearly) zero counts by the mean of all.
        ratio = (y - target).square().mean(-1) / power.clamp_min(1e-6 * power.mean() + 1e-30)
        keep = self._keep(chunk)
        return ratio[keep].mean() if keep is not None and keep.shape == ratio.shape else ratio.mean()

    @torch.no_grad()
    def _moments(self, flat: Mapping[str, FlatGroup], recipes: Mapping[str, Recipe]) -> dict[str, MomentsGroup]:
        sums = {name: MomentsGroup(group, recipes[name].bits.activation_bits) for name, group in flat.items()}
        if any(weight_quantizer_named(recipe.weights).needs_hessian for recipe in recipes.values()):
            for chunk in self._chunks.training:
                for group in sums.values():
                    group.keep = self._keep(chunk)
                self._run("quantized", chunk, lambda group, x: self._outputs(group, sums[group.name](x)))
        return sums

    @torch.no_grad()
    def _solution(self, name: str, group: RoundedGroup, recipe: Recipe, seconds: float) -> GroupSolution:
        fitted, codes, scales = group.solved()
        if not bool(torch.isfinite(scales).all()) or not 0 < fitted.clip <= 1:
            raise CalibrationError(f"group {name!r}: training diverged: use --reconstruct group or --transform hadamard")
        rows = torch.cat(self._inputs[name])
        return measure(name, self._weights[name], fitted, codes, scales, rows, recipe.bits.activation_bits, seconds)

    def _problem(self, group: LinearGroup, recipe: Recipe) -> Problem:
        return Problem(
            weight=self._weights[group.name],
            tokens=torch.cat(self._inputs[group.name]),
            absmax=self._absmax[group.name],
            scheme=recipe.bits,
            group_size=recipe.group_size,
            seed=group_seed(recipe.seed, group.name),
            steps=recipe.steps,
            out_features=tuple(linear.out_features for linear in group.linears),
        )

    def _run(self, stream: str, chunk: int, linears: Callable[[LinearGroup, torch.Tensor], Sequence[torch.Tensor]]) -> torch.Tensor:
        feeds = self._chunks.feeds(chunk)
        key = dict(feeds)
        if self._block.input is not None:
            feeds[self._block.input.name or ""] = self._chunks.get(stream, chunk)
        return self._graph(feeds, linears, key=key)[self._block.output.name or ""]

    def _outputs(self, group: LinearGroup, y: torch.Tensor) -> list[torch.Tensor]:
        parts = torch.split(y, [linear.out_features for linear in group.linears], -1)
        return [part if bias is None else part + bias for part, bias in zip(parts, self._biases[group.name], strict=True)]

    def _keep(self, chunk: int) -> torch.Tensor | None:
        mask = self._chunks.mask(chunk)
        return None if mask is None else mask.to(self._device)


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
