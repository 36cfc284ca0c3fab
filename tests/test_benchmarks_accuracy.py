"""The table of accuracies: its rows are those of the registries and what builds give, none is measured twice, failures are rows."""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from benchmarks import accuracy, accuracy_cases, accuracy_row
from benchmarks.accuracy import Case, Runner, main_rows, matrix, matrix_table, seeds_table
from benchmarks.accuracy_cases import Llama, MiniLM
from benchmarks.accuracy_row import Result, Task
from fqonnx.calib.transforms import TRANSFORMS
from fqonnx.calib.weights import WEIGHT_QUANTIZERS
from fqonnx.errors import DataError, UsageError
from fqonnx.recipe import RECONSTRUCTIONS, Recipe

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    Array = npt.NDArray[Any]

WORDS, WIDTH = 40, 32


def write_model(path: Path, output: str, size: int) -> Path:
    """``input_ids -> output [batch, sequence, size]``: an embedding, a linear, Tanh, another; two more inputs where it is an encoder."""
    rng = np.random.default_rng(0)
    shapes = {"table": (WORDS, WIDTH), "w1": (WIDTH, WIDTH), "w2": (WIDTH, size)}
    tensors = [numpy_helper.from_array((rng.normal(size=s) / s[0] ** 0.5).astype(np.float32), name) for name, s in shapes.items()]
    names = ["input_ids"] if output == "logits" else ["input_ids", "attention_mask", "token_type_ids"]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "w2"], ["y"], name="second"),
    ]
    if len(names) > 1:  # by a mask of ones, and zeros added: the other inputs must be read to be inputs
        for extra in names[1:]:
            nodes.append(helper.make_node("Cast", [extra], [f"{extra}/f"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Unsqueeze", [f"{extra}/f", "axis"], [f"{extra}/u"]))
        nodes += [
            helper.make_node("Mul", ["y", "attention_mask/u"], ["masked"]),
            helper.make_node("Add", ["masked", "token_type_ids/u"], [output]),
        ]
        tensors.append(numpy_helper.from_array(np.array([-1]), "axis"))
    else:
        nodes[-1].output[0] = output
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in names]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", "sequence", size])]
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.fixture
def encoder(tmp_path: Path) -> MiniLM:
    """A subject as ``prepare`` leaves it, of a tiny encoder."""
    subject = MiniLM(tmp_path / "minilm")
    write_model(subject.folder / "model.onnx", "last_hidden_state", 16)
    sample, rng = accuracy_cases.load_sample("minilm"), np.random.default_rng(1)
    for part, count in (("calibration", 20), ("evaluation", 4)):
        ids = [rng.integers(0, WORDS, (1, 5 + index % 3)) for index in range(count)]
        sample.write_feeds(
            [{"input_ids": i, "attention_mask": np.ones_like(i), "token_type_ids": np.zeros_like(i)} for i in ids], subject.folder / part
        )
    return subject


def runner(tmp_path: Path, jobs: int = 1) -> Runner:
    return Runner(tmp_path / "out", jobs=jobs, device="cpu", verify_device="cpu")


def test_rows_are_all_that_is_registered(tmp_path: Path) -> None:
    subject = MiniLM(tmp_path)
    pairs = [(case.recipe.transform, case.recipe.weights) for case in matrix(subject) if case.recipe]
    assert sorted(pairs) == sorted((t, w) for t in TRANSFORMS for w in WEIGHT_QUANTIZERS)
    found = main_rows(subject, 3)
    assert {case.recipe.reconstruct for case in found if case.recipe} == set(RECONSTRUCTIONS)
    assert len({case.label for case in found}) == len(found) == 3 * 2 * len(RECONSTRUCTIONS)
    assert Case(subject, Recipe()) in found
    assert Case(subject, Recipe()).label == "minilm flatquant gptq group seed 0"


def test_a_row_is_what_a_build_gives_and_is_measured_once(encoder: MiniLM, tmp_path: Path) -> None:
    from fqonnx.build import build

    measured = runner(tmp_path, jobs=2)
    cases = [Case(encoder, None), *(Case(encoder, Recipe(transform="none", weights=weights)) for weights in ("rtn", "gptq"))]
    measured.measure(cases)
    floats, rtn, gptq = (measured.result(case) for case in cases)
    assert floats is not None
    assert floats.figures == {"mean cosine": pytest.approx(1.0), "lowest": pytest.approx(1.0)}
    assert rtn is not None
    assert gptq is not None
    assert (rtn.error, gptq.error) == ("", "")
    assert {"solve", "verify", "total"} <= set(gptq.seconds)
    build(
        encoder.folder / "model.onnx", tmp_path / "b", recipe=Recipe(transform="none", weights="gptq"), calib_data=encoder.calibration,
        max_error=1.0,
    )  # fmt: skip
    assert gptq.figures == encoder.score(tmp_path / "b" / "model.onnx")
    assert gptq.figures != rtn.figures
    assert gptq.figures["lowest"] <= gptq.figures["mean cosine"] < 1
    # Only GPTQ has a use for the float model; nothing of either build is left.
    assert [path.name.split("-")[:3] for path in (tmp_path / "out" / "observed").iterdir()] == [["minilm", "seed0", "hessian"]]
    assert not list((tmp_path / "out" / "work").iterdir())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}
    runner(tmp_path).measure(cases)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")} == before
    # Other data are other rows.
    next((encoder.folder / "calibration").glob("*.npz")).unlink()
    assert runner(tmp_path).result(cases[2]) is None


def test_rows_share_what_was_observed(encoder: MiniLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = Task(
        subject="minilm",
        folder=str(encoder.folder),
        recipe=Recipe(transform="none").to_dict(),
        device="cpu",
        verify_device="cpu",
        observed=str(tmp_path / "observed"),
        observe=True,
        out=str(tmp_path / "build"),
        cpus=[0],
        result="",
    )
    accuracy_row.perform(task)
    with caplog.at_level(logging.INFO, logger="fqonnx"):
        accuracy_row.perform(Task(**{**asdict(task), "observe": False}))
    assert "1 of 1 groups were observed before" in caplog.text


def test_failures_are_rows(encoder: MiniLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = runner(tmp_path)
    killed, refused = (Case(encoder, Recipe(transform="none", weights=weights)) for weights in ("rtn", "gptq"))
    first = min((encoder.folder / "calibration").iterdir())
    np.savez(first, **{name: np.full((1, 5), WORDS) for name in ("input_ids", "attention_mask", "token_type_ids")})
    measured.measure([refused])
    failed = measured.result(refused)
    assert failed is not None
    assert not failed.figures
    assert re.search(rf"input_ids.*{WORDS}", failed.error)
    assert measured.result_path(refused).with_suffix(".log").exists()
    dies = tmp_path / "dies"
    dies.write_text("#!/bin/sh\necho started\necho no memory left >&2\nexit 9\n")
    dies.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dies))
    measured.measure([killed])
    assert measured.result(killed) == Result(error="its process ended with code 9: no memory left")
    shown = matrix_table(encoder, measured)
    assert next(line for line in shown.splitlines() if line.startswith("| none |")).startswith("| none | failed | ")
    assert shown.splitlines()[-2:] == ["- none + rtn: its process ended with code 9: no memory left", f"- none + gptq: {failed.error}"]


def test_means_and_spreads(tmp_path: Path) -> None:
    subject = MiniLM(tmp_path / "none")
    measured = runner(tmp_path)
    values = {("group", "rtn"): [0.9, 0.94, 0.98], ("group", "gptq"): [0.95]}
    for case in main_rows(subject, 3):
        assert case.recipe is not None
        known = values.get((case.recipe.reconstruct, case.recipe.weights), [])
        if case.recipe.seed < len(known):
            result = Result({subject.figure: known[case.recipe.seed], "lowest": 0.5}, {"solve": 10.0 * (1 + case.recipe.seed)})
        elif known:
            result = Result(error="out of luck")
        else:
            continue
        measured.result_path(case).write_text(json.dumps(asdict(result)))
    lines = seeds_table(subject, measured, 3).splitlines()
    assert lines[2] == "| group | rtn | 3 | 0.9400 | 0.9000 to 0.9800 | 20 s |"
    assert lines[3] == "| group | gptq | 1 | 0.9500 | 0.9500 to 0.9500 | 10 s |"
    assert lines[4] == "| block | rtn | 0 | – |  |  |"
    assert lines[-2:] == [f"- minilm flatquant gptq group seed {seed}: out of luck" for seed in (1, 2)]
    cells = matrix_table(subject, measured).splitlines()
    assert cells[0] == f"| minilm, mean cosine | {' | '.join(WEIGHT_QUANTIZERS)} |"
    row = next(line for line in cells if line.startswith("| flatquant |")).split(" | ")
    assert row[1 + list(WEIGHT_QUANTIZERS).index("rtn")] == "0.9000 (10 s)"


def test_a_llama_is_scored_on_the_text_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_cases, "WINDOWS", 2)
    monkeypatch.setattr(accuracy_cases, "LENGTH", 8)
    monkeypatch.setattr(accuracy_cases, "CALIBRATION_WINDOWS", 3)
    model = write_model(tmp_path / "model.onnx", "logits", WORDS)
    rng = np.random.default_rng(2)
    texts = {"calib": rng.integers(0, WORDS, 30).astype(np.uint16), "open": rng.integers(0, WORDS, 20).astype(np.uint16)}
    np.savez(tmp_path / "tokens.npz", **texts)  # type: ignore[arg-type]  # none is named allow_pickle
    subject = Llama(tmp_path / "llama")
    subject.prepare(model, tmp_path / "tokens.npz")
    assert np.array_equal(np.load(subject.calibration)["input_ids"], texts["calib"][:24].reshape(3, 8))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(model).graph.initializer}
    logits = np.tanh(arrays["table"][texts["open"][:16].astype(int)] @ arrays["w1"]) @ arrays["w2"]
    log = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).reshape(2, 8, WORDS)
    targets = texts["open"][:16].astype(int).reshape(2, 8)[:, 1:]
    expected = np.exp(-np.take_along_axis(log[:, :-1], targets[..., None], -1).mean())
    assert subject.score(subject.folder / "model.onnx") == {"perplexity": pytest.approx(expected, rel=1e-5)}
    model.unlink()
    subject.prepare(model, tmp_path / "tokens.npz")  # it is there: nothing is read again
    np.savez(tmp_path / "short.npz", calib=texts["calib"], open=texts["open"][:9])
    with pytest.raises(DataError, match="fewer than 3 and 2 windows of 8 tokens"):
        Llama(tmp_path / "other").prepare(model, tmp_path / "short.npz")
    with pytest.raises(DataError, match="no such file or folder"):
        Llama(tmp_path / "other").prepare(model, tmp_path / "tokens.npz")


def test_command_line(encoder: MiniLM, tmp_path: Path) -> None:
    done = CliRunner().invoke(accuracy.main, ["--out", str(tmp_path), "--only", "minilm none rtn"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "accuracy.md").read_text()
    assert page in done.output
    assert "minilm: float mean cosine 1.0000." in page
    written = json.loads((tmp_path / "accuracy.json").read_text())
    assert sorted(written["rows"]) == ["minilm", "minilm none rtn group seed 0"]
    figure = written["rows"]["minilm none rtn group seed 0"]["figures"]["mean cosine"]
    assert f"| none | {figure:.4f} (" in page
    assert written["versions"]["code"] in page


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to measure: give --llama"):
        CliRunner().invoke(accuracy.main, ["--out", str(tmp_path), "--no-minilm"], catch_exceptions=False)
    with pytest.raises(UsageError, match="--jobs 999 is more than"):
        Runner(tmp_path, jobs=999, device="cpu", verify_device="cpu")
