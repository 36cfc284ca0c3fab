"""Quantized caches of keys and values: formats against numbers by hand, passes against the float model, transforms, whole builds."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from fqonnx import model as model_file
from fqonnx.bench import bench
from fqonnx.build import build
from fqonnx.cache_plan import FILE, comparable
from fqonnx.calib import kv
from fqonnx.calib.chunks import HELD_OUT
from fqonnx.concat_cache_plan import ConcatCachePlan
from fqonnx.decoding import Decoder
from fqonnx.errors import CalibrationError, ModelError, UsageError
from fqonnx.passes import kv_cache, linears
from fqonnx.passes.edit import Insertion, Names
from fqonnx.passes.kv_cache import CacheTransform, QuantizeCache, TransformCache, with_float_cache
from fqonnx.passes.kv_cache_formats import FORMATS, Emitter, dequantize, quantize
from fqonnx.passes.pipeline import check, quantize_model
from fqonnx.passes.prepare import prepare
from fqonnx.recipe import KV_CACHES, Recipe
from fqonnx.verify import verify
from tests.rewriting import Builder
from tests.runtime import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

sys.path.insert(0, str(Path(__file__).parents[1] / "samples"))
decoder = importlib.import_module("decoder")

SHAPE = decoder.Shape(hidden=64, heads=4, kv_heads=2, intermediate=96, layers=2, positions=64)
HEADS, SIZE = SHAPE.kv_heads, SHAPE.head
Feeds = dict[str, Any]


@pytest.fixture(scope="module")
def decoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "decoder.onnx"
    decoder.export(path, SHAPE, operators="standard", dtype=ir.DataType.FLOAT)
    return path


def load(path: Path) -> ir.Model:
    return prepare(ir.external_data.load_to_model(model_file.load(path)))


def feeds(tokens: int, past: int = 0, batch: int = 2, seed: int = 0) -> Feeds:
    rng = np.random.default_rng(seed)
    caches = {
        f"past_key_values.{layer}.{part}": rng.normal(size=(batch, HEADS, past, SIZE)).astype(np.float32)
        for layer in range(SHAPE.layers)
        for part in ("key", "value")
    }
    hidden = rng.normal(size=(batch, tokens, SHAPE.hidden)).astype(np.float32)
    return {"hidden_states": hidden, "attention_mask": np.ones((batch, past + tokens), np.int64), **caches}


def transforms(layers: tuple[kv_cache.CacheLayer, ...], *, shared: bool = False, mean: bool = True) -> dict[str, CacheTransform | None]:
    rng = np.random.default_rng(1)
    found: dict[str, CacheTransform | None] = {}
    for layer in layers:
        for cache in (layer.key, layer.value):
            matrix = rng.normal(size=(1 if shared else HEADS, SIZE, SIZE)).astype(np.float32)
            moved = (rng.normal(size=(HEADS, SIZE)) / 20).astype(np.float32) if mean and cache is layer.key else None
            found[cache.name] = CacheTransform(np.linalg.qr(matrix)[0] * np.exp(rng.normal(size=SIZE) / 4).astype(np.float32), moved)
    return found


def distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    assert list(a) == list(b)
    return max(float(np.linalg.norm(a[n] - b[n]) / np.linalg.norm(b[n])) for n in a)


# --- Formats


def test_the_command_line_offers_the_formats() -> None:
    assert ("none", *FORMATS) == KV_CACHES


def test_int8_by_hand() -> None:
    # The range -2 .. 8.2 in 255 steps of 0.04: zero is code 50.
    parts = quantize(np.array([[-2.0, 0.0, 8.2, 1.0]], np.float32), FORMATS["int8"])
    assert parts["scale"] == pytest.approx(0.04)
    assert parts["zero_point"].tolist() == [[50]]
    assert parts["codes"].tolist() == [[0, 50, 255, 75]]
    np.testing.assert_allclose(dequantize(parts, FORMATS["int8"]), [[-2, 0, 8.2, 1]], atol=1e-6)


def test_int4_by_hand() -> None:
    # The range -4 .. 12 in 16 cells of width 1 with values at -3.5, -2.5, ..: a scale is a sixteenth of it, zero 3.5 cells up.
    x = np.array([[-4.0, 0.2, 12.0, 1.0, -0.9, 5.1]], np.float32)
    parts = quantize(x, FORMATS["int4"])
    assert parts["scale"] == pytest.approx(1 / 16)
    assert parts["zero_point"].tolist() == [[56]]
    nibbles = [0, 4, 15, 4, 3, 9]  # 1.0 lies between the cells of 0.5 and 1.5: to even
    assert parts["codes"].tolist() == [[n | m << 4 for n, m in zip(nibbles[:3], nibbles[3:], strict=True)]]
    np.testing.assert_allclose(dequantize(parts, FORMATS["int4"]), [[-3.5, 0.5, 11.5, 0.5, -0.5, 5.5]], atol=1e-6)


def test_fp8_by_hand() -> None:
    # 448 is the largest E4M3 number; 0.4375 = 7/16 = 1.75 * 2^-2 is code (7 - 2) * 8 + 6, 2^-9 the smallest.
    parts = quantize(np.array([[448.0, -448.0, 0.4375, 2.0**-9]], np.float32), FORMATS["fp8"])
    assert parts["scale"] == pytest.approx(1)
    assert parts["codes"].tolist() == [[0x7E, 0xFE, 46, 1]]
    np.testing.assert_array_equal(dequantize(parts, FORMATS["fp8"]), [[448, -448, 0.4375, 2.0**-9]])


def test_int4_has_a_scale_for_every_32_values() -> None:
    x = np.concatenate([np.linspace(0, 16, 33)[:-1], np.linspace(0, 160, 33)[:-1]]).astype(np.float32)[None]
    parts = quantize(x, FORMATS["int4"])
    np.testing.assert_allclose(parts["scale"], [[15.5 / 256, 155 / 256]])
    assert parts["zero_point"].tolist() == [[0, 0]]
    y = dequantize(parts, FORMATS["int4"])
    assert float(np.abs(y - x)[0, :32].max()) < 1
    assert 1 < float(np.abs(y - x)[0, 32:].max()) < 10


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [("int8", 64, 64 + 2 + 1), ("int4", 64, 32 + 2 * (2 + 1)), ("int4", 48, 24 + 2 + 1), ("fp8", 128, 128 + 2)],
)
def test_bytes(name: str, size: int, expected: int) -> None:
    assert FORMATS[name].bytes_per_vector(size, ir.DataType.FLOAT16) == expected


def format_model(name: str, dtype: ir.DataType, size: int) -> ir.Model:
    """x to its parts, and from these to y."""
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["b", 3, "t", size]))
    end = ir.node("Identity", [x], name="end")
    graph = ir.Graph([x], [], nodes=[end], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    emitter = Emitter(Insertion(end, Names(model), {}), "cache", FORMATS[name], dtype, size)
    parts = emitter.quantize(x)
    y = emitter.dequantize(parts)
    for part, value in {**parts, "y": y}.items():
        value.name = part
        graph.outputs.append(value)
    graph.remove(end)
    return model


HARD_ROWS = {
    "zeros": np.zeros(8),
    "ones": np.ones(8),
    "negative": -np.arange(1.0, 9.0),
    "one large": np.array([1e4, 0, 0, 0, 1, 1, 1, 1]),
    "tiny": np.full(8, 1e-7),
    "half way": np.array([0, 15, 0.5, 1.5, 2.5, 3.5, -1, 7]),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
@pytest.mark.parametrize("size", [8, 64])
def test_nodes_are_the_reference(name: str, dtype: ir.DataType, size: int) -> None:
    model = format_model(name, dtype, size)
    check(model)
    rng = np.random.default_rng(0)
    x = np.concatenate([np.stack([*HARD_ROWS.values()]), rng.normal(size=(54, 8)) * np.exp(rng.normal(size=(54, 1)) * 3)])
    x = np.tile(x.reshape(2, 3, 10, 8), size // 8).astype(dtype.numpy()) * np.repeat([1, 0.25], size // 2).astype(dtype.numpy())
    got = run(model, {"x": x})
    expected = quantize(x, FORMATS[name])
    for part, array in expected.items():
        np.testing.assert_array_equal(got[part], array, err_msg=part)
    np.testing.assert_allclose(got["y"], dequantize(expected, FORMATS[name]), rtol=1e-3 if dtype == ir.DataType.FLOAT16 else 1e-6)
    assert not np.isnan(got["y"]).any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_seen(name: str, bad: float) -> None:
    x = np.ones((1, 3, 2, 8), np.float32)
    x[0, 1, 1, 5] = bad
    y = run(format_model(name, ir.DataType.FLOAT, 8), {"x": x})["y"]
    assert np.isnan(y[0, 1, 1]).all()
    assert np.isnan(dequantize(quantize(x, FORMATS[name]), FORMATS[name])[0, 1, 1]).all()
    y[0, 1, 1] = 1
    np.testing.assert_allclose(y, 1, rtol=0.07)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [8, 64])
def test_no_tokens(name: str, size: int) -> None:
    x = np.zeros((2, 3, 0, size), np.float32)
    assert run(format_model(name, ir.DataType.FLOAT, size), {"x": x})["y"].shape == x.shape


def test_every_e4m3_number_comes_back() -> None:
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    finite = values[np.isfinite(values)]  # two are NaN, and of the two zeros one is negative
    row = np.concatenate([finite, [448.0, 0.0]]).astype(np.float32)
    x = np.broadcast_to(row, (1, 3, 2, len(row)))
    y = run(format_model("fp8", ir.DataType.FLOAT, x.shape[-1]), {"x": x})["y"]
    np.testing.assert_array_equal(y, x)


# --- Finding caches


def test_find(decoder_file: Path) -> None:
    layers = kv_cache.find(load(decoder_file))
    assert [(layer.key.name, layer.value.name) for layer in layers] == [
        (f"past_key_values.{n}.key", f"past_key_values.{n}.value") for n in range(SHAPE.layers)
    ]
    assert {(layer.key.heads, layer.key.size, layer.query_heads, layer.shift_invariant) for layer in layers} == {(2, 16, 4, True)}


def test_fused_attention_is_refused(tmp_path: Path) -> None:
    decoder.export(tmp_path / "gqa.onnx", SHAPE, operators="onnxruntime", dtype=ir.DataType.FLOAT)
    with pytest.raises(ModelError, match=r"is GroupQueryAttention, which keeps its keys and values itself: .* or leave out --kv"):
        kv_cache.find(load(tmp_path / "gqa.onnx"))


def attention(
    *, bias: bool = False, gemm: bool = False, tanh: bool = False, norm: bool = False, change: Callable[[Builder], None] | None = None
) -> ir.Model:
    """One head of attention on x ``[1, S, 8]``, hand made: v with a bias or a norm, scores through a tanh."""
    b = Builder()
    x = b.input("x", [1, "s", 8])
    pasts = [b.input(f"past.{part}", [1, 1, "t", 8]) for part in ("key", "value")]
    sizes = {"axis": [1], "flat": [-1, 8], "split": [1, 1, -1, 8], "merge": [1, -1, 8]}
    axis, flat, split, merge = (b.constant(name, np.array(size)) for name, size in sizes.items())
    q, k = (b.node("Unsqueeze", [b.linear(x, 8, 8, name), axis], f"{name}_heads") for name in ("q", "k"))
    if gemm:
        rows = b.node("Reshape", [x, flat], "rows")
        v = b.node("Gemm", [rows, b.random("v.weight", 8, 8), b.random("v.bias", 8)], "v", transB=1)
        v = b.node("Reshape", [v, split], "v_heads")
    else:
        v = b.linear(x, 8, 8, "v", bias="right" if bias else None)
        v = b.node("Reshape", [b.layer_norm(v, 8, "v_norm") if norm else v, split], "v_heads")
    present = [b.node("Concat", [past, new], f"present_{past}", axis=-2) for past, new in zip(pasts, (k, v), strict=True)]
    scores = b.node("MatMul", [q, b.node("Transpose", [present[0]], "kt", perm=[0, 1, 3, 2])], "scores")
    if tanh:
        scores = b.node("Tanh", [scores], "capped")
    weights = b.node("Softmax", [scores], "probabilities", axis=-1)
    attended = b.node("Reshape", [b.node("MatMul", [weights, present[1]], "attend"), merge], "merged")
    y = b.linear(attended, 8, 8, "o")
    b.output(y, [1, "s", 8])
    for value in present:
        b.output(value, [1, 1, "t + s", 8])
    if change is not None:
        change(b)
    return prepare(ir.from_proto(b.model()))


def attention_feeds(past: int = 3) -> Feeds:
    rng = np.random.default_rng(2)
    shapes = {"x": (1, 5, 8), "past.key": (1, 1, past, 8), "past.value": (1, 1, past, 8)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.output(b.node("Relu", ["past.key"], "extra"), [1, 1, "t", 8]), "'past.key': it is read by Relu"),
        (lambda b: b.outputs.pop(), "'past.value': what 'present_past.value' makes of it is no output"),
    ],
)
def test_caches_of_another_form(change: Callable[[Builder], None], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        kv_cache.find(attention(change=change))


def test_a_model_without_a_cache() -> None:
    b = Builder()
    b.output(b.linear(b.input("x", [1, "s", 8]), 8, 8, "l"), [1, "s", 8])
    with pytest.raises(ModelError, match="the model takes no past keys and values: export it with them"):
        kv_cache.find(prepare(ir.from_proto(b.model())))


# --- Transforms


@pytest.mark.parametrize("shared", [True, False])
def test_transforms_leave_the_model_as_it_is(decoder_file: Path, shared: bool) -> None:
    model = load(decoder_file)
    layers = kv_cache.find(model)
    expected = [run(model, feeds(*sizes)) for sizes in ((7, 0), (3, 5))]
    products = sum(node.op_type == "MatMul" for node in model.graph)
    assert TransformCache(layers, transforms(layers, shared=shared))(model).modified
    check(model)
    for sizes, outputs in zip(((7, 0), (3, 5)), expected, strict=True):
        assert distance(run(model, feeds(*sizes)), outputs) < 3e-5
    added = sum(node.op_type == "MatMul" for node in model.graph) - products
    assert added == SHAPE.layers * (2 + 2 * 2), "queries and keys; the interface of both caches; P_v is in the weights"


def test_nothing_to_transform(decoder_file: Path) -> None:
    model = load(decoder_file)
    layers = kv_cache.find(model)
    before = len(model.graph)
    assert not TransformCache(layers, {layers[0].key.name: None})(model).modified
    assert len(model.graph) == before


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"gemm": True}, {"norm": True}, {"tanh": True}])
def test_values_fold_into_any_linear(options: dict[str, bool]) -> None:
    model = attention(**options)
    layers = kv_cache.find(model)
    assert layers[0].shift_invariant is not options.get("tanh", False)
    rng = np.random.default_rng(3)
    expected = run(model, attention_feeds())
    matrices = {name: CacheTransform(rng.normal(size=(1, 8, 8)).astype(np.float32)) for name in ("past.key", "past.value")}
    TransformCache(layers, matrices)(model)
    check(model)
    assert distance(run(model, attention_feeds()), expected) < 1e-4
    inserted = any((node.name or "").startswith("past.value.transform") for node in model.graph)
    assert inserted is options.get("norm", False), "behind a norm P_v is a product of its own"


def test_a_shared_weight_is_folded_for_one_reader_alone() -> None:
    def share(b: Builder) -> None:
        b.nodes.append(b.nodes[0].__class__())
        b.nodes[-1].CopyFrom(next(node for node in b.nodes if node.name == "v"))
        b.nodes[-1].name, b.nodes[-1].output[0] = "twin", "twin_out"
        b.output("twin_out", [1, "s", 8])

    model = attention(change=share)
    expected = run(model, attention_feeds())
    TransformCache(kv_cache.find(model), {"past.value": CacheTransform(np.diag(np.arange(1.0, 9.0)).astype(np.float32)[None])})(model)
    assert distance(run(model, attention_feeds()), expected) < 1e-5


def test_what_a_layer_does_not_bear() -> None:
    model = attention(tanh=True)
    layers = kv_cache.find(model)
    moved = CacheTransform(np.eye(8, dtype=np.float32)[None], np.ones((1, 8), np.float32))
    with pytest.raises(ir.passes.PreconditionError, match=r"'past\.key' cannot be moved by a mean"):
        TransformCache(layers, {"past.key": moved})(model)
    with pytest.raises(ir.passes.PreconditionError, match=r"'past\.value' cannot be moved by a mean"):
        TransformCache(layers, {"past.value": moved})(model)


def test_products_of_the_cache_are_no_linears(decoder_file: Path) -> None:
    model = load(decoder_file)
    before = linears.find(model)
    layers = kv_cache.find(model)
    TransformCache(layers, transforms(layers))(model)
    after = linears.find(model)
    assert [group.name for group in after.groups] == [group.name for group in before.groups]
    assert [left.name for left in after.left_in_float] == [left.name for left in before.left_in_float]


# --- The interface


def quantized(path: Path, name: str, *, transformed: bool = True) -> tuple[ir.Model, dict[str, CacheTransform | None]]:
    model = load(path)
    layers = kv_cache.find(model)
    found = transforms(layers) if transformed else {}
    TransformCache(layers, found)(model)
    assert QuantizeCache(layers, FORMATS[name])(model).modified
    check(model)
    return model, found


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("transformed", [True, False])
def test_a_text_in_chunks_is_the_text(decoder_file: Path, name: str, transformed: bool) -> None:
    model, _ = quantized(decoder_file, name, transformed=transformed)
    form = FORMATS[name]
    inputs = {value.name: value for value in model.graph.inputs}
    columns = SIZE // 2 if name == "int4" else SIZE
    assert inputs["past_key_values.1.key"].dtype == ir.DataType.UINT8
    assert inputs["past_key_values.1.key"].shape[3] == columns
    assert inputs["past_key_values.1.key.scale"].dtype == ir.DataType.FLOAT
    assert ("past_key_values.0.value.zero_point" in inputs) is form.zero_point

    whole = feeds(9)
    empty = {n: np.zeros((2, HEADS, 0, int(v.shape[3])), v.dtype.numpy()) for n, v in inputs.items() if str(n).startswith("past")}
    text = {"hidden_states": whole["hidden_states"], "attention_mask": whole["attention_mask"]}
    expected = run(model, {**text, **empty})
    first = run(model, {"hidden_states": text["hidden_states"][:, :4], "attention_mask": text["attention_mask"][:, :4], **empty})
    cache = {n.replace("present", "past_key_values"): array for n, array in first.items() if n.startswith("present")}
    assert set(cache) == set(empty)
    second = run(model, {"hidden_states": text["hidden_states"][:, 4:], "attention_mask": text["attention_mask"], **cache})
    joined = np.concatenate([first["last_hidden_state"], second["last_hidden_state"]], axis=1)
    np.testing.assert_allclose(joined, expected["last_hidden_state"], atol=1e-5)
    for n in cache:
        present = n.replace("past_key_values", "present")
        np.testing.assert_array_equal(second[present], expected[present])


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.01), ("int4", 0.15), ("fp8", 0.05)])
def test_the_float_interface_comes_back(decoder_file: Path, name: str, bound: float) -> None:
    model, found = quantized(decoder_file, name)
    nodes = len(model.graph)
    wrapped = with_float_cache(model, found)
    check(wrapped)
    assert len(model.graph) == nodes, "the model is left as it is"
    reference = load(decoder_file)
    assert [v.name for v in wrapped.graph.inputs] == [v.name for v in reference.graph.inputs]
    assert [v.name for v in wrapped.graph.outputs] == [v.name for v in reference.graph.outputs]
    for sizes in ((6, 0), (3, 4)):
        error = distance(run(wrapped, feeds(*sizes)), run(reference, feeds(*sizes)))
        assert 1e-5 < error < bound


def test_a_float_model_has_no_float_interface_to_put_back(decoder_file: Path) -> None:
    with pytest.raises(ModelError, match="is not quantized"):
        with_float_cache(load(decoder_file), {})


def test_a_cache_is_quantized_once(decoder_file: Path) -> None:
    model, _ = quantized(decoder_file, "int8")
    with pytest.raises(ModelError, match="quantized already"):
        QuantizeCache((), FORMATS["int8"])(model)


def test_shapes_of_the_cache_are_asked_of_the_codes() -> None:
    def ask(b: Builder) -> None:
        b.nodes.append(helper.make_node("Shape", ["past.key"], ["whole"], name="whole"))
        b.nodes.append(helper.make_node("Shape", ["past.key"], ["tokens"], name="tokens", start=2, end=3))
        for name, size in (("whole", 4), ("tokens", 1)):
            b.nodes.append(helper.make_node("Cast", [name], [f"{name}_f"], name=f"{name}_f", to=TensorProto.FLOAT))
            b.output(f"{name}_f", [size])

    model = attention(change=ask)
    QuantizeCache(kv_cache.find(model), FORMATS["int4"])(model)
    check(model)
    cache = {
        f"past.{part}{suffix}": np.zeros((1, 1, 3, columns), dtype)
        for part in ("key", "value")
        for suffix, columns, dtype in (("", 4, np.uint8), (".scale", 1, np.float32), (".zero_point", 1, np.uint8))
    }
    got = run(model, {"x": attention_feeds()["x"], **cache})
    assert got["whole_f"].tolist() == [1, 1, 3, 8]
    assert got["tokens_f"].tolist() == [3]


# --- Calibration


class Source:
    """Feeds with a few channels of keys far larger than others, and a large mean."""

    length = 4
    fingerprint = "four"

    def __iter__(self) -> Iterator[Feeds]:
        return iter([feeds(48, seed=seed) for seed in range(4)])


def test_transforms_win_on_tokens_that_were_not_trained_on(decoder_file: Path, tmp_path: Path) -> None:
    model = load(decoder_file)
    layers = kv_cache.find(model)
    solution = kv.fit(model, layers, Source(), FORMATS["int4"], workdir=tmp_path, steps=60)
    for layer in layers:
        for cache in (layer.key, layer.value):
            metrics = solution.metrics[cache.name]
            assert metrics["error"] == min(metrics[f"error_{name}"] for name in ("none", "hadamard", "learned"))
            assert 0 < metrics["error"] < 0.02
        found = solution.transforms[layer.key.name]
        assert found is None or (found.matrix.shape in ((1, SIZE, SIZE), (HEADS, SIZE, SIZE)) and found.mean is not None)
    again = kv.fit(model, layers, Source(), FORMATS["int4"], workdir=tmp_path, steps=60)
    for name, transform in solution.transforms.items():
        other = again.transforms[name]
        assert (transform is None) == (other is None)
        if transform is not None and other is not None:
            np.testing.assert_array_equal(transform.matrix, other.matrix)
    assert "learned" in solution.summary


def test_learned_transforms_beat_rotations_where_directions_differ() -> None:
    import torch

    rng = np.random.default_rng(4)
    spread = np.exp(rng.normal(size=(1, 16)) * 1.5)
    tokens = (rng.normal(size=(2, 512, 16)) * spread).astype(np.float32)
    weight = torch.from_numpy(np.diag(1 / spread[0] ** 2))[None]
    rotation = torch.from_numpy(kv._rotation(16, 0))
    x = torch.from_numpy(tokens)
    matrix = kv._learned(x[:, :384], weight, rotation, kv.Training(steps=40), seed=0)
    learned, rotated, plain = (float(kv._error(x[:, 384:], weight.float(), m)) for m in (matrix, rotation, torch.eye(16)[None]))
    assert learned < 0.5 * rotated
    assert learned < 0.5 * plain


def test_the_balanced_transform_by_hand() -> None:
    import torch

    # C = diag(4, 1), S = diag(1, 16): the geometric mean of C⁻¹ and S is diag(1/2, 4), P its root, up to one factor.
    c, s = (torch.diag(torch.tensor(values, dtype=torch.float64)) for values in ([4.0, 1.0], [1.0, 16.0]))
    matrix = kv._balanced(c, s)
    ratio = matrix / matrix[0, 0]
    assert float(ratio[1, 1]) == pytest.approx(8**0.5, rel=1e-3)
    assert float(ratio[0, 1]) == pytest.approx(0, abs=1e-9)


ONE_CHANNEL = np.eye(16)[[3] * 40][None].repeat(2, 0) * 1e4


@pytest.mark.parametrize("tokens", [np.zeros((2, 40, 16)), np.ones((2, 40, 16)), np.ones((2, 1, 16)), ONE_CHANNEL])
def test_degenerate_tokens_have_transforms(tokens: Any) -> None:
    import torch

    x = torch.from_numpy(tokens.astype(np.float32))
    rotation = torch.from_numpy(kv._rotation(16, 0))
    for weight in (torch.eye(16, dtype=torch.float64)[None], torch.zeros(1, 16, 16, dtype=torch.float64)):
        matrix = kv._learned(x, weight, rotation, kv.Training(steps=5), seed=0)
        assert bool(torch.isfinite(matrix).all())
        assert float(torch.linalg.cond(matrix).max()) < 1e5


def test_keys_that_are_not_finite(decoder_file: Path, tmp_path: Path) -> None:
    class Bad(Source):
        fingerprint = "bad"

        def __iter__(self) -> Iterator[Feeds]:
            feed = feeds(8)
            feed["hidden_states"][0, 3] = np.nan
            return iter([feed])

    model = load(decoder_file)
    with pytest.raises(CalibrationError, match="holds NaN or Inf: check the model in float first"):
        kv.fit(model, kv_cache.find(model), Bad(), FORMATS["int4"], workdir=tmp_path)


@pytest.mark.parametrize(
    ("name", "method", "expected"),
    [("int8", "learned", "4 none"), ("int4", "hadamard", "4 hadamard"), ("int4", "none", "4 none")],
)
def test_nothing_is_run_where_nothing_is_learned(decoder_file: Path, tmp_path: Path, name: str, method: str, expected: str) -> None:
    model = load(decoder_file)
    solution = kv.fit(model, kv_cache.find(model), [], FORMATS[name], method=method, workdir=tmp_path)  # type: ignore[arg-type]  # not read
    assert solution.summary == expected
    assert not list(tmp_path.iterdir())


def test_padding_does_not_count() -> None:
    tensor = np.arange(2 * 1 * 3 * 2, dtype=np.float32).reshape(2, 1, 3, 2)
    kept = kv._kept({"mask": np.array([[1, 1, 1, 1], [0, 0, 0, 1]])}, "mask", tensor)
    assert kept.tolist() == [[True, True, True], [False, False, True]]
    assert kv._sampled(tensor, kept, 10, [0]).reshape(-1, 2).tolist() == [[0, 1], [2, 3], [4, 5], [10, 11]]


def test_moments_by_hand() -> None:
    class Head:
        heads, size = 1, 2

    queries = np.array([[[[1.0, 2.0]], [[0.0, 3.0]]]], np.float32)  # two query heads, one token
    kept = np.ones((1, 1), bool)
    assert kv._moment(queries, kept, Head(), 2).tolist() == [[[1, 2], [2, 13]]]  # type: ignore[arg-type]  # what it reads of a cache


# --- Builds


def test_a_build_with_a_quantized_cache(decoder_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    samples = [feeds(24, seed=seed) for seed in range(4)]
    np.savez(data, **{name: np.concatenate([feed[name] for feed in samples]) for name in samples[0]})
    out = tmp_path / "out"
    recipe = Recipe(kv="int4", weights="rtn", steps=10, scheme="w8a8")
    report = build(decoder_file, out, recipe=recipe, calib_data=str(data), max_error=0.3)
    assert report.passed, report.failures
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["kv_cache"]["format"] == "int4"
    assert manifest["kv_cache"]["float_bytes_per_token"] == 2 * SHAPE.layers * HEADS * SIZE * 4
    assert manifest["kv_cache"]["bytes_per_token"] == 2 * SHAPE.layers * HEADS * (SIZE // 2 + 4 + 1)
    assert FILE in manifest["files"]
    assert any("keys and values are stored as int4" in note for note in report.notes)
    assert report.outputs["present.0.key"].rel_l2 < 0.15

    model = comparable(out)
    assert distance(run(model, feeds(6)), run(load(decoder_file), feeds(6))) < 0.3
    again = verify(decoder_file, out, samples, max_error=0.3)
    assert again.passed, again.failures
    assert set(again.outputs) == set(report.outputs)
    assert again.size == report.size
    with pytest.raises(UsageError, match=r"has a quantized cache, .* leave --save out"):
        verify(decoder_file, out, samples, save=tmp_path / "saved")
    with pytest.raises(ModelError, match="compare a model with its own quantized form"):
        bench(out, decoder_file)  # speed is that of the interface as it is
    (out / FILE).unlink()
    with pytest.raises(ModelError, match="give the whole build directory"):
        comparable(out)


def test_a_plan_is_made_only_where_the_recipe_asks(decoder_file: Path) -> None:
    assert ConcatCachePlan.of(load(decoder_file), Recipe()) is None


def test_other_engines_are_refused(decoder_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--kv int4 is for --engine onnxruntime, not tensorrt-rtx"):
        build(decoder_file, tmp_path / "out", recipe=Recipe(kv="int4"), random_calibration=True, engine="tensorrt-rtx")


# --- Exporters


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_decoders_as_torchscript_exports_them(kind: str, tmp_path: Path) -> None:
    """The form of Optimum's exports: shapes computed at run time, heads repeated without a shape that tells how."""
    transformers = pytest.importorskip("transformers", reason="needs pip install 'fqonnx[samples]'")
    import torch

    llama = importlib.import_module("llama")
    config = transformers.LlamaConfig(
        vocab_size=80,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation=kind,
    )
    torch.manual_seed(0)
    module, inputs, _, names, outputs = llama._with_past(transformers.LlamaForCausalLM(config).eval())
    axes = {"input_ids": {0: "b", 1: "s"}, "attention_mask": {0: "b", 1: "t"}, "position_ids": {0: "b", 1: "s"}}
    axes |= {name: {0: "b", 2: "p"} for name in names if name.startswith("past")}
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        arguments = tuple(inputs.values())
        torch.onnx.export(
            module, arguments, path, dynamo=False, opset_version=17, input_names=names, output_names=outputs, dynamic_axes=axes
        )
    ids = np.random.default_rng(0).integers(0, 80, (2, 21))
    expected = Decoder(path)(ids)

    model = prepare(model_file.load(path))
    layers = kv_cache.find(model)
    shared = layers[0].query_heads is None
    TransformCache(layers, transforms(layers, shared=shared))(model)
    check(model)
    model_file.save(model, path)
    np.testing.assert_allclose(Decoder(path)(ids), expected, atol=1e-4 * float(np.abs(expected).max()))
    QuantizeCache(layers, FORMATS["int8"])(model)
    check(model)
    model_file.save(model, path)
    cached = Decoder(path)
    whole = cached(ids)
    assert np.linalg.norm(whole - expected) < 0.03 * np.linalg.norm(expected)
    cached.reset()
    chunks = np.concatenate([cached(ids[:, :9]), cached(ids[:, 9:10]), cached(ids[:, 10:])], axis=1)
    np.testing.assert_allclose(chunks, whole, atol=1e-4 * float(np.abs(whole).max()))


# --- In training


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("size", [6, 64])
def test_what_training_sees_is_what_is_stored(name: str, size: int) -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(3).normal(size=(2, 3, 50, size)).astype(np.float32) * np.float32(3)
    x[0, 0, 0] = 0
    x[0, 0, 1] = 5
    given = torch.from_numpy(x).requires_grad_()
    y = kv.stored(given, FORMATS[name])
    expected = dequantize(quantize(x, FORMATS[name]), FORMATS[name])
    # Rounding falls otherwise in a few places: a step of int4 is a fifteenth of the range.
    same = np.isclose(y.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert same.mean() > 0.999
    y.sum().backward()
    assert given.grad is not None
    assert bool(torch.isfinite(given.grad).all())
    # On average a change goes through as it is, but for the ends of a range.
    assert float(given.grad[1].mean()) == pytest.approx(1, abs=0.05 if size == 64 else 0.3)
    assert kv.stored(given[:, :, :0], FORMATS[name]).shape == (2, 3, 0, size)


class Texts(list[Feeds]):
    """A source in memory."""

    fingerprint = "texts"

    @property
    def length(self) -> int:
        return len(self)


@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_blocks_are_trained_with_the_cache_in_the_loop(
    decoder_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """What training says of the last block on samples held out is what the built model shows there, its cache stored in few bits."""
    from fqonnx.calib.blocks import find_blocks
    from fqonnx.calib.reconstruct import Training, reconstruct

    texts = Texts(feeds(24, batch=1, seed=seed) for seed in range(HELD_OUT))
    recipe = Recipe(kv=name, weights="rtn", scheme="w8a8", transform="hadamard", reconstruct="block")
    model = load(decoder_file)
    plan = ConcatCachePlan.of(model, recipe)
    assert plan is not None
    plan = plan.transformed(model, texts, recipe, workdir=tmp_path)
    groups = linears.find(model).groups
    training = Training(tokens=24, steps=3, rounding_steps=3)
    said = []
    for number, changes in enumerate((None, plan.rounding())):
        folder = tmp_path / str(number)
        with caplog.at_level("INFO"):
            store = reconstruct(
                model, groups, texts, recipe, workdir=folder, fingerprint="f", stacks=True, training=training, changes=changes
            )
        said.append(float(caplog.messages[-1].split("relative error ")[1].split()[0]))
    stream = find_blocks(model, groups)[-1].output
    floating = load(decoder_file)
    floating.graph.outputs.append(next(node.outputs[0] for node in floating.graph if node.outputs[0].name == stream.name))
    model.graph.outputs.append(stream)
    quantized = quantize_model(model, groups, store, recipe, None)
    plan.apply(quantized)
    outer = with_float_cache(quantized, plan.solution.transforms)
    expected, found = (run(m, texts[-1])[stream.name or ""] for m in (floating, outer))
    assert said[1] > 1.1 * said[0]
    assert said[1] == pytest.approx(float(np.linalg.norm(found - expected) / np.linalg.norm(expected)), rel=0.02)
