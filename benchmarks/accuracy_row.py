"""One row of ``benchmarks.accuracy`` in a process of its own: a build that crashes is a row with an error, not the end of the table."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.accuracy_cases import MODEL, SUBJECTS
from fqonnx.errors import FqonnxError

NO_BOUND = 1e9
"""A bound on the error that no row fails: the table is there to show bad ones too."""


@dataclass(frozen=True)
class Task:
    """What a process is to do; JSON.

    Attributes:
        subject: A key of ``SUBJECTS``.
        folder: The subject's folder.
        recipe: A recipe as ``Recipe.to_dict`` gives it; None scores the float model.
        device: Where groups are solved.
        verify_device: Where the result is verified.
        observed: A folder for statistics of the float model that rows share.
        observe: Fill that folder and do nothing else.
        out: Folder of the build; removed once it is scored.
        cpus: The CPUs to use.
        result: The file to write.
    """

    subject: str
    folder: str
    recipe: dict[str, Any] | None
    device: str
    verify_device: str
    observed: str | None
    observe: bool
    out: str
    cpus: list[int]
    result: str


@dataclass(frozen=True)
class Result:
    """What came of it; JSON.

    Attributes:
        figures: By name, the subject's own first.
        seconds: By stage of the build, and ``total``.
        error: Why there are none; empty where there are.
    """

    figures: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""


def perform(task: Task) -> Result:
    """Build and score, or observe.

    Raises:
        FqonnxError: The build cannot be made.
    """
    from fqonnx.recipe import Recipe

    subject = SUBJECTS[task.subject](Path(task.folder))
    if task.recipe is None:
        return Result(subject.score(subject.folder / MODEL))
    recipe = Recipe.from_dict(task.recipe)
    if task.observe:
        return _observe(task, recipe)
    from fqonnx.artifact import Workspace
    from fqonnx.build import build
    from fqonnx.sensitivity import adopt_work

    out = Path(task.out)
    if task.observed is not None:
        work = Workspace(out).work
        work.mkdir(parents=True, exist_ok=True)
        adopt_work(Path(task.observed), work)
    report = build(
        subject.folder / MODEL,
        out,
        recipe=recipe,
        calib_data=subject.calibration,
        calib_samples=subject.samples,
        device=task.device,
        verify_device=task.verify_device,
        max_error=NO_BOUND,
        resume=True,
        force=True,
    )
    seconds = dict(report.time or {})
    return Result(subject.score(out / MODEL), seconds)


def _observe(task: Task, recipe: Any) -> Result:
    """Statistics of every group, under the name by which ``adopt_work`` finds them."""
    from fqonnx.build import Data, FloatModel, observe_groups
    from fqonnx.progress import Silent

    assert task.observed is not None
    subject = SUBJECTS[task.subject](Path(task.folder))
    folder, start = Path(task.observed), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    model = FloatModel.read(subject.folder / MODEL, recipe)
    data = Data.read(model.model, subject.calibration, samples=subject.samples, seed=recipe.seed)
    observe_groups(model, data, recipe, folder, Silent())
    link = folder / "work-stats"
    if not link.exists():
        link.symlink_to("stats")
    return Result(seconds={"observe": time.perf_counter() - start})


def main(path: Path) -> None:
    """Do the task of a file and write its result, whole or not at all."""
    task = Task(**json.loads(path.read_text(encoding="utf-8")))
    os.sched_setaffinity(0, task.cpus)
    try:
        result = perform(task)
    except FqonnxError as error:
        result = Result(error=str(error))
    except Exception as error:  # noqa: BLE001  # a fault of the combination is what the row has to show; the log has the traceback
        traceback.print_exc()
        result = Result(error=f"{type(error).__name__}: {error}")
    partial = Path(f"{task.result}.partial")
    partial.write_text(json.dumps(asdict(result)), encoding="utf-8")
    partial.replace(task.result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
