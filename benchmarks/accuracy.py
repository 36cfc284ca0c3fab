"""Every transform with every weight quantizer on two models, and the main recipes over several seeds.

    python -m benchmarks.accuracy --llama FOLDER --out out/accuracy

Each row is a build as ``fqonnx build`` makes it, scored in plain ONNX Runtime on the CPU: perplexity of a small Llama, cosine of sentence
embeddings of all-MiniLM-L6-v2. Names come from the registries. What the float model shows calibration is observed once for each seed. A row
is kept in ``OUT/rows`` under a key of all that it depends on, the code included: the same command goes on where it was interrupted, and
measures nothing twice. A combination that fails is a row that says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import click

import fqonnx
from benchmarks.accuracy_cases import Llama, MiniLM
from benchmarks.accuracy_row import Result, Task
from benchmarks.results import only_option, run
from fqonnx.artifact import file_hash
from fqonnx.calib.registry import transform_named, weight_quantizer_named
from fqonnx.calib.transforms import TRANSFORMS
from fqonnx.calib.transforms.base import Learnable
from fqonnx.calib.weights import WEIGHT_QUANTIZERS
from fqonnx.errors import UsageError
from fqonnx.recipe import RECONSTRUCTIONS, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.accuracy_cases import Subject

MAIN_WEIGHTS = ("rtn", "gptq")
"""Weight quantizers of the main rows: with the default transform, each reconstruction, and every seed."""

_PACKAGES = ("torch", "onnxruntime", "numpy", "onnx-ir")


@dataclass(frozen=True)
class Case:
    """One row to measure.

    Attributes:
        subject: The float model.
        recipe: What to build of it; None for itself.
    """

    subject: Subject
    recipe: Recipe | None

    @property
    def label(self) -> str:
        """What ``--only`` is matched with."""
        r = self.recipe
        return self.subject.name if r is None else f"{self.subject.name} {r.transform} {r.weights} {r.reconstruct} seed {r.seed}"


def matrix(subject: Subject) -> list[Case]:
    """Each transform with each weight quantizer, group by group, those that are trained first: they take longest."""
    trained = [isinstance(transform_named(name), Learnable) for name in TRANSFORMS]
    names = [name for _, name in sorted(zip(trained, TRANSFORMS, strict=True), key=lambda pair: not pair[0])]
    return [Case(subject, Recipe(transform=name, weights=weights)) for name in names for weights in WEIGHT_QUANTIZERS]


def main_rows(subject: Subject, seeds: int) -> list[Case]:
    """The default transform with each reconstruction, over several seeds."""
    return [
        Case(subject, Recipe(weights=weights, reconstruct=reconstruct, seed=seed))
        for reconstruct in RECONSTRUCTIONS
        for weights in MAIN_WEIGHTS
        for seed in range(seeds)
    ]


class Runner:
    """Measures cases, several at once, each on CPUs of its own.

    Args:
        out: Folder of rows, observations and builds.
        jobs: Cases at once.
        device: Where groups are solved.
        verify_device: Where results are verified.
    """

    def __init__(self, out: Path, *, jobs: int, device: str, verify_device: str) -> None:
        self._out, self._device, self._verify_device = out, device, verify_device
        cpus = sorted(os.sched_getaffinity(0))
        if jobs > len(cpus):
            raise UsageError(f"--jobs {jobs} is more than the {len(cpus)} CPUs there are: give at most that")
        self._slots: SimpleQueue[list[int]] = SimpleQueue()
        for slot in range(jobs):
            self._slots.put(cpus[slot::jobs])
        self._jobs = jobs
        self._identities: dict[Path, str] = {}
        (out / "rows").mkdir(parents=True, exist_ok=True)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of what measures, a digest of fqonnx's own code among them."""
        from importlib.metadata import version

        digest = hashlib.sha256()
        folder = Path(fqonnx.__file__).parent
        for name in ("", "calib", "passes", "ops", "engines", "verify"):
            for path in sorted((folder / name).glob("**/*.py" if name else "*.py")):
                digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
        return {"fqonnx": version("fqonnx"), "code": digest.hexdigest()[:16], **{name: _version(name) for name in _PACKAGES}}

    def result_path(self, case: Case) -> Path:
        """Where the row is, or will be."""
        depends_on = [
            self._identity(case.subject),
            None if case.recipe is None else case.recipe.to_dict(),
            self._device,
            self.versions,
        ]
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
        return self._out / "rows" / f"{case.label.replace(' ', '-')}-{key}.json"

    def result(self, case: Case) -> Result | None:
        """The row, if it was measured."""
        try:
            return Result(**json.loads(self.result_path(case).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def measure(self, cases: Iterable[Case]) -> None:
        """Measure what is not there yet; failures are noted in their rows."""
        missing = [case for case in dict.fromkeys(cases) if self.result(case) is None]
        folders = {folder: case for case in missing if (folder := self._observed(case)) is not None}
        observed = [case for folder, case in folders.items() if not (folder / "done.json").exists()]
        for case in observed:  # one after the other, each on all CPUs: the rows wait for them
            self._observe(case)
        with ThreadPoolExecutor(self._jobs) as pool:
            list(pool.map(self._measure, missing))

    def _observe(self, case: Case) -> None:
        folder = self._observed(case)
        assert folder is not None
        shutil.rmtree(folder, ignore_errors=True)
        result = self._run(case, folder / "done.json", observe=True)
        click.echo(f"{case.label}: observed in {result.seconds.get('observe', 0):.0f} s {result.error}".rstrip(), err=True)

    def _measure(self, case: Case) -> None:
        result = self._run(case, self.result_path(case), observe=False)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in result.figures.items())
        click.echo(f"{case.label}: {result.error or figures} ({result.seconds.get('total', 0):.0f} s)", err=True)

    def _run(self, case: Case, path: Path, *, observe: bool) -> Result:
        slots = [self._slots.get() for _ in range(self._jobs if observe else 1)]
        cpus = sorted(cpu for slot in slots for cpu in slot)
        path.parent.mkdir(parents=True, exist_ok=True)
        work = self._out / "work" / path.stem / case.label.replace(" ", "-")
        work.mkdir(parents=True, exist_ok=True)
        observed = self._observed(case)
        task = Task(
            subject=case.subject.name,
            folder=str(case.subject.folder),
            recipe=None if case.recipe is None else case.recipe.to_dict(),
            device=self._device,
            verify_device=self._verify_device,
            observed=None if observed is None else str(observed),
            observe=observe,
            out=str(work / "build"),
            cpus=cpus,
            result=str(path),
        )
        described = work / "task.json"
        described.write_text(json.dumps(asdict(task)), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": str(len(cpus)), "MKL_NUM_THREADS": str(len(cpus))}
        try:
            with (work / "log").open("w") as log:
                command = [sys.executable, "-m", "benchmarks.accuracy_row", str(described)]
                done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False, cwd=Path(__file__).parents[1])  # noqa: S603
            if done.returncode or not path.exists():
                last = (work / "log").read_text(errors="replace").strip().splitlines()
                ended = Result(error=f"its process ended with code {done.returncode}: {last[-1] if last else 'it said nothing'}")
                path.write_text(json.dumps(asdict(ended)), encoding="utf-8")
            result = Result(**json.loads(path.read_text(encoding="utf-8")))
            if result.error:
                shutil.copyfile(work / "log", path.with_suffix(".log"))
            return result
        finally:
            shutil.rmtree(work.parent, ignore_errors=True)
            for slot in slots:
                self._slots.put(slot)

    def _observed(self, case: Case) -> Path | None:
        """The folder of what the float model shows this case's solver, which all cases with the same needs share."""
        recipe = case.recipe
        if recipe is None or recipe.reconstruct != "group":
            return None
        hessian = weight_quantizer_named(recipe.weights).needs_hessian
        if not (hessian or transform_named(recipe.transform).needs_tokens):
            return None
        parts = (case.subject.name, f"seed{recipe.seed}", "hessian" if hessian else "tokens", self._identity(case.subject)[:12])
        return self._out / "observed" / "-".join((*parts, self.versions["code"]))

    def _identity(self, subject: Subject) -> str:
        """A digest of the float model and the data."""
        known = self._identities
        if subject.folder not in known:
            digest = hashlib.sha256()
            for path in sorted(path for path in subject.folder.rglob("*") if path.is_file()):
                digest.update(f"{path.relative_to(subject.folder)} {file_hash(path)}\n".encode())
            known[subject.folder] = digest.hexdigest()
        return known[subject.folder]


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:  # onnxruntime-gpu is the same module under another name
        return version(f"{package}-gpu")


# --- Tables -------------------------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(result: Result | None, figure: str) -> str:
    """A figure and the time it took to solve; what went wrong in a word, which is told below the table."""
    if result is None:
        return "–"
    if result.error:
        return "failed"
    return f"{result.figures[figure]:.{_digits(figure)}f} ({result.seconds.get('solve', 0):.0f} s)"


def _digits(figure: str) -> int:
    return 3 if figure == "perplexity" else 4


def matrix_table(subject: Subject, runner: Runner) -> str:
    """Transforms down, weight quantizers across."""
    found = {(case.recipe.transform, case.recipe.weights): runner.result(case) for case in matrix(subject) if case.recipe is not None}
    rows = [[t, *(cell(found[t, w], subject.figure) for w in WEIGHT_QUANTIZERS)] for t in TRANSFORMS]
    errors = [f"- {t} + {w}: {result.error}" for (t, w), result in found.items() if result is not None and result.error]
    text = table([f"{subject.name}, {subject.figure}", *WEIGHT_QUANTIZERS], rows)
    return "\n\n".join([text, *(["\n".join(errors)] if errors else [])])


def seeds_table(subject: Subject, runner: Runner, seeds: int) -> str:
    """Mean and spread of the main rows."""
    rows, errors = list[list[str]](), list[str]()
    by_name: dict[tuple[str, str], list[Case]] = {}
    for case in main_rows(subject, seeds):
        assert case.recipe is not None
        by_name.setdefault((case.recipe.reconstruct, case.recipe.weights), []).append(case)
    for (reconstruct, weights), cases in by_name.items():
        results = [result for case in cases if (result := runner.result(case)) is not None]
        errors += [f"- {case.label}: {found.error}" for case in cases if (found := runner.result(case)) is not None and found.error]
        good = [result for result in results if not result.error]
        values = [result.figures[subject.figure] for result in good]
        if not values:
            rows.append([reconstruct, weights, "0", "failed" if results else "–", "", ""])
            continue
        digits = _digits(subject.figure)
        rows.append(
            [
                reconstruct,
                weights,
                str(len(values)),
                f"{statistics.mean(values):.{digits}f}",
                f"{min(values):.{digits}f} to {max(values):.{digits}f}",
                f"{statistics.mean(result.seconds.get('solve', 0) for result in good):.0f} s",
            ]
        )
    first = f"{subject.name}, {Recipe().transform}: reconstruct"
    head = [first, "weights", "seeds", f"mean {subject.figure}", "lowest to highest", "solve"]
    return "\n\n".join([table(head, rows), *(["\n".join(errors)] if errors else [])])


def page(subjects: Sequence[Subject], runner: Runner, seeds: int, about: str) -> str:
    """All tables in Markdown."""
    parts = []
    for subject in subjects:
        floats = runner.result(Case(subject, None))
        if floats is not None and floats.figures:
            parts.append(f"{subject.name}: float {subject.figure} {floats.figures[subject.figure]:.{_digits(subject.figure)}f}.")
        parts += [matrix_table(subject, runner), seeds_table(subject, runner, seeds)]
    return "\n\n".join([*parts, about]) + "\n"


def _about(runner: Runner, jobs: int, device: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in runner.versions.items())
    return f"{jobs} builds at once on {len(os.sched_getaffinity(0))} CPUs; groups are solved on {_device_name(device)}; {versions}."


def _device_name(device: str) -> str:
    if device == "cpu":
        return "the CPU"
    import torch

    return str(torch.cuda.get_device_name())


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="out/accuracy", show_default=True, help="Folder to write.")
@click.option("--llama", type=click.Path(path_type=Path), help="A folder that save_pretrained wrote, or an .onnx file.")
@click.option("--tokens", type=click.Path(path_type=Path), help="An .npz with `calib` and `open`.  [default: tokens.npz in --llama]")
@click.option("--minilm/--no-minilm", default=True, show_default=True, help="Measure all-MiniLM-L6-v2.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Builds at once, which share the CPUs.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where groups are solved.")
@click.option("--verify-device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where builds are verified.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Seeds of the main rows.")
@only_option
@click.option("--prepare", is_flag=True, help="Only export the models and write their data to OUT, which may then be copied elsewhere.")
def main(
    out: Path,
    llama: Path | None,
    tokens: Path | None,
    minilm: bool,
    jobs: int,
    device: str,
    verify_device: str,
    seeds: int,
    only: str | None,
    prepare: bool,
) -> None:
    """Measure every transform with every weight quantizer, and write OUT/accuracy.md and OUT/accuracy.json."""
    out = out.resolve()
    subjects: list[Subject] = []
    if llama is not None or (out / "llama").is_dir():
        subject = Llama(out / "llama")
        if llama is not None:
            subject.prepare(llama, tokens)
        subjects.append(subject)
    if minilm:
        encoder = MiniLM(out / "minilm")
        encoder.prepare()
        subjects.append(encoder)
    if not subjects:
        raise UsageError("there is nothing to measure: give --llama, or leave out --no-minilm")
    if prepare:
        return
    runner = Runner(out, jobs=jobs, device=device, verify_device=verify_device)
    cases = [case for subject in subjects for case in (Case(subject, None), *main_rows(subject, seeds), *matrix(subject))]
    wanted = [case for case in cases if only is None or case.recipe is None or re.search(only, case.label)]
    runner.measure(wanted)
    text = page(subjects, runner, seeds, _about(runner, jobs, device))
    (out / "accuracy.md").write_text(text, encoding="utf-8")
    rows = {case.label: asdict(result) for case in cases if (result := runner.result(case)) is not None}
    about = {"versions": runner.versions, "device": _device_name(device), "jobs": jobs, "cpus": len(os.sched_getaffinity(0))}
    (out / "accuracy.json").write_text(json.dumps({**about, "rows": rows}, indent=2), encoding="utf-8")
    click.echo(text, nl=False)


if __name__ == "__main__":
    run(main)
