"""Copies of text with tokens drawn anew from the float model's predictions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fqonnx.build import build
from fqonnx.calib import redraw
from fqonnx.calib.redraw import NextToken, redrawn
from fqonnx.errors import CalibrationError, ModelError, UsageError
from fqonnx.passes.prepare import prepare
from fqonnx.recipe import Recipe
from tests import zoo
from tests.cli_support import one_line, run
from tests.networks import Network
from tests.test_reconstruct import Samples

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 50


def bigrams(logits: np.ndarray[Any, Any], *, looks_ahead: bool = False, output: str = "logits") -> ir.Model:
    """A model that predicts from the last token alone, by a table; or from the mean over all of them."""
    graph = zoo.Graph("bigrams")
    found = graph.op("Gather", graph.constant(logits.astype(np.float32)), "ids")
    if looks_ahead:
        found = graph.op("Add", found, graph.op("ReduceMean", found, graph.constant(np.array([1], np.int64))))
    graph.op("Identity", found, outputs=[output])
    shape = ("batch", "seq")
    return prepare(ir.from_proto(graph.model([output], {"ids": (zoo.INT64, shape), "attention_mask": (zoo.INT64, shape)})))


def text(count: int, tokens: int = 40) -> Samples:
    rng = np.random.default_rng(0)
    return Samples(
        {"ids": rng.integers(0, VOCABULARY, (1, tokens)), "attention_mask": np.ones((1, tokens), np.int64)} for _ in range(count)
    )


def sure(follower: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Logits of a model that is sure which token follows."""
    logits = np.full((VOCABULARY, VOCABULARY), -1e4)
    logits[np.arange(VOCABULARY), follower] = 0
    return logits


def test_a_share_of_the_tokens_is_what_the_model_predicts_behind_the_real_ones(tmp_path: Path) -> None:
    follower, data = np.random.default_rng(1).permutation(VOCABULARY), text(20)
    made = list(redrawn(bigrams(sure(follower)), data, 3, seed=0, workdir=tmp_path))
    assert [index for index, _ in made] == [*range(20)] * 3
    changed = total = 0
    for index, feeds in made:
        real, copy = data[index]["ids"], feeds["ids"]
        assert copy.dtype == real.dtype
        assert copy[0, 0] == real[0, 0]
        new = copy != real
        assert (copy[new] == follower[np.roll(real, 1)][new]).all()
        changed, total = changed + new.sum(), total + new.size - 1
        assert feeds["attention_mask"] is data[index]["attention_mask"]
    # One in 50 is drawn as it was.
    assert changed / total == pytest.approx(redraw.SHARE * (1 - 1 / VOCABULARY), abs=0.03)
    copies = [feeds["ids"] for index, feeds in made if index == 0]
    assert not np.array_equal(copies[0], copies[1])
    again = list(redrawn(bigrams(sure(follower)), data, 3, seed=0, workdir=tmp_path))
    assert all(np.array_equal(one["ids"], other["ids"]) for (_, one), (_, other) in zip(made, again, strict=True))
    other = list(redrawn(bigrams(sure(follower)), data, 1, seed=1, workdir=tmp_path))
    assert not np.array_equal(other[0][1]["ids"], made[0][1]["ids"])


def test_tokens_come_as_often_as_predicted(tmp_path: Path) -> None:
    logits = np.tile(np.log(np.arange(1, VOCABULARY + 1)), (VOCABULARY, 1)) + 300  # beyond what an exponential takes
    data = text(40, 200)
    data[0]["ids"][:] = 0
    made = [feeds["ids"] for _, feeds in redrawn(bigrams(logits), Samples([data[0]] * 40), 2, seed=0, workdir=tmp_path)]
    drawn = np.concatenate([ids[ids != 0] for ids in made])
    counts = np.bincount(drawn, minlength=VOCABULARY)[1:]
    expected = np.arange(2, VOCABULARY + 1) / np.arange(2, VOCABULARY + 1).sum()
    assert np.abs(counts / counts.sum() - expected).max() < 0.01


def test_padding_stays(tmp_path: Path) -> None:
    follower, data = np.roll(np.arange(VOCABULARY), 1), text(10)
    for feeds in data:
        feeds["attention_mask"][:, 30:] = 0
        feeds["ids"][:, 30:] = 0
    for index, feeds in redrawn(bigrams(sure(follower)), data, 2, seed=0, workdir=tmp_path):
        assert (feeds["ids"][:, 30:] == data[index]["ids"][:, 30:]).all()
        assert (feeds["ids"] != data[index]["ids"]).any()


def test_what_does_not_predict_the_next_token_is_refused(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY))
    with pytest.raises(ModelError, match="'logits' does not predict the next token, it sees it: leave out --augment"):
        list(redrawn(bigrams(logits, looks_ahead=True), text(2), 1, seed=0, workdir=tmp_path))
    net = Network()
    net.layer("0")
    with pytest.raises(ModelError, match="one input of token ids and one output of logits: leave out --augment"):
        NextToken.of(net.model()[0])


def test_an_output_of_another_name_is_told_by_its_size() -> None:
    logits = np.zeros((VOCABULARY, VOCABULARY))
    found = NextToken.of(bigrams(logits, output="scores"))
    assert (found.ids, found.logits, found.mask) == ("ids", "scores", "attention_mask")


def test_nan_is_one_line(tmp_path: Path) -> None:
    logits = np.zeros((VOCABULARY, VOCABULARY))
    logits[:, 3] = np.nan
    with pytest.raises(CalibrationError, match="the float model's logits are NaN or Inf"):
        list(redrawn(bigrams(logits), text(2), 1, seed=0, workdir=tmp_path))


def test_recipes() -> None:
    with pytest.raises(UsageError, match="--augment is for --reconstruct block or model"):
        Recipe(augment=2)
    with pytest.raises(UsageError, match="augment -1 is out of range"):
        Recipe(augment=-1, reconstruct="block")
    assert Recipe.from_dict({"augment": 2, "reconstruct": "block"}).augment == 2


def language(path: Path) -> None:
    """Two layers of an MLP between an embedding and logits."""
    net = Network()
    net.h = net.graph.op("Gather", net.graph.weight(VOCABULARY, net.width, scale=1.0), "ids")
    for index in range(2):
        net.add(net.mlp(net.norm(net.h), str(index)))
    net.graph.op("MatMul", net.norm(net.h), net.graph.weight(net.width, VOCABULARY, scale=0.5), outputs=["logits"], name="/head/MatMul")
    onnx.save(net.graph.model(["logits"], {"ids": (zoo.INT64, ("batch", "seq"))}), path)


def test_a_build_trains_on_copies_too(tmp_path: Path) -> None:
    language(tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", ids=np.random.default_rng(0).integers(0, VOCABULARY, (24, 16)))
    codes = []
    for copies in (0, 2):
        recipe = Recipe(reconstruct="block", steps=10, keep=("head",), augment=copies)
        report = build(tmp_path / "m.onnx", tmp_path / f"out{copies}", recipe=recipe, calib_data=str(tmp_path / "calib.npz"))
        assert report.passed
        manifest = json.loads((tmp_path / f"out{copies}" / "manifest.json").read_text())
        assert manifest["recipe"]["augment"] == copies
        codes.append((tmp_path / f"out{copies}" / "calibration.safetensors").read_bytes())
    assert codes[0] != codes[1]


def test_a_model_of_something_else_is_refused_at_once(tmp_path: Path) -> None:
    net = Network()
    net.layer("0")
    onnx.save(net.proto(), tmp_path / "m.onnx")
    choices = ("--random-calibration", "--reconstruct", "block", "--augment", "1")
    result = run("build", tmp_path / "m.onnx", "-o", tmp_path / "out", *choices)
    assert result.code == 1
    assert "copies of text need a model with one input of token ids and one output of logits" in one_line(result.stderr)
    assert not (tmp_path / "out").exists()
