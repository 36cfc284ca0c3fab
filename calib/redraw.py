"""More text of the kind that a language model is calibrated on: copies of the samples with some tokens drawn anew.

LLM-QAT (arXiv 2305.17888) trains on text that the float model wrote, which takes a run of the model for every token. Here a share of the
tokens of real text is replaced, each by a draw from what the float model predicts behind the real tokens before it: one run for a sample
gives any number of copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fqonnx.calib.roles import input_roles
from fqonnx.calib.stream import StreamedModel
from fqonnx.causality import alike_before_the_end, with_other_end
from fqonnx.errors import CalibrationError, ModelError
from fqonnx.passes.constants import is_float

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    import numpy.typing as npt
    import onnx_ir as ir

    from fqonnx.calib.data.base import Feeds, Source
    from fqonnx.calib.stream import Values

    Array = npt.NDArray[Any]

SHARE = 0.3
"""Of the tokens that are drawn anew."""

_REMEDY = "leave out --augment"


@dataclass(frozen=True)
class NextToken:
    """Where a model reads tokens and where it predicts the next ones.

    Attributes:
        ids: Input ``[batch, sequence]`` of integers.
        logits: Output ``[batch, sequence, vocabulary]``.
        mask: Input like ``ids`` that is zero where a token is padding, or None.
    """

    ids: str
    logits: str
    mask: str | None

    @classmethod
    def of(cls, model: ir.Model) -> NextToken:
        """Find them by the graph: one input looks rows up, one output has a float for each of those rows or is called logits.

        Raises:
            ModelError: There are none, or more than one.
        """
        roles = input_roles(model)
        ids = [value for value in model.graph.inputs if value.name in roles and roles[value.name].kind == "ids" and _rank(value) == 2]
        outputs = [value for value in model.graph.outputs if is_float(value.dtype) and _rank(value) == 3]
        rows = {roles[value.name or ""].high for value in ids}
        logits = [value for value in outputs if "logit" in (value.name or "").lower()]
        logits = logits or [value for value in outputs if value.shape is not None and value.shape[2] in rows - {None}]
        if len(ids) != 1 or len(logits) != 1:
            raise ModelError(f"copies of text need a model with one input of token ids and one output of logits: {_REMEDY}")
        masks = [name for name, role in roles.items() if role.kind == "mask"]
        return cls(ids[0].name or "", logits[0].name or "", masks[0] if len(masks) == 1 else None)


def redrawn(model: ir.Model, source: Source, copies: int, *, seed: int, workdir: Path) -> Iterator[tuple[int, Feeds]]:
    """Copies of every sample of a source.

    Args:
        model: The float model; it predicts the next token.
        source: Feeds; read twice.
        copies: Of each sample.
        seed: Of the draws.
        workdir: Folder for activations that do not fit in memory.

    Yields:
        The index of a feed of ``source`` and a copy of it: all first copies, then all second ones, and so on.

    Raises:
        ModelError: The model is no language model, or predicts hidden tokens and not next ones.
        CalibrationError: ONNX Runtime fails on a sample, or logits are NaN.
    """
    language = NextToken.of(model)
    drawn: dict[int, list[Array]] = {}
    probed: list[Array] = []

    def draw(sample: int, values: Values) -> None:
        if language.logits not in values:
            return
        logits = values[language.logits]
        if not np.isfinite(logits.max(-1, initial=-np.inf)).all():
            raise CalibrationError("the float model's logits are NaN or Inf: check the model and the data in float first")
        if sample == 0:
            probed.append(logits)
            return
        feeds = samples[sample - 1]
        if sample == 1 and not alike_before_the_end(logits, probed.pop()):
            raise ModelError(f"output {language.logits!r} does not predict the next token, it sees it: {_REMEDY}")
        random = np.random.default_rng((seed, sample))
        drawn[sample - 1] = [_drawn_anew(feeds[language.ids], logits, feeds.get(language.mask or ""), random) for _ in range(copies)]

    samples = _Kept(source)
    StreamedModel(model, workdir).run(_with_probe(samples, language), taps=[language.logits], on_values=draw)
    for copy in range(copies):
        for index, feeds in enumerate(source):
            yield index, {**feeds, language.ids: drawn[index][copy]}


class _Kept:
    """A source's feeds by index, integers only: what tokens and masks are."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._kept: list[Feeds] = []

    def __iter__(self) -> Iterator[Feeds]:
        for feeds in self._source:
            self._kept.append({name: array for name, array in feeds.items() if array.dtype.kind in "iub"})
            yield feeds

    def __getitem__(self, index: int) -> Feeds:
        return self._kept[index]


def _with_probe(samples: _Kept, language: NextToken) -> Iterator[Feeds]:
    """The feeds, and before them the first one with another last token."""
    for index, feeds in enumerate(samples):
        if index == 0:
            yield {**feeds, language.ids: with_other_end(feeds[language.ids])}
        yield feeds


def _drawn_anew(tokens: Array, logits: Array, mask: Array | None, random: np.random.Generator) -> Array:
    """Tokens ``[B, S]`` of which a share is drawn from the softmax of the logits one position before."""
    chosen = random.random(tokens.shape) < SHARE
    chosen[:, 0] = False
    if mask is not None and mask.shape == tokens.shape:
        chosen[:, 1:] &= (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    rows = logits[:, :-1][chosen[:, 1:]].astype(np.float64)
    weights = np.exp(rows - rows.max(-1, keepdims=True)).cumsum(-1)
    picked = (weights < random.random(len(rows))[:, None] * weights[:, -1:]).sum(-1)
    result = np.array(tokens)
    result[chosen] = picked
    return result


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)
