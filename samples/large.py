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

import click
import numpy as np
import onnx
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parent))  # `graphs` lies beside this file, wherever it is imported from
from graphs import GraphWriter, declared

VOCABULARY = 4096


def write_decoder(path: Path, layers: int, hidden: int) -> None:
    """Write a pre-norm decoder with gated MLPs: ``input_ids`` to ``logits``.

    Args:
        path: The ``.onnx`` file; weights go to ``path`` + ``.data``.
        layers: Decoder layers.
        hidden: Width; the MLP is four times as wide.
    """
    ids = declared("input_ids", ir.DataType.INT64, ["batch", "sequence"])
    with GraphWriter(path) as graph:
        decoder = _Decoder(graph, hidden)
        x = graph.node("Gather", [graph.weight("embedding", graph.random((VOCABULARY, hidden), 1.0)), ids])
        for layer in range(layers):
            x = decoder.layer(x, f"layers.{layer}")
        head = graph.weight("lm_head", graph.random((hidden, VOCABULARY), hidden**-0.5))
        logits = graph.node("MatMul", [decoder.norm(x, "norm"), head])
        outputs = [declared("logits", graph.dtype, ["batch", "sequence", VOCABULARY], logits)]
        graph.save([ids], outputs, name="large", opsets={"": 21})


class _Decoder:
    def __init__(self, graph: GraphWriter, hidden: int) -> None:
        self._graph, self._hidden, self._node = graph, hidden, graph.node

    def layer(self, x: ir.Value, name: str) -> ir.Value:
        normed = self.norm(x, f"{name}.input_norm")
        q, k, v = (self._linear(normed, f"{name}.{part}_proj", 1, 1) for part in "qkv")
        scores = self._node("MatMul", [q, self._node("Transpose", [k], perm=[0, 2, 1])])
        scale = self._graph.constant(f"{name}.scale", self._hidden**-0.5)
        attention = self._node("Softmax", [self._node("Mul", [scores, scale])])
        x = self._node("Add", [x, self._linear(self._node("MatMul", [attention, v]), f"{name}.o_proj", 1, 1)])
        normed = self.norm(x, f"{name}.post_norm")
        gate, up = (self._linear(normed, f"{name}.{part}_proj", 1, 4) for part in ("gate", "up"))
        gated = self._node("Mul", [self._node("Mul", [gate, self._node("Sigmoid", [gate])]), up])
        return self._node("Add", [x, self._linear(gated, f"{name}.down_proj", 4, 1)])

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        constant = self._graph.constant
        wide = self._node("Cast", [x], to=ir.DataType.FLOAT.value)
        mean = self._node("ReduceMean", [self._node("Mul", [wide, wide]), constant(f"{name}.axes", [-1], np.int64)])
        root = self._node("Sqrt", [self._node("Add", [mean, constant(f"{name}.epsilon", 1e-6, np.float32)])])
        normed = self._node("Cast", [self._node("Div", [wide, root])], to=self._graph.dtype.value)
        return self._node("Mul", [normed, self._graph.weight(f"{name}.weight", self._graph.random((self._hidden,), 1.0))])

    def _linear(self, x: ir.Value, name: str, k: int, n: int) -> ir.Value:
        """Sizes are in widths."""
        values = self._graph.random((k * self._hidden, n * self._hidden), (k * self._hidden) ** -0.5)
        return self._node("MatMul", [x, self._graph.weight(f"{name}.weight", values)], name=name)


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
    write_decoder(path, layers, hidden)
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
