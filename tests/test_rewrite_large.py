"""What rewriting costs: time on graphs of many layers, memory on weights that would not fit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fqonnx import model as files
from fqonnx.passes.linears import find
from fqonnx.passes.pipeline import quantize_model
from fqonnx.passes.prepare import prepare
from fqonnx.recipe import SCHEMES, Recipe
from tests.rewriting import Builder, found, solve

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = Recipe(scheme="w4a4", transform="none", weights="rtn")


def encoder(layers: int, hidden: int, inner: int) -> onnx.ModelProto:
    """A post-norm encoder of MiniLM's form: q/k/v, output, up, down per layer."""
    b = Builder()
    x = b.input("x", ["batch", "tokens", hidden])
    for i in range(layers):
        q, k, v = (b.linear(x, hidden, hidden, f"layers.{i}.{name}", bias="left") for name in ("query", "key", "value"))
        transposed = b.node("Transpose", [k], f"layers.{i}.transpose", perm=[0, 2, 1])
        scores = b.node("Softmax", [b.node("MatMul", [q, transposed], f"layers.{i}.scores")], f"layers.{i}.softmax", axis=-1)
        mixed = b.linear(b.node("MatMul", [scores, v], f"layers.{i}.mix"), hidden, hidden, f"layers.{i}.output", bias="left")
        x = b.layer_norm(b.node("Add", [mixed, x], f"layers.{i}.residual1"), hidden, f"layers.{i}.norm1")
        up = b.node("Gelu", [b.linear(x, hidden, inner, f"layers.{i}.up", bias="left")], f"layers.{i}.gelu")
        down = b.linear(up, inner, hidden, f"layers.{i}.down", bias="left")
        x = b.layer_norm(b.node("Add", [down, x], f"layers.{i}.residual2"), hidden, f"layers.{i}.norm2")
    b.output(x, ["batch", "tokens", hidden])
    return b.model()


def rewrite_seconds(layers: int) -> float:
    model, groups = found(encoder(layers, 32, 64))
    solutions = solve(groups, SCHEMES["w4a4"])
    start = time.process_time()
    quantize_model(model, groups, solutions.__getitem__, RECIPE, "sm90")
    return time.process_time() - start


def test_72_linears_take_seconds_from_file_to_file(tmp_path: Path) -> None:
    """MiniLM's sizes; everything a build does but calibrate."""
    onnx.save(encoder(12, 384, 1536), tmp_path / "float.onnx")
    _, groups = found(onnx.load(tmp_path / "float.onnx"))
    solutions = solve(groups, SCHEMES["w4a4"])
    start = time.process_time()
    model = prepare(files.load(tmp_path / "float.onnx"))
    groups = find(model).groups
    assert sum(len(group.linears) for group in groups) == 72
    files.save(quantize_model(model, groups, solutions.__getitem__, RECIPE, "sm90"), tmp_path / "quantized.onnx")
    assert time.process_time() - start < 5
    assert (tmp_path / "quantized.onnx").stat().st_size < 0.16 * (tmp_path / "float.onnx").stat().st_size


def test_time_is_linear_in_layers() -> None:
    rewrite_seconds(2)  # first-use costs
    # 8 times the layers: 64 times the time where anything is quadratic.
    assert rewrite_seconds(160) < 30 * rewrite_seconds(20)


_LARGE = """
import json, re, sys, time
from pathlib import Path
import numpy as np
import onnx_ir as ir
from fqonnx import model as files
from fqonnx.calib.solution import GroupSolution
from fqonnx.passes.linears import find
from fqonnx.passes.pipeline import quantize_model
from fqonnx.passes.prepare import prepare
from fqonnx.recipe import Recipe

source, destination, scheme = sys.argv[1:]
model = prepare(files.load(source))
groups = {group.name: group for group in find(model).groups}

def solution(name):  # as if from disk
    n, k = groups[name].out_features, groups[name].in_features
    return GroupSolution(name, None, None, None, 1.0, np.full((n, k), 3, np.int8), np.full((n, 1), 1e-3, np.float32))

def peak():  # of this program alone: ru_maxrss carries over what started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

start, before = time.process_time(), peak()
recipe = Recipe(scheme=scheme, transform="none", weights="rtn")
files.save(quantize_model(model, tuple(groups.values()), solution, recipe, "sm90"), destination, external=True)
print(json.dumps({"before": before, "peak": peak(), "seconds": time.process_time() - start, "torch": "torch" in sys.modules}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "float.onnx"
    write_large(path, layers=6)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a4", "w4a16"])
def test_600_mb_of_weights_are_streamed(scheme: str, large: Path, tmp_path: Path) -> None:
    """The peak is a few times the largest group's 39 MB of codes, not the model's 617 MB, and torch is never imported."""
    destination = tmp_path / "quantized.onnx"
    assert large.with_name("float.onnx.data").stat().st_size > 600e6
    done = subprocess.run([sys.executable, "-c", _LARGE, large, destination, scheme], check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout)
    onnx.checker.check_model(destination, full_check=True)
    assert destination.with_name("quantized.onnx.data").stat().st_size < 160e6
    assert not figures["torch"]
    assert figures["peak"] - figures["before"] < 200, figures


def write_large(path: Path, layers: int) -> None:
    """``layers`` times q/k/v and an output projection of 3584 channels in fp16, on disk without ever being in memory."""
    k, dtype = 3584, ir.DataType.FLOAT16
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["batch", k]))
    nodes, weights, value = [], [], x

    def weight(name: str, seed: int) -> ir.Value:
        def read() -> ir.TensorProtocol:
            block = np.random.default_rng(seed).standard_normal((64, k), np.float32) * 0.02
            return ir.tensor(np.tile(block.astype(np.float16), (k // 64, 1)))

        tensor = ir.LazyTensor(read, dtype, ir.Shape([k, k]), name=name)
        weights.append(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([k, k]), const_value=tensor))
        return weights[-1]

    def node(op_type: str, inputs: list[ir.Value], name: str) -> ir.Value:
        output = ir.Value(name=f"{name}_out", type=ir.TensorType(dtype), shape=ir.Shape(["batch", k]))
        nodes.append(ir.node(op_type, inputs, name=name, outputs=[output]))
        return output

    for i in range(layers):
        q, key, v = (node("MatMul", [value, weight(f"{i}.{part}.weight", 4 * i + j)], f"{i}.{part}") for j, part in enumerate("qkv"))
        value = node(
            "MatMul", [node("Add", [node("Mul", [q, key], f"{i}.mul"), v], f"{i}.add"), weight(f"{i}.o.weight", 4 * i + 3)], f"{i}.o"
        )
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="main")
    files.save(ir.Model(graph, ir_version=10), path, external=True)
