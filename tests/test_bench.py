"""`fqonnx bench`: sizes, feeds, times, memory and profiles, on the CPU; and the decoder stacks that it is shown with."""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx import TensorProto, helper
from rich.console import Console

from fqonnx import bench as bench_module
from fqonnx.bench import BASELINE, CANDIDATE, Bench, Latency, bench, resolve_shapes
from fqonnx.bench_tables import print_bench
from fqonnx.build import build
from fqonnx.cli.bench import bench as bench_command
from fqonnx.cli.terminal import quiet_libraries
from fqonnx.devices import Memory, device_name
from fqonnx.engines.onnxruntime import run as run_session
from fqonnx.engines.onnxruntime import session
from fqonnx.engines.tensorrt_run import Loaded
from fqonnx.errors import EngineError, ModelError, UsageError
from fqonnx.model import ModelInput
from fqonnx.profile import UNKNOWN, Call, Work, read_calls, read_work, summarize
from fqonnx.recipe import Recipe
from fqonnx.report import EngineReport
from fqonnx.verify.runners import Side
from tests.cli_support import VOCABULARY, K, one_line, write_language_model, write_mlp

SAMPLES = Path(__file__).parents[1] / "samples"
sys.path.insert(0, str(SAMPLES))
decoder: Any = importlib.import_module("decoder")

QUICK: dict[str, Any] = {"duration": 0.0, "warm_up": 0.0, "iterations": 10}
TINY = decoder.Shape(hidden=128, heads=4, kv_heads=2, intermediate=256, layers=2, positions=256)
RECIPE = Recipe(transform="hadamard", weights="rtn")


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mlp(tmp_path_factory.mktemp("models") / "mlp.onnx")


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("decoders")
    for operators in ("onnxruntime", "standard"):
        decoder.export(folder / f"{operators}.onnx", TINY, operators=operators)
    return {operators: folder / f"{operators}.onnx" for operators in ("onnxruntime", "standard")}


@pytest.fixture(scope="module")
def built(stacks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "w4a4"
    build(stacks["onnxruntime"], out, recipe=RECIPE, random_calibration=True, calib_samples=2, target="sm90")
    return out


# --- Sizes


def inputs(**shapes: tuple[int | str | None, ...]) -> tuple[ModelInput, ...]:
    return tuple(ModelInput(name, np.dtype(np.float32), shape) for name, shape in shapes.items())


DECODER = inputs(ids=("batch", "sequence"), mask=("batch", "past + sequence"), cache=("batch", 4, "past", 8))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"ids": ("batch", "sequence"), "mask": ("batch", "past + sequence"), "cache": ("batch", 4, "past", 8)}),
        ({"batch": (2,), "sequence": (3,), "past": (5,)}, None),
        ({"ids": (2, 3), "cache": (2, 4, 5, 8)}, None),
        ({"ids": (2, 3), "mask": (2, 8), "cache": (2, 4, 5, 8)}, None),
        ({"ids": (2, 3)}, {"ids": (2, 3), "mask": (2, "past + sequence"), "cache": (2, 4, "past", 8)}),
        ({"past + sequence": (9,)}, {"ids": ("batch", "sequence"), "mask": ("batch", 9), "cache": ("batch", 4, "past", 8)}),
    ],
)
def test_sizes_are_put_in_wherever_their_names_stand(
    given: dict[str, tuple[int, ...]], expected: dict[str, tuple[int | str, ...]] | None
) -> None:
    assert resolve_shapes(DECODER, given) == (expected or {"ids": (2, 3), "mask": (2, 8), "cache": (2, 4, 5, 8)})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"idz": (1,)}, r"--shapes idz:1 names neither an input nor a dynamic dimension: choose from ids, mask, cache, batch"),
        ({"batch": (1, 2)}, "names neither"),
        ({"ids": (1,)}, r"--shapes ids:1 does not fit the input, which is batchxsequence"),
        ({"cache": (2, 5, 5, 8)}, "does not fit the input, which is batchx4xpastx8"),
        ({"ids": (2, 3), "mask": (4, 8)}, "dimension 'batch' is 4 here and 2 elsewhere"),
        ({"ids": (2, 3), "cache": (2, 4, 5, 8), "mask": (2, 9)}, "is 9, but its parts sum to 8"),
    ],
)
def test_sizes_that_do_not_fit(given: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_shapes(DECODER, given)


# --- Times


def test_statistics_of_times() -> None:
    times = Latency.of([0.001 * n for n in range(1, 101)])
    assert (times.median, times.mean, times.minimum, times.runs) == (pytest.approx(50.5), pytest.approx(50.5), pytest.approx(1), 100)
    assert (times.p90, times.p99) == (pytest.approx(90.1), pytest.approx(99.01))
    assert times.per_second == pytest.approx(1000 / 50.5)


def test_two_models_on_two_sets_of_shapes(mlp: Path, tmp_path: Path) -> None:
    slower = write_mlp(tmp_path / "slower.onnx", layers=40)
    result = bench(mlp, slower, shapes=[{"batch": (1,)}, {"x": (64, K)}], **QUICK)
    assert [shape.inputs for shape in result.shapes] == [{"x": (1, K)}, {"x": (64, K)}]
    for shape in result.shapes:
        assert {role: times.runs for role, times in shape.latency.items()} == {BASELINE: 10, CANDIDATE: 10}
        # Forty times the nodes take more than twice the time, on any machine however busy.
        assert shape.speedup is not None
        assert shape.speedup == shape.latency[BASELINE].median / shape.latency[CANDIDATE].median > 2
    assert result.models[BASELINE].weights == 40 * result.models[CANDIDATE].weights
    assert (result.cuda_graphs, result.kv_cache, result.notes) == (False, None, ())


def test_one_model_alone_has_no_speedup(mlp: Path) -> None:
    result = bench(mlp, **QUICK)
    assert list(result.models) == [CANDIDATE]
    assert result.shapes[0].speedup is None
    assert result.shapes[0].inputs == {"x": (1, K)}


def test_longer_is_more_runs(mlp: Path) -> None:
    result = bench(mlp, **{**QUICK, "duration": 0.3, "warm_up": 0.05})
    times = result.shapes[0].latency[CANDIDATE]
    assert times.runs > 50
    assert 0.05 < times.runs * times.median / 1e3 < 1.5


def test_token_ids_stay_within_the_vocabulary(tmp_path: Path) -> None:
    # One id out of 50 rows and Gather fails: 8,192 of them would not all be in by luck.
    assert VOCABULARY == 50
    result = bench(write_language_model(tmp_path / "lm.onnx"), shapes=[{"batch": (64,), "seq": (128,)}], **QUICK)
    assert result.shapes[0].inputs == {"input_ids": (64, 128)}


def test_bfloat16_goes_in_and_out(tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "bf16.onnx")
    result = bench(tmp_path / "bf16.onnx", shapes=[{"n": (3,)}], **QUICK)
    assert result.shapes[0].inputs == {"x": (3, 4)}


def test_models_of_other_inputs_are_refused(mlp: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no input"):
        bench(mlp, write_language_model(tmp_path / "lm.onnx"), **QUICK)


def test_cuda_graphs_need_cuda(mlp: Path) -> None:
    with pytest.raises(UsageError, match="CUDA graphs need a CUDA device"):
        bench(mlp, cuda_graph=True, **QUICK)


def test_without_cuda_one_line_says_so(mlp: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError) as caught:
        bench(mlp, device="cuda", **QUICK)
    one_line(str(caught.value))


def test_memory_of_this_process_grows_with_what_it_holds() -> None:
    memory = Memory("cpu")
    before = memory.used()
    held = np.ones(64 << 20, np.uint8)
    after = memory.used()
    assert before is not None
    assert after is not None
    assert 60 << 20 < after - before < 80 << 20
    assert held[-1] == 1
    assert device_name("cpu")


# --- Decoders


def feeds(length: int, seen: int = 0, *, dtype: type = np.float16, random: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(random)
    fed = {
        "hidden_states": rng.standard_normal((2, length, TINY.hidden)).astype(dtype),
        "attention_mask": np.ones((2, seen + length), np.int64),
    }
    for layer in range(TINY.layers):
        for part in ("key", "value"):
            fed[f"past_key_values.{layer}.{part}"] = np.zeros((2, TINY.kv_heads, seen, TINY.head), dtype)
    return fed


def as_past(outputs: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("present", "past_key_values"): array for name, array in outputs.items() if name.startswith("present")}


@pytest.mark.parametrize("operators", ["onnxruntime", "standard"])
def test_a_decoder_gives_the_same_with_past_as_all_at_once(stacks: dict[str, Path], operators: str) -> None:
    opened = session(stacks[operators])
    whole = feeds(9)
    expected = run_session(opened, whole)["last_hidden_state"]
    assert float(np.abs(expected).max()) > 1
    out = run_session(opened, {**feeds(6), "hidden_states": whole["hidden_states"][:, :6]})
    steps = [out["last_hidden_state"]]
    for at in range(6, 9):
        fed = {**feeds(1, at), "hidden_states": whole["hidden_states"][:, at : at + 1], **as_past(out)}
        out = run_session(opened, fed)
        steps.append(out["last_hidden_state"])
    assert out["present.1.key"].shape == (2, TINY.kv_heads, 9, TINY.head)
    difference = np.abs(np.concatenate(steps, axis=1).astype(np.float32) - expected.astype(np.float32)).max()
    assert difference < 4e-3  # of values up to 4 in half precision


def test_both_forms_of_a_decoder_are_the_same_model(stacks: dict[str, Path]) -> None:
    results = [run_session(session(path), feeds(9)) for path in stacks.values()]
    for name, array in results[0].items():
        difference = np.abs(array.astype(np.float32) - results[1][name].astype(np.float32)).max()
        assert difference < 2e-2, name
    # Positions count: the same tokens in another order are something else.
    fed = feeds(9)
    turned = run_session(session(stacks["standard"]), {**fed, "hidden_states": fed["hidden_states"][:, ::-1]})
    assert np.abs(turned["last_hidden_state"][:, ::-1] - results[1]["last_hidden_state"]).max() > 0.1


def test_a_decoder_is_valid_onnx_with_weights_beside_it(stacks: dict[str, Path]) -> None:
    for path in stacks.values():
        onnx.checker.check_model(str(path))
        proto = onnx.load(path, load_external_data=False)
        external = [tensor for tensor in proto.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
        assert sum(int(np.prod(tensor.dims)) for tensor in external) * 2 == path.with_name(f"{path.name}.data").stat().st_size
        assert path.stat().st_size < 200_000


def test_real_shapes_have_the_linears_that_kernels_are_made_for() -> None:
    llama2, llama3 = decoder.SHAPES["llama-2-7b"], decoder.SHAPES["llama-3-8b"]
    assert (llama2.head, llama3.head) == (128, 128)
    packed = [(shape.heads + 2 * shape.kv_heads) * shape.head for shape in (llama2, llama3)]
    assert packed == [12288, 6144]
    assert [(work.batch, work.sequence, work.past, work.target) for work in decoder.WORKLOADS] == [
        (1, 2048, 0, 1.6), (1, 1, 512, 1.8), (16, 1, 512, 1.8), (64, 1, 512, 1.8),
    ]  # fmt: skip


def test_a_built_decoder_has_every_linear_in_four_bits(built: Path, stacks: dict[str, Path]) -> None:
    proto = onnx.load(built / "model.onnx")
    counts = Counter(node.op_type for node in proto.graph.node)
    fused = {"RmsNormFlatQuantize": 1, "AddRmsNormFlatQuantize": 3, "SiluMulFlatQuantize": 2}
    expected_counts = {"FlatQuantize": 2, **fused, "W4A4Gemm": 8, "GroupQueryAttention": 2, "SkipSimplifiedLayerNormalization": 1}
    assert {op: count for op, count in counts.items() if op in expected_counts} == expected_counts
    assert not counts.keys() & {"MatMul", "Split", "Sigmoid"}
    reference, quantized = (run_session(session(path), feeds(9)) for path in (stacks["onnxruntime"], built / "model.onnx"))
    expected = reference["last_hidden_state"].astype(np.float32)
    error = np.linalg.norm(quantized["last_hidden_state"].astype(np.float32) - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.1


def test_decoders_with_buffers_of_their_own_and_in_place(built: Path, stacks: dict[str, Path]) -> None:
    sets = [{"batch": (3,), "sequence": (1,), "past_sequence": (16,)}]
    own = bench(built, stacks["onnxruntime"], shapes=sets, **QUICK)
    shared = bench(built, stacks["onnxruntime"], shapes=sets, kv_cache=64, **QUICK)
    key = "past_key_values.1.key"
    assert [result.shapes[0].inputs[key][2] for result in (own, shared)] == [16, 64]
    for result in (own, shared):
        assert result.shapes[0].inputs["attention_mask"] == (3, 17)
    assert shared.kv_cache == 64


def test_keys_and_values_in_place_need_a_model_that_writes_there(mlp: Path, stacks: dict[str, Path]) -> None:
    sets = [{"batch": (1,), "sequence": (1,), "past_sequence": (16,)}]
    with pytest.raises(UsageError, match="no room for 16 tokens"):
        bench(stacks["onnxruntime"], shapes=sets, kv_cache=16, **QUICK)
    with pytest.raises(UsageError, match="takes no past keys and values"):
        bench(mlp, kv_cache=16, **QUICK)
    with pytest.raises(EngineError, match="check --shapes and --kv-cache"):
        bench(stacks["standard"], shapes=sets, kv_cache=32, **QUICK)


def test_the_decoder_sample_measures_every_workload(built: Path, stacks: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    workloads = [
        replace(work, batch=min(work.batch, 2), sequence=min(work.sequence, 8), past=work.past // 32, cache=work.cache // 16)
        for work in decoder.WORKLOADS
    ]
    cases = decoder.measure(
        "tiny",
        built,
        stacks["onnxruntime"],
        workloads,
        device="cpu",
        duration=0.0,
        profile=False,
        in_place=True,
        console=Console(width=120),
    )
    assert {(case.workload.batch, case.workload.sequence, case.workload.past) for case in cases} == {(1, 8, 0), (1, 1, 16), (2, 1, 16)}
    assert len(cases) == 4
    # The bodies on a CPU are no faster than the float model.
    assert not any(case.met for case in cases)
    saved = json.loads((built.parent / "bench-64.json").read_text())
    assert len(saved["shapes"]) == 3
    capsys.readouterr()
    Console(width=120).print(decoder.summary(cases))
    assert capsys.readouterr().out.count("not met") == 4


# --- Profiles


def test_a_profile_sums_nodes_by_op_per_run(mlp: Path) -> None:
    result = bench(mlp, profile=True, **QUICK)
    profile = result.shapes[0].profile[CANDIDATE]
    assert profile.measured == "host"
    assert profile.kernels == {}
    calls = {op: time.calls for op, time in profile.ops.items()}
    # ONNX Runtime fuses what it can; per run each product is there once, in whatever form.
    assert sum(count for op, count in calls.items() if op in ("MatMul", "Gemm", "FusedGemm", "FusedMatMul")) == 2
    assert all(time.microseconds >= 0 for time in profile.ops.values())
    assert list(profile.ops.values()) == sorted(profile.ops.values(), key=lambda time: -time.microseconds)


def node(op: str, ts: float, dur: float) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{op}_1_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": op}}


def test_calls_of_the_last_runs_alone() -> None:
    events = [
        {"cat": "Session", "name": "model_run", "ts": 0, "dur": 90},
        node("Add", 1, 50),
        {"cat": "Session", "name": "model_run", "ts": 100, "dur": 90},
        node("MatMul", 130, 30),
        node("Add", 101, 20),
        {"cat": "Node", "name": "Add_1_fence_before", "ts": 101, "dur": 1, "args": {"op_name": "Add"}},
    ]
    calls = read_calls(events, 1, begin=5e6)
    assert calls == [Call("Add", 5e6 + 101e3, 20e3), Call("MatMul", 5e6 + 130e3, 30e3)]
    assert {op: (time.microseconds, time.calls) for op, time in summarize(calls, 1).ops.items()} == {"MatMul": (30, 1), "Add": (20, 1)}


def test_the_devices_work_belongs_to_the_node_that_launched_it() -> None:
    trace = {
        "baseTimeNanoseconds": 1000,
        "traceEvents": [
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 9.0, "dur": 1, "args": {"correlation": 7}},
            {"ph": "X", "cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 30.0, "dur": 1, "args": {"correlation": 8}},
            {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 500.0, "dur": 40, "args": {"correlation": 7}},
            {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy", "ts": 700.0, "dur": 2, "args": {"correlation": 8}},
            {"ph": "X", "cat": "kernel", "name": "lost", "ts": 700.0, "dur": 2, "args": {"correlation": 99}},
            {"ph": "M", "name": "process_name"},
        ],
    }
    assert read_work(trace) == [Work("gemm", 10_000, 40_000), Work("Memcpy", 31_000, 2_000)]


def test_work_is_summed_by_node_and_by_kernel() -> None:
    calls = [Call("MatMul", 100, 50), Call("Add", 200, 50), Call("MatMul", 300, 50), Call("Add", 400, 50)]
    work = [
        Work("gemm", 50, 9e3),  # before the first call: an earlier run's
        Work("gemm", 120, 10e3),
        Work("reduce", 149, 2e3),
        Work("add", 210, 3e3),
        Work("copy", 270, 1e3),  # between two calls
        Work("gemm", 310, 14e3),
        Work("add", 450, 5e3),
    ]
    profile = summarize(calls, 2, work)
    assert profile.measured == "device"
    assert {op: (time.microseconds, time.calls) for op, time in profile.ops.items()} == {
        "MatMul": (13, 1),
        "Add": (4, 1),
        UNKNOWN: (0.5, 0),
    }
    assert profile.kernels == {"gemm": 12, "add": 4, "reduce": 1, "copy": 0.5}


# --- The command


def invoke(*args: str | Path) -> Result:
    with quiet_libraries():  # as main() does: the command sets the log's level
        return CliRunner().invoke(bench_command, [str(arg) for arg in args])


def test_sets_of_shapes_on_the_command_line(mlp: Path, stacks: dict[str, Path]) -> None:
    done = invoke(mlp, "--baseline", mlp, "--shapes", "x:[3,32]", "--shapes", "batch:5", "--duration", "0", "--json", "-q")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [shape["inputs"] for shape in found["shapes"]] == [{"x": [3, 32]}, {"x": [5, 32]}]
    assert set(found["models"]) == {BASELINE, CANDIDATE}
    assert found["shapes"][0]["latency_ms"][BASELINE]["per_second"] > 0
    sizes = ("--shapes", "batch:1", "sequence:3", "past_sequence:4", "--shapes", "batch:1", "--duration", "0", "--json", "-q")
    done = invoke(stacks["onnxruntime"], *sizes)
    assert done.exit_code == 0, done.output
    assert [shape["asked"] for shape in json.loads(done.stdout)["shapes"]] == [
        {"batch": [1], "sequence": [3], "past_sequence": [4]},
        {"batch": [1]},
    ]


def test_a_shape_that_is_none(mlp: Path) -> None:
    done = invoke(mlp, "--shapes", "x=3x32")
    assert done.exit_code == 2
    assert "'x=3x32' is no shape: write NAME:1x3" in done.output


def printed(result: Bench) -> str:
    with io.StringIO() as text:
        print_bench(result, Console(width=100, file=text))
        return text.getvalue()


def test_tables_for_people(mlp: Path) -> None:
    result = bench(mlp, mlp, shapes=[{"batch": (7,)}], profile=True, **QUICK)
    text = printed(replace(result, cuda_graphs=True, kv_cache=640, notes=("a note",)))
    for said in (
        "batch:7",
        "baseline",
        "candidate",
        "speed-up",
        "p99",
        "Time by op",
        "replayed CUDA graphs",
        "buffers of 640 tokens",
        "note: a note",
    ):
        assert said in text, said
    assert "\n\n\n" not in text
    alone = printed(bench(mlp, **QUICK))
    assert "baseline" not in alone
    assert "x:1x32" in alone
    assert "one call each" in alone


# --- Engines


ENGINE = EngineReport(engine="tensorrt", version="10.13.0", profiles=({"x": ((1, 32), (1, 32), (64, 32))},))


class BoundStandIn:
    """``BoundEngine`` without a GPU: it keeps what it was bound to and counts its runs."""

    made: ClassVar[list[BoundStandIn]] = []

    def __init__(self, engine: object, built: EngineReport, inputs: dict[str, Any], *, graph: bool) -> None:
        self.engine, self.built, self.inputs, self.graph, self.runs = engine, built, inputs, graph, 0
        self.made.append(self)

    def run(self) -> None:
        self.runs += 1


@pytest.fixture
def engine_side(mlp: Path, monkeypatch: pytest.MonkeyPatch) -> Side:
    monkeypatch.setattr(BoundStandIn, "made", [])
    monkeypatch.setattr(bench_module, "BoundEngine", BoundStandIn)
    monkeypatch.setattr(bench_module, "load_engine", lambda path, built: Loaded((path, built), None, None))
    return replace(Side.open(mlp), engine=(Path("engine.plan"), ENGINE))


def test_an_engine_is_bound_once_a_set_and_run_as_often_as_timed(engine_side: Side) -> None:
    feeds = [{"x": np.full((rows, 32), rows, np.float32)} for rows in (1, 5)]
    runner = bench_module._EngineRunner(engine_side, feeds, captured=True, memory=Memory("cpu"), device="cpu")
    first, second = BoundStandIn.made
    assert [bound.inputs["x"].tolist() for bound in (first, second)] == [fed["x"].tolist() for fed in feeds]
    assert all(bound.graph and bound.built is ENGINE and bound.runs == 1 for bound in (first, second))
    seconds = runner.time(1, 7)
    assert len(seconds) == 7
    assert min(seconds) >= 0
    assert (first.runs, second.runs) == (1, 1 + 2 + 7)
    assert runner.result.name == "mlp.onnx (TensorRT 10.13.0)"
    assert runner.result.weights == sum(t.const_value.nbytes for t in engine_side.model.graph.initializers.values() if t.const_value)


def test_bfloat16_reaches_torch_as_it_is() -> None:
    array = np.array([1.5, -3.0, 1e30], ml_dtypes.bfloat16)
    tensor = bench_module._to_torch(array, "cpu")
    assert tensor.dtype == torch.bfloat16
    assert tensor.float().tolist() == array.astype(np.float32).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "--engine runs on a CUDA device: give --device cuda"),
        ({"device": "cuda", "kv_cache": 64}, "--kv-cache is for models in ONNX Runtime"),
        ({"device": "cuda", "profile": True}, "--profile is for models in ONNX Runtime"),
    ],
)
def test_what_an_engine_is_not_measured_with(
    engine_side: Side, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(Side, "open", lambda path: engine_side)
    with pytest.raises(UsageError, match=message):
        bench("out", engine=True, **options)


def test_a_build_without_an_engine(built: Path) -> None:
    with pytest.raises(UsageError, match="w4a4 has no engine file: leave out --engine, or build it with --engine tensorrt"):
        bench(built, engine=True, device="cuda")


def test_tables_name_what_ran(mlp: Path) -> None:
    result = bench(mlp, **QUICK)
    assert "ONNX Runtime 1." in printed(result)
    assert "TensorRT 10.13.0; one call" in printed(replace(result, versions=result.versions | {"tensorrt": "10.13.0"}))


@pytest.mark.gpu
def test_on_a_gpu_with_and_without_graphs(mlp: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    replayed = bench(mlp, mlp, shapes=[{"batch": (1,)}, {"batch": (64,)}], device="cuda", profile=True, **QUICK)
    called = bench(mlp, mlp, shapes=[{"batch": (64,)}], device="cuda", cuda_graph=False, **QUICK)
    assert (replayed.cuda_graphs, called.cuda_graphs) == (True, False)
    assert {p.measured for shape in replayed.shapes for p in shape.profile.values()} == {"device"}
    assert all(model.memory is not None and model.memory >= model.weights for model in replayed.models.values())
