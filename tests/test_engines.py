from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fqonnx.engines import ENGINES, EngineOptions, Profile, engine, profiles_from_shapes
from fqonnx.engines import onnxruntime as ort_engine
from fqonnx.errors import EngineError, FqonnxError, UsageError
from tests.engine_models import W, save, write_linear


@pytest.fixture
def linear(tmp_path):
    return write_linear(tmp_path / "model.onnx")


def one_line(caught):
    assert "\n" not in str(caught.value)
    return True


# --- the table ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ENGINES))
def test_every_engine_resolves(name):
    assert callable(engine(name).build)


def test_an_unknown_engine_is_told_the_choices():
    with pytest.raises(UsageError, match="unknown engine 'tflite': choose from onnxruntime, tensorrt, tensorrt-rtx"):
        engine("tflite")


def test_reading_the_choices_imports_no_runtime():
    code = "import sys, fqonnx.engines; print({'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


def test_profiles_cover_the_shapes_seen():
    shapes = {"ids": [(1, 9), (4, 3), (1, 7), (1, 7)], "mask": [(2,)]}
    assert profiles_from_shapes(shapes) == {"ids": Profile((1, 3), (1, 7), (4, 9)), "mask": Profile((2,), (2,), (2,))}


def test_an_engine_takes_less_than_was_seen():
    shapes = {"ids": [(4, 128), (4, 128)], "x": [(2, 32)]}
    inputs = {"ids": ("batch", None), "x": ("batch", 32)}
    assert profiles_from_shapes(shapes, inputs) == {
        "ids": Profile((1, 1), (4, 128), (4, 128)),
        "x": Profile((1, 32), (2, 32), (2, 32)),
    }


def test_a_model_with_a_past_keeps_the_smallest_shapes_seen():
    shapes = {"ids": [(1, 7)], "past_key_values.0.key": [(1, 2, 5, 8)]}
    inputs = {"ids": ("b", "s"), "past_key_values.0.key": ("b", 2, "p", 8)}
    assert profiles_from_shapes(shapes, inputs)["ids"] == Profile((1, 7), (1, 7), (1, 7))


# --- ONNX Runtime ---------------------------------------------------------------------------------------------------------------------


def test_a_session_runs_on_the_cpu(linear):
    x = np.random.default_rng(1).normal(size=(2, 3, 32)).astype(np.float32)
    session = ort_engine.session(linear, threads=1)
    assert session.get_providers() == ["CPUExecutionProvider"]
    np.testing.assert_allclose(ort_engine.run(session, {"x": x})["y"], x @ W, rtol=1e-4, atol=1e-4)
    assert list(ort_engine.run(session, {"x": x}, ["y"])) == ["y"]


def test_a_session_from_bytes_finds_external_data(tmp_path, linear):
    model = onnx.load(linear)
    onnx.save(model, tmp_path / "external.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    session = ort_engine.session((tmp_path / "external.onnx").read_bytes(), external_data=tmp_path)
    x = np.ones((1, 1, 32), np.float32)
    np.testing.assert_allclose(ort_engine.run(session, {"x": x})["y"][0, 0], W.sum(0), rtol=1e-4, atol=1e-4)


def test_an_unknown_device(linear):
    with pytest.raises(UsageError, match="unknown device 'tpu': choose from cpu, cuda"):
        ort_engine.session(linear, device="tpu")


def test_without_cuda_the_cpu_does_not_step_in(linear, capfd):
    import torch

    if torch.cuda.is_available():
        pytest.skip("CUDA works here")
    with pytest.raises(EngineError, match=r"pip install .*onnxruntime-gpu.*or use --device cpu") as caught:
        ort_engine.session(linear, device="cuda")
    assert one_line(caught)
    assert capfd.readouterr() == ("", "")


def test_a_cpu_build_of_onnxruntime_says_what_to_install(linear, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match="is a CPU build: pip install onnxruntime-gpu, or use --device cpu"):
        ort_engine.session(linear, device="cuda")


@pytest.mark.gpu
def test_a_session_runs_on_cuda(linear):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    session = ort_engine.session(linear, device="cuda")
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    x = np.ones((1, 1, 32), np.float32)
    np.testing.assert_allclose(ort_engine.run(session, {"x": x})["y"][0, 0], W.sum(0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((1, 1, 31), np.float32), r"ONNX Runtime failed: Got invalid dimensions for input: x .*Got: 31 Expected: 32"),
        (np.zeros((1, 1, 32), np.float64), r"ONNX Runtime failed: Unexpected input data type\. Actual: \(tensor\(double\)\)"),
    ],
)
def test_failures_are_one_line_without_codes(linear, x, message, capfd):
    session = ort_engine.session(linear)
    with pytest.raises(EngineError, match=message) as caught:
        ort_engine.run(session, {"x": x})
    assert one_line(caught)
    assert "[ONNXRuntimeError]" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_node_that_fails_is_named(tmp_path):
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Reshape", ["x", "shape"], ["y"], name="fold")],
        [("x", TensorProto.FLOAT, ["n"]), ("shape", TensorProto.INT64, [1])],
        [("y", TensorProto.FLOAT, ["m"])],
    )
    session = ort_engine.session(path)
    with pytest.raises(EngineError, match=r"running Reshape node\. Name:'fold'") as caught:
        ort_engine.run(session, {"x": np.zeros(3, np.float32), "shape": np.array([2])})
    assert "onnxruntime_src" not in str(caught.value)
    assert one_line(caught)


def test_models_that_cannot_be_loaded(tmp_path, capfd):
    with pytest.raises(EngineError, match=r"cannot load the model: .*protobuf"):
        ort_engine.session(b"junk")
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Nonsense", ["x"], ["y"], domain="nowhere")],
        [("x", TensorProto.FLOAT, [1])],
        [("y", TensorProto.FLOAT, [1])],
        domains=["nowhere"],
    )
    with pytest.raises(EngineError, match="nowhere:Nonsense") as caught:
        ort_engine.session(path)
    assert one_line(caught)
    assert capfd.readouterr() == ("", "")


def test_errors_of_others_pass_unchanged():
    class OurBugError(KeyError):
        pass

    for error in (OurBugError("x"), ValueError("y"), FqonnxError("z"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, ort_engine.one_line_errors("a", hint="b"):
            raise error
        assert caught.value is error


def test_long_messages_are_cut_and_memory_is_named():
    assert ort_engine.explain(RuntimeError("x " * 400)).endswith("...")
    message = ort_engine.explain(
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer")
    )
    assert message == "out of memory (Failed to allocate memory for requested buffer)"


def test_onnxruntime_needs_no_build(linear, tmp_path):
    assert engine("onnxruntime").build(linear, tmp_path / "engine.plan") is None
    assert not (tmp_path / "engine.plan").exists()


@pytest.mark.parametrize(
    "options", [EngineOptions(timing_cache=Path("t")), EngineOptions(version_compatible=True), EngineOptions(optimization_level=3)]
)
def test_onnxruntime_refuses_the_options_of_engines(options):
    with pytest.raises(UsageError, match="are options of --engine tensorrt"):
        engine("onnxruntime").require(None, options)
