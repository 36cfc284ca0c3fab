"""One group, from statistics to a solution: fit the transform, fold it into the weights, round them, measure."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from fqonnx.calib import moments
from fqonnx.calib.adapt import adapt
from fqonnx.calib.clips import with_clip
from fqonnx.calib.registry import transform_named, weight_quantizer_named
from fqonnx.calib.solution import GroupSolution
from fqonnx.calib.transforms.base import Problem
from fqonnx.errors import CalibrationError

if TYPE_CHECKING:
    from fqonnx.calib.solution import Array, GroupStats
    from fqonnx.calib.transforms.base import FittedTransform
    from fqonnx.recipe import Recipe

HELD_OUT = 16
"""One token in this many is kept from training, for the figures of the report."""

PROFILE_POINTS = 256


def solve_group(
    name: str,
    weight: Array,
    stats: GroupStats | None,
    recipe: Recipe,
    *,
    seed: int,
    out_features: tuple[int, ...] | None = None,
    device: str = "cpu",
    base: GroupSolution | None = None,
) -> GroupSolution:
    """Quantize one group.

    Args:
        name: The group's name, for the result and for errors.
        weight: fp32 ``[N, K]``, the group's linears stacked along the rows.
        stats: The input's statistics; None for a recipe that needs none, and then the figures that need activations are absent.
        recipe: What to do.
        seed: Seed of this group's random choices.
        out_features: N of each linear in the stack; None is one linear.
        device: ``cpu`` or ``cuda``.
        base: A solution of the group in another scheme, whose transform is taken; None fits one.

    Raises:
        CalibrationError: Weights or statistics hold NaN or Inf, statistics that the recipe needs are missing, or memory is out.
    """
    start = time.perf_counter()
    try:
        return _solve(name, weight, stats, recipe, seed, out_features, torch.device(device), start, base)
    except CalibrationError as error:
        raise CalibrationError(f"group {name!r}: {error}") from None
    except torch.cuda.OutOfMemoryError:
        raise CalibrationError(f"group {name!r}: the GPU is out of memory: use --device cpu or a smaller --calib-samples") from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch has no type for it on the CPU
            raise
        raise CalibrationError(f"group {name!r}: out of memory: use a machine with more, or leave the group in float with --keep") from None


def _solve(
    name: str,
    weight: Array,
    stats: GroupStats | None,
    recipe: Recipe,
    seed: int,
    out_features: tuple[int, ...] | None,
    device: torch.device,
    start: float,
    base: GroupSolution | None,
) -> GroupSolution:
    scheme = recipe.bits
    w = torch.from_numpy(weight).to(device)
    if not bool(torch.isfinite(w).all()):
        raise CalibrationError("its weights hold NaN or Inf: the model is damaged")
    tokens = None if stats is None or not len(stats.tokens) else torch.from_numpy(stats.tokens).to(device)
    held_out, training = (None, None) if tokens is None else _split(tokens)
    problem = Problem(
        weight=w,
        tokens=training,
        absmax=None if stats is None else torch.from_numpy(stats.absmax).to(device),
        scheme=scheme,
        group_size=recipe.group_size,
        seed=seed,
        steps=recipe.steps,
        out_features=out_features,
        width=recipe.width,
    )
    fitted = transform_named(recipe.transform).fit(problem) if base is None else adapt(base, problem)
    if fitted.clip == 1:  # the transform has found none
        fitted = with_clip(fitted, problem)
    folded = moments.fold(fitted, w)
    quantizer = weight_quantizer_named(recipe.weights)
    target, hessian = folded, None
    if quantizer.needs_hessian:
        if stats is None or stats.hessian is None or training is None:
            raise CalibrationError(f"--weights {recipe.weights} needs calibration statistics: give calibration data")
        exact, ridge = torch.from_numpy(stats.hessian).to(device), moments.damping(stats.count, w.shape[1])
        hessian, cross = moments.input_moments(fitted, training, exact, scheme.activation_bits)
        target = moments.corrected_weight(folded, hessian, cross, ridge)
        if held_out is not None and moments.does_harm(target, folded, fitted, held_out, scheme.activation_bits):
            hessian, cross = moments.input_moments(fitted, training, exact, scheme.activation_bits, measured=False)
            target = moments.corrected_weight(folded, hessian, cross, ridge)
    codes, scales = quantizer.quantize(
        target, bits=scheme.weight_bits, group_size=recipe.group_size, hessian=hessian, clip=fitted.weight_clip
    )
    bias = None
    if recipe.bias_correction:
        if training is None:
            raise CalibrationError("--bias-correction needs calibration statistics: give calibration data")
        bias = moments.mean_error(fitted, folded, _dequantize(codes, scales), training, scheme.activation_bits)
    return measure(name, w, fitted, codes, scales, held_out, scheme.activation_bits, time.perf_counter() - start, bias=bias)


def measure(
    name: str,
    weight: torch.Tensor,
    fitted: FittedTransform,
    codes: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor | None,
    activation_bits: int,
    seconds: float,
    *,
    bias: torch.Tensor | None = None,
) -> GroupSolution:
    """A solution with its figures for the report.

    Args:
        name: The group's name.
        weight: The float weight ``[N, K]``.
        fitted: The transform and its clip.
        codes: ``[N, K]``.
        scales: ``[N, K / G]``.
        rows: Float input rows ``[T, K]`` that nothing was trained on; None leaves out the figures that need them.
        activation_bits: Bits of the input.
        seconds: What it took.
        bias: ``[N]`` that is added to the linears' biases, or None.

    Raises:
        CalibrationError: The clip is not one.
    """
    folded, rounded = moments.fold(fitted, weight), _dequantize(codes, scales)
    metrics = {"weight_rel_l2": _rel_l2(rounded, folded)}
    profiles: tuple[Array | None, Array | None] = (None, None)
    if rows is not None:
        t = moments.forward(fitted, rows)
        quantized = moments.quantize_input(t, activation_bits, fitted.clip)
        metrics["activation_rel_l2"] = _rel_l2(quantized, t)
        outputs = quantized @ rounded.mT
        metrics["output_rel_l2"] = _rel_l2(outputs if bias is None else outputs + bias, rows @ weight.mT)
        before, after = _channel_norms(rows), _channel_norms(t)
        metrics["flatness_before"], metrics["flatness_after"] = _flatness(before), _flatness(after)
        profiles = (_profile(before), _profile(after))
    metrics["seconds"] = seconds
    return GroupSolution(
        group=name,
        channel_scale=_array(fitted.channel_scale),
        left=_array(fitted.left),
        right=_array(fitted.right),
        clip=_checked_clip(fitted),
        codes=codes.cpu().numpy(),
        scales=scales.cpu().numpy(),
        bias=_array(bias),
        metrics=metrics,
        profile_before=profiles[0],
        profile_after=profiles[1],
    )


def _split(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every ``HELD_OUT``-th token, and the others; all of them twice where there are too few to share."""
    if len(tokens) < 2 * HELD_OUT:
        return tokens, tokens
    mask = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    mask[::HELD_OUT] = True
    return tokens[mask], tokens[~mask]


def _checked_clip(fitted: FittedTransform) -> float:
    if not 0 < fitted.clip <= 1:  # NaN too
        raise CalibrationError("training diverged: lower --steps, or choose --transform hadamard")
    return float(fitted.clip)


def _dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (codes.reshape(*scales.shape, -1) * scales[..., None]).reshape(codes.shape)


def _rel_l2(candidate: torch.Tensor, reference: torch.Tensor) -> float:
    """``‖candidate - reference‖ / ‖reference‖``; 0 where both are zero."""
    # fp64: squares of activations beyond 1e18 overflow fp32.
    error, norm = float((candidate - reference).double().norm()), float(reference.double().norm())
    return error / norm if norm else float(error > 0)


def _channel_norms(rows: torch.Tensor) -> torch.Tensor:
    """Root mean square of each channel, ``[K]``, in descending order."""
    return rows.square().mean(0).sqrt().sort(descending=True).values


def _flatness(norms: torch.Tensor) -> float:
    """How far channel magnitudes are from equal: ``‖d - g‖ / ‖d‖`` with ``g = ‖d‖ / sqrt(K)`` in every channel.

    FlatQuant's flatness (arXiv 2410.09426, section 4.4) divided by the norm, so that layers compare: 0 is perfectly flat and values
    near sqrt(2) mean that one channel holds everything.
    """
    total = norms.norm()
    if not float(total):
        return 0.0
    return float((norms - total / norms.numel() ** 0.5).norm() / total)


def _profile(norms: torch.Tensor) -> Array:
    index = torch.linspace(0, norms.numel() - 1, min(PROFILE_POINTS, norms.numel())).round().long()
    return norms.cpu()[index].numpy()


def _array(tensor: torch.Tensor | None) -> Array | None:
    return None if tensor is None else tensor.detach().float().cpu().numpy()
