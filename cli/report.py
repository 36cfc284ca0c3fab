"""``fqonnx report``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fqonnx.cli import options, terminal

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("out", type=options.PATH)
@click.option("--html", is_flag=True, help="Open the page in the browser.")
@options.json_option
@options.verbosity_options
def report(out: Path, html: bool, as_json: bool, quiet: bool) -> int:
    """Show the figures of the build directory OUT."""
    from fqonnx.artifact import PAGE, open_artifact
    from fqonnx.build import read_report

    artifact = open_artifact(out)
    terminal.show_report(read_report(artifact), as_json=as_json, quiet=quiet)
    if html:
        page = (artifact.path / PAGE).resolve()
        if click.launch(page.as_uri()) != 0:
            click.echo(f"no browser answers here; the page is {page}", err=True)
    return 0
