"""The cache of attention in standard operators, where ``Concat`` puts new keys behind the past ones: any format, with transforms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fqonnx.cache_plan import CachePlan
from fqonnx.calib.kv import CacheSolution, fit, method_for, stored
from fqonnx.calib.roles import padding_mask
from fqonnx.passes import kv_cache

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Self

    import onnx_ir as ir
    import torch

    from fqonnx.calib.data.base import Source
    from fqonnx.passes.kv_cache import Cache, CacheLayer
    from fqonnx.passes.kv_cache_formats import Format
    from fqonnx.progress import Progress
    from fqonnx.recipe import Recipe


@dataclass(frozen=True)
class ConcatCachePlan(CachePlan):
    """Codes and scales for each head and token, keys and values transformed before.

    Attributes:
        layers: The cache's layers in the float model.
        form: Its format.
        solution: Its transforms; none before ``transformed``.
    """

    layers: tuple[CacheLayer, ...]
    form: Format
    solution: CacheSolution

    @classmethod
    def of(cls, model: ir.Model, recipe: Recipe) -> Self | None:
        """See ``CachePlan``; a model without such a cache is an error too, as the recipe asks for one.

        Raises:
            ModelError: The model has no cache, or one that cannot be quantized.
        """
        if recipe.kv == "none":
            return None
        return cls(kv_cache.find(model), kv_cache.FORMATS[recipe.kv], CacheSolution({}, {}))

    def transformed(
        self, model: ir.Model, source: Source, recipe: Recipe, *, workdir: Path, device: str = "cpu", progress: Progress | None = None
    ) -> Self:
        """Fit transforms of keys and values and put them into the model."""
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
        """See ``CachePlan``."""
        return {cache.concat.outputs[0]: partial(stored, form=self.form) for cache in self._caches}

    def apply(self, model: ir.Model) -> None:
        """See ``CachePlan``; after ``quantize_model``."""
        kv_cache.QuantizeCache(self.layers, self.form)(model)

    @property
    def form_name(self) -> str:
        """See ``CachePlan``."""
        return self.form.name

    @property
    def bytes_per_token(self) -> tuple[int, int]:
        """See ``CachePlan``."""
        in_float = sum(cache.heads * cache.size * cache.dtype.numpy().itemsize for cache in self._caches)
        return in_float, sum(cache.heads * self.form.bytes_per_vector(cache.size, cache.dtype) for cache in self._caches)

    @property
    def how(self) -> str:
        """See ``CachePlan``."""
        return f"their transforms: {self.solution.summary}"

    @property
    def caches_to_dict(self) -> list[dict[str, Any]]:
        """See ``CachePlan``."""
        return [{"name": name, **self.solution.metrics.get(name, {})} for name in self.solution.transforms]

    @property
    def _caches(self) -> list[Cache]:
        return [cache for layer in self.layers for cache in (layer.key, layer.value)]
