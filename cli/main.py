"""The ``fqonnx`` command: its subcommands, and what becomes of errors, signals and other libraries' chatter.

Exit codes: 0 done (and within ``--max-error``); 1 failed or above it; 2 usage; 130 interrupted (SIGINT), 143 terminated (SIGTERM).
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

import click

from fqonnx.cli import terminal
from fqonnx.cli.bench import bench
from fqonnx.cli.build import build
from fqonnx.cli.debug import debug
from fqonnx.cli.evaluate import evaluate
from fqonnx.cli.inspect import inspect
from fqonnx.cli.plugin import plugin
from fqonnx.cli.report import report
from fqonnx.cli.sensitivity import sensitivity
from fqonnx.cli.verify import verify
from fqonnx.errors import FqonnxError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C so that the workspace is left ready for ``--resume``."""


class _Program(click.Group):
    """A group whose ``main`` ends every failure in one line on stderr and the exit code that fits."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **extra: Any) -> NoReturn:
        try:
            with terminal.quiet_libraries():
                args = sys.argv[1:] if args is None else list(args)
                line = shlex.join(["fqonnx", *args])  # for reports, which say how they were made
                code = super().main(args, **{**extra, "prog_name": "fqonnx", "standalone_mode": False, "obj": line})
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last resort of the program
            code = _explain(error)
        sys.exit(code or 0)


def _explain(error: BaseException) -> int:
    """Say on stderr what went wrong; returns the exit code."""
    if isinstance(error, click.Abort) and isinstance(error.__cause__, KeyboardInterrupt | EOFError):
        error = error.__cause__
    if terminal.debugging():
        traceback.print_exception(error)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    message, code = _message(error)
    click.echo("error: " + "; ".join([message, *getattr(error, "__notes__", [])]), err=True)
    return code


def _message(error: BaseException) -> tuple[str, int]:
    match error:
        case FqonnxError():
            return str(error), error.exit_code
        case click.ClickException():
            context = getattr(error, "ctx", None)
            hint = f" (see `{context.command_path} --help`)" if context is not None else ""
            return " ".join(error.format_message().split()) + hint, error.exit_code
        case _Terminated():
            return "terminated", 128 + signal.SIGTERM
        case KeyboardInterrupt() | click.Abort():
            return "interrupted", 128 + signal.SIGINT
        case MemoryError():
            return "out of memory: lower --calib-samples or --batch-size, or use a larger machine", 1
        case OSError() if error.strerror and error.filename:
            return f"{error.filename}: {error.strerror}: check the path and its permissions", 1
    first_line = next(iter(str(error).splitlines()), "")
    return f"internal error, {type(error).__name__}: {first_line} (set FQONNX_DEBUG=1 for the traceback, and please report it)", 1


@click.group("fqonnx", cls=_Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="fqonnx", message="%(prog)s %(version)s")
def program() -> None:
    """Quantize any exported ONNX transformer to W4A4 with learned FlatQuant transforms, and prove how good it is."""


for _command in (inspect, build, verify, evaluate, bench, report, sensitivity, plugin, debug):
    program.add_command(_command)


def main() -> None:
    """Entry point of the ``fqonnx`` executable."""

    def terminate(_number: int, _frame: FrameType | None) -> NoReturn:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    # Worker processes inherit these; what they would print is noise on the user's terminal.
    if not terminal.debugging():
        for name, value in {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}.items():
            os.environ.setdefault(name, value)
    program()


if __name__ == "__main__":
    main()
