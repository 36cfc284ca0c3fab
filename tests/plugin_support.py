"""The kernels' library, for the tests that look at it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from fqonnx.errors import EngineError
from fqonnx.plugins import library
from fqonnx.plugins.build import Built, build, info
from fqonnx.plugins.toolchain import find_ort_headers, find_toolchain


@cache
def built_library() -> Built:
    """The library of these sources, for all architectures: what ``fqonnx plugin build`` makes, where it puts it."""
    require_compiler()
    try:
        built = info()
        if not built.left_out:
            return built
    except EngineError:
        if os.environ.get(library.VARIABLE):
            pytest.skip(f"{library.VARIABLE} names a library of which nothing is known")
    return build(without=() if has_ort_headers() else ("onnxruntime",))


def require_compiler() -> None:
    """Skip the test where there is no CUDA compiler."""
    try:
        find_toolchain()
    except EngineError as error:
        pytest.skip(str(error))


def has_ort_headers() -> bool:
    try:
        find_ort_headers()
    except EngineError:
        return False
    return True


def binary_tool(name: str) -> Path:
    """``cuobjdump`` or ``nvdisasm``, of the wheel or of the toolkit."""
    spec = find_spec("nvidia")
    folders = [Path(folder) / "cu13" / "bin" for folder in (spec.submodule_search_locations or () if spec else ())]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: pip install nvidia-cuda-{name}")
    return Path(found)


@cache
def machine_code(path: Path, architecture: str) -> dict[str, list[str]]:
    """By function, as the linker knows it, the mnemonics of the instructions that a library holds for an architecture such as ``90a``."""
    tool = binary_tool("cuobjdump")
    env = {**os.environ, "PATH": f"{binary_tool('nvdisasm').parent}:{os.environ['PATH']}"}
    code: dict[str, list[str]] = {}
    current: list[str] = []
    command = [tool, "-sass", "-arch", f"sm_{architecture}", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:  # it may be a hundred megabytes
            if instruction := _INSTRUCTION.match(line):
                current.append(instruction[1])
            elif name := _FUNCTION.search(line):
                current = code.setdefault(name[1], [])
    assert process.returncode == 0
    return code


_FUNCTION = re.compile(r"Function : (\S+)")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)")
