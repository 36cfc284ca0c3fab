"""``fqonnx debug``: where an error comes from, and Polygraphy with the plugins."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from fqonnx.cli import options, terminal

if TYPE_CHECKING:
    from pathlib import Path


@click.group()
def debug() -> None:
    """Find out what ruins an output, and run Polygraphy with fqonnx's plugins."""


@debug.command()
@click.argument("reference", type=options.PATH)
@click.argument("out", type=options.PATH)
@click.option("--data", metavar="DATA", help="Inputs to measure on, in any form that --calib-data of `fqonnx build` takes.")
@click.option("--random-data", is_flag=True, help="Measure on random inputs that fit the graph.")
@click.option("--samples", type=click.IntRange(min=1), default=8, show_default=True, help="Samples to read at most.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of --random-data.")
@options.data_options
@click.option(
    "--threshold", type=click.FloatRange(min=0, min_open=True), help="Relative L2 error of an output to look for.  [default: half of OUT's]"
)
@click.option("--every", is_flag=True, help="Measure after every group: slower, and sure to find the first of several.")
@options.json_option
@options.verbosity_options
def bisect(
    reference: Path,
    out: Path,
    data: str | None,
    random_data: bool,
    samples: int,
    seed: int,
    tokenizer: Path | None,
    seq_len: int | None,
    batch_size: int,
    threshold: float | None,
    every: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Find the first group whose quantization pushes an output past a threshold.

    OUT is a build directory and REFERENCE the float model that it was built from. Groups of OUT are put back to float until the error is
    below the threshold.
    """
    from fqonnx.debug import bisect as find

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
    found = find(reference, out, source, threshold=threshold, every=every, progress=terminal.progress(quiet))
    terminal.show_bisection(found, as_json=as_json, quiet=quiet)
    return 0


@debug.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def polygraphy(arguments: tuple[str, ...]) -> int:
    """Run Polygraphy's command line with fqonnx's plugins registered in TensorRT: `fqonnx debug polygraphy run ...`.

    Polygraphy's own --plugins opens a library, but TensorRT takes plugins of today's interfaces from libraries that it loads itself.
    """
    from polygraphy.tools import main as polygraphy_main

    if os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX", "0") == "0":
        from fqonnx.engines.tensorrt_library import TENSORRT, load_plugins

        load_plugins(TENSORRT.load())
    code: int = polygraphy_main(list(arguments))
    return code
