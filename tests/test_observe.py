from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from fqonnx.calib import observe as module
from fqonnx.calib.observe import StatsStore, model_fingerprint, observe
from fqonnx.errors import CalibrationError
from fqonnx.model import load
from fqonnx.passes.groups import Linear, LinearGroup

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fqonnx.calib.solution import GroupStats

K = 24
Feeds = dict[str, np.ndarray[Any, Any]]


@dataclass
class Listed:
    feeds: list[Feeds]
    fingerprint: str = "data"
    passes: int = field(default=0)
    stop_at: int | None = None

    @property
    def length(self) -> int:
        return len(self.feeds)

    def __iter__(self) -> Iterator[Feeds]:
        self.passes += 1
        for index, feed in enumerate(self.feeds):
            if index == self.stop_at:
                raise KeyboardInterrupt
            yield feed


def three_linears(seed: int = 0) -> onnx.ModelProto:
    """x -> a (twice, one group) -> relu -> b -> neg -> c."""
    random = np.random.default_rng(seed)
    weights = [numpy_helper.from_array(random.standard_normal((K, K)).astype(np.float32), name) for name in ("w0", "w1", "w2", "w3")]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["q"], name="q_proj"),
        helper.make_node("MatMul", ["x", "w1"], ["k"], name="k_proj"),
        helper.make_node("Add", ["q", "k"], ["s"]),
        helper.make_node("Relu", ["s"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["b"], name="up_proj"),
        helper.make_node("Neg", ["b"], ["n"]),
        helper.make_node("MatMul", ["n", "w3"], ["c"], name="down_proj"),
    ]
    inputs = [helper.make_tensor_value_info("x", 1, ["batch", "seq", K]), helper.make_tensor_value_info("mask", 7, ["batch", "seq"])]
    graph = helper.make_graph(nodes, "g", inputs, [onnx.ValueInfoProto(name="c")], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def groups_of(model: ir.Model) -> list[LinearGroup]:
    by_input: dict[str, list[Linear]] = {}
    for node in model.graph:
        if node.op_type == "MatMul":
            source = node.inputs[0]
            assert source is not None
            linear = Linear(node.name or "", source, node.outputs[0], (node,), K, K, lambda: np.zeros((K, K), np.float32))
            by_input.setdefault(source.name or "", []).append(linear)
    return [LinearGroup("+".join(one.name for one in found), found[0].input, tuple(found)) for found in by_input.values()]


def samples(sizes: Sequence[int] = (40, 13, 7, 64, 1), seed: int = 3) -> list[Feeds]:
    random = np.random.default_rng(seed)
    made = []
    for size in sizes:
        x = random.standard_normal((1, size, K)).astype(np.float32) * np.linspace(0.1, 30, K, dtype=np.float32)
        made.append({"x": x, "mask": np.ones((1, size), np.int64)})
    return made


def values_in_numpy(model: onnx.ModelProto, x: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    w = [numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer]
    x = x.reshape(-1, K).astype(np.float64)
    h = np.maximum(x @ w[0] + x @ w[1], 0)
    return {"q_proj+k_proj": x, "up_proj": h, "down_proj": -(h @ w[2])}


def run(workdir: Path, source: Any, model: ir.Model | None = None, **options: Any) -> tuple[StatsStore, list[LinearGroup]]:
    model = model or ir.from_proto(three_linears())
    groups = groups_of(model)
    return observe(model, groups, source, workdir=workdir, **{"threads": 1, "reservoir_tokens": 50, **options}), groups


def contents(store: StatsStore) -> dict[str, tuple[bytes, bytes | None, bytes, int]]:
    loaded = {name: store.load(name) for name in store}
    return {
        name: (s.tokens.tobytes(), None if s.hessian is None else s.hessian.tobytes(), s.absmax.tobytes(), s.count)
        for name, s in loaded.items()
    }


@pytest.mark.parametrize("segment_bytes", [K * K * 4 * 2, 1 << 30])
def test_statistics_are_those_of_all_rows(tmp_path: Path, segment_bytes: int) -> None:
    feeds = samples()
    store, groups = run(tmp_path, Listed(feeds), segment_bytes=segment_bytes)
    expected = values_in_numpy(three_linears(), np.concatenate([feed["x"][0] for feed in feeds]))
    assert list(store) == [group.name for group in groups] == list(expected)
    for name, rows in expected.items():
        stats = store.load(name)
        assert stats.count == len(rows) == 125
        assert stats.hessian is not None
        assert {array.dtype for array in (stats.tokens, stats.hessian, stats.absmax)} == {np.dtype(np.float32)}
        np.testing.assert_allclose(stats.absmax, np.abs(rows).max(0), rtol=1e-5)
        hessian = rows.T @ rows / len(rows)
        scale = np.sqrt(np.outer(np.diag(hessian), np.diag(hessian)))
        assert np.abs(stats.hessian - hessian).max() < 1e-5 * scale.max()
        assert np.array_equal(stats.hessian, stats.hessian.T)
        assert stats.tokens.shape == (50, K)
        distance = np.abs(stats.tokens[:, None] - rows[None]).max(-1)
        nearest = distance.argmin(1)
        assert distance.min(1).max() < 1e-3
        assert len(set(nearest)) == 50, "rows are drawn without replacement"


@pytest.mark.parametrize("rows", [700, 2 * 2048 + 5])
def test_a_wide_hessian_is_whole_and_symmetric(rows: int) -> None:
    # Wider than a panel and longer than a block: every path of the blocked product.
    width = 515
    group = wide_group(width)
    x = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    running = module._Running(group, 0, module._BLOCK_ROWS, seed=0)
    for part in np.array_split(x, 3):
        running.add(module._rows(part, None), 0)
    hessian = running.finish().hessian
    assert hessian is not None
    expected = x.T.astype(np.float64) @ x / rows
    np.testing.assert_allclose(hessian, expected, atol=1e-5)
    assert np.array_equal(hessian, hessian.T)


def wide_group(width: int) -> LinearGroup:
    value = ir.Value(name="v")
    linear = Linear("l", value, value, (), 1, width, lambda: np.zeros((1, width), np.float32))
    return LinearGroup("wide", value, (linear,))


@pytest.mark.parametrize("batches", [[1, 2], [3000, 1], [1] * 40 + [2048, 2048, 5, 900]])
def test_statistics_do_not_depend_on_how_rows_are_batched(batches: list[int]) -> None:
    total = 5041
    x = np.random.default_rng(0).standard_normal((total, K)).astype(np.float32)

    def stats(sizes: list[int]) -> GroupStats:
        running = module._Running(wide_group(K), 100, module._BLOCK_ROWS, seed=7)
        for part in np.split(x, np.cumsum(sizes)):
            running.add(module._rows(part.copy(), None), 0)
        return running.finish()

    whole, parts = stats([]), stats(batches)
    assert np.array_equal(whole.tokens, parts.tokens)
    assert whole.hessian is not None
    assert parts.hessian is not None
    assert np.array_equal(whole.hessian, parts.hessian)
    assert np.array_equal(whole.absmax, parts.absmax)
    assert whole.count == parts.count == total


def test_the_reservoir_is_uniform_over_the_stream() -> None:
    size, total, draws = 20, 400, 300
    hits = np.zeros(total)
    rows = np.repeat(np.arange(total, dtype=np.float32)[:, None], 2, 1)
    for seed in range(draws):
        running = module._Running(wide_group(2), size, 0, seed)
        for part in np.array_split(rows, 7):
            running.add(module._rows(part.copy(), None), 0)
        chosen = running.finish().tokens[:, 0].astype(int)
        assert len(set(chosen)) == size
        hits[chosen] += 1
    expected = draws * size / total
    deviations = (hits.reshape(20, -1).sum(1) - 20 * expected) / np.sqrt(20 * expected)
    assert np.abs(deviations).max() < 4
    assert hits.min() > 0


def test_a_reservoir_that_is_not_filled_holds_every_row_in_order(tmp_path: Path) -> None:
    feeds = samples((3, 5))
    store, _ = run(tmp_path, Listed(feeds))
    assert np.array_equal(store.load("q_proj+k_proj").tokens, np.concatenate([feed["x"][0] for feed in feeds]))


def test_groups_draw_differently_and_seeds_too(tmp_path: Path) -> None:
    x = np.arange(1000, dtype=np.float32)[:, None]
    chosen = []
    for name, seed in (("a", 0), ("b", 0), ("a", 1), ("a", 0)):
        group = wide_group(1)
        running = module._Running(LinearGroup(name, group.input, group.linears), 10, 0, seed)
        running.add(module._rows(x.copy(), None), 0)
        chosen.append(tuple(running.finish().tokens[:, 0]))
    assert len(set(chosen)) == 3
    assert chosen[0] == chosen[3]


def test_a_budget_splits_the_work_and_changes_no_bit(tmp_path: Path) -> None:
    one_by_one = Listed(samples())
    small, _ = run(tmp_path / "small", one_by_one, memory_budget=1)
    large, _ = run(tmp_path / "large", Listed(samples()))
    assert contents(small) == contents(large)
    assert one_by_one.passes == 1, "the source is read once, however many passes it takes"


def test_the_split_keeps_to_the_budget() -> None:
    costs = {name: module._cost(features, 10, hessian=True) for name, features in (("a", 10), ("b", 20), ("c", 30), ("d", 5))}
    budget = costs["a"] + costs["b"]
    portions = list(module._split(list(costs), costs, budget))
    assert portions == [["a", "b"], ["c"], ["d"]]
    assert all(sum(costs[name] for name in portion) <= budget or len(portion) == 1 for portion in portions)


def test_only_what_is_needed_is_kept(tmp_path: Path) -> None:
    store, _ = run(tmp_path, Listed(samples()), needs_tokens=False, needs_hessian=False)
    stats = store.load("up_proj")
    assert stats.hessian is None
    assert stats.tokens.shape == (0, K)
    assert stats.count == 125


def test_fewer_rows_than_channels_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "many", Listed(samples((K, 1))))
    assert not caplog.records
    _, groups = run(tmp_path / "few", Listed(samples((K - 1,))))
    assert f"{len(groups)} of {len(groups)} groups saw fewer rows than they have channels" in caplog.text
    assert f"({K - 1} rows, {K} channels)" in caplog.text


def test_masked_rows_do_not_count(tmp_path: Path) -> None:
    feeds = samples((6, 4))
    feeds[0]["mask"][0, 4:] = 0
    feeds[0]["x"][0, 4:] = 1e6
    store, _ = run(tmp_path, Listed(feeds), mask="mask", segment_bytes=K * K * 4 * 2)
    kept = np.concatenate([feeds[0]["x"][0, :4], feeds[1]["x"][0]])
    assert np.array_equal(store.load("q_proj+k_proj").tokens, kept)
    assert {store.load(name).count for name in store} == {8}


@pytest.mark.parametrize("stop_at", [0, 2])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    whole, _ = run(tmp_path / "whole", Listed(samples()))
    options = {"memory_budget": 1}  # a pass and a file for each group
    source = Listed(samples())
    saved: list[str] = []
    original = StatsStore.save

    def stopping(self: StatsStore, name: str, stats: GroupStats) -> None:
        if len(saved) == stop_at:
            raise KeyboardInterrupt
        saved.append(name)
        original(self, name, stats)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StatsStore, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", source, **options)
    assert len(list((tmp_path / "cut" / "stats").iterdir())) == stop_at
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "stats").iterdir()}
    resumed, _ = run(tmp_path / "cut", source, **options)
    assert contents(resumed) == contents(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "what was done is not done again"


def test_nothing_is_read_when_everything_is_there(tmp_path: Path) -> None:
    source = Listed(samples())
    run(tmp_path, source)
    run(tmp_path, source)
    assert source.passes == 1


@pytest.mark.parametrize("change", ["data", "seed", "tokens", "model", "mask"])
def test_statistics_of_something_else_are_not_reused(tmp_path: Path, change: str) -> None:
    run(tmp_path, Listed(samples()))
    source = Listed(samples(), fingerprint="other" if change == "data" else "data")
    options: dict[str, Any] = {"seed": {"seed": 1}, "tokens": {"reservoir_tokens": 9}, "mask": {"mask": "mask"}}.get(change, {})
    run(tmp_path, source, ir.from_proto(three_linears(seed=9)) if change == "model" else None, **options)
    assert source.passes == 1


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    store, _ = run(tmp_path, Listed(samples()))
    good = contents(store)
    path = store.path("up_proj")
    path.write_bytes(path.read_bytes()[:100])
    assert not store.has("up_proj")
    with pytest.raises(CalibrationError, match="group 'up_proj' has no statistics: run the build again"):
        store.load("up_proj")
    source = Listed(samples())
    again, _ = run(tmp_path, source)
    assert source.passes == 1
    assert contents(again) == good


def test_the_store_drops_what_nobody_needs(tmp_path: Path) -> None:
    store, _ = run(tmp_path, Listed(samples()))
    store.drop("up_proj")
    store.drop("up_proj")
    assert [name for name in store if store.has(name)] == ["q_proj+k_proj", "down_proj"]
    assert len(store) == 3


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
def test_bad_activations_name_group_and_sample(tmp_path: Path, value: float, kind: str) -> None:
    feeds = samples()
    feeds[3]["x"][0, 5, 2] = value
    with pytest.raises(CalibrationError, match=rf"^group 'q_proj\+k_proj': {kind} in its input at sample 3: check"):
        run(tmp_path, Listed(feeds))


def test_a_group_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"^group 'q_proj\+k_proj' got no rows: .*--keep"):
        run(tmp_path, Listed(samples((0,))))


def test_a_width_that_is_not_the_weights_is_an_error() -> None:
    running = module._Running(wide_group(4), 1, 0, 0)
    with pytest.raises(CalibrationError, match="its input has 5 channels, its weights 4"):
        running.add(module._rows(np.zeros((2, 5), np.float32), None), 0)


def test_half_precision_and_read_only_rows_are_taken() -> None:
    x = np.ones((2, 3, 4), np.float16)
    x.flags.writeable = False
    rows = module._rows(x, None)
    assert rows.shape == (6, 4)
    assert rows.numpy().dtype == np.float32
    frozen = np.ones((2, 4), np.float32)
    frozen.flags.writeable = False
    assert module._rows(frozen, None).shape == (2, 4)


def test_the_fingerprint_is_of_what_a_model_computes(tmp_path: Path) -> None:
    base = model_fingerprint(ir.from_proto(three_linears()))
    assert model_fingerprint(ir.from_proto(three_linears())) == base
    documented = three_linears()
    documented.graph.node[0].doc_string = "a note"
    helper.set_model_props(documented, {"author": "someone"})
    assert model_fingerprint(ir.from_proto(documented)) == base
    changed = [three_linears(seed=1), three_linears(), three_linears(), three_linears()]
    changed[1].graph.node[3].op_type = "Abs"
    changed[2].graph.node[5].attribute.append(helper.make_attribute("alpha", 2.0))
    changed[3].opset_import[0].version = 22
    digests = {model_fingerprint(ir.from_proto(proto)) for proto in changed}
    assert len(digests | {base}) == 5


def test_the_fingerprint_notices_external_weights_written_anew(tmp_path: Path) -> None:
    onnx.save(three_linears(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    first = model_fingerprint(load(tmp_path / "m.onnx"))
    assert model_fingerprint(load(tmp_path / "m.onnx")) == first
    stat = (tmp_path / "m.data").stat()
    os.utime(tmp_path / "m.data", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert model_fingerprint(load(tmp_path / "m.onnx")) != first
