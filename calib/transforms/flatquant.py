"""FlatQuant: a learned Kronecker pair, channel scale and clips (Sun et al., arXiv 2410.09426), trained per group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from fqonnx.calib import batched, kron
from fqonnx.calib.quantizers import fake_quantize, row_scale
from fqonnx.calib.transforms.base import FittedTransform, Problem, Transformation
from fqonnx.calib.transforms.hadamard import hadamard
from fqonnx.calib.transforms.search import MAX_LOG_SCALE
from fqonnx.calib.transforms.smooth import channel_scale
from fqonnx.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Sequence

POWER_TOKENS = 4096
"""Tokens that the magnitude of a linear's output is measured on."""


MAX_TRAINED = 512
"""Factors beyond this (K with a large prime in it) stay the random rotation they start as: a step of training costs n³."""

BLOCK_ALPHA = 0.5
"""Share of the activations in the channel scale at the start of training on blocks: 2 % less error than with ``Training.alpha``."""

BATCH = 8
"""Matrices of one size that are solved together: of more, torch calls a library on a GPU that a CUDA graph cannot hold."""

TARGET_VALUES = 1 << 26
"""Float outputs that are computed once for all steps (256 MiB); of larger groups each step computes its own."""


class InvertibleFactor(nn.Module):
    """``U · diag(exp s) · Vᵀ`` with orthogonal ``U`` and ``V``: invertible by construction, for any size.

    ``U = cayley(A) · U₀`` with skew-symmetric ``A`` (section 3.2 of the paper). ``I + A`` is never singular and ``s`` is bounded, so
    the condition number is at most ``exp(2 · bound)``: the singular matrices that stop the paper's code in calibration cannot occur.
    """

    bound: ClassVar[float] = 3.0

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        n = start.shape[0]
        self.fixed = n > MAX_TRAINED
        self.register_buffer("start", start)
        self.u = nn.Parameter(torch.zeros(n, n, device=start.device))
        self.v = nn.Parameter(torch.zeros(n, n, device=start.device))
        self.s = nn.Parameter(torch.zeros(n, device=start.device))

    def forward(self, rotations: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix and its inverse; ``rotations`` are those of ``u`` and ``v`` where they are known."""
        start = self.get_buffer("start")
        if self.fixed:
            return start, start.mT
        u, v = _cayley([self.u, self.v]) if rotations is None else rotations
        u = start @ u
        s = self.bound * torch.tanh(self.s / self.bound)
        return (u * s.exp()) @ v.mT, (v * (-s).exp()) @ u.mT


def _cayley(raw: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The rotation of each square matrix' upper triangle, those of one size together."""
    batches: dict[tuple[int, int], list[int]] = {}
    seen: dict[int, int] = {}
    for index, matrix in enumerate(raw):
        size = len(matrix)
        batches.setdefault((size, seen.get(size, 0) // BATCH), []).append(index)
        seen[size] = seen.get(size, 0) + 1
    rotations: dict[int, torch.Tensor] = {}
    for members in batches.values():
        rotations.update(zip(members, batched.cayley(torch.stack([raw[index] for index in members])), strict=True))
    return [rotations[index] for index in range(len(raw))]


@dataclass(frozen=True)
class Training:
    """Hyperparameters: the paper's rates and schedule (appendix B), with steps of a group instead of epochs of a block.

    Steps and batch are where tiny models stop gaining: 500 steps of 1,024 tokens end in the same perplexity.
    """

    steps: int = 300
    batch: int = 256
    lr: float = 5e-3
    clip_lr: float = 5e-2
    alpha: float = 0.3
    learns_scale: bool = True


class FlatQuant:
    """Trains the transform of one group on the sum of its linears' output errors."""

    needs_tokens: ClassVar[bool] = True
    has_pair: ClassVar[bool] = True
    training: ClassVar[Training] = Training()

    def fit(self, problem: Problem) -> FittedTransform:
        """Train on the problem's tokens.

        Raises:
            CalibrationError: The problem carries no tokens, or they hold NaN or Inf.
        """
        if problem.tokens is None or problem.absmax is None:
            raise CalibrationError("the flatquant transform needs calibration statistics: give calibration data")
        if not bool(torch.isfinite(problem.tokens).all()):
            raise CalibrationError("the calibration activations hold NaN or Inf: check the model in float first")
        return _train(problem, problem.tokens, problem.absmax, self.training)

    def learned(self, problem: Problem) -> LearnedPair:
        """The pair at its start, for whoever trains it on more than one group's outputs.

        Raises:
            CalibrationError: The problem carries no absmax.
        """
        if problem.absmax is None:
            raise CalibrationError("the flatquant transform needs calibration statistics: give calibration data")
        return LearnedPair(problem, problem.absmax, BLOCK_ALPHA)

    def transformations(self, learned: Sequence[nn.Module]) -> list[Transformation]:
        """The transformations of several pairs, in the order given, their rotations computed in one batch."""
        pairs = [pair for pair in learned if isinstance(pair, LearnedPair)]
        skew = [pair.skew() for pair in pairs]
        flat = [raw for several in skew for raw in several]
        rotations = iter(_cayley(flat) if flat else [])
        return [pair([next(rotations) for _ in several]) for pair, several in zip(pairs, skew, strict=True)]


class LearnedPair(nn.Module):
    """A channel scale and a Kronecker pair as they are trained."""

    def __init__(self, problem: Problem, absmax: torch.Tensor, alpha: float) -> None:
        super().__init__()
        weight = problem.weight
        n1, n2 = kron.factor(weight.shape[1], problem.width)
        generator = torch.Generator().manual_seed(problem.seed)
        self.left = InvertibleFactor(hadamard(n1, generator).to(weight.device))
        self.right = InvertibleFactor(hadamard(n2, generator).to(weight.device))
        self.log_scale = nn.Parameter(channel_scale(absmax, weight, alpha).log())

    def forward(self, rotations: Sequence[torch.Tensor] = ()) -> Transformation:
        """The transformation of this step; ``rotations`` are those of the trained factors where they are known."""
        known = iter(rotations)
        (left, left_inverse), (right, right_inverse) = (
            factor((next(known), next(known)) if rotations and not factor.fixed else None) for factor in (self.left, self.right)
        )
        scale = self.log_scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp()
        return Transformation(
            apply=lambda x: kron.apply(x / scale, left, right),
            fold=lambda w: kron.apply(w * scale, left_inverse.mT, right_inverse.mT),
            fitted=FittedTransform(channel_scale=scale, left=left, right=right),
        )

    def skew(self) -> list[torch.Tensor]:
        """What the rotations of the trained factors are made of."""
        return [raw for factor in (self.left, self.right) if not factor.fixed for raw in (factor.u, factor.v)]


class _Group(nn.Module):
    """The trainable state of one group."""

    def __init__(self, problem: Problem, absmax: torch.Tensor, alpha: float) -> None:
        super().__init__()
        weight = problem.weight
        self.pair = LearnedPair(problem, absmax, alpha)
        self.clip = nn.Parameter(torch.tensor(4.0, device=weight.device))
        self.weight_clip = nn.Parameter(torch.full((weight.shape[0], 1), 4.0, device=weight.device))
        self.activation_bits = problem.scheme.activation_bits
        self.weight_bits = problem.scheme.weight_bits
        self.group_size = problem.group_size

    def quantized(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        transformation = self.pair()
        t, w = transformation.apply(x), transformation.fold(weight)
        if self.activation_bits < 16:
            t = fake_quantize(t, row_scale(t, self.activation_bits, torch.sigmoid(self.clip)), self.activation_bits)
        rows = w.reshape(-1, self.group_size or w.shape[1])
        clip = torch.sigmoid(self.weight_clip)
        if self.group_size:
            clip = clip.expand(-1, w.shape[1] // self.group_size).reshape(-1, 1)
        w = fake_quantize(rows, row_scale(rows, self.weight_bits, clip), self.weight_bits).reshape(w.shape)
        return t, w


def _train(problem: Problem, tokens: torch.Tensor, absmax: torch.Tensor, training: Training) -> FittedTransform:
    group = _Group(problem, absmax, training.alpha)
    group.pair.log_scale.requires_grad_(training.learns_scale)
    clips = [group.clip, group.weight_clip]
    others = [p for p in group.parameters() if all(p is not clip for clip in clips)]
    steps = problem.steps or training.steps
    optimizer = torch.optim.AdamW([{"params": others, "lr": training.lr}, {"params": clips, "lr": training.clip_lr}], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=training.lr * 1e-3)
    generator = torch.Generator().manual_seed(problem.seed)
    weight = problem.weight
    importance = _inverse_power(problem, tokens)
    batch = min(training.batch, tokens.shape[0])
    targets = tokens @ weight.mT if len(tokens) * len(weight) <= TARGET_VALUES else None
    for _ in range(steps):
        rows = torch.randint(tokens.shape[0], (batch,), generator=generator).to(tokens.device)
        x = tokens[rows]
        y = x @ weight.mT if targets is None else targets[rows]
        t, w = group.quantized(x, weight)
        loss = ((t @ w.mT - y).square().mean(0) * importance).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found: FittedTransform = group.pair().fitted
        return replace(
            found,
            clip=float(torch.sigmoid(group.clip)),
            weight_clip=torch.sigmoid(group.weight_clip),
        )


def _inverse_power(problem: Problem, tokens: torch.Tensor) -> torch.Tensor:
    """One over the mean square of each linear's output, ``[N]``: the sum is of relative errors, or a loud q would silence its v."""
    power = (tokens[:POWER_TOKENS] @ problem.weight.mT).square().mean(0)
    sizes = problem.out_features or (len(power),)
    return torch.cat([part.mean().clamp_min(1e-30).reciprocal().expand(len(part)) for part in torch.split(power, list(sizes))])
