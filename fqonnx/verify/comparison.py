"""Running two models on the same samples through Polygraphy, one sample at a time, and figures of how far their outputs are apart."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from polygraphy.comparator import Comparator, IterationResult
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from fqonnx.engines.onnxruntime import one_line_errors
from fqonnx.errors import DataError, ModelError
from fqonnx.metrics import Divergence, LogitsDivergence, MeanCosine, is_floating
from fqonnx.report.data import TensorReport
from fqonnx.verify import limits
from fqonnx.verify.runners import Array, Feeds, StreamedRunner

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from polygraphy.backend.base import BaseRunner

    from fqonnx.model import ModelInput


class Comparison:
    """A Polygraphy ``compare_func`` that keeps running figures of every output.

    Each call takes one iteration's outputs of both runners (any mapping of arrays by name, such as an ``IterationResult``) and returns by
    output whether this iteration is finite wherever the reference is. The figures over all of them are in ``reports``.

    It is driven by ``verify`` instead of ``Comparator.compare_accuracy``, which computes medians and histograms of every array for a log
    that nobody reads.

    Attributes:
        logits: Names of outputs whose last axis is classes.
        samples: Calls so far.
        skipped: Outputs that hold no numbers.
    """

    def __init__(self, logits: Iterable[str] = ()) -> None:
        self.logits = set(logits)
        self.samples = 0
        self.skipped: set[str] = set()
        self._dtypes: dict[str, str] = {}
        self._divergence: dict[str, Divergence] = {}
        self._cosine: dict[str, MeanCosine] = {}
        self._of_logits: dict[str, LogitsDivergence] = {}

    def __call__(self, expected: Mapping[str, Array], actual: Mapping[str, Array]) -> OrderedDict[str, bool]:
        """Add one iteration.

        Raises:
            ModelError: An output's shapes differ between the two.
        """
        matches: OrderedDict[str, bool] = OrderedDict()
        for name, r in expected.items():
            c = actual[name]
            if not (isinstance(r, np.ndarray) and isinstance(c, np.ndarray)) or r.dtype.kind in "OSU":
                self.skipped.add(name)
                continue
            if r.shape != c.shape:
                raise ModelError(
                    f"sample {self.samples}: {name!r} has shape {list(r.shape)} in the reference and {list(c.shape)} in the candidate: "
                    "compare a model with its own quantized form"
                )
            self._dtypes.setdefault(name, r.dtype.name)
            matches[name] = not math.isnan(self._divergence.setdefault(name, Divergence()).update(r, c))
            if is_floating(r):
                self._cosine.setdefault(name, MeanCosine()).update(r, c)
                if name in self.logits and r.ndim:
                    self._of_logits.setdefault(name, LogitsDivergence()).update(r, c)
        self.samples += 1
        return matches

    def reports(self) -> dict[str, TensorReport]:
        """The figures over every iteration so far, by output."""
        return {name: self._report(name) for name in self._divergence}

    def _report(self, name: str) -> TensorReport:
        d, logits = self._divergence[name], self._of_logits.get(name)
        return TensorReport(
            dtype=self._dtypes[name],
            elements=d.elements,
            cosine=d.cosine,
            mean_cosine=self._cosine[name].value if name in self._cosine else d.cosine,
            rel_l2=d.rel_l2,
            sqnr_db=d.sqnr_db,
            max_abs=d.max_abs,
            exact=d.exact / d.elements if d.elements else math.nan,
            nan=d.nan,
            inf=d.inf,
            nan_reference=d.nan_reference,
            inf_reference=d.inf_reference,
            kl=logits.kl if logits is not None else None,
            top1=logits.top1 if logits is not None else None,
            worst_sample=d.worst_sample,
        )


def failures_of(outputs: Mapping[str, TensorReport], max_error: float | None) -> Iterator[str]:
    """What is wrong with the outputs, one line each: not finite, nothing to compare, or above the bound."""
    floats = {name: t for name, t in outputs.items() if t.is_float}
    for name, t in floats.items():
        if math.isnan(t.rel_l2) and t.elements:
            yield (f"output {name!r} is not finite: {t.nan} NaN and {t.inf} Inf, the reference has {t.nan_reference} and {t.inf_reference}")
        elif t.elements == 0:
            yield f"output {name!r} had no elements to compare"
        elif max_error is not None and t.rel_l2 > max_error:
            yield f"output {name!r} has a relative L2 error of {t.rel_l2:.4g}, above the bound of {max_error:g}"
    if not floats and max_error is not None:
        for name, t in outputs.items():
            if not 1 - t.exact <= max_error:
                yield f"output {name!r} differs in {1 - t.exact:.2%} of its elements, above the bound of {max_error:g}"


def iterate(
    runners: Sequence[BaseRunner], source: Iterable[Feeds], inputs: Sequence[ModelInput]
) -> Iterator[tuple[Feeds, list[IterationResult]]]:
    """Each sample with every runner's result.

    Raises:
        DataError: A sample lacks an input, has one that is none of the model's, or does not fit the model.
        EngineError: ONNX Runtime failed.
    """
    current: deque[Feeds] = deque()

    def remembered() -> Iterator[Feeds]:
        for feeds in _prefetched(_checked(source, inputs), runners):
            current.append(feeds)
            yield feeds

    stream = Comparator.run(list(runners), data_loader=remembered(), streaming=True)
    try:
        while True:
            with polygraphy_errors("the data do not fit the model"):
                results = next(stream, None)
            if results is None:
                return
            yield current.popleft(), [iterations[0] for _, iterations in results]
    finally:
        with polygraphy_errors("the models cannot be closed"):
            stream.close()


def _checked(source: Iterable[Feeds], inputs: Sequence[ModelInput]) -> Iterator[Feeds]:
    names = {item.name for item in inputs}
    for index, feeds in enumerate(source):
        missing, unknown = sorted(names - set(feeds)), sorted(set(feeds) - names)
        if missing or unknown:
            what = f"lacks input {missing[0]!r}" if missing else f"has {unknown[0]!r}, which is no input"
            raise DataError(f"sample {index} {what}: the model's inputs are {', '.join(sorted(names))}")
        yield feeds


def _prefetched(feeds: Iterator[Feeds], runners: Sequence[BaseRunner]) -> Iterator[Feeds]:
    """Hand streamed runners several samples at a time: as many as keep their outputs within ``TAP_BYTES``, told by the first."""
    streamed = [runner for runner in runners if isinstance(runner, StreamedRunner)]
    if not streamed:
        yield from feeds
        return
    size = 1
    while chunk := [item for _, item in zip(range(size), feeds, strict=False)]:
        largest = max(runner.prefetch(chunk) for runner in streamed) // len(chunk)
        size = max(1, min(64, limits.TAP_BYTES // max(1, largest)))
        yield from chunk


def arrays_of(result: IterationResult) -> dict[str, Array]:
    """The outputs by name."""
    return dict(result.items())


def length_of(source: object) -> int | None:
    """How many samples a source has, None where it does not know."""
    try:
        return len(source)  # type: ignore[arg-type]  # asked, not assumed
    except TypeError:
        return None


@contextmanager
def polygraphy_errors(what: str) -> Iterator[None]:
    """Polygraphy without its log on standard output, which belongs to results, and with its exceptions as one line."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), one_line_errors("ONNX Runtime failed", hint="check the data's shapes and values"):
        try:
            yield
        except PolygraphyException as error:
            raise DataError(f"{what}: {' '.join(str(error).split())}") from None
