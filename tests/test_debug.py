"""``fqonnx debug``: bisection over the groups of a build, and Polygraphy with the plugins."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fqonnx import artifact
from fqonnx.artifact import open_artifact
from fqonnx.build import FloatModel, build
from fqonnx.calib.solution import GroupSolution
from fqonnx.debug import Bisection, Step, StoredSolutions, bisect
from fqonnx.errors import ArtifactError, DataError, ModelError, UsageError
from fqonnx.recipe import Recipe
from fqonnx.verify import verify
from tests.cli_support import K, one_line, run, run_process, write_data, write_mlp

GROUPS = tuple(f"layers.{i}.{name}" for i in range(3) for name in ("up", "down"))


def write_gated(path: Path) -> Path:
    """``x [batch, 128] -> y``: q, k and v merged, a gated activation, widths that are no multiples of 16."""
    rng = np.random.default_rng(0)
    constants: dict[str, np.ndarray] = {}

    def linear(name: str, x: str, k: int, n: int) -> list[onnx.NodeProto]:
        constants[f"w_{name}"] = (rng.normal(size=(k, n)) / k**0.5).astype(np.float32)
        return [helper.make_node("MatMul", [x, f"w_{name}"], [name], name=name)]

    nodes = [
        *(node for name, n in (("q", 40), ("k", 24), ("v", 40)) for node in linear(name, "x", 128, n)),
        helper.make_node("Concat", ["q", "k", "v"], ["qkv"], axis=-1),
        *linear("o", "qkv", 104, 128),
        *linear("gate", "o", 128, 96),
        *linear("up", "o", 128, 96),
        helper.make_node("Sigmoid", ["gate"], ["s"]),
        helper.make_node("Mul", ["gate", "s"], ["silu"]),
        helper.make_node("Mul", ["silu", "up"], ["h"]),
        *linear("down", "h", 96, 128),
        helper.make_node("Identity", ["down"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 128]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], [numpy_helper.from_array(a, name) for name, a in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def feeds(k: int, count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    return [{"x": rng.normal(size=(3, k)).astype(np.float32)} for _ in range(count)]


# --- what is stored ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "target"),
    [
        (Recipe(scheme="w4a4", transform="hadamard", weights="rtn"), None),
        (Recipe(scheme="w4a4", transform="smooth", weights="rtn"), "sm90"),
        (Recipe(scheme="w4a4", transform="hadamard", weights="rtn", group_size=32, keep=("o", "down")), "sm80"),
        (Recipe(scheme="w4a16", transform="smooth", weights="rtn"), None),
        (Recipe(scheme="w4a16", transform="none", weights="rtn", group_size=32, keep=("o",)), None),
        (Recipe(scheme="w8a8", transform="hadamard", weights="rtn"), None),
        (Recipe(scheme="w4a8", transform="hadamard", weights="rtn", schemes=(("down", "w8a8"),)), None),
    ],
    ids=["w4a4", "w4a4 for 9.0", "w4a4 in groups for 8.0", "w4a16", "w4a16 in groups", "w8a8", "mixed"],
)
def test_what_is_stored_is_what_was_solved(tmp_path, recipe, target, monkeypatch):
    """The codes come back out of every form and layout, merged linears and filled tiles included."""
    import fqonnx.build as build_module

    solved = {}
    solve = build_module.solve

    def remember(*args, **options):
        store = solve(*args, **options)
        solved.update({group.name: store(group.name) for group in args[0]})
        return store

    monkeypatch.setattr(build_module, "solve", remember)
    model = write_gated(tmp_path / "m.onnx")
    data = write_data(tmp_path / "d.npz", x=np.random.default_rng(1).normal(size=(20, 128)).astype(np.float32))
    build(model, tmp_path / "out", recipe=recipe, calib_data=str(data), target=target)
    groups = FloatModel.read(model, recipe).found.groups
    stored = StoredSolutions(open_artifact(tmp_path / "out"), groups)
    assert set(solved) == {group.name for group in groups}
    for name, expected in solved.items():
        found = stored(name)
        np.testing.assert_array_equal(found.codes, expected.codes, err_msg=name)
        np.testing.assert_array_equal(found.scales, expected.scales)
        assert found.clip == np.float32(expected.clip)
        for part in ("left", "right", "channel_scale"):
            left, right = getattr(found, part), getattr(expected, part)
            assert (left is None) == (right is None)
            assert left is None or np.array_equal(left, right)


def test_every_part_of_a_solution_is_read_back():
    """A new field is one that ``StoredSolutions`` has to read, or bisection measures another build."""
    read = {"group", "channel_scale", "left", "right", "clip", "codes", "scales", "bias"}
    told = {"metrics", "profile_before", "profile_after"}
    assert set(GroupSolution.__dataclass_fields__) == read | told


# --- bisection --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ruined(tmp_path_factory):
    """A float model and a build of it in which one group alone has 4-bit activations and no transform for its outliers."""
    folder = tmp_path_factory.mktemp("ruined")
    model = write_mlp(folder / "mlp.onnx", layers=3)
    recipe = Recipe(scheme="w8a8", transform="none", weights="rtn", schemes=(("layers.1.down", "w4a4"),))
    build(model, folder / "out", recipe=recipe, calib_data=str(write_data(folder / "data.npz")))
    return model, folder / "out"


def test_the_group_that_ruins_the_output_is_found(ruined):
    model, out = ruined
    found = bisect(model, out, feeds(K))
    assert found.groups == GROUPS
    assert found.first == "layers.1.down"
    assert found.before < 0.03 < found.threshold < found.after
    assert found.without < 0.03 < found.whole
    assert found.threshold == pytest.approx(found.whole / 2)
    assert len(found.steps) <= 2 + math.ceil(math.log2(len(GROUPS) + 1))
    every = bisect(model, out, feeds(K), every=True)
    assert every.first == found.first
    assert [step.quantized for step in every.steps] == list(range(len(GROUPS) + 1))
    assert every.whole == found.whole


def test_the_whole_build_has_the_error_that_verify_measures(ruined):
    model, out = ruined
    assert bisect(model, out, feeds(K), threshold=0.9).whole == pytest.approx(verify(model, out, feeds(K)).outputs["y"].rel_l2, rel=1e-3)


def test_a_threshold_that_nothing_passes(ruined):
    model, out = ruined
    found = bisect(model, out, feeds(K), threshold=0.9)
    assert (found.first, found.before, found.after, found.without) == (None, None, None, None)
    assert [step.quantized for step in found.steps] == [0, len(GROUPS)]


def test_the_first_of_several_takes_every_measurement(monkeypatch):
    from fqonnx.debug import _crossing

    errors = [0.0, 0.6, 0.1, 0.2, 0.7, 0.8]  # passes the limit of 0.5 twice
    known = {0: 0.0, 5: 0.8}
    assert _crossing(known, 5, 0.5, errors.__getitem__) == 4
    assert _crossing(dict(enumerate(errors)), 5, 0.5, errors.__getitem__) == 1
    assert _crossing({0: 0.0, 2: math.nan}, 2, 0.5, lambda _: 0.1) == 2  # not a number is past any limit
    assert _crossing({0: 0.0, 1: 0.3}, 1, 0.5, errors.__getitem__) is None


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_a_threshold_out_of_range(ruined, threshold):
    with pytest.raises(UsageError, match="out of range: give a relative error above 0"):
        bisect(*ruined, feeds(K), threshold=threshold)


def test_another_float_model(ruined, tmp_path):
    _, out = ruined
    with pytest.raises(ModelError, match=r"other\.onnx is not the model that .*out was built from \(mlp\.onnx\): give that one"):
        bisect(write_mlp(tmp_path / "other.onnx", layers=2), out, feeds(K))


def test_no_samples(ruined):
    with pytest.raises(DataError, match="no samples"):
        bisect(*ruined, [])


def test_calibration_that_lacks_a_group(ruined, tmp_path):
    import shutil

    from safetensors.numpy import load_file, save_file

    model, out = ruined
    shutil.copytree(out, tmp_path / "out")
    stored = tmp_path / "out" / artifact.CALIBRATION
    save_file({name: array for name, array in load_file(stored).items() if not name.startswith("layers.2.up")}, stored)
    manifest = json.loads((tmp_path / "out" / artifact.MANIFEST).read_text())
    artifact.write_manifest(tmp_path / "out", {key: value for key, value in manifest.items() if key != "files"})
    with pytest.raises(ArtifactError, match=r"holds nothing of group 'layers\.2\.up': build it again"):
        bisect(model, tmp_path / "out", feeds(K))
    stored.write_bytes(b"junk")
    artifact.write_manifest(tmp_path / "out", {key: value for key, value in manifest.items() if key != "files"})
    with pytest.raises(ArtifactError, match=r"calibration\.safetensors cannot be read .*: build it again"):
        bisect(model, tmp_path / "out", feeds(K))


# --- the command line -------------------------------------------------------------------------------------------------------------------


def test_the_command_says_which_group(ruined, tmp_path):
    model, out = ruined
    done = run("debug", "bisect", model, out, "--data", write_data(tmp_path / "data.npz"))
    assert done.code == 0, done.stderr
    assert "layers.1.down pushes it from" in done.stdout.splitlines()[-1]
    as_json = json.loads(run("debug", "bisect", model, out, "--random-data", "--every", "--json", "-q").stdout)
    assert as_json["first"] == "layers.1.down"
    assert [step["quantized"] for step in as_json["steps"]] == list(range(len(GROUPS) + 1))
    quiet = run("debug", "bisect", model, out, "--random-data", "--threshold", "0.9")
    assert quiet.stdout.splitlines()[-1].startswith("no group pushes the output past the threshold: all together leave")


def test_what_is_not_a_number_is_no_json_number():
    found = Bisection(("a",), 0.5, (Step(0, 0.0), Step(1, math.nan)), "a", 0.0)
    assert found.to_dict()["whole"] is None
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["steps"][1] == {"quantized": 1, "error": None}


@pytest.mark.parametrize("options", [(), ("--data", "d.npz", "--random-data")])
def test_data_is_named_once(ruined, options):
    done = run("debug", "bisect", *ruined, *options)
    assert done.code == 2
    assert "exactly one of --data DATA" in one_line(done.stderr)


def test_polygraphy_gets_its_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")  # which has no plugins to register
    model = write_mlp(tmp_path / "mlp.onnx")
    done = run_process("debug", "polygraphy", "inspect", "model", model, "--show", "layers")
    assert done.code == 0
    assert "layers.0.up" in done.stdout
    assert run("debug", "polygraphy", "inspect", "model", tmp_path / "none.onnx").code == 1


def test_polygraphy_with_plugins_needs_tensorrt(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.delenv("POLYGRAPHY_USE_TENSORRT_RTX", raising=False)
    done = run("debug", "polygraphy", "run", "model.onnx")
    assert done.code == 1
    assert "pip install 'fqonnx[tensorrt]'" in one_line(done.stderr)


def test_a_model_is_reduced_as_documented(tmp_path):
    """Polygraphy's reducer keeps the functions and the INT4 weights of what it leaves; the command is that of docs/debugging.md."""
    pytest.importorskip("onnx_graphsurgeon", reason="pip install onnx-graphsurgeon")
    page = (Path(__file__).parents[1] / "docs" / "debugging.md").read_text()
    (line,) = re.findall(r"^polygraphy debug reduce .*$", page, re.MULTILINE)
    assert line.endswith("--check polygraphy run polygraphy_debug.onnx --onnxrt")
    model = write_mlp(tmp_path / "m.onnx")
    recipe = Recipe(transform="hadamard", weights="rtn")
    build(model, tmp_path / "out", recipe=recipe, calib_data=str(write_data(tmp_path / "d.npz")))
    # What fails stands in for a runtime that does not take one node.
    check = "import onnx\nnames = [node.name for node in onnx.load('polygraphy_debug.onnx').graph.node]\nraise SystemExit('{}' in names)"
    (tmp_path / "check.py").write_text(check.format("layers.0.down"))
    words = shlex.split(line.replace("x:[2,768]", f"x:[2,{K}]").partition(" --check ")[0])[1:]
    program = [sys.executable, "-c", "from polygraphy.tools import main; raise SystemExit(main())"]
    subprocess.run([*program, *words, "--check", sys.executable, "check.py"], cwd=tmp_path, check=True, capture_output=True)
    reduced, whole = onnx.load(tmp_path / "reduced.onnx"), onnx.load(tmp_path / "out" / "model.onnx")
    assert [node.name for node in reduced.graph.node] == ["layers.0.down"]
    assert {function.name for function in reduced.functions} >= {"W4A4Gemm"}
    weights = [next(t for t in m.graph.initializer if t.name == "layers.0.down.weight_int4") for m in (reduced, whole)]
    assert weights[0].data_type == TensorProto.INT4
    np.testing.assert_array_equal(*map(numpy_helper.to_array, weights))
