"""How much each group's quantization does to the model, and which scheme each group should get for it.

Groups are solved once with everything that is learned, in the scheme of the fewest bits; the other schemes take over the transforms and
round anew (``fqonnx.calib.adapt``). Then one solved group at a time stands in the float model (``fqonnx.sensitivity_measure``). Errors are
measured on calibration's own samples: what verification runs on stays unseen.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fqonnx import allocation, artifact
from fqonnx import model as model_file
from fqonnx.allocation import Frontier, Item, Point, average_bits
from fqonnx.calib.data.holdout import count_samples, has_free_batch
from fqonnx.calib.registry import transform_named
from fqonnx.calib.solve import solve
from fqonnx.errors import ArtifactError, UsageError
from fqonnx.progress import Silent
from fqonnx.recipe import ALLOCATIONS, FLOAT, GROUP_SCHEMES, Recipe
from fqonnx.report.mixed import AllocationReport, CurvePoint, GroupSensitivity, SchemeError, SensitivityReport
from fqonnx.report.schema import decode, encode
from fqonnx.sensitivity_measure import OutputError, Probe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fqonnx.build import Data, FloatModel
    from fqonnx.calib.data.base import Feeds
    from fqonnx.calib.stores import SolutionStore, StatsStore
    from fqonnx.progress import Progress

MIX = ("w4a4", "w4a8", "w8a8", "w8a16", "float")
"""What groups may get where nothing else is said."""

SAMPLES = 8
"""Samples that errors are measured on."""

REPORT = "sensitivity.json"
_WORK = "work-"
"""How folders of statistics and solutions are named that were kept."""

CURVE_POINTS = 48
"""Best choices that the curve shows."""

MEASURED_BITS = (4.25, 4.5, 5.0, 6.0, 7.0, 9.0)
"""Average bits at which the best choice is also measured."""

ATTEMPTS = 8
"""Choices that are measured until one is within ``max_error``."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How a build chooses a scheme for each group.

    Attributes:
        schemes: What to choose among, keys of ``GROUP_SCHEMES``.
        avg_bits: Average bits at most (``fqonnx.allocation``); None chooses the fewest bits within the build's ``max_error``.
        method: One of ``fqonnx.recipe.ALLOCATIONS``.
        samples: Samples that errors are measured on.
        known: A folder that ``sensitivity`` wrote for this model and recipe; None measures.

    Raises:
        UsageError: A value is not one of the choices.
    """

    schemes: tuple[str, ...] = MIX
    avg_bits: float | None = None
    method: str = ALLOCATIONS[0]
    samples: int = SAMPLES
    known: Path | None = None

    def __post_init__(self) -> None:
        check_schemes(self.schemes)
        if self.method not in ALLOCATIONS:
            raise UsageError(f"unknown allocation {self.method!r}: choose from {', '.join(ALLOCATIONS)}")


def check_schemes(schemes: Sequence[str]) -> None:
    """Whether groups can be given a choice of these.

    Raises:
        UsageError: Unknown or repeated, or none of them quantizes.
    """
    for scheme in schemes:
        if scheme not in GROUP_SCHEMES:
            raise UsageError(f"unknown scheme {scheme!r} in --mix: choose from {', '.join(GROUP_SCHEMES)}")
    if len(set(schemes)) < len(schemes):
        raise UsageError("--mix names a scheme twice: name each once")
    if not set(schemes) - {FLOAT.name}:
        raise UsageError("--mix quantizes nothing: name at least one scheme besides float")


def sensitivity(
    model: Path | str,
    out: Path | str | None = None,
    *,
    recipe: Recipe | None = None,
    schemes: Sequence[str] = MIX,
    calib_data: str | None = None,
    random_calibration: bool = False,
    calib_samples: int = 128,
    batch_size: int = 1,
    tokenizer: Path | None = None,
    seq_len: int | None = None,
    samples: int = SAMPLES,
    estimate: bool = False,
    keep_work: bool = False,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    command: str = "",
) -> SensitivityReport:
    """Measure what each group alone does to the model's output, in each scheme.

    Args:
        model: The float ``.onnx`` file.
        out: Folder for ``sensitivity.json`` and ``report.html``, which ``build`` takes as ``Mix.known``; None keeps nothing.
        recipe: How groups are solved, each alone; its schemes and its KV cache do not matter.
        schemes: The schemes to try, keys of ``GROUP_SCHEMES``.
        calib_data: As for ``build``.
        random_calibration: As for ``build``.
        calib_samples: As for ``build``.
        batch_size: As for ``build``.
        tokenizer: As for ``build``.
        seq_len: As for ``build``.
        samples: Samples of the calibration data that errors are measured on.
        estimate: Measure gains alone, one run a group instead of one for each scheme; errors are then first-order estimates.
        keep_work: Leave statistics and solutions in ``out``, so that builds that take the folder need not compute them again; large.
        device: ``cpu`` or ``cuda``: where transforms are trained.
        resume: Reuse what an interrupted run for the same ``out`` has finished.
        force: Replace what ``out`` holds.
        progress: Where to tell how far it is.
        command: The command line, for the report.

    Raises:
        UsageError: A choice is unknown, or there is no data.
        ModelError: The model cannot be read or holds nothing to quantize.
        DataError: The data is malformed or does not fit the model.
        CalibrationError: A group's statistics or solution are unusable.
        ArtifactError: ``out`` cannot be written, exists, or another process is writing it.
    """
    from fqonnx.build import Clock, Data, FloatModel, observe_groups, require_device
    from fqonnx.report.mixed_html import save_page

    recipe, progress = replace((recipe or Recipe()).alone(), schemes=(), kv="none"), progress or Silent()
    check_schemes(schemes)
    require_device(device)
    clock = Clock()
    with tempfile.TemporaryDirectory() as nowhere:
        place = Path(nowhere) / "sensitivity" if out is None else Path(out)
        with artifact.Workspace(place, force=force, resume=resume) as workspace:
            with clock("read"):
                float_model = FloatModel.read(Path(model), recipe)
                data = Data.read(
                    float_model.model,
                    calib_data,
                    samples=calib_samples,
                    batch_size=batch_size,
                    tokenizer=tokenizer,
                    seq_len=seq_len,
                    seed=recipe.seed,
                    random=random_calibration,
                )
            settings = {f"--{name.replace('_', '-')}": value for name, value in recipe.to_dict().items() if name != "scheme"}
            fingerprints = {"model": float_model.fingerprint, "data": data.calibration.fingerprint, "device": device}
            workspace.settings({"fqonnx": version("fqonnx"), **fingerprints, **settings})
            workspace.require_space(float_model.disk_needed(recipe, data.rows, schemes=len(schemes)))
            with clock("observe"):
                stats = observe_groups(float_model, data, recipe, workspace.work, progress, tokens=True)
            report = analyse(
                float_model, data, recipe, schemes, stats, workspace.work, samples=samples, estimate=estimate, device=device,
                progress=progress, clock=clock,
            )  # fmt: skip
            report = replace(report, seconds=clock.seconds(), command=command)
            artifact.write_json(workspace.files / REPORT, encode(report))
            save_page(report, workspace.files / artifact.PAGE)
            if keep_work:
                for folder in artifact.RESUMABLE:
                    (workspace.work / folder).rename(workspace.files / f"{_WORK}{folder}")
            artifact.write_manifest(workspace.files, {"sensitivity": REPORT})
            workspace.commit()
    return report


def analyse(
    float_model: FloatModel,
    data: Data,
    recipe: Recipe,
    schemes: Sequence[str],
    stats: StatsStore | None,
    workdir: Path,
    *,
    samples: int,
    estimate: bool,
    device: str,
    progress: Progress,
    clock: Callable[[str], Any],
) -> SensitivityReport:
    """``sensitivity`` between reading the model and writing the report."""
    groups = float_model.found.groups
    with clock("solve"):
        stores = _solve_schemes(float_model, stats, recipe, schemes, workdir, float_model.solved_from(data), device, progress)
    feeds = spread(data, samples)
    with clock("sensitivity"), Probe(float_model.model, recipe, feeds, workdir / "probe") as probe:
        with progress.task("Measuring groups", len(groups)) as task:
            found = []
            for name, cut in probe.groups():
                gain = cut.gain()
                errors = []
                for scheme in schemes:
                    if scheme == FLOAT.name:
                        errors.append(SchemeError(scheme=scheme, rel_l2=0.0, kl=0.0 if probe.has_logits else None, estimate=0.0))
                        continue
                    alone = stores[scheme](name).metrics.get("output_rel_l2")
                    measured = None if estimate else cut.quantized(stores[scheme], replace(recipe, scheme=scheme))
                    errors.append(
                        SchemeError(
                            scheme=scheme,
                            rel_l2=None if measured is None else measured.rel_l2,
                            kl=None if measured is None else measured.kl,
                            estimate=None if alone is None else gain * alone,
                        )
                    )
                size = next(group.in_features * group.out_features for group in groups if group.name == name)
                found.append(GroupSensitivity(name=name, parameters=size, gain=gain, errors=tuple(errors)))
                task.advance()
        report = SensitivityReport(
            model=float_model.path.name,
            fingerprint=float_model.fingerprint,
            recipe=recipe.to_dict(),
            schemes=tuple(schemes),
            measure="kl" if probe.has_logits and not estimate else "rel_l2",
            samples=sum(count_samples(feed, free_batch=has_free_batch(model_file.inputs(float_model.model))) for feed in feeds),
            groups=tuple(found),
        )

        def measure(chosen: Mapping[str, str]) -> OutputError:
            mixed = replace(recipe, schemes=tuple(chosen.items()))
            return probe.quantized(lambda name: stores[chosen[name]](name), mixed)

        return replace(report, curve=_curve(report, None if estimate else measure, progress))


def _solve_schemes(
    float_model: FloatModel,
    stats: StatsStore | None,
    recipe: Recipe,
    schemes: Sequence[str],
    workdir: Path,
    fingerprint: str,
    device: str,
    progress: Progress,
) -> dict[str, SolutionStore]:
    """Every group in every scheme; transforms that are learned are learned once."""
    quantizing = sorted(
        (s for s in schemes if s != FLOAT.name), key=lambda s: GROUP_SCHEMES[s].weight_bits + GROUP_SCHEMES[s].activation_bits
    )
    stores: dict[str, SolutionStore] = {}
    for scheme in quantizing:
        # A pattern rather than ``scheme``: as one of several, which decides what becomes of the transform.
        one = replace(recipe, scheme=quantizing[0], schemes=() if scheme == quantizing[0] else (("", scheme),))
        transform = one.for_group("").transform
        base = stores[quantizing[0]] if stores and transform == recipe.transform and transform_named(transform).needs_tokens else None
        stores[scheme] = solve(
            float_model.found.groups, stats, one, workdir=workdir, fingerprint=fingerprint, device=device, base=base, progress=progress
        )
    return stores


def spread(data: Data, count: int) -> list[Feeds]:
    """So many samples of the calibration data, evenly spread over it; of batches the rows that are meant."""
    total = data.calibration.samples
    count = min(count, total)
    wanted = [(2 * i + 1) * total // (2 * count) for i in range(count)]
    found: list[Feeds] = []
    first = 0
    for feeds, size in zip(data.calibration, data.calibration.counts, strict=True):
        rows = [sample - first for sample in wanted if first <= sample < first + size]
        if len(rows) == size:
            found.append(feeds)
        elif rows:
            found.append({name: array[rows] for name, array in feeds.items()})
        first += size
    return found


def choose_for_build(
    float_model: FloatModel,
    data: Data,
    recipe: Recipe,
    mix: Mix,
    stats: StatsStore | None,
    workdir: Path,
    solve_all: Callable[[FloatModel, Recipe], SolutionStore],
    *,
    max_error: float | None,
    device: str,
    progress: Progress,
    clock: Callable[[str], Any],
) -> tuple[SensitivityReport, AllocationReport]:
    """The schemes of a build's groups. What is measured is each choice as it will be built, on calibration's samples.

    ``solve_all`` gives the solutions of the groups that a recipe quantizes.

    Raises:
        UsageError: Nothing is within the bound, or ``mix.known`` is of another model or recipe.
    """
    if mix.known is None:
        alone = recipe.alone()
        report = analyse(
            float_model, data, alone, mix.schemes, stats, workdir, samples=mix.samples, estimate=False, device=device, progress=progress,
            clock=clock,
        )  # fmt: skip
    else:
        report = load_sensitivity(mix.known, float_model.fingerprint, recipe, mix.schemes)
    with Probe(float_model.model, recipe, spread(data, mix.samples), workdir / "probe") as probe:

        def measure(chosen: Mapping[str, str]) -> OutputError:
            mixed = replace(recipe, schemes=tuple(chosen.items()))
            with clock("solve"):
                solution = solve_all(float_model.under(mixed), mixed)
            with clock("sensitivity"):
                return probe.quantized(solution, mixed)

        return report, choose(report, mix, max_error, measure)


def adopt_work(known: Path, work: Path) -> None:
    """Take over statistics and solutions that ``sensitivity`` left; which of them fit is known by their keys."""
    for folder in artifact.RESUMABLE:
        kept = Path(known) / f"{_WORK}{folder}"
        for path in sorted(kept.glob("*.safetensors")) if kept.is_dir() else ():
            place = work / folder / path.name
            place.parent.mkdir(exist_ok=True)
            if not place.exists():
                try:
                    os.link(path, place)
                except OSError:  # another file system
                    shutil.copyfile(path, place)


def items_of(report: SensitivityReport, measure: str) -> list[Item]:
    """The knapsack's items, with errors that add up: KL divergences, or squares of relative errors."""

    def damage(error: SchemeError) -> float:
        return error.kl if measure == "kl" and error.kl is not None else error.error**2

    return [Item.of(group.name, group.parameters, {e.scheme: damage(e) for e in group.errors}) for group in report.groups]


def _figure(error: float, measure: str) -> float:
    """A sum of ``items_of`` in the measure itself."""
    return error if measure == "kl" else math.sqrt(error)


def _measured(error: OutputError, measure: str) -> float:
    return error.kl if measure == "kl" and error.kl is not None else error.rel_l2


def _curve(
    report: SensitivityReport, measure: Callable[[Mapping[str, str]], OutputError] | None, progress: Progress
) -> tuple[CurvePoint, ...]:
    """Best choices from the fewest bits to the most, some of them measured, and all groups in each one scheme."""
    sizes = {group.name: group.parameters for group in report.groups}
    items = items_of(report, report.measure)
    frontier = Frontier(items)
    total = 2 * sum(sizes.values())
    grid = [frontier.costs[0] + (frontier.costs[-1] - frontier.costs[0]) * i / (CURVE_POINTS - 1) for i in range(CURVE_POINTS)]
    shown = [frontier.within_cost(budget) for budget in grid]
    wanted = [frontier.within_cost(bits * total) for bits in MEASURED_BITS]
    uniform = [
        (scheme, Point(sum(o.cost for o in chosen), sum(o.error for o in chosen), dict.fromkeys(sizes, scheme)))
        for scheme in report.schemes
        if (chosen := [next(o for o in item.options if o.scheme == scheme) for item in items])
    ]
    measured = {id(point): point for point in wanted if point is not None}
    points: dict[tuple[str, int], CurvePoint] = {}
    with progress.task("Measuring choices", len(uniform) + len(measured)) as task:
        for label, point in [*(("", p) for p in (*measured.values(), *shown) if p is not None), *uniform]:
            if (label, point.cost) in points:
                continue
            run = measure is not None and (label or id(point) in measured)
            bits = average_bits(sizes, point.schemes)
            points[label, point.cost] = CurvePoint(
                average_bits=bits.average,
                weight_bits=bits.weights,
                activation_bits=bits.activations,
                weight_bytes=round(bits.weights * total / 16),
                predicted=_figure(point.error, report.measure),
                measured=_measured(measure(point.schemes), report.measure) if run and measure is not None else None,
                label=label,
            )
            task.advance(1 if run else 0)
    return tuple(sorted(points.values(), key=lambda point: (point.average_bits, point.label)))


def load_sensitivity(folder: Path, fingerprint: str, recipe: Recipe, schemes: Sequence[str]) -> SensitivityReport:
    """The report in a folder that ``sensitivity`` wrote, if it is of this model and recipe.

    Args:
        folder: The folder.
        fingerprint: Of the model.
        recipe: Must agree in what groups there are, and in transform, weights and group size.
        schemes: The columns to keep.

    Raises:
        ArtifactError: There is none, or it is damaged.
        UsageError: It is of another model or recipe, or lacks a scheme.
    """
    path = Path(folder) / REPORT
    try:
        report = decode(SensitivityReport, json.loads(path.read_text(encoding="utf-8")), "sensitivity")
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no {REPORT}: give the -o of an `fqonnx sensitivity`") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): measure it again with `fqonnx sensitivity`") from None
    assert isinstance(report, SensitivityReport)
    if report.fingerprint != fingerprint:
        raise UsageError(f"{folder} is of another model ({report.model}): measure this one with `fqonnx sensitivity`")
    wanted = recipe.to_dict()
    for key in ("transform", "weights", "group_size", "keep", "quantize_head"):
        if wanted[key] != (value := report.recipe.get(key)):
            raise UsageError(
                f"{folder} was measured with {key} {value!r}, this build has {wanted.get(key)!r}: measure it again, or build with that"
            )
    if missing := [scheme for scheme in schemes if scheme not in report.schemes]:
        raise UsageError(
            f"{folder} has no figures for {missing[0]}: measure it again with --mix, or choose among {', '.join(report.schemes)}"
        )
    groups = tuple(replace(group, errors=tuple(group.of(scheme) for scheme in schemes)) for group in report.groups)
    return replace(report, schemes=tuple(schemes), groups=groups)


def choose(
    report: SensitivityReport, mix: Mix, max_error: float | None, measure: Callable[[Mapping[str, str]], OutputError]
) -> AllocationReport:
    """Choose a scheme per group and measure the choice.

    For a bound on the error the choice is measured, and where groups together do more than their sum another is made for a bound that is
    as much tighter.

    Args:
        report: The groups' errors.
        mix: How to choose.
        max_error: Bound on the relative L2 of the worst output; used where ``mix`` bounds no bits.
        measure: Gives the error of the model with every group quantized as it is told.

    Raises:
        UsageError: Nothing is within the bound.
    """
    sizes = {group.name: group.parameters for group in report.groups}
    total = sum(sizes.values())
    if mix.avg_bits is not None:
        point = allocation.allocate(items_of(report, report.measure), total, avg_bits=mix.avg_bits, method=mix.method)
        return _allocation(report, mix, None, point, report.measure, measure(point.schemes), sizes)
    if max_error is None:
        raise UsageError("--mix needs a bound: give --avg-bits or --max-error")
    items, bound = items_of(report, "rel_l2"), max_error
    for _ in range(ATTEMPTS):
        point = allocation.allocate(items, total, error=bound**2, method=mix.method)
        found = measure(point.schemes)
        if found.rel_l2 <= max_error:
            return _allocation(report, mix, max_error, point, "rel_l2", found, sizes)
        bound = min(bound, math.sqrt(point.error)) * min(0.98 * max_error / found.rel_l2, 0.9) if math.isfinite(found.rel_l2) else bound / 2
    raise UsageError(f"no choice was found that keeps the error within --max-error {max_error:g}: allow more, or let --mix include float")


def _allocation(
    report: SensitivityReport, mix: Mix, max_error: float | None, point: Point, measure: str, found: OutputError, sizes: Mapping[str, int]
) -> AllocationReport:
    bits = average_bits(sizes, point.schemes)
    return AllocationReport(
        method=mix.method,
        avg_bits=mix.avg_bits,
        max_error=max_error,
        average_bits=bits.average,
        weight_bits=bits.weights,
        activation_bits=bits.activations,
        measure=measure,
        predicted=_figure(point.error, measure),
        measured=_measured(found, measure),
        schemes={group.name: point.schemes[group.name] for group in report.groups},
    )
