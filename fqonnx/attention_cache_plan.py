"""What a build does about the cache of ``GroupQueryAttention``: find it, measure its scales, store it as int8."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fqonnx.cache_plan import CachePlan
from fqonnx.calib.kv_scales import CacheScales, fit_scales
from fqonnx.errors import ModelError
from fqonnx.passes import kv_cache_attention

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Self

    import onnx_ir as ir
    import torch

    from fqonnx.calib.data.base import Source
    from fqonnx.passes.kv_cache_attention import AttentionCache
    from fqonnx.progress import Progress
    from fqonnx.recipe import Recipe

FORMAT = "int8"
"""The one of ``fqonnx.recipe.KV_CACHES`` that ``GroupQueryAttention`` has."""


@dataclass(frozen=True)
class AttentionCachePlan(CachePlan):
    """Codes with one scale a channel, measured before.

    Attributes:
        caches: From ``kv_cache_attention.find`` on the float model.
        widths: Bytes of a value of each in that model.
        solution: Their scales; none before ``transformed``.
    """

    caches: tuple[AttentionCache, ...]
    widths: tuple[int, ...]
    solution: CacheScales = field(default_factory=CacheScales)

    applied_first: ClassVar[bool] = True
    """Attention is lowered with the other ops, and has to have its final form by then."""

    @classmethod
    def of(cls, model: ir.Model, recipe: Recipe) -> Self | None:
        """See ``CachePlan``.

        Raises:
            ModelError: The format is not int8, or a cache cannot be quantized.
        """
        if recipe.kv == "none" or not (caches := kv_cache_attention.find(model)):
            return None
        if recipe.kv != FORMAT:
            raise ModelError(
                f"{caches[0].node.name!r} is GroupQueryAttention, which stores keys and values as {FORMAT} or in float: give --kv {FORMAT}"
                f", or export attention in standard operators for --kv {recipe.kv} (samples/llama.py export --past)"
            )
        return cls(caches, tuple(int(cache.past.dtype.itemsize) for cache in caches if cache.past.dtype is not None))

    def transformed(
        self,
        model: ir.Model,
        source: Source,
        recipe: Recipe,  # noqa: ARG002 - scales depend on the data alone
        *,
        workdir: Path,
        device: str = "cpu",  # noqa: ARG002 - the model is run on the CPU
        progress: Progress | None = None,
    ) -> Self:
        """Measure the scales; the model stays as it is.

        Raises:
            CalibrationError: Keys or values hold NaN or Inf, or there are none.
        """
        return replace(self, solution=fit_scales(model, self.caches, source, workdir=workdir, progress=progress))

    def rounding(self) -> dict[ir.Value, Callable[[torch.Tensor], torch.Tensor]]:
        """Nothing: blocks with this operator are not trained."""
        return {}

    def apply(self, model: ir.Model) -> None:
        """See ``CachePlan``; before ``quantize_model``."""
        kv_cache_attention.QuantizeAttentionCache(self.caches, self.solution.scales)(model)

    @property
    def form_name(self) -> str:
        """See ``CachePlan``."""
        return FORMAT

    @property
    def bytes_per_token(self) -> tuple[int, int]:
        """See ``CachePlan``."""
        stored = [cache.heads * cache.size for cache in self.caches]
        return sum(count * width for count, width in zip(stored, self.widths, strict=True)), sum(stored)

    @property
    def how(self) -> str:
        """See ``CachePlan``."""
        return "one scale a channel"

    @property
    def caches_to_dict(self) -> list[dict[str, Any]]:
        """See ``CachePlan``."""
        return [{"name": cache.name, **self.solution.metrics[cache.name]} for cache in self.caches]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the manifest."""
        return {**super().to_dict(), "scales": "static"}
