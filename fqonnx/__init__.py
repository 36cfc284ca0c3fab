"""fqonnx: learned FlatQuant transforms and W4A4 for any exported ONNX transformer.

The functions behind the command line:

- ``from fqonnx.inspect import inspect``: what would be quantized;
- ``from fqonnx.build import build``: calibrate, rewrite, build and verify;
- ``from fqonnx.verify import verify``: compare two models;
- ``from fqonnx import Recipe, open_artifact``: the choices of a build, and its result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fqonnx.artifact import Artifact, open_artifact
    from fqonnx.errors import FqonnxError
    from fqonnx.recipe import Recipe

__all__ = ["Artifact", "FqonnxError", "Recipe", "__version__", "open_artifact"]

_WHERE = {
    "Artifact": "fqonnx.artifact",
    "FqonnxError": "fqonnx.errors",
    "Recipe": "fqonnx.recipe",
    "open_artifact": "fqonnx.artifact",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("fqonnx")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted({*globals(), *__all__})
