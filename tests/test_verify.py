from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import Comparator, RunResults
from polygraphy.logger import G_LOGGER

from fqonnx import artifact
from fqonnx.build import build
from fqonnx.calib.stream import StreamedModel
from fqonnx.errors import ArtifactError, DataError, EngineError, ModelError
from fqonnx.model import inputs, load
from fqonnx.recipe import Recipe
from fqonnx.report import DataReport, EngineReport, GroupReport, load_report, save_report
from fqonnx.verify import Comparison, limits, runners, verify
from fqonnx.verify.layers import find_layers
from fqonnx.verify.saved import command_lines
from tests.cli_support import write_data, write_mlp
from tests.report_samples import realistic_report

RNG = np.random.default_rng(0)
W1 = RNG.normal(size=(32, 48)).astype(np.float32)
W2 = RNG.normal(size=(48, 40)).astype(np.float32)
VOCABULARY, WIDTH = 50, 32
TABLE = RNG.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
HEAD = RNG.normal(size=(WIDTH, VOCABULARY)).astype(np.float32) / 2


def make_model(path, nodes, inputs, outputs, constants, *, external=False):
    def info(name, dtype, shape):
        return helper.make_tensor_value_info(name, dtype, shape)

    graph = helper.make_graph(
        nodes,
        "g",
        [info(*i) for i in inputs],
        [info(*o) for o in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=external, location=f"{Path(path).name}.data", size_threshold=0)
    return Path(path)


def mlp(path, w1=W1, w2=W2, *, output="y", middle="h", extra=(), external=False):
    """``y = relu(x w1) w2``."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], [middle], name="fc1"),
        helper.make_node("Relu", [middle], ["a"], name="act"),
        helper.make_node("MatMul", ["a", "w2"], [output], name="fc2"),
        *extra,
    ]
    inputs, outputs = [("x", TensorProto.FLOAT, ["b", 32])], [(output, TensorProto.FLOAT, ["b", w2.shape[1]])]
    return make_model(path, nodes, inputs, outputs, {"w1": w1, "w2": w2}, external=external)


def language_model(path, head=HEAD, *, causal=True, output="out", mask=False):
    """Logits from a running sum of embeddings, or from their mean over the whole text."""
    nodes = [helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.INT64), helper.make_node("Gather", ["table", "ids"], ["e"])]
    if causal:
        nodes.append(helper.make_node("CumSum", ["e", "axis"], ["s"]))
    else:
        nodes += [helper.make_node("ReduceMean", ["e", "axes"], ["m"]), helper.make_node("Add", ["e", "m"], ["s"])]
    inputs = [("input_ids", TensorProto.INT32, ["b", "s"])]
    if mask:
        inputs.append(("attention_mask", TensorProto.INT64, ["b", "s"]))
        nodes.append(helper.make_node("Identity", ["attention_mask"], ["unused"]))
    nodes.append(helper.make_node("MatMul", ["s", "head"], [output], name="head"))
    constants = {"table": TABLE, "head": head}
    constants |= {"axis": np.array(1, np.int64)} if causal else {"axes": np.array([1], np.int64)}
    return make_model(path, nodes, inputs, [(output, TensorProto.FLOAT, ["b", "s", head.shape[1]])], constants)


def noisy(weight, level=0.01, seed=1):
    return (weight + level * np.random.default_rng(seed).normal(size=weight.shape)).astype(np.float32)


def feeds(count=4, rows=3, seed=2):
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(rows, 32)).astype(np.float32)} for _ in range(count)]


def texts(lengths=(9, 4, 7), seed=3):
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(0, VOCABULARY, (2, n), dtype=np.int32)} for n in lengths]


def forward(x, w1=W1, w2=W2):
    return np.maximum(x.astype(np.float64) @ w1, 0) @ w2


# --- outputs --------------------------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_numpy(tmp_path):
    w2 = noisy(W2)
    data = feeds()
    report = verify(mlp(tmp_path / "a.onnx"), mlp(tmp_path / "b.onnx", w2=w2), data)
    r = np.concatenate([forward(f["x"]) for f in data]).ravel()
    c = np.concatenate([forward(f["x"], w2=w2) for f in data]).ravel()
    t = report.outputs["y"]
    assert t.rel_l2 == pytest.approx(np.linalg.norm(c - r) / np.linalg.norm(r), rel=1e-4)
    assert t.cosine == pytest.approx(r @ c / np.linalg.norm(r) / np.linalg.norm(c), rel=1e-9)
    assert t.sqnr_db == pytest.approx(-20 * math.log10(t.rel_l2))
    assert t.max_abs == pytest.approx(np.abs(c - r).max(), rel=1e-3)
    assert (t.dtype, t.elements, t.nan, t.inf, t.kl) == ("float32", 4 * 3 * 40, 0, 0, None)
    assert report.passed
    assert report.failures == ()
    assert (report.model, report.candidate, report.data) == ("a.onnx", "b.onnx", DataReport(source="", samples=4))
    assert report.size.float_bytes == 4 * (W1.size + W2.size)
    assert report.size.parts == {"32-bit floats": 4 * (W1.size + W2.size)}
    assert report.time["total"] >= report.time["reference"] + report.time["candidate"] > 0
    assert {"fqonnx", "onnx", "python", "platform"} <= set(report.environment)


@pytest.mark.parametrize(("bound", "passed"), [(0.5, True), (1e-4, False)])
def test_the_bound_is_on_the_relative_l2_of_the_worst_output(tmp_path, bound, passed):
    report = verify(mlp(tmp_path / "a.onnx"), mlp(tmp_path / "b.onnx", w2=noisy(W2)), feeds(), max_error=bound)
    assert report.passed is passed
    assert report.max_error == bound
    if not passed:
        assert report.failures == (f"output 'y' has a relative L2 error of {report.outputs['y'].rel_l2:.4g}, above the bound of 0.0001",)


def test_a_model_equals_itself(tmp_path):
    path = mlp(tmp_path / "a.onnx")
    report = verify(str(path), load(path), feeds(), max_error=0.0)
    t = report.outputs["y"]
    assert (report.passed, t.rel_l2, t.exact, t.sqnr_db, t.max_abs) == (True, 0.0, 1.0, math.inf, 0.0)


@pytest.mark.parametrize(("value", "told"), [(np.nan, "12 NaN and 0 Inf"), (np.inf, "0 NaN and 12 Inf")])
def test_what_is_not_finite_fails_without_any_bound(tmp_path, value, told):
    w2 = W2.copy()
    bias = np.zeros(40, np.float32)
    bias[7] = value
    extra = [helper.make_node("Add", ["z", "bias"], ["y"])]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("MatMul", ["a", "w2"], ["z"]),
        *extra,
    ]
    shape = ("y", TensorProto.FLOAT, ["b", 40])
    candidate = make_model(tmp_path / "b.onnx", nodes, [("x", TensorProto.FLOAT, ["b", 32])], [shape], {"w1": W1, "w2": w2, "bias": bias})
    report = verify(mlp(tmp_path / "a.onnx"), candidate, feeds())
    assert not report.passed
    assert told in report.failures[0]
    assert math.isnan(report.outputs["y"].rel_l2)


def test_infinities_that_both_have_are_no_failure(tmp_path):
    path = make_model(
        tmp_path / "a.onnx",
        [helper.make_node("Log", ["x"], ["y"])],
        [("x", TensorProto.FLOAT, ["n"])],
        [("y", TensorProto.FLOAT, ["n"])],
        {},
    )
    report = verify(path, path, [{"x": np.array([0, 1, 2], np.float32)}])
    assert report.passed
    assert (report.outputs["y"].inf, report.outputs["y"].inf_reference) == (1, 1)


def integer_model(path, k):
    """The places of the two largest elements, and a text."""
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["z"]),
        helper.make_node("ArgMax", ["z"], ["y"], axis=1, keepdims=0),
        helper.make_node("Identity", ["text"], ["t"]),
    ]
    outputs = [("y", TensorProto.INT64, ["b"]), ("t", TensorProto.STRING, [1])]
    return make_model(
        path, nodes, [("x", TensorProto.FLOAT, ["b", 2])], outputs, {"k": np.array(k, np.float32), "text": np.array(["hi"], dtype=object)}
    )


def test_integers_are_told_by_equality_and_text_is_left_out(tmp_path):
    x = np.array([[1, 2], [2, 1], [3, 4], [1, 5]], np.float32)
    report = verify(
        integer_model(tmp_path / "a.onnx", [1, 1]), integer_model(tmp_path / "b.onnx", [1.7, 1]), [{"x": x}, {"x": x}], max_error=0.3
    )
    t = report.outputs["y"]
    assert (t.exact, t.dtype, t.elements) == (0.75, "int64", 8)
    assert report.passed
    assert report.notes == ("output 't' holds text and is not compared",)
    strict = verify(integer_model(tmp_path / "a.onnx", [1, 1]), integer_model(tmp_path / "b.onnx", [1.7, 1]), [{"x": x}], max_error=0.2)
    assert strict.failures == ("output 'y' differs in 25.00% of its elements, above the bound of 0.2",)


def test_no_elements_is_a_failure(tmp_path):
    path = mlp(tmp_path / "a.onnx")
    report = verify(path, path, [{"x": np.zeros((0, 32), np.float32)}])
    assert report.failures == ("output 'y' had no elements to compare",)


def test_samples_pass_through_one_at_a_time(tmp_path):
    alive = []

    def source():
        for seed in range(12):
            x = np.random.default_rng(seed).normal(size=(64, 32)).astype(np.float32)
            alive.append(weakref.ref(x))
            assert sum(ref() is not None for ref in alive) <= 3
            yield {"x": x}

    path = mlp(tmp_path / "a.onnx")
    assert verify(path, path, source()).data.samples == 12


def test_nothing_is_printed(tmp_path, capfd):
    path = mlp(tmp_path / "a.onnx")
    verify(path, path, feeds(), layers=True)
    with pytest.raises(DataError):
        verify(path, path, [{"x": np.zeros((2, 31), np.float32)}])
    assert capfd.readouterr() == ("", "")


# --- bad input ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no data to verify on"),
        ([{}], "sample 0 lacks input 'x': the model's inputs are x"),
        ([feeds(1)[0], {"x": np.zeros((1, 32), np.float32), "z": np.zeros(1)}], "sample 1 has 'z', which is no input"),
        ([{"x": np.zeros((1, 31), np.float32)}], "the data do not fit the model: .*x"),
    ],
)
def test_bad_data(tmp_path, data, message):
    path = mlp(tmp_path / "a.onnx")
    with pytest.raises(DataError, match=message) as caught:
        verify(path, path, data)
    assert "\n" not in str(caught.value)


def test_models_of_another_interface(tmp_path):
    a = mlp(tmp_path / "a.onnx")
    with pytest.raises(ModelError, match=r"b\.onnx has no output 'y', a\.onnx has: compare a model with its own quantized form"):
        verify(a, mlp(tmp_path / "b.onnx", output="logits"), feeds())
    with pytest.raises(ModelError, match=r"language\.onnx has no input 'x'"):
        verify(a, language_model(tmp_path / "language.onnx"), feeds())
    with pytest.raises(ModelError, match=r"sample 0: 'y' has shape \[3, 40\] in the reference and \[3, 39\] in the candidate"):
        verify(a, mlp(tmp_path / "c.onnx", w2=W2[:, :39]), feeds())


def test_a_failure_inside_the_model_names_the_node(tmp_path):
    path = language_model(tmp_path / "a.onnx")
    with pytest.raises(EngineError, match=r"Gather.*out of data bounds") as caught:
        verify(path, path, [{"input_ids": np.full((1, 4), VOCABULARY, np.int32)}])
    assert "\n" not in str(caught.value)


def test_a_model_that_the_runtime_refuses(tmp_path):
    path = mlp(tmp_path / "a.onnx")
    broken = mlp(tmp_path / "b.onnx", extra=[helper.make_node("Nonsense", ["a"], ["n"], domain="nowhere")])
    model = onnx.load(broken)
    model.opset_import.append(helper.make_opsetid("nowhere", 1))
    onnx.save(model, broken)
    with pytest.raises(EngineError, match=r"cannot load the model: .*Nonsense"):
        verify(path, broken, feeds())


# --- layers ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("tap_bytes", [1, 1 << 28])
def test_layers_are_compared_by_value_name(tmp_path, monkeypatch, external, tap_bytes):
    monkeypatch.setattr(limits, "TAP_BYTES", tap_bytes)  # 1: every value takes a pass of its own
    a = mlp(tmp_path / "a.onnx", external=external)
    b = mlp(tmp_path / "b.onnx", w1=noisy(W1), external=external)
    data = feeds()
    report = verify(a, b, data, layers={"first": ["h"], "second": ["y"]})
    layers = {group.name: group.layer for group in report.groups}
    expected = np.concatenate([f["x"] for f in data]).astype(np.float64)
    error = np.linalg.norm(expected @ (noisy(W1) - W1).astype(np.float64)) / np.linalg.norm(expected @ W1)
    assert layers["first"].rel_l2 == pytest.approx(error, rel=1e-4)
    assert layers["second"].rel_l2 == pytest.approx(report.outputs["y"].rel_l2)
    assert [g.name for g in report.worst_groups] == sorted(layers, key=lambda n: -layers[n].rel_l2)


def test_layers_are_found_in_the_reference(tmp_path):
    report = verify(mlp(tmp_path / "a.onnx"), mlp(tmp_path / "b.onnx", w1=noisy(W1)), feeds(), layers=True)
    assert [g.name for g in report.groups] == ["fc1", "fc2"]
    assert all(0 < g.layer.rel_l2 < 0.1 for g in report.groups)


def test_known_groups_keep_their_figures_and_their_order(tmp_path):
    known = [GroupReport(name="fc2", output_rel_l2=0.5, transform="smooth"), GroupReport(name="other", output_rel_l2=0.1)]
    report = verify(mlp(tmp_path / "a.onnx"), mlp(tmp_path / "b.onnx", w1=noisy(W1)), feeds(), layers=True, groups=known)
    assert [g.name for g in report.groups] == ["fc2", "other", "fc1"]
    assert (report.groups[0].transform, report.groups[0].output_rel_l2) == ("smooth", 0.5)
    assert report.groups[0].layer.rel_l2 == report.error_of(report.groups[0]) != 0.5
    assert report.groups[1].layer is None


def test_the_worst_value_of_a_group_counts(tmp_path):
    report = verify(mlp(tmp_path / "a.onnx"), mlp(tmp_path / "b.onnx", w2=noisy(W2)), feeds(), layers={"both": ["h", "y"]})
    assert report.groups[0].layer == report.outputs["y"]


def test_values_that_the_candidate_lacks_are_told(tmp_path):
    a, b = mlp(tmp_path / "a.onnx"), mlp(tmp_path / "b.onnx", middle="renamed")
    report = verify(a, b, feeds(), layers=True)
    assert report.notes == ("1 of 2 groups have outputs that the candidate lacks, the first is 'fc1'",)
    assert {g.name: g.layer is None for g in report.groups} == {"fc1": True, "fc2": False}
    with pytest.raises(ModelError, match=r"b\.onnx has none of the 1 groups' outputs"):
        verify(a, b, feeds(), layers={"fc1": ["h"]})


def test_layers_of_a_model_without_linears(tmp_path):
    path = make_model(
        tmp_path / "a.onnx", [helper.make_node("Abs", ["x"], ["y"])], [("x", TensorProto.FLOAT, [2])], [("y", TensorProto.FLOAT, [2])], {}
    )
    with pytest.raises(ModelError, match="no linears to compare"):
        verify(path, path, [{"x": np.ones(2, np.float32)}], layers=True)


def test_layers_need_data_that_can_be_read_twice(tmp_path):
    path = mlp(tmp_path / "a.onnx")
    with pytest.raises(DataError, match="only once"):
        verify(path, path, iter(feeds()), layers=True)


def test_a_model_object_is_left_as_it_was(tmp_path):
    model = load(mlp(tmp_path / "a.onnx"))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    verify(model, model, feeds(), layers={"first": ["h"]})
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
def test_marking_layers_leaves_onnxruntimes_fusions_alone(tmp_path, scheme):
    """The kernels that a quantized linear runs in are the same, whether or not its output is looked at."""
    import onnxruntime as ort

    model, data = write_mlp(tmp_path / "mlp.onnx", layers=2), write_data(tmp_path / "d.npz")
    build(model, tmp_path / "out", recipe=Recipe(scheme=scheme, transform="smooth", weights="rtn"), calib_data=str(data))
    side = runners.Side.open(tmp_path / "out")
    _, groups = find_layers(runners.Side.open(model), side)
    marked = [name for names in groups.values() for name in names]
    counts = []
    for outputs in (side.outputs, marked):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 4
        ort.InferenceSession(runners._with_outputs(side.model, outputs)[0], options, providers=["CPUExecutionProvider"])
        # What comes behind a group is not its own: an activation that Gemm takes along.
        ops = [node.op_type.removeprefix("Fused") for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
        counts.append({op: ops.count(op) for op in ("MatMulNBits", "MatMul", "Gemm", "DequantizeLinear")})
    assert len(marked) == 4
    assert counts[0]["MatMulNBits"]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("scheme", ["w4a4", "w4a16"])
def test_marking_layers_leaves_an_engines_groups_alone(tmp_path, scheme):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model, data = write_mlp(tmp_path / "mlp.onnx", layers=2), write_data(tmp_path / "d.npz")
    recipe = Recipe(scheme=scheme, transform="hadamard", weights="rtn")
    build(model, tmp_path / "out", recipe=recipe, calib_data=str(data), engine="tensorrt-rtx", target="sm89")
    side = runners.Side.open(tmp_path / "out")
    plain = load_report(tmp_path / "out" / artifact.REPORT).engine
    _, groups = find_layers(runners.Side.open(model), side)
    path, built = side.marked_engine([name for names in groups.values() for name in names], tmp_path)
    assert path.stat().st_size == built.file_bytes
    assert (built.target, built.profiles) == (plain.target, plain.profiles)
    assert [(g.name, g.weights, g.product, g.how) for g in built.groups] == [(g.name, g.weights, g.product, g.how) for g in plain.groups]
    assert side.outputs == ["y"]  # as it was


# --- language models ------------------------------------------------------------------------------------------------------------------


def perplexity(data, head, mask=None):
    total, count = 0.0, 0
    for feed in data:
        ids = feed["input_ids"]
        logits = TABLE[ids].astype(np.float64).cumsum(1) @ head
        log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
        for b in range(ids.shape[0]):
            for t in range(ids.shape[1] - 1):
                if mask is None or (feed["attention_mask"][b, t] and feed["attention_mask"][b, t + 1]):
                    total -= log_p[b, t, ids[b, t + 1]]
                    count += 1
    return math.exp(total / count), count


def test_a_language_model_gets_perplexity_and_agreement(tmp_path):
    head, data = noisy(HEAD, 0.3), texts()
    report = verify(language_model(tmp_path / "a.onnx"), language_model(tmp_path / "b.onnx", head), data)
    (reference, count), (candidate, _) = perplexity(data, HEAD), perplexity(data, head)
    language = report.language
    assert language.tokens == count == 2 * (8 + 3 + 6)
    assert language.perplexity_reference == pytest.approx(reference, rel=1e-4)
    assert language.perplexity == pytest.approx(candidate, rel=1e-4)
    logits = [(TABLE[f["input_ids"]].cumsum(1) @ h)[:, :-1].argmax(-1) for f in data for h in (HEAD, head)]
    same = sum((a == b).sum() for a, b in zip(logits[::2], logits[1::2], strict=True))
    assert language.top1 == pytest.approx(same / count)
    assert 0 < language.top1 < 1
    assert report.outputs["out"].kl > 0  # recognised as logits though the name does not say so


def test_padding_does_not_count(tmp_path):
    data = texts((6, 6))
    for feed in data:
        feed["attention_mask"] = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    path = language_model(tmp_path / "a.onnx", mask=True)
    report = verify(path, path, data)
    expected, count = perplexity(data, HEAD, mask=True)
    assert (report.language.tokens, count) == (2 * (3 + 5), 16)
    assert report.language.perplexity == pytest.approx(expected, rel=1e-4)
    assert report.language.top1 == 1.0


def test_a_masked_language_model_does_not_predict_the_next_token(tmp_path):
    path = language_model(tmp_path / "a.onnx", causal=False, output="logits")
    report = verify(path, path, texts())
    assert report.language is None
    assert report.outputs["logits"].top1 == 1.0


def test_hidden_states_are_no_logits(tmp_path):
    path = language_model(tmp_path / "a.onnx", HEAD[:, :20])
    report = verify(path, path, texts())
    assert report.language is None
    assert report.outputs["out"].kl is None


def test_random_tokens_have_no_perplexity(tmp_path):
    path = language_model(tmp_path / "a.onnx")
    assert verify(path, path, texts(), tokens=False).language is None


def test_single_tokens_have_no_perplexity(tmp_path):
    path = language_model(tmp_path / "a.onnx")
    assert verify(path, path, texts((1, 1))).language is None


# --- models that do not fit a session -------------------------------------------------------------------------------------------------


def test_streamed_runs_give_the_same_figures(tmp_path, monkeypatch):
    a, b = language_model(tmp_path / "a.onnx"), language_model(tmp_path / "b.onnx", noisy(HEAD, 0.3))
    data = texts((9, 4, 7, 5, 6))
    whole = verify(a, b, data, layers={"head": ["out"]})
    made = []
    streamed = runners.StreamedRunner

    class Recording(streamed):
        def prefetch(self, chunk):
            made.append(len(chunk))
            return super().prefetch(chunk)

    monkeypatch.setattr(runners, "StreamedRunner", Recording)
    monkeypatch.setattr(limits, "SESSION_BYTES", 0)
    report = verify(a, b, data, layers={"head": ["out"]})
    assert (report.outputs, report.language, report.groups) == (whole.outputs, whole.language, whole.groups)
    assert made == [1, 1, 4, 4] * 2  # one sample tells how much a sample takes, then as many as fit
    monkeypatch.setattr(limits, "TAP_BYTES", 1)
    made.clear()
    assert verify(a, b, data).outputs == whole.outputs
    assert made == [1] * 10


def test_a_streamed_runner_needs_no_prefetch(tmp_path):
    model = load(mlp(tmp_path / "a.onnx"))
    runner = runners.StreamedRunner("s", StreamedModel(model, tmp_path), inputs(model), ["y"])
    x = feeds(1)[0]["x"]
    with runner:
        np.testing.assert_allclose(runner.infer({"x": x})["y"], forward(x), rtol=1e-4, atol=1e-4)
        assert runner.last_inference_time() > 0


def test_external_data_of_two_folders_cannot_be_tapped(tmp_path):
    models = []
    for name in "ab":
        (tmp_path / name).mkdir()
        models.append(load(mlp(tmp_path / name / "m.onnx", external=True)))
    models[0].graph.initializers["w2"].const_value = models[1].graph.initializers["w2"].const_value
    with pytest.raises(ModelError, match="external data lies in 2 folders: save it into one first"):
        verify(models[0], models[1], feeds())


def test_bfloat16_runs_in_float32(tmp_path):
    w = RNG.normal(size=(32, 40)).astype(ml_dtypes.bfloat16)
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    path = make_model(tmp_path / "a.onnx", nodes, [("x", TensorProto.FLOAT, ["n", 32])], [("y", TensorProto.BFLOAT16, ["n", 40])], {"w": w})
    report = verify(path, path, feeds())
    assert report.outputs["y"].rel_l2 == 0
    assert report.notes[0] == "a.onnx is bfloat16: it was run in float32 on the CPU"


# --- build directories ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def build_directory(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    mlp(out / artifact.MODEL, w1=noisy(W1))
    groups = (GroupReport(name="fc2", output_rel_l2=0.25),)
    save_report(realistic_report(groups=groups, left_in_float=()), out / artifact.REPORT)
    recipe = Recipe(keep=("fc1",)).to_dict()
    artifact.write_manifest(out, {"recipe": recipe, "groups": []})
    return out


def test_a_build_directory_brings_what_it_knows(tmp_path, build_directory):
    report = verify(mlp(tmp_path / "a.onnx"), build_directory, feeds(), layers=True, data=DataReport(source="x.npz", samples=0, note="n"))
    assert report.candidate == "out"
    assert report.recipe["transform"] == "flatquant"
    assert [(g.name, g.output_rel_l2) for g in report.groups] == [("fc2", 0.25)]  # fc1 is kept in float by its recipe
    assert report.groups[0].layer.rel_l2 > 0
    assert report.data == DataReport(source="x.npz", samples=4, note="n")


def test_a_directory_that_is_no_build(tmp_path):
    with pytest.raises(ArtifactError, match="manifest"):
        verify(mlp(tmp_path / "a.onnx"), tmp_path, feeds())


# --- polygraphy -----------------------------------------------------------------------------------------------------------------------


class Fixed(BaseRunner):
    """A runner of any kind: verification asks for no more than Polygraphy's interface."""

    def __init__(self, name, factor):
        super().__init__(name=name)
        self.factor = factor

    def get_input_metadata_impl(self):
        from polygraphy.common import TensorMetadata

        return TensorMetadata().add("x", np.float32, (2,))

    def infer_impl(self, feed_dict):
        self.inference_time = 0.0
        return {"y": feed_dict["x"] * self.factor}


def test_the_comparison_is_a_polygraphy_compare_func():
    comparison = Comparison()
    data = [{"x": np.array([3, 4], np.float32)}, {"x": np.array([1, np.nan], np.float32)}]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        runs = Comparator.run([Fixed("a", 1.0), Fixed("b", 1.5)], data_loader=data)
        assert isinstance(runs, RunResults)
        results = Comparator.compare_accuracy(runs, compare_func=comparison)
    matches = [bool(iteration["y"]) for iteration in results[0]["a", "b"]]
    assert matches == [True, False]
    assert comparison.samples == 2
    assert comparison.reports()["y"].nan == 1


# --- by hand ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.1, 0.001])
def test_the_command_lines_repeat_the_comparison(tmp_path, build_directory, monkeypatch, bound):
    """They run as they stand, from the folder that they were printed in, and judge as verify does."""
    monkeypatch.chdir(tmp_path)
    report = verify(mlp(tmp_path / "a.onnx"), build_directory, feeds(), max_error=bound, save=tmp_path / "saved")
    runs, judges = report.polygraphy
    assert runs == "polygraphy run out/model.onnx --onnxrt --load-inputs saved/inputs --save-outputs saved/again.json"
    assert judges.endswith(f"--compare snr --snr-threshold {-20 * math.log10(bound):g}")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    assert report.passed is (bound == 0.1)
    for line, passes in ((runs, True), (judges, report.passed)):
        done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, check=False)  # noqa: S602
        assert (done.returncode == 0) is passes, done.stdout[-2000:]
    ratios = [float(found) for found in re.findall(r"SNR: ([\d.]+) dB", done.stdout)]
    assert len(ratios) == 4
    assert np.mean(ratios) == pytest.approx(report.outputs["y"].sqnr_db, abs=0.5)


def test_polygraphy_reads_what_was_saved(tmp_path):
    from polygraphy.json import load_json

    data = feeds(3)
    verify(mlp(tmp_path / "a.onnx"), mlp(tmp_path / "b.onnx", w2=noisy(W2)), data, save=tmp_path / "s")
    for name in ("inputs", "reference", "candidate"):
        assert [path.name for path in sorted((tmp_path / "s" / name).iterdir())] == [f"{index:010d}.json" for index in range(3)]
    np.testing.assert_array_equal(load_json(str(tmp_path / "s" / "inputs" / "0000000001.json"))["x"], data[1]["x"])
    for name, w2 in (("reference", W2), ("candidate", noisy(W2))):
        (run,) = RunResults.load(str(tmp_path / "s" / name / "0000000002.json"))
        assert run[0] == name
        np.testing.assert_allclose(run[1][0]["y"], forward(data[2]["x"], w2=w2), rtol=1e-3, atol=1e-3)


def test_a_folder_with_an_earlier_run_is_left_alone(tmp_path):
    path = mlp(tmp_path / "a.onnx")
    verify(path, path, feeds(1), save=tmp_path / "s")
    before = (tmp_path / "s" / "inputs" / "0000000000.json").read_bytes()
    with pytest.raises(ArtifactError, match=r"inputs holds files already: give --save another folder, or remove them"):
        verify(path, path, feeds(1, seed=9), save=tmp_path / "s")
    assert (tmp_path / "s" / "inputs" / "0000000000.json").read_bytes() == before
    with pytest.raises(ArtifactError, match=r"cannot write .*a\.onnx: .*give --save another folder"):
        verify(path, path, feeds(1), save=path)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    import fqonnx.verify.saved as module

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_json", full)
    path = mlp(tmp_path / "a.onnx")
    with pytest.raises(ArtifactError, match="No space left on device: free space or give --save another folder"):
        verify(path, path, feeds(1), save=tmp_path / "s")


def test_objects_have_no_command_lines(tmp_path):
    model = load(mlp(tmp_path / "a.onnx"))
    assert verify(model, model, feeds(1), save=tmp_path / "s").polygraphy == ()
    assert verify(model, model, feeds(1)).polygraphy == ()


@pytest.mark.parametrize(
    ("engine", "program"),
    [
        (EngineReport(engine="tensorrt-rtx", version="1.7"), "POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run"),
        (EngineReport(engine="tensorrt", version="10.13"), "fqonnx debug polygraphy run"),
        (EngineReport(engine="tensorrt", version="10.13", version_compatible=True), "polygraphy run"),
    ],
)
def test_an_engine_has_a_command_line_that_polygraphy_takes(tmp_path, engine, program):
    a, b = (runners.Side.open(mlp(tmp_path / f"{name}.onnx")) for name in "ab")
    b = replace(b, engine=(tmp_path / "engine.plan", engine))
    *_, line = command_lines(a, b, tmp_path / "s", max_error=0.1, device="cpu")
    assert line.startswith(f"{program} {tmp_path}/engine.plan --model-type engine --trt --load-inputs")
    # Polygraphy writes the script that it would run; running needs a GPU.
    arguments = shlex.split(line.partition(" run ")[2])
    script = subprocess.run(
        [sys.executable, "-c", "from polygraphy.tools import main; raise SystemExit(main())", "run", *arguments, "--gen-script", "-"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "TrtRunner(" in script
    assert "SnrCompareFunc(" in script
    assert f"{tmp_path}/s/candidate" in script
