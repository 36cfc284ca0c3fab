"""Inputs and outputs of a comparison saved as Polygraphy reads them, and the ``polygraphy run`` command lines that repeat it by hand."""

from __future__ import annotations

import math
import os
import shlex
from collections import OrderedDict
from typing import TYPE_CHECKING

from polygraphy.comparator import RunResults
from polygraphy.exception import PolygraphyException
from polygraphy.json import save_json

from fqonnx.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path

    from polygraphy.comparator import IterationResult as Result

    from fqonnx.verify.runners import Feeds, Side

INPUTS, REFERENCE, CANDIDATE = "inputs", "reference", "candidate"
"""Folders in which every sample has a file."""

AGAIN = "again.json"
"""What the candidate gives when the command lines are run."""


class Saved:
    """A folder with every sample's inputs and both models' outputs, written as they come.

    Args:
        folder: Made where it is missing.

    Raises:
        ArtifactError: It cannot be written, or holds an earlier run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            for name in (INPUTS, REFERENCE, CANDIDATE):
                (folder / name).mkdir(parents=True, exist_ok=True)
                if any((folder / name).iterdir()):
                    raise ArtifactError(f"{folder / name} holds files already: give --save another folder, or remove them")
        except OSError as error:
            raise ArtifactError(f"cannot write {folder}: {error.strerror}: give --save another folder") from None
        self._count = 0

    def add(self, feeds: Feeds, reference: Result, candidate: Result) -> None:
        """Write one sample.

        Raises:
            ArtifactError: The disk refuses, or Polygraphy has no form for a type.
        """
        try:
            # Polygraphy reads a folder's files as one run, in the order of their names.
            name = f"{self._count:010d}.json"
            save_json(OrderedDict(feeds), str(self.folder / INPUTS / name))
            for side, result in ((REFERENCE, reference), (CANDIDATE, candidate)):
                save_json(RunResults([(side, [result])]), str(self.folder / side / name))
            self._count += 1
        except OSError as error:
            raise ArtifactError(f"cannot write {self.folder}: {error.strerror}: free space or give --save another folder") from None
        except PolygraphyException as error:
            raise ArtifactError(f"{self.folder}: Polygraphy cannot save this sample: {' '.join(str(error).split())}") from None


def command_lines(reference: Side, candidate: Side, folder: Path, *, max_error: float | None, device: str) -> tuple[str, ...]:
    """The command lines that repeat a saved comparison: each runs as it stands, from the folder that this process works in.

    The first runs the candidate on the saved inputs and the second compares the float model with what it gave. Where the candidate is a
    build directory with an engine, a third compares that with ONNX Runtime's outputs. Polygraphy's signal-to-noise ratio is that of every
    sample by itself, ``-20 log10`` of its relative L2; its signal is what the command runs, which is the float model therefore.
    """
    if reference.path is None or candidate.path is None:
        return ()
    providers = [] if device == "cpu" else ["--providers", device]
    again = _relative(folder / AGAIN)
    inputs = ["--load-inputs", _relative(folder / INPUTS)]
    compare = ["--validate", "--compare", "snr"]
    threshold = [] if not max_error else ["--snr-threshold", f"{-20 * math.log10(max_error):.4g}"]
    lines = [
        ["polygraphy", "run", _relative(candidate.path), "--onnxrt", *providers, *inputs, "--save-outputs", again],
        ["polygraphy", "run", _relative(reference.path), "--onnxrt", *providers, *inputs, "--load-outputs", again, *compare, *threshold],
    ]
    if candidate.engine is not None:
        path, built = candidate.engine
        outputs = ["--load-outputs", _relative(folder / CANDIDATE)]
        program = ["polygraphy"] if built.engine == "tensorrt-rtx" or built.version_compatible else ["fqonnx", "debug", "polygraphy"]
        lines.append([*program, "run", _relative(path), "--model-type", "engine", "--trt", *inputs, *outputs, *compare])
    rtx = candidate.engine is not None and candidate.engine[1].engine == "tensorrt-rtx"
    return tuple(("POLYGRAPHY_USE_TENSORRT_RTX=1 " if rtx and "--trt" in line else "") + shlex.join(line) for line in lines)


def _relative(path: Path) -> str:
    """From the working directory where the path is below it, else absolute."""
    relative = os.path.relpath(path)
    return str(path.absolute()) if relative.startswith(os.pardir) else relative
