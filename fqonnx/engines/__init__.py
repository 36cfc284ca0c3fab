"""Engines that an artifact is built for, by the name that ``--engine`` takes. A new one is a module here, a test and a line below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fqonnx.progress import Progress
    from fqonnx.report.data import EngineReport

ENGINES: dict[str, str] = {
    "onnxruntime": "fqonnx.engines:OnnxRuntime",
    "tensorrt": "fqonnx.engines.tensorrt:TensorRt",
    "tensorrt-rtx": "fqonnx.engines.tensorrt:TensorRtRtx",
}
"""Name -> ``module:class``; resolved on first use, so that reading the choices imports no runtime."""


@dataclass(frozen=True)
class Profile:
    """The shapes of one input that an engine is built for: from ``minimum`` to ``maximum``, fastest at ``optimum``."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]


Profiles = Mapping[str, Profile]
"""One optimization profile, by input name."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is built, besides its shapes and its target.

    Attributes:
        timing_cache: File that the measured times of kernels are read from and added to; None is one in the user's cache. TensorRT only.
        version_compatible: Make a plan that later versions of TensorRT load, with the plugins inside. TensorRT only.
        optimization_level: How long the builder searches, 0 to 5; None is its default.
        rebuild: Build even where the cache holds the same engine.
    """

    timing_cache: Path | None = None
    version_compatible: bool = False
    optimization_level: int | None = None
    rebuild: bool = False


class Engine(Protocol):
    """Makes what a runtime loads out of an artifact's model."""

    def require(self, target: str | None = None, options: EngineOptions | None = None) -> None:
        """Make sure, before the long work, that ``build`` has what it needs here.

        Raises:
            EngineError: The runtime is missing, or does not build for ``target``; the message says what to do.
            UsageError: An option is not one of this engine's.
        """
        ...

    def lowering(self, target: str | None) -> str | None:
        """The GPU that the model's operands are stored for where an engine for ``target`` is built; None for none in particular."""
        ...

    def build(
        self,
        model_path: Path,
        out_path: Path,
        *,
        profiles: Sequence[Profiles] = (),
        target: str | None = None,
        options: EngineOptions | None = None,
        progress: Progress | None = None,
    ) -> EngineReport | None:
        """Build for the shapes of ``profiles`` (inputs of fixed shape need none).

        Args:
            model_path: The artifact's ``model.onnx``.
            out_path: The engine file to write, where the engine has one.
            profiles: Sets of shapes of the inputs with dynamic dimensions; the engine has one optimization profile for each.
            target: GPU architecture such as ``sm90``; None is whatever the engine takes by default.
            options: See there.
            progress: Where to tell how far it is.

        Returns:
            What is in the engine; None where there is no file.

        Raises:
            EngineError: The runtime is missing, or it refuses the model; the message says what to do.
            UsageError: A profile is missing or does not fit its input.
        """
        ...


class OnnxRuntime:
    """ONNX Runtime loads ``model.onnx`` as it is, whatever target it is stored for: there is no file to build."""

    def require(self, target: str | None = None, options: EngineOptions | None = None) -> None:
        """Do nothing but refuse other engines' options: ONNX Runtime is a dependency of fqonnx.

        Raises:
            UsageError: An option of another engine.
        """
        del target
        if options is not None and (options.timing_cache or options.version_compatible or options.optimization_level is not None):
            from fqonnx.errors import UsageError

            raise UsageError(
                "--timing-cache, --version-compatible and --optimization-level are options of --engine tensorrt: leave them out"
            )

    def lowering(self, target: str | None) -> str | None:
        """The target itself: its kernels run here."""
        return target

    def build(
        self,
        model_path: Path,
        out_path: Path,
        *,
        profiles: Sequence[Profiles] = (),
        target: str | None = None,
        options: EngineOptions | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Do nothing."""


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


def profiles_from_shapes(
    shapes: Mapping[str, Sequence[tuple[int, ...]]], inputs: Mapping[str, Sequence[int | str | None]] | None = None
) -> dict[str, Profile]:
    """Profiles that cover the shapes seen: element-wise smallest, most frequent, and largest of each input.

    An engine is asked for less than was seen, too: dynamic dimensions begin at 1. Not so where the model takes a past: there dimensions
    are sums of others, and 1 for each would contradict them.

    Args:
        shapes: By input name, the shape of every sample, at least one.
        inputs: By input name, the shape that the model asks for, dynamic dimensions as names or None; None leaves the smallest as seen.
    """
    profiles = {}
    inputs = {} if inputs is None or any("past" in name.lower() for name in inputs) else inputs
    for name, seen in shapes.items():
        columns = list(zip(*seen, strict=True))
        optimum = max(sorted(set(seen)), key=list(seen).count)
        asked = inputs.get(name, optimum)
        smallest = tuple(low if isinstance(dim, int) else min(1, low) for dim, low in zip(asked, map(min, columns), strict=True))
        profiles[name] = Profile(smallest, optimum, tuple(map(max, columns)))
    return profiles
