"""Transforms of a group's input, by the name that ``--transform`` takes. A new one is a module here, a test and a line below."""

from __future__ import annotations

from fqonnx.calib.transforms.base import FittedTransform, Problem, Transform

TRANSFORMS: dict[str, str] = {
    "none": "fqonnx.calib.transforms.none:NoTransform",
    "smooth": "fqonnx.calib.transforms.smooth:Smooth",
    "awq": "fqonnx.calib.transforms.awq:Awq",
    "hadamard": "fqonnx.calib.transforms.hadamard:Hadamard",
    "dfrot": "fqonnx.calib.transforms.dfrot:DFRot",
    "flatquant-fixed": "fqonnx.calib.transforms.flatquant_fixed:FlatQuantFixed",
    "flatquant": "fqonnx.calib.transforms.flatquant:FlatQuant",
}
"""Name -> ``module:class``; resolved on first use, so that reading the choices does not import torch."""

__all__ = ["TRANSFORMS", "FittedTransform", "Problem", "Transform"]
