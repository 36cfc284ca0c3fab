"""How a quantized decoder behaves on text, beside its float model: predictions along the text, and where the difference comes from.

Every window is fed to both models with their own caches, some tokens at a time where asked for, so that a quantized cache is read as in
use; figures are kept by position, which shows whether errors grow with the context. ``fqonnx.evaluate_parts`` looks inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fqonnx.decoding import Decoder
from fqonnx.errors import DataError
from fqonnx.metrics import Divergence, LogitsDivergence, Perplexity
from fqonnx.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fqonnx.progress import Progress

Array = npt.NDArray[Any]

BUCKET = 256
"""Positions that are scored together."""


@dataclass(frozen=True)
class Predictions:
    """Next-token predictions of both models over the same tokens.

    Attributes:
        tokens: Predictions.
        perplexity_reference: Of the float model.
        perplexity: Of the candidate.
        kl: Mean KL divergence of the candidate's distributions from the float model's, nats.
        js: Mean Jensen-Shannon divergence, nats, at most ``log 2``.
        total_variation: Mean total variation distance, from 0 to 1.
        top1: Share of predictions with the same most likely token.
        rel_l2: Relative L2 error of all logits.
        nan: NaNs in the candidate's logits.
        inf: Infinities in the candidate's logits.
    """

    tokens: int
    perplexity_reference: float
    perplexity: float
    kl: float
    js: float
    total_variation: float
    top1: float
    rel_l2: float
    nan: int
    inf: int

    @property
    def increase(self) -> float:
        """How much higher the candidate's perplexity is."""
        return self.perplexity - self.perplexity_reference

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; None for what is not finite."""
        values = {**self.__dict__, "perplexity_increase": self.increase}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@dataclass(frozen=True)
class TextEvaluation:
    """What ``evaluate_text`` found.

    Attributes:
        overall: Over all tokens.
        positions: By first position of ``bucket`` in a row, the predictions made from there on.
        bucket: Positions that are scored together.
        cache_bytes: Bytes that one token's keys and values take, in the float model and in the candidate; 0 without a cache.
    """

    overall: Predictions
    positions: dict[int, Predictions]
    bucket: int
    cache_bytes: tuple[float, float]

    @property
    def drift(self) -> float:
        """How much more log-perplexity the candidate loses at the last positions than at the first: about 0 where errors do not add up."""
        lost = [math.log(p.perplexity) - math.log(p.perplexity_reference) for p in (self.positions[0], self.positions[max(self.positions)])]
        return lost[1] - lost[0]

    def failures(self, *, max_error: float | None = None, max_perplexity_increase: float | None = None) -> list[str]:
        """What is wrong, one line each: logits that are not finite, or above a bound. A NaN is within no bound."""
        found, p = [], self.overall
        if p.nan or p.inf or math.isnan(p.rel_l2):
            found.append(f"the logits are not finite: {p.nan} NaN and {p.inf} Inf")
        if max_error is not None and not p.rel_l2 <= max_error:
            found.append(f"the logits have a relative L2 error of {p.rel_l2:.4g}, above the bound of {max_error:g}")
        if max_perplexity_increase is not None and not p.increase <= max_perplexity_increase:
            found.append(
                f"perplexity rises by {p.increase:.4g} ({p.perplexity_reference:.4g} to {p.perplexity:.4g}), "
                f"above the bound of {max_perplexity_increase:g}"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            **self.overall.to_dict(),
            "positions": [{"first": first, **found.to_dict()} for first, found in self.positions.items()],
            "drift": self.drift if math.isfinite(self.drift) else None,
            "cache_bytes_per_token": {"reference": self.cache_bytes[0], "candidate": self.cache_bytes[1]},
        }


class _Score:
    """Accumulates ``Predictions``."""

    def __init__(self) -> None:
        self.reference, self.candidate = Perplexity(), Perplexity()
        self.distance, self.error = LogitsDivergence(), Divergence()

    def update(self, expected: Array, actual: Array, targets: Array) -> None:
        self.reference.score(expected, targets)
        self.candidate.score(actual, targets)
        self.distance.update(expected, actual)
        self.error.update(expected, actual)

    def result(self) -> Predictions:
        distance, error = self.distance, self.error
        return Predictions(
            tokens=self.reference.count,
            perplexity_reference=self.reference.value,
            perplexity=self.candidate.value,
            kl=distance.kl,
            js=distance.js,
            total_variation=distance.total_variation,
            top1=distance.top1,
            rel_l2=error.rel_l2,
            nan=error.nan,
            inf=error.inf,
        )


def evaluate_text(
    reference: Path,
    candidate: Path,
    windows: Iterable[Array],
    *,
    chunk: int | None = None,
    bucket: int = BUCKET,
    device: str = "cpu",
    progress: Progress | None = None,
    count: int | None = None,
) -> TextEvaluation:
    """Feed texts to both models and compare what they predict.

    Args:
        reference: The float model, with or without a cache.
        candidate: A model or a build directory.
        windows: Texts ``[batch, tokens]``, integers without padding; tokens ``1 ..`` are predicted from those before.
        chunk: Tokens of one run, for models with a cache; None takes a text at once. Memory holds the logits of one run.
        bucket: Positions that are scored together.
        device: ``cpu`` or ``cuda``.
        progress: Told of every text.
        count: Texts, for the progress.

    Raises:
        DataError: No text has two tokens, a token is outside the vocabulary, or ``chunk`` is given for a model without a cache.
        ModelError: One of the two is no language model.
        EngineError: ONNX Runtime cannot load or run one.
    """
    decoders = [Decoder(model, device=device) for model in (reference, candidate)]
    for model, decoder in zip((reference, candidate), decoders, strict=True):
        if chunk is not None and not decoder.has_cache:
            raise DataError(f"{model} has no cache of past keys and values: leave out --chunk, or export it with --past")
    overall, positions = _Score(), dict[int, _Score]()
    cached = [0.0, 0.0]
    with (progress or Silent()).task("Evaluating text", count) as task:
        for window in windows:
            length = window.shape[1]
            for decoder in decoders:
                decoder.reset()
            for start in range(0, length - 1, chunk or max(1, length)):
                part = window[:, start : start + (chunk or length)]
                targets = window[:, start + 1 : start + 1 + part.shape[1]]
                expected, actual = (decoder(part)[:, : targets.shape[1]] for decoder in decoders)
                overall.update(expected, actual, targets)
                for at in range(start - start % bucket, start + targets.shape[1], bucket):
                    rows = slice(max(0, at - start), at + bucket - start)
                    positions.setdefault(at, _Score()).update(expected[:, rows], actual[:, rows], targets[:, rows])
            cached = [decoder.cache_bytes / decoder.tokens / len(window) if decoder.tokens else 0.0 for decoder in decoders]
            task.advance()
    if not overall.reference.count:
        raise DataError("no text with two tokens or more: give longer texts")
    return TextEvaluation(overall.result(), {at: positions[at].result() for at in sorted(positions)}, bucket, (cached[0], cached[1]))


def texts(feeds: Iterable[dict[str, Array]]) -> Iterable[Array]:
    """The token ids of feeds, without what a mask leaves out at the end.

    Raises:
        DataError: A feed has no ``input_ids``, or a mask that leaves out tokens before others.
    """
    for index, feed in enumerate(feeds):
        ids = feed.get("input_ids")
        if ids is None or ids.ndim != 2:
            raise DataError(f"sample {index} has no input_ids [batch, tokens]: give token ids, or compare with `fqonnx verify`")
        mask = feed.get("attention_mask")
        if mask is None or bool(np.all(mask != 0)):
            yield ids
            continue
        for row, shown in zip(ids, mask != 0, strict=True):
            kept = int(shown.sum())
            if not shown[:kept].all():
                raise DataError(f"sample {index} is padded before its tokens: pad on the right")
            yield row[None, :kept]
