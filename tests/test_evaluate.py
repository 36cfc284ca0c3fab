"""Evaluation of decoders along texts, and of the parts of their error, against numbers by hand and direct comparisons."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from fqonnx import evaluate as evaluation
from fqonnx import evaluate_parts as parts
from fqonnx import model as model_file
from fqonnx.build import build
from fqonnx.decoding import Decoder, generate
from fqonnx.errors import DataError, ModelError
from fqonnx.evaluate import evaluate_text, texts
from fqonnx.passes.edit import Insertion, Names
from fqonnx.passes.prepare import prepare
from fqonnx.recipe import Recipe
from fqonnx.report.data import LanguageReport
from fqonnx.verify import verify
from fqonnx.verify.language import perplexity_failures
from tests.cli_support import run as fqonnx
from tests.rewriting import Builder
from tests.runtime import run

if TYPE_CHECKING:
    from collections.abc import Mapping

sys.path.insert(0, str(Path(__file__).parents[1] / "samples"))
decoder = importlib.import_module("decoder")

VOCABULARY = 80
SHAPE = decoder.Shape(hidden=64, heads=4, kv_heads=2, intermediate=96, layers=2, positions=64)


@pytest.fixture(scope="module")
def text_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder sample with an embedding before it and a head behind it."""
    folder = tmp_path_factory.mktemp("text")
    decoder.export(folder / "stack.onnx", SHAPE, operators="standard", dtype=ir.DataType.FLOAT)
    model = ir.external_data.load_to_model(model_file.load(folder / "stack.onnx"))
    graph, rng = model.graph, np.random.default_rng(0)
    hidden, last = graph.inputs[0], graph.outputs[0]
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "sequence"]))
    start = Insertion(next(iter(graph)), Names(model), {})
    table = start.constant("embedding", ir.tensor(rng.normal(size=(VOCABULARY, SHAPE.hidden)).astype(np.float32)))
    embedded = start.node("Gather", [table, ids], name="embed", dtype=ir.DataType.FLOAT, shape=hidden.shape)
    ir.convenience.replace_all_uses_with(hidden, embedded)
    head = start.constant("head", ir.tensor(rng.normal(size=(SHAPE.hidden, VOCABULARY)).astype(np.float32)))
    node = ir.node("MatMul", [last, head], name="lm_head")
    graph.append(node)
    node.outputs[0].name, node.outputs[0].type = "logits", last.type
    node.outputs[0].shape = ir.Shape(["batch", "sequence", VOCABULARY])
    graph.inputs[0], graph.outputs[0] = ids, node.outputs[0]
    model_file.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def tokens(count: int, length: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (count, length))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tokens.npz"
    np.savez(path, input_ids=tokens(6, 24))
    return path


@pytest.fixture(scope="module")
def quantized(text_decoder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("build") / "out"
    recipe = Recipe(kv="int4", weights="rtn", transform="hadamard", scheme="w8a8", keep=("lm_head",))
    build(text_decoder, out, recipe=recipe, calib_data=str(data))
    return out


# --- Decoders


def test_a_decoder_in_chunks_is_the_decoder(text_decoder: Path, quantized: Path) -> None:
    ids = tokens(2, 17)
    for path in (text_decoder, quantized):
        model = Decoder(path)
        whole = model(ids)
        size = model.cache_bytes
        model.reset()
        chunks = np.concatenate([model(ids[:, :5]), model(ids[:, 5:6]), model(ids[:, 6:])], axis=1)
        np.testing.assert_allclose(chunks, whole, atol=2e-4)
        assert model.tokens == 17
        assert model.cache_bytes == size
    in_float = 2 * 17 * 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head * 4
    assert size == in_float // (SHAPE.head * 4) * (SHAPE.head // 2 + 4 + 1), "nibbles, scale, zero point"


def test_generation_takes_the_most_likely_token(text_decoder: Path) -> None:
    model = Decoder(text_decoder)
    prompt = tokens(2, 5)
    added = generate(model, prompt, 6)
    model.reset()
    expected = model(np.concatenate([prompt, added], axis=1)).argmax(-1)[:, 4:-1]
    np.testing.assert_array_equal(added, expected)
    first = added[0, 0]
    assert generate(model, prompt[:1], 6, stop=int(first)).tolist() == [[first]]


def test_draws_follow_the_seed(text_decoder: Path) -> None:
    model = Decoder(text_decoder)
    drawn = [generate(model, tokens(1, 5), 12, temperature=5.0, seed=seed).tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_a_decoder_refuses(text_decoder: Path, tmp_path: Path) -> None:
    model = Decoder(text_decoder)
    with pytest.raises(DataError, match="outside the vocabulary of 80"):
        model(np.array([[80]]))
    with pytest.raises(DataError, match=r"give integers \[batch, tokens\]"):
        model(np.zeros((1, 2)))
    model(tokens(2, 3))
    with pytest.raises(DataError, match="3 sequences after 2"):
        model(tokens(3, 1))
    with pytest.raises(ModelError, match="no such file"):
        Decoder(tmp_path)
    b = Builder()
    b.output(b.linear(b.input("x", [1, 8]), 8, 8, "l"), [1, 8])
    model_file.save(ir.from_proto(b.model()), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="is no language model"):
        Decoder(tmp_path)


# --- Text


class Table:
    """Stands for a decoder: the logits after a token are a row of a table."""

    has_cache = True
    cache_bytes = 6
    rows: Mapping[str, Any]

    def __init__(self, model: Path, *, device: str = "cpu") -> None:
        del device
        self.table, self.tokens = self.rows[str(model)], 0

    def reset(self) -> None:
        self.tokens = 0

    def __call__(self, ids: Any) -> Any:
        self.tokens += ids.shape[1]
        return self.table[ids]


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_predictions_by_hand(monkeypatch: pytest.MonkeyPatch, chunk: int | None) -> None:
    p, q = np.log([[3.0, 1.0], [1.0, 1.0]]), np.log([[1.0, 1.0], [1.0, 1.0]])
    monkeypatch.setattr(Table, "rows", {"float": p, "other": q}, raising=False)
    monkeypatch.setattr(evaluation, "Decoder", Table)
    # Token 0 is followed by 1 (p: 1/4, q: 1/2), 1 by 0 (1/2 each), 0 by 0 (3/4, 1/2).
    found = evaluate_text(Path("float"), Path("other"), [np.array([[0, 1, 0, 0]])], chunk=chunk, bucket=2)
    assert found.overall.tokens == 3
    assert found.overall.perplexity_reference == pytest.approx((1 / 4 * 1 / 2 * 3 / 4) ** (-1 / 3))
    assert found.overall.perplexity == pytest.approx(2)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.overall.kl == pytest.approx(2 * kl / 3)
    # Half way between (3/4, 1/4) and (1/2, 1/2) lies (5/8, 3/8).
    js = (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)) / 2
    assert found.overall.js == pytest.approx(2 * js / 3)
    assert found.overall.total_variation == pytest.approx(2 * 0.25 / 3)
    assert found.overall.top1 == 1, "the first of equals"
    assert found.overall.rel_l2 == pytest.approx(1), "q's logits are all zero"
    assert {at: p.tokens for at, p in found.positions.items()} == {0: 2, 2: 1}
    assert found.positions[2].perplexity_reference == pytest.approx(4 / 3)
    first = math.log(2) - math.log((1 / 4 * 1 / 2) ** (-1 / 2))
    assert found.drift == pytest.approx(math.log(2) - math.log(4 / 3) - first)
    assert found.cache_bytes == (1.5, 1.5) if chunk is None else True
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_a_model_is_at_no_distance_from_itself(text_decoder: Path) -> None:
    found = evaluate_text(text_decoder, text_decoder, tokens(3, 20)[:, None], chunk=6, bucket=8)
    assert (found.overall.tokens, found.overall.top1, found.overall.rel_l2, found.drift) == (57, 1.0, 0.0, 0.0)
    assert found.overall.increase == 0
    assert [p.tokens for p in found.positions.values()] == [24, 24, 9]
    assert found.failures(max_error=0, max_perplexity_increase=0) == []


def test_a_quantized_cache_is_read(text_decoder: Path, quantized: Path) -> None:
    whole, chunked = (evaluate_text(text_decoder, quantized, tokens(3, 24, 5)[:, None], chunk=chunk) for chunk in (None, 4))
    assert 0 < whole.overall.kl < 1
    assert chunked.overall.kl == pytest.approx(whole.overall.kl, rel=0.02)
    assert chunked.cache_bytes[1] < chunked.cache_bytes[0] / 3


def test_bounds(text_decoder: Path, quantized: Path) -> None:
    found = evaluate_text(text_decoder, quantized, tokens(2, 24, 5)[:, None])
    error, increase = found.overall.rel_l2, found.overall.increase
    assert found.failures(max_error=error, max_perplexity_increase=max(0, increase)) == []
    (line,) = found.failures(max_error=error / 2)
    assert "relative L2 error" in line
    (line,) = found.failures(max_perplexity_increase=increase - 1)
    assert line.startswith("perplexity rises by")


def test_logits_that_are_not_finite_fail() -> None:
    bad = evaluation.Predictions(1, 2.0, math.nan, math.nan, math.nan, math.nan, 0.0, math.nan, 3, 0)
    found = evaluation.TextEvaluation(bad, {0: bad}, 256, (0, 0))
    first, *others = found.failures(max_error=1, max_perplexity_increase=1)
    assert first == "the logits are not finite: 3 NaN and 0 Inf"
    assert len(others) == 2, "a NaN is within no bound"
    assert found.to_dict()["perplexity"] is None


def test_texts_without_their_padding() -> None:
    ids = np.arange(8).reshape(2, 4)
    assert [t.tolist() for t in texts([{"input_ids": ids}])] == [ids.tolist()]
    masked = {"input_ids": ids, "attention_mask": np.array([[1, 1, 1, 0], [1, 1, 1, 1]])}
    assert [t.tolist() for t in texts([masked])] == [[[0, 1, 2]], [[4, 5, 6, 7]]]
    with pytest.raises(DataError, match="pad on the right"):
        list(texts([{"input_ids": ids, "attention_mask": np.array([[0, 1, 1, 1]] * 2)}]))
    with pytest.raises(DataError, match="sample 0 has no input_ids"):
        list(texts([{"x": ids}]))


def test_texts_of_one_token_predict_nothing(text_decoder: Path) -> None:
    with pytest.raises(DataError, match="no text with two tokens or more"):
        evaluate_text(text_decoder, text_decoder, [tokens(1, 1)])


@pytest.mark.parametrize(
    ("language", "bound", "lines"),
    [
        (LanguageReport(perplexity_reference=4, perplexity=4.5, top1=0.9, tokens=10), None, []),
        (LanguageReport(perplexity_reference=4, perplexity=4.5, top1=0.9, tokens=10), 0.5, []),
        (
            LanguageReport(perplexity_reference=4, perplexity=4.5, top1=0.9, tokens=10),
            0.4,
            ["perplexity rises by 0.5 (4 to 4.5), above the bound of 0.4"],
        ),
        (
            LanguageReport(perplexity_reference=4, perplexity=math.nan, top1=0.9, tokens=10),
            1,
            ["perplexity rises by nan (4 to nan), above the bound of 1"],
        ),
        (None, None, []),
        (None, 1, ["there is no perplexity to bound: the model does not predict the next token, or the data are not text"]),
    ],
)
def test_the_bound_of_a_build(language: LanguageReport | None, bound: float | None, lines: list[str]) -> None:
    assert perplexity_failures(language, bound) == lines


def test_a_build_above_the_bound_fails(text_decoder: Path, data: Path, tmp_path: Path) -> None:
    options = ("--calib-data", data, "--transform", "none", "--weights", "rtn", "--max-perplexity-increase", "1e9")
    assert fqonnx("build", text_decoder, "-o", tmp_path / "good", *options).code == 0
    failed = fqonnx("build", text_decoder, "-o", tmp_path / "bad", "--random-calibration", *options[2:])
    assert failed.code == 1
    assert "there is no perplexity to bound" in failed.stdout


# --- Parts


def feeds(count: int, length: int = 24) -> list[dict[str, Any]]:
    empty = {
        f"past_key_values.{layer}.{part}": np.zeros((1, SHAPE.kv_heads, 0, SHAPE.head), np.float32)
        for layer in range(SHAPE.layers)
        for part in ("key", "value")
    }
    return [{"input_ids": tokens(1, length, seed), "attention_mask": np.ones((1, length), np.int64), **empty} for seed in range(count)]


def test_one_group_alone_is_the_build_of_that_group_alone(text_decoder: Path, data: Path, tmp_path: Path) -> None:
    recipe = Recipe(weights="rtn", transform="hadamard", keep=("lm_head",))
    build(text_decoder, tmp_path / "all", recipe=recipe, calib_data=str(data))
    only = "model.layers.1.attn.o_proj"
    others = ("lm_head", r"layers\.0", "[qkv]_proj", "mlp")
    build(text_decoder, tmp_path / "one", recipe=Recipe(weights="rtn", transform="hadamard", keep=others), calib_data=str(data))
    found = parts.contributions(*parts.open_pair(text_decoder, tmp_path / "all"), feeds(2))
    assert sum(c.share for c in found) == pytest.approx(1)
    assert [c.share for c in found] == sorted((c.share for c in found), reverse=True)
    assert len({name for c in found for name in c.groups}) == 4 * SHAPE.layers
    direct = verify(text_decoder, tmp_path / "one", feeds(2), tokens=False).outputs["logits"]
    (single,) = (c for c in found if only in c.groups)
    assert single.groups == (only,)
    assert single.rel_l2 == pytest.approx(direct.rel_l2, rel=0.02)


def test_groups_of_a_build_with_a_cache(text_decoder: Path, quantized: Path) -> None:
    found = parts.contributions(*parts.open_pair(text_decoder, quantized), feeds(1))
    assert sum(c.share for c in found) == pytest.approx(1)
    assert all(0 < c.rel_l2 < 0.5 for c in found)


def test_contributions_need_a_build(text_decoder: Path) -> None:
    with pytest.raises(ModelError, match="has none of the reference's quantized linears"):
        parts.contributions(*parts.open_pair(text_decoder, text_decoder), feeds(1))


def test_attention_against_the_values_themselves(text_decoder: Path, quantized: Path) -> None:
    pair = parts.open_pair(text_decoder, quantized)
    found = parts.attention(*pair, feeds(1))
    assert len(found) == SHAPE.layers
    name = found[1].name
    a, b = (run(model, feeds(1)[0], [name])[name].astype(np.float64) for model in pair)
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (a, b))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    assert found[1].total_variation == pytest.approx(float(np.abs(p - q).sum(-1).mean() / 2), rel=0.05)
    seen = p > 0  # the mask leaves 0 log 0
    ratio = np.log(np.where(seen, p, 1) / np.where(seen, q, 1))
    assert found[1].kl == pytest.approx(float((p * ratio).sum(-1).mean()), rel=0.05)
    assert 0 < found[0].js < found[0].kl
    same = parts.attention(pair[0], pair[0], feeds(1))
    assert [(e.kl, e.top1) for e in same] == [(0.0, 1.0)] * SHAPE.layers


def test_no_attention() -> None:
    b = Builder()
    b.output(b.linear(b.input("x", [1, 8]), 8, 8, "l"), [1, 8])
    model = prepare(ir.from_proto(b.model()))
    with pytest.raises(ModelError, match="no softmax of scores"):
        parts.attention(model, model, [{"x": np.zeros((1, 8), np.float32)}])


def overflowing(scale: float) -> ir.Model:
    """x times a constant, then less itself."""
    b = Builder()
    x = b.input("x", [1, 2])
    large = b.node("Mul", [x, b.constant("scale", np.array(scale, np.float32))], "large")
    b.output(b.node("Sub", [large, large], "nothing"), [1, 2])
    return prepare(ir.from_proto(b.model()))


def test_the_first_value_that_is_not_finite_is_named() -> None:
    feed = {"x": np.array([[4.0, 1.0]], np.float32)}
    infinite, nan, *_ = parts.watch(overflowing(1e38), [feed])
    assert (infinite.name, infinite.op, infinite.nan, infinite.inf) == ("large_out", "Mul", 0, 1)
    assert (nan.name, nan.nan) == ("nothing_out", 1)
    (near,) = parts.watch(overflowing(8e37), [feed])
    assert (near.name, near.inf, near.largest) == ("large_out", 0, pytest.approx(3.2e38))
    assert near.headroom == pytest.approx(3.4028235e38 / 3.2e38)
    (kept,) = parts.watch(overflowing(1e38), [feed], reference=overflowing(1e38))
    assert (kept.name, kept.largest) == ("large_out", pytest.approx(1e38)), "what the reference has too is in order; the tightest is left"


# --- Command line


def test_command_line(text_decoder: Path, quantized: Path, data: Path) -> None:
    common = ("evaluate", text_decoder, quantized, "--data", data, "--samples", "3", "--chunk", "8", "--bucket", "8")
    done = fqonnx(*common, "--attention", "--watch", "--json", "--part-samples", "1")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["passed"]
    assert result["tokens"] == 3 * 23
    assert len(result["attention"]) == SHAPE.layers
    assert [p["first"] for p in result["positions"]] == [0, 8, 16]
    failed = fqonnx(*common, "--max-error", "0")
    assert failed.code == 1
    assert "FAILED: the logits have a relative L2 error" in failed.stdout
    assert "bytes a token" in failed.stdout
