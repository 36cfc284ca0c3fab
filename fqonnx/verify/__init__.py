"""Accuracy of a candidate model against its float reference: outputs, layers, and predictions of a language model.

Both models run side by side through Polygraphy's runners and its streaming comparator, one sample at a time: memory holds one sample's
outputs, however many samples there are. Models whose weights are too large for a session run segment by segment instead.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fqonnx.errors import DataError, UsageError
from fqonnx.progress import Silent
from fqonnx.report.data import DataReport, GroupReport, Report
from fqonnx.report.environment import environment
from fqonnx.sizes import measure_size
from fqonnx.verify.comparison import Comparison, arrays_of, failures_of, iterate, length_of
from fqonnx.verify.language import Language, perplexity_failures
from fqonnx.verify.layers import compare_layers, find_layers
from fqonnx.verify.runners import Feeds, Model, Side, StreamedRunner, require_same_interface
from fqonnx.verify.saved import Saved, command_lines

if TYPE_CHECKING:
    from fqonnx.progress import Progress
    from fqonnx.report.data import EngineReport

__all__ = ["Comparison", "StreamedRunner", "verify"]


def verify(
    reference: Model,
    candidate: Model,
    source: Iterable[Feeds],
    *,
    layers: bool | Mapping[str, Sequence[str]] = False,
    groups: Sequence[GroupReport] = (),
    max_error: float | None = None,
    max_perplexity_increase: float | None = None,
    tokens: bool | None = None,
    device: str = "cpu",
    engine: bool | tuple[Path, EngineReport] = False,
    save: Path | None = None,
    data: DataReport | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run both models on the same data and report how far they are apart.

    Args:
        reference: The float model, or its path.
        candidate: A model, its path, or a build directory.
        source: Feed dicts, iterable more than once where ``layers`` is asked for.
        layers: Also compare the output of every linear. A mapping gives, by group name, the values to compare, which bear the same name
            in both models; True finds the groups in the reference.
        groups: What is known of the groups already; the figures of ``layers`` are added to it. A build directory brings its own.
        max_error: Bound on the relative L2 of the worst float output; of a model without one, on the share of elements that differ.
        max_perplexity_increase: Bound on the rise of a language model's perplexity.
        tokens: Whether the integer inputs are text, so that predicting the next token means something; None finds out by the graph and
            by whether the logits of earlier tokens ignore the last one. Random data should say False.
        device: ``cpu`` or ``cuda``.
        engine: Run the candidate's engine instead of its model: True for that of a build directory, else the file and what it was built
            as. For ``layers`` one like it is built that gives the groups' outputs.
        save: Folder for every sample's inputs and outputs as Polygraphy reads them; the report then has the equal command lines.
        data: What the report says of the data; where it counts no samples, each feed is one.
        progress: Told of every sample.

    Returns:
        The report. It has ``passed`` where every output is finite wherever the reference is, and within the bounds.

    Raises:
        ModelError: The models' inputs or outputs differ in name or shape, or no layer is common to both.
        DataError: No samples, or a sample without an input.
        EngineError: ONNX Runtime cannot load or run a model, CUDA is not usable, or the engine is another machine's.
        UsageError: ``engine`` where there is none, or ``save`` of a build with a quantized cache.
        ArtifactError: ``save`` cannot be written.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    a, opened = Side.open(reference), Side.open(candidate)
    b = opened.with_float_cache()
    if save is not None and b is not opened:
        raise UsageError(f"{b.name} has a quantized cache, and Polygraphy compares models of one interface: leave --save out")
    if isinstance(engine, tuple):
        b, engine = replace(b, engine=engine), True
    require_same_interface(a, b)
    saved = None if save is None else Saved(save)
    known = b.report
    notes: list[str] = [side.note for side in (a, b) if side.note]
    comparison = Comparison()
    language: Language | None = None
    seconds = {"reference": 0.0, "candidate": 0.0}

    with _workdir() as workdir:
        runners = (
            a.runner("reference", a.outputs, device, workdir),
            b.engine_runner("candidate", a.outputs, workdir) if engine else b.runner("candidate", a.outputs, device, workdir),
        )
        with progress.task("Comparing outputs", length_of(source)) as task:
            for index, (feeds, results) in enumerate(iterate(runners, source, a.inputs)):
                expected, actual = (arrays_of(result) for result in results)
                for name, result in zip(("reference", "candidate"), results, strict=True):
                    seconds[name] += result.runtime or 0.0
                if index == 0:
                    language = None if tokens is False else Language.find(a.model, runners[0], feeds, expected)
                    comparison.logits = {n for n in expected if "logit" in n.lower()} | ({language.logits} if language else set())
                comparison(expected, actual)
                if saved is not None:
                    saved.add(feeds, *results)
                if language is not None:
                    language.update(feeds, expected, actual)
                task.advance()
        if comparison.samples == 0:
            raise DataError("no data to verify on: the source has no samples")
        reports = list(groups) or list(known.groups if known else ())
        if layers is not False:
            tapped, values = (a, dict(layers)) if isinstance(layers, Mapping) else find_layers(a, b)
            before = time.perf_counter()
            reports = compare_layers((tapped, b), values, source, reports, device, workdir, progress, notes, engine=engine)
            seconds["layers"] = time.perf_counter() - before

    outputs = comparison.reports()
    notes += [f"output {name!r} holds text and is not compared" for name in sorted(comparison.skipped)]
    predictions = language.report() if language is not None else None
    failures = (*failures_of(outputs, max_error), *perplexity_failures(predictions, max_perplexity_increase))
    seconds["total"] = time.perf_counter() - started
    data = data or DataReport(source="", samples=0)
    data = replace(data, samples=data.samples or comparison.samples)
    return Report(
        model=a.name,
        candidate=b.name,
        passed=not failures,
        failures=failures,
        max_error=max_error,
        outputs=outputs,
        language=predictions,
        groups=tuple(reports),
        left_in_float=known.left_in_float if known else (),
        size=measure_size(a.model, opened.model),  # what stands around a quantized cache is no part of the model
        engine=known.engine if known is not None and engine else None,
        time=seconds,
        data=data,
        recipe=known.recipe if known else {},
        environment=environment(),
        notes=tuple(notes),
        polygraphy=() if save is None else command_lines(a, b, save, max_error=max_error, device=device),
    )


@contextmanager
def _workdir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fqonnx-verify-") as folder:
        yield Path(folder)
