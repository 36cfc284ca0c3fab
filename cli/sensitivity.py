"""``fqonnx sensitivity``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fqonnx.cli import options, terminal
from fqonnx.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("model", type=options.PATH)
@click.option("-o", "--output", "out", type=options.PATH, metavar="OUT", help="Folder to write, for `fqonnx build --sensitivity OUT`.")
@options.calibration_options
@options.data_options
@options.recipe_options
@options.mix_option
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Samples of the calibration data that errors are measured on.",
)
@click.option("--estimate", is_flag=True, help="First-order estimates alone: one run a group instead of one for each scheme.")
@click.option("--keep-work", is_flag=True, help="Leave statistics and solutions in OUT: builds with --sensitivity OUT take them. Large.")
@options.device_option
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted.")
@click.option("--force", is_flag=True, help="Replace what OUT holds.")
@options.json_option
@options.verbosity_options
@click.pass_obj
def sensitivity(
    command: str,
    /,
    model: Path,
    out: Path | None,
    recipe_file: Path | None,
    mix: tuple[str, ...] | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Show what quantizing each group of MODEL alone does to its output, in each scheme."""
    options.check_calibration(choices["calib_data"], random_calibration=choices["random_calibration"])
    if choices["scheme"] is not None or choices["schemes"]:
        raise UsageError("--scheme and --group-scheme say what a build does: name the schemes to try with --mix")
    if out is None and (choices["keep_work"] or choices["resume"] or choices["force"]):
        raise UsageError("--keep-work, --resume and --force are about a folder: give one with -o")
    if choices["reconstruct"] is not None or choices["kv"] is not None:
        raise UsageError("sensitivities are of groups that are solved alone, beside a float cache: leave out --reconstruct and --kv")
    recipe = options.read_recipe(recipe_file, choices)

    from fqonnx.sensitivity import MIX
    from fqonnx.sensitivity import sensitivity as measure

    report = measure(
        model,
        out,
        recipe=recipe,
        schemes=mix or MIX,
        progress=terminal.progress(quiet),
        command=command,
        **{name: value for name, value in choices.items() if name not in recipe.to_dict()},
    )
    terminal.show_sensitivity(report, as_json=as_json, quiet=quiet)
