"""Second moments of a group's quantized input, and the weight that makes up for what rounding the input does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fqonnx.calib import kron
from fqonnx.calib.quantizers import codes, row_scale

if TYPE_CHECKING:
    from fqonnx.calib.transforms.base import FittedTransform


SHRINK = 5
"""Tokens per channel at which half of the correlation between rounding errors is believed."""

HARM = 1.2
"""How many times as large an error is harm: few rows may show a good weight as a slightly worse one."""

DAMPING = 0.01
"""Ridge of ``corrected_weight`` where there are many rows."""


def forward(fitted: FittedTransform, x: torch.Tensor) -> torch.Tensor:
    """``(x / channel_scale) · (left ⊗ right)`` of ``x`` ``[.., K]``."""
    if fitted.channel_scale is not None:
        x = x / fitted.channel_scale
    if fitted.left is None or fitted.right is None:
        return x
    return kron.apply(x, fitted.left, fitted.right)


def fold(fitted: FittedTransform, weight: torch.Tensor) -> torch.Tensor:
    """Undo the transform in the weight ``[N, K]``, so that ``forward(x) · foldedᵀ = x · Wᵀ``."""
    if fitted.left is None or fitted.right is None:
        return weight if fitted.channel_scale is None else weight * fitted.channel_scale
    return kron.fold(weight, fitted.left, fitted.right, fitted.channel_scale)


def quantize_input(t: torch.Tensor, bits: int, clip: float) -> torch.Tensor:
    """Quantize-dequantize transformed rows ``[.., K]`` per token, as the ``FlatQuantize`` op does; 16 bits leaves them."""
    if bits >= 16:
        return t
    scale = row_scale(t, bits, clip)
    return codes(t, scale, bits) * scale


def relative_error(error: torch.Tensor, target: torch.Tensor, out_features: tuple[int, ...] | None) -> float:
    """Sum over the linears of a group of the squared error of their outputs over their squared outputs, in fp64.

    Relative, or a loud q would silence its v; linears that put out nothing but zeros are left aside.

    Args:
        error: ``[T, N]``.
        target: ``[T, N]``.
        out_features: N of each linear; None is one linear.
    """
    sizes = list(out_features or (target.shape[1],))
    parts = zip(torch.split(error.double(), sizes, 1), torch.split(target.double(), sizes, 1), strict=True)
    powers = [(float(e.square().sum()), float(y.square().sum())) for e, y in parts]
    return sum(e / y for e, y in powers if y > 0)


def mean_error(fitted: FittedTransform, folded: torch.Tensor, rounded: torch.Tensor, tokens: torch.Tensor, bits: int) -> torch.Tensor:
    """``E[W x] - E[Ŵ x̂]``, what the bias of a quantized linear lacks: fp32 ``[N]`` (Nagel et al., arXiv 1906.04721, section 4.2).

    The paper derives the mean input from the norm before; here it is that of ``tokens``, the paper's empirical form (appendix D), which
    holds for any input and takes the rounding of the input along. Means are fp64: they are small differences of large sums.

    Args:
        fitted: The transform.
        folded: The float weight in the transformed space, ``[N, K]``.
        rounded: What stands for it, ``[N, K]``.
        tokens: ``[T, K]`` input rows.
        bits: Activation bits; 16 leaves the error of the weights.
    """
    t = forward(fitted, tokens)
    means = (rows.double().mean(0) for rows in (t, quantize_input(t, bits, fitted.clip)))
    exact, quantized = (weight.double() @ mean for weight, mean in zip((folded, rounded), means, strict=True))
    return (exact - quantized).float()


def input_moments(
    fitted: FittedTransform, tokens: torch.Tensor, hessian: torch.Tensor, bits: int, *, measured: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """``E[t̂ᵀ t̂]`` and ``E[tᵀ t̂]`` of the transformed input ``t`` and its quantized form ``t̂``, each fp32 ``[K, K]``.

    With ``e = t̂ - t`` both are ``E[tᵀ t]`` plus moments of ``e``. The first term comes exactly from ``hessian``, which covers every
    row seen; only the small terms in ``e`` are estimated on ``tokens``. What a channel's own error does to it needs few tokens; how the
    errors of two channels go together needs many times K, and least squares would follow the noise. So the measured moments of ``e``
    have the share ``T² / (T² + (5 K)²)``; the rest is a model of each channel by itself, ``e = (g - 1) t + r`` with its own gain ``g``
    and a remainder ``r`` that goes with nothing (Bussgang 1952). It has the measured moments of every single channel, and it is positive
    definite: moments of ``e`` on the diagonal alone are not once channels depend on each other, and least squares blew up on them.

    Perplexity of a small Llama at W4A4 (K = 512 and 1,536; three seeds): without correction 5.055; corrected by measured moments alone
    5.048 at T = 16,384, 5.070 at 7,168, 5.165 at 2,048.

    Args:
        fitted: The transform.
        tokens: ``[T, K]`` input rows.
        hessian: ``[K, K]`` mean of ``xᵀ x`` over all rows.
        bits: Activation bits; 16 leaves ``e = 0``.
        measured: Whether measured moments of ``e`` have their share. What ``tokens`` say of ``e`` and what ``hessian`` says of ``t`` are of
            different rows, so their sum may be indefinite; the model alone never is.
    """
    # (P/c)ᵀ H (P/c): rows, then columns; H is symmetric.
    exact = forward(fitted, forward(fitted, hessian).mT.contiguous())
    exact = (exact + exact.mT) / 2
    if bits >= 16:
        return exact, exact
    t = forward(fitted, tokens)
    error = quantize_input(t, bits, fitted.clip) - t
    rows = t.shape[0]
    return with_errors(exact, t.mT @ error / rows, error.mT @ error / rows, t.square().mean(0), rows if measured else 0)


def with_errors(
    exact: torch.Tensor, cross: torch.Tensor, noise: torch.Tensor, power: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``E[t̂ᵀ t̂]`` and ``E[tᵀ t̂]`` from moments of the input and of its rounding error, these believed as far as rows go.

    Args:
        exact: ``E[tᵀ t]``, ``[K, K]``.
        cross: ``E[tᵀ e]``, ``[K, K]``.
        noise: ``E[eᵀ e]``, ``[K, K]``.
        power: ``E[t²]`` of each channel ``[K]``, over the rows that ``cross`` and ``noise`` are of.
        rows: How many those are; 0 leaves the model of each channel by itself.
    """
    channels = len(power)
    share = rows**2 / (rows**2 + (SHRINK * channels) ** 2)
    gain = cross.diagonal() / torch.where(power > 0, power, torch.ones_like(power))
    remainder = (noise.diagonal() - gain.square() * power).clamp_min(0)
    cross = share * cross + (1 - share) * exact * gain
    noise = share * noise + (1 - share) * (gain[:, None] * exact * gain + torch.diag(remainder))
    return exact + cross + cross.mT + noise, exact + cross


def does_harm(target: torch.Tensor, folded: torch.Tensor, fitted: FittedTransform, rows: torch.Tensor, bits: int) -> bool:
    """Whether a corrected weight is clearly worse for the quantized input than the float weight, on rows that its moments are not of.

    Args:
        target: From ``corrected_weight``, ``[N, K]``.
        folded: The float weight in the transformed space, ``[N, K]``.
        fitted: The transform.
        rows: ``[T, K]`` input rows.
        bits: Activation bits; 16 leaves nothing to correct.
    """
    if bits >= 16:
        return False
    t = forward(fitted, rows)
    quantized, wanted = quantize_input(t, bits, fitted.clip), t @ folded.mT
    errors = [float((quantized @ weight.mT - wanted).double().norm()) for weight in (target, folded)]
    return errors[0] > HARM * errors[1]


def damping(rows: int, channels: int) -> float:
    """The ridge of ``corrected_weight`` for a Hessian of so many rows: 1 % where they are many, 10 % at a row per channel."""
    return DAMPING * (1 + (3 * channels / rows) ** 2)


def corrected_weight(weight: torch.Tensor, quantized: torch.Tensor, cross: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """The real-valued weight that fits the float output best from the quantized input: ``W · E[tᵀ t̂] · E[t̂ᵀ t̂]⁻¹``.

    ``E‖t̂ Ŵᵀ - t Wᵀ‖²`` over integer weights ``Ŵ`` is, up to a constant, ``E‖t̂ (Ŵ - W*)ᵀ‖²`` around this least-squares solution
    ``W*``, so rounding should start from it rather than from ``W`` (the asymmetric calibration of GPTAQ, arXiv 2504.02692).

    Args:
        weight: fp32 ``[N, K]`` in the transformed space.
        quantized: ``E[t̂ᵀ t̂]``, ``[K, K]``.
        cross: ``E[tᵀ t̂]``, ``[K, K]``.
        damping: Ridge towards ``weight``, as a share of the mean diagonal; it alone decides directions that no data shows.
    """
    ridge = damping * quantized.diagonal().mean().clamp_min(1e-12) * torch.eye(quantized.shape[0], device=weight.device)
    right = weight.double() @ (cross + ridge).double()
    solution: torch.Tensor = torch.linalg.solve((quantized + ridge).double(), right.mT)
    return solution.mT.float().contiguous()
