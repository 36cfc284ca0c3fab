"""The compilers and headers that the kernels' library is built with, wherever they are on this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fqonnx.errors import EngineError

HOW_TO_GET_NVCC = "install CUDA 12.8 or newer and set CUDA_HOME, or pip install 'fqonnx[cuda-build]'"
HOW_TO_GET_ORT = (
    "install libonnxruntime-dev (Debian, Ubuntu), or unpack onnxruntime-linux-x64-VERSION.tgz from ONNX Runtime's releases and set "
    "ORT_INCLUDE_DIR to its include folder; without them: --without onnxruntime"
)

_ORT_HEADER = "onnxruntime_c_api.h"
_TENSORRT_HEADER = "NvInferRuntime.h"
_TENSORRT_OLDEST = (10, 13)
_SYSTEM_TOOLKIT = Path("/usr/local/cuda")
_SYSTEM_INCLUDES = [
    Path(root) / "include" / folder for root in ("/usr", "/usr/local") for folder in ("onnxruntime", "onnxruntime/core/session")
]
_SYSTEM_TENSORRT = [
    Path(folder)
    for folder in ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include", "/usr/local/tensorrt/include")
]


@dataclass(frozen=True)
class Toolchain:
    """What compiles and links.

    Attributes:
        nvcc: The CUDA compiler.
        version: Its version, such as ``13.0.88``.
        identity: All that tells one set of compilers from another.
        library_folders: Where the static CUDA runtime is, beyond where ``nvcc`` looks by itself.
    """

    nvcc: Path
    version: str
    identity: str
    library_folders: tuple[Path, ...] = ()


def find_toolchain() -> Toolchain:
    """``nvcc`` of ``CUDA_HOME``, else on the path, in ``/usr/local/cuda``, or of the pip wheels; and the host's compiler.

    Raises:
        EngineError: One is missing or does not run; the message says what to install.
    """
    nvcc = _find_nvcc()
    told = _run(nvcc, "--version")
    found = re.search(r"\bV(\d+\.\d+\.\d+)", told)
    if found is None:
        raise EngineError(f"{nvcc} does not tell its version, so it is no CUDA compiler: {HOW_TO_GET_NVCC}")
    host = os.environ.get("NVCC_CCBIN") or "g++"
    if shutil.which(host) is None:
        raise EngineError(f"nvcc needs a C++ compiler for the host, and there is no {host}: install g++, or set NVCC_CCBIN")
    folders = tuple(folder for folder in (nvcc.resolve().parents[1] / "lib",) if (folder / "libcudart_static.a").is_file())
    return Toolchain(nvcc, found[1], f"{told}\n{_run(host, '--version')}", folders)


def known_architectures(toolchain: Toolchain) -> set[int]:
    """The compute capabilities that this compiler knows, such as 90.

    Raises:
        EngineError: It does not tell.
    """
    return {int(number) for number in re.findall(r"sm_(\d+)", _run(toolchain.nvcc, "--list-gpu-code"))}


def find_ort_headers() -> Path:
    """The folder of ONNX Runtime's C and C++ headers: ``ORT_INCLUDE_DIR``, else where the system keeps them.

    Raises:
        EngineError: There are none; the message says how to get them.
    """
    named = os.environ.get("ORT_INCLUDE_DIR", "")
    if named and not (Path(named) / _ORT_HEADER).is_file():
        raise EngineError(f"ORT_INCLUDE_DIR is {named}, and there is no {_ORT_HEADER} in it: correct it, or unset it")
    for folder in [Path(named)] if named else _SYSTEM_INCLUDES:
        if (folder / _ORT_HEADER).is_file():
            return folder.resolve()
    raise EngineError(f"ONNX Runtime's C headers are missing: {HOW_TO_GET_ORT}")


def find_tensorrt_headers() -> Path | None:
    """The folder of TensorRT's C++ headers, 10.13 or newer: ``TENSORRT_INCLUDE_DIR``, else where the system keeps them.

    None where there are none: the library then declares the interfaces itself.

    Raises:
        EngineError: ``TENSORRT_INCLUDE_DIR`` names a folder without them, or with older ones.
    """
    oldest = ".".join(map(str, _TENSORRT_OLDEST))
    if named := os.environ.get("TENSORRT_INCLUDE_DIR", ""):
        version = _tensorrt_version(Path(named))
        if version is None:
            raise EngineError(f"TENSORRT_INCLUDE_DIR is {named}, and there is no {_TENSORRT_HEADER} in it: correct it, or unset it")
        if version < _TENSORRT_OLDEST:
            told = ".".join(map(str, version))
            raise EngineError(f"TENSORRT_INCLUDE_DIR is {named}, TensorRT {told}: plugins need {oldest} or newer: correct it, or unset it")
        return Path(named).resolve()
    return next((folder.resolve() for folder in _SYSTEM_TENSORRT if (_tensorrt_version(folder) or (0, 0)) >= _TENSORRT_OLDEST), None)


def _tensorrt_version(folder: Path) -> tuple[int, int] | None:
    """Of the headers in a folder; None where there are none."""
    if not (folder / _TENSORRT_HEADER).is_file():
        return None
    path = folder / "NvInferVersion.h"
    told = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    # NV_TENSORRT_MAJOR is a number itself, or stands for one of the other name.
    found = [re.search(rf"define (?:NV_TENSORRT_{part}|TRT_{part}_ENTERPRISE)\s+(\d+)", told) for part in ("MAJOR", "MINOR")]
    return (int(found[0][1]), int(found[1][1])) if found[0] and found[1] else (0, 0)


def _find_nvcc() -> Path:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if named := os.environ.get(variable):
            nvcc = Path(named) / "bin" / "nvcc"
            if not os.access(nvcc, os.X_OK):
                raise EngineError(f"{variable} is {named}, and there is no bin/nvcc in it: correct it, or unset it")
            return nvcc
    on_path = shutil.which("nvcc")
    spec = find_spec("nvidia")
    wheels = [Path(folder) / "cu13" for folder in (spec.submodule_search_locations or () if spec else ())]
    places = [*([Path(on_path)] if on_path else []), *(root / "bin" / "nvcc" for root in (_SYSTEM_TOOLKIT, *wheels))]
    for nvcc in places:
        if os.access(nvcc, os.X_OK):
            return nvcc
    raise EngineError(f"no CUDA compiler: {HOW_TO_GET_NVCC}")


def _run(program: Path | str, *arguments: str) -> str:
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(f"{program} does not run: {error}: {HOW_TO_GET_NVCC}") from error
    return done.stdout
