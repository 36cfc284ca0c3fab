"""Weight quantizers, by the name that ``--weights`` takes. A new one is a module here, a test and a line below."""

from __future__ import annotations

from fqonnx.calib.weights.base import WeightQuantizer

WEIGHT_QUANTIZERS: dict[str, str] = {
    "rtn": "fqonnx.calib.weights.rtn:RoundToNearest",
    "mse": "fqonnx.calib.weights.mse:MeanSquaredError",
    "awq": "fqonnx.calib.weights.awq:Awq",
    "gptq": "fqonnx.calib.weights.gptq:Gptq",
}
"""Name -> ``module:class``; resolved on first use, so that reading the choices does not import torch."""

__all__ = ["WEIGHT_QUANTIZERS", "WeightQuantizer"]
