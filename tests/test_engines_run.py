"""Running engines: which are refused and why, which profile takes a sample, and what is bound to the device.

No GPU takes part: the library's interface is stood in for where an engine would run.
"""

from __future__ import annotations

import types
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from fqonnx import artifact
from fqonnx.build import build
from fqonnx.engines import EngineOptions, Profile, tensorrt_library, tensorrt_run
from fqonnx.engines.tensorrt_library import Gpu
from fqonnx.engines.tensorrt_run import BoundEngine, engine_of, load_engine, profile_for, require_runs_here, require_valid
from fqonnx.errors import ArtifactError, DataError, EngineError, UsageError
from fqonnx.recipe import Recipe
from fqonnx.report import EngineReport
from fqonnx.verify import verify
from tests.cli_support import K, one_line, run, write_data, write_mlp

L4, H200 = Gpu("NVIDIA L4", (8, 9)), Gpu("NVIDIA H200", (9, 0))


def report(engine="tensorrt-rtx", version="1.7.1.116", **more):
    return EngineReport(engine=engine, version=version, **more)


@pytest.mark.parametrize(
    ("built", "version", "gpu", "message"),
    [
        (report(), "1.7.1.116", L4, None),
        (report(target=("sm86", "sm89")), "1.7.1.116", L4, None),
        (report(target=("sm86", "sm89")), "1.7.1.116", H200, r"for sm86 and sm89, and here is NVIDIA H200 \(sm90\): build it again here"),
        (report(), "1.8.0.1", L4, r"TensorRT-RTX 1\.7\.1\.116 built this engine, and 1\.8\.0\.1 is installed: .* or install 1\.7\.1\.116$"),
        (report("tensorrt", "10.13.0", target=("sm90",)), "10.13.0", H200, None),
        (report("tensorrt", "10.13.0", target=("sm90",)), "10.14.1", H200, "TensorRT 10.13.0 built this engine, and 10.14.1 is installed"),
        (report("tensorrt", "10.13.0", version_compatible=True), "10.14.1", H200, None),
        (report("tensorrt", "10.13.0", version_compatible=True), "11.4.0", H200, None),
        (report("tensorrt", "10.13.0", version_compatible=True), "12.0.0", H200, "or install 10.13.0 or a later one"),
        (report("tensorrt", "10.13.0", version_compatible=True), "10.12.9", H200, "10.12.9 is installed"),
        (report("tensorrt", "10.13.0", version_compatible=True, target=("sm90",)), "11.4.0", L4, r"for sm90, and here is NVIDIA L4"),
    ],
)
def test_an_engine_of_another_gpu_or_version_is_refused(built, version, gpu, message):
    if message is None:
        require_runs_here(built, version, gpu)
    else:
        with pytest.raises(EngineError, match=message) as caught:
            require_runs_here(built, version, gpu)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"), [(3, "another version built it and it was not built for this GPU"), (32, "the file is damaged")]
)
def test_what_the_library_says_of_a_plan_is_put_in_words(flags, words):
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    heads = []

    def validity(head):
        heads.append(len(head))
        return trt.EngineValidity.INVALID, flags

    runtime = types.SimpleNamespace(engine_header_size=80, get_engine_validity=validity)
    with pytest.raises(EngineError, match=f"TensorRT-RTX .* refuses this engine: {words}: build it again"):
        require_valid(trt, runtime, b"0" * 1000)
    assert heads == [80]
    runtime.get_engine_validity = lambda _: (trt.EngineValidity.SUBOPTIMAL, 0)
    require_valid(trt, runtime, b"0" * 1000)


# --- build directories ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    folder = tmp_path_factory.mktemp("engine")
    profiles = [{"x": Profile((1, K), (1, K), (4, K))}, {"x": Profile((5, K), (8, K), (16, K))}]
    model, data = write_mlp(folder / "mlp.onnx"), write_data(folder / "d.npz")
    options = {"target": "sm89", "profiles": profiles, "engine_options": EngineOptions(optimization_level=1)}
    recipe = Recipe(transform="none", weights="rtn")
    build(model, folder / "out", recipe=recipe, calib_data=str(data), engine="tensorrt-rtx", **options)
    return folder / "out"


def test_a_build_directory_knows_what_its_engine_was_built_as(out):
    path, built = engine_of(artifact.open_artifact(out))
    assert path.name == "engine.plan"
    assert (built.engine, built.target, len(built.profiles)) == ("tensorrt-rtx", ("sm89",), 2)
    assert built.file_bytes == path.stat().st_size


def test_an_engine_is_refused_before_the_library_sees_it(out, monkeypatch):
    path, built = engine_of(artifact.open_artifact(out))
    monkeypatch.setattr(tensorrt_run, "this_gpu", lambda: H200)
    with pytest.raises(EngineError, match=r"this engine is for sm89, and here is NVIDIA H200 \(sm90\)"):
        load_engine(path, built)


def test_verify_runs_the_engine_where_asked(out, monkeypatch):
    monkeypatch.setattr(tensorrt_run, "this_gpu", lambda: H200)
    with pytest.raises(EngineError, match="this engine is for sm89"):
        verify(out.parent / "mlp.onnx", out, [], engine=True)
    done = run("verify", out.parent / "mlp.onnx", out, "--random-data", "--engine")
    assert done.code == 1
    assert "this engine is for sm89" in one_line(done.stderr)


def test_without_a_gpu_an_engine_does_not_run(out):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="finds no CUDA device here"):
        load_engine(*engine_of(artifact.open_artifact(out)))


def test_a_build_without_an_engine(tmp_path):
    model, data = write_mlp(tmp_path / "mlp.onnx"), write_data(tmp_path / "d.npz")
    build(model, tmp_path / "out", recipe=Recipe(transform="none", weights="rtn"), calib_data=str(data))
    with pytest.raises(ArtifactError, match="has no engine file: build it with --engine tensorrt or tensorrt-rtx"):
        engine_of(artifact.open_artifact(tmp_path / "out"))
    with pytest.raises(UsageError, match="out has no engine file: leave out --engine"):
        verify(model, tmp_path / "out", [], engine=True)


def test_shapes_are_for_engines(tmp_path):
    done = run("build", write_mlp(tmp_path / "m.onnx"), "-o", tmp_path / "out", "--random-calibration", "--max-shapes", f"x:8x{K}")
    assert done.code == 2
    assert "shapes are for --engine tensorrt and tensorrt-rtx" in one_line(done.stderr)


# --- profiles ---------------------------------------------------------------------------------------------------------------------------

TWO = report(
    profiles=(
        {"ids": ((1, 1), (1, 1), (8, 64)), "x": ((4,), (4,), (4,))},
        {"ids": ((1, 16), (1, 128), (8, 512)), "x": ((4,), (4,), (4,))},
    )
)


@pytest.mark.parametrize(("shape", "index"), [((1, 1), 0), ((8, 64), 0), ((1, 60), 0), ((2, 120), 1), ((8, 512), 1)])
def test_a_sample_takes_the_profile_that_fits_it_best(shape, index):
    assert profile_for(TWO, {"ids": shape, "x": (4,)}) == index


def test_a_shape_that_no_profile_takes():
    with pytest.raises(DataError, match="no profile for ids 9x1, x 4: ids may be 1x1 to 8x64; 1x16 to 8x512; build it with other"):
        profile_for(TWO, {"ids": (9, 1), "x": (4,)})
    assert profile_for(report(), {"x": (3,)}) == 0  # fixed shapes have no profile


# --- bound to the device ----------------------------------------------------------------------------------------------------------------


class FakeStream:
    cuda_stream = 7

    def __init__(self):
        self.waited = 0

    def synchronize(self):
        self.waited += 1


class FakeContext:
    """What an execution context does, on the CPU: ``y = 2 x``, read and written at the addresses that it was given."""

    def __init__(self, engine):
        self._engine, self.shapes, self.addresses, self.runs = engine, {}, {}, 0

    def set_optimization_profile_async(self, index, stream):
        assert stream == FakeStream.cuda_stream
        self.profile = index
        return self._engine.takes_profiles

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return shape[0] != 13

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def get_tensor_shape(self, name):
        return (-1, 3) if self._engine.data_dependent else self.shapes["x"]

    def execute_async_v3(self, stream):
        import ctypes

        assert stream == FakeStream.cuda_stream
        if self._engine.fails:
            return False
        count = self.shapes["x"][0] * self.shapes["x"][1]
        source, target = ((ctypes.c_float * count).from_address(self.addresses[name]) for name in ("x", "y"))
        for index in range(count):
            target[index] = 2 * source[index]
        self.runs += 1
        return True


class FakeEngine:
    num_io_tensors = 2

    def __init__(self, **how):
        self.takes_profiles, self.data_dependent, self.fails, self.no_memory = True, False, False, False
        self.__dict__.update(how)

    def create_execution_context(self):
        self.context = None if self.no_memory else FakeContext(self)
        return self.context

    def get_tensor_name(self, index):
        return "xy"[index]

    def get_tensor_mode(self, name):
        return types.SimpleNamespace(name="INPUT" if name == "x" else "OUTPUT")

    def get_tensor_dtype(self, name):
        return types.SimpleNamespace(name="FLOAT")


BUILT = report(profiles=({"x": ((1, 3), (1, 3), (2, 3))}, {"x": ((3, 3), (4, 3), (16, 3))}))


def test_a_run_reads_and_writes_where_it_was_bound():
    engine, stream = FakeEngine(), FakeStream()
    x = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    bound = BoundEngine(engine, BUILT, {"x": x}, stream=stream)
    assert engine.context.profile == 1
    bound.run()
    assert torch.equal(bound.outputs["y"], 2 * x)
    x += 1
    bound.run()
    assert torch.equal(bound.outputs["y"], 2 * x)
    assert (engine.context.runs, stream.waited) == (2, 3)


def test_a_graph_is_captured_once_and_replayed(monkeypatch):
    replayed = []

    class FakeGraph:
        def replay(self):
            replayed.append(1)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda captured, stream: nullcontext())
    engine = FakeEngine()
    bound = BoundEngine(engine, BUILT, {"x": torch.ones(1, 3)}, stream=FakeStream(), graph=True)
    assert engine.context.runs == 2  # to warm up, and to capture
    bound.run()
    bound.run()
    assert (engine.context.runs, len(replayed)) == (2, 2)


def test_a_graph_that_cannot_be_captured(monkeypatch):
    def refuse(captured, stream):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.raises(EngineError, match=r"no CUDA graph can be captured .*\(operation not permitted when stream is capturing\)"):
        BoundEngine(FakeEngine(), BUILT, {"x": torch.ones(1, 3)}, stream=FakeStream(), graph=True)


@pytest.mark.parametrize(
    ("how", "x", "message"),
    [
        ({"no_memory": True}, torch.ones(1, 3), "no room to run"),
        ({"takes_profiles": False}, torch.ones(1, 3), "does not take its optimization profile 0"),
        ({}, torch.ones(13, 3), "does not take input 'x' of shape 13x3"),
        ({}, torch.ones(3, 4).T, "does not take input 'x' of shape 4x3"),
        ({"data_dependent": True}, torch.ones(1, 3), "output 'y' depends on the input's values"),
        ({"fails": True}, torch.ones(1, 3), "failed to run"),
    ],
)
def test_what_does_not_run_says_why(how, x, message):
    with pytest.raises(EngineError, match=message):
        BoundEngine(FakeEngine(**how), BUILT, {"x": x}, stream=FakeStream()).run()


def test_gpus_are_named_by_their_target():
    assert (L4.target, H200.target, Gpu("x", (12, 0)).target) == ("sm89", "sm90", "sm120")
    assert tensorrt_library.first_line("IBuilder::buildSerializedNetwork: Error\n Code 10: no  tactic.") == "Error Code 10: no tactic"


# --- verification in the engine ---------------------------------------------------------------------------------------------------------


def test_a_build_is_verified_in_its_engine_where_that_runs(tmp_path, monkeypatch):
    """The engine's runner is stood in for by one that answers 1.25 times the model's outputs: an error of 25 % is found."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from polygraphy.backend.onnxrt import OnnxrtRunner

    from fqonnx.engines.onnxruntime import session

    class Louder(OnnxrtRunner):
        def infer_impl(self, feed_dict):
            return {name: 1.25 * array for name, array in super().infer_impl(feed_dict).items()}

    opened = []

    def engine_runner(name, path, built):
        opened.append((path.name, built.engine))
        return Louder(session(path.with_name("model.onnx")), name=name)

    model, data = write_mlp(tmp_path / "mlp.onnx"), write_data(tmp_path / "d.npz")
    choices = {"recipe": Recipe(scheme="w8a8", transform="none", weights="rtn"), "calib_data": str(data), "engine": "tensorrt-rtx"}
    monkeypatch.setattr(tensorrt_run, "runner", engine_runner)
    monkeypatch.setattr(tensorrt_run, "this_gpu", lambda: L4)
    found = build(model, tmp_path / "out", **choices, target="sm89")
    assert opened == [("engine.plan", "tensorrt-rtx")]
    assert found.outputs["y"].rel_l2 == pytest.approx(0.25, abs=0.02)
    assert "the outputs are the engine's" in found.notes
    by_hand = verify(model, tmp_path / "out", [{"x": np.ones((1, K), np.float32)}], engine=True)
    assert by_hand.outputs["y"].rel_l2 == pytest.approx(0.25, abs=0.02)
    assert by_hand.engine.target == ("sm89",)
    elsewhere = build(model, tmp_path / "out", **choices, target="sm86", force=True)
    assert len(opened) == 2
    assert elsewhere.outputs["y"].rel_l2 < 0.05
    assert "the engine was not run here: the outputs are ONNX Runtime's of the same model" in elsewhere.notes


# --- the report -------------------------------------------------------------------------------------------------------------------------


def test_the_report_shows_what_became_of_the_groups():
    import io

    from rich.console import Console

    from fqonnx.console import print_report
    from fqonnx.report import EngineGroup, EngineLayer, Report
    from fqonnx.report.html import render

    groups = [EngineGroup(name=f"g{i}", weights="Int4", product="Half", how="one <kernel>", layer="l") for i in range(3)]
    groups.append(EngineGroup(name="g3", weights=None, product=None, how="not found among the engine's layers"))
    layers = (
        EngineLayer(name="fc<1>", kind="gemm", inputs=("Half",), constants=("Int4",), outputs=("Half",), nodes=("n",), groups=("g0",)),
    )
    built = report(target=("sm86", "sm89"), file_bytes=2_500_000, seconds=3.0, groups=tuple(groups), layers=layers, profiles=({}, {}))
    shown = Report(model="m", candidate="c", passed=True, engine=built)
    text = io.StringIO()
    print_report(shown, Console(file=text, width=120))
    lines = text.getvalue().splitlines()
    assert lines[0] == "Engine: tensorrt-rtx 1.7.1.116 for sm86 and sm89, 2.50 MB, 1 layers, 2 profiles, built in 3.00 s"
    assert [line.split() for line in lines[3:5]] == [
        ["one", "<kernel>", "3", "Int4", "Half"],
        ["not", "found", "among", "the", "engine's", "layers", "1", "?", "?"],
    ]
    page = render(shown)
    for part in ("id='engine'", "one &lt;kernel&gt;", "fc&lt;1&gt;", "Half, Int4", "All 1 layers"):
        assert part in page
    assert Report.from_dict(shown.to_dict()) == shown
    assert EngineReport.from_dict(built.to_dict()) == built
    assert "its layers are not told, built in 3.00 s, taken from the cache" in render(
        Report(model="m", candidate="c", passed=True, engine=report(seconds=3.0, cached=True))
    )
