"""TensorRT and TensorRT-RTX engines: real builds by TensorRT-RTX, which needs no GPU, and through the same code what is TensorRT's own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from fqonnx.build import build
from fqonnx.engines import EngineOptions, Profile, engine, tensorrt, tensorrt_library
from fqonnx.engines.tensorrt_layers import Origin, Weights, read_layers, summarize
from fqonnx.engines.tensorrt_library import RTX, TENSORRT, Gpu
from fqonnx.engines.tensorrt_progress import Tracker
from fqonnx.errors import EngineError, UsageError
from fqonnx.recipe import Recipe
from fqonnx.report import EngineReport, load_report
from tests.cli_support import K, write_data, write_mlp
from tests.engine_models import W, save, write_linear

PROFILE = {"x": Profile((1, 1, 32), (1, 16, 32), (4, 64, 32))}


@pytest.fixture
def linear(tmp_path):
    return write_linear(tmp_path / "model.onnx")


@pytest.fixture
def rtx(tmp_path, monkeypatch):
    """TensorRT-RTX with an empty cache."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    monkeypatch.setenv(tensorrt.CACHE_VARIABLE, str(tmp_path / "cache"))
    return engine("tensorrt-rtx")


def one_line(caught):
    assert "\n" not in str(caught.value)
    return True


# --- builds ---------------------------------------------------------------------------------------------------------------------------


def test_an_engine_is_built_without_a_gpu(rtx, linear, tmp_path, capfd):
    import tensorrt_rtx

    plan = tmp_path / "engine.plan"
    report = rtx.build(linear, plan, profiles=[PROFILE])
    assert len(plan.read_bytes()) == report.file_bytes > 1000
    assert (report.engine, report.version, report.target, report.cached) == ("tensorrt-rtx", tensorrt_rtx.__version__, (), False)
    assert report.profiles == ({"x": ((1, 1, 32), (1, 16, 32), (4, 64, 32))},)
    assert report.seconds > 0
    assert [layer.nodes for layer in report.layers if layer.nodes] == [("fc",)]
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    assert capfd.readouterr() == ("", "")


def test_engines_for_one_target_and_for_several(rtx, linear, tmp_path):
    plans, targets = [], []
    for target in ("sm89", "sm_120", "sm80,sm86,sm89,sm120"):
        targets.append(rtx.build(linear, tmp_path / "engine.plan", profiles=[PROFILE], target=target).target)
        plans.append((tmp_path / "engine.plan").read_bytes())
    assert targets == [("sm89",), ("sm120",), ("sm80", "sm86", "sm89", "sm120")]
    assert len(set(plans)) == 3


def test_an_engine_has_a_profile_for_each_set_of_shapes(rtx, linear, tmp_path):
    profiles = [{"x": Profile((1, 1, 32), (1, 1, 32), (1, 8, 32))}, {"x": Profile((1, 128, 32), (4, 128, 32), (8, 512, 32))}]
    report = rtx.build(linear, tmp_path / "engine.plan", profiles=profiles)
    assert [given["x"][2] for given in report.profiles] == [(1, 8, 32), (8, 512, 32)]
    # The listing has the layers of both.
    assert len([layer for layer in report.layers if "fc" in layer.nodes]) == 2


def test_fixed_shapes_need_no_profile(rtx, tmp_path):
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, [4, 32])],
        [("y", TensorProto.FLOAT, [4, 48])],
        {"w": W},
    )
    assert rtx.build(path, tmp_path / "engine.plan").file_bytes > 1000
    with pytest.raises(UsageError, match="max shape 8x32 does not fit input 'x', which is 4x32"):
        rtx.build(path, tmp_path / "p", profiles=[{"x": Profile((4, 32), (4, 32), (8, 32))}])


def test_external_data_is_found(rtx, linear, tmp_path):
    onnx.save(onnx.load(linear), tmp_path / "e.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert rtx.build(tmp_path / "e.onnx", tmp_path / "engine.plan", profiles=[PROFILE]).file_bytes > 1000


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ([], r"input 'x' is \?x\?x32: give --min-shapes, --opt-shapes and --max-shapes for it"),
        ([PROFILE, {}], r"input 'x' is \?x\?x32: give"),
        ([{**PROFILE, "z": PROFILE["x"]}], "shapes are given for 'z', which is no input: the inputs are x"),
        ([{"x": Profile((1, 32), (1, 32), (1, 32))}], r"min shape 1x32 does not fit input 'x', which is \?x\?x32"),
        ([{"x": Profile((1, 1, 32), (1, 1, 33), (4, 64, 32))}], "opt shape 1x1x33 does not fit input 'x'"),
        (
            [{"x": Profile((1, 8, 32), (1, 4, 32), (4, 64, 32))}],
            "the shapes of 'x' are not in order: every dimension needs min <= opt <= max",
        ),
    ],
)
def test_profiles_that_do_not_fit(rtx, linear, tmp_path, profiles, message):
    with pytest.raises(UsageError, match=message):
        rtx.build(linear, tmp_path / "engine.plan", profiles=profiles)
    assert not (tmp_path / "engine.plan").exists()


@pytest.mark.parametrize("target", ["sm90", "sm89,sm90"])
def test_a_target_it_does_not_build_for(rtx, linear, tmp_path, target):
    with pytest.raises(EngineError, match=r"does not build for target 'sm90': choose from sm75, .*sm89"):
        rtx.build(linear, tmp_path / "engine.plan", profiles=[PROFILE], target=target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineOptions(timing_cache=Path("t")), "--timing-cache is for --engine tensorrt"),
        (EngineOptions(version_compatible=True), "--version-compatible is for --engine tensorrt"),
        (EngineOptions(optimization_level=6), "optimization level 6 is out of range: give 0 to 5"),
    ],
)
def test_options_it_has_no_use_for(rtx, options, message):
    with pytest.raises(UsageError, match=message):
        rtx.require(None, options)


def test_the_optimization_level_is_part_of_what_is_built(rtx, linear, tmp_path):
    rtx.build(linear, tmp_path / "engine.plan", profiles=[PROFILE])
    assert not rtx.build(linear, tmp_path / "engine.plan", profiles=[PROFILE], options=EngineOptions(optimization_level=0)).cached


# --- errors ---------------------------------------------------------------------------------------------------------------------------


def test_an_operator_it_does_not_have_is_named_with_its_node(rtx, tmp_path, capfd):
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Nonsense", ["x"], ["y"], name="odd", domain="nowhere")],
        [("x", TensorProto.FLOAT, [1])],
        [("y", TensorProto.FLOAT, [1])],
        domains=["nowhere"],
    )
    with pytest.raises(EngineError, match=r"cannot parse m\.onnx: node 'odd' \(Nonsense\): .*--engine onnxruntime") as caught:
        rtx.build(path, tmp_path / "engine.plan")
    assert one_line(caught)
    assert capfd.readouterr() == ("", "")


def test_a_node_of_a_group_can_be_kept_in_float(rtx, tmp_path):
    node = helper.make_node("Nonsense", ["x"], ["y"], name="odd", domain="nowhere")
    prop = node.metadata_props.add()
    prop.key, prop.value = "fqonnx.group", "layers.0.up"
    path = save(tmp_path / "m.onnx", [node], [("x", TensorProto.FLOAT, [1])], [("y", TensorProto.FLOAT, [1])], domains=["nowhere"])
    with pytest.raises(EngineError, match=r"\(Nonsense, of group 'layers\.0\.up'\): .*keep it in float with --keep 'layers\.0\.up'"):
        rtx.build(path, tmp_path / "engine.plan")


def test_a_build_that_fails_gives_the_reason(rtx, tmp_path, capfd):
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Reshape", ["x", "shape"], ["y"], name="fold")],
        [("x", TensorProto.FLOAT, ["n"])],
        [("y", TensorProto.FLOAT, [2, 3])],
        {"shape": np.array([2, 3])},
    )
    with pytest.raises(
        EngineError, match=r"cannot build m\.onnx: .*: this is node 'fold' \(Reshape\): keep it in float with --keep"
    ) as caught:
        rtx.build(path, tmp_path / "engine.plan", profiles=[{"x": Profile((4,), (4,), (8,))}])
    assert one_line(caught)
    assert not (tmp_path / "engine.plan").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("message", "node"),
    [
        ("Error Code 4: layers.0.up/sums: no tactic (in cast)", "node 'layers.0.up' (W4A4Gemm, of group 'g')"),
        ("fold: ISHUFFLE, reshape changes volume", "node 'fold' (Reshape)"),
        ("{ForeignNode[fold...layers.0.up.add]} failed", None),
        ("at a layer [ONNX Layer: a] failed", "node 'a' (Add)"),
        ("there is a fault", None),
        ("folded away", None),
    ],
)
def test_the_node_that_a_message_names_is_found(message, node):
    origin = Origin({"layers.0.up": "W4A4Gemm", "fold": "Reshape", "a": "Add", "": "Add"}, {"layers.0.up": "g"}, {}, {})
    assert origin.node_in(message) == node


@pytest.mark.parametrize("flavour", [RTX, TENSORRT], ids=lambda flavour: flavour.name)
def test_a_missing_package_says_what_to_install(flavour, linear, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, flavour.module, None)
    with pytest.raises(EngineError, match=re.escape(f"pip install 'fqonnx[{flavour.name}]'")):
        engine(flavour.name).build(linear, tmp_path / "engine.plan", profiles=[PROFILE])


def test_one_process_takes_one_of_the_two(rtx, linear, tmp_path, monkeypatch):
    rtx.build(linear, tmp_path / "engine.plan", profiles=[PROFILE])
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    with pytest.raises(EngineError, match="one of TensorRT and TensorRT-RTX a process: use TensorRT in another process"):
        TENSORRT.load()


# --- progress and interruption --------------------------------------------------------------------------------------------------------


class Recorder:
    """A ``Progress`` that keeps what it is told."""

    def __init__(self, on_advance=lambda: None):
        self.names, self.done, self._on_advance = [], [], on_advance

    @contextmanager
    def task(self, name, total=None):
        self.names.append((name, total))
        yield self

    def advance(self, amount=1):
        self._on_advance()
        self.done.append(amount)


def test_progress_is_shown(rtx, linear, tmp_path):
    told = Recorder()
    rtx.build(linear, tmp_path / "engine.plan", profiles=[PROFILE], progress=told)
    assert told.names == [("Building the engine", 100)]
    assert len(told.done) > 3
    assert sum(told.done) == pytest.approx(100)
    assert min(told.done) > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_stops_and_leaves_nothing(rtx, linear, tmp_path, number):
    class StoppedError(Exception):
        pass

    def stop(*_):
        raise StoppedError

    before = signal.signal(number, stop)
    try:
        with pytest.raises(StoppedError):
            rtx.build(linear, tmp_path / "engine.plan", profiles=[PROFILE], progress=Recorder(lambda: signal.raise_signal(number)))
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_bar_that_cannot_be_drawn_stops_the_build(rtx, linear, tmp_path):
    def fail():
        raise BrokenPipeError("gone")

    with pytest.raises(BrokenPipeError, match="gone"):
        rtx.build(linear, tmp_path / "engine.plan", profiles=[PROFILE], progress=Recorder(fail))
    assert not (tmp_path / "engine.plan").exists()


def test_phases_nest():
    tracker = Tracker()
    tracker.start("whole", None, 4)
    tracker.step("whole", 0)
    assert tracker.share == 0.25
    tracker.start("part", "whole", 2)
    tracker.step("part", 0)
    assert tracker.share == 0.375
    tracker.start("grain", "part", 5)
    tracker.step("grain", 4)
    assert tracker.share == 0.5
    tracker.finish("grain")
    tracker.finish("part")
    assert tracker.share == 0.5  # never back
    tracker.step("whole", 1)
    tracker.step("nobody's", 1)
    tracker.finish("whole")
    assert tracker.share == 1


# --- the cache ------------------------------------------------------------------------------------------------------------------------


def test_the_same_engine_is_built_once(rtx, linear, tmp_path):
    first = rtx.build(linear, tmp_path / "a.plan", profiles=[PROFILE])
    second = rtx.build(linear, tmp_path / "b.plan", profiles=[PROFILE])
    assert (first.cached, second.cached) == (False, True)
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()
    assert (second.layers, second.seconds) == (first.layers, first.seconds)
    assert not rtx.build(linear, tmp_path / "b.plan", profiles=[PROFILE], options=EngineOptions(rebuild=True)).cached


def test_another_model_shape_or_target_is_another_engine(rtx, linear, tmp_path):
    rtx.build(linear, tmp_path / "a.plan", profiles=[PROFILE])
    assert not rtx.build(linear, tmp_path / "b.plan", profiles=[PROFILE], target="sm89").cached
    assert not rtx.build(linear, tmp_path / "b.plan", profiles=[{"x": Profile((1, 1, 32), (1, 16, 32), (4, 65, 32))}]).cached
    model = onnx.load(linear)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(W + 1, "w"))
    onnx.save(model, linear)
    assert not rtx.build(linear, tmp_path / "b.plan", profiles=[PROFILE]).cached


@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_a_damaged_cache_is_not_used(rtx, linear, tmp_path, suffix):
    rtx.build(linear, tmp_path / "a.plan", profiles=[PROFILE])
    (kept,) = (tmp_path / "cache").glob(f"*{suffix}")
    kept.write_bytes(kept.read_bytes()[:-100])
    again = rtx.build(linear, tmp_path / "b.plan", profiles=[PROFILE])
    assert not again.cached
    assert (tmp_path / "b.plan").stat().st_size == again.file_bytes


def test_a_cache_that_cannot_be_written_is_no_failure(rtx, linear, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv(tensorrt.CACHE_VARIABLE, str(tmp_path / "file"))
    assert not rtx.build(linear, tmp_path / "a.plan", profiles=[PROFILE]).cached
    assert "the engine is not kept for the next build" in caplog.text


# --- what became of the model -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """By scheme, the report of a build of a small model, for a dynamic batch."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    folder = tmp_path_factory.mktemp("built")
    model, data = write_mlp(folder / "mlp.onnx"), write_data(folder / "data.npz")

    def of(scheme: str, **choices: Any) -> tuple[EngineReport, Path]:
        out = folder / scheme
        recipe = Recipe(scheme=scheme, transform="hadamard", weights="rtn")
        build(model, out, recipe=recipe, calib_data=str(data), engine="tensorrt-rtx", force=True, **choices)
        report = load_report(out / "report.json").engine
        assert report is not None
        return report, out / "model.onnx"

    return of


@pytest.mark.parametrize(("scheme", "stored"), [("w4a4", "Int4"), ("w4a8", "Int4"), ("w4a16", "Int4"), ("w8a16", "Int8")])
def test_weights_stay_small_in_the_engine(built, scheme, stored):
    report, _ = built(scheme)
    assert [group.name for group in report.groups] == ["layers.0.up", "layers.0.down"]
    assert {group.weights for group in report.groups} == {stored}
    assert all(group.layer in {layer.name for layer in report.layers} for group in report.groups)
    assert sum(len(groups) for groups in report.fates.values()) == 2
    # What TensorRT-RTX 1.7 does with them, on any GPU: no integer product.
    assert {group.product for group in report.groups} == {"Float"}


def test_the_model_is_not_lowered_for_kernels_that_the_engine_does_not_run(built):
    report, model = built("w4a4", target="sm89")
    assert report.target == ("sm89",)
    assert [node.attributes["packed"].as_int() for node in ir.load(model).graph if node.op_type == "FlatQuantize"] == [0, 0]


def test_profiles_of_a_build_are_those_of_the_data_where_none_are_given(built):
    assert built("w8a16")[0].profiles == ({"x": ((1, K), (1, K), (1, K))},)
    given = [{"x": Profile((1, K), (4, K), (9, K))}, {"x": Profile((10, K), (16, K), (32, K))}]
    assert [profile["x"] for profile in built("w8a16", profiles=given)[0].profiles] == [
        ((1, K), (4, K), (9, K)),
        ((10, K), (16, K), (32, K)),
    ]


@pytest.mark.parametrize(
    ("scheme", "group_size", "kernels"),
    [("w4a16", 0, "two"), ("w4a16", 128, "one"), ("w8a16", 0, "one"), ("w8a8", 0, "one"), ("w4a4", 0, "two"), ("w4a8", 0, "two")],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_in_how_many_kernels_tensorrt_rtx_multiplies(rtx, tmp_path, dtype, scheme, group_size, kernels):
    """The table of docs/deploy.md. A change here is a new version of TensorRT-RTX: measure it again."""
    element, rng = helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), np.random.default_rng(0)
    model = save(
        tmp_path / "m.onnx",
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="up"),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "v"], ["y"], name="down"),
        ],
        [("x", element, ["b", 256])],
        [("y", element, ["b", 256])],
        {"w": (rng.normal(size=(256, 512)) / 16).astype(dtype), "v": (rng.normal(size=(512, 256)) / 16).astype(dtype)},
    )
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(4, 256)).astype(dtype))
    recipe = Recipe(scheme=scheme, group_size=group_size, transform="none", weights="rtn")
    profiles = [{"x": Profile((1, 256), (16, 256), (64, 256))}]
    build(model, tmp_path / "out", recipe=recipe, calib_data=str(tmp_path / "d.npz"), engine="tensorrt-rtx", profiles=profiles)
    report = load_report(tmp_path / "out" / "report.json").engine
    widened = "Float" if scheme in ("w4a4", "w4a8") or dtype == np.float32 else "Half"
    how = f"one kernel reads the {scheme[1]}-bit weight"
    if kernels == "two":
        how = f"a kernel of its own widens the {scheme[1]}-bit weight to {widened}, then {widened} is multiplied"
    assert {group.how for group in report.groups} == {how}


def listed(name, kind, inputs, constants, outputs, nodes, *, between="\x1f", older=False):
    """A line as the inspector writes it, or as it did before TensorRT 11."""

    def tensors(types):
        what = "Dimensions: [8,8], Format/Datatype: Row major linear {} format" if older else "Datatype: {}, Format: (Linear) Row major"
        return ", ".join(f" {{ Name: t{i}, {what.format(kind)} }}" for i, kind in enumerate(types))

    fields = [
        f"Inputs: [{tensors(inputs)}]",
        f"Constants: [{tensors(constants)}]",
        f"Outputs: [{tensors(outputs)}]",
        "TacticName: , StreamId: 0",
    ]
    metadata = between.join(f"[ONNX Layer: {node}]" for node in nodes)
    return f"Name: {name}, LayerType: {kind}, {', '.join(fields)}, TacticName: , StreamId: 0, Metadata: {metadata}"


LISTING = "\n".join(
    [
        "Layers:",
        listed("widen", "kgen", [], ["Int4"], ["Half"], ["a/w_float"]),
        listed("joined", "runtime_function", ["Half"], [], ["Half"], ["a/sums"]),
        listed("product", "gemm", ["Half"], [], ["Half"], ["a/sums", "a/y", "add[0]"]),
        listed("one", "gemm", ["FP16"], ["INT4"], ["BF16"], ["b", "b.dequantize"], between="\x1e", older=True),
        listed("folded", "gemm", ["Float"], ["Float"], ["Float"], ["c"]),
        listed("d", "PluginV3", ["Int8", "Float"], [], ["Half"], ["d"]),
        "",
        "I/O Tensors:",
        " Name: x, IOMode: Input, DataType: Float, LayerType: none",
    ]
)


def test_a_listing_is_traced_back_to_groups():
    origin = Origin(
        ops={},
        groups={"a": "A", "b": "B", "b.dequantize": "B", "c": "C", "d": "D"},
        calls={"a": "W4A4Gemm", "d": "W4A4Gemm"},
        weights={"A": Weights(4, {"a", "a/sums"}), "B": Weights(4, {"b"}), "C": Weights(8, {"c"}), "D": Weights(4, {"d"}), "E": Weights(4)},
    )
    layers = read_layers(LISTING, origin)
    assert [layer.name for layer in layers] == ["widen", "joined", "product", "one", "folded", "d"]
    assert layers[2].nodes == ("a/sums", "a/y", "add[0]")
    assert (layers[3].inputs, layers[3].constants, layers[3].outputs) == (("Half",), ("Int4",), ("BFloat16",))
    assert {group.name: (group.weights, group.product, group.layer) for group in summarize(layers, origin)} == {
        "A": ("Int4", "Half", "product"),
        "B": ("Int4", "BFloat16", "one"),
        "C": ("Float", "Float", "folded"),
        "D": ("Int4", "Int4", "d"),
        "E": (None, None, None),
    }
    how = {group.name: group.how for group in summarize(layers, origin)}
    assert how["A"] == "a kernel of its own widens the 4-bit weight to Half, then Half is multiplied"
    assert how["B"] == "one kernel reads the 4-bit weight"
    assert how["C"] == "the builder made the 8-bit weight Float: nothing of it is left in the engine"
    assert how["D"] == "the plugin multiplies integer codes"
    assert how["E"] == "not found among the engine's layers"


def layer(node, *, plugin=False):
    return tensorrt.NetworkLayer(node, plugin)


@pytest.mark.parametrize(
    ("flavour", "layers", "message"),
    [
        (RTX, [layer("a/sums"), layer("a/y")], None),
        (RTX, [layer("a", plugin=True)], "made a plugin of node 'a' (W4A4Gemm) instead of its body"),
        (RTX, [layer("b/sums")], "made nothing of node 'a' (W4A4Gemm) instead of its body"),
        (TENSORRT, [layer("a", plugin=True), layer("b/y")], None),
        (TENSORRT, [layer("a/sums")], "made its body of standard operators of node 'a' (W4A4Gemm) instead of the plugin"),
        (TENSORRT, [layer("a")], "made nothing of node 'a' (W4A4Gemm) instead of the plugin"),
        (TENSORRT, [layer("a", plugin=True), layer("a/y")], None),  # another node's name may begin alike
        (RTX, [layer("a", plugin=True), layer("a/y")], "made a plugin of node 'a'"),
    ],
)
def test_every_op_becomes_what_it_should(flavour, layers, message):
    origin = Origin({}, {}, {"a": "W4A4Gemm"}, {})
    if message is None:
        tensorrt.require_taken(flavour, layers, origin)
    else:
        with pytest.raises(EngineError, match=re.escape(message)):
            tensorrt.require_taken(flavour, layers, origin)


# --- TensorRT -------------------------------------------------------------------------------------------------------------------------


class FakeRegistry:
    """TensorRT's plugin registry, which knows the plugins once their library is loaded."""

    def __init__(self, *, takes: bool) -> None:
        self.loaded, self._takes = [], takes

    def get_creator(self, name, version, namespace):
        assert (version, namespace) == ("1", "fqonnx")
        return name if self.loaded and self._takes else None

    def load_library(self, path):
        self.loaded.append(path)


@pytest.fixture
def gpu(monkeypatch):
    found = Gpu("NVIDIA L4", (8, 9))
    for module in (tensorrt, tensorrt_library):
        monkeypatch.setattr(module, "this_gpu", lambda: found)
    return found


def fake_tensorrt(monkeypatch, tmp_path, *, takes=True):
    library = tmp_path / "libfqonnx.so"
    library.touch()
    monkeypatch.setenv("FQONNX_LIBRARY", str(library))
    registry = FakeRegistry(takes=takes)
    return types.SimpleNamespace(__version__="10.13.0", get_plugin_registry=lambda: registry), registry


def test_plugins_are_registered_once(monkeypatch, tmp_path):
    trt, registry = fake_tensorrt(monkeypatch, tmp_path)
    tensorrt_library.load_plugins(trt)
    tensorrt_library.load_plugins(trt)
    assert registry.loaded == [str(tmp_path / "libfqonnx.so")]


def test_a_library_without_plugins(monkeypatch, tmp_path):
    trt, _ = fake_tensorrt(monkeypatch, tmp_path, takes=False)
    with pytest.raises(EngineError, match=r"TensorRT 10\.13\.0 finds no fqonnx plugins in .*libfqonnx\.so: run `fqonnx plugin build`"):
        tensorrt_library.load_plugins(trt)


def test_tensorrt_builds_for_the_gpu_of_the_machine(gpu):
    builder = engine("tensorrt")
    assert builder.lowering(None) == "sm89"
    assert builder.capabilities(None, None) == builder.capabilities(None, "sm_89") == [(8, 9)]
    with pytest.raises(EngineError, match=r"here NVIDIA L4 \(sm89\), not for sm90: leave --target out, or build on such a GPU"):
        builder.capabilities(None, "sm90")
    assert engine("tensorrt-rtx").lowering("sm89") is None


def test_without_a_gpu_tensorrt_says_so(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="finds no CUDA device here"):
        engine("tensorrt").lowering(None)


def test_the_parser_gets_calls_without_bodies(tmp_path):
    """A plugin is then all that TensorRT's parser can make of a call."""
    from fqonnx.model import load

    write_mlp(tmp_path / "mlp.onnx")
    write_data(tmp_path / "data.npz")
    recipe = Recipe(transform="hadamard", weights="rtn")
    build(tmp_path / "mlp.onnx", tmp_path / "out", recipe=recipe, calib_data=str(tmp_path / "data.npz"))
    for inline in (False, True):
        parsed = onnx.ModelProto.FromString(tensorrt._parsable(load(tmp_path / "out" / "model.onnx"), inline=inline))
        calls = [node.op_type for node in parsed.graph.node if node.domain == "fqonnx"]
        assert calls == ([] if inline else ["FlatQuantize", "W4A4Gemm"] * 2)
        assert not [function for function in parsed.functions if function.domain == "fqonnx"]


STAND_IN = """
import sys, types
import tensorrt_rtx
stand_in = types.ModuleType("tensorrt")
stand_in.__dict__.update({name: value for name, value in vars(tensorrt_rtx).items() if not name.startswith("__")}, __version__="11.4.0")
sys.modules["tensorrt"] = stand_in
from pathlib import Path
from fqonnx.engines import EngineOptions, Profile, engine, tensorrt, tensorrt_library
gpu = tensorrt_library.Gpu("NVIDIA L4", (8, 9))
tensorrt.this_gpu, tensorrt.load_plugins, tensorrt.plugin_library = lambda: gpu, lambda trt: None, lambda: Path(sys.argv[1])
def build(**options):
    profiles = [{"x": Profile((1, 32), (8, 32), (16, 32))}]
    return engine("tensorrt").build(Path(sys.argv[1]), Path(sys.argv[2]), profiles=profiles, options=EngineOptions(**options))
"""


def test_tensorrts_own_settings_are_made(tmp_path):
    """All but plugins, on TensorRT-RTX's library under TensorRT's name: configuration by Polygraphy, timing cache, GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model, plan, cache = write_mlp(tmp_path / "mlp.onnx"), tmp_path / "engine.plan", tmp_path / "cache"
    environment = {**os.environ, tensorrt.CACHE_VARIABLE: str(cache)}

    def run(code, model=model):
        command = [sys.executable, "-W", "error", "-c", STAND_IN + code, model, plan]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    assert run("r = build(); print(r.engine, r.version, r.gpu, r.target, r.cached)") == "tensorrt 11.4.0 NVIDIA L4 ('sm89',) False"
    assert plan.stat().st_size > 1000
    timing = cache / "timing-11.4.0-sm89.cache"
    assert timing.stat().st_size > 0
    given = tmp_path / "mine.cache"
    assert run(f"print(build(timing_cache=Path({str(given)!r}), rebuild=True).cached)") == "False"
    assert given.stat().st_size > 0
    assert run("print(build().cached)") == "True"
    # TensorRT-RTX has no lean runtime to put into a plan.
    assert "EngineError: TensorRT cannot build mlp.onnx: " in run("build(version_compatible=True)")
    data = write_data(tmp_path / "d.npz")
    build(model, tmp_path / "out", recipe=Recipe(transform="none", weights="rtn"), calib_data=str(data))
    assert run("build()", tmp_path / "out" / "model.onnx").endswith(
        "cannot parse model.onnx: node 'layers.0.up.flat_quantize' (FlatQuantize, of group 'layers.0.up'): "
        "the library of plugins has none for it: build it anew with `fqonnx plugin build`"
    )


@pytest.mark.gpu
def test_tensorrt_runs_the_ops_in_plugins(tmp_path, monkeypatch):
    """Runs wherever TensorRT and a GPU are, and the plugins are built."""
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv(tensorrt.CACHE_VARIABLE, str(tmp_path / "cache"))
    code = f"""
from fqonnx.build import build
from fqonnx.recipe import Recipe
from tests.cli_support import write_data, write_mlp
from pathlib import Path
folder = Path({str(tmp_path)!r})
model, data = write_mlp(folder / "mlp.onnx"), write_data(folder / "data.npz")
report = build(model, folder / "out", recipe=Recipe(transform="hadamard", weights="rtn"), calib_data=str(data), engine="tensorrt")
assert all(group.how == "the plugin multiplies integer codes" for group in report.engine.groups), report.engine.groups
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
