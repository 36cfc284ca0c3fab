"""How much memory and time a build of a large model takes: writes a synthetic fp16 decoder and builds it through the command line.

    python samples/large.py --out out/large --gib 4

The weights are random and go to external data; the build is data-free (random rotations, round to nearest). Prints the largest resident
memory of the build's process, which counts every page of a mapped file too, and the time of each stage.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import onnx
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence

VOCABULARY = 4096
FLOAT = ir.DataType.FLOAT16


class Decoder:
    """Writes a pre-norm decoder with gated MLPs: ``input_ids`` to ``logits``.

    Args:
        path: The ``.onnx`` file; weights go to ``path`` + ``.data``.
        layers: Decoder layers.
        hidden: Width; the MLP is four times as wide.
    """

    def __init__(self, path: Path, layers: int, hidden: int) -> None:
        self._data = path.with_name(path.name + ".data")
        self._random = np.random.default_rng(0).standard_normal(1 << 22, np.float32).astype(np.float16)
        self._nodes: list[ir.Node] = []
        self._initializers: list[ir.Value] = []
        ids = ir.Input("input_ids", ir.Shape(["batch", "sequence"]), ir.TensorType(ir.DataType.INT64))
        with self._data.open("wb") as self._file:
            x = self._node("Gather", [self._weight("embedding", (VOCABULARY, hidden), 1.0), ids])
            for layer in range(layers):
                x = self._layer(x, f"layers.{layer}", hidden)
            logits = self._node("MatMul", [self._norm(x, "norm", hidden), self._weight("lm_head", (hidden, VOCABULARY), hidden**-0.5)])
        logits.name = "logits"
        logits.type = ir.TensorType(FLOAT)
        logits.shape = ir.Shape(["batch", "sequence", VOCABULARY])
        graph = ir.Graph([ids], [logits], nodes=self._nodes, initializers=self._initializers, opset_imports={"": 21}, name="large")
        ir.save(ir.Model(graph, ir_version=10), path)

    def _layer(self, x: ir.Value, name: str, hidden: int) -> ir.Value:
        normed = self._norm(x, f"{name}.input_norm", hidden)
        q, k, v = (self._linear(normed, f"{name}.{part}_proj", hidden, hidden) for part in "qkv")
        scores = self._node("MatMul", [q, self._node("Transpose", [k], perm=[0, 2, 1])])
        attention = self._node("Softmax", [self._node("Mul", [scores, self._constant(f"{name}.scale", hidden**-0.5)])])
        x = self._node("Add", [x, self._linear(self._node("MatMul", [attention, v]), f"{name}.o_proj", hidden, hidden)])
        normed = self._norm(x, f"{name}.post_norm", hidden)
        gate, up = (self._linear(normed, f"{name}.{part}_proj", hidden, 4 * hidden) for part in ("gate", "up"))
        gated = self._node("Mul", [self._node("Mul", [gate, self._node("Sigmoid", [gate])]), up])
        return self._node("Add", [x, self._linear(gated, f"{name}.down_proj", 4 * hidden, hidden)])

    def _norm(self, x: ir.Value, name: str, hidden: int) -> ir.Value:
        wide = self._node("Cast", [x], to=ir.DataType.FLOAT.value)
        mean = self._node("ReduceMean", [self._node("Mul", [wide, wide]), self._constant(f"{name}.axes", [-1], np.int64)])
        root = self._node("Sqrt", [self._node("Add", [mean, self._constant(f"{name}.epsilon", 1e-6, np.float32)])])
        normed = self._node("Cast", [self._node("Div", [wide, root])], to=FLOAT.value)
        return self._node("Mul", [normed, self._weight(f"{name}.weight", (hidden,), 1.0)])

    def _linear(self, x: ir.Value, name: str, k: int, n: int) -> ir.Value:
        return self._node("MatMul", [x, self._weight(f"{name}.weight", (k, n), k**-0.5)], name=name)

    def _node(self, op: str, inputs: Sequence[ir.Value], *, name: str | None = None, **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=name or f"{op}_{len(self._nodes)}")
        node.outputs[0].name = f"{node.name}.out"
        self._nodes.append(node)
        return node.outputs[0]

    def _constant(self, name: str, value: float | list[int], dtype: type = np.float16) -> ir.Value:
        return self._add(ir.Tensor(np.array(value, dtype), name=name))

    def _weight(self, name: str, shape: tuple[int, ...], std: float) -> ir.Value:
        """Random values, different for each weight: a stretch of one random block, written as often as it takes."""
        start, offset, left = len(self._initializers) * 9973 % len(self._random), self._file.tell(), int(np.prod(shape))
        scaled = np.roll(self._random, -start) * np.float16(std)
        length = left * 2
        while left:
            self._file.write(scaled[:left].tobytes())
            left -= min(left, len(scaled))
        return self._add(
            ir.ExternalTensor(self._data.name, offset, length, FLOAT, shape=ir.Shape(shape), name=name, base_dir=self._data.parent)
        )

    def _add(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape))
        self._initializers.append(value)
        return value


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("out/large"), show_default=True, help="Folder for the model and the build."
)
@click.option("--gib", type=float, default=4.0, show_default=True, help="Size of the float model.")
@click.option("--layers", type=int, default=32, show_default=True)
def main(out: Path, gib: float, layers: int) -> None:
    """Write the model, build it, print peak memory and time, and check the result."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "model.onnx"
    # 16 hidden² weights a layer, two bytes each; a multiple of 128, which every kernel layout takes.
    hidden = max(128, round((gib * 2**30 / (32 * layers)) ** 0.5 / 128) * 128)
    Decoder(path, layers, hidden)
    written = sum(file.stat().st_size for file in (path, path.with_name(path.name + ".data")))
    print(f"float model: {layers} layers of {hidden}, {written / 2**30:.2f} GiB")
    build = [sys.executable, "-m", "fqonnx.cli.main", "build", str(path), "-o", str(out / "build"), "--force"]
    start = time.perf_counter()
    done = subprocess.run(
        [*build, "--transform", "hadamard", "--weights", "rtn", "--random-calibration", "--calib-samples", "2"], check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.returncode)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    onnx.checker.check_model(str(out / "build" / "model.onnx"))
    stages = json.loads((out / "build" / "report.json").read_text())["time"]
    print("  ".join(f"{stage} {spent:.0f} s" for stage, spent in stages.items()))
    print(f"peak resident memory {peak:.2f} GiB, {seconds:.0f} s; the result passes onnx.checker")


if __name__ == "__main__":
    main()
