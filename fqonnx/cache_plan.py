"""What a build does about a decoder's cache of keys and values: find it, fit transforms, store it, compare it with the float one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from fqonnx import model as model_file
from fqonnx.calib.kv import CacheSolution, fit, method_for, stored
from fqonnx.calib.roles import padding_mask
from fqonnx.errors import ModelError
from fqonnx.passes import kv_cache, kv_cache_attention

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir
    import torch

    from fqonnx.calib.data.base import Source
    from fqonnx.passes.kv_cache import CacheLayer
    from fqonnx.passes.kv_cache_formats import Format
    from fqonnx.progress import Progress
    from fqonnx.recipe import Recipe

FILE = "kv_cache.safetensors"
"""The transforms in a build directory: by cache name fp32 ``[heads or 1, size, size]``."""


@dataclass(frozen=True)
class CachePlan:
    """How the cache of a model is going to be stored.

    Attributes:
        layers: Its layers in the float model.
        form: Its format.
        solution: Its transforms; none before ``transformed``.
    """

    layers: tuple[CacheLayer, ...]
    form: Format
    solution: CacheSolution

    applied_first: ClassVar[bool] = False
    """Whether ``apply`` comes before the linears are rewritten."""

    @classmethod
    def of(cls, model: ir.Model, recipe: Recipe) -> CachePlan | None:
        """The plan that the recipe asks for; None where it leaves the cache in float.

        Raises:
            ModelError: The model has no cache, or one that cannot be quantized.
        """
        if recipe.kv == "none":
            return None
        return cls(kv_cache.find(model), kv_cache.FORMATS[recipe.kv], CacheSolution({}, {}))

    def transformed(
        self, model: ir.Model, source: Source, recipe: Recipe, *, workdir: Path, device: str = "cpu", progress: Progress | None = None
    ) -> CachePlan:
        """Fit transforms of keys and values and put them into the model, which computes the same as before.

        Raises:
            CalibrationError: Keys or values hold NaN or Inf.
        """
        solution = fit(
            model,
            self.layers,
            source,
            self.form,
            method=method_for(recipe.transform),
            workdir=workdir,
            seed=recipe.seed,
            steps=recipe.steps,
            device=device,
            mask=padding_mask(model),
            progress=progress,
        )
        kv_cache.TransformCache(self.layers, solution.transforms)(model)
        return replace(self, solution=solution)

    def rounding(self) -> dict[ir.Value, Callable[[torch.Tensor], torch.Tensor]]:
        """What storing does, by value of the model: what attention reads of each cache, in torch and differentiable."""
        caches = [cache for layer in self.layers for cache in (layer.key, layer.value)]
        return {cache.concat.outputs[0]: partial(stored, form=self.form) for cache in caches}

    def apply(self, model: ir.Model) -> None:
        """Give the cache its format, in place; after ``quantize_model``."""
        kv_cache.QuantizeCache(self.layers, self.form)(model)

    @property
    def bytes_per_token(self) -> tuple[int, int]:
        """Bytes that all keys and values of one token take, in float and in the format."""
        caches = [cache for layer in self.layers for cache in (layer.key, layer.value)]
        in_float = sum(cache.heads * cache.size * cache.dtype.numpy().itemsize for cache in caches)
        return in_float, sum(cache.heads * self.form.bytes_per_vector(cache.size, cache.dtype) for cache in caches)

    @property
    def summary(self) -> str:
        """Format, size and transforms in words."""
        in_float, stored = self.bytes_per_token
        return (
            f"keys and values are stored as {self.form.name}: {stored} bytes a token instead of {in_float}, "
            f"{in_float / stored:.1f} times less; their transforms: {self.solution.summary}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the manifest."""
        in_float, stored = self.bytes_per_token
        return {
            "format": self.form.name,
            "bytes_per_token": stored,
            "float_bytes_per_token": in_float,
            "caches": [{"name": name, **self.solution.metrics.get(name, {})} for name in self.solution.transforms],
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
