"""Exports Llama-like Hugging Face folders to ONNX and measures the perplexity of models, float or quantized.

    python samples/llama.py export HF_FOLDER llama.onnx
    fqonnx build llama.onnx -o llama-w4a4 --calib-data calib.npz
    python samples/llama.py perplexity llama-w4a4 tokens.npz:eval
    python samples/llama.py export HF_FOLDER decoder.onnx --past
    fqonnx build decoder.onnx -o decoder-w4a4kv4 --calib-data calib.npz --kv int4
    python samples/llama.py perplexity decoder-w4a4kv4 tokens.npz:eval --chunk 128
    python samples/llama.py generate decoder-w4a4kv4 HF_FOLDER/tokenizer.json "def main("

Llama, Mistral, Qwen2, Qwen3 and others of the same parts and calling conventions work. Every export is compared with torch before the
program ends: a model that does not fit is an error, not a wrong file.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from fqonnx.errors import DataError, ModelError
from fqonnx.progress import RichProgress, Silent

sys.path.insert(0, str(Path(__file__).parent))  # `exporting` lies beside this file, wherever it is imported from
from exporting import EXTERNAL_BYTES, OPSET, export, histogram, offline, run_program

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from fqonnx.progress import Progress

    Array = npt.NDArray[Any]

TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
"""Largest difference from torch that an export may have, relative to the largest logit."""


@dataclass(frozen=True)
class Difference:
    """How far an export is from torch.

    Attributes:
        what: Which run was compared.
        largest: Largest absolute difference of the logits.
        relative: The same, divided by the largest logit.
    """

    what: str
    largest: float
    relative: float

    @classmethod
    def between(cls, what: str, reference: Array, candidate: Array) -> Difference:
        """Compare two arrays of one shape; a NaN on either side is a NaN here."""
        reference = reference.astype(np.float64)
        largest = float(np.abs(candidate.astype(np.float64) - reference).max())
        return cls(what, largest, largest / float(np.abs(reference).max()))


@dataclass(frozen=True)
class Export:
    """What became of an export.

    Attributes:
        operators: Operators of the graph and how often each occurs, on one line.
        differences: Comparisons with torch that were made.
    """

    operators: str
    differences: tuple[Difference, ...]


def export_folder(
    folder: Path, out: Path, *, past: bool = False, dtype: str = "float32", opset: int = OPSET, external_bytes: int = EXTERNAL_BYTES
) -> Export:
    """Export a causal language model and compare it with torch.

    Without ``past`` the graph takes ``input_ids [batch, sequence]`` and gives ``logits [batch, sequence, vocabulary]``; its mask is plainly
    causal, so pad on the right. With ``past`` names are those of Optimum: inputs ``input_ids``, ``attention_mask [batch, past +
    sequence]``, ``position_ids [batch, sequence]`` and ``past_key_values.N.key|value [batch, heads, past, head size]``, outputs ``logits``
    and ``present.N.key|value``.

    Args:
        folder: ``config.json`` and weights, as ``save_pretrained`` writes them.
        out: The ``.onnx`` file to write.
        past: Take and give key values.
        dtype: ``float32`` or ``float16``: of weights, activations, logits and key values.
        opset: Opset of the model.
        external_bytes: Size of all weights from which on they go to a ``.data`` file.

    Returns:
        The operators and the comparisons.

    Raises:
        ModelError: The folder holds no such model, or the export differs from torch by more than ``TOLERANCE``.
    """
    offline()
    import torch

    model = _load(folder, dtype)
    with torch.no_grad():
        module, inputs, dynamic, input_names, output_names = _with_past(model) if past else _logits_only(model)
        exported = export(module, inputs, output_names, dynamic, out, input_names=input_names, opset=opset, external_bytes=external_bytes)
        differences = _compare_past(model, out) if past else _compare(model, out)
    for difference in differences:
        if not difference.relative <= TOLERANCE[dtype]:  # a NaN fails too
            raise ModelError(
                f"{out} differs from torch by {difference.relative:.1e} of the largest logit ({difference.what}): the model's mask or head "
                f"is not that of Llama, export it with another tool"
            )
    return Export(histogram(exported), differences)


def _load(folder: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: give a folder that save_pretrained wrote")
    try:
        # Eager attention is MatMul, Add, Softmax, MatMul. Exported from scaled_dot_product_attention the same model has a fifth more
        # nodes (scales on both operands, NaN guards) and is more than four times slower in ONNX Runtime on a CPU.
        loader: Any = AutoModelForCausalLM  # untyped in part
        model = loader.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{folder} is no causal language model that transformers reads ({reason}): check its files") from None
    if not (hasattr(model, "model") and hasattr(model, "lm_head")):
        raise ModelError(f"{type(model).__name__} is not built like Llama (no `model` and `lm_head`): export it with another tool")
    return model


def _causal_masks(config: Any, keys: int, queries: int, kept: torch.Tensor | None, dtype: torch.dtype) -> Any:
    """Additive masks ``[batch or 1, 1, queries, keys]``; the queries are the last ones of the keys.

    A 4-D mask is taken by transformers as it is, which keeps its own mask making (packed sequences, GatherND) out of the graph.

    Returns:
        One mask, or a dict of them by kind of layer where a model has layers with and without a sliding window.
    """
    import torch

    key = torch.arange(keys)
    query = key[keys - queries :, None]
    visible = (key <= query)[None, None]
    if kept is not None:
        visible = visible & (kept[:, None, None, :] != 0)

    def additive(shown: torch.Tensor) -> torch.Tensor:
        # Half of the lowest number: adding a score to it cannot overflow to -inf, and rows of -inf become NaN in the Softmax.
        return torch.where(shown, 0.0, torch.finfo(dtype).min / 2).to(dtype)

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if window is None or kinds == {"full_attention"}:
        return additive(visible)
    windowed = additive(visible & (query - key < window))
    return {"full_attention": additive(visible), "sliding_attention": windowed} if len(kinds) > 1 else windowed


def _logits_only(model: Any) -> tuple[Any, ...]:
    import torch

    class LogitsOnly(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.model  # the parts, not the whole: names of weights and nodes begin with "model." as in the checkpoint
            self.lm_head = model.lm_head

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            batch, length = input_ids.shape
            hidden = self.model(
                input_ids=input_ids,
                attention_mask=_causal_masks(model.config, length, length, None, model.dtype),
                # One row of positions would do; RotaryEmbedding of opset 23 wants one for each sample.
                position_ids=torch.arange(length)[None].expand(batch, length),
                use_cache=False,
            ).last_hidden_state
            return self.lm_head(hidden)  # type: ignore[no-any-return]

    names = ["input_ids"]
    return LogitsOnly(), {"input_ids": torch.ones(2, 5, dtype=torch.int64)}, {"input_ids": {0: "batch", 1: "sequence"}}, names, ["logits"]


def _with_past(model: Any) -> tuple[Any, ...]:
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class WithPast(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.model
            self.lm_head = model.lm_head

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            position_ids: torch.Tensor,
            past_key_values: list[list[torch.Tensor]],
        ) -> tuple[torch.Tensor, ...]:
            cache, layers = DynamicCache(), []
            for keys, values in past_key_values:
                # Filled by hand: `update` of an empty layer would put a Concat with an empty tensor into the graph. Every layer keeps
                # all keys, those with a sliding window too; the mask does the rest.
                layer = DynamicLayer()  # type: ignore[no-untyped-call]
                layer.keys, layer.values = keys, values
                layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
                layers.append(layer)
            cache.layers[:] = layers
            queries = input_ids.shape[1]
            hidden = self.model(
                input_ids=input_ids,
                attention_mask=_causal_masks(model.config, past_key_values[0][0].shape[2] + queries, queries, attention_mask, model.dtype),
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            present = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
            return (self.lm_head(hidden), *present)

    batch, length, seen = 2, 5, 3
    heads, size = _key_value_shape(model.config)
    layers = model.config.num_hidden_layers
    inputs = {
        "input_ids": torch.ones(batch, length, dtype=torch.int64),
        "attention_mask": torch.ones(batch, seen + length, dtype=torch.int64),
        "position_ids": torch.arange(seen, seen + length)[None].repeat(batch, 1),
        "past_key_values": [[torch.zeros(batch, heads, seen, size, dtype=model.dtype) for _ in range(2)] for _ in range(layers)],
    }
    dynamic = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total_sequence"},
        "position_ids": {0: "batch", 1: "sequence"},
        "past_key_values": [[{0: "batch", 2: "past_sequence"} for _ in range(2)] for _ in range(layers)],
    }
    pairs = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    input_names = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{pair}" for pair in pairs)]
    return WithPast(), inputs, dynamic, input_names, ["logits", *(f"present.{pair}" for pair in pairs)]


def _key_value_shape(config: Any) -> tuple[int, int]:
    """Heads of keys and values, and the size of one."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads, size


def _compare(model: Any, path: Path) -> tuple[Difference, ...]:
    """Against torch, with sizes that the exporter has not seen."""
    import torch

    from fqonnx.engines.onnxruntime import run, session

    opened = session(path)
    differences = []
    for batch, length in ((3, 7), (1, 33)):
        ids = np.random.default_rng(length).integers(0, model.config.vocab_size, (batch, length))
        expected = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
        differences.append(Difference.between(f"{batch} x {length} tokens", expected, run(opened, {"input_ids": ids})["logits"]))
    return tuple(differences)


def _compare_past(model: Any, path: Path) -> tuple[Difference, ...]:
    """A prompt, then one token with its key values, against torch on everything at once; the second row is padded on its left."""
    import torch

    from fqonnx.engines.onnxruntime import run, session

    opened = session(path)
    length, padding = 33, 5
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, length))
    mask = np.ones((2, length), np.int64)
    mask[1, :padding] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    expected = [
        model(input_ids=torch.from_numpy(ids[row : row + 1, start:]), use_cache=False).logits[0].numpy()
        for row, start in ((0, 0), (1, padding))
    ]

    prompt = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "position_ids": positions[:, :-1], **_no_past(opened, batch=2)}
    prefill = run(opened, prompt)
    past = {name.replace("present", "past_key_values"): array for name, array in prefill.items() if name != "logits"}
    decode = run(opened, {"input_ids": ids[:, -1:], "attention_mask": mask, "position_ids": positions[:, -1:], **past})
    return (
        Difference.between("prompt", expected[0][:-1], prefill["logits"][0]),
        Difference.between("padded prompt", expected[1][:-1], prefill["logits"][1, padding:]),
        Difference.between("one token after the prompt", expected[0][-1:], decode["logits"][0]),
        Difference.between("one token after the padded prompt", expected[1][-1:], decode["logits"][1]),
    )


def _no_past(session: Any, batch: int) -> dict[str, Array]:
    """Key values of length 0 for the inputs ``past_key_values.*`` of a session, if any."""
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return {
        item.name: np.zeros((batch, item.shape[1], 0, item.shape[3]), types[item.type])
        for item in session.get_inputs()
        if item.name.startswith("past_key_values.")
    }


@dataclass(frozen=True)
class Score:
    """What a model makes of a text.

    Attributes:
        perplexity: Of all predicted tokens.
        cache_bytes: Bytes of keys and values, scales and zero points included, that one token takes; 0 without a cache.
    """

    perplexity: float
    cache_bytes: float


def score(
    model: Path, tokens: Array, *, windows: int = 64, length: int = 1024, chunk: int | None = None, progress: Progress | None = None
) -> Score:
    """Perplexity over consecutive windows of a text, each on its own: tokens ``1 .. length - 1`` are predicted from those before.

    Args:
        model: A ``.onnx`` file with an output ``logits``, or a build directory.
        tokens: Token ids of the text, 1-D.
        windows: Windows to take, from the start.
        length: Tokens of a window.
        chunk: Tokens of one run: the following ones read the keys and values of those before from the cache. None takes a window at once.
        progress: Where to tell how far it is.

    Raises:
        DataError: There are too few tokens, one is outside the vocabulary, or the model has no cache and ``chunk`` asks for one.
        ModelError: It is no language model.
        EngineError: ONNX Runtime cannot load or run it.
    """
    from fqonnx.decoding import Decoder
    from fqonnx.metrics import Perplexity

    if len(tokens) < windows * length:
        raise DataError(f"{len(tokens)} tokens are too few for {windows} windows of {length}: lower --windows or --length")
    decoder, measure, cached = Decoder(model), Perplexity(), 0.0
    with (progress or Silent()).task("Perplexity", windows) as task:
        for window in tokens[: windows * length].reshape(windows, 1, length).astype(np.int64):
            decoder.reset()
            for start in range(0, length, chunk or length):
                part = window[:, start : start + (chunk or length)]
                targets = window[:, start + 1 : start + 1 + part.shape[1]]
                measure.score(decoder(part)[:, : targets.shape[1]], targets)
            cached = decoder.cache_bytes / length
            task.advance()
    return Score(measure.value, cached)


def perplexity(model: Path, tokens: Array, *, windows: int = 64, length: int = 1024, progress: Progress | None = None) -> float:
    """The perplexity of ``score``, a window at once."""
    return score(model, tokens, windows=windows, length=length, progress=progress).perplexity


def read_tokens(spec: str) -> Array:
    """Token ids from ``FILE.npy``, or from ``FILE.npz:KEY`` (the key may be left out where there is one array).

    Raises:
        DataError: There is no such file or key, or it holds no 1-D integers.
    """
    name, _, key = spec.rpartition(".npz:")
    path = Path(f"{name}.npz") if name else Path(spec)
    if not path.is_file():
        raise DataError(f"no such file: {path}: give token ids as .npy or .npz:KEY")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            tokens = loaded
        else:
            with loaded:
                keys = list(loaded)
                wanted = key if name else keys[0] if len(keys) == 1 else None
                if wanted not in keys:
                    raise DataError(f"{path} holds {', '.join(keys) or 'nothing'}: name one, as in {path}:{keys[0] if keys else 'KEY'}")
                tokens = loaded[wanted]
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a numpy file of plain arrays ({' '.join(str(error).split())}): write it with np.save") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(f"{spec} holds {tokens.dtype} of shape {list(tokens.shape)}: give one row of integer token ids")
    return tokens


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def program() -> None:
    """Llama-like Hugging Face models: export to ONNX, perplexity of what came of it."""


@program.command("export")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--past", is_flag=True, help="Take past key values and give present ones.")
@click.option("--dtype", type=click.Choice(list(TOLERANCE)), default="float32", show_default=True, help="Type of weights and activations.")
@click.option("--opset", type=click.IntRange(18, 24), default=OPSET, show_default=True, help="Opset of the model.")
def export_command(folder: Path, out: Path, past: bool, dtype: str, opset: int) -> None:
    """Export the Hugging Face FOLDER to the file OUT and compare it with torch."""
    result = export_folder(folder, out, past=past, dtype=dtype, opset=opset)
    click.echo(f"wrote {out}: {result.operators}")
    for difference in result.differences:
        click.echo(
            f"{difference.what}: largest difference from torch {difference.largest:.2e}, {difference.relative:.1e} of the largest logit"
        )


@program.command("perplexity")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("tokens")
@click.option("--windows", type=click.IntRange(min=1), default=64, show_default=True, help="Windows to take from the start.")
@click.option("--length", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens of a window.")
@click.option("--chunk", type=click.IntRange(min=1), help="Tokens of one run, the rest read from the cache.  [default: a window]")
def perplexity_command(model: Path, tokens: str, windows: int, length: int, chunk: int | None) -> None:
    """Perplexity of MODEL (a .onnx file or a build directory) over TOKENS (FILE.npy or FILE.npz:KEY), through ONNX Runtime."""
    found = score(model, read_tokens(tokens), windows=windows, length=length, chunk=chunk, progress=RichProgress())
    click.echo(f"perplexity {found.perplexity:.3f}" + (f", cache {found.cache_bytes:.0f} bytes a token" if found.cache_bytes else ""))


@program.command("generate")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("tokenizer", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--tokens", "count", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens to add.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the draws.")
def generate_command(model: Path, tokenizer: Path, prompt: str, count: int, temperature: float, seed: int) -> None:
    """Continue PROMPT with MODEL, exported with --past (a .onnx file or a build directory), by the TOKENIZER file (tokenizer.json)."""
    from tokenizers import Tokenizer

    from fqonnx.decoding import Decoder, generate

    if not tokenizer.is_file():
        raise DataError(f"no such file: {tokenizer}: give the model's tokenizer.json")
    coder = Tokenizer.from_file(str(tokenizer))
    ids = np.array([coder.encode(prompt).ids], np.int64)
    decoder = Decoder(model)
    started = time.perf_counter()
    added = generate(decoder, ids, count, temperature=temperature, seed=seed)
    seconds = time.perf_counter() - started
    click.echo(coder.decode([*ids[0].tolist(), *added[0].tolist()]))
    click.echo(f"{added.shape[1] / seconds:.1f} tokens a second, cache {decoder.cache_bytes} bytes", err=True)


def main() -> None:
    """Run the program."""
    run_program(program)


if __name__ == "__main__":
    main()
