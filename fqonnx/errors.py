"""Errors that a user can act on.

Everything that is the user's to mend is raised as an ``FqonnxError`` whose message is one line: what is wrong, then what to do
about it. The command line prints that line and exits with the class's ``exit_code``; a traceback is reserved for our own bugs.
"""

from __future__ import annotations


class FqonnxError(Exception):
    """A problem with the input, the environment or the request that the user can mend."""

    exit_code = 1


class UsageError(FqonnxError):
    """The request itself is off: an unknown scheme, transform or option value."""

    exit_code = 2


class ModelError(FqonnxError):
    """The model cannot be read, is not valid ONNX, or holds something that cannot be quantized."""


class DataError(FqonnxError):
    """Calibration or evaluation data is missing, malformed or does not fit the model's inputs."""


class CalibrationError(FqonnxError):
    """The statistics or the solution of a group are unusable (NaN, Inf, out of memory)."""


class ArtifactError(FqonnxError):
    """A build directory cannot be written, read or is not what its manifest says."""


class EngineError(FqonnxError):
    """An engine cannot be built or run here: a missing runtime, GPU or kernel."""
