"""Perplexity and agreement of language models, and how one is told from other models."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from fqonnx.causality import alike_before_the_end, with_other_end
from fqonnx.metrics import LogitsDivergence, Perplexity, is_floating
from fqonnx.report.data import LanguageReport
from fqonnx.verify.comparison import polygraphy_errors
from fqonnx.verify.runners import Array, Feeds, StreamedRunner

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir
    from polygraphy.backend.base import BaseRunner

_SAME_ELEMENTS = {
    "Cast",
    "Identity",
    "Reshape",
    "Unsqueeze",
    "Squeeze",
    "Flatten",
    "Transpose",
    "Expand",
    "Slice",
    "Concat",
    "Where",
    "Clip",
}


class Language:
    """Perplexity and agreement of a model that predicts the next token."""

    def __init__(self, ids: str, logits: str) -> None:
        self.ids = ids
        self.logits = logits
        self._reference, self._candidate, self._agreement = Perplexity(), Perplexity(), LogitsDivergence()

    @classmethod
    def find(cls, model: ir.Model, runner: BaseRunner, feeds: Feeds, outputs: Mapping[str, Array]) -> Language | None:
        """Recognise a language model by its graph and by what it does; None where it is none.

        (1) A 2-D integer input looks rows up in a constant table. (2) An output has a row of floats for each of its elements, as many as
        the table has rows, or is called logits. (3) Those of earlier elements do not depend on the last one: a masked language model,
        which has the same shapes, does not predict the next token.

        Args:
            model: The reference.
            runner: It, active.
            feeds: One sample.
            outputs: The runner's outputs of that sample.
        """
        for ids, tokens in feeds.items():
            if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
                continue
            rows = _table_rows(model, ids)
            for name, logits in outputs.items():
                if not isinstance(logits, np.ndarray) or not is_floating(logits) or logits.shape[:-1] != tokens.shape:
                    continue
                named = "logit" in name.lower() and logits.shape[-1] > int(tokens.max())
                if rows and (logits.shape[-1] in rows or named) and _is_causal(runner, feeds, ids, name, logits):
                    return cls(ids, name)
        return None

    def update(self, feeds: Feeds, expected: Mapping[str, Array], actual: Mapping[str, Array]) -> None:
        """Add one sample with the outputs of both models; tokens that a mask leaves out do not count."""
        tokens = feeds[self.ids]
        mask = next((a for n, a in feeds.items() if "mask" in n.lower() and a.shape == tokens.shape), None)
        r, c = expected[self.logits], actual[self.logits]
        self._reference.update(r, tokens, mask)
        self._candidate.update(c, tokens, mask)
        if mask is None:
            self._agreement.update(r[:, :-1], c[:, :-1])
        else:
            keep = (mask[:, :-1] != 0) & (mask[:, 1:] != 0)
            self._agreement.update(r[:, :-1][keep], c[:, :-1][keep])

    def report(self) -> LanguageReport | None:
        """The figures over every sample so far, None where no token had a next one."""
        if not self._reference.count:
            return None
        return LanguageReport(
            perplexity_reference=self._reference.value,
            perplexity=self._candidate.value,
            top1=self._agreement.top1,
            tokens=self._reference.count,
        )


def perplexity_failures(language: LanguageReport | None, bound: float | None) -> list[str]:
    """What is wrong with a language model's perplexity, one line each; a NaN is within no bound.

    Args:
        language: Its figures; None where the model does not predict the next token, or the data are no text.
        bound: Largest rise of the perplexity; None for no bound.
    """
    if bound is None:
        return []
    if language is None:
        return ["there is no perplexity to bound: the model does not predict the next token, or the data are not text"]
    increase = language.perplexity - language.perplexity_reference
    if increase <= bound:
        return []
    said = f"{language.perplexity_reference:.4g} to {language.perplexity:.4g}"
    return [f"perplexity rises by {increase:.4g} ({said}), above the bound of {bound:g}"]


def _is_causal(runner: BaseRunner, feeds: Feeds, ids: str, name: str, logits: Array) -> bool:
    """Whether another last token leaves the logits before it as they are."""
    probe = OrderedDict({**feeds, ids: with_other_end(feeds[ids])})
    with polygraphy_errors("the data do not fit the model"):
        outputs = runner.alone(probe) if isinstance(runner, StreamedRunner) else runner.infer(probe)
    return alike_before_the_end(logits, outputs[name])


def _table_rows(model: ir.Model, name: str) -> set[int]:
    """Rows of the constant tables that a Gather of the model looks up by this input."""
    start = next((value for value in model.graph.inputs if value.name == name), None)
    queue = [start] if start is not None else []
    seen, rows = set(queue), set[int]()
    while queue:
        for use in queue.pop().uses():
            table = use.node.inputs[0]
            if use.node.op_type == "Gather" and use.idx == 1 and table is not None and table.const_value is not None:
                rows.update(dim for dim in table.const_value.shape[:1] if isinstance(dim, int))
            elif use.node.op_type in _SAME_ELEMENTS:
                new = [value for value in use.node.outputs if value not in seen]
                seen.update(new)
                queue += new
    return rows
