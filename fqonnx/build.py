"""``fqonnx build`` as a function: from a float model and data to a verified build directory."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from fqonnx import artifact, cache_plan, sensitivity
from fqonnx import model as model_file
from fqonnx.attention_cache_plan import AttentionCachePlan
from fqonnx.calib.data.holdout import Part, count_samples, has_free_batch
from fqonnx.calib.kron import factor
from fqonnx.calib.record import write_record
from fqonnx.calib.registry import transform_named, weight_quantizer_named
from fqonnx.calib.solve import solve
from fqonnx.concat_cache_plan import ConcatCachePlan
from fqonnx.engines import EngineOptions, Profile, Profiles, onnxruntime, profiles_from_shapes
from fqonnx.engines import engine as engine_named
from fqonnx.errors import DataError, EngineError, ModelError, UsageError
from fqonnx.kernels import MAX_FACTOR
from fqonnx.ops.kernels import KERNELS
from fqonnx.passes.edit import GROUP_TAG
from fqonnx.passes.fuse import LOWERING_TAG, Target, target_named
from fqonnx.progress import Silent
from fqonnx.recipe import Recipe
from fqonnx.report import DataReport, GroupReport, LeftReport, Report, load_report, save_report
from fqonnx.report.html import save_html
from fqonnx.report.schema import encode
from fqonnx.sizes import constant_bytes, constants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from fqonnx.cache_plan import CachePlan
    from fqonnx.calib.data import Source
    from fqonnx.calib.solution import GroupSolution
    from fqonnx.calib.stores import SolutionStore, StatsStore
    from fqonnx.passes.groups import LinearGroup, Linears
    from fqonnx.progress import Progress
    from fqonnx.recipe import Scheme
    from fqonnx.report import EngineReport
    from fqonnx.sensitivity import Mix

CACHE_PLANS: tuple[type[CachePlan], ...] = (AttentionCachePlan, ConcatCachePlan)
"""In the order in which they are asked whether a model's cache is theirs."""

MAX_ERROR = 0.5
"""Bound on the error where nothing is asked for: far above what a good recipe costs, and below what a ruined model shows."""

HELD_OUT_SHARE = 0.1
"""Share of the samples that calibration does not see and verification runs on."""

_log = logging.getLogger(__name__)


def build(
    model: Path | str,
    out: Path | str,
    *,
    recipe: Recipe | None = None,
    calib_data: str | None = None,
    random_calibration: bool = False,
    calib_samples: int = 128,
    batch_size: int = 1,
    tokenizer: Path | None = None,
    seq_len: int | None = None,
    engine: str = "onnxruntime",
    target: str | None = None,
    device: str = "cpu",
    verify_device: str | None = None,
    profiles: Sequence[Profiles] = (),
    engine_options: EngineOptions | None = None,
    max_error: float | None = None,
    max_perplexity_increase: float | None = None,
    mix: Mix | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    command: str = "",
) -> Report:
    """Quantize a model, build it for an engine, verify it on samples that calibration did not see, and write the build directory.

    The directory appears under its name only when everything is in it and on the disk. It is written whether or not the result
    passes: look at ``Report.passed``.

    Args:
        model: The float ``.onnx`` file.
        out: The build directory to write.
        recipe: What to build; None is the default recipe.
        calib_data: Data source (see ``fqonnx.calib.data``); the last tenth of its samples is held out for verification.
        random_calibration: Take random inputs that fit the graph instead of ``calib_data``.
        calib_samples: Samples to read at most.
        batch_size: Samples per run where the model's shapes allow it.
        tokenizer: ``tokenizer.json`` for text data.
        seq_len: Tokens per sample for text data.
        engine: A key of ``fqonnx.engines.ENGINES``.
        target: Architecture to lower for, such as ``sm90``, and to build the engine for, which may take several; None makes a model that
            runs everywhere.
        device: ``cpu`` or ``cuda``: where transforms are trained and models run.
        verify_device: Where the result is verified; None is ``device``. ``cpu`` beside ``device="cuda"`` needs neither onnxruntime-gpu nor
            the kernels' library.
        profiles: Optimization profiles of an engine: shapes of dynamic inputs. Inputs that one lacks, and all where there is none, take
            those of the data.
        engine_options: How the engine is built.
        max_error: Largest relative L2 error of a float output; None is ``MAX_ERROR``, or with random inputs, which say little about
            accuracy, no bound at all.
        max_perplexity_increase: Largest rise of a language model's perplexity on held-out data; None for no bound.
        mix: Choose a scheme for each group; None takes those of the recipe.
        resume: Reuse what an interrupted build of the same ``out`` has finished.
        force: Replace an existing build directory.
        progress: Where to tell how far it is.
        command: The command line, for the report.

    Returns:
        The report that is in the directory.

    Raises:
        UsageError: A choice is unknown, or there is no data and no ``random_calibration``.
        ModelError: The model cannot be read or holds nothing to quantize.
        DataError: The data is malformed or does not fit the model.
        CalibrationError: A group's statistics or solution are unusable.
        EngineError: The engine cannot be built here.
        ArtifactError: ``out`` cannot be written, exists, or another build is writing it.
    """
    recipe = recipe or Recipe()
    progress = progress or Silent()
    if max_error is None and not random_calibration:
        max_error = MAX_ERROR
    if mix is not None and recipe.schemes:
        raise UsageError("schemes of single groups (--group-scheme) and a choice of schemes (--avg-bits, --mix) exclude each other")
    if mix is not None and mix.avg_bits is None and max_error is None:
        raise UsageError("--mix needs a bound: give --avg-bits or --max-error")
    if profiles and engine == "onnxruntime":
        raise UsageError("shapes are for --engine tensorrt and tensorrt-rtx, ONNX Runtime takes any: leave out --min-shapes and the like")
    if recipe.kv != "none" and engine != "onnxruntime":
        raise UsageError(f"--kv {recipe.kv} is for --engine onnxruntime, not {engine}: leave out --kv, or build for ONNX Runtime")
    builder = engine_named(engine)
    require_device(device)
    verify_device = verify_device or device
    require_device(verify_device)
    # What is missing is told before the long work: kernels for the target, the engine, the kernels' library for verification.
    builder.require(target, engine_options)
    lowering = builder.lowering(target)
    kernels = target_named(lowering)
    clock = Clock()
    with artifact.Workspace(Path(out), force=force, resume=resume) as workspace:
        with clock("read"):
            float_model = FloatModel.read(Path(model), recipe)
            _require_kernels(float_model.found.groups, recipe, kernels)
            if verify_device == "cuda" and _calls_kernels(float_model, recipe, kernels, engine):
                onnxruntime.require_kernels()
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
        workspace.settings(
            {
                "fqonnx": version("fqonnx"),
                "model": float_model.fingerprint,
                "data": data.calibration.fingerprint,
                "device": device,
                "--mix": None if mix is None else list(mix.schemes),
                **{f"--{name.replace('_', '-')}": value for name, value in recipe.to_dict().items()},
            }
        )
        workspace.require_space(float_model.disk_needed(recipe, data.rows, schemes=1 if mix is None else len(mix.schemes)))
        if float_model.cache is not None:
            with clock("kv cache"):
                float_model = float_model.with_transformed_cache(data, recipe, workspace.work, device, progress)
        if mix is not None and mix.known is not None:
            sensitivity.adopt_work(mix.known, workspace.work)
        stats = None
        if recipe.reconstruct == "group" or (mix is not None and mix.known is None):
            with clock("observe"):
                stats = observe_groups(float_model, data, recipe, workspace.work, progress, tokens=mix is not None)
        sensitivities, allocation = None, None
        if mix is not None:
            solve_all = partial(_solve, data=data, stats=stats, workdir=workspace.work, device=device, progress=progress)
            sensitivities, allocation = sensitivity.choose_for_build(
                float_model, data, recipe, mix, stats, workspace.work, solve_all,
                max_error=max_error, device=device, progress=progress, clock=clock,
            )  # fmt: skip
            recipe = replace(recipe, schemes=tuple(allocation.schemes.items()))
            float_model = float_model.under(recipe)
            _require_kernels(float_model.found.groups, recipe, kernels)
        groups = float_model.found.groups
        with clock("solve"):
            solution = _solve(float_model, recipe, data=data, stats=stats, workdir=workspace.work, device=device, progress=progress)
        with clock("rewrite"):
            bindings, attention = _write_model(float_model, solution, recipe, lowering, engine, workspace.files / artifact.MODEL)
            write_record(workspace.files / artifact.CALIBRATION, [group.name for group in groups], solution, recipe)
            if float_model.cache is not None:
                float_model.cache.solution.save(workspace.files / cache_plan.FILE)
        with clock("engine"):
            built = builder.build(
                workspace.files / artifact.MODEL,
                workspace.files / artifact.ENGINE,
                profiles=[{**data.profiles, **given} for given in profiles or ({},)],
                target=target,
                options=engine_options,
                progress=progress,
            )
        entries = [_describe(group, solution(group.name), recipe, bindings[group.name]) for group in groups]
        with clock("verify"):
            bounds = max_error, max_perplexity_increase
            report = _verify(float_model.path, workspace.files, built, data, bounds, verify_device, progress)
        report = replace(
            report,
            candidate=workspace.out.name,
            groups=tuple(entry for entry, _ in entries),
            left_in_float=tuple(LeftReport.of(left) for left in float_model.found.left_in_float),
            engine=built,
            sensitivity=sensitivities,
            allocation=allocation,
            recipe=recipe.to_dict(),
            command=command,
            notes=(*data.notes, *([] if float_model.cache is None else [float_model.cache.summary]), *report.notes),
            time=clock.seconds(),
        )
        save_report(report, workspace.files / artifact.REPORT)
        save_html(report, workspace.files / artifact.PAGE)
        artifact.write_manifest(
            workspace.files,
            {
                "model": {"name": float_model.path.name, "sha256": float_model.fingerprint},
                "recipe": recipe.to_dict(),
                "target": target,
                "engine": engine,
                **({} if built is None else {"plan": replace(built, layers=(), groups=()).to_dict()}),
                "calibration": {
                    "data": data.name,
                    "samples": data.calibration.samples,
                    "held_out": data.held_out.samples,
                    "fingerprint": data.calibration.fingerprint,
                },
                "versions": report.environment,
                **({} if allocation is None else {"allocation": encode(allocation)}),
                **({} if float_model.cache is None else {"kv_cache": float_model.cache.to_dict()}),
                "groups": [entry for _, entry in entries],
                **({"attention": attention} if attention else {}),
                "left_in_float": [_encode_left(left) for left in report.left_in_float],
                "passed": report.passed,
            },
        )
        workspace.commit()
    return report


def open_data(
    model: ir.Model,
    spec: str | None,
    *,
    samples: int | None,
    batch_size: int = 1,
    tokenizer: Path | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    random: bool = False,
) -> Source:
    """The data that a model is calibrated or verified on.

    Args:
        model: The model to feed.
        spec: A data source (see ``fqonnx.calib.data``); None goes with ``random``.
        samples: Samples to read at most; None reads all.
        batch_size: Samples per run where the model's shapes allow it.
        tokenizer: ``tokenizer.json`` for text data.
        seq_len: Tokens per sample for text data.
        seed: Seed of random data.
        random: Take random inputs that fit the graph.

    Raises:
        UsageError: Neither data nor ``random``, or both.
        DataError: The data cannot be read or does not fit the model's inputs.
    """
    if (spec is None) != random:
        raise UsageError("give calibration data, or ask for random inputs, and not both")
    if spec is None:
        from fqonnx.calib.random_data import RandomSource

        return RandomSource(model, seed=seed, samples=samples or 1)
    from fqonnx.calib.data import open_source

    return open_source(
        spec, model_file.inputs(model), samples=samples, batch_size=batch_size, tokenizer=tokenizer, seq_len=seq_len, model=model
    )


def read_report(opened: artifact.Artifact) -> Report:
    """The report of a build directory.

    Raises:
        ArtifactError: It is missing or not a report.
    """
    return load_report(opened.report)


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time within to ``stage``; of one that comes again, to its sum."""
        start = time.perf_counter()
        _log.info("%s ...", stage)
        try:
            yield
        finally:
            self._stages[stage] = self._stages.get(stage, 0.0) + time.perf_counter() - start
            _log.info("%s: %.1f s", stage, time.perf_counter() - start)

    def seconds(self) -> dict[str, float]:
        """By stage, and ``total`` since the clock was made."""
        return {**self._stages, "total": time.perf_counter() - self._start}


@dataclass(frozen=True)
class FloatModel:
    """The float model, read and looked through."""

    path: Path
    model: ir.Model
    found: Linears
    fingerprint: str
    float_bytes: int
    cache: CachePlan | None = None

    @classmethod
    def read(cls, path: Path, recipe: Recipe) -> FloatModel:
        """Read a model and find what the recipe quantizes.

        Raises:
            ModelError: It cannot be read, is quantized already, or holds nothing to quantize.
        """
        from fqonnx.calib.redraw import NextToken
        from fqonnx.passes.linears import find_for
        from fqonnx.passes.prepare import prepare

        model = model_file.load(path)
        model_file.require_float(model)
        fingerprint, float_bytes = _fingerprint(path, model), constant_bytes(model)
        model = prepare(model)
        if recipe.augment:
            NextToken.of(model)  # whether it is a model of language is told before the long work
        found = find_for(model, recipe)
        if not found.groups:
            raise ModelError(f"{path} has nothing to quantize: {_why_nothing(found)}")
        plans = (plan for kind in CACHE_PLANS if (plan := kind.of(model, recipe)) is not None)
        return cls(path, model, found, fingerprint, float_bytes, next(plans, None))

    def with_transformed_cache(self, data: Data, recipe: Recipe, workdir: Path, device: str, progress: Progress) -> FloatModel:
        """The same model, in place, with transforms of keys and values in it that leave what it computes as it is.

        Raises:
            CalibrationError: Keys or values hold NaN or Inf.
        """
        assert self.cache is not None
        cache = self.cache.transformed(self.model, data.calibration, recipe, workdir=workdir, device=device, progress=progress)
        return replace(self, cache=cache).under(recipe)

    def under(self, recipe: Recipe) -> FloatModel:
        """The same model, with the groups that another recipe leaves to be quantized.

        Raises:
            ModelError: There are none.
        """
        from fqonnx.passes.linears import find_for

        found = find_for(self.model, recipe)
        if not found.groups:
            raise ModelError(f"{self.path} has nothing to quantize: {_why_nothing(found)}")
        return replace(self, found=found)

    def solved_from(self, data: Data) -> str:
        """A digest of what solutions depend on besides the recipe."""
        return f"{self.fingerprint} {data.calibration.fingerprint}"

    def disk_needed(self, recipe: Recipe, rows: int, *, schemes: int = 1) -> int:
        """Bytes that a build writes, roughly: the model at its float size at most, and of each group codes, factors and statistics.

        Codes take one byte a weight in each of so many schemes, the fp32 factors are in the solution and in the model, statistics are of
        at most ``rows``.
        """
        from fqonnx.calib.observe import reservoir_rows

        groups, (needs_tokens, needs_hessian) = self.found.groups, _needs(recipe)
        if recipe.reconstruct != "group":
            # Three activations of every token between two blocks, as wide as the narrowest group's input.
            streams = 3 * 4 * rows * (1 + recipe.augment) * min(group.in_features for group in groups)
            return self.float_bytes + streams + schemes * sum(group.in_features * group.out_features for group in groups)
        needed = self.float_bytes + schemes * sum(group.in_features * group.out_features for group in groups)
        needed += sum(2 * 4 * n**2 for group in groups for n in factor(group.in_features, recipe.width))
        if needs_tokens:
            needed += sum(4 * group.in_features * min(rows, reservoir_rows(group.in_features)) for group in groups)
        if needs_hessian:
            needed += sum(4 * group.in_features**2 for group in groups)
        return needed


def _why_nothing(found: Linears) -> str:
    if not found.left_in_float:
        return "it contains no matrix product with a constant weight"
    first = found.left_in_float[0]
    more = f" (and {len(found.left_in_float) - 1} more, see `fqonnx inspect`)" if len(found.left_in_float) > 1 else ""
    return f"{first.name!r} stays in float because: {first.reason}{more}"


def _fingerprint(path: Path, model: ir.Model) -> str:
    """SHA-256 over the model file and every external data file it names, in order of their names."""
    digest = hashlib.sha256(artifact.file_hash(path).encode())
    for file in sorted({Path(tensor.path) for tensor in constants(model) if isinstance(tensor, ir.ExternalTensor)}):
        digest.update(artifact.file_hash(file).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Data:
    """What calibration sees and what verification sees."""

    name: str
    random: bool
    calibration: Part
    held_out: Part
    profiles: dict[str, Profile]
    notes: tuple[str, ...]
    rows: int
    """Rows that a linear sees of all samples, at most: one for each token, or each vector of an input."""

    @classmethod
    def read(cls, model: ir.Model, spec: str | None, **choices: Any) -> Data:
        """``split`` of what ``open_data`` opens for the model; ``choices`` are its other arguments.

        Raises:
            DataError: The data cannot be read, do not fit the model, or there is nothing in them.
        """
        return cls.split(open_data(model, spec, **choices), spec, model_file.inputs(model))

    @classmethod
    def split(cls, source: Source, spec: str | None, inputs: Sequence[model_file.ModelInput]) -> Data:
        """Read the data once, so that every mistake in it is told before the work starts, and hold out the last tenth.

        Raises:
            DataError: There is nothing in it.
        """
        name = spec or "random inputs"
        shapes: dict[str, list[tuple[int, ...]]] = {}
        free_batch, sizes, rows = has_free_batch(inputs), list[int](), 0
        for feeds in source:
            sizes.append(count_samples(feeds, free_batch=free_batch))
            rows += max((math.prod(a.shape if a.dtype.kind in "iub" else a.shape[:-1]) for a in feeds.values()), default=0)
            for key, array in feeds.items():
                shapes.setdefault(key, []).append(array.shape)
        count = sum(sizes)
        if not count:
            raise DataError(f"{name} holds no samples: give at least one")
        held = max(1, round(count * HELD_OUT_SHARE)) if count > 1 else 0
        notes = [] if held else [f"{name} has one sample, which calibration saw and verification runs on: give more for an honest figure"]
        if spec is None:
            notes.append("calibrated and verified on random inputs: the accuracy says little about real use, give --calib-data for that")
        for note in notes:
            _log.warning(note)
        return cls(
            name,
            spec is None,
            Part(source, 0, count - held, tuple(sizes)),
            Part(source, count - held if held else 0, count, tuple(sizes)),
            profiles_from_shapes(shapes, {item.name: item.shape for item in inputs}),
            tuple(notes),
            rows,
        )

    @property
    def report(self) -> DataReport:
        """What the figures are measured on, in words."""
        seen = self.calibration.samples
        note = f"held out: calibration saw the {seen} before them" if self.held_out.start else "the sample that calibration saw"
        return DataReport(source=self.name, samples=self.held_out.samples, note=note)


def require_device(device: str) -> None:
    """Whether ``device`` is there.

    Raises:
        EngineError: CUDA is not.
    """
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise EngineError(
            f"PyTorch {torch.__version__} finds no CUDA device here: use --device cpu, or install a driver and a CUDA build of torch"
        )


def _require_kernels(groups: Sequence[LinearGroup], recipe: Recipe, target: Target) -> None:
    """Whether the target has a kernel for every group.

    Raises:
        EngineError: It has none for one; the message says why, and what to do.
    """
    for group in groups:
        bits = recipe.scheme_of(group.name)
        if not (bits.weight_bits == 4 and bits.quantizes_activations):
            continue
        n, k = group.out_features, group.in_features
        try:
            target.lower(n=n, k=k, activation_bits=bits.activation_bits, group_size=recipe.group_size if recipe.group_size < k else 0)
        except EngineError as error:
            raise EngineError(
                f"group {group.name!r}: {error}: choose another --group-size or --target, or leave it in float (--keep)"
            ) from None
        factors = (1, 1) if not transform_named(recipe.transform).has_pair else factor(k, recipe.width)
        if target.capability is not None and max(factors) > MAX_FACTOR:
            raise EngineError(
                f"group {group.name!r}: no kernel transforms K = {k} by {factors[0]} x {factors[1]}, factors are at most {MAX_FACTOR}: "
                "leave it in float (--keep), or choose a --transform that has no pair, such as smooth"
            )


def _calls_kernels(float_model: FloatModel, recipe: Recipe, target: Target, engine: str) -> bool:
    """Whether the model that is built has fqonnx ops."""
    from fqonnx.passes.attention import has_attention

    if any(recipe.scheme_of(group.name).quantizes_activations for group in float_model.found.groups):
        return True
    return engine == "onnxruntime" and has_attention(float_model.model, target.capability)


def _needs(recipe: Recipe) -> tuple[bool, bool]:
    """Whether the recipe has a use for sampled rows, and for Hessians: what needs these measures its rounding on those."""
    needs_hessian = weight_quantizer_named(recipe.weights).needs_hessian
    return transform_named(recipe.transform).needs_tokens or needs_hessian or recipe.bias_correction, needs_hessian


def observe_groups(
    float_model: FloatModel, data: Data, recipe: Recipe, workdir: Path, progress: Progress, *, tokens: bool = False
) -> StatsStore | None:
    """Statistics of every group's input, where the recipe has a use for them or ``tokens`` asks for them."""
    needs_tokens, needs_hessian = _needs(recipe)
    if not (needs_tokens or tokens):
        return None
    from fqonnx.calib.observe import observe
    from fqonnx.calib.roles import padding_mask

    return observe(
        float_model.model,
        float_model.found.groups,
        data.calibration,
        workdir=workdir,
        needs_hessian=needs_hessian,
        seed=recipe.seed,
        mask=padding_mask(float_model.model),
        progress=progress,
    )


def _solve(
    float_model: FloatModel, recipe: Recipe, *, data: Data, stats: StatsStore | None, workdir: Path, device: str, progress: Progress
) -> SolutionStore:
    """Every group's solution, of those that are there already the same."""
    inputs = float_model.solved_from(data)
    if recipe.reconstruct != "group":
        return _reconstruct(float_model, data, recipe, workdir, inputs, device, progress)
    return solve(float_model.found.groups, stats, recipe, workdir=workdir, fingerprint=inputs, device=device, progress=progress)


def _reconstruct(
    float_model: FloatModel, data: Data, recipe: Recipe, workdir: Path, fingerprint: str, device: str, progress: Progress
) -> SolutionStore:
    """Solutions that were trained on the outputs of whole blocks."""
    from fqonnx.calib.reconstruct import reconstruct
    from fqonnx.calib.roles import padding_mask

    return reconstruct(
        float_model.model,
        float_model.found.groups,
        data.calibration,
        recipe,
        workdir=workdir,
        fingerprint=fingerprint,
        device=device,
        mask=padding_mask(float_model.model),
        stacks=has_free_batch(model_file.inputs(float_model.model)),
        changes=None if float_model.cache is None else float_model.cache.rounding(),
        progress=progress,
    )


def _write_model(
    float_model: FloatModel, solution: Callable[[str], GroupSolution], recipe: Recipe, target: str | None, engine: str, path: Path
) -> tuple[dict[str, dict[str, Any]], list[dict[str, str]]]:
    """Rewrite the float model, in place, and write it, weights streamed group by group.

    Returns:
        Each group's kernel binding, and that of each node of attention that has a kernel.
    """
    import onnx

    from fqonnx.passes.attention import attention_kernels
    from fqonnx.passes.pipeline import quantize_model

    cache = float_model.cache
    if cache is not None and cache.applied_first:
        cache.apply(float_model.model)
    model = quantize_model(float_model.model, float_model.found.groups, solution, recipe, target, engine)
    if cache is not None and not cache.applied_first:
        cache.apply(model)
    bindings = _bindings(model, {group.name: recipe.scheme_of(group.name) for group in float_model.found.groups})
    model_file.save(model, path)
    if unknown := _unknown_to_onnx(model):
        _log.info("the written model is not checked by onnx.checker, which does not know %s", ", ".join(unknown))
    else:
        onnx.checker.check_model(str(path))
    return bindings, attention_kernels(model)


def _unknown_to_onnx(model: ir.Model) -> list[str]:
    """Ops of the default domain that no version of ONNX has: ONNX Runtime's own, such as ``SimplifiedLayerNormalization``."""
    import onnx.defs

    ops = {node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.domain in ("", "ai.onnx")}
    return sorted(op for op in ops if not onnx.defs.has(op))


def _bindings(model: ir.Model, schemes: Mapping[str, Scheme]) -> dict[str, dict[str, Any]]:
    """By group, what multiplies: the op, and for ``W4A4Gemm`` its kernel and how its operands are stored, as the passes noted it.

    What has no kernel is a product of dequantized operands in the activation's type, behind ``FlatQuantize`` where activations have codes.
    """
    instructions = {kernel.name: kernel.instruction for kernel in KERNELS if kernel.op == "W4A4Gemm"}
    bindings: dict[str, dict[str, Any]] = {
        name: {"op": f"{'FlatQuantize + ' if scheme.quantizes_activations else ''}DequantizeLinear + MatMul"}
        for name, scheme in schemes.items()
    }
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        group, lowering = node.metadata_props.get(GROUP_TAG), node.metadata_props.get(LOWERING_TAG)
        if node.op_type == "W4A4Gemm" and group in bindings and lowering is not None:
            noted = json.loads(lowering)
            bindings[group] = {"op": f"{node.domain}.{node.op_type}", **noted, "instruction": instructions.get(noted["kernel"])}
    return bindings


def _describe(group: LinearGroup, solution: GroupSolution, recipe: Recipe, binding: dict[str, Any]) -> tuple[GroupReport, dict[str, Any]]:
    """A group's entries in the report and in the manifest."""
    recipe = recipe.for_group(group.name)
    transform: dict[str, Any] = {
        "name": recipe.transform,
        "channel_scale": solution.channel_scale is not None,
        "clip": float(solution.clip),
    }
    if solution.left is not None and solution.right is not None:
        transform |= {"left": list(solution.left.shape), "right": list(solution.right.shape)}
    entry = {
        "name": group.name,
        "linears": [
            {"name": linear.name, "in_features": linear.in_features, "out_features": linear.out_features} for linear in group.linears
        ],
        "transform": transform,
        "scheme": recipe.scheme,
        "weight_bits": recipe.bits.weight_bits,
        "activation_bits": recipe.bits.activation_bits,
        "scales": list(solution.scales.shape),
        "kernel": binding,
        "metrics": {name: value if math.isfinite(value) else None for name, value in solution.metrics.items() if name != "seconds"},
    }
    return GroupReport.from_solution(group, solution, recipe), entry


def _encode_left(left: LeftReport) -> dict[str, str]:
    return {"name": left.name, "op_type": left.op_type, "reason": left.reason}


def _verify(
    reference: Path,
    files: Path,
    built: EngineReport | None,
    data: Data,
    bounds: tuple[float | None, float | None],
    device: str,
    progress: Progress,
) -> Report:
    """Compare what was written with the float model: the engine where one was built that runs here, else the model in ONNX Runtime.

    ``bounds`` are those of the outputs' error and of the rise of the perplexity.
    """
    from fqonnx.engines.tensorrt_run import runs_here
    from fqonnx.verify import verify

    in_engine = built is not None and runs_here(built)
    report = verify(
        reference,
        files / artifact.MODEL,
        data.held_out,
        max_error=bounds[0],
        max_perplexity_increase=bounds[1],
        tokens=False if data.random else None,
        device=device,
        engine=(files / artifact.ENGINE, built) if built is not None and in_engine else False,
        data=data.report,
        progress=progress,
    )
    notes = list(report.notes)
    if built is not None:
        notes.append(
            "the outputs are the engine's" if in_engine else "the engine was not run here: the outputs are ONNX Runtime's of the same model"
        )
    return replace(report, notes=tuple(notes))
