"""ONNX Runtime sessions: the one place that makes them, so that devices, threads, logs and errors behave alike everywhere.

A session on CUDA runs the fqonnx ops in the kernels of ``fqonnx plugin build``. With their library registered ONNX Runtime runs a kernel
for every such op or refuses the model, so that a slow body is never run for want of a kernel: that takes ``FQONNX_BODIES=1``.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fqonnx.errors import EngineError, FqonnxError, UsageError
from fqonnx.ops.bodies import DOMAIN

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Execution provider by the name that ``--device`` takes."""

BODIES_VARIABLE = "FQONNX_BODIES"
"""Set to 1, fqonnx ops on CUDA are run as their bodies of standard operators: for comparing, and where the library cannot be built."""

_FATAL = 4
"""ONNX Runtime's log severity: an error reaches the caller as an exception, so that a log of it would only be a duplicate."""

_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : (\w+) : ")
_SOURCE = re.compile(r"\S*/(?:onnxruntime_src|onnxruntime)/\S+:\d+ \S.*?\) ?")


def session(
    model: str | Path | bytes,
    *,
    device: str = "cpu",
    threads: int | None = None,
    external_data: Path | None = None,
    provider_options: Mapping[str, str] | None = None,
    profile_to: Path | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession`` on the device asked for, never on another.

    Args:
        model: Path of the model, or its bytes.
        device: A key of ``PROVIDERS``.
        threads: Threads within an operator; None is one per CPU this process may use.
        external_data: Folder of the external data files of a model given as bytes.
        provider_options: Options of the execution provider, such as ``enable_cuda_graph``.
        profile_to: Prefix of the profile's file, to have one written.

    Raises:
        EngineError: ONNX Runtime refuses the model, CUDA cannot be used here, or the kernels' library is missing; the message says what
            to install or build.
        UsageError: An unknown device.
    """
    import onnxruntime as ort

    if device not in PROVIDERS:
        raise UsageError(f"unknown device {device!r}: choose from {', '.join(PROVIDERS)}")
    ort.set_default_logger_severity(_FATAL)
    provider = PROVIDERS[device]
    if device == "cuda":
        _require_cuda(ort)
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    # The usable CPUs, not all of the machine's: ONNX Runtime counts the latter and would pin threads where this process may not run.
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    if external_data is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(external_data))
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    if device == "cuda" and imports_domain(model, DOMAIN):
        _register_kernels(options)

    def load(model: str | bytes) -> Any:
        return ort.InferenceSession(model, options, [(provider, dict(provider_options or {}))], enable_fallback=0)

    try:
        with one_line_errors("ONNX Runtime cannot load the model", hint="check the model with onnx.checker, or export it again"):
            made = load(model if isinstance(model, bytes) else str(model))
    except EngineError:
        # Where CUDA does not start ONNX Runtime goes on without it, and what it then says is not the reason.
        if device == "cuda" and load(_trivial_model()).get_providers()[0] != provider:
            raise _cannot_start_cuda(ort) from None
        raise
    if made.get_providers()[0] != provider:
        raise _cannot_start_cuda(ort)
    return made


def _cannot_start_cuda(ort: Any) -> EngineError:
    return EngineError(
        f"ONNX Runtime {ort.__version__} cannot start CUDA here (it needs an NVIDIA driver, CUDA {ort.cuda_version} and cuDNN 9): "
        f"pip install 'onnxruntime-gpu[cuda,cudnn]=={ort.__version__}', or use --device cpu"
    )


def _trivial_model() -> bytes:
    import onnx.parser

    text = '<ir_version: 10, opset_import: ["" : 21]> trivial (float[1] x) => (float[1] y) { y = Identity(x) }'
    model: bytes = onnx.parser.parse_model(text).SerializeToString()
    return model


def require_kernels() -> None:
    """Make sure, before the long work, that fqonnx ops can be run on CUDA.

    Raises:
        EngineError: The library of kernels is not built; the message says what to do.
    """
    _kernels()


def _kernels() -> Path | None:
    """The library of kernels; None where the environment asks for the bodies."""
    from fqonnx.plugins.library import library_path

    if os.environ.get(BODIES_VARIABLE) == "1":
        return None
    path = library_path()
    if path is None:
        raise EngineError(
            "fqonnx ops run on CUDA in kernels that are not built yet, or not of these sources: run `fqonnx plugin build` "
            f"(or set {BODIES_VARIABLE}=1 to run their bodies of standard operators, far slower)"
        )
    return path


def _register_kernels(options: Any) -> None:
    path = _kernels()
    if path is not None:
        with one_line_errors(f"ONNX Runtime cannot use the kernels in {path}", hint="build them with `fqonnx plugin build`"):
            options.register_custom_ops_library(str(path))


def imports_domain(model: str | Path | bytes, domain: str) -> bool:
    """Whether a model imports a domain of operators. Only its outermost fields are looked at, so that it does not matter how large it is.

    Args:
        model: Path of the model, or its bytes.
        domain: Such as ``fqonnx``.

    Returns:
        False too for what is not a model or cannot be opened: whoever loads it will say so.
    """
    encoded = bytes([_DOMAIN << 3 | _BYTES, len(domain)]) + domain.encode()
    try:
        with io.BytesIO(model) if isinstance(model, bytes) else Path(model).open("rb") as stream:
            return any(encoded in opset for opset in _opset_imports(stream))
    except (OSError, EOFError):
        return False


_OPSET_IMPORT, _DOMAIN = 8, 1
"""Numbers of ``ModelProto.opset_import`` and ``OperatorSetIdProto.domain``."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Protocol buffers' wire types."""


def _opset_imports(stream: IO[bytes]) -> Iterator[bytes]:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    while stream.tell() < size:
        number, kind = divmod(_varint(stream), 8)
        if kind == _VARINT:
            _varint(stream)
        elif kind == _BYTES:
            length = _varint(stream)
            if number == _OPSET_IMPORT:
                yield stream.read(length)
            else:
                stream.seek(length, os.SEEK_CUR)
        elif kind in (_FIXED64, _FIXED32):
            stream.seek(8 if kind == _FIXED64 else 4, os.SEEK_CUR)
        else:
            raise EOFError(f"wire type {kind}")


def _varint(stream: IO[bytes]) -> int:
    value = shift = 0
    while byte := stream.read(1):
        value |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            return value
    raise EOFError("the file ends within a number")


def _require_cuda(ort: Any) -> None:
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        raise EngineError(f"ONNX Runtime {ort.__version__} is a CPU build: pip install onnxruntime-gpu, or use --device cpu")
    if hasattr(ort, "preload_dlls"):  # since 1.21: finds the CUDA libraries that pip installed
        with open(os.devnull, "w") as null, redirect_stdout(null):  # noqa: PTH123 - it prints what it does not find, we say it better
            ort.preload_dlls()


def run(
    session: Any, feeds: Mapping[str, npt.NDArray[np.generic]], outputs: Sequence[str] | None = None
) -> dict[str, npt.NDArray[np.generic]]:
    """Run a session once.

    Args:
        session: From ``session()``.
        feeds: Every input by name.
        outputs: Names of the outputs wanted; None is all, in the model's order.

    Returns:
        The outputs by name.

    Raises:
        EngineError: ONNX Runtime fails; one line that names the node where it does.
    """
    names = list(outputs) if outputs is not None else [output.name for output in session.get_outputs()]
    with one_line_errors("ONNX Runtime failed", hint="check the inputs' shapes and the model"):
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@contextmanager
def one_line_errors(what: str, *, hint: str) -> Iterator[None]:
    """Turn ONNX Runtime's exceptions into one ``EngineError`` line; they share no base class but ``Exception``."""
    try:
        yield
    except Exception as error:
        # Besides classes of its own it raises RuntimeError from its Python bindings.
        if isinstance(error, FqonnxError) or not (type(error).__module__.startswith("onnxruntime") or type(error) is RuntimeError):
            raise
        raise EngineError(f"{what}: {explain(error)}: {hint}") from error


def explain(error: Exception) -> str:
    """ONNX Runtime's message on one line, without codes and paths of its own sources, with the node's name kept."""
    text = " ".join(_SOURCE.sub("", _PREFIX.sub("", str(error))).split()).rstrip(" .:")
    if "Failed to allocate memory" in text or "bad_alloc" in text or "out of memory" in text.lower():
        text = f"out of memory ({text})"
    return text if len(text) <= 400 else f"{text[:400]}..."
