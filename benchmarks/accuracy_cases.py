"""The two models that accuracy is measured on: what calibrates them, and what scores a build of them.

A subject is a folder that can be copied to another machine: the float model as ``model.onnx`` and its data as plain arrays, so that neither
transformers nor a tokenizer is needed where it is measured.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fqonnx.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

SAMPLES = Path(__file__).parents[1] / "samples"
MODEL = "model.onnx"
CALIBRATION_WINDOWS, WINDOWS, LENGTH = 128, 64, 1024
"""Windows of the Llama's calibration text and of the text that is scored, and tokens of each."""


class Subject(Protocol):
    """A float model with its data, in a folder."""

    name: str
    figure: str
    """What is measured, the first of ``score``'s keys."""

    @property
    def folder(self) -> Path:
        """Where it is."""
        ...

    @property
    def calibration(self) -> str:
        """What ``--calib-data`` takes."""
        ...

    @property
    def samples(self) -> int:
        """Samples of it."""
        ...

    def score(self, model: Path) -> dict[str, float]:
        """Figures of a model, by name, in ONNX Runtime on the CPU."""
        ...


@dataclass(frozen=True)
class Llama:
    """A causal language model: perplexity of windows of a text, each on its own."""

    folder: Path
    name = "llama"
    figure = "perplexity"

    @property
    def calibration(self) -> str:
        """Windows as rows."""
        return str(self.folder / "calibration.npz")

    @property
    def samples(self) -> int:
        """All of them."""
        return CALIBRATION_WINDOWS

    def prepare(self, source: Path, tokens: Path | None) -> None:
        """Fill the folder, where it is not filled.

        Args:
            source: A folder that ``save_pretrained`` wrote, which is exported, or an ``.onnx`` file with ``input_ids`` and ``logits``.
            tokens: An ``.npz`` with ``calib`` and ``open``, token ids; None takes ``tokens.npz`` in the folder.

        Raises:
            DataError: There are no tokens, or too few.
            ModelError: The folder holds no such model.
        """
        if (self.folder / "text.npy").is_file():
            return
        path = tokens or source / "tokens.npz"
        sample = load_sample("llama")
        calibration, text = (sample.read_tokens(f"{path}:{key}") for key in ("calib", "open"))
        if len(calibration) < CALIBRATION_WINDOWS * LENGTH or len(text) < WINDOWS * LENGTH:
            raise DataError(f"{path} holds fewer than {CALIBRATION_WINDOWS} and {WINDOWS} windows of {LENGTH} tokens: give longer texts")
        self.folder.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            sample.export_folder(source, self.folder / MODEL)
        else:
            copy_model(source, self.folder / MODEL)
        windows = calibration[: CALIBRATION_WINDOWS * LENGTH].reshape(CALIBRATION_WINDOWS, LENGTH)
        np.savez(self.folder / "calibration.npz", input_ids=windows.astype(np.int64))
        np.save(self.folder / "text.npy", text[: WINDOWS * LENGTH])

    def score(self, model: Path) -> dict[str, float]:
        """Perplexity."""
        found = load_sample("llama").perplexity(model, np.load(self.folder / "text.npy"), windows=WINDOWS, length=LENGTH)
        return {self.figure: float(found)}


@dataclass(frozen=True)
class MiniLM:
    """The encoder of ``samples/minilm.py``: cosines of sentence embeddings to those of the float model."""

    folder: Path
    name = "minilm"
    figure = "mean cosine"

    @property
    def calibration(self) -> str:
        """A file for each feed."""
        return str(self.folder / "calibration")

    @property
    def samples(self) -> int:
        """All of them."""
        return sum(1 for _ in (self.folder / "calibration").glob("*.npz"))

    def prepare(self) -> None:
        """Fill the folder, where it is not filled.

        Raises:
            ModelError: The package with the weights is not installed.
        """
        if (self.folder / "evaluation").is_dir():
            return
        sample = load_sample("minilm")
        self.folder.mkdir(parents=True, exist_ok=True)
        source = sample.model_folder()
        sample.export_encoder(source, self.folder / MODEL)
        sentences = sample.calibration_sentences(), sample.read_sentences(sample.DATA / "sentences_evaluation.txt")
        calibration, evaluation = (sample.tokenize(source / "tokenizer.json", part) for part in sentences)
        sample.write_feeds(sample.stack(calibration), self.folder / "calibration")
        sample.write_feeds(evaluation, self.folder / "evaluation")

    def score(self, model: Path) -> dict[str, float]:
        """Mean and lowest cosine over the sentences that calibration does not see."""
        sample = load_sample("minilm")
        feeds = [dict(np.load(path)) for path in sorted((self.folder / "evaluation").glob("*.npz"))]
        found = sample.cosines(sample.embed(self.folder / MODEL, feeds), sample.embed(model, feeds))
        return {self.figure: float(found.mean()), "lowest": float(found.min())}


SUBJECTS: dict[str, type[Llama | MiniLM]] = {"llama": Llama, "minilm": MiniLM}
"""By name."""


def load_sample(name: str) -> Any:
    """A module of ``samples/``, which lie outside of any package."""
    if str(SAMPLES) not in sys.path:
        sys.path.insert(0, str(SAMPLES))
    return importlib.import_module(name)


def copy_model(source: Path, target: Path) -> None:
    """Copy an ``.onnx`` file, with the data beside it.

    Raises:
        DataError: There is no such file.
    """
    if not source.is_file():
        raise DataError(f"no such file or folder: {source}: give an .onnx file or a folder that save_pretrained wrote")
    shutil.copyfile(source, target)
    data = source.with_name(f"{source.name}.data")
    if data.is_file():
        shutil.copyfile(data, target.with_name(data.name))
