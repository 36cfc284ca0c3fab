"""Running a decoder on ONNX Runtime token by token, or some tokens at a time, with its cache of keys and values, float or quantized."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fqonnx.engines.onnxruntime import run, session
from fqonnx.errors import DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Array = npt.NDArray[Any]

_METADATA = "fqonnx.kv_cache"
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8}


class Decoder:
    """A language model with inputs ``input_ids``, ``attention_mask``, ``position_ids`` (those it has) and past keys and values.

    It keeps the cache between calls: what ``present`` outputs give is fed to the ``past`` inputs as it is, whatever its type. A model
    without a cache takes one call after each ``reset``.

    Args:
        model: The ``.onnx`` file, or a build directory.
        device: ``cpu`` or ``cuda``.
        threads: Threads within an operator; None is one per CPU.

    Raises:
        ModelError: There is no such file, or it is no such model.
        EngineError: ONNX Runtime cannot load it.
    """

    def __init__(self, model: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        path = model / "model.onnx" if model.is_dir() else model
        if not path.is_file():
            raise ModelError(f"no such file: {path}: give a .onnx file or a build directory")
        self._session = session(path, device=device, threads=threads)
        inputs = {item.name: item for item in self._session.get_inputs()}
        outputs = {item.name: item for item in self._session.get_outputs()}
        if "input_ids" not in inputs or "logits" not in outputs:
            raise ModelError(f"{path} is no language model with input_ids and logits: export one with `samples/llama.py export`")
        vocabulary = outputs["logits"].shape[-1]
        self.vocabulary: int | None = vocabulary if isinstance(vocabulary, int) else None
        self._named = [name for name in ("attention_mask", "position_ids") if name in inputs]
        self._pairs = _pairs(self._session, list(inputs), list(outputs), path)
        self._empty = {past: _empty(inputs[past], path) for past in self._pairs}
        if unknown := sorted(set(inputs) - {"input_ids", *self._named} - set(self._pairs)):
            raise ModelError(f"{path} asks for {unknown[0]!r}, which a decoder of text does not: feed it by hand")
        self._cache: dict[str, Array] = {}
        self.tokens = 0

    @property
    def has_cache(self) -> bool:
        """Whether the model takes past keys and values."""
        return bool(self._pairs)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, scales and zero points included."""
        return sum(array.nbytes for array in self._cache.values())

    def reset(self) -> None:
        """Forget all tokens."""
        self._cache, self.tokens = {}, 0

    def __call__(self, ids: Array) -> Array:
        """Take in more tokens of every sequence.

        Args:
            ids: ``[batch, tokens]`` integers, the same batch in every call until ``reset``.

        Returns:
            Logits ``[batch, tokens, vocabulary]`` of the tokens that come after each of them.

        Raises:
            DataError: The model has no cache and was called before, a token is outside the vocabulary, or the batch has changed.
            EngineError: ONNX Runtime fails.
        """
        if self.tokens and not self.has_cache:
            raise DataError("the model has no cache of past keys and values: give all tokens at once, or export it with --past")
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
            raise DataError(f"{ids.dtype} tokens of shape {list(ids.shape)}: give integers [batch, tokens]")
        if self.vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            raise DataError(f"token {int(ids.max())} is outside the vocabulary of {self.vocabulary}: these are not tokens of this model")
        batch, count = ids.shape
        held = next((len(array) for array in self._cache.values()), batch)
        if held != batch:
            raise DataError(f"{batch} sequences after {held}: call reset() before another batch")
        cache = self._cache or {name: np.zeros((batch, *shape), dtype) for name, (shape, dtype) in self._empty.items()}
        total = self.tokens + count
        shared = {
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": np.broadcast_to(np.arange(self.tokens, total), (batch, count)).copy(),
        }
        feeds = {"input_ids": ids.astype(np.int64), **{name: shared[name] for name in self._named}, **cache}
        results = run(self._session, feeds, ["logits", *self._pairs.values()])
        self._cache = {past: results[present] for past, present in self._pairs.items()}
        self.tokens = total
        return results["logits"]


def _pairs(opened: Any, inputs: Sequence[str], outputs: Sequence[str], path: Path) -> dict[str, str]:
    """By input of the cache the output that becomes it in the next run."""
    stored = opened.get_modelmeta().custom_metadata_map.get(_METADATA)
    if stored is None:
        pairs = {
            name: name.replace("past_key_values", "present").replace("past_", "present_") for name in inputs if name.startswith("past")
        }
    else:
        caches = json.loads(stored)["caches"]
        suffixes = ("", ".scale", ".zero_point")
        pairs = {c["past"] + suffix: c["present"] + suffix for c in caches for suffix in suffixes if c["past"] + suffix in inputs}
    if lost := [present for present in pairs.values() if present not in outputs]:
        raise ModelError(
            f"{path} takes past keys and values and has no output {lost[0]!r}: export it with `samples/llama.py export --past`"
        )
    return pairs


def _empty(item: Any, path: Path) -> tuple[tuple[int, ...], Any]:
    """Shape of no tokens without the batch, and type, of a cache ``[batch, heads, tokens, size]``."""
    fits = len(item.shape) == 4 and isinstance(item.shape[1], int) and isinstance(item.shape[3], int)
    if not fits or item.type not in _TYPES:
        raise ModelError(f"{path}: {item.name!r} is {item.type} {item.shape}, not [batch, heads, tokens, size] of a known type")
    return (item.shape[1], 0, item.shape[3]), _TYPES[item.type]


def generate(decoder: Decoder, prompt: Array, count: int, *, temperature: float = 0.0, seed: int = 0, stop: int | None = None) -> Array:
    """Continue prompts token by token.

    Args:
        decoder: It is reset first.
        prompt: ``[batch, tokens]`` integers, without padding.
        count: Tokens to add.
        temperature: 0 takes the most likely token; above, tokens are drawn from ``softmax(logits / temperature)``.
        seed: Seed of the draws.
        stop: Ends a text; once every sequence has met it, fewer tokens are added.

    Returns:
        The new tokens, ``[batch, at most count]``.

    Raises:
        DataError: The model has no cache, or the prompt is malformed.
        EngineError: ONNX Runtime fails.
    """
    if not decoder.has_cache:
        raise DataError("the model has no cache of past keys and values: export it with --past")
    random = np.random.default_rng(seed)
    decoder.reset()
    tokens: list[Array] = []
    logits = decoder(prompt)[:, -1].astype(np.float64)
    ended = np.zeros(len(prompt), bool)
    for step in range(count):
        if temperature > 0:
            # The largest of logits / T plus Gumbel noise is a draw from their softmax.
            logits = logits / temperature + random.gumbel(size=logits.shape)
        chosen = logits.argmax(-1)[:, None]
        tokens.append(chosen)
        ended |= chosen[:, 0] == stop
        if step + 1 == count or ended.all():
            break
        logits = decoder(chosen)[:, -1].astype(np.float64)
    return np.concatenate(tokens, axis=1) if tokens else prompt[:, :0]
