"""``fqonnx plugin``: compilers and headers found or missed, the cache, interruptions, and what fails a build."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fqonnx.errors import EngineError, UsageError
from fqonnx.plugins import library, toolchain
from fqonnx.plugins.build import build, build_info, read_built
from fqonnx.plugins.ptxas import Usage, advice, demangled, usages
from fqonnx.plugins.sources import choose_architectures, read_sources
from tests.cli_support import one_line, run, run_process
from tests.plugin_support import built_library, require_compiler

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
PLUGINS = ROOT / "plugins"

API = """
#include "add.h"
extern "C" __attribute__((visibility("default"))) const char* fq_build_info() {
  return "architectures: " FQ_ARCHITECTURES "\\ncompiler: " FQ_COMPILER "\\nsources: " FQ_SOURCES;
}
extern "C" __attribute__((visibility("default"))) int fq_add(float* x) { return add(x, kBy); }
extern "C" __attribute__((visibility("default"))) int not_exported() { return 1; }
"""
HEADER = """#pragma once
constexpr float kBy = 1;
int add(float* x, float by);
"""
ADD = """#include "add.h"
#ifdef __CUDACC__
__global__ void add_kernel(float* x, float by) {
  __shared__ float y[32];
  y[threadIdx.x] = by;
  __syncthreads();
  x[threadIdx.x] += y[31 - threadIdx.x];
}
int add(float* x, float by) { add_kernel<<<1, 32>>>(x, by); return cudaGetLastError(); }
#else
int add(float*, float) { return 0; }
#endif
"""
NEWER = """#ifdef __CUDACC__
__global__ void newer_kernel(float* x) { x[0] = 1; }
#endif
"""
RUNTIME = (
    '#include "onnxruntime_c_api.h"\nextern "C" __attribute__((visibility("default"))) int RegisterCustomOps() { return ORT_NUMBER; }\n'
)
SOURCES = """# a comment
kernels/api.cpp host
kernels/add.cu 80 90a # another
kernels/newer.cu 90a

onnxruntime/custom_ops.cpp host
"""

WITHOUT = ("onnxruntime",)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FQONNX_LIBRARY", raising=False)
    return tmp_path / "cache" / "fqonnx"


@pytest.fixture
def sources(tmp_path: Path, cache: Path) -> Path:
    """A folder of sources as small as can be, and a cache that is not the user's."""
    folder = tmp_path / "plugins"
    files = {"kernels/api.cpp": API, "kernels/add.h": HEADER, "kernels/add.cu": ADD, "kernels/newer.cu": NEWER}
    for name, text in {**files, "onnxruntime/custom_ops.cpp": RUNTIME, "sources.txt": SOURCES}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    shutil.copy(PLUGINS / "libfqonnx.map", folder)
    return folder


QUICK = """
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;;
  --list-gpu-code) echo sm_80; echo sm_90; exit;;
esac
echo "$@" >> "$LOG"
flags=
while [ $# -gt 0 ]; do
  case "$1" in
    -c) source="$2"; flags="$flags -x c++ -c"; shift;;
    -o) flags="$flags -o $2"; shift;;
    -isystem) flags="$flags -isystem $2"; shift;;
    -shared|-D*|-I*) flags="$flags $1";;
    *.o) flags="$flags $1";;
  esac
  shift
done
case "$source" in
  *.cu) echo "ptxas info : Compiling entry function 'kernel' for 'sm_90a'"; echo "ptxas info : Used 8 registers";;
esac
exec g++ -fPIC -fvisibility=hidden $flags $source
"""
"""A compiler for all that is not about CUDA code: the host's, under nvcc's command line. It takes a tenth of the time."""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A quick compiler that notes each call in the file returned."""
    return script_compiler(tmp_path, monkeypatch, QUICK)


def script_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    path, log = tmp_path / "cuda" / "bin" / "nvcc", tmp_path / "calls.txt"
    fake(path, f'LOG="{log}"\n{script}')
    monkeypatch.setenv("CUDA_HOME", str(path.parents[1]))
    monkeypatch.delenv("NVCC_CCBIN", raising=False)
    return log


def fake(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def compiled(log: Path) -> list[str]:
    """The sources that were compiled since the last look, by their names."""
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("")
    return sorted(Path(line.split(" -c ")[1].split()[0]).name for line in lines if " -c " in line)


def leftovers(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.name.startswith((".work-", "tmp"))]


# --- a build ----------------------------------------------------------------------------------------------------------------------------


def test_a_build(sources: Path, cache: Path) -> None:
    require_compiler()
    built = build(folder=sources, without=WITHOUT, jobs=2)
    assert built.path.is_relative_to(cache)
    assert built.architectures == ("80", "90a")
    assert built.parts == ("kernels",)
    assert built.left_out == ("onnxruntime/custom_ops.cpp",)
    assert built.size == built.path.stat().st_size
    found = {(usage.function, usage.architecture) for listed in built.kernels.values() for usage in listed}
    assert found == {("add_kernel", "80"), ("add_kernel", "90a"), ("newer_kernel", "90a")}
    assert all(usage.registers > 0 for listed in built.kernels.values() for usage in listed)
    assert {usage.shared for usage in built.kernels["kernels/add.cu"]} <= {128, 1152}  # 90a reserves 1,024 bytes of its own
    loaded = ctypes.CDLL(str(built.path))
    assert loaded.fq_add
    for name in ("not_exported", "_Z3addPff", "cudaMalloc"):
        with pytest.raises(AttributeError):
            getattr(loaded, name)
    assert read_built(built.path.parent) == built
    told = build_info(built.path)
    assert told == {"architectures": "80,90a", "compiler": built.compiler.replace(" ", "-"), "sources": built.sources}
    assert not leftovers(cache)


def test_nothing_is_compiled_twice(sources: Path, compiler: Path) -> None:
    first = build(folder=sources, without=WITHOUT)
    compiled(compiler)
    second = build(folder=sources, without=WITHOUT)
    assert compiler.read_text().count("-shared") == 0
    assert compiled(compiler) == []
    assert second == first
    assert build(folder=sources, without=WITHOUT, force=True).key == first.key
    assert compiled(compiler) == ["add.cu", "api.cpp", "newer.cu"]


def test_the_folder_does_not_matter(sources: Path, tmp_path: Path, compiler: Path) -> None:
    first = build(folder=sources, without=WITHOUT)
    compiled(compiler)
    shutil.copytree(sources, tmp_path / "elsewhere")
    assert build(folder=tmp_path / "elsewhere", without=WITHOUT) == first
    assert compiled(compiler) == []


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ("kernels/newer.cu", ["api.cpp", "newer.cu"]),
        ("kernels/add.h", ["add.cu", "api.cpp"]),
        ("kernels/api.cpp", ["api.cpp"]),
        ("libfqonnx.map", ["api.cpp"]),
    ],
)
def test_what_depends_on_a_change_is_compiled(sources: Path, compiler: Path, changed: str, again: list[str]) -> None:
    """api.cpp always is: it tells the hash of all sources."""
    before = build(folder=sources, without=WITHOUT)
    compiled(compiler)
    with (sources / changed).open("a") as file:
        file.write("/* changed */\n")
    after = build(folder=sources, without=WITHOUT)
    assert compiled(compiler) == again
    assert after.sources != before.sources
    assert after.path != before.path
    assert before.path.is_file()


def test_another_compiler_compiles_anew(sources: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder=sources, without=WITHOUT)
    compiled(compiler)
    script = compiler.parent / "cuda" / "bin" / "nvcc"
    script.write_text(script.read_text().replace("tools, release 13.0", "tools, release 13.0, patched"))
    build(folder=sources, without=WITHOUT)
    assert compiled(compiler) == ["add.cu", "api.cpp", "newer.cu"]


def test_some_architectures(sources: Path, compiler: Path) -> None:
    built = build(folder=sources, without=WITHOUT, architectures=["sm80"])
    assert compiled(compiler) == ["add.cu", "api.cpp"]
    assert built.architectures == ("80",)
    assert set(built.left_out) == {"kernels/newer.cu", "onnxruntime/custom_ops.cpp"}
    assert build_info(built.path)["architectures"] == "80"
    assert build(folder=sources, without=WITHOUT).architectures == ("80", "90a")


def test_names_of_architectures() -> None:
    sources = read_sources(PLUGINS)
    every = ("80", "86", "89", "90a", "100a", "120a")
    assert choose_architectures([], sources) == every
    for name in ("90a", "90", "sm90", "sm_90a", "SM_90"):
        assert choose_architectures([name], sources) == ("90a",)
    assert choose_architectures(["120a,80", "86"], sources) == ("80", "86", "120a")
    for name in ("75", "9.0", "hopper", "", "90f"):
        with pytest.raises(UsageError, match="choose from 80, 86, 89, 90a, 100a, 120a"):
            choose_architectures([name], sources)


def test_the_lowest_architecture_comes_with_ptx(sources: Path, compiler: Path) -> None:
    build(folder=sources, without=WITHOUT)
    calls = {line.split(" -c ")[1].split()[0].rpartition("/")[2]: line for line in compiler.read_text().splitlines() if " -c " in line}
    assert "code=[sm_80,compute_80]" in calls["add.cu"]
    assert "code=[sm_90a]" in calls["add.cu"]
    assert "code=[sm_90a]" in calls["newer.cu"]
    assert "compute_90a]" not in calls["newer.cu"]


def test_the_sources_are_all_there() -> None:
    listed = {source.name for source in read_sources(PLUGINS)}
    there = {path.relative_to(PLUGINS).as_posix() for path in PLUGINS.rglob("*") if path.suffix in (".cu", ".cpp")}
    assert there == listed


def test_a_missing_source(sources: Path) -> None:
    (sources / "kernels" / "newer.cu").unlink()
    with pytest.raises(EngineError, match=r"kernels/newer\.cu is missing, which sources\.txt lists: install fqonnx anew"):
        build(folder=sources)


def test_an_unknown_part(sources: Path) -> None:
    with pytest.raises(UsageError, match="unknown part 'kernels': choose from onnxruntime"):
        build(folder=sources, without=["kernels"])


# --- the cache --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["object cut", "object gone", "note cut", "note of another kind", "note gone"])
def test_a_broken_object_is_compiled_again(sources: Path, cache: Path, compiler: Path, damage: str) -> None:
    first = build(folder=sources, without=WITHOUT)
    compiled(compiler)
    notes = [path for path in (cache / "objects").glob("*/note.json") if "add.cu" in path.read_text()]
    place = notes[0].parent
    match damage:
        case "object cut":
            content = (place / "object.o").read_bytes()
            (place / "object.o").write_bytes(content[: len(content) // 2])
        case "object gone":
            (place / "object.o").unlink()
        case "note cut":
            notes[0].write_text(notes[0].read_text()[:20])
        case "note of another kind":
            notes[0].write_text("[1, 2]")
        case _:
            notes[0].unlink()
    first.path.unlink()
    second = build(folder=sources, without=WITHOUT)
    assert compiled(compiler) == ["add.cu"]
    assert second.kernels == first.kernels
    assert build_info(second.path)["sources"] == first.sources


@pytest.mark.parametrize("damage", ["library", "note", "format"])
def test_a_broken_library_is_linked_again(sources: Path, compiler: Path, damage: str) -> None:
    first = build(folder=sources, without=WITHOUT)
    compiled(compiler)
    note = first.path.parent / "build.json"
    match damage:
        case "library":
            first.path.write_bytes(first.path.read_bytes()[:-100])
        case "note":
            note.write_text("{}")
        case _:
            note.write_text(note.read_text().replace('"format": 1', '"format": 0'))
    assert read_built(first.path.parent) is None
    second = build(folder=sources, without=WITHOUT)
    assert compiled(compiler) == []
    assert (second.key, second.kernels) == (first.key, first.kernels)
    ctypes.CDLL(str(second.path))


def test_objects_that_nobody_uses_are_forgotten(sources: Path, cache: Path, compiler: Path) -> None:
    build(folder=sources, without=WITHOUT)
    objects = {path.parent.name: path.parent for path in (cache / "objects").glob("*/note.json")}
    old = time.time() - 40 * 86400
    stale, killed = cache / "objects" / "stale", cache / "objects" / ".work-killed"
    for path in (stale, killed):
        path.mkdir()
        os.utime(path, (old, old))
    with (sources / "kernels" / "add.cu").open("a") as file:
        file.write("// changed\n")
    build(folder=sources, without=WITHOUT)
    assert not stale.exists()
    assert not killed.exists()
    assert all(path.exists() for path in objects.values())


@pytest.mark.usefixtures("compiler")
def test_a_cache_that_cannot_be_written(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"cannot be made: .*: set XDG_CACHE_HOME to a folder that can be written"):
        build(folder=sources, without=WITHOUT)


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the specification of XDG says."""
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert library.cache_folder() == Path.home() / ".cache" / "fqonnx"


# --- what fails a build -----------------------------------------------------------------------------------------------------------------


def test_code_that_does_not_compile(sources: Path, cache: Path) -> None:
    require_compiler()
    (sources / "kernels" / "newer.cu").write_text("\n__global__ void newer(float* x) { x[0] = unknown_name; }\n")
    with pytest.raises(EngineError, match=r'kernels/newer\.cu does not compile: .*newer\.cu\(2\): error: .*"unknown_name" is undefined'):
        build(folder=sources, without=WITHOUT)
    assert not leftovers(cache)
    assert not list(cache.rglob("*.so"))


def test_code_that_does_not_link(sources: Path, cache: Path) -> None:
    require_compiler()
    (sources / "kernels" / "add.cu").write_text("__global__ void add_kernel(float* x) { x[0] = 1; }\n")
    with pytest.raises(EngineError, match=r"the library does not link: .*undefined reference to .add"):
        build(folder=sources, without=WITHOUT)
    assert not leftovers(cache)
    assert not list(cache.rglob("*.so"))


SPILLS = """
template <int N>
__global__ void __launch_bounds__(1024) spilling(float* x) {
  float y[N];
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) x[i * 1024 + threadIdx.x] = y[i] * y[N - 1 - i];
}
template __global__ void spilling<128>(float*);
"""
LOCAL_ARRAY = (
    "__global__ void indexed(float* x, int n) { float y[64] = {}; for (int i = 0; i < n; ++i) y[i % 64] += x[i]; x[0] = y[n % 64]; }"
)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (SPILLS, r"kernels/newer\.cu: spilling<128> for 90a keeps \d+ bytes in local memory and spills \d+ bytes"),
        (LOCAL_ARRAY, r"kernels/newer\.cu: indexed for 90a keeps 256 bytes in local memory"),
    ],
    ids=["spill", "array"],
)
def test_a_kernel_in_local_memory_fails_the_build(sources: Path, cache: Path, code: str, said: str) -> None:
    require_compiler()
    (sources / "kernels" / "newer.cu").write_text(code)
    for _ in range(2):  # from the compiler, then from the cache
        with pytest.raises(EngineError, match=said + ".*no library was made"):
            build(folder=sources, without=WITHOUT, architectures=["90a"])
    assert not list(cache.rglob("*.so"))


def test_serialized_wgmma_fails_the_build(sources: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient registers"
    script_compiler(tmp_path, monkeypatch, f'case "$*" in *newer.cu*) echo "{line}";; esac\n{QUICK}')
    with pytest.raises(EngineError, match=r"kernels/newer\.cu: .*C7510.* serialized .*no library was made"):
        build(folder=sources, without=WITHOUT)
    assert not list(cache.rglob("*.so"))


def test_what_ptxas_says() -> None:
    output = """ptxas info    : 0 bytes gmem, 16 bytes cmem[4]
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for _Z6calledv
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 24 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_80'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
"""
    first, second = usages(output)
    assert first == Usage("_Z1aPf", "90a", registers=168, shared=1024, stack=24, spill_stores=4, spill_loads=12)
    assert second == Usage("_Z1bPf", "80", registers=8)
    assert first.problem == "_Z1aPf for 90a keeps 24 bytes in local memory and spills 4 bytes"
    assert second.problem is None
    assert advice(output) == []
    assert advice("x\n warning: C7512 bad\nC75 no\nptxas info : (C7510) lost\n") == ["warning: C7512 bad", "ptxas info : (C7510) lost"]
    if shutil.which("c++filt"):
        assert [usage.function for usage in demangled([first, second])] == ["a", "b"]


def test_no_kernel_is_excused() -> None:
    from fqonnx.plugins.ptxas import ALLOWED

    assert not ALLOWED


# --- compilers and headers --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(toolchain, "_SYSTEM_TOOLKIT", tmp_path / "none")
    monkeypatch.setattr(toolchain, "find_spec", lambda _name: None)


VERSION = 'echo "Cuda compilation tools, release 13.0, V13.0.88"'


@pytest.mark.usefixtures("_nothing_installed")
def test_no_compiler(sources: Path) -> None:
    with pytest.raises(
        EngineError, match=r"no CUDA compiler: install CUDA 12\.8 or newer and set CUDA_HOME, or pip install 'fqonnx\[cuda-build\]'"
    ):
        build(folder=sources)


@pytest.mark.usefixtures("_nothing_installed")
def test_no_host_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake(tmp_path / "cuda" / "bin" / "nvcc", VERSION).parents[1]))
    with pytest.raises(EngineError, match=r"there is no g\+\+: install g\+\+, or set NVCC_CCBIN"):
        toolchain.find_toolchain()
    monkeypatch.setenv("NVCC_CCBIN", "g++-99")
    with pytest.raises(EngineError, match=r"there is no g\+\+-99"):
        toolchain.find_toolchain()


@pytest.mark.usefixtures("_nothing_installed")
def test_where_compilers_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_HOME, then the path, then the system's toolkit, then the wheels, whose runtime lies where nvcc does not look."""
    fake(tmp_path / "empty" / "g++", "echo 14")
    wheels = fake(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc", VERSION)
    (wheels.parents[1] / "lib").mkdir()
    (wheels.parents[1] / "lib" / "libcudart_static.a").write_text("")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "site" / "nvidia")]})
    monkeypatch.setattr(toolchain, "find_spec", lambda _name: spec)
    found = toolchain.find_toolchain()
    assert (found.nvcc, found.version, found.library_folders) == (wheels, "13.0.88", (wheels.parents[1] / "lib",))

    system = fake(tmp_path / "none" / "bin" / "nvcc", VERSION)
    assert toolchain.find_toolchain().nvcc == system
    assert toolchain.find_toolchain().library_folders == ()
    on_path = fake(tmp_path / "empty" / "nvcc", VERSION)
    assert toolchain.find_toolchain().nvcc == on_path
    named = fake(tmp_path / "home" / "bin" / "nvcc", VERSION)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert toolchain.find_toolchain().nvcc == named


def test_a_wrong_cuda_home_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(EngineError, match=f"CUDA_HOME is {tmp_path}, and there is no bin/nvcc in it: correct it, or unset it"):
        toolchain.find_toolchain()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo hello", "does not tell its version, so it is no CUDA compiler"),
        ("exit 3", "does not run: .*exit status 3"),
        ("kill -9 $$", "does not run: .*SIGKILL"),
    ],
)
def test_a_bad_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake(tmp_path / "bin" / "nvcc", script).parents[1]))
    with pytest.raises(EngineError, match=said) as caught:
        toolchain.find_toolchain()
    one_line(str(caught.value))


def test_an_old_compiler(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script_compiler(tmp_path, monkeypatch, QUICK.replace("echo sm_90", "true"))
    with pytest.raises(EngineError, match=r"knows no 90a: install CUDA 12\.8 or newer, or name the architectures you need with --arch"):
        build(folder=sources, without=WITHOUT)
    assert build(folder=sources, without=WITHOUT, architectures=["80"]).architectures == ("80",)


@pytest.mark.usefixtures("compiler")
def test_missing_headers(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORT_INCLUDE_DIR", raising=False)
    monkeypatch.setattr(toolchain, "_SYSTEM_INCLUDES", [tmp_path / "none"])
    with pytest.raises(EngineError, match=r"ONNX Runtime's C headers are missing: install libonnxruntime-dev .* --without onnxruntime"):
        build(folder=sources)
    monkeypatch.setenv("ORT_INCLUDE_DIR", str(tmp_path))
    with pytest.raises(EngineError, match=f"ORT_INCLUDE_DIR is {tmp_path}, and there is no onnxruntime_c_api.h in it"):
        build(folder=sources)


def test_headers_are_part_of_what_an_object_depends_on(
    sources: Path, tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = tmp_path / "ort" / "onnxruntime_c_api.h"
    header.parent.mkdir()
    monkeypatch.setenv("ORT_INCLUDE_DIR", str(header.parent))
    for number in (7, 8):
        header.write_text(f"#define ORT_NUMBER {number}\n")
        built = build(folder=sources)
        assert "custom_ops.cpp" in compiled(compiler)
        assert built.parts == ("kernels", "onnxruntime")
        code = f"import ctypes; print(ctypes.CDLL({str(built.path)!r}).RegisterCustomOps())"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == str(number)


TENSORRT = """
#ifdef FQ_TENSORRT_SDK
#include <NvInferRuntime.h>
#else
#define TENSORRT_NUMBER 0
#endif
extern "C" __attribute__((visibility("default"))) int getCreators() { return TENSORRT_NUMBER; }
"""


@pytest.fixture
def tensorrt_sources(sources: Path, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources with a part for TensorRT, on a machine that has no headers of it."""
    (sources / "tensorrt").mkdir()
    (sources / "tensorrt" / "plugins.cpp").write_text(TENSORRT)
    with (sources / "sources.txt").open("a") as file:
        file.write("tensorrt/plugins.cpp host\n")
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    monkeypatch.setattr(toolchain, "_SYSTEM_TENSORRT", [tmp_path / "none", tmp_path / "system"])
    return sources


def tensorrt_headers(folder: Path, version: str, number: int) -> Path:
    """Headers as TensorRT's are: the version's macros stand for others in some releases."""
    folder.mkdir(exist_ok=True)
    major, minor = version.split(".")
    direct = f"#define NV_TENSORRT_MAJOR {major} //!< major\n#define NV_TENSORRT_MINOR {minor} //!< minor\n"
    named = f"#define TRT_MAJOR_ENTERPRISE {major}\n#define TRT_MINOR_ENTERPRISE {minor}\n#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE\n"
    (folder / "NvInferVersion.h").write_text(named if int(minor) % 2 else direct)
    (folder / "NvInferRuntime.h").write_text(f"#define TENSORRT_NUMBER {number}\n")
    return folder


def creators(path: Path) -> int:
    code = f"import ctypes; print(ctypes.CDLL({str(path)!r}).getCreators())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_tensorrt_needs_no_headers(tensorrt_sources: Path, compiler: Path) -> None:
    built = build(folder=tensorrt_sources, without=WITHOUT)
    assert built.parts == ("kernels", "tensorrt")
    assert creators(built.path) == 0
    assert "FQ_TENSORRT_SDK" not in compiler.read_text()
    left = build(folder=tensorrt_sources, without=["onnxruntime", "tensorrt"])
    assert left.parts == ("kernels",)
    assert "tensorrt/plugins.cpp" in left.left_out


def test_tensorrt_headers_that_are_there_are_used(
    tensorrt_sources: Path, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, number in (("10.12", 1), ("10.13", 2), ("11.4", 3)):  # too old, and two that do
        tensorrt_headers(tmp_path / "system", version, number)
        assert creators(build(folder=tensorrt_sources, without=WITHOUT).path) == (0 if number == 1 else number)
        assert compiled(compiler).count("plugins.cpp") == 1
    named = tensorrt_headers(tmp_path / "named", "11.0", 4)
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(named))
    assert creators(build(folder=tensorrt_sources, without=WITHOUT).path) == 4
    (named / "NvInferRuntime.h").write_text("#define TENSORRT_NUMBER 5\n")
    assert creators(build(folder=tensorrt_sources, without=WITHOUT).path) == 5


def test_tensorrt_headers_that_do_not_do(tensorrt_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    with pytest.raises(
        EngineError, match=f"TENSORRT_INCLUDE_DIR is {tmp_path}, and there is no NvInferRuntime.h in it: correct it, or unset it"
    ):
        build(folder=tensorrt_sources, without=WITHOUT)
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tensorrt_headers(tmp_path / "old", "10.9", 1)))
    with pytest.raises(EngineError, match=r"TENSORRT_INCLUDE_DIR is .*/old, TensorRT 10\.9: plugins need 10\.13 or newer"):
        build(folder=tensorrt_sources, without=WITHOUT)
    (tmp_path / "old" / "NvInferVersion.h").unlink()
    with pytest.raises(EngineError, match=r"TensorRT 0\.0: plugins need 10\.13 or newer"):
        build(folder=tensorrt_sources, without=WITHOUT)


# --- interruptions ----------------------------------------------------------------------------------------------------------------------

SLOW = 'case "$*" in *newer.cu*) echo $$ > "$LOG"; sleep 100;; esac\n' + QUICK.replace('echo "$@" >> "$LOG"', "")
DRIVER = """
import sys
from pathlib import Path
import fqonnx.plugins.build as building
from fqonnx.cli.main import main
original, folder = building.build, Path(sys.argv.pop())
building.build = lambda **options: original(**options, folder=folder)
main()
"""


@pytest.fixture
def slow_build(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``fqonnx plugin build`` in a process of its own, while a compiler runs; and that compiler's process."""
    log = script_compiler(tmp_path, monkeypatch, SLOW)
    command = [sys.executable, "-c", DRIVER, "plugin", "build", "--without", "onnxruntime", "--arch", "90a", "--jobs", "4", str(sources)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, such as CI may be, are born deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no other thread forks here
    ) as process:
        deadline = time.monotonic() + 60
        while not log.exists() or not log.read_text().strip():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process, int(log.read_text())
        process.kill()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_an_interrupted_build_leaves_nothing(
    slow_build: tuple[subprocess.Popen[str], int], cache: Path, number: int, code: int, word: str
) -> None:
    process, compiler_process = slow_build
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert errors.strip().splitlines()[-1] == f"error: {word}"
    assert not is_running(compiler_process)
    assert not leftovers(cache)
    assert not list(cache.rglob("*.so"))


def test_after_a_kill_the_next_build_works(slow_build: tuple[subprocess.Popen[str], int], sources: Path, tmp_path: Path) -> None:
    process, compiler_process = slow_build
    process.kill()
    process.communicate(timeout=30)
    os.killpg(compiler_process, signal.SIGKILL)
    (tmp_path / "cuda" / "bin" / "nvcc").write_text((tmp_path / "cuda" / "bin" / "nvcc").read_text().replace("sleep 100", "true"))
    built = build(folder=sources, without=WITHOUT, architectures=["90a"])
    assert read_built(built.path.parent) == built


# --- the command line -------------------------------------------------------------------------------------------------------------------


def test_path_without_a_library(cache: Path) -> None:
    done = run("plugin", "path")
    assert (done.code, done.stdout) == (1, "")
    assert "run `fqonnx plugin build`" in one_line(done.stderr)
    assert run("plugin", "info").code == 1


def test_a_named_library(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.so"
    path.write_text("anything")
    monkeypatch.setenv("FQONNX_LIBRARY", str(path))
    done = run("plugin", "path")
    assert (done.code, done.stdout) == (0, f"{path}\n")
    done = run("plugin", "info")
    assert done.code == 1
    assert f"nothing is known of {path}" in one_line(done.stderr)
    path.unlink()
    done = run("plugin", "path")
    assert done.code == 1
    assert f"FQONNX_LIBRARY is {path}, and there is no such file" in one_line(done.stderr)


def test_usage_errors() -> None:
    done = run("plugin", "build", "--arch", "75")
    assert done.code == 2
    assert "unknown architecture '75': choose from 80, 86, 89, 90a, 100a, 120a" in one_line(done.stderr)
    done = run("plugin", "build", "--without", "tensorflow")
    assert done.code == 2
    assert "unknown part 'tensorflow': choose from onnxruntime" in one_line(done.stderr)
    assert run("plugin", "build", "--jobs", "0").code == 2
    assert run("plugin").code == 2


def test_build_info_and_path_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    built = built_library()
    monkeypatch.setenv("COLUMNS", "120")
    without = ["--without", "onnxruntime"] if "onnxruntime" not in built.parts else []
    done = run_process("plugin", "build", "--json", *without)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["sha256"] == built.sha256  # up to date: nothing was built
    assert run_process("plugin", "path").stdout == f"{built.path}\n"
    shown = run_process("plugin", "info").stdout
    for part in (
        "wgmma_s8",
        "mma.m16n8k64.s32.s4.s4.s32",
        "w4a4_gemm_mma.cu",
        built.sha256,
        str(built.path),
        "80 86 89 90a 100a 120a",
        built.compiler,
    ):
        assert part in shown
    told = json.loads(run_process("plugin", "info", "--json").stdout)
    assert told["kernels"].keys() == built.kernels.keys()
    assert run_process("plugin", "build", "--quiet", *without).stdout == ""


# --- CMake ------------------------------------------------------------------------------------------------------------------------------


def test_cmake_compiles_the_same_for_the_same(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    require_compiler()
    if cmake is None:
        pytest.skip("no cmake")
    nvcc = toolchain.find_toolchain().nvcc
    command = [
        cmake,
        "-S",
        PLUGINS,
        "-B",
        tmp_path,
        "-DFQONNX_ONNXRUNTIME=OFF",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "cudart_static" in done.stderr + done.stdout:
        pytest.skip("no CUDA toolkit that CMake accepts")
    assert done.returncode == 0, done.stderr
    commands = {
        entry["file"].rpartition("plugins/")[2]: entry["command"] for entry in json.loads((tmp_path / "compile_commands.json").read_text())
    }
    sources = [source for source in read_sources(PLUGINS) if source.part != "onnxruntime"]
    assert commands.keys() == {source.name for source in sources}
    for source in sources:
        wanted = {code for name in source.architectures for code in (f"sm_{name}", *(["compute_80"] if name == "80" else []))}
        assert machine_codes(commands[source.name]) == wanted, source.name
    for command_line in commands.values():
        assert "-fvisibility=hidden" in command_line
        assert "-O3" in command_line
        assert "-std=c++17" in command_line or "-std=gnu++17" in command_line


def machine_codes(command: str) -> set[str]:
    """What a call of nvcc compiles for, such as ``sm_80`` and ``compute_80``."""
    return {code for listed in re.findall(r"code=\[([^\]]*)\]", command) for code in listed.split(",")}


def test_cmake_without_headers_says_how_to_get_them(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    require_compiler()
    if cmake is None:
        pytest.skip("no cmake")
    if any((folder / "onnxruntime_c_api.h").is_file() for folder in toolchain._SYSTEM_INCLUDES):
        pytest.skip("the headers are where the system keeps them")
    environment = {name: value for name, value in os.environ.items() if name != "ORT_INCLUDE_DIR"}
    command = [cmake, "-S", PLUGINS, "-B", tmp_path, f"-DCMAKE_CUDA_COMPILER={toolchain.find_toolchain().nvcc}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0
    assert "-DFQONNX_ONNXRUNTIME=OFF" in " ".join(done.stderr.split())
