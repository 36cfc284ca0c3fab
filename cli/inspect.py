"""``fqonnx inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fqonnx.cli import options, terminal

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("model", type=options.PATH)
@options.recipe_options
@options.json_option
@options.verbosity_options
def inspect(model: Path, recipe_file: Path | None, as_json: bool, quiet: bool, **choices: Any) -> int:
    """Show what a build of MODEL would quantize, what it would leave in float and why, and what that gains."""
    recipe = options.read_recipe(recipe_file, choices)

    from fqonnx.inspect import inspect as inspect_model

    terminal.show_inspection(inspect_model(model, recipe=recipe), as_json=as_json, quiet=quiet)
    return 0
