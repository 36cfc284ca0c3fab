"""Engines that an artifact is built for, by the name that ``--engine`` takes. A new one is a module here, a test and a line below."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

ENGINES: dict[str, str] = {
    "onnxruntime": "fqonnx.engines.onnxruntime:OnnxRuntime",
    "tensorrt-rtx": "fqonnx.engines.tensorrt_rtx:TensorRtRtx",
}
"""Name -> ``module:class``; resolved on first use, so that reading the choices imports no runtime."""


@dataclass(frozen=True)
class Profile:
    """The shapes of one input that an engine is built for: from ``minimum`` to ``maximum``, fastest at ``optimum``."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]


class Engine(Protocol):
    """Makes what a runtime loads out of an artifact's model."""

    def require(self, target: str | None = None) -> None:
        """Make sure, before the long work, that ``build`` has what it needs here.

        Raises:
            EngineError: The runtime is missing, or does not build for ``target``; the message says what to do.
        """
        ...

    def build(self, model_path: Path, out_path: Path, *, profiles: Mapping[str, Profile], target: str | None = None) -> None:
        """Build for the shapes of ``profiles`` (by input name; inputs of fixed shape need none).

        Args:
            model_path: The artifact's ``model.onnx``.
            out_path: The engine file to write, where the engine has one.
            profiles: Shapes of the inputs with dynamic dimensions.
            target: GPU architecture such as ``sm90``; None is whatever the engine takes by default.

        Raises:
            EngineError: The runtime is missing, or it refuses the model; the message says what to do.
            UsageError: A profile is missing or does not fit its input.
        """
        ...


def engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        UsageError: There is none; the message lists them.
    """
    from fqonnx.errors import UsageError

    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}: choose from {', '.join(ENGINES)}")
    module, _, attribute = ENGINES[name].partition(":")
    made: Engine = getattr(import_module(module), attribute)()
    return made


def profiles_from_shapes(shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, Profile]:
    """Profiles that cover the shapes seen: element-wise smallest, most frequent, and largest of each input.

    Args:
        shapes: By input name, the shape of every sample, at least one.
    """
    profiles = {}
    for name, seen in shapes.items():
        columns = list(zip(*seen, strict=True))
        optimum = max(sorted(set(seen)), key=list(seen).count)
        profiles[name] = Profile(tuple(map(min, columns)), optimum, tuple(map(max, columns)))
    return profiles
