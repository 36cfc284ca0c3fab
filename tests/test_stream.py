from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from fqonnx.calib.stream import StreamedModel
from fqonnx.errors import CalibrationError, ModelError, UsageError
from fqonnx.model import load

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

WIDTH = 32
LAYER_BYTES = WIDTH * WIDTH * 4


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str],
    weights: Sequence[onnx.TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, [onnx.ValueInfoProto(name=name) for name in outputs], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def chain(layers: int, dtype: int = TensorProto.FLOAT, seed: int = 0) -> onnx.ModelProto:
    """Residual layers: h = h + relu(h · W) with the first value of all, x, read again by every layer's bias."""
    random = np.random.default_rng(seed)
    nodes, weights, value = [], [], "x"
    for i in range(layers):
        weight = (random.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32)
        weights.append(numpy_helper.from_array(weight.astype(helper.tensor_dtype_to_np_dtype(dtype)), f"w{i}"))
        nodes += [
            helper.make_node("MatMul", [value, f"w{i}"], [f"mm{i}"], name=f"mm_{i}"),
            helper.make_node("Relu", [f"mm{i}"], [f"act{i}"], name=f"relu_{i}"),
            helper.make_node("Add", [value, f"act{i}"], [f"res{i}"], name=f"add_{i}"),
            helper.make_node("Add", [f"res{i}", "x"], [f"h{i}"], name=f"skip_{i}"),
        ]
        value = f"h{i}"
    return model_of(nodes, [helper.make_tensor_value_info("x", dtype, ["rows", WIDTH])], [value], weights)


def chain_in_numpy(model: onnx.ModelProto, x: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    values = {"x": x.astype(np.float64)}
    h = values["x"]
    for i in range(len(weights)):
        values[f"mm{i}"] = h @ weights[f"w{i}"]
        values[f"h{i}"] = h = h + np.maximum(values[f"mm{i}"], 0) + values["x"]
    return values


def ragged(sizes: Sequence[int] = (3, 1, 5, 3), seed: int = 1) -> list[dict[str, np.ndarray[Any, Any]]]:
    random = np.random.default_rng(seed)
    return [{"x": random.standard_normal((size, WIDTH)).astype(np.float32)} for size in sizes]


def collect(streamed: StreamedModel, feeds: Any, taps: Sequence[str]) -> list[dict[str, np.ndarray[Any, Any]]]:
    found: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
    count = streamed.run(feeds, taps=taps, on_values=lambda sample, values: found.setdefault(sample, {}).update(values))
    assert sorted(found) == list(range(count))
    return [found[sample] for sample in sorted(found)]


@pytest.mark.parametrize("layers_per_segment", [1, 2, 3, 100])
@pytest.mark.parametrize("live_bytes", [0, 1 << 20])
def test_segments_compute_what_the_model_computes(tmp_path: Path, layers_per_segment: int, live_bytes: int) -> None:
    proto = chain(6)
    streamed = StreamedModel(
        ir.from_proto(proto), tmp_path, max_bytes=layers_per_segment * LAYER_BYTES, max_live_bytes=live_bytes, threads=1
    )
    taps = ["mm0", "x", "h5", "h2", "mm3"]
    feeds = ragged()
    assert len(streamed.plan(taps)) == -(-6 // layers_per_segment)
    for feed, values in zip(feeds, collect(streamed, iter(feeds), taps), strict=True):
        assert set(values) == set(taps)
        expected = chain_in_numpy(proto, feed["x"])
        for name in taps:
            np.testing.assert_allclose(values[name], expected[name], rtol=1e-5, atol=1e-5)
    assert list(tmp_path.iterdir()) == []


def test_each_segment_holds_no_more_weights_than_asked(tmp_path: Path) -> None:
    streamed = StreamedModel(ir.from_proto(chain(7)), tmp_path, max_bytes=2 * LAYER_BYTES)
    products = [sum(node.op_type == "MatMul" for node in segment.nodes) for segment in streamed.plan(["h6"])]
    assert products == [2, 2, 2, 1]


def test_half_precision_weights_count_four_bytes(tmp_path: Path) -> None:
    streamed = StreamedModel(ir.from_proto(chain(4, TensorProto.FLOAT16)), tmp_path, max_bytes=2 * LAYER_BYTES)
    assert len(streamed.plan(["h3"])) == 2


def test_a_cut_goes_where_the_fewest_values_cross(tmp_path: Path) -> None:
    # Between the two weights h is alone only right behind the sum: before it a, b and c are alive.
    weights = [numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), name) for name in ("u", "v")]
    nodes = [
        helper.make_node("MatMul", ["x", "u"], ["y"]),
        helper.make_node("Relu", ["y"], ["a"]),
        helper.make_node("Neg", ["y"], ["b"]),
        helper.make_node("Abs", ["y"], ["c"]),
        helper.make_node("Sum", ["a", "b", "c"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["h", "v"], ["z"]),
        helper.make_node("Add", ["r", "z"], ["out"]),
    ]
    proto = model_of(nodes, [helper.make_tensor_value_info("x", 1, [None, WIDTH])], ["out"], weights)
    first, second = StreamedModel(ir.from_proto(proto), tmp_path, max_bytes=LAYER_BYTES).plan(["out"])
    assert first.outputs == ("h",)
    assert second.inputs == ("h",)


def test_nodes_behind_the_last_tap_are_not_run(tmp_path: Path) -> None:
    proto = chain(2)
    proto.graph.node.append(helper.make_node("Gather", ["h1", "far"], ["never"], name="fails"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([10**6]), "far"))
    streamed = StreamedModel(ir.from_proto(proto), tmp_path)
    assert len(collect(streamed, ragged(), ["h1"])) == 4
    with pytest.raises(
        CalibrationError, match=r"^sample 0: ONNX Runtime failed in Gather node 'fails': .*: the data hold an index outside"
    ):
        collect(streamed, ragged(), ["never"])


def test_only_graph_inputs_are_tapped(tmp_path: Path) -> None:
    feeds = ragged()
    values = collect(StreamedModel(ir.from_proto(chain(2)), tmp_path), feeds, ["x"])
    assert all(np.array_equal(value["x"], feed["x"]) for value, feed in zip(values, feeds, strict=True))


@pytest.mark.parametrize("tap", ["nowhere", "w0"])
def test_a_tap_that_is_not_computed_is_refused(tmp_path: Path, tap: str) -> None:
    with pytest.raises(UsageError, match=f"computes no value '{tap}': choose"):
        StreamedModel(ir.from_proto(chain(2)), tmp_path).plan([tap])


def subgraph_model() -> onnx.ModelProto:
    """An If whose branches read h0, made in the first segment, and w1, and a Loop that adds h0 three times."""
    proto = chain(2)
    branches = [
        helper.make_graph(
            [helper.make_node("MatMul", ["h0", "w1"], [f"{name}_p"]), helper.make_node(op, [f"{name}_p"], [f"{name}_out"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", 1, None)],
        )
        for name, op in (("then", "Neg"), ("otherwise", "Abs"))
    ]
    body = helper.make_graph(
        [helper.make_node("Add", ["carried", "h0"], ["next"]), helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", 1, None),
        ],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), helper.make_tensor_value_info("next", 1, None)],
    )
    proto.graph.node.extend(
        [
            helper.make_node("If", ["cond"], ["chosen"], name="if", then_branch=branches[0], else_branch=branches[1]),
            helper.make_node("Loop", ["three", "yes", "chosen"], ["looped"], name="loop", body=body),
        ]
    )
    proto.graph.input.append(helper.make_tensor_value_info("cond", TensorProto.BOOL, []))
    proto.graph.initializer.extend([numpy_helper.from_array(np.array(3), "three"), numpy_helper.from_array(np.array(True), "yes")])
    proto.graph.output.append(onnx.ValueInfoProto(name="looped"))
    return proto


@pytest.mark.parametrize("max_bytes", [LAYER_BYTES + 64, 1 << 30])
def test_values_captured_by_bodies_cross_segments(tmp_path: Path, max_bytes: int) -> None:
    proto = subgraph_model()
    streamed = StreamedModel(ir.from_proto(proto), tmp_path, max_bytes=max_bytes)
    feeds = [feed | {"cond": np.array(bool(i % 2))} for i, feed in enumerate(ragged())]
    assert len(streamed.plan(["looped"])) == (1 if max_bytes == 1 << 30 else 2)
    weight = numpy_helper.to_array(proto.graph.initializer[1]).astype(np.float64)
    for feed, values in zip(feeds, collect(streamed, feeds, ["looped"]), strict=True):
        h = chain_in_numpy(chain(1), feed["x"])["h0"]
        chosen = -(h @ weight) if feed["cond"] else np.abs(h @ weight)
        np.testing.assert_allclose(values["looped"], chosen + 3 * h, rtol=1e-5, atol=1e-5)


def test_local_functions_run(tmp_path: Path) -> None:
    double = helper.make_function(
        "local", "Double", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    nodes = [helper.make_node("Double", ["x"], ["y"], domain="local")]
    proto = model_of(nodes, [helper.make_tensor_value_info("x", 1, [None, WIDTH])], ["y"], functions=[double])
    feeds = ragged()
    values = collect(StreamedModel(ir.from_proto(proto), tmp_path), feeds, ["y"])
    assert all(np.array_equal(value["y"], 2 * feed["x"]) for value, feed in zip(values, feeds, strict=True))


def test_a_half_precision_model_runs_in_segments(tmp_path: Path) -> None:
    proto = chain(3, TensorProto.FLOAT16)
    feeds = [{"x": feed["x"].astype(np.float16)} for feed in ragged()]
    streamed = StreamedModel(ir.from_proto(proto), tmp_path, max_bytes=LAYER_BYTES)
    for feed, values in zip(feeds, collect(streamed, feeds, ["mm2"]), strict=True):
        assert values["mm2"].dtype == np.float16
        np.testing.assert_allclose(values["mm2"], chain_in_numpy(proto, feed["x"])["mm2"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("max_bytes", [LAYER_BYTES, 1 << 30])
def test_a_bfloat16_model_runs_as_float32(tmp_path: Path, max_bytes: int) -> None:
    proto = chain(2, TensorProto.BFLOAT16)
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BFLOAT16, [], [0.5])),
         helper.make_node("Add", ["h1", "c"], ["then_out"])],
        "then", [], [helper.make_tensor_value_info("then_out", TensorProto.BFLOAT16, None)],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Cast", ["wide"], ["else_out"], to=TensorProto.BFLOAT16)],
        "else", [], [helper.make_tensor_value_info("else_out", TensorProto.BFLOAT16, None)],
    )  # fmt: skip
    proto.graph.node.extend(
        [
            helper.make_node("Cast", ["h1"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("If", ["cond"], ["y"], then_branch=branch, else_branch=other),
        ]
    )
    proto.graph.input.append(helper.make_tensor_value_info("cond", TensorProto.BOOL, []))
    streamed = StreamedModel(ir.from_proto(proto), tmp_path, max_bytes=max_bytes)
    feeds = [{"x": feed["x"].astype(ml_dtypes.bfloat16), "cond": np.array(bool(i % 2))} for i, feed in enumerate(ragged())]
    for feed, values in zip(feeds, collect(streamed, feeds, ["y", "mm1"]), strict=True):
        expected = chain_in_numpy(proto_weights(proto), feed["x"])
        assert values["mm1"].dtype == np.float32
        np.testing.assert_allclose(values["mm1"], expected["mm1"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(values["y"], expected["h1"] + 0.5 * bool(feed["cond"]), rtol=1e-4, atol=1e-4)


def proto_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    return model_of([], [], [], [t for t in proto.graph.initializer if t.name.startswith("w")])


def test_external_weights_are_mapped_from_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = 4096
    weights = [numpy_helper.from_array(np.full((WIDTH, wide), i + 1, np.float32), f"w{i}") for i in range(2)]
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(2)]
    proto = model_of(nodes, [helper.make_tensor_value_info("x", 1, [None, WIDTH])], ["y0", "y1"], weights)
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    handed: list[np.ndarray[Any, Any]] = []
    made = ort.OrtValue.ortvalue_from_numpy

    def spy(array: np.ndarray[Any, Any]) -> Any:
        handed.append(array)
        return made(array)

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", spy)
    model = load(tmp_path / "m.onnx")
    monkeypatch.chdir("/")  # nothing may depend on where the process is
    feeds = ragged()
    got = collect(StreamedModel(model, tmp_path / "work", max_bytes=WIDTH * wide * 4), feeds, ["y0", "y1"])
    assert len(handed) == 2
    assert all(isinstance(array.base, np.memmap) for array in handed)
    for feed, values in zip(feeds, got, strict=True):
        for i in range(2):
            np.testing.assert_allclose(values[f"y{i}"], np.repeat((i + 1) * feed["x"].sum(1, keepdims=True), wide, 1), rtol=1e-4, atol=1e-4)


def test_waves_hand_over_portions_and_compute_the_same_bits(tmp_path: Path) -> None:
    streamed = StreamedModel(ir.from_proto(chain(4)), tmp_path, max_bytes=2 * LAYER_BYTES, threads=1)
    taps = ["x", "mm0", "mm1", "mm2", "mm3"]
    segments = streamed.plan(taps)
    feeds = ragged()

    def gather(**options: Any) -> tuple[list[tuple[str, ...]], dict[tuple[str, int], np.ndarray[Any, Any]]]:
        seen, values = [], {}
        for wave in streamed.waves(iter(feeds), segments, **options):
            seen.append(wave.taps)
            for sample, got in wave:
                assert set(got) == {*wave.taps, *options.get("inputs", ())}
                values |= {(name, sample): array for name, array in got.items()}
        return seen, values

    seen, whole = gather()
    assert seen == [("x", "mm0", "mm1"), ("mm2", "mm3")]
    split: Callable[[Sequence[str]], list[list[str]]] = lambda names: [[name] for name in names]  # noqa: E731
    seen, parts = gather(split=split, wanted=["mm3", "mm1", "x"])
    assert seen == [("x",), ("mm1",), ("mm3",)]
    assert streamed.passes(segments, wanted=["mm3", "mm1", "x"], split=split) == 3
    assert set(parts) == {(name, sample) for name in ("x", "mm1", "mm3") for sample in range(4)}
    assert all(np.array_equal(array, whole[key]) for key, array in parts.items())
    seen, early = gather(wanted=["mm0"])
    assert seen == [("mm0",)]
    assert {name for name, _ in early} == {"mm0"}
    assert streamed.passes(segments, wanted=["mm0"]) == 1
    seen, beside = gather(wanted=["mm3"], inputs=["x"])
    assert seen == [("mm3",)]
    assert streamed.passes(segments, wanted=["mm3"]) == 2
    assert all(np.array_equal(beside["x", i], feeds[i]["x"]) and np.array_equal(beside["mm3", i], whole["mm3", i]) for i in range(4))


def test_progress_counts_every_pass(tmp_path: Path) -> None:
    streamed = StreamedModel(ir.from_proto(chain(4)), tmp_path, max_bytes=LAYER_BYTES)
    ticks: list[int] = []
    count = streamed.run(ragged(), taps=["h3"], on_values=lambda *_: None, on_sample=lambda: ticks.append(1))
    assert (count, len(ticks)) == (4, 16)
    assert streamed.passes(streamed.plan(["h3"])) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_nothing_stays_on_disk_when_the_work_is_interrupted(tmp_path: Path, error: type[BaseException]) -> None:
    streamed = StreamedModel(ir.from_proto(chain(4)), tmp_path, max_bytes=LAYER_BYTES, max_live_bytes=0)
    spilled = []

    def stop(sample: int, values: dict[str, np.ndarray[Any, Any]]) -> None:
        spilled.extend(tmp_path.rglob("*.npy"))
        raise error

    with pytest.raises(error):
        streamed.run(ragged(), taps=["h3"], on_values=stop)
    assert spilled
    assert list(tmp_path.iterdir()) == []


def test_values_on_disk_go_when_no_later_segment_reads_them(tmp_path: Path) -> None:
    streamed = StreamedModel(ir.from_proto(chain(8)), tmp_path, max_bytes=LAYER_BYTES, max_live_bytes=0)
    counts = []
    streamed.run(ragged(), taps=[f"mm{i}" for i in range(8)], on_values=lambda *_: counts.append(len(list(tmp_path.rglob("*.npy")))))
    # Of each sample x and one h, and the next h as it is made.
    assert 4 <= max(counts) <= 4 * 3
    assert max(counts) < 4 * 8


def test_errors_are_one_line_and_the_log_stays_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    proto = chain(1)
    proto.graph.node[0].op_type = "NoSuchOp"
    with pytest.raises(ModelError, match=r"ONNX Runtime cannot load the model: .*NoSuchOp") as caught:
        collect(StreamedModel(ir.from_proto(proto), tmp_path), ragged(), ["h0"])
    assert "\n" not in str(caught.value)
    wrong = [{"x": np.zeros((2, WIDTH + 1), np.float32)}]
    with pytest.raises(CalibrationError, match=r"sample 0: .*: check the data$") as failed:
        collect(StreamedModel(ir.from_proto(chain(1)), tmp_path), wrong, ["h0"])
    assert "\n" not in str(failed.value)
    assert ".cc" not in str(failed.value)
    assert capfd.readouterr() == ("", "")


def test_two_values_of_one_name_are_refused(tmp_path: Path) -> None:
    model = ir.from_proto(chain(1))
    model.graph[1].outputs[0].name = "mm0"
    with pytest.raises(ModelError, match="two values are named 'mm0'"):
        StreamedModel(model, tmp_path)
