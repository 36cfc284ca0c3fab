"""Llama-shaped decoder stacks of random weights: what a speed test of W4A4 against fp16 needs, without downloading a model.

    python samples/decoder.py export decoder.onnx --shape llama-2-7b
    python samples/decoder.py bench --shape llama-2-7b --shape llama-3-8b

`bench` exports, builds W4A4 for the GPU it finds, and measures both models with `fqonnx bench`: a prompt of 2,048 tokens, and one token
each for 1, 16 and 64 sequences that have 512 tokens behind them.

There is no embedding and no vocabulary projection: the graph takes hidden states and keys and values of earlier tokens, and gives the
same of the next ones. It is written as ONNX Runtime's users deploy decoders (ONNX Runtime GenAI's form: GroupQueryAttention with its
rotary embedding, one product for q, k and v, norms with the residual's sum), which is the fastest fp16 baseline that runtime has, or with
`--operators standard` as an exporter of standard operators writes it.

Built for compute capability 9.0 or later, GroupQueryAttention becomes the op of the same name in domain `fqonnx`: single tokens attend in
a kernel of this library, prompts in ONNX Runtime's, in the baseline both. Profiles show the two under one name. `--kv int8` builds W4A4
with an int8 cache; the baseline's stays fp16.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import click
import numpy as np
import onnx_ir as ir
from rich import box
from rich.console import Console
from rich.table import Table

from fqonnx.bench import BASELINE, CANDIDATE, ShapeResult, bench
from fqonnx.bench_tables import print_bench
from fqonnx.errors import EngineError, UsageError

sys.path.insert(0, str(Path(__file__).parent))  # `graphs` and `exporting` lie beside this file, wherever it is imported from
from exporting import run_program
from graphs import GraphWriter, declared

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    import numpy.typing as npt

    Array = npt.NDArray[Any]

CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        hidden: Width of the residual stream.
        heads: Heads of queries; a head is ``hidden // heads`` wide.
        kv_heads: Heads of keys and values, a divisor of ``heads``.
        intermediate: Width of the gated MLP.
        theta: Base of the rotary angles.
        layers: Layers of the stack.
        positions: Rows of the rotary tables: the longest sequence.
    """

    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    theta: float = 10_000.0
    layers: int = 4
    positions: int = 4096

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads


SHAPES = {
    "llama-2-7b": Shape(hidden=4096, heads=32, kv_heads=32, intermediate=11008),
    "llama-3-8b": Shape(hidden=4096, heads=32, kv_heads=8, intermediate=14336, theta=500_000.0),
}

EPSILON = 1e-5
WEIGHT_STD = 0.02
"""Llama's weights are initialised with it and stay near it."""


FAST_BUILD = ("--transform", "hadamard", "--weights", "rtn", "--random-calibration", "--calib-samples", "2")
"""A build without data: its graph, sizes and kernels are those of a learned one, only the values of factors and codes differ."""


@dataclass(frozen=True)
class Workload:
    """One case of the speed test.

    Attributes:
        batch: Sequences.
        sequence: Tokens that each takes in.
        past: Tokens behind them.
        cache: Tokens that the buffers of keys and values hold.
        target: How many times faster than fp16 W4A4 should be.
    """

    batch: int
    sequence: int
    past: int
    cache: int
    target: float

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """By dimension, as ``fqonnx.bench`` takes it."""
        return {"batch": (self.batch,), "sequence": (self.sequence,), "past_sequence": (self.past,)}


WORKLOADS = (
    Workload(batch=1, sequence=2048, past=0, cache=4096, target=1.6),
    *(Workload(batch=batch, sequence=1, past=512, cache=1024, target=1.8) for batch in (1, 16, 64)),
)


def export(path: Path, shape: Shape, *, operators: str = "onnxruntime", dtype: ir.DataType = ir.DataType.FLOAT16, seed: int = 0) -> None:
    """Write a decoder stack; its weights go to ``path`` + ``.data``.

    Inputs are ``hidden_states [batch, sequence, hidden]``, ``attention_mask [batch, past_sequence + sequence]`` (int64) and
    ``past_key_values.N.key|value [batch, kv_heads, past_sequence, head]``; outputs ``last_hidden_state``, the normed hidden states, and
    ``present.N.key|value``. Padding belongs behind a sequence's tokens.

    Args:
        path: The ``.onnx`` file.
        shape: Sizes.
        operators: ``onnxruntime`` for that runtime's own attention and norms, ``standard`` for ONNX operators alone (opset 21).
        dtype: Type of weights, activations, keys and values.
        seed: Seed of the weights; the same weights come out for both kinds of operators.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with GraphWriter(path, dtype, seed) as graph:
        _FORMS[operators](graph, shape).write()


class _Stack:
    """What both forms share: the interface, the order of layers and of weights."""

    opsets: ClassVar[dict[str, int]] = {"": 21}

    def __init__(self, graph: GraphWriter, shape: Shape) -> None:
        self.graph, self.shape = graph, shape
        self.hidden_states = declared("hidden_states", graph.dtype, ["batch", "sequence", shape.hidden])
        self.mask = declared("attention_mask", ir.DataType.INT64, ["batch", "past_sequence + sequence"])
        self.past = [
            declared(f"past_key_values.{layer}.{part}", graph.dtype, ["batch", shape.kv_heads, "past_sequence", shape.head])
            for layer in range(shape.layers)
            for part in ("key", "value")
        ]
        angles = np.outer(np.arange(shape.positions), shape.theta ** (-np.arange(0, shape.head, 2) / shape.head))
        self.cos = graph.constant("cos_cache", np.cos(angles))
        self.sin = graph.constant("sin_cache", np.sin(angles))

    def write(self) -> None:
        graph, shape = self.graph, self.shape
        self.prepare()
        x: ir.Value = self.hidden_states
        delta: ir.Value | None = None
        outputs: list[ir.Value] = []
        for layer in range(shape.layers):
            name = f"/model/layers.{layer}"
            normed, x = self.norm(x, delta, f"{name}/input_layernorm")
            qkv = [graph.random((shape.hidden, heads * shape.head), WEIGHT_STD) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
            attended, key, value = self.attention(normed, qkv, layer, f"{name}/attn")
            for part, present in (("key", key), ("value", value)):
                dims = ["batch", shape.kv_heads, "past_sequence + sequence", shape.head]
                outputs.append(declared(f"present.{layer}.{part}", graph.dtype, dims, present))
            delta = self.linear(attended, f"{name}/attn/o_proj", shape.hidden, shape.hidden)
            normed, x = self.norm(x, delta, f"{name}/post_attention_layernorm")
            gate, up = (self.linear(normed, f"{name}/mlp/{part}_proj", shape.hidden, shape.intermediate) for part in ("gate", "up"))
            silu = graph.node("Mul", [gate, graph.node("Sigmoid", [gate], name=f"{name}/mlp/act/Sigmoid")], name=f"{name}/mlp/act/Mul")
            gated = graph.node("Mul", [silu, up], name=f"{name}/mlp/Mul")
            delta = self.linear(gated, f"{name}/mlp/down_proj", shape.intermediate, shape.hidden)
        last, _ = self.norm(x, delta, "/model/norm")
        outputs.insert(0, declared("last_hidden_state", graph.dtype, ["batch", "sequence", shape.hidden], last))
        graph.save([self.hidden_states, self.mask, *self.past], outputs, name="decoder", opsets=self.opsets)

    def linear(self, x: ir.Value, name: str, k: int, n: int) -> ir.Value:
        return self.product(x, name, self.graph.random((k, n), WEIGHT_STD))

    def product(self, x: ir.Value, name: str, weight: Array) -> ir.Value:
        return self.graph.node("MatMul", [x, self.graph.weight(f"{name}.weight", weight)], name=f"{name}/MatMul")

    def gain(self, name: str) -> ir.Value:
        return self.graph.weight(f"{name}.weight", self.graph.random((self.shape.hidden,), 0.1, mean=1.0))

    def plain_norm(self, x: ir.Value, name: str) -> ir.Value:
        graph = self.graph
        wide = graph.node("Cast", [x], to=ir.DataType.FLOAT.value)
        square = graph.node("Pow", [wide, graph.constant(f"{name}.two", 2.0, np.float32)])
        mean = graph.node("ReduceMean", [square, graph.constant(f"{name}.axes", [-1], np.int64)])
        root = graph.node("Sqrt", [graph.node("Add", [mean, graph.constant(f"{name}.epsilon", EPSILON, np.float32)])])
        normed = graph.node("Cast", [graph.node("Div", [wide, root])], to=graph.dtype.value)
        return graph.node("Mul", [normed, self.gain(name)], name=f"{name}/Mul")

    def prepare(self) -> None:
        raise NotImplementedError

    def norm(self, x: ir.Value, delta: ir.Value | None, name: str) -> tuple[ir.Value, ir.Value]:
        """The norm of ``x + delta``, and this sum."""
        raise NotImplementedError

    def attention(self, x: ir.Value, qkv: Sequence[Array], layer: int, name: str) -> tuple[ir.Value, ir.Value, ir.Value]:
        """What attention gives for ``x`` (before o_proj), and all keys and values."""
        raise NotImplementedError


class _OnnxRuntime(_Stack):
    """As ONNX Runtime GenAI's model builder writes decoders for CUDA."""

    opsets: ClassVar[dict[str, int]] = {"": 21, CONTRIB: 1}

    def prepare(self) -> None:
        graph, as_int32 = self.graph, ir.DataType.INT32.value
        axis, one = graph.constant("axis_1", [1], np.int64), graph.constant("one", 1, np.int64)
        tokens = graph.node("ReduceSum", [self.mask, axis], keepdims=0)
        self.last_index = graph.node("Cast", [graph.node("Sub", [tokens, one])], to=as_int32)
        self.total = graph.node("Cast", [graph.node("Gather", [graph.node("Shape", [self.mask]), one])], to=as_int32)

    def norm(self, x: ir.Value, delta: ir.Value | None, name: str) -> tuple[ir.Value, ir.Value]:
        if delta is None:
            return self.plain_norm(x, name), x
        normed, mean, deviation, total = self.graph.nodes(
            "SkipSimplifiedLayerNormalization",
            [x, delta, self.gain(name)],
            4,
            domain=CONTRIB,
            name=f"{name}/SkipLayerNorm",
            epsilon=EPSILON,
        )
        for unused in (mean, deviation):
            unused.name = ""
        return normed, total

    def attention(self, x: ir.Value, qkv: Sequence[Array], layer: int, name: str) -> tuple[ir.Value, ir.Value, ir.Value]:
        shape = self.shape
        packed = self.product(x, f"{name}/qkv_proj", np.concatenate(qkv, axis=1))
        attended, key, value = self.graph.nodes(
            "GroupQueryAttention",
            [packed, None, None, *self.past[2 * layer : 2 * layer + 2], self.last_index, self.total, self.cos, self.sin],
            3,
            domain=CONTRIB,
            name=f"{name}/GroupQueryAttention",
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            scale=shape.head**-0.5,
            do_rotary=1,
            rotary_interleaved=0,
        )
        return attended, key, value


class _Standard(_Stack):
    """As exporters write the eager form of attention in standard operators."""

    def prepare(self) -> None:
        graph = self.graph
        zero, one = graph.constant("zero", 0, np.int64), graph.constant("one", 1, np.int64)
        total = graph.node("Gather", [graph.node("Shape", [self.mask]), one])
        past = graph.node("Sub", [total, graph.node("Gather", [graph.node("Shape", [self.hidden_states]), one])])
        positions = graph.node("Range", [past, total, one])
        self.tables = [graph.node("Gather", [table, positions]) for table in (self.cos, self.sin)]
        causal = graph.node(
            "LessOrEqual",
            [graph.node("Range", [zero, total, one]), graph.node("Unsqueeze", [positions, graph.constant("axis", [1], np.int64)])],
        )
        kept = graph.node(
            "Unsqueeze", [graph.node("Cast", [self.mask], to=ir.DataType.BOOL.value), graph.constant("axes", [1, 2], np.int64)]
        )
        lowest = np.finfo(np.float16).min / 2
        self.added = graph.node(
            "Where", [graph.node("And", [causal, kept]), graph.constant("shown", 0.0), graph.constant("hidden", lowest)]
        )

    def norm(self, x: ir.Value, delta: ir.Value | None, name: str) -> tuple[ir.Value, ir.Value]:
        graph = self.graph
        if delta is not None:
            x = graph.node("Add", [x, delta], name=f"{name}/residual/Add")
        return self.plain_norm(x, name), x

    def attention(self, x: ir.Value, qkv: Sequence[Array], layer: int, name: str) -> tuple[ir.Value, ir.Value, ir.Value]:
        graph, shape = self.graph, self.shape
        past_key, past_value = self.past[2 * layer : 2 * layer + 2]
        projected = []
        for part, weight in zip("qkv", qkv, strict=True):
            y = self.product(x, f"{name}/{part}_proj", weight)
            heads = graph.constant(f"{name}.{part}_shape", [0, 0, -1, shape.head], np.int64)
            projected.append(graph.node("Transpose", [graph.node("Reshape", [y, heads])], perm=[0, 2, 1, 3]))
        q, k, v = projected
        key = graph.node("Concat", [past_key, self.rotated(k, f"{name}.k")], axis=2)
        value = graph.node("Concat", [past_value, v], axis=2)
        q = graph.node("Mul", [self.rotated(q, f"{name}.q"), graph.constant(f"{name}.scale", shape.head**-0.5)])
        scores = graph.node("MatMul", [q, graph.node("Transpose", [self.repeated(key, f"{name}.key")], perm=[0, 1, 3, 2])])
        weights = graph.node("Softmax", [graph.node("Add", [scores, self.added])], axis=-1)
        attended = graph.node("Transpose", [graph.node("MatMul", [weights, self.repeated(value, f"{name}.value")])], perm=[0, 2, 1, 3])
        return graph.node("Reshape", [attended, graph.constant(f"{name}.merged", [0, 0, shape.hidden], np.int64)]), key, value

    def rotated(self, x: ir.Value, name: str) -> ir.Value:
        graph = self.graph
        low, high = graph.nodes("Split", [x], 2, name=f"{name}.halves", axis=-1, num_outputs=2)
        cos, sin = self.tables
        turned = [
            graph.node("Sub", [graph.node("Mul", [low, cos]), graph.node("Mul", [high, sin])]),
            graph.node("Add", [graph.node("Mul", [high, cos]), graph.node("Mul", [low, sin])]),
        ]
        return graph.node("Concat", turned, axis=-1)

    def repeated(self, x: ir.Value, name: str) -> ir.Value:
        """Each head of keys or values as often as heads of queries share it."""
        graph, shape = self.graph, self.shape
        times = shape.heads // shape.kv_heads
        if times == 1:
            return x
        column = graph.node("Unsqueeze", [x, graph.constant(f"{name}.axis", [2], np.int64)])
        wide = graph.node("Expand", [column, graph.constant(f"{name}.times", [1, 1, times, 1, 1], np.int64)])
        return graph.node("Reshape", [wide, graph.constant(f"{name}.heads", [0, shape.heads, -1, shape.head], np.int64)])


_FORMS = {"onnxruntime": _OnnxRuntime, "standard": _Standard}


@dataclass(frozen=True)
class Case:
    """A measured workload.

    Attributes:
        shape: A key of ``SHAPES``.
        workload: What was run.
        result: Both models' times.
    """

    shape: str
    workload: Workload
    result: ShapeResult

    @property
    def met(self) -> bool:
        """Whether W4A4 is as much faster as it should be."""
        assert self.result.speedup is not None, "measured beside its baseline"
        return self.result.speedup >= self.workload.target


def build(model: Path, out: Path, target: str | None, choices: Sequence[str] = FAST_BUILD) -> float:
    """Build a model W4A4 through the command line; returns the seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "fqonnx.cli.main", "build", str(model), "-o", str(out), "--force", "--quiet", *choices]
    done = subprocess.run([*command, *(["--target", target] if target else [])], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return time.perf_counter() - start


def gpu_target() -> str:
    """The compute capability of this machine's GPU, as ``--target`` takes it.

    Raises:
        EngineError: There is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise EngineError("no CUDA device here: give --device cpu, for a trial of small sizes")
    return "sm{}{}".format(*torch.cuda.get_device_capability())


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def program() -> None:
    """Llama-shaped decoder stacks of random weights, for speed tests."""


_layers_option = click.option("--layers", type=click.IntRange(min=1), default=4, show_default=True)
_operators_option = click.option(
    "--operators", type=click.Choice(list(_FORMS)), default="onnxruntime", show_default=True, help="Whose attention and norms."
)


@program.command("export")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="llama-2-7b", show_default=True)
@_layers_option
@_operators_option
def export_command(path: Path, shape: str, layers: int, operators: str) -> None:
    """Write a decoder stack to PATH."""
    export(path, replace(SHAPES[shape], layers=layers), operators=operators)


@program.command("bench")
@click.option("--shape", "shapes", type=click.Choice(list(SHAPES)), multiple=True, help="May be repeated.  [default: all]")
@_layers_option
@_operators_option
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("out/decoder"), show_default=True, help="Folder for models and results."
)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--duration", type=float, default=1.0, show_default=True, help="Seconds for each model and workload.")
@click.option("--profile/--no-profile", default=True, show_default=True, help="Show where the time goes.")
@click.option(
    "--kv", type=click.Choice(["none", "int8"]), default="none", show_default=True, help="How the W4A4 model stores keys and values."
)
def bench_command(
    shapes: tuple[str, ...], layers: int, operators: str, out: Path, device: str, duration: float, profile: bool, kv: str
) -> None:
    """Export, build W4A4 and measure against fp16; the last table compares with the targets."""
    if kv != "none" and operators == "standard":
        raise UsageError(f"--kv {kv} is measured with ONNX Runtime's attention alone: leave out --kv, or --operators standard")
    console = Console()
    target = gpu_target() if device == "cuda" else None
    cases = []
    for shape in shapes or SHAPES:
        model, built = out / shape / "model.onnx", out / shape / "w4a4"
        start = time.perf_counter()
        export(model, replace(SHAPES[shape], layers=layers), operators=operators)
        exported = time.perf_counter() - start
        seconds = build(model, built, target, (*FAST_BUILD, "--kv", kv))
        console.print(f"[bold]{shape}[/bold], {layers} layers: exported in {exported:.0f} s, built in {seconds:.0f} s")
        cases += measure(
            shape, built, model, WORKLOADS, device=device, duration=duration, profile=profile, in_place=operators != "standard"
        )
    console.print(summary(cases, kv=kv))


def measure(
    shape: str,
    built: Path,
    model: Path,
    workloads: Sequence[Workload],
    *,
    device: str,
    duration: float,
    profile: bool,
    in_place: bool,
    console: Console | None = None,
) -> list[Case]:
    """Measure a build against its float model, print the tables and write ``bench-*.json`` beside the build.

    Args:
        shape: What the cases are called by.
        built: The build directory.
        model: The float model.
        workloads: What to run.
        device: ``cuda`` or ``cpu``.
        duration: Seconds for each model and workload.
        profile: Whether to measure where the time goes.
        in_place: Past and present keys and values share buffers, as decoders are deployed; the standard operators cannot.
        console: Where to print; None is standard output.
    """
    cases = []
    for cache in sorted({workload.cache for workload in workloads}):
        chosen = [workload for workload in workloads if workload.cache == cache]
        kv_cache = cache if in_place else None
        sets = [workload.sizes for workload in chosen]
        result = bench(built, model, shapes=sets, device=device, duration=duration, kv_cache=kv_cache, profile=profile)
        (built.parent / f"bench-{cache}.json").write_text(json.dumps(result.to_dict(), indent=2), encoding="utf-8")
        print_bench(result, console or Console())
        cases += [Case(shape, workload, measured) for workload, measured in zip(chosen, result.shapes, strict=True)]
    return cases


def summary(cases: Sequence[Case], *, kv: str = "none") -> Table:
    """Every case in a line, with its target; ``kv`` is how the W4A4 model stores keys and values."""
    cache = "fp16 in both" if kv == "none" else f"{kv} in W4A4, fp16 in fp16"
    table = Table(title=f"W4A4 against fp16, medians; cache of keys and values {cache}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("decoder")
    for head in ("batch x tokens, past", "fp16 ms", "W4A4 ms", "speed-up", "target"):
        table.add_column(head, justify="right")
    table.add_column("")
    for case in cases:
        work, latency = case.workload, case.result.latency
        row = [case.shape, f"{work.batch} x {work.sequence}, {work.past}"]
        row += [f"{latency[role].median:.3f}" for role in (BASELINE, CANDIDATE)]
        row += [f"{case.result.speedup:.2f}", f"{work.target:.1f}", "met" if case.met else "not met"]
        table.add_row(*row)
    return table


if __name__ == "__main__":
    run_program(program)
