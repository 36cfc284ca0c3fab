"""``fqonnx bench``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fqonnx.cli import options, terminal

if TYPE_CHECKING:
    from pathlib import Path


@click.command(cls=options.ShapesCommand)
@click.argument("model", type=options.PATH)
@click.option("--baseline", type=options.PATH, metavar="MODEL", help="The float model, or any other of the same inputs, to compare with.")
@options.shape_sets_option
@options.device_option
@click.option(
    "--duration", type=click.FloatRange(min=0), default=3.0, show_default=True, help="Seconds to measure each model and set of shapes."
)
@click.option("--warm-up", type=click.FloatRange(min=0), default=0.2, show_default=True, help="Seconds to run before.")
@click.option("--iterations", type=click.IntRange(min=1), default=10, show_default=True, help="Runs to time at least.")
@click.option("--cuda-graph/--no-cuda-graph", default=None, help="Replay captured CUDA graphs.  [default: where both models allow it]")
@click.option(
    "--kv-cache",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Past and present keys and values of a decoder share one buffer of so many tokens.  [default: each its own]",
)
@click.option("--engine", is_flag=True, help="Measure the engine of the build directory MODEL instead of its model.")
@click.option("--profile", is_flag=True, help="Show where the time goes, by op, from separate runs.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random inputs.")
@options.json_option
@options.verbosity_options
def bench(model: Path, baseline: Path | None, as_json: bool, quiet: bool, **choices: Any) -> int:
    """Measure MODEL (a model or a build directory) in ONNX Runtime or as its engine: latency and memory, beside those of --baseline."""
    from fqonnx.bench import bench as measure

    result = measure(model, baseline, progress=terminal.progress(quiet), **choices)
    terminal.show_bench(result, as_json=as_json, quiet=quiet)
    return 0
