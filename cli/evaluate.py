"""``fqonnx evaluate``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from fqonnx.cli import options, terminal

if TYPE_CHECKING:
    from pathlib import Path

    from fqonnx.evaluate import TextEvaluation
    from fqonnx.evaluate_parts import AttentionError, Contribution, Watched


@click.command()
@click.argument("reference", type=options.PATH)
@click.argument("candidate", type=options.PATH)
@click.option("--data", required=True, metavar="DATA", help="Texts, in any form that --calib-data of `fqonnx build` takes.")
@click.option("--samples", type=click.IntRange(min=1), default=16, show_default=True, help="Texts to read at most.")
@options.data_options
@click.option("--chunk", type=click.IntRange(min=1), help="Tokens of one run, the rest read from the cache.  [default: a text at once]")
@click.option("--bucket", type=click.IntRange(min=1), default=256, show_default=True, help="Positions that are scored together.")
@click.option("--groups", is_flag=True, help="What each group's quantization does by itself, worst first.")
@click.option("--attention", is_flag=True, help="How far the softmax of attention is from the float model's, by layer.")
@click.option("--watch", is_flag=True, help="Values inside CANDIDATE that are NaN or Inf, or nearest to the end of their type's range.")
@click.option("--part-samples", type=click.IntRange(min=1), default=2, show_default=True, help="Texts for the three above.")
@options.device_option
@click.option("--max-error", type=click.FloatRange(min=0), help="Largest relative L2 error of the logits; above it the exit code is 1.")
@click.option(
    "--max-perplexity-increase", type=click.FloatRange(min=0), help="Largest rise of the perplexity; above it the exit code is 1."
)
@options.json_option
@options.verbosity_options
def evaluate(
    reference: Path,
    candidate: Path,
    data: str,
    samples: int,
    tokenizer: Path | None,
    seq_len: int | None,
    batch_size: int,
    chunk: int | None,
    bucket: int,
    groups: bool,
    attention: bool,
    watch: bool,
    part_samples: int,
    device: str,
    max_error: float | None,
    max_perplexity_increase: float | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Compare what CANDIDATE (a model or a build directory) predicts along texts with what the float model REFERENCE does."""
    from itertools import islice

    from fqonnx import evaluate_parts as parts
    from fqonnx.build import open_data
    from fqonnx.evaluate import evaluate_text, texts
    from fqonnx.model import load

    source = open_data(load(reference), data, samples=samples, batch_size=batch_size, tokenizer=tokenizer, seq_len=seq_len)
    progress = terminal.progress(quiet)
    found = evaluate_text(
        reference, candidate, texts(source), chunk=chunk, bucket=bucket, device=device, progress=progress, count=source.length
    )
    failures = found.failures(max_error=max_error, max_perplexity_increase=max_perplexity_increase)
    result: dict[str, Any] = {**found.to_dict(), "failures": failures, "passed": not failures}
    shown: list[Any] = []
    if groups or attention or watch:
        few = list(islice(iter(source), part_samples))
        floats, quantized = parts.open_pair(reference, candidate)
        if groups:
            contributions = parts.contributions(floats, quantized, few, device=device, progress=progress)
            result["groups"] = [_plain(item) for item in contributions]
            shown.append(_groups(contributions))
        if attention:
            errors = parts.attention(floats, quantized, few, device=device, progress=progress)
            result["attention"] = [_plain(item) for item in errors]
            shown.append(_attention(errors))
        if watch:
            values = parts.watch(quantized, few, reference=floats, device=device, progress=progress)
            result["watch"] = [_plain(item) for item in values]
            shown.append(_watch(values))
    if as_json:
        click.echo(json.dumps(result, indent=2, allow_nan=False))
    elif not quiet:
        _show([*_text(found), *shown], failures)
    return 1 if failures else 0


def _plain(item: object) -> dict[str, Any]:
    """JSON has no NaN and no infinity: None stands for them."""
    from math import isfinite

    return {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in vars(item).items()}


def _table(title: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _text(found: TextEvaluation) -> list[Any]:
    table = _table("Predictions", "positions", "tokens", "perplexity", "float", "increase", "KL", "JS", "top-1")
    rows = [(f"{first} ..", p) for first, p in found.positions.items()] if len(found.positions) > 1 else []
    for name, p in [*rows, ("all", found.overall)]:
        figures = (p.perplexity, p.perplexity_reference, p.increase)
        table.add_row(name, str(p.tokens), *(f"{value:.4f}" for value in figures), f"{p.kl:.5f}", f"{p.js:.5f}", f"{p.top1:.2%}")
    lines: list[Any] = [table, f"relative L2 error of the logits {found.overall.rel_l2:.4f}"]
    if len(found.positions) > 1:
        lines.append(f"log-perplexity lost from the first to the last positions: {found.drift:+.4f}")
    if found.cache_bytes[1]:
        lines.append(f"cache: {found.cache_bytes[1]:.0f} bytes a token, in the float model {found.cache_bytes[0]:.0f}")
    return lines


def _groups(contributions: list[Contribution]) -> Any:
    table = _table("Groups, each quantized alone", "group", "share", "relative L2", "KL")
    for c in contributions:
        table.add_row(" with ".join(c.groups), f"{c.share:.1%}", f"{c.rel_l2:.4f}", "" if c.kl is None else f"{c.kl:.5f}")
    return table


def _attention(errors: list[AttentionError]) -> Any:
    table = _table("Attention", "scores", "KL", "JS", "moved", "top-1")
    for e in errors:
        table.add_row(e.name, f"{e.kl:.5f}", f"{e.js:.5f}", f"{e.total_variation:.2%}", f"{e.top1:.2%}")
    return table


def _watch(values: list[Watched]) -> Any:
    bad = any(value.nan or value.inf for value in values)
    title = "Not finite" if bad else "All values are finite; nearest to the end of its range"
    table = _table(title, "value", "op", "NaN", "Inf", "largest", "headroom")
    for v in values:
        table.add_row(v.name, v.op, str(v.nan), str(v.inf), f"{v.largest:.4g}", f"{v.headroom:.3g}")
    return table


def _show(parts: list[Any], failures: list[str]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for part in parts:
        console.print(part)
    for failure in failures:
        console.print(f"FAILED: {failure}", markup=False)
