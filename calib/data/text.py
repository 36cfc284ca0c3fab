"""Text for language models: ``text:FILE`` with a ``tokenizer.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fqonnx.calib.data.base import file_digest
from fqonnx.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fqonnx.calib.data.base import Feeds, Reader, Request

DEFAULT_SEQ_LEN = 512


def open_text(path: Path, spec: str, request: Request) -> Reader:
    """The file as one running text, cut into windows of ``seq_len`` tokens, special tokens of the tokenizer included in each.

    A rest that does not fill a window is dropped. Mask, positions and segments are derived where the graph wants them.

    Raises:
        DataError: Unreadable text or tokenizer, less than one window, or no input that takes token ids.
        UsageError: No tokenizer given, or a window length the model cannot take.
        DataError: The ``tokenizers`` package is not installed.
    """
    if request.tokenizer is None:
        raise UsageError(f"{spec} needs a tokenizer: give --tokenizer tokenizer.json")
    name, fixed = _ids_input(request)
    length = request.seq_len or fixed or DEFAULT_SEQ_LEN
    if fixed and length != fixed:
        raise UsageError(f"the model's input {name!r} takes exactly {fixed} tokens: give --seq-len {fixed}")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError(f"{spec} needs the tokenizers package: pip install 'fqonnx[text]'") from None
    if not request.tokenizer.is_file():
        raise DataError(f"no such file: {request.tokenizer}: give the model's tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(request.tokenizer))
    except Exception as error:  # noqa: BLE001  the package raises bare Exception
        raise DataError(f"{request.tokenizer} is not a tokenizer.json ({' '.join(str(error).split())}): give the model's own") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from None
    return _Windows(spec, name, _windows(tokenizer, text, length, spec), file_digest(path, request.tokenizer))


class _Windows:
    rows = True

    def __init__(self, name: str, input_name: str, windows: np.ndarray[tuple[int, int], np.dtype[np.int64]], digest: str) -> None:
        self.name = name
        self.length: int | None = len(windows)
        self._input_name = input_name
        self._windows = windows
        self._digest = digest

    def __iter__(self) -> Iterator[tuple[str, Feeds]]:
        for index, window in enumerate(self._windows):
            yield f"sample {index}", {self._input_name: window}

    def fingerprint(self) -> str:
        return f"{self._digest} {self._windows.shape[1]}"


def _windows(tokenizer: object, text: str, length: int, spec: str) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    encode = tokenizer.encode  # type: ignore[attr-defined]
    bare, dressed = (encode("a", add_special_tokens=special).ids for special in (False, True))
    start = next((i for i in range(len(dressed) - len(bare) + 1) if dressed[i : i + len(bare)] == bare), 0)
    prefix, suffix = dressed[:start], dressed[start + len(bare) :]
    width = length - len(prefix) - len(suffix)
    if width < 1:
        raise UsageError(
            f"--seq-len {length} leaves no room beside the tokenizer's special tokens: give {len(prefix) + len(suffix) + 1} or more"
        )
    ids = np.asarray(encode(text, add_special_tokens=False).ids, dtype=np.int64)
    count = len(ids) // width
    if not count:
        raise DataError(f"{spec} has {len(ids)} tokens, less than one sample of {width}: give more text or a smaller --seq-len")
    body = ids[: count * width].reshape(count, width)
    return np.hstack([np.tile(np.asarray(prefix, np.int64), (count, 1)), body, np.tile(np.asarray(suffix, np.int64), (count, 1))])


def _ids_input(request: Request) -> tuple[str, int | None]:
    """The input that takes token ids, and its sequence length where that is fixed."""
    integers = [item for item in request.inputs if item.dtype.kind in "iu" and len(item.shape) == 2]
    by_role = [item for item in integers if item.name in request.roles and request.roles[item.name].kind == "ids"]
    by_name = [item for item in integers if item.name == "input_ids"]
    found = by_role if len(by_role) == 1 else by_name or (integers if len(integers) == 1 else [])
    if not found:
        raise DataError("the model has no input [batch, sequence] of token ids: text does not fit it, give arrays")
    fixed = found[0].shape[1]
    return found[0].name, fixed if isinstance(fixed, int) else None
