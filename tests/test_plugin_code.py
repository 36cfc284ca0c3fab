"""The machine code of the whole library: what it shows, what it is compiled for, and the instructions that its speed comes from."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from fqonnx import kernels
from fqonnx.plugins.build import build_info
from fqonnx.plugins.library import FOLDER, source_hash
from fqonnx.plugins.sources import read_sources
from tests.plugin_support import binary_tool, built_library, machine_code

if TYPE_CHECKING:
    from collections.abc import Callable

EVERY = ("80", "86", "89", "90a", "100a", "120a")
S4, S8 = "IMMA.16864.S4.S4", "IMMA.16832.S8.S8"


def listed(flag: str) -> set[str]:
    """What ``cuobjdump`` lists, as ``file.sm_80.cubin`` without number."""
    done = subprocess.run([binary_tool("cuobjdump"), flag, built_library().path], capture_output=True, text=True, check=True)
    return set(re.findall(r"\.(sm_\w+)\.", done.stdout))


def functions_with(code: dict[str, list[str]], holds: Callable[[str], bool]) -> set[str]:
    return {name for name, instructions in code.items() if any(map(holds, instructions))}


def uses_local_memory(instruction: str) -> bool:
    return instruction.partition(".")[0] in ("LDL", "STL")


def test_it_shows_its_entry_points_and_nothing_else() -> None:
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("no nm")
    built = built_library()
    done = subprocess.run([tool, "--dynamic", "--defined-only", built.path], capture_output=True, text=True, check=True)
    shown = {line.split()[-1] for line in done.stdout.splitlines()}
    runtimes = {"onnxruntime": {"RegisterCustomOps"}, "tensorrt": {"getCreators", "setLoggerFinder"}}
    assert shown == set(kernels._SIGNATURES).union(*(names for part, names in runtimes.items() if part in built.parts))


def test_it_needs_no_cuda_to_be_loaded() -> None:
    tool = shutil.which("readelf")
    if tool is None:
        pytest.skip("no readelf")
    done = subprocess.run([tool, "--dynamic", "--wide", built_library().path], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(\S+)\]", done.stdout)
    assert not [name for name in needed if re.search(r"cuda|cudart|onnxruntime|torch", name)]


def test_it_holds_every_architecture_and_ptx_for_newer_ones() -> None:
    assert listed("--list-elf") == {f"sm_{name}" for name in EVERY}
    assert listed("--list-ptx") == {"sm_80"}


def test_every_kernel_is_compiled_for_what_the_list_says() -> None:
    built = built_library()
    for source in read_sources():
        if source.architectures:
            assert {usage.architecture for usage in built.kernels[source.name]} == set(source.architectures), source.name


def test_no_kernel_uses_local_memory() -> None:
    for source, usages in built_library().kernels.items():
        assert [usage for usage in usages if usage.problem or not usage.registers] == [], source


def test_it_tells_what_it_is() -> None:
    built = built_library()
    assert built.sources == source_hash(FOLDER)
    assert build_info(built.path) == {
        "architectures": ",".join(EVERY),
        "compiler": built.compiler.replace(" ", "-"),
        "sources": built.sources,
    }


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_no_machine_code_touches_local_memory(architecture: str) -> None:
    code = machine_code(built_library().path, architecture)
    assert code
    assert functions_with(code, uses_local_memory) == set()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "86", "89"])
def test_int4_products_are_one_instruction(architecture: str) -> None:
    """Where the GPU has int4 matrix instructions. Newer ones get a subroutine of int8 ones, which ends with RET.

    A CALL alone tells nothing: the compiler also leaves loops by one, which nothing returns from.
    """
    code = machine_code(built_library().path, architecture)
    names = functions_with(code, lambda instruction: instruction == S4)
    assert names
    assert {name: entry for name in names for entry in code[name] if entry.partition(".")[0] == "RET" or entry == S8} == {}


@pytest.mark.slow
def test_int4_products_are_emulated_where_there_is_no_such_instruction() -> None:
    """So that the test above would see it."""
    code = machine_code(built_library().path, "90a")
    assert functions_with(code, lambda instruction: instruction == S4) == set()
    emulated = functions_with(code, lambda entry: entry.startswith("RET")) & functions_with(code, lambda entry: entry == S8)
    assert [name for name in emulated if "w4a4_gemm" in name]


@pytest.mark.slow
def test_int8_products_are_one_instruction() -> None:
    code = machine_code(built_library().path, "80")
    assert functions_with(code, lambda instruction: instruction == S8)


@pytest.mark.slow
def test_hopper_multiplies_with_wgmma() -> None:
    code = machine_code(built_library().path, "90a")
    for kernel, instruction in (("w4a4_gemm_wgmma_s8", "IGMMA"), ("flat_quantize_wgmma_f16", "HGMMA")):
        assert functions_with(code, lambda entry, prefix=instruction: entry.startswith(prefix)), kernel
    # No function falls back to the smaller instructions half-way.
    mixed = functions_with(code, lambda entry: entry.startswith(("IGMMA", "HGMMA")))
    small = functions_with(code, lambda entry: entry.startswith(("IMMA", "HMMA")))
    assert mixed & small == set()
