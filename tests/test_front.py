"""What lies in front of the first block is run once, in ONNX Runtime, whatever operators it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto

from fqonnx.calib.blocks import find_blocks
from fqonnx.calib.chunks import Chunks
from fqonnx.calib.front import run_front
from fqonnx.calib.reconstruct import Training, reconstruct
from fqonnx.calib.torch_graph import TorchGraph, shapes_of
from fqonnx.calib.torch_ops import OPERATORS
from fqonnx.errors import CalibrationError
from fqonnx.passes.linears import find
from fqonnx.passes.pipeline import quantize_model
from fqonnx.passes.prepare import prepare
from fqonnx.recipe import Recipe
from tests import zoo
from tests.networks import WIDTH, Network
from tests.runtime import run
from tests.test_reconstruct import Samples

if TYPE_CHECKING:
    from pathlib import Path

    from fqonnx.calib.torch_graph import Sizes

ROWS = 40
Arrays = dict[str, Any]


def image_model() -> ir.Model:
    """A picture made twice as large (by an operator that blocks do not run) and cut into tokens, whose number a block asks for."""
    net = Network()
    g = net.graph
    larger = g.op("Resize", "image", "", g.constant(np.array([1, 1, 2, 2], np.float32)), mode="cubic")
    columns = g.op("Reshape", larger, g.constant(np.array([0, WIDTH, -1])))
    net.h = g.op("Transpose", columns, perm=[0, 2, 1])
    count = g.op("Gather", g.op("Shape", columns), g.constant(np.array(2)), axis=0)
    net.layer("0")
    table = g.weight(ROWS, WIDTH)
    positions = g.op("Range", g.constant(np.array(0)), count, g.constant(np.array(1)))
    net.add(g.op("Gather", table, positions, axis=0))
    net.layer("1")
    return prepare(ir.from_proto(g.model([net.h], {"image": (zoo.FLOAT, ("batch", WIDTH, "high", "wide"))})))


def images(count: int, seed: int = 0) -> Samples:
    random = np.random.default_rng(seed)
    return Samples({"image": random.standard_normal((1, WIDTH, 2, 2 + index % 2)).astype(np.float32)} for index in range(count))


def test_streams_and_sizes_are_those_of_onnx_runtime(tmp_path: Path) -> None:
    model, data = image_model(), images(4)
    assert ("", "Resize") not in OPERATORS
    blocks = find_blocks(model, find(model).groups)
    entrance = blocks[0].input
    assert entrance is not None
    sizes: Sizes = {}
    with Chunks(data, tmp_path, tokens=1000, stacks=True) as chunks:
        run_front(model, entrance, chunks, sizes, workdir=tmp_path)
        assert len(chunks) == 2
        for chunk in range(2):
            feeds = chunks.feeds(chunk)
            taps = [entrance.name or "", *(block.output.name or "" for block in blocks)]
            expected = run(model, {name: tensor.numpy() for name, tensor in feeds.items()}, taps)
            for stream in ("float", "quantized"):
                np.testing.assert_array_equal(chunks.get(stream, chunk).numpy(), expected[entrance.name or ""])
            (count,) = sizes[shapes_of(feeds)].values()
            assert count.tolist() == [2, WIDTH, expected[entrance.name or ""].shape[1]]
            # The blocks run from there on, and what they need of the front are sizes.
            x = chunks.get("float", chunk)
            for block in blocks:
                assert block.input is not None
                graph = TorchGraph([block.output], [block.input], sizes=sizes)
                x = graph({**feeds, block.input.name or "": x}, key=feeds)[block.output.name or ""]
                np.testing.assert_allclose(x.numpy(), expected[block.output.name or ""], atol=1e-4)


@pytest.mark.parametrize("reconstruction", ["block", "model"])
def test_blocks_behind_any_front_are_trained(tmp_path: Path, reconstruction: str) -> None:
    model, data = image_model(), images(24)
    groups, recipe = find(model).groups, Recipe(reconstruct=reconstruction, weights="rtn", scheme="w8a8")
    training = Training(tokens=64, steps=20, rounding_steps=10, model_steps=8)
    store = reconstruct(model, groups, data, recipe, workdir=tmp_path, fingerprint="f", stacks=True, training=training)
    quantized = quantize_model(model, groups, store, recipe, None)
    feed = images(1, seed=1)[0]
    (expected,), (found,) = run(image_model(), feed).values(), run(quantized, feed).values()
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def test_what_the_data_break_is_said(tmp_path: Path) -> None:
    """More tokens than there are positions: the block's own table; and ids beyond the embedding, which is the front's."""
    long = Samples([{"image": np.ones((1, WIDTH, 4, 4), np.float32)}])
    model = image_model()
    with pytest.raises(CalibrationError, match=r"\(Gather\): .*: an id or a position lies beyond its table"):
        reconstruct(model, find(model).groups, long, Recipe(), workdir=tmp_path / "a", fingerprint="f")
    net = Network()
    net.h = net.graph.op("Gather", net.graph.weight(9, WIDTH), "ids", axis=0)
    net.layer("0")
    model = prepare(ir.from_proto(net.graph.model([net.h], {"ids": (TensorProto.INT64, ("batch", "seq"))})))
    with pytest.raises(CalibrationError, match="out of data bounds"):
        reconstruct(model, find(model).groups, Samples([{"ids": np.full((1, 3), 9)}]), Recipe(), workdir=tmp_path / "b", fingerprint="f")


def test_a_half_precision_stream_arrives_in_fp32(tmp_path: Path) -> None:
    net = Network()
    g = net.graph
    net.h = g.op("Gather", g.constant(np.random.default_rng(0).standard_normal((9, WIDTH)).astype(np.float16)), "ids", axis=0)
    model = prepare(ir.from_proto(g.model([net.h], {"ids": (TensorProto.INT64, ("batch", "seq"))})))
    with Chunks([{"ids": np.arange(3)[None]}], tmp_path, tokens=8, stacks=True) as chunks:
        run_front(model, model.graph.outputs[0], chunks, {}, workdir=tmp_path)
        assert chunks.get("float", 0).dtype == torch.float32
