"""The deployment samples: the C++ one compiled and run on a stand-in of TensorRT, the Python one on a stand-in and on what is installed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from fqonnx.build import build
from fqonnx.recipe import Recipe
from tests.cli_support import K, write_data, write_mlp

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "samples" / "deploy_tensorrt.cpp"
sys.path.insert(0, str(ROOT / "samples"))
sample = importlib.import_module("deploy_tensorrt")

COMPILER = shutil.which("g++")
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]


# --- C++ --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("deploy") / "deploy_tensorrt"
    subprocess.run([COMPILER, *FLAGS, "-O1", f"-I{ROOT / 'tests' / 'deploy'}", SOURCE, "-o", path], check=True)
    return path


@pytest.fixture
def folder(tmp_path):
    """A plan that the stand-in takes, an input, and what it gives: ``y = 2 x``."""
    (tmp_path / "plan").write_bytes(b"plan")
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16)
    x.tofile(tmp_path / "x.bin")
    (2 * x.astype(np.float32)).tofile(tmp_path / "y.bin")
    return tmp_path


def run(program, folder, *words, **environment):
    done = subprocess.run([program, *words], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert "terminate" not in done.stderr
    return done


def test_the_program_runs_and_compares(program, folder):
    done = run(program, folder, "plan", "libfqonnx.so", "x:3x8=x.bin", "--expect", "y=y.bin", "--save", "y=out.bin", "--runs", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "a run takes 1.25 ms\ny: relative L2 0\nPASSED\n"
    assert (folder / "out.bin").read_bytes() == (folder / "y.bin").read_bytes()
    assert run(program, folder, "plan", "-", "x:3x8=x.bin").returncode == 0  # plugins inside the plan


@pytest.mark.parametrize(("factor", "code"), [(1.005, 0), (1.1, 1), (np.nan, 1)])
def test_another_output_fails(program, folder, factor, code):
    (np.fromfile(folder / "y.bin", np.float32) * np.float32(factor)).tofile(folder / "y.bin")
    done = run(program, folder, "plan", "-", "x:3x8=x.bin", "--expect", "y=y.bin")
    assert done.returncode == code
    assert done.stdout.splitlines()[-1] == ("FAILED" if code else "PASSED")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: deploy_tensorrt PLAN LIBRARY"),
        (["plan", "other.so"], "TensorRT does not take the plugins in other.so: build them with `fqonnx plugin build`"),
        (["none", "-"], "cannot read none: check the path"),
        (["x.bin", "-"], "TensorRT does not load x.bin: build it on this GPU, with this version"),
        (["plan", "-"], "input x is missing: give x:1x128=FILE"),
        (["plan", "-", "x=x.bin"], "write NAME:1x128=FILE, not x=x.bin"),
        (["plan", "-", "x:3x8"], "write NAME=FILE, not x:3x8"),
        (["plan", "-", "x:3xa=x.bin"], "not a number that fits here: a"),
        (["plan", "-", "x:4x8=x.bin"], "x.bin has 48 bytes, its shape needs 64"),
        (["plan", "-", "x:8x3=x.bin"], "the engine's profile does not take this shape of input x"),
        (["plan", "-", "x:3x8=x.bin", "--expect", "z=y.bin"], "there is no output z"),
        (["plan", "-", "x:3x8=x.bin", "--expect", "y=x.bin"], "x.bin is not of the size of output y"),
        (["plan", "-", "x:3x8=x.bin", "--save", "y=no/where"], "cannot write no/where: check the path and the disk"),
        (["plan", "-", "x:3x8=x.bin", "--profile", "1"], "the engine has no such profile: choose another --profile"),
        (["plan", "-", "x:3x8=x.bin", "--runs", "0"], "not a number that fits here: 0"),
        (["plan", "-", "x:3x8=x.bin", "--runs"], "--runs needs a value"),
        (["plan", "-", "--fast", "1"], "unknown option --fast"),
    ],
)
def test_mistakes_are_one_line(program, folder, words, message):
    done = run(program, folder, *words)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")


def test_no_memory_is_one_line(program, folder):
    done = run(program, folder, "plan", "-", "x:3x8=x.bin", FAKE_NO_MEMORY="1")
    assert (done.returncode, done.stderr) == (1, "error: cudaMalloc: out of memory\n")


def test_it_compiles_against_the_sdk():
    """Wherever TensorRT's headers are; they are in no package registry."""
    if COMPILER is None:
        pytest.skip("no g++")
    places = [os.environ.get("TENSORRT_INCLUDE_DIR", ""), "/usr/include/x86_64-linux-gnu", "/usr/include", "/usr/local/tensorrt/include"]
    include = next((place for place in places if place and Path(place, "NvInferRuntime.h").is_file()), None)
    cuda = importlib.util.find_spec("nvidia.cu13")
    if include is None or cuda is None:
        pytest.skip("TensorRT's or CUDA's headers are not here")
    headers = Path(next(iter(cuda.submodule_search_locations))) / "include"
    subprocess.run([COMPILER, *FLAGS, "-fsyntax-only", "-isystem", include, "-isystem", headers, SOURCE], check=True)


# --- Python -----------------------------------------------------------------------------------------------------------------------------


class FakeContext:
    def __init__(self, engine):
        self.engine, self.addresses, self.shape = engine, {}, ()

    def set_optimization_profile_async(self, index, stream):
        return index == 0

    def set_input_shape(self, name, shape):
        self.shape = shape
        return shape[-1] == K

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        import ctypes

        count = int(np.prod(self.shape))
        x, y = (
            np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[name])).reshape(self.shape) for name in ("x", "y")
        )
        y[:] = self.engine.function(x)
        return True


class FakeEngine:
    num_io_tensors = 2

    def __init__(self, function):
        self.function = function

    def get_tensor_name(self, index):
        return "xy"[index]

    def get_tensor_mode(self, name):
        return "INPUT" if name == "x" else "OUTPUT"

    def get_tensor_dtype(self, name):
        return "FLOAT"

    def create_execution_context(self):
        return FakeContext(self)


def fake_tensorrt(function, *, takes_plugins=True, loads=True):
    """A module like ``tensorrt`` whose engine computes a function."""
    module = types.ModuleType("tensorrt")
    module.__version__ = "10.13.0"
    module.loaded = []
    registry = types.SimpleNamespace(load_library=lambda path: module.loaded.append(path) or takes_plugins)
    module.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    module.Runtime = lambda logger: types.SimpleNamespace(deserialize_cuda_engine=lambda plan: FakeEngine(function) if loads else None)
    module.TensorIOMode = types.SimpleNamespace(INPUT="INPUT")
    module.nptype = lambda kind: np.float32
    module.get_plugin_registry = lambda: registry
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build directory of a real model with the manifest of an engine, and inputs."""
    folder = tmp_path_factory.mktemp("built")
    model, data = write_mlp(folder / "mlp.onnx"), write_data(folder / "d.npz")
    build(model, folder / "out", recipe=Recipe(transform="none", weights="rtn"), calib_data=str(data))
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    manifest["plan"] = {"engine": "tensorrt", "version": "10.13.0", "version_compatible": False, "gpu": "NVIDIA L4", "target": ["sm89"]}
    (folder / "out" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "out" / "engine.plan").write_bytes(b"plan")
    return folder / "out", data


def deploy(built, monkeypatch, trt, *options):
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    on_device = sample.run
    monkeypatch.setattr(sample, "run", lambda *args, **more: on_device(*args, **more, device="cpu"))
    return sample.main([*map(str, built), *options])


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.01, 0), (1.2, 1)])
def test_the_engine_is_compared_with_onnxruntime(built, monkeypatch, capsys, factor, code):
    def as_onnxruntime(x):
        return factor * sample.reference(built[0] / "model.onnx", {"x": x})["y"]

    trt = fake_tensorrt(as_onnxruntime)
    assert deploy(built, monkeypatch, trt, "--plugins", "libfqonnx.so") == code
    assert trt.loaded == ["libfqonnx.so"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("y [20, 32]: relative L2 ")
    assert float(printed[0].split()[-1]) == pytest.approx(factor - 1, abs=1e-5)
    assert printed[1] == ("FAILED" if code else "PASSED")


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ({}, (), 'this engine needs its plugins: give --plugins "$(fqonnx plugin path)"'),
        ({"takes_plugins": False}, ("--plugins", "p.so"), "TensorRT does not take the plugins in p.so: build them with"),
        (
            {"loads": False},
            ("--plugins", "p.so"),
            "does not load this engine, which was built by tensorrt 10.13.0 for NVIDIA L4: build it again",
        ),
        ({}, ("--plugins", "p.so", "--profile", "3"), "the engine has no profile 3"),
    ],
)
def test_what_does_not_load_says_why(built, monkeypatch, capsys, how, options, message):
    assert deploy(built, monkeypatch, fake_tensorrt(lambda x: x, **how), *options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_inputs_that_do_not_fit(monkeypatch):
    trt = fake_tensorrt(lambda x: x)
    with pytest.raises(sample.DeployError, match="input 'x' is missing: the engine's inputs are x"):
        sample.run(trt, FakeEngine(None), {}, device="cpu")
    with pytest.raises(sample.DeployError, match=r"profile 0 does not take shape \[2, 5\] of input 'x'"):
        sample.run(trt, FakeEngine(None), {"x": np.ones((2, 5))}, device="cpu")


def test_a_folder_that_is_no_build(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", x=np.ones(1))
    assert sample.main([str(tmp_path), str(tmp_path / "x.npz")]) == 1
    assert "manifest.json: No such file or directory: give the folder of an `fqonnx build --engine ...`" in capsys.readouterr().err


def test_an_rtx_engine_reaches_the_library(tmp_path, capsys):
    """Without a GPU TensorRT-RTX itself refuses; with one of those it was built for it runs."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    import torch

    model, data = write_mlp(tmp_path / "mlp.onnx"), write_data(tmp_path / "d.npz")
    build(model, tmp_path / "out", recipe=Recipe(transform="none", weights="rtn"), calib_data=str(data), engine="tensorrt-rtx")
    np.savez(tmp_path / "x.npz", x=np.load(data)["x"][:1])
    code = sample.main([str(tmp_path / "out"), str(tmp_path / "x.npz")])
    if torch.cuda.is_available() and torch.cuda.get_device_capability() in ((8, 0), (8, 6), (8, 9), (12, 0)):
        assert code == 0
    else:
        assert code == 1
        assert "does not load this engine, which was built by tensorrt-rtx" in capsys.readouterr().err
