"""Sensitivity: what a group alone does to the model's outputs, in every form of graph; the estimate; allocations that builds obey."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fqonnx import sensitivity as sensitivity_module
from fqonnx.artifact import open_artifact
from fqonnx.build import Data, build
from fqonnx.calib.data.holdout import Part
from fqonnx.errors import ArtifactError, DataError, UsageError
from fqonnx.metrics import Divergence, LogitsDivergence
from fqonnx.passes.linears import find_for
from fqonnx.passes.prepare import prepare
from fqonnx.passes.quantize import Quantize
from fqonnx.recipe import ALLOCATIONS, SCHEMES, Recipe
from fqonnx.report import load_report
from fqonnx.report.mixed_html import render
from fqonnx.sensitivity import MIX, Mix, load_sensitivity, sensitivity, spread
from fqonnx.sensitivity_measure import Probe, RunningError
from tests import rewriting, runtime, zoo
from tests.cli_support import HIDDEN, K, one_line, run, write_data, write_language_model, write_mlp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

PLAIN = Recipe(transform="none", weights="rtn")
SEVERAL = [name for name, case in zoo.ZOO.items() if case.runs and case.groups]


def prepared(name: str) -> tuple[ir.Model, Recipe, list[dict[str, npt.NDArray[Any]]]]:
    proto = zoo.proto(name)
    options = zoo.ZOO[name].options
    recipe = Recipe(
        transform="none",
        weights="rtn",
        keep=tuple(options.get("keep", ())),
        quantize_head=options.get("quantize_head", False),
        group_size=options.get("group_size", 0),
    )
    return prepare(ir.from_proto(proto)), recipe, [zoo.feeds(proto, seed) for seed in (0, 1)]


@pytest.mark.parametrize("name", SEVERAL)
def test_a_group_alone_is_measured_as_in_the_whole_model(name: str, tmp_path: Path) -> None:
    """Only what lies behind a group is run; the figure is that of the whole model with this group quantized."""
    model, recipe, feeds = prepared(name)
    groups = find_for(model, recipe).groups
    solutions = rewriting.solve(groups, SCHEMES["w4a4"], group_size=recipe.group_size)
    outputs = [value.name or "" for value in model.graph.outputs]
    references = [runtime.run(model, feed) for feed in feeds]
    measured = {}
    with Probe(model, recipe, feeds, tmp_path) as probe:
        for group, cut in probe.groups():
            measured[group] = cut.quantized(solutions.__getitem__, recipe)
            assert cut.gain() >= 0
    assert set(measured) == {group.name for group in groups}
    assert not list(tmp_path.iterdir())
    for name_, error in measured.items():
        whole = model.clone()
        Quantize([g for g in find_for(whole, recipe).groups if g.name == name_], solutions.__getitem__, recipe)(whole)
        RemoveUnusedNodesPass()(whole)
        errors = {output: Divergence() for output in outputs}
        for feed, reference in zip(feeds, references, strict=True):
            found = runtime.run(whole, feed)
            for output in outputs:
                errors[output].update(reference[output], found[output])
        assert error.rel_l2 == pytest.approx(max(e.rel_l2 for e in errors.values()), rel=1e-3, abs=1e-6)


def test_the_gain_is_what_arrives_of_a_small_error(tmp_path: Path) -> None:
    """``tanh`` of nearly nothing passes an error on as it is, beside a constant that dwarfs the group's part of the output."""
    b = rewriting.Builder()
    x = b.input("x", ["batch", 64])
    y = b.node("Mul", [b.linear(x, 64, 48, "fc"), b.constant("small", np.full(1, 1e-3, np.float32))], "scaled")
    passed = b.node("Tanh", [y], "tanh")
    b.output(b.node("Add", [passed, b.constant("c", np.full(48, 0.01, np.float32))], "sum"), ["batch", 48])
    proto = b.model()
    model = prepare(ir.from_proto(proto))
    feeds = [{"x": np.random.default_rng(1).normal(size=(200, 64)).astype(np.float32)}]
    small = runtime.run(model, feeds[0], [passed])[passed]
    (total,) = runtime.run(model, feeds[0]).values()
    with Probe(model, PLAIN, feeds, tmp_path) as probe:
        ((_, cut),) = probe.groups()
        assert cut.gain() == pytest.approx(np.linalg.norm(small) / np.linalg.norm(total), rel=0.05)


def test_an_output_that_is_the_groups_own_has_the_gain_one(tmp_path: Path) -> None:
    model, recipe, feeds = prepared("matmul")
    with Probe(model, recipe, feeds, tmp_path) as probe:
        assert [cut.gain() for _, cut in probe.groups()] == [pytest.approx(1.0)]


def test_the_divergence_is_that_of_the_metrics_and_exact_where_it_is_small() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 30, 50)).astype(np.float32) * 4
    for size in (1.0, 1e-2, 1e-4):
        changed = logits + size * rng.normal(size=logits.shape).astype(np.float32)
        error, expected, distance = RunningError(logits=True), LogitsDivergence(), Divergence()
        for one, other in zip(logits, changed, strict=True):
            error.add(one, other)
            expected.update(one, other)
            distance.update(one, other)
        assert error.kl == pytest.approx(expected.kl, rel=1e-3)
        assert error.rel_l2 == pytest.approx(distance.rel_l2, rel=1e-5)


def test_errors_of_what_is_not_finite() -> None:
    one = np.array([[1.0, -np.inf, np.inf]], np.float32)
    error = RunningError(logits=True)
    error.add(one, one)
    assert (error.rel_l2, error.is_float) == (0, True)
    error.add(one, np.array([[np.nan, -np.inf, np.inf]], np.float32))
    assert math.isnan(error.rel_l2)
    zero = RunningError(logits=False)
    zero.add(np.zeros(2, np.float32), np.zeros(2, np.float32))
    assert zero.rel_l2 == 0
    zero.add(np.zeros(2, np.float32), np.ones(2, np.float32))
    assert zero.rel_l2 == math.inf
    whole = RunningError(logits=False)
    whole.add(np.zeros(2, np.int64), np.ones(2, np.int64))
    assert not whole.is_float


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples to measure on"):
        Probe(*prepared("matmul")[:2], [], tmp_path)


# --- the whole ---------------------------------------------------------------------------------------------------------------------------

HADAMARD = Recipe(transform="hadamard", weights="rtn")
"""Needs no training and no processes; schemes differ as they do with everything."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six groups, its data, and its sensitivities in ``known``."""
    folder = tmp_path_factory.mktemp("sensitivity")
    write_mlp(folder / "m.onnx", layers=3)
    write_data(folder / "d.npz", 120)
    sensitivity(folder / "m.onnx", folder / "known", recipe=HADAMARD, calib_data=str(folder / "d.npz"), keep_work=True)
    return folder


def test_every_group_is_measured_and_estimated_in_every_scheme(place: Path) -> None:
    report = sensitivity(place / "m.onnx", recipe=HADAMARD, calib_data=str(place / "d.npz"))
    assert report.schemes == MIX
    assert [group.name for group in report.groups] == [f"layers.{i}.{part}" for i in range(3) for part in ("up", "down")]
    assert report.measure == "rel_l2"
    for group in report.groups:
        assert group.parameters == K * HIDDEN
        errors = {error.scheme: error for error in group.errors}
        assert errors["w4a4"].error > 2 * errors["w8a8"].error > 0
        assert errors["float"].error == 0
        for scheme in ("w4a4", "w4a8", "w8a8"):
            # First order: the group's own error times the gain; the directions of a rounding error are not quite random.
            assert errors[scheme].estimate == pytest.approx(errors[scheme].rel_l2, rel=0.4)
    uniform = {point.label: point for point in report.curve if point.label}
    assert set(uniform) == set(MIX)
    assert uniform["w4a4"].predicted == pytest.approx(math.sqrt(sum(g.of("w4a4").error ** 2 for g in report.groups)))
    assert uniform["w4a4"].measured == pytest.approx(uniform["w4a4"].predicted, rel=0.5)
    assert uniform["w8a8"].weight_bytes == 2 * uniform["w4a4"].weight_bytes == 6 * K * HIDDEN
    best = [point for point in report.curve if not point.label]
    assert [p.average_bits for p in best] == sorted(p.average_bits for p in best)
    assert [p.predicted for p in best] == sorted((p.predicted for p in best), reverse=True)
    assert sum(p.measured is not None for p in best) >= 4


def test_samples_are_counted_whatever_the_batch(place: Path) -> None:
    data = {"calib_data": str(place / "d.npz"), "schemes": ("w8a8",), "estimate": True, "recipe": HADAMARD}
    assert [sensitivity(place / "m.onnx", **data, samples=12, batch_size=size).samples for size in (1, 6, 200)] == [12, 12, 12]


def test_samples_are_spread_over_the_data_whatever_the_batches() -> None:
    class Batches:
        fingerprint, length = "", 3

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for first, size in ((0, 6), (6, 1), (7, 5)):
                yield {"x": np.arange(first, first + size)}

    part = Part(Batches(), 0, 10, (6, 1, 5))
    data = Data("", False, part, part, {}, (), 0)
    assert [feeds["x"].tolist() for feeds in spread(data, 5)] == [[1, 3, 5], [7, 9]]
    assert [feeds["x"].tolist() for feeds in spread(data, 99)] == [[0, 1, 2, 3, 4, 5], [6], [7, 8, 9]]


def test_estimates_alone(place: Path) -> None:
    report = sensitivity(place / "m.onnx", recipe=HADAMARD, calib_data=str(place / "d.npz"), schemes=("w4a4", "w8a8"), estimate=True)
    measured = load_sensitivity(place / "known", report.fingerprint, HADAMARD, ("w4a4", "w8a8"))
    assert [g.errors[0].estimate for g in report.groups] == [g.errors[0].estimate for g in measured.groups]
    assert all(error.rel_l2 is None for group in report.groups for error in group.errors)
    assert all(point.measured is None for point in report.curve)
    assert "estimated" in render(report)


def test_logits_are_measured_by_their_divergence(tmp_path: Path) -> None:
    model = write_language_model(tmp_path / "lm.onnx")
    np.savez(tmp_path / "d.npz", input_ids=np.random.default_rng(0).integers(0, 50, (20, 8)))
    recipe = Recipe(transform="none", weights="rtn", quantize_head=True)
    report = sensitivity(model, recipe=recipe, calib_data=str(tmp_path / "d.npz"), schemes=("w4a4", "w8a8", "float"))
    assert report.measure == "kl"
    for group in report.groups:
        assert group.of("w4a4").kl > 10 * group.of("w8a8").kl > 0
        assert group.of("float").kl == 0
    points = {point.label: point for point in report.curve}
    assert points["w8a8"].predicted == pytest.approx(sum(group.of("w8a8").kl for group in report.groups))


def test_a_learned_transform_is_learned_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solves = []
    solve = sensitivity_module.solve

    def counted(groups: Any, stats: Any, recipe: Recipe, **more: Any) -> Any:
        solves.append((recipe.for_group("any").scheme, more["base"] is not None))
        return solve(groups, stats, recipe, **more)

    monkeypatch.setattr(sensitivity_module, "solve", counted)
    recipe, model = Recipe(steps=3, weights="rtn"), write_mlp(tmp_path / "m.onnx")
    report = sensitivity(model, recipe=recipe, schemes=("w8a16", "w4a8", "w4a4"), calib_data=str(place / "d.npz"), samples=2)
    # From the fewest bits up; w8a16 takes no transform, so there is nothing to take over.
    assert solves == [("w4a4", False), ("w4a8", True), ("w8a16", False)]
    assert all(group.of("w4a4").error > group.of("w4a8").error > group.of("w8a16").error for group in report.groups)


@pytest.mark.parametrize("method", ALLOCATIONS)
@pytest.mark.parametrize("avg_bits", [4.5, 7])
def test_a_build_obeys_its_budget_and_says_what_each_group_got(place: Path, tmp_path: Path, avg_bits: float, method: str) -> None:
    mix = Mix(avg_bits=avg_bits, method=method, known=place / "known")
    out = tmp_path / "out"
    report = build(place / "m.onnx", out, recipe=HADAMARD, calib_data=str(place / "d.npz"), mix=mix)
    assert report.allocation is not None
    assert avg_bits - 0.7 <= report.allocation.average_bits <= avg_bits
    artifact = open_artifact(out)
    schemes = {group["name"]: group["scheme"] for group in artifact.groups}
    assert schemes == report.allocation.schemes == artifact.manifest["allocation"]["schemes"] == artifact.manifest["recipe"]["schemes"]
    assert len(set(schemes.values())) > 1
    # What the manifest says is what the model holds.
    held = {tensor.name: tensor.data_type for tensor in onnx.load(artifact.model).graph.initializer}
    for name, scheme in schemes.items():
        bits = SCHEMES[scheme].weight_bits
        assert held[f"{name}.weight_int{bits}"] == (onnx.TensorProto.INT4 if bits == 4 else onnx.TensorProto.INT8)
    ops = {group["scheme"]: group["kernel"]["op"] for group in artifact.groups}
    expected = {"w4a4": "fqonnx.W4A4Gemm", "w4a8": "fqonnx.W4A4Gemm", "w8a8": "FlatQuantize + DequantizeLinear + MatMul"}
    assert all(ops[scheme] == expected[scheme] for scheme in ops)
    assert report.allocation.measured == pytest.approx(report.allocation.predicted, rel=0.5)
    assert load_report(out / "report.json") == report


def test_blocks_are_reconstructed_in_the_schemes_that_were_chosen(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is what is built: the groups as their blocks' training left them."""
    recipe = replace(HADAMARD, reconstruct="block", steps=4)
    mix = Mix(schemes=("w4a4", "w8a8"), avg_bits=6, known=place / "known")
    # Blocks gather what they need themselves; where the sensitivities are known nothing else is read off the float model.
    monkeypatch.setattr("fqonnx.build.observe_groups", None)
    report = build(place / "m.onnx", tmp_path / "out", recipe=recipe, calib_data=str(place / "d.npz"), mix=mix)
    assert report.allocation is not None
    assert report.allocation.average_bits == 6
    assert {group.name: group.scheme for group in report.groups} == report.allocation.schemes
    assert report.allocation.measured == pytest.approx(report.outputs["y"].rel_l2, rel=0.3)


def test_every_scheme_in_one_model(place: Path, tmp_path: Path) -> None:
    """Built, and run by ONNX Runtime beside the float model; what multiplies in each group is in the manifest."""
    gemm, qdq, weights = "fqonnx.W4A4Gemm", "FlatQuantize + DequantizeLinear + MatMul", "DequantizeLinear + MatMul"
    wanted = {
        "layers.0.up": ("w4a4", gemm),
        "layers.0.down": ("w4a8", gemm),
        "layers.1.up": ("w8a8", qdq),
        "layers.1.down": ("w4a16", weights),
        "layers.2.up": ("w8a16", weights),
    }
    schemes = [f"--group-scheme={name}={scheme}" for name, (scheme, _) in wanted.items()]
    data = ("--calib-data", place / "d.npz", "--transform", "hadamard", "--weights", "rtn")
    done = run(
        "build", place / "m.onnx", "-o", tmp_path / "out", *data, *schemes, "--group-scheme", "2.down=float", "--max-error", "0.3", "-q"
    )
    assert done.code == 0, done.stderr
    artifact = open_artifact(tmp_path / "out")
    assert {group["name"]: (group["scheme"], group["kernel"]["op"]) for group in artifact.groups} == wanted
    transforms = {group["scheme"]: group["transform"]["name"] for group in artifact.groups}
    assert transforms == {"w4a4": "hadamard", "w4a8": "hadamard", "w8a8": "hadamard", "w4a16": "hadamard", "w8a16": "none"}
    assert artifact.manifest["left_in_float"][0]["name"] == "layers.2.down"
    report = load_report(artifact.report)
    assert 0.02 < report.outputs["y"].rel_l2 < 0.3
    assert {group.name: group.activation_bits for group in report.groups}["layers.1.down"] == 16
    shown = json.loads(run("inspect", place / "m.onnx", *schemes, "--group-scheme", "2.down=float", "--json").stdout)
    assert [item["name"] for item in shown["groups"]] == list(wanted)


def test_more_bits_less_error(place: Path, tmp_path: Path) -> None:
    errors = []
    for avg_bits in (4, 6, 8):
        mix = Mix(avg_bits=avg_bits, known=place / "known")
        report = build(place / "m.onnx", tmp_path / str(avg_bits), recipe=HADAMARD, calib_data=str(place / "d.npz"), mix=mix)
        errors.append(report.outputs["y"].rel_l2)
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("max_error", [0.1, 0.02])
def test_the_fewest_bits_whose_measured_error_is_within_the_bound(place: Path, tmp_path: Path, max_error: float) -> None:
    mix = Mix(schemes=("w4a4", "w4a8", "w8a8", "float"), known=place / "known")
    report = build(place / "m.onnx", tmp_path / "out", recipe=HADAMARD, calib_data=str(place / "d.npz"), mix=mix, max_error=max_error)
    assert report.allocation is not None
    assert report.allocation.max_error == max_error
    assert 0.3 * max_error < report.allocation.measured <= max_error
    assert 4 < report.allocation.average_bits <= (8 if max_error > 0.05 else 12)
    assert report.outputs["y"].rel_l2 < 1.2 * max_error  # on other samples


def test_groups_that_are_left_in_float_are_not_in_the_model_otherwise(place: Path, tmp_path: Path) -> None:
    mix = Mix(schemes=("w4a4", "float"), avg_bits=9, known=place / "known")
    report = build(place / "m.onnx", tmp_path / "out", recipe=HADAMARD, calib_data=str(place / "d.npz"), mix=mix)
    assert report.allocation is not None
    kept = [name for name, scheme in report.allocation.schemes.items() if scheme == "float"]
    assert 1 <= len(kept) <= 2
    assert {left.name: left.reason for left in report.left_in_float} == dict.fromkeys(kept, "its group is given the scheme float")
    assert len(report.groups) == 6 - len(kept)


def test_what_was_solved_for_the_sensitivities_is_not_solved_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []
    monkeypatch.setattr("fqonnx.calib.solve._solve_here", lambda group, *_: solved.append(group))
    mix = Mix(avg_bits=4, known=place / "known")
    report = build(place / "m.onnx", tmp_path / "out", recipe=HADAMARD, calib_data=str(place / "d.npz"), mix=mix)
    assert report.allocation is not None
    assert set(report.allocation.schemes.values()) == {"w4a4"}
    assert not solved


def test_the_report_shows_the_heat_map_and_the_curve(place: Path, tmp_path: Path) -> None:
    page = (place / "known" / "report.html").read_text()
    assert page.count("<td class='number warm'") == 6 * 4  # groups by schemes; float has no error
    heats = [float(heat) for heat in re.findall(r"--heat:([\d.]+)", page)]
    assert (min(heats), max(heats)) == (0, 1)
    assert "id='curve'" in page
    assert page.count("<circle class='uniform'") == 4  # float has no place on a logarithmic axis
    mix = Mix(avg_bits=5, known=place / "known")
    report = build(place / "m.onnx", tmp_path / "out", recipe=HADAMARD, calib_data=str(place / "d.npz"), mix=mix)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<td class='number warm'") + page.count("<td class='number warm chosen'") == 6 * 4
    assert page.count("<td class='number warm chosen'") == 6
    assert page.count("<circle class='chosen'") == 1
    assert report.allocation is not None
    assert f"{report.allocation.average_bits:.3f} (" in page
    assert f"mixed schemes, {report.allocation.average_bits:.2f} bits on average" in page


def test_sensitivities_of_something_else_are_refused(place: Path, tmp_path: Path) -> None:
    fingerprint = json.loads((place / "known" / "sensitivity.json").read_text())["fingerprint"]
    assert load_sensitivity(place / "known", fingerprint, HADAMARD, ("w8a8",)).schemes == ("w8a8",)
    with pytest.raises(UsageError, match="is of another model"):
        load_sensitivity(place / "known", "other", HADAMARD, MIX)
    with pytest.raises(UsageError, match="measured with weights 'rtn', this build has 'gptq'"):
        load_sensitivity(place / "known", fingerprint, Recipe(transform="hadamard", weights="gptq"), MIX)
    with pytest.raises(UsageError, match="has no figures for w4a16"):
        load_sensitivity(place / "known", fingerprint, HADAMARD, ("w4a4", "w4a16"))
    with pytest.raises(ArtifactError, match=r"holds no sensitivity\.json: give the -o"):
        load_sensitivity(tmp_path, fingerprint, HADAMARD, MIX)
    (tmp_path / "sensitivity.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_sensitivity(tmp_path, fingerprint, HADAMARD, MIX)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mix", "w4a4,w3a3"), "unknown scheme 'w3a3' in --mix: choose from w4a4"),
        (("--mix", "w4a4,w4a4"), "--mix names a scheme twice"),
        (("--mix", "float"), "--mix quantizes nothing"),
        (("--avg-bits", "4.5", "--group-scheme", "up=w4a8"), "exclude each other"),
        (("--sensitivity", "known"), "--sensitivity says what schemes cost: say what to choose"),
        (("--group-scheme", "w4a8"), "--group-scheme 'w4a8' is no pair: write REGEX=SCHEME"),
        (("--avg-bits", "3", "--mix", "w4a4,w8a8"), "--avg-bits 3 is less than the schemes allow: give 4 or more"),
        (("--mix", "w4a4,w8a8", "--max-error", "1e-6"), "no choice among the schemes keeps the error within --max-error"),
    ],
)
def test_bad_choices_are_told(place: Path, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    chosen = ("--transform", "hadamard", "--weights", "rtn", "--calib-data", place / "d.npz")
    done = run("build", place / "m.onnx", "-o", tmp_path / "out", *chosen, *options)
    assert done.code == 2
    assert words in one_line(done.stderr.splitlines()[-1])
    assert not (tmp_path / "out").exists()


def test_without_a_bound_there_is_nothing_to_choose_by(place: Path, tmp_path: Path) -> None:
    done = run("build", place / "m.onnx", "-o", tmp_path / "out", "--random-calibration", "--mix", "w4a4,w8a8")
    assert done.code == 2
    assert "--mix needs a bound: give --avg-bits or --max-error" in one_line(done.stderr)


def test_the_command_shows_the_worst_first(place: Path) -> None:
    data = ("--calib-data", place / "d.npz", "--transform", "none", "--weights", "rtn")
    done = run("sensitivity", place / "m.onnx", *data, "--mix", "w4a4,w8a8", "--samples", "3")
    assert done.code == 0
    rows = re.findall(r"layers\.\d\.\w+ .*?([\d.]+) % +([\d.]+) %", done.stdout)
    assert len(rows) == 6
    assert [float(row[0]) for row in rows] == sorted((float(row[0]) for row in rows), reverse=True)
    assert "measured on 3" in done.stdout
    report = json.loads(run("sensitivity", place / "m.onnx", *data, "--mix", "w4a4", "--json", "-q").stdout)
    assert [group["name"] for group in report["groups"]][:2] == ["layers.0.up", "layers.0.down"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scheme", "w4a8"), "name the schemes to try with --mix"),
        (("--keep-work",), "--keep-work, --resume and --force are about a folder: give one with -o"),
    ],
)
def test_options_of_the_command_that_make_no_sense(place: Path, options: tuple[str, ...], words: str) -> None:
    done = run("sensitivity", place / "m.onnx", "--calib-data", place / "d.npz", *options)
    assert done.code == 2
    assert words in one_line(done.stderr)


def test_a_folder_of_sensitivities_is_no_build_and_is_not_replaced_unasked(place: Path) -> None:
    done = run("sensitivity", place / "m.onnx", "-o", place / "known", "--random-calibration")
    assert done.code == 1
    assert "exists: pass --force to replace it" in one_line(done.stderr)
    done = run("report", place / "known")
    assert done.code == 1
    assert "holds sensitivities, no build" in one_line(done.stderr)
