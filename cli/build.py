"""``fqonnx build``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fqonnx.cli import options, terminal
from fqonnx.engines import ENGINES, EngineOptions
from fqonnx.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


@click.command(cls=options.ShapesCommand)
@click.argument("model", type=options.PATH)
@click.option("-o", "--output", "out", type=options.PATH, required=True, metavar="OUT", help="The build directory to write.")
@click.option(
    "--calib-data",
    metavar="DATA",
    help="What the model sees in use: file.npz, a folder of .npy/.npz, Polygraphy .json, script.py[:function] or text:FILE.",
)
@click.option(
    "--random-calibration", is_flag=True, help="Calibrate on random inputs that fit the graph. Accuracy suffers: for size and speed trials."
)
@click.option("--calib-samples", type=click.IntRange(min=1), default=128, show_default=True, help="Samples to read at most.")
@options.data_options
@options.recipe_options
@click.option("--engine", type=click.Choice(list(ENGINES)), default="onnxruntime", show_default=True, help="The runtime to build for.")
@click.option(
    "--target",
    metavar="SM",
    help="Compute capability to lower for, such as sm90; of a TensorRT-RTX engine several, such as sm86,sm120.  [default: runs everywhere]",
)
@options.device_option
@options.shape_options
@options.engine_options
@click.option(
    "--max-error",
    type=click.FloatRange(min=0),
    help="Largest relative L2 error of an output on held-out data; above it the exit code is 1.  [default: 0.5; none for random inputs]",
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
    max_error: float | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> int:
    """Quantize MODEL (an .onnx file) and write a verified build directory.

    Exits with 0 when the result is within --max-error and with 1 otherwise; the directory is written either way.
    """
    if calib_data is None and not random_calibration:
        raise UsageError("no calibration data: give --calib-data DATA (what the model sees in use), or say --random-calibration")
    if calib_data is not None and random_calibration:
        raise UsageError("--calib-data and --random-calibration exclude each other: give one of them")
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
        progress=terminal.progress(quiet),
        command=command,
        **{name: value for name, value in choices.items() if name not in recipe.to_dict()},
    )
    terminal.show_report(report, as_json=as_json, quiet=quiet)
    return 0 if report.passed else 1
