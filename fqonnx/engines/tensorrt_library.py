"""The two libraries, TensorRT and TensorRT-RTX: importing them, their plugins, the GPU, and their errors as one line."""

from __future__ import annotations

import importlib
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fqonnx.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_NO_CAUSE = re.compile(r"^(I[A-Z]\w*::|IBuilder|ITensor|INetwork)\S*: ")
"""The function that an error is reported by, at the beginning of its message."""


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries.

    Attributes:
        name: Of the engine, and of the extra that installs it.
        title: What it is called.
        module: Its Python module.
        plugins: Whether fqonnx ops become plugin layers; else their bodies are inlined.
    """

    name: str
    title: str
    module: str
    plugins: bool

    def load(self) -> Any:
        """The module; Polygraphy's loaders take the same one from here on.

        Raises:
            EngineError: It is not installed, or this process has used the other one.
        """
        try:
            module = importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            raise EngineError(f"{self.title} is not usable here ({first_line(str(error))}): pip install 'fqonnx[{self.name}]'") from None
        from polygraphy import config

        # Polygraphy reads the setting once, when its loaders are imported.
        if "polygraphy.backend.trt" in sys.modules and (RTX if config.USE_TENSORRT_RTX else TENSORRT) is not self:
            raise EngineError(f"Polygraphy works with one of TensorRT and TensorRT-RTX a process: use {self.title} in another process")
        config.USE_TENSORRT_RTX = self is RTX
        return module


TENSORRT = Flavour("tensorrt", "TensorRT", "tensorrt", plugins=True)
RTX = Flavour("tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx", plugins=False)
FLAVOURS = {flavour.name: flavour for flavour in (TENSORRT, RTX)}


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name and compute capability."""

    name: str
    capability: tuple[int, int]

    @property
    def target(self) -> str:
        """Such as ``sm90``."""
        return f"sm{self.capability[0]}{self.capability[1]}"


def this_gpu() -> Gpu:
    """The GPU that this process uses.

    Raises:
        EngineError: There is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise EngineError(f"PyTorch {torch.__version__} finds no CUDA device here: install a driver and a CUDA build of torch")
    return Gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def plugin_library() -> Path:
    """The library that holds the plugins, as ``fqonnx plugin path`` prints it.

    Raises:
        EngineError: It is not built.
    """
    from fqonnx.plugins.library import require_library

    return require_library()


def load_plugins(trt: Any) -> None:
    """Register fqonnx's plugins with TensorRT; once a process, however often it is called.

    Raises:
        EngineError: The library is not built, or TensorRT does not take it.
    """
    from fqonnx.ops import DOMAIN, VERSION

    registry, path = trt.get_plugin_registry(), plugin_library()

    def registered() -> bool:
        return all(registry.get_creator(op, str(VERSION), DOMAIN) is not None for op in ("FlatQuantize", "W4A4Gemm"))

    if registered():
        return
    registry.load_library(str(path))
    if not registered():
        raise EngineError(
            f"TensorRT {trt.__version__} finds no fqonnx plugins in {path}: run `fqonnx plugin build` (without --without tensorrt)"
        )


def first_line(text: str) -> str:
    """A message on one line of at most 400 characters, without the function that reports it."""
    return _NO_CAUSE.sub("", " ".join(text.split())).rstrip(" .")[:400]


@contextmanager
def one_line_errors(what: str, logger: Any, remedy: Callable[[str], str]) -> Iterator[None]:
    """Polygraphy without its log, and with its failures as one line that says what TensorRT logged first: later errors are its echo.

    Args:
        what: What fails.
        logger: Has TensorRT's ``errors``.
        remedy: What to do, by the reason.
    """
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        try:
            yield
        except PolygraphyException as error:
            reason = logger.errors[0] if logger.errors else first_line(str(error)) or "no reason given"
            raise EngineError(f"{what}: {reason}: {remedy(reason)}") from None
