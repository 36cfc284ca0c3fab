"""``fqonnx plugin``: the library of kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fqonnx.cli import options, terminal

if TYPE_CHECKING:
    from pathlib import Path


@click.group()
def plugin() -> None:
    """Compile the kernels' library, libfqonnx.so, and show what is in it."""


@plugin.command()
@click.option(
    "--arch",
    "architectures",
    multiple=True,
    metavar="ARCH",
    help="Compile for this compute capability only, such as 90a; repeat for several.  [default: all]",
)
@click.option(
    "--without", multiple=True, metavar="PART", help="Leave a part out: onnxruntime, which needs ONNX Runtime's headers, or tensorrt."
)
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Compilers at a time.  [default: one per CPU]")
@click.option("--force", is_flag=True, help="Compile everything anew.")
@options.json_option
@options.verbosity_options
def build(architectures: tuple[str, ...], without: tuple[str, ...], jobs: int | None, force: bool, as_json: bool, quiet: bool) -> int:
    """Compile the library with the nvcc of this machine, or that of the extra cuda-build; what did not change is not compiled again."""
    from fqonnx.plugins.build import build as build_library

    built = build_library(architectures=architectures, without=without, force=force, jobs=jobs, progress=terminal.progress(quiet))
    terminal.show_plugin(built, as_json=as_json, quiet=quiet)
    return 0


@plugin.command()
@options.json_option
def info(as_json: bool) -> int:
    """Show the library: its kernels, architectures, registers, size and hash."""
    from fqonnx.plugins.build import info as library_info

    terminal.show_plugin(library_info(), as_json=as_json, quiet=False)
    return 0


@plugin.command()
def path() -> int:
    """Print the library's path."""
    from fqonnx.plugins.library import require_library

    found: Path = require_library()
    click.echo(found)
    return 0
