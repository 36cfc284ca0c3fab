"""What a build does about a decoder's cache of keys and values: find it, fit what storing it needs, store it, compare with the original."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fqonnx import model as model_file
from fqonnx.calib.kv import CacheSolution
from fqonnx.errors import ModelError
from fqonnx.passes import kv_cache, kv_cache_attention

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Self

    import onnx_ir as ir
    import torch

    from fqonnx.calib.data.base import Source
    from fqonnx.progress import Progress
    from fqonnx.recipe import Recipe

FILE = "kv_cache.safetensors"
"""What calibration found for the caches, in a build directory: transforms or scales."""


class Solution(Protocol):
    """What calibration found for the caches."""

    def save(self, path: Path) -> None:
        """Write it as a safetensors file."""
        ...


class CachePlan(ABC):
    """How the cache of a model is going to be stored: one class for each way that graphs have of keeping it."""

    applied_first: ClassVar[bool] = False
    """Whether ``apply`` comes before the linears are rewritten, not after."""

    solution: Solution

    @classmethod
    @abstractmethod
    def of(cls, model: ir.Model, recipe: Recipe) -> Self | None:
        """The plan that the recipe asks for; None where the model has no such cache, or the recipe leaves it in float.

        Raises:
            ModelError: The cache cannot be quantized, or not as the recipe asks.
        """

    @abstractmethod
    def transformed(
        self, model: ir.Model, source: Source, recipe: Recipe, *, workdir: Path, device: str = "cpu", progress: Progress | None = None
    ) -> Self:
        """Fit the solution, and change the model where that needs it; it computes the same as before.

        Args:
            model: The float model that the plan is of.
            source: Calibration data.
            recipe: How to fit.
            workdir: Folder for the result.
            device: Where to fit.
            progress: Told of every sample.

        Raises:
            CalibrationError: Keys or values hold NaN or Inf.
        """

    @abstractmethod
    def rounding(self) -> dict[ir.Value, Callable[[torch.Tensor], torch.Tensor]]:
        """What storing does, by value of the model: what attention reads of each cache, in torch and differentiable."""

    @abstractmethod
    def apply(self, model: ir.Model) -> None:
        """Give the cache its format, in place."""

    @property
    @abstractmethod
    def form_name(self) -> str:
        """The format, one of ``fqonnx.recipe.KV_CACHES``."""

    @property
    @abstractmethod
    def bytes_per_token(self) -> tuple[int, int]:
        """Bytes that all keys and values of one token take, in float and in the format."""

    @property
    @abstractmethod
    def how(self) -> str:
        """Scales and transforms in words, for the summary."""

    @property
    @abstractmethod
    def caches_to_dict(self) -> list[dict[str, Any]]:
        """A dictionary of plain JSON types for each cache: its name and what was measured."""

    @property
    def summary(self) -> str:
        """Format, size, scales and transforms in words."""
        in_float, stored = self.bytes_per_token
        return (
            f"keys and values are stored as {self.form_name}: {stored} bytes a token instead of {in_float}, "
            f"{in_float / stored:.1f} times less; {self.how}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the manifest."""
        in_float, stored = self.bytes_per_token
        return {
            "format": self.form_name,
            "bytes_per_token": stored,
            "float_bytes_per_token": in_float,
            "caches": self.caches_to_dict,
        }


def comparable(path: Path) -> ir.Model:
    """A build directory's model with the interface of the float model it was made from, whether or not its cache is quantized.

    Args:
        path: The build directory, or its model file.

    Raises:
        ModelError: The cache is quantized and the transforms are not beside the model.
        CalibrationError: They are not readable.
    """
    model = model_file.load(path / "model.onnx" if path.is_dir() else path)
    if kv_cache.METADATA not in model.metadata_props:
        return model
    if kv_cache_attention.has_static_scales(model):
        return kv_cache_attention.with_float_cache(model)
    transforms = (path if path.is_dir() else path.parent) / FILE
    if not transforms.is_file():
        raise ModelError(f"{path} has a quantized cache, and {FILE} is not beside it: give the whole build directory")
    return kv_cache.with_float_cache(model, CacheSolution.load(transforms).transforms)
