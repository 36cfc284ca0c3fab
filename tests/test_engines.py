from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fqonnx.engines import ENGINES, Profile, engine, profiles_from_shapes
from fqonnx.engines import onnxruntime as ort_engine
from fqonnx.errors import EngineError, FqonnxError, UsageError

W = np.random.default_rng(0).normal(size=(32, 48)).astype(np.float32)


def save(path, nodes, inputs, outputs, constants=(), domains=()):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        [numpy_helper.from_array(value, name) for name, value in dict(constants).items()],
    )
    opsets = [helper.make_opsetid("", 21), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.fixture
def linear(tmp_path):
    return save(
        tmp_path / "model.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")],
        [("x", TensorProto.FLOAT, ["b", "s", 32])],
        [("y", TensorProto.FLOAT, ["b", "s", 48])],
        {"w": W},
    )


def one_line(caught):
    assert "\n" not in str(caught.value)
    return True


# --- the table ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ENGINES))
def test_every_engine_resolves(name):
    assert callable(engine(name).build)


def test_an_unknown_engine_is_told_the_choices():
    with pytest.raises(UsageError, match="unknown engine 'tflite': choose from onnxruntime, tensorrt-rtx"):
        engine("tflite")


def test_reading_the_choices_imports_no_runtime():
    code = "import sys, fqonnx.engines; print({'onnxruntime', 'tensorrt_rtx', 'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


def test_profiles_cover_the_shapes_seen():
    shapes = {"ids": [(1, 9), (4, 3), (1, 7), (1, 7)], "mask": [(2,)]}
    assert profiles_from_shapes(shapes) == {"ids": Profile((1, 3), (1, 7), (4, 9)), "mask": Profile((2,), (2,), (2,))}


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
    engine("onnxruntime").build(linear, tmp_path / "engine.plan", profiles={})
    assert not (tmp_path / "engine.plan").exists()


# --- TensorRT-RTX ---------------------------------------------------------------------------------------------------------------------

PROFILE = {"x": Profile((1, 1, 32), (1, 16, 32), (4, 64, 32))}


def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


def test_an_engine_is_built_without_a_gpu(linear, tmp_path, capfd):
    trt = rtx()
    plan = tmp_path / "engine.plan"
    engine("tensorrt-rtx").build(linear, plan, profiles=PROFILE)
    assert len(plan.read_bytes()) > 1000
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    assert capfd.readouterr() == ("", "")
    assert trt.__version__


def test_an_engine_for_one_target(linear, tmp_path):
    rtx()
    plans = []
    for target in ("sm89", "sm_120"):
        engine("tensorrt-rtx").build(linear, tmp_path / f"{target}.plan", profiles=PROFILE, target=target)
        plans.append((tmp_path / f"{target}.plan").read_bytes())
    assert plans[0] != plans[1]


def test_fixed_shapes_need_no_profile(tmp_path):
    rtx()
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, [4, 32])],
        [("y", TensorProto.FLOAT, [4, 48])],
        {"w": W},
    )
    engine("tensorrt-rtx").build(path, tmp_path / "engine.plan", profiles={})
    assert (tmp_path / "engine.plan").stat().st_size > 1000
    with pytest.raises(UsageError, match="max shape 8x32 does not fit input 'x', which is 4x32"):
        engine("tensorrt-rtx").build(path, tmp_path / "p", profiles={"x": Profile((4, 32), (4, 32), (8, 32))})


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ({}, r"input 'x' is \?x\?x32: give --min-shapes, --opt-shapes and --max-shapes for it"),
        ({**PROFILE, "z": PROFILE["x"]}, "shapes are given for 'z', which is no input: the inputs are x"),
        ({"x": Profile((1, 32), (1, 32), (1, 32))}, r"min shape 1x32 does not fit input 'x', which is \?x\?x32"),
        ({"x": Profile((1, 1, 32), (1, 1, 33), (4, 64, 32))}, "opt shape 1x1x33 does not fit input 'x'"),
        (
            {"x": Profile((1, 8, 32), (1, 4, 32), (4, 64, 32))},
            "the shapes of 'x' are not in order: every dimension needs min <= opt <= max",
        ),
    ],
)
def test_profiles_that_do_not_fit(linear, tmp_path, profiles, message):
    rtx()
    with pytest.raises(UsageError, match=message):
        engine("tensorrt-rtx").build(linear, tmp_path / "engine.plan", profiles=profiles)
    assert not (tmp_path / "engine.plan").exists()


def test_a_target_it_does_not_build_for(linear, tmp_path):
    rtx()
    with pytest.raises(EngineError, match=r"does not build for target 'sm90': choose from sm75, .*sm89"):
        engine("tensorrt-rtx").build(linear, tmp_path / "engine.plan", profiles=PROFILE, target="sm90")


def test_an_operator_it_does_not_have_is_named_with_its_node(tmp_path, capfd):
    rtx()
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Nonsense", ["x"], ["y"], name="odd", domain="nowhere")],
        [("x", TensorProto.FLOAT, [1])],
        [("y", TensorProto.FLOAT, [1])],
        domains=["nowhere"],
    )
    with pytest.raises(EngineError, match=r"cannot parse m\.onnx: node 'odd' \(Nonsense\): .*--engine onnxruntime") as caught:
        engine("tensorrt-rtx").build(path, tmp_path / "engine.plan", profiles={})
    assert one_line(caught)
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_says_what_to_install(linear, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match=re.escape("pip install 'fqonnx[tensorrt-rtx]'")):
        engine("tensorrt-rtx").build(linear, tmp_path / "engine.plan", profiles=PROFILE)


def test_a_build_that_fails_gives_the_reason(tmp_path, capfd):
    rtx()
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Reshape", ["x", "shape"], ["y"], name="fold")],
        [("x", TensorProto.FLOAT, ["n"])],
        [("y", TensorProto.FLOAT, [2, 3])],
        {"shape": np.array([2, 3])},
    )
    with pytest.raises(EngineError, match=r"cannot build m\.onnx: .*fold.*: keep the node's linear in float with --keep") as caught:
        engine("tensorrt-rtx").build(path, tmp_path / "engine.plan", profiles={"x": Profile((4,), (4,), (8,))})
    assert one_line(caught)
    assert not (tmp_path / "engine.plan").exists()
    assert capfd.readouterr() == ("", "")
