"""Resolves the names of transforms and weight quantizers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from fqonnx.calib.transforms import TRANSFORMS
from fqonnx.calib.weights import WEIGHT_QUANTIZERS

if TYPE_CHECKING:
    from fqonnx.calib.transforms import Transform
    from fqonnx.calib.weights import WeightQuantizer


def transform_named(name: str) -> Transform:
    """The transform registered as ``name`` (a key of ``TRANSFORMS``)."""
    return cast("Transform", _load(TRANSFORMS[name]))


def weight_quantizer_named(name: str) -> WeightQuantizer:
    """The weight quantizer registered as ``name`` (a key of ``WEIGHT_QUANTIZERS``)."""
    return cast("WeightQuantizer", _load(WEIGHT_QUANTIZERS[name]))


def _load(place: str) -> object:
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)()
