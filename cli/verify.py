"""``fqonnx verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fqonnx.cli import options, terminal

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("reference", type=options.PATH)
@click.argument("candidate", type=options.PATH)
@click.option("--data", metavar="DATA", help="Inputs to compare on, in any form that --calib-data of `fqonnx build` takes.")
@click.option("--random-data", is_flag=True, help="Compare on random inputs that fit the graph.")
@click.option("--samples", type=click.IntRange(min=1), default=32, show_default=True, help="Samples to read at most.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of --random-data.")
@options.data_options
@click.option("--layers", is_flag=True, help="Compare every quantized linear's output too, worst first.")
@click.option("--engine", is_flag=True, help="Run the engine of the build directory CANDIDATE instead of its model.")
@click.option(
    "--save",
    type=options.PATH,
    metavar="DIR",
    help="Save inputs and outputs for Polygraphy; print the equal `polygraphy run` commands.",
)
@options.device_option
@click.option("--max-error", type=click.FloatRange(min=0), help="Largest relative L2 error of an output; above it the exit code is 1.")
@click.option(
    "--max-perplexity-increase",
    type=click.FloatRange(min=0),
    help="Largest rise of a language model's perplexity; above it the exit code is 1.",
)
@options.json_option
@options.verbosity_options
@click.pass_obj
def verify(
    command: str,
    /,
    reference: Path,
    candidate: Path,
    data: str | None,
    random_data: bool,
    samples: int,
    seed: int,
    tokenizer: Path | None,
    seq_len: int | None,
    batch_size: int,
    layers: bool,
    engine: bool,
    save: Path | None,
    device: str,
    max_error: float | None,
    max_perplexity_increase: float | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Compare CANDIDATE (a model or a build directory) with the float model REFERENCE on the same inputs."""
    from dataclasses import replace

    from fqonnx.verify import verify as verify_models

    source = options.open_inputs(
        reference,
        data,
        random_data=random_data,
        samples=samples,
        batch_size=batch_size,
        tokenizer=tokenizer,
        seq_len=seq_len,
        seed=seed,
    )
    report = verify_models(
        reference,
        candidate,
        source,
        layers=layers,
        max_error=max_error,
        max_perplexity_increase=max_perplexity_increase,
        device=device,
        engine=engine,
        save=save,
        progress=terminal.progress(quiet),
    )
    terminal.show_report(replace(report, command=command), as_json=as_json, quiet=quiet)
    return 0 if report.passed else 1
