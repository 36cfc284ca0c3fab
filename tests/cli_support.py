"""Small models, data, and ways to run the command line, for the tests of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from fqonnx.cli.main import program

if TYPE_CHECKING:
    from pathlib import Path

K = 32
HIDDEN = 64
VOCABULARY = 50

FAST = ("--transform", "none", "--weights", "rtn", "--scheme", "w8a8")
"""Choices that take no training and lose little, for tests that are about something else."""


def write_mlp(path: Path, *, layers: int = 1, external: bool = False, dead_channel: int | None = None) -> Path:
    """``x [batch, K] -> y [batch, K]``: per layer a linear with bias, Relu, and another linear; they ignore ``dead_channel``."""
    rng = np.random.default_rng(0)
    nodes, constants, x = [], [], "x"

    def constant(name: str, *shape: int) -> str:
        values = (rng.normal(size=shape) / shape[0] ** 0.5).astype(np.float32)
        if dead_channel is not None and len(shape) == 2:
            values[dead_channel] = 0
        constants.append(numpy_helper.from_array(values, name))
        return name

    for i in range(layers):
        nodes += [
            helper.make_node("MatMul", [x, constant(f"w_up{i}", K, HIDDEN)], [f"up{i}"], name=f"layers.{i}.up"),
            helper.make_node("Add", [f"up{i}", constant(f"b{i}", HIDDEN)], [f"biased{i}"], name=f"layers.{i}.bias"),
            helper.make_node("Relu", [f"biased{i}"], [f"act{i}"], name=f"layers.{i}.relu"),
            helper.make_node("MatMul", [f"act{i}", constant(f"w_down{i}", HIDDEN, K)], [f"down{i}"], name=f"layers.{i}.down"),
        ]
        x = f"down{i}"
    nodes.append(helper.make_node("Identity", [x], ["y"], name="out"))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", K]) for name in ("x", "y")]
    return _save(helper.make_graph(nodes, "mlp", value[:1], value[1:], constants), path, external=external)


def write_language_model(path: Path) -> Path:
    """``input_ids [batch, seq] -> logits [batch, seq, VOCABULARY]``: an embedding, a linear, a vocabulary projection of its own weight."""
    rng = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32) / 4, name)
        for name, shape in (("table", (VOCABULARY, K)), ("w", (K, K)), ("head", (K, VOCABULARY)))
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"], name="embed"),
        helper.make_node("MatMul", ["x", "w"], ["h"], name="mix"),
        helper.make_node("MatMul", ["h", "head"], ["logits"], name="lm_head"),
    ]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", VOCABULARY])]
    return _save(helper.make_graph(nodes, "lm", inputs, outputs, constants), path)


def _save(graph: onnx.GraphProto, path: Path, *, external: bool = False) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    if external:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def write_data(path: Path, samples: int = 20, **arrays: Any) -> Path:
    """An ``.npz`` of ``x [samples, K]``, or of the arrays given."""
    rng = np.random.default_rng(1)
    np.savez(path, **(arrays or {"x": rng.normal(size=(samples, K)).astype(np.float32)}))
    return path


@dataclass(frozen=True)
class Run:
    """What a command did."""

    code: int
    stdout: str
    stderr: str


def run(*args: str | Path) -> Run:
    """Run the command line in this process."""
    result: Result = CliRunner().invoke(program, [str(arg) for arg in args])
    return Run(result.exit_code, result.stdout, result.stderr)


def command(*args: str | Path) -> list[str]:
    """The command line as a process of its own."""
    return [sys.executable, "-m", "fqonnx.cli.main", *(str(arg) for arg in args)]


def environment(**more: str) -> dict[str, str]:
    """The environment for ``command``: one thread each, so that tests in parallel do not fight for cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def run_process(*args: str | Path, timeout: float = 120, measured: bool = True, **options: Any) -> Run:
    """Run the command line as a user would; ``measured=False`` without coverage, whose own file a limited process could not write."""
    env = {name: value for name, value in environment().items() if measured or not name.startswith("COVERAGE_")}
    done = subprocess.run(command(*args), capture_output=True, text=True, timeout=timeout, check=False, env=env, **options)
    return Run(done.returncode, done.stdout, done.stderr)


def one_line(text: str) -> str:
    """The only line of ``text``; fails on more, on none, and on a traceback."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]
