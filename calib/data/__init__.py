"""Calibration and evaluation data, by what ``--calib-data`` and ``--data`` name. A new kind is a module here, a test and a line below."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from fqonnx.calib.data.base import CheckedSource, Feeds, Reader, Request, Source
from fqonnx.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

    from fqonnx.model import ModelInput


@dataclass(frozen=True)
class Kind:
    """A kind of source.

    Attributes:
        form: How it is written, for messages.
        matches: Whether a specification, and the path in it, are of this kind.
        reader: ``module:function`` that takes ``(path, spec, request)`` and returns a ``Reader``.
    """

    form: str
    matches: Callable[[str, Path], bool]
    reader: str


KINDS = (
    Kind("text:FILE", lambda spec, _: spec.startswith("text:"), "fqonnx.calib.data.text:open_text"),
    Kind("DATA.npz", lambda _, path: path.suffix == ".npz", "fqonnx.calib.data.arrays:open_npz"),
    Kind("inputs.json", lambda _, path: path.suffix == ".json", "fqonnx.calib.data.script:open_polygraphy"),
    Kind("script.py[:function]", lambda _, path: path.suffix == ".py", "fqonnx.calib.data.script:open_script"),
    Kind("a folder of .npy or .npz files", lambda _, path: path.is_dir(), "fqonnx.calib.data.arrays:open_folder"),
)
"""Asked in order."""


def open_source(
    spec: str,
    inputs: Sequence[ModelInput],
    *,
    samples: int | None = None,
    batch_size: int = 1,
    tokenizer: Path | None = None,
    seq_len: int | None = None,
    model: ir.Model | None = None,
) -> Source:
    """Open the data that ``spec`` names, to be fed to a model.

    Args:
        spec: An ``.npz``, a folder of ``.npy`` or ``.npz``, Polygraphy's JSON, ``script.py[:load_data]`` or ``text:FILE``.
        inputs: The model's inputs; every feed is checked against them.
        samples: Samples to read at most; None reads all.
        batch_size: Samples per feed where the model's batch is not fixed and the source holds rows (``.npz``, named ``.npy``, text).
        tokenizer: ``tokenizer.json`` for text.
        seq_len: Tokens per sample for text; None takes the model's fixed length, else 512.
        model: The model, so that ids are checked against its tables and missing masks and positions derived by their use in
            the graph; without it by their usual names.

    Returns:
        The source. What is wrong with single samples comes as ``DataError`` while they are read.

    Raises:
        DataError: There is no such data, or it cannot be read.
        UsageError: The specification, or an option, is of no known form.
    """
    from fqonnx.calib.roles import input_roles

    path = _path(spec)
    kind = next((kind for kind in KINDS if kind.matches(spec, path)), None)
    if not path.exists():
        raise DataError(f"no such file or folder: {path}: check the path")
    if kind is None or (path.is_dir() and "folder" not in kind.form):
        raise UsageError(f"{spec} is no kind of data known here: give {', '.join(kind.form for kind in KINDS)}")
    request = Request(tuple(inputs), input_roles(model) if model is not None else {}, tokenizer, seq_len)
    module, function = kind.reader.split(":")
    reader: Reader = getattr(import_module(module), function)(path, spec, request)
    return CheckedSource(reader, request, samples=samples, batch_size=batch_size)


def _path(spec: str) -> Path:
    if spec.startswith("text:"):
        return Path(spec.removeprefix("text:"))
    head, found, tail = spec.rpartition(".py:")
    return Path(head + ".py") if found and tail.isidentifier() else Path(spec)


__all__ = ["KINDS", "Feeds", "Kind", "Source", "open_source"]
