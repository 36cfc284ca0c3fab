from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch

from fqonnx import model as model_file
from fqonnx.build import build
from fqonnx.calib import stores
from fqonnx.calib.block_training import FloatGroup, kept
from fqonnx.calib.chunks import HELD_OUT, Chunks
from fqonnx.calib.reconstruct import Training, reconstruct
from fqonnx.calib.registry import transform_named
from fqonnx.calib.transforms import TRANSFORMS
from fqonnx.calib.weights import WEIGHT_QUANTIZERS
from fqonnx.errors import CalibrationError, ModelError
from fqonnx.passes.linears import find
from fqonnx.passes.pipeline import quantize_model
from fqonnx.passes.prepare import prepare
from fqonnx.recipe import Recipe
from tests import zoo
from tests.networks import WIDTH, Network
from tests.runtime import run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    from fqonnx.calib.stores import SolutionStore

    Array = npt.NDArray[Any]

SHORT = Training(tokens=64, steps=12, rounding_steps=8)


class Samples(list[dict[str, "Array"]]):
    """A source in memory."""

    fingerprint = "samples"

    @property
    def length(self) -> int:
        return len(self)


def samples(count: int, seed: int = 0, *, width: int = WIDTH, tokens: int = 16) -> Samples:
    """Tokens of a few directions and some noise, with loud channels: of so little data nothing could be learned in all directions."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(7).standard_normal((6, width)) * np.where(np.arange(width) % 9 == 0, 8, 1)
    return Samples(
        {"x": (rng.standard_normal((1, tokens, 6)) @ directions + 0.1 * rng.standard_normal((1, tokens, width))).astype(np.float32)}
        for _ in range(count)
    )


def network(layers: int = 2, width: int = WIDTH) -> Network:
    net = Network(width)
    for index in range(layers):
        net.layer(str(index))
    return net


def solved(net: Network, data: Samples, folder: Path, recipe: Recipe | None = None, training: Training | None = SHORT) -> SolutionStore:
    model, groups = net.model()
    return reconstruct(model, groups, data, recipe or Recipe(), workdir=folder, fingerprint="f", stacks=True, training=training)


def error(net: Network, solution: SolutionStore, data: Samples, recipe: Recipe | None = None) -> float:
    """Relative L2 of the deployed model's output, in ONNX Runtime."""
    model, groups = net.model()
    quantized = quantize_model(model, groups, solution, recipe or Recipe(), None)
    difference = power = 0.0
    for feed in data:
        (expected,), (actual,) = run(net.proto(), feed).values(), run(quantized, feed).values()
        assert np.isfinite(actual).all()
        difference += float(np.square(actual - expected).sum())
        power += float(np.square(expected).sum())
    return (difference / power) ** 0.5


def content(store: SolutionStore) -> dict[str, Array]:
    return {f"{name}/{key}": array for name in store for key, array in stores.read(store.path(name)).items()}


def test_the_deployed_model_is_what_was_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net, data, unseen = network(), samples(64), samples(24, seed=1)
    with caplog.at_level(logging.INFO):
        trained = solved(net, data, tmp_path / "trained", training=Training(tokens=64, steps=120, rounding_steps=60))
    said = float(caplog.messages[-1].split("relative error ")[1].split()[0])
    # What the log says of the last block on the chunk held out is what the built model shows there.
    assert said == pytest.approx(error(net, trained, Samples(data[4 * HELD_OUT - 4 : 4 * HELD_OUT])), rel=0.02)
    shown = error(net, trained, unseen)
    hardly = solved(net, data, tmp_path / "hardly", training=Training(tokens=64, steps=1, rounding_steps=1))
    plain = solved(net, data, tmp_path / "plain", Recipe(transform="none", weights="rtn"), Training(tokens=64, steps=1, rounding_steps=1))
    assert shown < 0.95 * error(net, hardly, unseen)
    assert shown < 0.7 * error(net, plain, unseen)


def test_resumed_after_the_first_block_gives_the_same_bytes(tmp_path: Path) -> None:
    net, data = network(), samples(20)
    whole = solved(net, data, tmp_path / "whole")
    _, groups = net.model()
    folder = tmp_path / "killed"
    partial = solved(net, data, folder)
    for group in groups[4:]:
        partial.drop(group.name)
    kept_bytes = {group.name: partial.path(group.name).stat().st_mtime_ns for group in groups[:4]}
    resumed = solved(net, data, folder)
    assert {name: resumed.path(name).stat().st_mtime_ns for name in kept_bytes} == kept_bytes
    first, second = content(whole), content(resumed)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_nothing_is_run_where_everything_is_solved(tmp_path: Path) -> None:
    net, data = network(1), samples(4)
    first = content(solved(net, data, tmp_path))

    class Unread(Samples):
        def __iter__(self) -> Iterator[dict[str, Array]]:
            raise AssertionError("the data were read")

    again = solved(net, Unread(data), tmp_path)
    assert all(np.array_equal(array, first[key]) for key, array in content(again).items())


def test_another_seed_recipe_or_training_is_another_solution(tmp_path: Path) -> None:
    net, data = network(1), samples(4)
    base = content(solved(net, data, tmp_path))
    for recipe, training in ((Recipe(seed=1), SHORT), (Recipe(), Training(tokens=64, steps=13, rounding_steps=8))):
        other = content(solved(net, data, tmp_path, recipe, training))
        assert any(not np.array_equal(base[key], other[key]) for key in base)


@pytest.mark.parametrize("weights", WEIGHT_QUANTIZERS)
@pytest.mark.parametrize(
    ("what", "count", "width"),
    [
        ("70 channels, twice an odd number", 8, 70),
        ("one sample", 1, WIDTH),
        ("constant activations", 8, WIDTH),
        ("zeros", 8, WIDTH),
        ("dead channels", 8, WIDTH),
        ("duplicate channels", 8, WIDTH),
        ("outliers of 1e4", 8, WIDTH),
        ("a NaN-free single token", 1, WIDTH),
    ],
)
def test_awkward_data_end_in_finite_solutions(tmp_path: Path, weights: str, what: str, count: int, width: int) -> None:
    net = network(1, width)
    data = samples(count, width=width, tokens=1 if "single" in what else 16)
    for feed in data:
        x = feed["x"]
        if what.startswith("constant"):
            x[:] = x[0, 0, 0]
        elif what == "zeros":
            x[:] = 0
        elif what.startswith("dead"):
            x[..., ::3] = 0
        elif what.startswith("duplicate"):
            x[..., 1::2] = x[..., ::2]
        elif what.startswith("outliers"):
            x[..., 5] = 1e4
    recipe = Recipe(weights=weights)
    store = solved(net, data, tmp_path, recipe)
    for array in content(store).values():
        assert np.isfinite(array).all()
    assert error(net, store, data, recipe) < 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_seeds(tmp_path: Path, seed: int) -> None:
    net, recipe = network(1), Recipe(seed=seed)
    assert error(net, solved(net, samples(16), tmp_path, recipe), samples(4, seed=9), recipe) < 0.25


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8", "w4a16", "w8a16"])
def test_schemes(tmp_path: Path, scheme: str) -> None:
    net, recipe = network(1), Recipe(scheme=scheme)
    bound = {"w4a8": 0.15, "w4a16": 0.15, "w8a8": 0.03, "w8a16": 0.02}[scheme]
    assert error(net, solved(net, samples(16), tmp_path, recipe), samples(4, seed=9), recipe) < bound


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("group_size", [0, 32])
def test_transforms(tmp_path: Path, transform: str, group_size: int) -> None:
    net, recipe = network(1), Recipe(transform=transform, group_size=group_size)
    store = solved(net, samples(16), tmp_path, recipe)
    assert error(net, store, samples(4, seed=9), recipe) < 0.5
    assert (store(next(iter(store))).left is not None) == transform_named(transform).has_pair


def test_groups_of_several_schemes(tmp_path: Path) -> None:
    net, recipe = network(1), Recipe(schemes=(("down", "w8a8"),))
    store = solved(net, samples(8), tmp_path, recipe)
    down = next(name for name in store if "down" in name)
    others = [name for name in store if name != down]
    assert np.abs(store(down).codes).max() > 8
    assert all(np.abs(store(name).codes).max() <= 8 for name in others)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    net, data = network(), samples(16)
    model, groups = net.model()
    store = reconstruct(model, groups, data, Recipe(), workdir=tmp_path, fingerprint="f", device="cuda", stacks=True, training=SHORT)
    assert error(net, store, samples(4, seed=9)) < 0.25
    assert torch.get_float32_matmul_precision() == "highest"


def test_broken_weights_and_activations_are_one_line(tmp_path: Path) -> None:
    net = network(1)
    data = samples(4)
    data[2]["x"][0, 3, 4] = np.nan
    with pytest.raises(CalibrationError, match=r"group '0\.q.*': NaN or Inf in its input"):
        solved(net, data, tmp_path / "a")
    proto = net.proto()
    weight = next(tensor for tensor in proto.graph.initializer if list(tensor.dims) == [WIDTH, WIDTH])
    array = onnx.numpy_helper.to_array(weight).copy()
    array[3, 3] = np.inf
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    path = tmp_path / "broken.onnx"
    onnx.save(proto, path)
    model = prepare(model_file.load(path))
    with pytest.raises(CalibrationError, match="its weights hold NaN or Inf"):
        reconstruct(model, find(model).groups, samples(2), Recipe(), workdir=tmp_path / "b", fingerprint="f", training=SHORT)


def test_training_that_diverges_is_said(tmp_path: Path) -> None:
    wild = Training(tokens=64, steps=30, rounding_steps=1, lr=1e30, clip_lr=1e30)
    with pytest.raises(CalibrationError, match="training diverged"):
        solved(network(1), samples(4), tmp_path, training=wild)


def test_operators_that_torch_does_not_run_here_are_said_before_training(tmp_path: Path) -> None:
    model = prepare(zoo.model("linear_in_if_body"))
    feeds = Samples([zoo.feeds(zoo.proto("linear_in_if_body"))])
    with pytest.raises(ModelError, match="use --reconstruct group"):
        reconstruct(model, find(model).groups, feeds, Recipe(), workdir=tmp_path, fingerprint="f", training=SHORT)


def test_a_build_by_blocks(tmp_path: Path) -> None:
    onnx.save(network().proto(), tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", x=np.concatenate([feed["x"] for feed in samples(24)]))
    recipe = Recipe(reconstruct="block", steps=10)
    report = build(tmp_path / "m.onnx", tmp_path / "out", recipe=recipe, calib_data=str(tmp_path / "calib.npz"))
    assert report.passed
    assert "observe" not in report.time
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["recipe"]["reconstruct"] == "block"
    assert all(0 < group["metrics"]["output_rel_l2"] < 0.5 for group in manifest["groups"])


# --- chunks -----------------------------------------------------------------------------------------------------------------------------


def test_feeds_of_equal_shapes_are_stacked_up_to_the_tokens(tmp_path: Path) -> None:
    feeds = [{"ids": np.full((1, length), index)} for index, length in enumerate([4, 6, 4, 4, 6, 4])]
    with Chunks(feeds, tmp_path, tokens=12, stacks=True) as chunks:
        assert sorted(chunks.rows) == [4, 12, 12]
        together = [chunks.feeds(index)["ids"][:, 0].tolist() for index in range(3)]
        assert sorted(together) == [[0, 2, 3], [1, 4], [5]]
    with Chunks(feeds, tmp_path, tokens=12, stacks=False) as chunks:
        assert len(chunks) == 6


def test_activations_beyond_memory_wait_on_disk(tmp_path: Path) -> None:
    feeds = [{"x": np.ones((1, 4, 8), np.float32)} for _ in range(3)]
    with Chunks(feeds, tmp_path, tokens=4, stacks=True, live_bytes=200) as chunks:
        for index in range(3):
            chunks.put("ahead", index, torch.full((1, 4, 8), float(index)))
            chunks.put("target", index, torch.full((1, 4, 8), -float(index)))
        assert list(tmp_path.glob("live-*/*.npy"))
        chunks.advance({"quantized": "ahead"})
        assert [float(chunks.get("quantized", index).mean()) for index in range(3)] == [0, 1, 2]
        with pytest.raises(KeyError):
            chunks.get("target", 0)
        assert chunks.feeds(1)["x"].shape == (1, 4, 8)
    assert not list(tmp_path.glob("live-*"))


def test_held_out_chunks_are_not_trained_on(tmp_path: Path) -> None:
    feeds = [{"x": np.ones((1, 4), np.int64)} for _ in range(2 * HELD_OUT + 1)]
    with Chunks(feeds, tmp_path, tokens=4, stacks=True) as chunks:
        assert list(chunks.held_out) == [HELD_OUT - 1, 2 * HELD_OUT - 1]
        assert not set(chunks.order(500, 0)) & set(chunks.held_out)
        assert chunks.order(50, 0) == chunks.order(50, 0) != chunks.order(50, 1)
    with Chunks(feeds[:3], tmp_path, tokens=4, stacks=True) as chunks:
        assert list(chunks.training) == [0, 1, 2]


def test_turns_of_chunks_are_spread_evenly(tmp_path: Path) -> None:
    feeds = [{"x": np.ones((1, tokens), np.int64)} for tokens in (8, 8, 4, 4)]
    with Chunks(feeds, tmp_path, tokens=1, stacks=True) as chunks:
        order = np.array(chunks.order(240, 0))
        for part in np.split(order, 4):
            counts = np.bincount(part, minlength=4)
            assert np.abs(counts - [20, 20, 10, 10]).max() <= 1
        assert [len(chunks.order(steps, 3)) for steps in (1, 2, 3, 7)] == [1, 2, 3, 7]


def test_copies_of_what_is_held_out_are_left_out(tmp_path: Path) -> None:
    feeds = [{"x": np.full((1, 2), index)} for index in range(4 * HELD_OUT)]
    copies = [(index, {"x": feed["x"] + 1000}) for index, feed in enumerate(feeds)]
    with Chunks(feeds, tmp_path, tokens=4, stacks=True, copies=copies) as chunks:
        assert list(chunks.held_out) == [HELD_OUT - 1, 2 * HELD_OUT - 1]
        seen = {chunk: set(chunks.feeds(chunk)["x"][:, 0].tolist()) for chunk in range(len(chunks))}
        unseen = {index + shift for chunk in chunks.held_out for index in seen[chunk] for shift in (0, 1000)}
        assert len(unseen) == 8
        trained = set().union(*(seen[chunk] for chunk in chunks.training))
        assert not trained & unseen
        assert len(trained) == 2 * (len(feeds) - 4)


def test_padding_counts_nowhere(tmp_path: Path) -> None:
    feeds = [
        {"x": np.ones((1, 3), np.int64), "mask": np.array([[1, 1, 0]])},
        {"x": np.ones((1, 3), np.int64), "mask": np.ones((1, 3), np.int64)},
    ]
    with Chunks(feeds, tmp_path, tokens=1, stacks=True, mask="mask") as chunks:
        keep = chunks.mask(0)
        assert keep is not None
        assert keep.tolist() == [[True, True, False]]
        assert chunks.mask(1) is None
    x = torch.tensor([[[1.0], [2.0], [9.0]]])
    assert kept(x, keep).tolist() == [[1.0], [2.0]]
    module = FloatGroup(torch.ones(1, 1))
    module.keep = keep
    module(x)
    assert module.absmax.tolist() == [2.0]
