"""The groups of a block as torch modules: while transforms are trained, while rounding is, and as they are deployed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from fqonnx.calib import moments
from fqonnx.calib.quantizers import fake_quantize, levels, row_scale
from fqonnx.calib.transforms.base import FittedTransform, Learnable, Transformation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fqonnx.calib.transforms.base import Problem, Transform
    from fqonnx.recipe import Scheme


CLIP_LOGIT = 4.0
"""Where clips start: the sigmoid of it is 0.98."""


class Runnable(Protocol):
    """What stands for a group's linears, stacked: input rows ``[.., K]`` to output rows ``[.., N]``."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs."""
        ...


class FloatGroup:
    """The float weights, and the largest magnitude of each input channel that they have met.

    Args:
        weight: ``[N, K]``.

    Attributes:
        keep: Which tokens of this chunk are no padding, ``[batch, sequence]``; None is all.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.keep: torch.Tensor | None = None
        self.absmax = torch.zeros(weight.shape[1], device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        rows = kept(x, self.keep)
        if len(rows):
            self.absmax = torch.maximum(self.absmax, rows.abs().amax(0))
        return x @ self.weight.mT


def kept(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """``x`` ``[.., K]`` as rows, without those that are padding."""
    if keep is not None and x.ndim == 3 and x.shape[:2] == keep.shape:
        x = x[keep]
    return x.reshape(-1, x.shape[-1])


class FlatGroup(nn.Module):
    """A group while its transform is trained: weights are floats, trained too, that are rounded to nearest in every step."""

    def __init__(self, problem: Problem, transform: Transform) -> None:
        super().__init__()
        weight = problem.weight
        self.learned = transform.learned(problem) if isinstance(transform, Learnable) else None
        self._now = None if self.learned is not None else _settled(transform.fit(problem))
        self._weight = weight
        self._spread = float(weight.std(correction=0)) or 1.0
        self._scheme: Scheme = problem.scheme
        self._group_size = problem.group_size
        self.change = nn.Parameter(torch.zeros_like(weight))
        self.clip = nn.Parameter(torch.tensor(CLIP_LOGIT, device=weight.device))
        self.weight_clip = nn.Parameter(torch.full((weight.shape[0], 1), CLIP_LOGIT, device=weight.device))

    @property
    def now(self) -> Transformation:
        """The transformation of this step."""
        assert self._now is not None, "prepare the groups first"
        return self._now

    def prepare(self, now: Transformation | None) -> None:
        """Take the transformation of this step, None where it is not trained, and round the weights in it."""
        self._now = now or self._now
        w = self.now.fold(self.weight())
        rows = w.reshape(-1, self._group_size or w.shape[1])
        clip = torch.sigmoid(self.weight_clip).expand(-1, len(rows) // len(w)).reshape(-1, 1)
        self._rounded = fake_quantize(rows, row_scale(rows, self._scheme.weight_bits, clip), self._scheme.weight_bits).reshape(w.shape)

    @property
    def rounded(self) -> torch.Tensor:
        """The transformed weight of this step, rounded to nearest."""
        return self._rounded.detach()

    def weight(self) -> torch.Tensor:
        """The weight as it is trained; the unit of ``change`` is the standard deviation of the float weight."""
        return self._weight + self._spread * self.change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs, differentiable."""
        return _quantized(self.now.apply(x), self._scheme, self.clip) @ self._rounded.mT

    @torch.no_grad()
    def fitted(self) -> FittedTransform:
        """The transform and the clips that were found."""
        return replace(self.now.fitted, clip=float(torch.sigmoid(self.clip)), weight_clip=torch.sigmoid(self.weight_clip))


def prepare(groups: Sequence[FlatGroup], transforms: Sequence[Transform]) -> None:
    """Prepare every group for a step, those of one kind of transform together."""
    kinds: dict[type, list[int]] = {}
    for index, transform in enumerate(transforms):
        kinds.setdefault(type(transform), []).append(index)
    for members in kinds.values():
        transform = transforms[members[0]]
        modules = [module for index in members if (module := groups[index].learned) is not None]
        now = transform.transformations(modules) if isinstance(transform, Learnable) else [None] * len(members)
        for index, transformation in zip(members, now, strict=True):
            groups[index].prepare(transformation)


class RoundedGroup(nn.Module):
    """A group whose transform is settled while it is learned which integer each weight takes, and its scales.

    Adaptive rounding (AdaRound, arXiv 2004.10568) by straight-through gradients on the real-valued integers: a weight may move by more
    than one step.

    Args:
        fitted: The transform.
        target: What was rounded, ``[N, K]``.
        codes: The quantizer's integers, ``[N, K]``.
        scales: Its scales, ``[N, K / G]``.
        scheme: Bit widths.
    """

    def __init__(self, fitted: FittedTransform, target: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> None:
        super().__init__()
        self._transform = fitted
        self._scheme = scheme
        self._low, self._high = levels(scheme.weight_bits)
        grid = codes.float()
        wanted = (target.reshape(*scales.shape, -1) / scales[..., None]).reshape(target.shape)
        # As near to the real weight as the quantizer's integer lets it be.
        self.latent = nn.Parameter(grid + (wanted - grid).clamp(-0.49, 0.49))
        self.log_scale = nn.Parameter(scales.log())
        self.clip = nn.Parameter(torch.logit(torch.tensor(fitted.clip, device=target.device), eps=1e-4))

    def prepare(self) -> None:
        """Round the weights for this step."""
        inside = self.latent.clamp(self._low - 0.5, self._high + 0.5)
        grid = inside + (self._codes() - inside).detach()
        scale = self.log_scale.exp()
        self._rounded = (grid.reshape(*scale.shape, -1) * scale[..., None]).reshape(grid.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs, differentiable."""
        return _quantized(moments.forward(self._transform, x), self._scheme, self.clip) @ self._rounded.mT

    @torch.no_grad()
    def solved(self) -> tuple[FittedTransform, torch.Tensor, torch.Tensor]:
        """The transform with its clip, int8 codes ``[N, K]`` and scales ``[N, K / G]``."""
        return replace(self._transform, clip=float(torch.sigmoid(self.clip))), self._codes().to(torch.int8), self.log_scale.exp()

    def _codes(self) -> torch.Tensor:
        return self.latent.detach().round().clamp(self._low, self._high)


class SolvedGroup:
    """A group as the deployed model computes it."""

    def __init__(self, fitted: FittedTransform, codes: torch.Tensor, scales: torch.Tensor, activation_bits: int) -> None:
        self.fitted = fitted
        self.weight = (codes.reshape(*scales.shape, -1) * scales[..., None]).reshape(codes.shape)
        self._bits = activation_bits

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs."""
        return moments.quantize_input(moments.forward(self.fitted, x), self._bits, self.fitted.clip) @ self.weight.mT


class MomentsGroup:
    """Sums the second moments of a group's quantized input, and gives the outputs of its weights rounded to nearest.

    Args:
        flat: The group behind its training.
        activation_bits: Bits of the input; 16 leaves it as it is.

    Attributes:
        fitted: The transform that was found.
        target: The trained weight in its space.
        keep: Which tokens of this chunk are no padding, ``[batch, sequence]``; None is all.
    """

    def __init__(self, flat: FlatGroup, activation_bits: int) -> None:
        self.fitted = flat.fitted()
        self.target = moments.fold(self.fitted, flat.weight().detach())
        self.keep: torch.Tensor | None = None
        self._rounded = flat.rounded
        self._bits = activation_bits
        width = self.target.shape[1]
        self._exact, self._cross, self._noise = (torch.zeros(width, width, device=self.target.device) for _ in range(3))
        self.count = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs."""
        t = moments.forward(self.fitted, x)
        q = moments.quantize_input(t, self._bits, self.fitted.clip)
        t, rows = kept(t, self.keep), kept(q, self.keep)
        self._exact += t.mT @ t
        if self._bits < 16:
            error = rows - t
            self._cross += t.mT @ error
            self._noise += error.mT @ error
        self.count += len(t)
        return q @ self._rounded.mT

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``E[t̂ᵀ t̂]`` and ``E[tᵀ t̂]``."""
        exact = self._exact / self.count
        if self._bits >= 16:
            return exact, exact
        return moments.with_errors(exact, self._cross / self.count, self._noise / self.count, exact.diagonal(), self.count)


def _settled(fitted: FittedTransform) -> Transformation:
    return Transformation(lambda x: moments.forward(fitted, x), lambda w: moments.fold(fitted, w), fitted)


def _quantized(t: torch.Tensor, scheme: Scheme, clip: torch.Tensor) -> torch.Tensor:
    if not scheme.quantizes_activations:
        return t
    return fake_quantize(t, row_scale(t, scheme.activation_bits, torch.sigmoid(clip)), scheme.activation_bits)
