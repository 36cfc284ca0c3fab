"""Streaming measures of how far a candidate tensor is from its reference.

Each class is an accumulator: ``update`` takes one sample (any shape), the properties give the figure over everything seen so far.
Sums are kept in float64 and inputs are widened a chunk at a time, so that memory stays near one chunk whatever the sample's size.

Where an element is not finite on either side the comparison has no meaning there: equal infinities (masks) are left out as agreement,
anything else makes the figures NaN, which no threshold accepts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterator

Tensor = npt.NDArray[np.generic]
Wide = npt.NDArray[np.float64]

CHUNK_ELEMENTS = 1 << 20
"""Elements that are widened to float64 at a time (8 MB a side)."""


def is_floating(array: Tensor) -> bool:
    """Whether the dtype is a float, bfloat16 and the float8 types of ``ml_dtypes`` included."""
    return array.dtype.name.startswith(("float", "bfloat"))


def _same_shape(reference: Tensor, candidate: Tensor) -> None:
    if reference.shape != candidate.shape:
        raise ValueError(f"shapes differ: reference {list(reference.shape)}, candidate {list(candidate.shape)}")


def _chunks(reference: Tensor, candidate: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    flat_reference, flat_candidate = reference.reshape(-1), candidate.reshape(-1)
    for start in range(0, flat_reference.size, CHUNK_ELEMENTS):
        part = slice(start, start + CHUNK_ELEMENTS)
        yield flat_reference[part], flat_candidate[part]


def _row_chunks(array: Tensor) -> Iterator[slice]:
    """Slices of rows (vectors along the last axis) of a 2-D array, about a chunk of elements each."""
    rows = max(1, CHUNK_ELEMENTS // max(1, array.shape[1]))
    for start in range(0, array.shape[0], rows):
        yield slice(start, start + rows)


class Divergence:
    """Element-wise distance: cosine, relative L2, SQNR, largest error, and what is not finite.

    With reference ``r``, candidate ``c`` and all samples taken as one long vector: ``cosine = r·c / |r||c|``,
    ``rel_l2 = |c - r| / |r|``, ``sqnr_db = 10 log10(|r|² / |c - r|²)``, ``max_abs = max |c - r|``.
    Without any element every figure is NaN.

    Attributes:
        samples: Updates so far.
        elements: Elements so far.
        nan_reference: NaNs in the reference.
        inf_reference: Infinities in the reference.
        nan: NaNs in the candidate.
        inf: Infinities in the candidate.
        mismatched: Elements where exactly one side is finite, signs of infinities differ, or either side is NaN.
        exact: Elements that compare equal (of integers and booleans the only figure that matters).
        worst_sample: Index of the sample with the largest relative L2, None before the first sample.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.elements = 0
        self.nan_reference = self.inf_reference = self.nan = self.inf = self.mismatched = self.exact = 0
        self.worst_sample: int | None = None
        self._worst = -1.0
        self._rr = self._cc = self._rc = self._ee = self._max = 0.0

    def update(self, reference: Tensor, candidate: Tensor) -> float:
        """Add one sample.

        Args:
            reference: Any shape; float, integer or boolean.
            candidate: The same shape.

        Returns:
            The relative L2 of this sample alone.

        Raises:
            ValueError: The shapes differ.
        """
        _same_shape(reference, candidate)
        rr = ee = 0.0
        mismatched = 0
        for raw_r, raw_c in _chunks(reference, candidate):
            self.exact += int(np.count_nonzero(raw_r == raw_c))  # before widening: float64 does not tell all int64 apart
            r, c = raw_r.astype(np.float64), raw_c.astype(np.float64)
            finite = np.isfinite(r) & np.isfinite(c)
            if not finite.all():
                mismatched += self._count_non_finite(r, c)
                r, c = r[finite], c[finite]
            # vdot is pairwise enough here: BLAS sums blocks, and a float64 has 29 bits to spare over a float32.
            error = c - r
            rr += float(np.vdot(r, r))
            ee += float(np.vdot(error, error))
            self._cc += float(np.vdot(c, c))
            self._rc += float(np.vdot(r, c))
            if error.size:
                self._max = max(self._max, float(np.abs(error).max()))
        self._rr += rr
        self._ee += ee
        self.mismatched += mismatched
        self.elements += reference.size
        sample = math.nan if mismatched else _ratio(math.sqrt(ee), math.sqrt(rr))
        badness = math.inf if math.isnan(sample) else sample
        if self.worst_sample is None or badness > self._worst:
            self.worst_sample, self._worst = self.samples, badness
        self.samples += 1
        return sample

    def _count_non_finite(self, r: Wide, c: Wide) -> int:
        nan_r, nan_c, inf_r, inf_c = np.isnan(r), np.isnan(c), np.isinf(r), np.isinf(c)
        self.nan_reference += int(nan_r.sum())
        self.nan += int(nan_c.sum())
        self.inf_reference += int(inf_r.sum())
        self.inf += int(inf_c.sum())
        return int((nan_r | nan_c | ((inf_r | inf_c) & (r != c))).sum())

    @property
    def _undefined(self) -> bool:
        return self.elements == 0 or self.mismatched > 0

    @property
    def cosine(self) -> float:
        """Cosine similarity; 1 where both sides are zero, 0 where one is."""
        if self._undefined:
            return math.nan
        if self._rr == 0.0 or self._cc == 0.0:
            return 1.0 if self._rr == self._cc else 0.0
        # Two roots instead of one of the product: the product of two sums of squares may overflow.
        return max(-1.0, min(1.0, self._rc / math.sqrt(self._rr) / math.sqrt(self._cc)))

    @property
    def rel_l2(self) -> float:
        """Norm of the error over the norm of the reference; infinite where only the reference is zero."""
        return math.nan if self._undefined else _ratio(math.sqrt(self._ee), math.sqrt(self._rr))

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio in dB; infinite without noise, minus infinite for noise on a zero reference."""
        if self._undefined:
            return math.nan
        if self._ee == 0.0:
            return math.inf
        return 10.0 * (math.log10(self._rr) - math.log10(self._ee)) if self._rr else -math.inf

    @property
    def max_abs(self) -> float:
        """Largest absolute error."""
        return math.nan if self._undefined else self._max


def _ratio(numerator: float, denominator: float) -> float:
    if denominator:
        return numerator / denominator
    return math.inf if numerator else 0.0


class MeanCosine:
    """Mean cosine of the vectors along the last axis: of sentence embeddings ``[B, D]``, the mean over the sentences."""

    def __init__(self) -> None:
        self._sum = 0.0
        self.count = 0

    def update(self, reference: Tensor, candidate: Tensor) -> None:
        """Add vectors ``[.., D]``; a scalar counts as a vector of one element.

        Raises:
            ValueError: The shapes differ.
        """
        _same_shape(reference, candidate)
        if reference.size == 0:
            return
        reference, candidate = _as_rows(reference), _as_rows(candidate)
        for rows in _row_chunks(reference):
            r, c = reference[rows].astype(np.float64), candidate[rows].astype(np.float64)
            norm_r, norm_c = np.linalg.norm(r, axis=1), np.linalg.norm(c, axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                cosine = np.einsum("ij,ij->i", r, c) / norm_r / norm_c
            zero_r, zero_c = norm_r == 0, norm_c == 0
            cosine[zero_r & zero_c] = 1.0
            cosine[zero_r ^ zero_c] = 0.0
            self._sum += float(cosine.sum())
            self.count += cosine.size

    @property
    def value(self) -> float:
        """The mean; NaN before the first vector or where a vector is not finite."""
        return self._sum / self.count if self.count else math.nan


def _as_rows(array: Tensor) -> Tensor:
    return array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)


def log_softmax(logits: Wide) -> Wide:
    """Log of the softmax over the last axis, ``x - max - log sum exp(x - max)``; ``-inf`` logits are fine, a row of only those is NaN."""
    with np.errstate(invalid="ignore"):  # inf - inf: the row becomes NaN, which callers count
        shifted = logits - logits.max(axis=-1, keepdims=True)
        result: Wide = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


class LogitsDivergence:
    """What a change of logits does to the distributions, over vectors along the last axis.

    With ``p`` the softmax of the reference and ``q`` that of the candidate, in nats: the KL divergence ``KL(p‖q) = Σ p (log p - log q)``,
    and the Jensen-Shannon divergence ``(KL(p‖m) + KL(q‖m)) / 2`` with ``m = (p + q) / 2``, which is symmetric and at most ``log 2``
    (Lin, 1991, "Divergence measures based on the Shannon entropy"); the total variation ``Σ |p - q| / 2``; and whether both have their
    largest element at one place.
    """

    def __init__(self) -> None:
        self._kl = self._js = self._variation = 0.0
        self._agree = 0
        self.count = 0

    def update(self, reference: Tensor, candidate: Tensor) -> None:
        """Add logits ``[.., V]``, V >= 1.

        Raises:
            ValueError: The shapes differ, or the logits are a scalar.
        """
        _same_shape(reference, candidate)
        if reference.ndim == 0:
            raise ValueError("logits need an axis of classes, got a scalar")
        if reference.size == 0:
            return
        reference, candidate = _as_rows(reference), _as_rows(candidate)
        for rows in _row_chunks(reference):
            r, c = reference[rows].astype(np.float64), candidate[rows].astype(np.float64)
            log_p, log_q = log_softmax(r), log_softmax(c)
            p, q = np.exp(log_p), np.exp(log_q)
            with np.errstate(invalid="ignore", divide="ignore"):
                # 0 log 0 is 0: a class that the reference masks out (-inf) adds nothing.
                terms = np.where(p > 0, p * (log_p - log_q), 0.0)
                log_m = np.log((p + q) / 2)
                shared = np.where(p > 0, p * (log_p - log_m), 0.0) + np.where(q > 0, q * (log_q - log_m), 0.0)
            invalid = np.isnan(log_p).any(axis=1) | np.isnan(log_q).any(axis=1)
            kl = np.where(invalid, np.nan, terms.sum(axis=1))
            self._kl += float(kl.sum())
            self._js += float(np.where(invalid, np.nan, shared.sum(axis=1)).sum()) / 2
            self._variation += float(np.where(invalid, np.nan, np.abs(p - q).sum(axis=1)).sum()) / 2
            self._agree += int(((r.argmax(axis=1) == c.argmax(axis=1)) & ~invalid).sum())
            self.count += kl.size

    @property
    def kl(self) -> float:
        """Mean KL divergence in nats; NaN before the first vector or where a vector has no softmax (NaN, ``+inf``)."""
        # The sum is zero up to rounding for equal inputs, and a KL divergence is never negative.
        return max(0.0, self._kl / self.count) if self.count and not math.isnan(self._kl) else math.nan

    @property
    def js(self) -> float:
        """Mean Jensen-Shannon divergence in nats, from 0 to ``log 2``; NaN as ``kl`` is."""
        return min(math.log(2), max(0.0, self._js / self.count)) if self.count and not math.isnan(self._js) else math.nan

    @property
    def total_variation(self) -> float:
        """Mean total variation distance, from 0 to 1; NaN as ``kl`` is."""
        return self._variation / self.count if self.count else math.nan

    @property
    def top1(self) -> float:
        """Share of vectors whose largest element is at the same place (the first, among equals); a NaN never agrees."""
        return self._agree / self.count if self.count else math.nan


class Perplexity:
    """Perplexity of next-token prediction, ``exp(-mean log p(token[t + 1] | token[0..t]))``."""

    def __init__(self) -> None:
        self._nll = 0.0
        self.count = 0

    def update(self, logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> None:
        """Add the predictions of one batch: the logits at ``t`` are scored on the token at ``t + 1``.

        Args:
            logits: ``[B, S, V]``, unnormalised.
            tokens: ``[B, S]`` integers in ``[0, V)``.
            mask: ``[B, S]``, nonzero where a token counts (an attention mask); a pair counts where both of its tokens do.

        Raises:
            ValueError: The shapes do not fit, or a counted token is outside the vocabulary.
        """
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise ValueError(f"logits {list(logits.shape)} do not fit tokens {list(tokens.shape)}: expected [B, S, V] and [B, S]")
        for b in range(tokens.shape[0]):
            keep = np.arange(max(0, tokens.shape[1] - 1))
            if mask is not None:
                keep = keep[(mask[b, :-1] != 0) & (mask[b, 1:] != 0)]
            self._add(logits[b], keep, tokens[b, 1:][keep].astype(np.int64))

    def score(self, logits: Tensor, targets: Tensor) -> None:
        """Add predictions whose targets are known: what a text gives that is fed in chunks, the next chunk's first token included.

        Args:
            logits: ``[.., V]``, unnormalised.
            targets: ``[..]`` integers in ``[0, V)``: the token after each.

        Raises:
            ValueError: The shapes do not fit, or a target is outside the vocabulary.
        """
        if logits.shape[:-1] != targets.shape:
            raise ValueError(f"logits {list(logits.shape)} do not fit targets {list(targets.shape)}: expected [.., V] and [..]")
        rows = logits.reshape(-1, logits.shape[-1])
        self._add(rows, np.arange(len(rows)), targets.reshape(-1).astype(np.int64))

    def _add(self, logits: Tensor, positions: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> None:
        vocabulary = logits.shape[-1]
        if targets.size and (targets.min() < 0 or targets.max() >= vocabulary):
            raise ValueError(f"token {int(targets.max())} is outside the vocabulary of {vocabulary}")
        step = max(1, CHUNK_ELEMENTS // max(1, vocabulary))
        for start in range(0, positions.size, step):
            rows = logits[positions[start : start + step]].astype(np.float64)
            self._nll -= float(np.take_along_axis(log_softmax(rows), targets[start : start + step, None], axis=1).sum())
            self.count += rows.shape[0]

    @property
    def value(self) -> float:
        """The perplexity; NaN before the first pair or where logits are NaN, infinite where it exceeds a double."""
        if not self.count or math.isnan(self._nll):
            return math.nan
        try:
            return math.exp(self._nll / self.count)
        except OverflowError:
            return math.inf
