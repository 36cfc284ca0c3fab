"""Compiles the kernels' library: every source of ``sources.txt`` once, in parallel, and only what changed since the last time.

An object is kept in the user's cache under the hash of all that it depends on: its source and the headers it includes, flags and
compilers. Everything is written beside its place and renamed, so that an interrupted build leaves nothing that a later one would trust.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fqonnx.errors import EngineError, UsageError
from fqonnx.plugins import library
from fqonnx.plugins.objects import FORMAT, LINK_FLAGS, Objects, Plan, first_error, make_folder, sha256_of, work_folder
from fqonnx.plugins.ptxas import Usage, advice, demangled, usages
from fqonnx.plugins.sources import Source, choose_architectures, number_of, read_sources
from fqonnx.plugins.toolchain import Toolchain, find_toolchain, known_architectures
from fqonnx.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fqonnx.plugins.objects import Object
    from fqonnx.progress import Progress

logger = logging.getLogger(__name__)

_TESTED = "13.0"


@dataclass(frozen=True)
class Built:
    """A library and what is known of it: ``build.json`` beside it.

    Attributes:
        path: The library.
        sha256: Of the library.
        size: In bytes.
        sources: Hash of the sources (``library.source_hash``).
        key: Hash of all that the library depends on.
        compiler: Such as ``nvcc 13.0.88``.
        architectures: Those that were asked for.
        parts: Such as ``kernels``, ``onnxruntime`` and ``tensorrt``.
        left_out: Sources that were not compiled, none of whose architectures were asked for or whose part was not wanted.
        seconds: That the build took.
        kernels: By source, the resources of its kernels.
    """

    path: Path
    sha256: str
    size: int
    sources: str
    key: str
    compiler: str
    architectures: tuple[str, ...]
    parts: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float
    kernels: dict[str, list[Usage]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "path": str(self.path)}


def build(
    *,
    architectures: Sequence[str] = (),
    without: Sequence[str] = (),
    force: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
    folder: Path = library.FOLDER,
) -> Built:
    """Compile and link the library, and put it where ``library.library_path`` finds it.

    Args:
        architectures: Those to compile for; all of ``sources.txt`` where empty.
        without: Parts to leave out: ``onnxruntime``, ``tensorrt``.
        force: Compile everything anew.
        jobs: Compilers at a time; None is one per CPU that this process may use.
        progress: Where to tell how far it is.
        folder: Of the sources.

    Raises:
        EngineError: A compiler or header is missing, a source does not compile, or a kernel would be slow: it spills, has arrays in local
            memory, or its wgmma instructions were serialized. The message says which and what to do.
        UsageError: An unknown architecture or part.
    """
    started = time.monotonic()
    every = read_sources(folder)
    names = choose_architectures(architectures, every)
    optional = {source.part for source in every} - {"kernels"}
    for part in without:
        if part not in optional:
            raise UsageError(f"unknown part {part!r}: choose from {', '.join(sorted(optional))}")
    toolchain = find_toolchain()
    _check_known(names, toolchain)
    plan = Plan(folder, toolchain, names, [source for source in every if _is_wanted(source, names, without)], library.source_hash(folder))
    destination = library.cache_folder() / "plugin" / plan.source_hash[:16]
    if not force and (there := read_built(destination)) is not None and there.key == plan.key:
        logger.info("the library is up to date")
        return there
    objects = Objects(library.cache_folder() / "objects", plan)
    with (progress or Silent()).task("Compiling", total=sum(map(plan.units, plan.sources))) as task:
        compiled = objects.get(plan.sources, jobs or len(os.sched_getaffinity(0)), force=force, task=task)
    kernels = {name: sorted(demangled(usages(made.output)), key=_order) for name, made in compiled.items()}
    _check_quality(kernels, {name: made.output for name, made in compiled.items()})
    left_out = tuple(source.name for source in every if source not in plan.sources)
    built = _link(plan, compiled, destination, kernels, left_out, started)
    logger.info("built %s in %.0f s", built.path, built.seconds)
    return built


def read_built(folder: Path) -> Built | None:
    """The library in that folder and what is known of it; None where there is none, or not both of one build."""
    path = folder / library.LIBRARY
    try:
        told = json.loads((folder / "build.json").read_text(encoding="utf-8"))
        if told.pop("format") != FORMAT or sha256_of(path) != told["sha256"]:
            return None
        kernels = {name: [Usage(**usage) for usage in listed] for name, listed in told.pop("kernels").items()}
        listed = {name: tuple(told.pop(name)) for name in ("architectures", "parts", "left_out")}
        return Built(**{**told, **listed, "path": path}, kernels=kernels)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def info() -> Built:
    """What is known of the library that this process would load.

    Raises:
        EngineError: There is none, or it was not made by ``build``.
    """
    path = library.require_library()
    built = read_built(path.parent)
    if built is None:
        how = f"unset {library.VARIABLE}" if os.environ.get(library.VARIABLE) else "run `fqonnx plugin build --force`"
        raise EngineError(f"nothing is known of {path}: it was changed, or not built by `fqonnx plugin build`: {how}")
    return built


def build_info(path: Path) -> dict[str, str]:
    """What a library says of itself (``fq_build_info``).

    Raises:
        EngineError: It does not load.
    """
    try:
        function = ctypes.CDLL(str(path)).fq_build_info
    except (OSError, AttributeError) as error:
        raise EngineError(f"the kernels' library does not load: {error}: run `fqonnx plugin build --force`") from error
    function.restype = ctypes.c_char_p
    return dict(line.split(": ", 1) for line in function().decode().splitlines())


def _link(
    plan: Plan, compiled: dict[str, Object], destination: Path, kernels: dict[str, list[Usage]], left_out: tuple[str, ...], started: float
) -> Built:
    make_folder(destination)
    with work_folder(destination) as name:
        work = Path(name)
        out = work / library.LIBRARY
        folders = [f"-L{folder}" for folder in plan.toolchain.library_folders]
        exports = f"-Xlinker=--version-script={plan.folder / library.EXPORTS}"
        objects = [str(made.path) for made in compiled.values()]
        command = [str(plan.toolchain.nvcc), *LINK_FLAGS, exports, *folders, *objects, "-o", str(out)]
        logger.debug("%s", " ".join(command))
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(work)}
        )
        if done.returncode or not out.is_file():
            raise EngineError(f"the library does not link: {first_error(done.stderr + done.stdout, done.returncode)}")
        built = Built(
            path=destination / library.LIBRARY,
            sha256=sha256_of(out),
            size=out.stat().st_size,
            sources=plan.source_hash,
            key=plan.key,
            compiler=plan.compiler.replace("-", " "),
            architectures=plan.architectures,
            parts=tuple(dict.fromkeys(source.part for source in plan.sources)),
            left_out=left_out,
            seconds=round(time.monotonic() - started, 1),
            kernels=kernels,
        )
        note = work / "build.json"
        note.write_text(json.dumps({"format": FORMAT, **built.to_dict()}, indent=1))
        # The hash in the note tells whether it is this library's, should the build end between the two.
        out.replace(built.path)
        note.replace(destination / note.name)
    return built


def _check_quality(kernels: dict[str, list[Usage]], outputs: dict[str, str]) -> None:
    """Fail on what would be silently slow."""
    problems = [f"{source}: {problem}" for source, listed in kernels.items() for usage in listed if (problem := usage.problem)]
    problems += [f"{source}: {line}" for source, output in outputs.items() for line in advice(output)]
    for problem in problems:
        logger.info("%s", problem)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise EngineError(
            f"{problems[0]}{more}: a slow kernel, so no library was made: use nvcc {_TESTED}, which this release was tested with"
        )


def _check_known(names: Sequence[str], toolchain: Toolchain) -> None:
    known = known_architectures(toolchain)
    unknown = [name for name in names if number_of(name) not in known]
    if unknown:
        raise EngineError(
            f"nvcc {toolchain.version} ({toolchain.nvcc}) knows no {', '.join(unknown)}: "
            "install CUDA 12.8 or newer, or name the architectures you need with --arch"
        )


def _is_wanted(source: Source, architectures: Sequence[str], without: Sequence[str]) -> bool:
    return source.part not in without and (not source.architectures or bool(set(source.architectures) & set(architectures)))


def _order(usage: Usage) -> tuple[int, str]:
    return number_of(usage.architecture), usage.function
