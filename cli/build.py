"""``fqonnx build``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fqonnx.cli import options, terminal
from fqonnx.engines import ENGINES, EngineOptions

if TYPE_CHECKING:
    from pathlib import Path


@click.command(cls=options.ShapesCommand)
@click.argument("model", type=options.PATH)
@click.option("-o", "--output", "out", type=options.PATH, required=True, metavar="OUT", help="The build directory to write.")
@options.calibration_options
@options.data_options
@options.recipe_options
@options.allocation_options
@click.option("--engine", type=click.Choice(list(ENGINES)), default="onnxruntime", show_default=True, help="The runtime to build for.")
@click.option(
    "--target",
    metavar="SM",
    help="Compute capability to lower for, such as sm90; of a TensorRT-RTX engine several, such as sm86,sm120.  [default: runs everywhere]",
)
@options.device_option
@click.option(
    "--verify-device",
    type=click.Choice(["cpu", "cuda"]),
    help="Where the result is verified; cpu beside --device cuda needs no onnxruntime-gpu.  [default: that of --device]",
)
@options.shape_options
@options.engine_options
@click.option(
    "--max-error",
    type=click.FloatRange(min=0),
    help="Largest relative L2 error of an output on held-out data; above it the exit code is 1.  [default: 0.5; none for random inputs]",
)
@click.option(
    "--max-perplexity-increase",
    type=click.FloatRange(min=0),
    help="Largest rise of a language model's perplexity on held-out data; above it the exit code is 1.",
)
@click.option("--resume", is_flag=True, help="Go on with a build that was interrupted.")
@click.option("--force", is_flag=True, help="Replace an existing build directory, and build its engine anew.")
@options.json_option
@options.verbosity_options
@click.pass_obj
def build(
    command: str,
    /,
    model: Path,
    out: Path,
    calib_data: str | None,
    random_calibration: bool,
    engine: str,
    min_shapes: tuple[options.Shapes, ...],
    opt_shapes: tuple[options.Shapes, ...],
    max_shapes: tuple[options.Shapes, ...],
    timing_cache: Path | None,
    version_compatible: bool,
    optimization_level: int | None,
    recipe_file: Path | None,
    mix: tuple[str, ...] | None,
    avg_bits: float | None,
    method: str,
    known: Path | None,
    sensitivity_samples: int,
    max_error: float | None,
    max_perplexity_increase: float | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> int:
    """Quantize MODEL (an .onnx file) and write a verified build directory.

    Exits with 0 when the result is within --max-error and --max-perplexity-increase, with 1 otherwise; the directory is written either way.
    """
    options.check_calibration(calib_data, random_calibration=random_calibration)
    recipe = options.read_recipe(recipe_file, choices)
    profiles = options.read_profiles(min_shapes, opt_shapes, max_shapes)

    from fqonnx.build import build as build_model

    report = build_model(
        model,
        out,
        recipe=recipe,
        calib_data=calib_data,
        random_calibration=random_calibration,
        engine=engine,
        profiles=profiles,
        engine_options=EngineOptions(
            timing_cache=timing_cache,
            version_compatible=version_compatible,
            optimization_level=optimization_level,
            rebuild=choices["force"],
        ),
        max_error=max_error,
        max_perplexity_increase=max_perplexity_increase,
        mix=options.read_mix(mix, avg_bits, method, known, sensitivity_samples),
        progress=terminal.progress(quiet),
        command=command,
        **{name: value for name, value in choices.items() if name not in recipe.to_dict()},
    )
    terminal.show_report(report, as_json=as_json, quiet=quiet)
    return 0 if report.passed else 1
