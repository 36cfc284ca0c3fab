"""GroupQueryAttention with an int8 cache: the pass against the reference, scales against the data, lowering, whole builds, measuring."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from rich.console import Console

from fqonnx.artifact import open_artifact
from fqonnx.attention_cache_plan import AttentionCachePlan
from fqonnx.bench import CANDIDATE, bench
from fqonnx.build import build
from fqonnx.cache_plan import FILE, comparable
from fqonnx.calib.kv_scales import CacheScales, fit_scales
from fqonnx.calib.random_data import RandomSource
from fqonnx.calib.roles import input_roles
from fqonnx.debug import bisect
from fqonnx.decoding import Decoder, generate
from fqonnx.errors import CalibrationError, ModelError, UsageError
from fqonnx.evaluate import evaluate_text
from fqonnx.ops import group_query_attention_node
from fqonnx.ops.reference import group_query_attention
from fqonnx.passes.attention import LowerAttention
from fqonnx.passes.kv_cache import METADATA
from fqonnx.passes.kv_cache_attention import QuantizeAttentionCache, find, with_float_cache
from fqonnx.passes.pipeline import check
from fqonnx.passes.prepare import prepare
from fqonnx.recipe import Recipe
from fqonnx.verify import verify
from tests.graph_text import graph_text
from tests.rewriting import Builder, mlp, run
from tests.test_attention import FORM_IDS, FORMS, LOADS, OP, STACK, Case, attention_of, lower

if TYPE_CHECKING:
    from collections.abc import Callable

sys.path.insert(0, str(Path(__file__).parents[1] / "samples"))
decoder: Any = importlib.import_module("decoder")

Arrays = dict[str, Any]
FP32, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
PASTS, PRESENTS = ("past_key", "past_value"), ("present_key", "present_value")


def scales_of(case: Case, seed: int = 0) -> dict[str, Any]:
    """Such that standard normal numbers use most codes, and a few are cut off."""
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(0.01, 0.04, (1, case.kv_heads, 1, case.head)).astype(np.float32) for name in PASTS}


def quantized(case: Case, **attributes: Any) -> ir.Model:
    """A model of one node with an int8 cache."""
    model = case.model(**attributes)
    caches = find(model)
    assert [(cache.name, cache.part, cache.heads, cache.size) for cache in caches] == [
        ("past_key", "key", case.kv_heads, case.head),
        ("past_value", "value", case.kv_heads, case.head),
    ]
    result = QuantizeAttentionCache(caches, scales_of(case))(model)
    assert result.modified
    check(model)
    return model


def coded(case: Case, arrays: Arrays) -> Arrays:
    """The same inputs with codes of earlier tokens."""
    rng = np.random.default_rng(1)
    return arrays | {name: rng.integers(-128, 128, arrays[name].shape, np.int8) for name in PASTS}


def expected(case: Case, arrays: Arrays, scales: dict[str, Any]) -> Arrays:
    operands = [arrays.get(name) for name in ("q", "k", "v", "past_key", "past_value", "lengths")]
    tables: list[Any] = case.tables if case.rotary else [None, None]
    sizes: dict[str, Any] = {"num_heads": case.heads, "kv_num_heads": case.kv_heads, "scale": 0.2}
    found = group_query_attention(*operands, *tables, scales["past_key"], scales["past_value"], **sizes)  # type: ignore[arg-type]
    return dict(zip(("y", *PRESENTS), found, strict=True))


def agrees(got: Arrays, wanted: Arrays, lengths: tuple[int, ...], *, tolerance: float, codes: float) -> None:
    """The same attention within ``tolerance`` of its norm, the same codes but for a share of ``codes`` that are next to each other."""
    y, reference = -got["y"].astype(np.float32), wanted["y"].astype(np.float32)
    assert np.linalg.norm(y - reference) <= tolerance * np.linalg.norm(reference)
    assert reference.any()
    for name in PRESENTS:
        assert got[name].dtype == np.int8
        for sequence, length in enumerate(lengths):
            a, b = (side[name][sequence, :, :length].astype(int) for side in (got, wanted))
            assert np.abs(a - b).max() <= 1
            assert (a != b).mean() <= codes


# --- The node and the op ----------------------------------------------------------------------------------------------------------------


def test_the_reference_in_numbers() -> None:
    """Codes are rounded to even and cut off at the ends; a channel has its own scale; the new token is read as it is stored."""
    query = np.zeros((1, 1, 4), np.float32)
    past = np.zeros((1, 1, 0, 4), np.int8)
    new = np.array([[[0.5, 1.5, 300, -300]]], np.float32)
    scale = np.array([1, 1, 2, 2], np.float32)
    y, keys, values = group_query_attention(
        query, new, new, past, past, np.array([0], np.int32), None, None, scale, scale * 2, num_heads=1, kv_num_heads=1
    )
    assert keys[0, 0].tolist() == [[0, 2, 127, -128]]
    assert values[0, 0].tolist() == [[0, 1, 75, -75]]
    assert y[0, 0].tolist() == [0, 2, 300, -300]
    tensor = np.array([2], np.float32)
    _, keys, _ = group_query_attention(
        query, new, new, past, past, np.array([0], np.int32), None, None, tensor, tensor, num_heads=1, kv_num_heads=1
    )
    assert keys[0, 0].tolist() == [[0, 1, 127, -128]]


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_the_node_is_the_reference(form: Case, head: int) -> None:
    case = replace(form, dtype=FP32, head=head)
    model = quantized(case)
    for lengths, tokens, capacity in LOADS:
        arrays = coded(case, case.feed(lengths, tokens, capacity))
        agrees(run(model, arrays), expected(case, arrays, scales_of(case)), lengths, tolerance=1e-5, codes=1e-3)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_the_op_is_the_node_bit_for_bit(form: Case) -> None:
    before, after = quantized(form), quantized(form)
    (node,) = lower(after)
    assert [value.name for value in node.inputs[9:] if value is not None] == ["past_key.scale", "past_value.scale"]
    assert {name: node.attributes[name].value for name in ("k_quant_type", "v_quant_type", "kv_cache_bit_width")} == {
        "k_quant_type": "PER_CHANNEL",
        "v_quant_type": "PER_CHANNEL",
        "kv_cache_bit_width": 8,
    }
    for lengths, tokens, capacity in LOADS:
        arrays = coded(form, form.feed(lengths, tokens, capacity))
        plain, lowered = run(before, arrays), run(after, arrays)
        agrees(lowered, expected(form, arrays, scales_of(form)), lengths, tolerance=3e-3, codes=0.01)
        for name, array in plain.items():
            for sequence, length in enumerate(lengths):
                rows = np.s_[sequence] if name == "y" else np.s_[sequence, :, :length]
                np.testing.assert_array_equal(lowered[name][rows], array[rows], strict=True)


def test_one_scale_for_all_is_lowered_too() -> None:
    case = Case()
    model = quantized(case)
    node, one = attention_of(model), ir.tensor(np.array([0.03], np.float32), name="one")
    scale = ir.Value(name="one", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]), const_value=one)
    model.graph.register_initializer(scale)
    for slot, part in ((12, "k"), (13, "v")):
        node.replace_input_with(slot, scale)
        node.attributes[f"{part}_quant_type"] = ir.AttrString(f"{part}_quant_type", "PER_TENSOR")
    (op,) = lower(model)
    assert op.attributes["k_quant_type"].value == "PER_TENSOR"
    for lengths, tokens, capacity in LOADS:
        arrays = coded(case, case.feed(lengths, tokens, capacity))
        wanted = expected(case, arrays, dict.fromkeys(PASTS, np.array([0.03], np.float32)))
        agrees(run(model, arrays), wanted, lengths, tolerance=3e-3, codes=0.01)


def test_the_constructor_refuses_what_does_not_fit() -> None:
    make: Any = group_query_attention_node
    past = [ir.val(name, ir.DataType.INT8, ["b", 2, "p", 64]) for name in ("k", "v")]
    scales = [ir.val(name, ir.DataType.FLOAT, [1, 2, 1, 64]) for name in ("ks", "vs")]
    lengths, total = ir.val("n", ir.DataType.INT32, ["b"]), ir.val("t", ir.DataType.INT32, [])
    operands = [ir.val("q", ir.DataType.FLOAT16, ["b", 1, 512]), None, None, *past, lengths, total, None, None]
    sizes = {"num_heads": 4, "kv_num_heads": 2, "head": 64, "name": "a"}
    node = make(*operands, *scales, **sizes, quant_type="PER_CHANNEL")
    assert [(value.dtype, str(value.shape)) for value in node.outputs] == [
        (ir.DataType.FLOAT16, "[b,1,256]"),
        (ir.DataType.INT8, "[b,2,None,64]"),
        (ir.DataType.INT8, "[b,2,None,64]"),
    ]
    with pytest.raises(ModelError, match="a reads INT8 beside FLOAT16"):
        make(*operands, **sizes)
    with pytest.raises(ModelError, match="a reads FLOAT16 beside FLOAT16"):
        make(*operands, *[ir.val("s", ir.DataType.FLOAT16, [1])] * 2, **sizes, quant_type="PER_TENSOR")
    for given, quant_type in ((scales, "NONE"), (scales[:1], "PER_CHANNEL"), ([], "PER_CHANNEL"), (scales, "PER_GROUP")):
        with pytest.raises(ValueError, match="given together or not at all"):
            make(*operands, *given, **sizes, quant_type=quant_type)


def stays(model: ir.Model, caplog: pytest.LogCaptureFixture) -> str:
    """Why lowering leaves the only node of a model alone."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "fqonnx.passes.attention"):
        assert not LowerAttention(90)(model).modified
    (message,) = [record.getMessage() for record in caplog.records if record.name == "fqonnx.passes.attention"]
    return message.removeprefix("attention stays com.microsoft.GroupQueryAttention: it ")


def test_int8_caches_without_a_kernel_stay(caplog: pytest.LogCaptureFixture) -> None:
    assert stays(quantized(Case(dtype=BF16)), caplog) == "is of BFLOAT16 over INT8 keys and values, not FLOAT16"
    assert stays(quantized(Case(dtype=FP32)), caplog) == "is of FLOAT, not FLOAT16 or BFLOAT16"
    assert stays(quantized(Case(), softcap=30.0), caplog) == "has softcap = 30.0"
    model = quantized(Case())
    attention_of(model).attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 4)
    assert stays(model, caplog) == "has kv_cache_bit_width = 4 for INT8 keys and values"
    model = quantized(Case())
    attention_of(model).attributes["v_quant_type"] = ir.AttrString("v_quant_type", "PER_TENSOR")
    assert stays(model, caplog) == "scales keys and values PER_CHANNEL and PER_TENSOR"
    model = quantized(Case())
    attention_of(model).replace_input_with(12, ir.val("few", ir.DataType.FLOAT, [1, 2, 1, 1]))
    assert stays(model, caplog) == "has a k_scale that is not 128 FLOAT"
    model = quantized(Case())
    attention_of(model).replace_input_with(13, None)
    assert stays(model, caplog) == "has no v_scale"


def test_golden(golden: Callable[[str, ir.Model | str], None]) -> None:
    model = quantized(Case())
    lower(model)
    golden("kv_cache_attention", graph_text(model))


# --- The pass ---------------------------------------------------------------------------------------------------------------------------


def test_the_interface_keeps_its_names_and_shapes() -> None:
    case = Case()
    before, after = case.model(), quantized(case)
    old, new = ((*model.graph.inputs, *model.graph.outputs) for model in (before, after))
    assert [(value.name, str(value.shape)) for value in old] == [(value.name, str(value.shape)) for value in new]
    assert [value.name for value, was in zip(new, old, strict=True) if value.dtype != was.dtype] == [*PASTS, *PRESENTS]
    assert json.loads(after.metadata_props[METADATA]) == {
        "format": "int8",
        "scales": "static",
        "size": 64,
        "caches": [
            {"past": past, "present": present, "scale": f"{past}.scale", "float": "FLOAT16"}
            for past, present in zip(PASTS, PRESENTS, strict=True)
        ],
    }
    with pytest.raises(ModelError, match="quantized already"):
        QuantizeAttentionCache((), {})(after)
    assert not QuantizeAttentionCache((), {})(before).modified


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16, lowered"])
def test_with_the_float_interface_it_rounds_and_scales(dtype: int) -> None:
    case = Case(dtype=dtype)
    scales, model, before = scales_of(case), quantized(case), case.model()
    if dtype == FP16:
        lower(model)
    outer = with_float_cache(model)
    check(outer)
    assert METADATA in model.metadata_props
    assert METADATA not in outer.metadata_props
    old, new = ((*each.graph.inputs, *each.graph.outputs) for each in (before, outer))
    assert [(value.name, value.dtype, str(value.shape)) for value in old] == [(value.name, value.dtype, str(value.shape)) for value in new]
    for lengths, tokens, capacity in LOADS:
        arrays = case.feed(lengths, tokens, capacity)
        codes = {name: np.clip(np.rint(arrays[name].astype(np.float32) / scales[name]), -128, 127).astype(np.int8) for name in PASTS}
        inner, got = run(model, arrays | codes), run(outer, arrays)
        for past, present in zip(PASTS, PRESENTS, strict=True):
            wanted = (inner[present].astype(np.float32) * scales[past]).astype(got[present].dtype)
            for sequence, length in enumerate(lengths):
                # ONNX Runtime may run the node in another precision between other nodes of float16: codes on the border move by one.
                rows = np.s_[sequence, :, : length if dtype == FP32 else length - tokens]
                np.testing.assert_array_equal(got[present][rows], wanted[rows], strict=True)
                rest = np.s_[sequence, :, length - tokens : length]
                assert np.abs((got[present][rest].astype(np.float32) - wanted[rest]) / scales[past][0]).max() < 1.2
                assert (got[present][rest] != wanted[rest]).mean() < 0.02
        error = np.linalg.norm(got["y"].astype(np.float32) - inner["y"]) / np.linalg.norm(inner["y"].astype(np.float32))
        assert error < (1e-6 if dtype == FP32 else 3e-3)
    with pytest.raises(ModelError, match="no static scales"):
        with_float_cache(before)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ("a computed past", "cannot quantize 'attention': its past value is no input of the model"),
        ("int8", "cannot quantize 'past_key': it is INT8 already"),
        ("no shape", "cannot quantize 'past_value': its shape None does not say how many heads"),
        ("another reader", r"cannot quantize 'past_key': 'reader' \(Neg\) reads it too"),
        ("no output", "cannot quantize 'past_key': the present key of 'attention' is no output of the model"),
        ("a reader behind", r"cannot quantize 'past_value': 'reader' \(Neg\) reads what 'attention' makes of it"),
        ("scales", "cannot quantize 'past_key': 'attention' has scales already"),
        ("another cache", "cannot quantize 'past_other': it is no cache of GroupQueryAttention, as others of the model are"),
    ],
)
def test_other_caches_are_refused(changed: str, why: str) -> None:
    model = Case().model()
    graph, node = model.graph, attention_of(model)
    past = {name: next(value for value in graph.inputs if value.name == name) for name in PASTS}
    if changed == "a computed past":
        twice = ir.node("Neg", [past["past_value"]], name="twice")
        graph.insert_before(node, twice)
        node.replace_input_with(4, twice.outputs[0])
    elif changed == "int8":
        past["past_key"].type = ir.TensorType(ir.DataType.INT8)
    elif changed == "no shape":
        past["past_value"].shape = None
    elif changed == "another reader":
        graph.append(ir.node("Neg", [past["past_key"]], name="reader"))
    elif changed == "no output":
        graph.outputs[:] = [value for value in graph.outputs if value.name != "present_key"]
    elif changed == "a reader behind":
        graph.append(ir.node("Neg", [node.outputs[2]], name="reader"))
    elif changed == "scales":
        node.resize_inputs(13)
        node.replace_input_with(12, ir.val("s", ir.DataType.FLOAT, [1]))
    else:
        graph.inputs.append(ir.val("past_other", ir.DataType.FLOAT16, ["b", 2, "p", 64]))
    with pytest.raises(ModelError, match=why):
        find(model)


def test_without_a_cache_there_is_nothing_to_find() -> None:
    model = Case().model()
    assert AttentionCachePlan.of(model, Recipe()) is None
    attention_of(model).replace_input_with(3, None)
    attention_of(model).replace_input_with(4, None)
    assert find(model) == ()
    assert AttentionCachePlan.of(prepare(ir.from_proto(mlp())), Recipe(kv="int8")) is None


@pytest.mark.parametrize("kv", ["int4", "fp8"])
def test_other_formats_say_what_goes(kv: str) -> None:
    with pytest.raises(ModelError, match=rf"'attention' is GroupQueryAttention, .*: give --kv int8, or export .* for --kv {kv}"):
        AttentionCachePlan.of(Case().model(), Recipe(kv=kv))


def test_random_codes_are_of_the_whole_range() -> None:
    model = quantized(Case())
    role = input_roles(model)["past_key"]
    assert (role.kind, role.low, role.high) == ("past", -128, 128)
    (feed,) = RandomSource(model)
    assert feed["past_key"].dtype == np.int8
    assert (feed["past_key"].min(), feed["past_key"].max()) == (-128, 127)


# --- Scales -----------------------------------------------------------------------------------------------------------------------------


class Feeds(list[Arrays]):
    """A source in memory."""

    def __init__(self, feeds: list[Arrays], fingerprint: str = "feeds") -> None:
        super().__init__(feeds)
        self.fingerprint = fingerprint
        self.length: int | None = len(feeds)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
def test_scales_are_the_largest_magnitudes_of_what_attention_reads(dtype: int, tmp_path: Path) -> None:
    case = Case(dtype=dtype)
    model, feeds = case.model(), [case.feed(lengths, tokens, capacity) for lengths, tokens, capacity in LOADS]
    for arrays, (lengths, tokens, _) in zip(feeds, LOADS, strict=True):
        for sequence, length in enumerate(lengths):
            # What lies behind a sequence's tokens is not read.
            for name in PASTS:
                arrays[name][sequence, :, length - tokens :] = np.nan
    largest = {name: np.zeros((case.kv_heads, case.head), np.float32) for name in PASTS}
    for arrays, (lengths, _, _) in zip(feeds, LOADS, strict=True):
        tables: list[Any] = case.tables
        operands = [arrays.get(name) for name in ("q", "k", "v", *PASTS, "lengths")]
        found = group_query_attention(*operands, *tables, num_heads=case.heads, kv_num_heads=case.kv_heads)  # type: ignore[arg-type]
        for name, present in zip(PASTS, found[1:], strict=True):
            for sequence, length in enumerate(lengths):
                largest[name] = np.maximum(largest[name], np.abs(present[sequence, :, :length].astype(np.float32)).max(axis=1))
    scales = fit_scales(model, find(model), Feeds(feeds), workdir=tmp_path)
    for name in PASTS:
        assert scales.scales[name].shape == (1, case.kv_heads, 1, case.head)
        np.testing.assert_allclose(scales.scales[name][0, :, 0] * 127, largest[name], rtol=1e-5 if dtype == FP32 else 1e-2)
    assert scales.dead == dict.fromkeys(PASTS, 0)


def test_padding_does_not_count(tmp_path: Path) -> None:
    """Two prompts, the second one shorter; what stands in its padding is large."""
    case = Case(packed=False, rotary=False)
    arrays = case.feed((5, 5), 5)
    arrays["lengths"] = np.array([4, 2], np.int32)
    for name in ("k", "v"):
        arrays[name][1, 3:] = 1000
    model = case.model()
    scales = fit_scales(model, find(model), Feeds([arrays]), workdir=tmp_path)
    seen = np.concatenate([arrays["k"][0], arrays["k"][1, :3]]).reshape(-1, case.kv_heads, case.head)
    np.testing.assert_allclose(scales.scales["past_key"][0, :, 0] * 127, np.abs(seen).max(axis=0).astype(np.float32), rtol=1e-3)


def test_dead_channels_have_a_scale(tmp_path: Path) -> None:
    case = Case(packed=False, rotary=False)
    arrays = case.feed((5,), 5)
    arrays["k"][..., 3] = 0
    arrays["v"][:] = 0
    model = case.model()
    scales = fit_scales(model, find(model), Feeds([arrays]), workdir=tmp_path)
    others = np.delete(scales.scales["past_key"].reshape(-1), 3)
    assert scales.scales["past_key"][0, 0, 0, 3] == pytest.approx(others.mean())
    assert (scales.scales["past_value"] == 1).all()
    assert scales.dead == {"past_key": 1, "past_value": 128}
    assert scales.metrics["past_key"] == {"scale_min": others.min(), "scale_max": others.max(), "dead_channels": 1}


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "Inf")])
def test_what_is_not_finite_is_an_error(value: float, kind: str, tmp_path: Path) -> None:
    case = Case(packed=False, rotary=False)
    arrays = case.feed((5,), 5)
    arrays["v"][0, 2, 7] = value
    model = case.model()
    with pytest.raises(CalibrationError, match=f"what goes into 'past_value' holds {kind}"):
        fit_scales(model, find(model), Feeds([case.feed((4,), 4), arrays]), workdir=tmp_path)


def test_no_tokens_are_an_error(tmp_path: Path) -> None:
    model = Case().model()
    with pytest.raises(CalibrationError, match="no tokens for 'past_key'"):
        fit_scales(model, find(model), Feeds([]), workdir=tmp_path)


def test_scales_are_found_again(tmp_path: Path) -> None:
    case = Case()
    model, source = case.model(), Feeds([case.feed((6,), 2)])
    first = fit_scales(model, find(model), source, workdir=tmp_path)
    source.clear()  # not read again
    again = fit_scales(model, find(model), source, workdir=tmp_path)
    for name in PASTS:
        np.testing.assert_array_equal(again.scales[name], first.scales[name])
    assert again.dead == first.dead
    with pytest.raises(CalibrationError, match="no tokens"):
        fit_scales(model, find(model), Feeds([], "other data"), workdir=tmp_path)
    with pytest.raises(CalibrationError, match="holds no scales of a cache"):
        CacheScales.load(tmp_path / "missing.safetensors")


def test_a_model_in_segments_gives_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stack: Path) -> None:
    model = prepare(ir.load(stack))
    source = RandomSource(model, samples=3)
    whole = fit_scales(model, find(model), source, workdir=tmp_path / "whole")
    monkeypatch.setattr("fqonnx.calib.kv_scales.StreamedModel", _small_segments)
    parts = fit_scales(model, find(model), source, workdir=tmp_path / "parts")
    for name, scale in whole.scales.items():
        np.testing.assert_array_equal(parts.scales[name], scale)


def _small_segments(model: ir.Model, workdir: Path) -> Any:
    from fqonnx.calib.stream import StreamedModel

    streamed = StreamedModel(model, workdir, max_bytes=200_000)
    assert len(streamed.plan([value.name or "" for value in model.graph.outputs])) > 2
    return streamed


def test_lengths_may_be_constant(tmp_path: Path) -> None:
    case = Case()
    model = case.model()
    lengths = next(value for value in model.graph.inputs if value.name == "lengths")
    model.graph.inputs.remove(lengths)
    lengths.const_value = ir.tensor(np.array([5], np.int32), name="lengths")
    model.graph.register_initializer(lengths)
    arrays = case.feed((6,), 2)
    fixed = fit_scales(model, find(model), Feeds([{name: a for name, a in arrays.items() if name != "lengths"}]), workdir=tmp_path / "a")
    model = case.model()
    given = fit_scales(model, find(model), Feeds([arrays]), workdir=tmp_path / "b")
    for name in PASTS:
        np.testing.assert_array_equal(fixed.scales[name], given.scales[name])


# --- Whole models -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stack") / "model.onnx"
    decoder.export(path, STACK)
    return Path(path)


@pytest.fixture(scope="module")
def built(stack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "w4a4"
    recipe = Recipe(transform="hadamard", weights="rtn", kv="int8")
    report = build(stack, out, recipe=recipe, random_calibration=True, calib_samples=3, target="sm90")
    said = "keys and values are stored as int8: 512 bytes a token instead of 1024, 2.0 times less; one scale a channel"
    assert said in report.notes
    assert set(report.outputs) == {"last_hidden_state", *(f"present.{i}.{part}" for i in range(2) for part in ("key", "value"))}
    assert 0 < report.outputs["last_hidden_state"].rel_l2 < 0.2
    return out


def test_a_build_has_the_op_the_codes_and_says_so(built: Path) -> None:
    model = ir.load(built / "model.onnx")
    assert [node.domain for node in model.graph if node.op_type == OP] == ["fqonnx", "fqonnx"]
    types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    assert {name for name, dtype in types.items() if dtype == ir.DataType.INT8} == {
        f"{side}.{i}.{part}" for side in ("past_key_values", "present") for i in range(2) for part in ("key", "value")
    }
    manifest = open_artifact(built).manifest
    assert len(manifest["attention"]) == 2
    described = manifest["kv_cache"]
    assert (described["format"], described["scales"]) == ("int8", "static")
    assert (described["bytes_per_token"], described["float_bytes_per_token"]) == (512, 1024)
    saved = CacheScales.load(built / FILE)
    for entry in described["caches"]:
        scale = model.graph.initializers[f"{entry['name']}.scale"].const_value
        assert scale is not None
        np.testing.assert_array_equal(scale.numpy(), saved.scales[entry["name"]])
        assert (entry["scale_min"], entry["scale_max"]) == (scale.numpy().min(), scale.numpy().max())
        # Random past keys and values are standard normal.
        assert 1 < entry["scale_max"] * 127 < 8


def test_only_the_cache_is_rounded_more_than_without(built: Path, stack: Path, tmp_path: Path) -> None:
    recipe = Recipe(transform="hadamard", weights="rtn")
    build(stack, tmp_path / "plain", recipe=recipe, random_calibration=True, calib_samples=3, target="sm90")
    (feed,) = RandomSource(prepare(ir.load(stack)), seed=7)
    with_cache, without = (run(comparable(path), feed) for path in (built, tmp_path / "plain"))
    past = feed["past_key_values.0.key"].shape[2]
    errors = {}
    for name, array in without.items():
        # Of random numbers a few in calibration say little about the largest: what came in is cut off, what is new is smaller.
        a, b = (side[name].astype(np.float32)[:, :, past:] if "present" in name else side[name] for side in (with_cache, without))
        errors[name] = np.linalg.norm((a - b).astype(np.float32)) / np.linalg.norm(b.astype(np.float32))
        assert array.dtype == np.float16
    # The scale is that of past keys and values, three times larger than new ones: two such steps are a hundredth of these.
    assert 0.005 < errors["present.0.key"] < 0.03
    assert 0.005 < errors["present.0.value"] < 0.03
    # Behind the first layer other activations round to other 4-bit codes.
    assert 0 < max(errors.values()) < 0.1


def test_a_build_for_no_gpu_in_particular(stack: Path, tmp_path: Path) -> None:
    recipe = Recipe(transform="hadamard", weights="rtn", kv="int8")
    report = build(stack, tmp_path / "out", recipe=recipe, random_calibration=True, calib_samples=2)
    model = ir.load(tmp_path / "out" / "model.onnx")
    assert [node.domain for node in model.graph if node.op_type == OP] == ["com.microsoft", "com.microsoft"]
    assert 0 < report.outputs["last_hidden_state"].rel_l2 < 0.2


def test_bfloat16_is_built_for_onnx_runtimes_own_kernel(tmp_path: Path) -> None:
    decoder.export(tmp_path / "m.onnx", replace(STACK, layers=1), dtype=ir.DataType.BFLOAT16)
    recipe = Recipe(transform="hadamard", weights="rtn", kv="int8")
    report = build(tmp_path / "m.onnx", tmp_path / "out", recipe=recipe, random_calibration=True, calib_samples=2, target="sm90")
    assert 0 < report.outputs["last_hidden_state"].rel_l2 < 0.2
    model = ir.load(tmp_path / "out" / "model.onnx")
    assert [node.domain for node in model.graph if node.op_type == OP] == ["com.microsoft"]


def test_verify_and_bisect(built: Path, stack: Path) -> None:
    feeds = list(RandomSource(prepare(ir.load(stack)), samples=2))
    report = verify(stack, built, feeds, layers=True)
    assert 0 < report.outputs["last_hidden_state"].rel_l2 < 0.2
    assert all(group.layer is not None and 0 < group.layer.rel_l2 < 0.6 for group in report.groups)
    found = bisect(stack, built, feeds)
    assert found.first in found.groups


def test_other_formats_end_the_build_before_the_work(stack: Path, tmp_path: Path) -> None:
    for kv in ("int4", "fp8"):
        with pytest.raises(ModelError, match="give --kv int8"):
            build(stack, tmp_path / "out", recipe=Recipe(kv=kv), random_calibration=True)
    with pytest.raises(UsageError, match="for --engine onnxruntime"):
        build(stack, tmp_path / "out", recipe=Recipe(kv="int8"), random_calibration=True, engine="tensorrt")


# --- Speed ------------------------------------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {"duration": 0.0, "warm_up": 0.0, "iterations": 10}


@pytest.mark.parametrize("kv_cache", [None, 16], ids=["buffers of their own", "in place"])
def test_bench_feeds_each_model_its_own_cache(built: Path, stack: Path, kv_cache: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from fqonnx import bench as module

    fed: list[Any] = []
    to_device = module._to_device
    monkeypatch.setattr(module, "_to_device", lambda array, device: fed.append(array) or to_device(array, device))
    sets = [{"batch": (2,), "sequence": (1,), "past_sequence": (5,)}, {"batch": (1,), "sequence": (6,), "past_sequence": (0,)}]
    result = bench(built, stack, shapes=sets, kv_cache=kv_cache, **QUICK)
    assert [shape.speedup is not None and shape.speedup > 0 for shape in result.shapes] == [True, True]
    # Hidden states and the mask are shared, and each model has caches of its own.
    shapes = [array.shape for array in fed if array.ndim == 4]
    assert [array.dtype.name for array in fed if array.ndim == 4].count("int8") == len(shapes) / 2 == 8
    assert sum(array.ndim < 4 for array in fed) == 4
    assert {array.min() for array in fed if array.dtype == np.int8 and array.size} == {-128}


def test_bench_of_a_build_alone(built: Path) -> None:
    sizes = {"batch": (2,), "sequence": (1,), "past_sequence": (5,)}
    result = bench(built, shapes=[sizes], kv_cache=16, profile=True, **QUICK)
    assert result.shapes[0].inputs["past_key_values.1.key"] == (2, STACK.kv_heads, 16, STACK.head)
    assert result.shapes[0].profile[CANDIDATE].ops[OP].calls == STACK.layers


def test_bench_refuses_inputs_of_two_types(stack: Path, tmp_path: Path) -> None:
    decoder.export(tmp_path / "fp32.onnx", STACK, dtype=ir.DataType.FLOAT)
    sizes = {"batch": (1,), "sequence": (1,), "past_sequence": (5,)}
    with pytest.raises(UsageError, match="takes 'hidden_states' as float32, the other as float16: compare a model"):
        bench(tmp_path / "fp32.onnx", stack, shapes=[sizes], **QUICK)


def test_the_sample_says_which_cache(built: Path, stack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = replace(decoder.WORKLOADS[1], batch=1, past=4, cache=16)
    options: dict[str, Any] = {"device": "cpu", "duration": 0.0, "profile": False, "in_place": True, "console": Console(width=120)}
    cases = decoder.measure("tiny", built, stack, [work], **options)
    capsys.readouterr()
    Console(width=120).print(decoder.summary(cases, kv="int8"))
    assert "cache of keys and values int8 in W4A4, fp16 in fp16" in capsys.readouterr().out
    refused = CliRunner().invoke(decoder.program, ["bench", "--kv", "int8", "--operators", "standard", "--device", "cpu"])
    assert isinstance(refused.exception, UsageError)
    assert "leave out --kv" in str(refused.exception)


# --- Text -------------------------------------------------------------------------------------------------------------------------------

VOCABULARY, HIDDEN = 31, 256


def language_model(path: Path) -> Path:
    """One layer of attention over token embeddings, as ONNX Runtime GenAI's exporter writes it."""
    b = Builder(FP32)
    ids = b.input("input_ids", ["batch", "sequence"], TensorProto.INT64)
    mask = b.input("attention_mask", ["batch", "past_sequence + sequence"], TensorProto.INT64)
    pasts = [b.input(f"past_key_values.0.{part}", ["batch", 2, "past_sequence", 64]) for part in ("key", "value")]
    axis, one = b.constant("axis", np.array([1], np.int64)), b.constant("one", np.array(1, np.int64))
    tokens = b.node("ReduceSum", [mask, axis], "tokens", keepdims=0)
    last = b.node("Cast", [b.node("Sub", [tokens, one], "before")], "last", to=TensorProto.INT32)
    total = b.node("Cast", [b.node("Gather", [b.node("Shape", [mask], "sizes"), one], "width")], "total", to=TensorProto.INT32)
    x = b.node("Gather", [b.random("embedding", VOCABULARY, HIDDEN), ids], "embed")
    qkv = b.linear(x, HIDDEN, (4 + 2 + 2) * 64, "qkv")
    angles = np.outer(np.arange(64), 100.0 ** (-np.arange(0, 64, 2) / 64))
    tables = [b.constant(name, values.astype(np.float32)) for name, values in (("cos", np.cos(angles)), ("sin", np.sin(angles)))]
    attended = b.node(
        OP, [qkv, "", "", *pasts, last, total, *tables], "attention", "com.microsoft", num_heads=4, kv_num_heads=2, do_rotary=1
    )
    b.nodes[-1].output.extend(["present.0.key", "present.0.value"])
    mixed = b.node("Add", [x, b.linear(attended, 256, HIDDEN, "o")], "residual")
    logits = b.linear(mixed, HIDDEN, VOCABULARY, "head")
    b.nodes.append(helper.make_node("Identity", [logits], ["logits"], name="logits"))
    b.output("logits", ["batch", "sequence", VOCABULARY])
    for part in ("key", "value"):
        b.output(f"present.0.{part}", ["batch", 2, "past_sequence + sequence", 64])
    path.write_bytes(b.model().SerializeToString())
    return path


@pytest.fixture(scope="module")
def texts() -> Any:
    return np.random.default_rng(5).integers(0, VOCABULARY, (12, 24))


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory, texts: Any) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("language")
    model = language_model(folder / "model.onnx")
    empty = np.zeros((12, 2, 0, 64), np.float32)
    caches = {f"past_key_values.0.{part}": empty for part in ("key", "value")}
    np.savez(folder / "calib.npz", input_ids=texts, attention_mask=np.ones_like(texts), **caches)
    recipe = Recipe(scheme="w8a8", transform="none", weights="rtn", kv="int8")
    report = build(model, folder / "out", recipe=recipe, calib_data=str(folder / "calib.npz"))
    assert report.passed
    return model, folder / "out"


def test_a_decoder_of_text_keeps_codes(language: tuple[Path, Path], texts: Any) -> None:
    model, out = language
    floating, cached = Decoder(model), Decoder(out)
    whole = cached(texts[:3])
    assert (floating.cache_bytes, cached.cache_bytes) == (0, 3 * 24 * 2 * 2 * 64)
    reference = floating(texts[:3])
    assert floating.cache_bytes == 4 * cached.cache_bytes
    assert 0 < np.linalg.norm(whole - reference) / np.linalg.norm(reference) < 0.05
    cached.reset()
    one = texts[:1]
    parts = np.concatenate([cached(one[:, :9]), cached(one[:, 9:10]), cached(one[:, 10:])], axis=1)
    # New tokens are read as they are stored: how a text is cut makes no difference but of rounding.
    np.testing.assert_allclose(parts, whole[:1], atol=2e-3 * float(np.abs(whole).max()))
    assert generate(cached, one[:, :5], 4).shape == (1, 4)


def test_evaluating_text(language: tuple[Path, Path], texts: Any) -> None:
    found = evaluate_text(*language, list(texts[:, None]), chunk=8, bucket=8)
    assert found.overall.kl < 0.05
    assert found.overall.top1 > 0.8
    assert found.cache_bytes == (2 * 2 * 64 * 4, 2 * 2 * 64)
    assert isinstance(AttentionCachePlan.of(prepare(ir.load(language[0])), Recipe(kv="int8")), AttentionCachePlan)
