"""What a transform is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from fqonnx.calib.kron import WIDTH

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import nn

    from fqonnx.recipe import Scheme


@dataclass(frozen=True, eq=False)
class Problem:
    """One group as torch tensors, fp32, on the device that solves it.

    Attributes:
        weight: ``[N, K]``, the group's linears stacked along the rows.
        tokens: ``[T, K]`` sampled input rows, or None where the transform asked for none.
        absmax: ``[K]`` largest magnitude of each channel, or None likewise.
        scheme: Bit widths to solve for.
        group_size: Weights along K that share a scale; 0 is per output channel.
        seed: Seed of this group's random choices.
        steps: Training steps of a learned transform; None takes the transform's default.
        out_features: N of each linear in the stack; None is one linear.
        width: Size of the right factor of a Kronecker pair at most, where there is a choice.
    """

    weight: torch.Tensor
    tokens: torch.Tensor | None
    absmax: torch.Tensor | None
    scheme: Scheme
    group_size: int
    seed: int
    steps: int | None = None
    out_features: tuple[int, ...] | None = None
    width: int = WIDTH


@dataclass(frozen=True, eq=False)
class FittedTransform:
    """``t = (x / channel_scale) · (left ⊗ right)`` and the clips that were found with it.

    Attributes:
        channel_scale: ``[K]``, positive, or None.
        left: ``[n1, n1]`` or None where there is no online transform.
        right: ``[n2, n2]``; ``n1 * n2 == K``.
        clip: Activation clip in (0, 1]; 1 where the transform looks for none, and then one is looked for.
        weight_clip: ``[N, 1]`` factors in (0, 1] on each scale's absmax, or None to let the weight quantizer choose.
    """

    channel_scale: torch.Tensor | None = None
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    clip: float = 1.0
    weight_clip: torch.Tensor | None = None


@dataclass(frozen=True)
class Transformation:
    """A transform at one step of its training, differentiable.

    Attributes:
        apply: Input rows ``[.., K]`` to transformed rows.
        fold: A weight ``[N, K]`` to the one that makes up for it.
        fitted: The same without clips.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    fold: Callable[[torch.Tensor], torch.Tensor]
    fitted: FittedTransform


@runtime_checkable
class Learnable(Protocol):
    """A transform that can be trained on the output of a whole block."""

    def learned(self, problem: Problem) -> nn.Module:
        """A module whose parameters are trained.

        Raises:
            CalibrationError: The statistics are missing.
        """
        ...

    def transformations(self, learned: Sequence[nn.Module]) -> list[Transformation]:
        """The transformations of the moment of several such modules, together: what they have in common is done once."""
        ...


class Transform(Protocol):
    """A way to make a group's input and weights flat. Stateless: all that is learned is in the result."""

    needs_tokens: ClassVar[bool]
    """Whether ``fit`` reads ``tokens`` or ``absmax``. Where nothing needs them, the float model is never run for statistics."""

    has_pair: ClassVar[bool]
    """Whether ``fit`` gives a Kronecker pair, which a kernel has to apply online."""

    def fit(self, problem: Problem) -> FittedTransform:
        """Find the transform of one group.

        Raises:
            CalibrationError: The statistics are unusable (NaN or Inf).
        """
        ...
