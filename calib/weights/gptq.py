"""GPTQ (Frantar et al., arXiv 2210.17323): rounds column by column and lets later columns make up for each rounding error."""

from __future__ import annotations

from typing import ClassVar

import torch

from fqonnx.calib.quantizers import codes, levels
from fqonnx.calib.weights.base import checked_hessian
from fqonnx.calib.weights.rtn import search_scales

BLOCK = 128
"""Columns whose updates are applied to the rest of the matrix in one product (the paper's lazy batch updates)."""

TOGETHER = 1 << 22
"""Values of candidates that are rounded side by side (16 MiB): a column of a small matrix costs more to begin than to round."""


class Gptq:
    """GPTQ with activation order, a search of dampings and scales for each row, and coordinate descent behind it.

    - Columns are taken in descending order of the Hessian's diagonal; scales are fixed beforehand ("static groups"), so that the order
      and the groups are independent of each other. Scales are those of the smallest error weighted by the Hessian's diagonal: with all
      of the Hessian they are better for plain rounding (``weights.awq``) but worse here, for GPTQ takes care of what is off the diagonal.
      Where the transform has learned clips, rows may have either.
    - Of several dampings each row takes the result with the smallest error. Rows of a group share input and Hessian, not errors: of
      merged linears as of one, each row is a problem of its own, and the factors are made once for all.
    - GPTQ never returns to a column. Cyclic coordinate descent (QuantEase, Behdin et al., arXiv 2309.01885, algorithm 1) does: every
      code moves to the best one for the codes that the others have now, which can only lessen the error.

    The error is ``tr((Ŵ - W) H (Ŵ - W)ᵀ)`` with 1 % of the mean diagonal added to ``H``'s, so that directions without data count too.
    """

    needs_hessian: ClassVar[bool] = True
    damping: ClassVar[float] = 0.01
    dampings: ClassVar[tuple[float, ...]] = (0.01, 0.001, 0.1)
    sweeps: ClassVar[int] = 4

    def quantize(
        self, weight: torch.Tensor, *, bits: int, group_size: int, hessian: torch.Tensor | None = None, clip: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``WeightQuantizer.quantize``.

        Raises:
            CalibrationError: No Hessian, or it or the weight holds NaN or Inf.
        """
        hessian = checked_hessian(hessian, "gptq")
        diagonal = hessian.diagonal().clamp_min(0)
        scales = [search_scales(weight, bits=bits, group_size=group_size, importance=diagonal)]
        if clip is not None:
            scales.append(search_scales(weight, bits=bits, group_size=group_size, clip=clip))
        order = torch.argsort(diagonal, descending=True, stable=True)
        w = weight[:, order]
        # Scaled to a mean diagonal of 1: no sum over K of squares near fp32's largest overflows.
        h = (hessian / diagonal.mean().clamp_min(1e-12))[order][:, order]
        damped = h.clone()
        damped.diagonal().add_(self.damping)
        wide = [s.repeat_interleave(weight.shape[1] // s.shape[1], 1)[:, order] for s in scales]
        best = torch.empty_like(w)
        chosen = torch.zeros(len(w), dtype=torch.int64, device=w.device)
        smallest = torch.full((len(w),), float("inf"), dtype=torch.float64, device=w.device)
        candidates = [(damping, index) for damping in self.dampings for index in range(len(wide))]
        together = max(TOGETHER // w.numel(), 1)
        for start in range(0, len(candidates), together):
            tried = candidates[start : start + together]
            factors = {damping: inverse_factor(h, damping) for damping, _ in tried}
            scale = torch.stack([wide[index] for _, index in tried])
            rounded = round_columns(w.repeat(len(tried), 1, 1), scale, torch.stack([factors[damping] for damping, _ in tried]), bits)
            for q, (_, index) in zip(rounded, tried, strict=True):
                error = quadratic_error(w, q, wide[index], damped)
                better = error < smallest
                best[better], chosen[better], smallest[better] = q[better], index, error[better]
        scale = torch.stack(wide)[chosen, torch.arange(len(w), device=w.device)]
        best = descend(w, best, scale, damped, bits, self.sweeps)
        out = torch.empty_like(best)
        out[:, order] = best
        return out.to(torch.int8), torch.stack(scales)[chosen, torch.arange(len(w), device=w.device)]


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular ``R`` with ``Rᵀ R = (H + damping · mean(diag H) · I)⁻¹``; more damping where that is too close to singular.

    From ``H = U Uᵀ`` with ``U`` upper triangular, a Cholesky factor in reverse order, it is ``U⁻¹``: half the work of inverting ``H``.
    """
    mean = hessian.diagonal().double().mean().clamp_min(1e-12)
    while True:
        damped = hessian.flip(0, 1).double()
        damped.diagonal().add_(damping * mean)
        reverse, info = torch.linalg.cholesky_ex(damped)
        del damped  # memory for the largest groups
        if not int(info):
            eye = torch.eye(len(hessian), dtype=reverse.dtype, device=hessian.device)
            factor: torch.Tensor = torch.linalg.solve_triangular(reverse.flip(0, 1), eye, upper=True).float()
            return factor
        damping *= 10  # a Hessian of T < K tokens has rank T: the damping alone makes it definite


def round_columns(w: torch.Tensor, scales: torch.Tensor, factor: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ's codes of ``w`` ``[.., N, K]``, which is overwritten; columns are taken in the order they are given in.

    Args:
        w: One matrix, or several that are rounded side by side.
        scales: Of each weight, ``[.., N, K]``.
        factor: ``inverse_factor``, ``[.., K, K]``.
        bits: Of the codes.
    """
    q = torch.empty_like(w)
    n_columns = w.shape[-1]
    for start in range(0, n_columns, BLOCK):
        stop = min(start + BLOCK, n_columns)
        errors = torch.empty_like(w[..., start:stop])
        for column in range(start, stop):
            scale = scales[..., column]
            q[..., column] = codes(w[..., column], scale, bits)
            error = (w[..., column] - q[..., column] * scale) / factor[..., column, column, None]
            w[..., column:stop] -= error[..., None] * factor[..., None, column, column:stop]
            errors[..., column - start] = error
        w[..., stop:] -= errors @ factor[..., start:stop, stop:]
    return q


def quadratic_error(w: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """``(ŵ - w) H (ŵ - w)ᵀ`` of each row, fp64 ``[N]``, with ``ŵ = q · scales``; all three ``[N, K]``."""
    error = q * scales - w
    return ((error @ hessian) * error).sum(1, dtype=torch.float64)


def descend(w: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor, bits: int, sweeps: int) -> torch.Tensor:
    """Codes with a smaller ``quadratic_error``: each in turn moves to its best value for the others as they are, ``sweeps`` times.

    Column ``j`` of a row has its minimum at ``ŵ_j - g_j / H_jj`` with ``g = (ŵ - w) H``; the nearest code is the best one.

    Args:
        w: ``[N, K]``.
        q: Codes to start from, ``[N, K]``.
        scales: ``[N, K]``.
        hessian: ``[K, K]`` with a positive diagonal.
        bits: Of the codes.
        sweeps: Passes over the columns; it ends early when no code moves.
    """
    q = q.clone()
    low, high = levels(bits)
    for _ in range(sweeps):
        before = q.clone()
        gradient = (q * scales - w) @ hessian
        for start in range(0, w.shape[1], BLOCK):
            stop = min(start + BLOCK, w.shape[1])
            block, local = hessian[start:stop, start:stop], gradient[:, start:stop].clone()
            steps = torch.empty_like(local)
            for column in range(stop - start):
                code, scale = q[:, start + column], scales[:, start + column]
                moved = (code - local[:, column] / (block[column, column] * scale)).round_().clamp_(low, high)
                step = (moved - code) * scale
                code.copy_(moved)
                local += step[:, None] * block[column]
                steps[:, column] = step
            gradient += steps @ hessian[start:stop]
        if torch.equal(q, before):
            break
    return q
