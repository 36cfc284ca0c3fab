"""Compiles the kernels' library: every source of ``sources.txt`` once, in parallel, and only what changed since the last time.

An object is kept in the user's cache under the hash of all that it depends on: its source and the headers it includes, flags and
compilers. Everything is written beside its place and renamed, so that an interrupted build leaves nothing that a later one would trust.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fqonnx.errors import EngineError, UsageError
from fqonnx.plugins import library
from fqonnx.plugins.ptxas import Usage, advice, demangled, usages
from fqonnx.plugins.toolchain import Toolchain, find_ort_headers, find_toolchain, known_architectures
from fqonnx.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

    from fqonnx.progress import Progress, Task

logger = logging.getLogger(__name__)

HOST = "host"
ONNXRUNTIME = "onnxruntime"

_TESTED = "13.0"
_FORMAT = 1
"""Of the objects' cache and of ``build.json``; a change makes what was there before unknown."""

_COMMON_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
_DEVICE_FLAGS = ("-Xptxas=-v",)
_LINK_FLAGS = ("-shared", "--no-device-link", "-cudart=static", "-Xlinker=-z,defs", "-Xlinker=-s")
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_ERROR = re.compile(r"\berror\b|undefined reference|cannot find", re.IGNORECASE)
_UNUSED_DAYS = 30
_WORK = ".work-"


@dataclass(frozen=True)
class Source:
    """A line of ``sources.txt``.

    Attributes:
        name: Path below the folder of the list.
        architectures: Those it is compiled for; empty for code that runs on the host alone.
    """

    name: str
    architectures: tuple[str, ...]

    @property
    def part(self) -> str:
        """The part of the library it belongs to: ``kernels`` or a runtime."""
        return self.name.partition("/")[0]


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
        parts: Such as ``kernels`` and ``onnxruntime``.
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


def read_sources(folder: Path = library.FOLDER) -> list[Source]:
    """The list of sources, ``sources.txt``.

    Raises:
        EngineError: A file of the list is missing, so that the installation is incomplete.
    """
    sources = []
    for line in (folder / library.SOURCE_LIST).read_text(encoding="utf-8").splitlines():
        name, *architectures = line.partition("#")[0].split() or [""]
        if name:
            sources.append(Source(name, () if architectures == [HOST] else tuple(architectures)))
    missing = [source.name for source in sources if not (folder / source.name).is_file()]
    if missing:
        raise EngineError(f"{folder / missing[0]} is missing, which {library.SOURCE_LIST} lists: install fqonnx anew")
    return sources


def choose_architectures(wanted: Iterable[str], sources: Iterable[Source]) -> tuple[str, ...]:
    """The architectures to compile for, in the order of the list; all of them where nothing is wanted in particular.

    Args:
        wanted: Such as ``90a``, ``90``, ``sm90`` or ``sm_90a``; several may stand together, with commas.
        sources: Of ``read_sources``.

    Raises:
        UsageError: No source is for one of them; the message lists the choices.
    """
    known = sorted({name for source in sources for name in source.architectures}, key=_number)
    asked = [name for text in wanted for name in text.split(",")]
    if not asked:
        return tuple(known)
    chosen = set()
    for name in asked:
        bare = name.strip().lower().removeprefix("sm").removeprefix("_")
        match = next((entry for entry in known if bare in (entry, entry.removesuffix("a"))), None)
        if match is None:
            raise UsageError(f"unknown architecture {name!r}: choose from {', '.join(known)}")
        chosen.add(match)
    return tuple(name for name in known if name in chosen)


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
        without: Parts to leave out: ``onnxruntime``.
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
    plan = _Plan(folder, toolchain, names, [source for source in every if _is_wanted(source, names, without)], library.source_hash(folder))
    destination = library.cache_folder() / "plugin" / plan.source_hash[:16]
    if not force and (there := read_built(destination)) is not None and there.key == plan.key:
        logger.info("the library is up to date")
        return there
    objects = _Objects(library.cache_folder() / "objects", plan)
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
        if told.pop("format") != _FORMAT or _sha256(path) != told["sha256"]:
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


class _Plan:
    """What is compiled, how, and the key of each object."""

    def __init__(self, folder: Path, toolchain: Toolchain, architectures: tuple[str, ...], sources: list[Source], source_hash: str) -> None:
        self.folder = folder
        self.toolchain = toolchain
        self.architectures = architectures
        self.sources = sources
        self.source_hash = source_hash
        self.includes = [folder, folder / "kernels"]
        self.compiler = f"nvcc-{toolchain.version}"
        self.ort = find_ort_headers() if any(source.part == ONNXRUNTIME for source in sources) else None
        self.keys = {source.name: self._key(source) for source in sources}
        exports = (folder / library.EXPORTS).read_text(encoding="utf-8")
        self.key = _hash(_FORMAT, self.keys, _LINK_FLAGS, exports)

    def names(self, source: Source) -> list[str]:
        """The architectures that a source is compiled for."""
        return [name for name in self.architectures if name in source.architectures]

    def units(self, source: Source) -> int:
        """How much work it is, for the progress bar."""
        return max(1, len(self.names(source)))

    def flags(self, source: Source) -> list[str]:
        """Compiler flags without paths, so that an object does not depend on where the sources are."""
        flags = list(_COMMON_FLAGS)
        names = self.names(source)
        for name in names:
            # The lowest one's PTX too, for devices newer than all of these. That of 90a and the like runs nowhere else.
            ptx = f",compute_{name}" if name == names[0] and name.isdigit() else ""
            flags.append(f"-gencode=arch=compute_{name},code=[sm_{name}{ptx}]")
        if names:
            flags += _DEVICE_FLAGS
        elif source.part == "kernels":
            told = {"ARCHITECTURES": ",".join(self.architectures), "COMPILER": self.compiler, "SOURCES": self.source_hash}
            flags += [f'-DFQ_{name}="{value}"' for name, value in told.items()]
        return flags

    def command(self, source: Source, out: Path, threads: int) -> list[str]:
        paths = [f"-I{folder}" for folder in self.includes]
        if self.ort is not None and source.part == ONNXRUNTIME:
            paths += ["-isystem", str(self.ort)]
        path = str(self.folder / source.name)
        return [str(self.toolchain.nvcc), *self.flags(source), f"--threads={threads}", *paths, "-c", path, "-o", str(out)]

    def _key(self, source: Source) -> str:
        seen: dict[Path, str] = {}
        self._read(self.folder / source.name, seen)
        if self.ort is not None and source.part == ONNXRUNTIME:
            seen.update((path, _sha256(path)) for path in sorted(self.ort.rglob("*.h")))
        content = sorted((path.name, digest) for path, digest in seen.items())
        return _hash(_FORMAT, self.toolchain.identity, self.flags(source), content)

    def _read(self, path: Path, seen: dict[Path, str]) -> None:
        """The hashes of a file and of all it includes of ours."""
        if path in seen:
            return
        seen[path] = _sha256(path)
        for name in _INCLUDE.findall(path.read_text(encoding="utf-8")):
            found = next((place / name for place in (path.parent, *self.includes) if (place / name).is_file()), None)
            if found is not None:
                self._read(found.resolve(), seen)


@dataclass(frozen=True)
class _Object:
    path: Path
    output: str


class _Objects:
    """Objects by key: a folder of the object and a note of its hash and of what the compiler said."""

    def __init__(self, folder: Path, plan: _Plan) -> None:
        self._folder = folder
        self._plan = plan

    def get(self, sources: Sequence[Source], jobs: int, *, force: bool, task: Task) -> dict[str, _Object]:
        """The objects of all sources, compiled where they are not there."""
        made = {} if force else {source.name: there for source in sources if (there := self._read(source)) is not None}
        task.advance(sum(self._plan.units(source) for source in sources if source.name in made))
        # The longest first, so that the last to end is a short one.
        todo = sorted((source for source in sources if source.name not in made), key=self._effort, reverse=True)
        if todo:
            _make_folder(self._folder)
            self._clean()
            with _work_folder(self._folder) as name, closing(_Pool(self._plan, work := Path(name), jobs).run(todo)) as done:
                for source in done:
                    made[source.name] = self._keep(source, work)
                    task.advance(self._plan.units(source))
        return {source.name: made[source.name] for source in sources}

    def _effort(self, source: Source) -> int:
        return (self._plan.folder / source.name).stat().st_size * self._plan.units(source)

    def _place(self, source: Source) -> Path:
        return self._folder / self._plan.keys[source.name][:32]

    def _read(self, source: Source) -> _Object | None:
        place = self._place(source)
        try:
            note = json.loads((place / "note.json").read_text(encoding="utf-8"))
            if _sha256(place / "object.o") != note["sha256"]:
                return None
            os.utime(place)  # used just now: not to be cleaned away
            return _Object(place / "object.o", note["output"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _keep(self, source: Source, work: Path) -> _Object:
        made, place = _workplace(work, source), self._place(source)
        output = (made / "output.txt").read_text(encoding="utf-8", errors="replace")
        (made / "note.json").write_text(json.dumps({"source": source.name, "sha256": _sha256(made / "object.o"), "output": output}))
        if place.exists():
            place.rename(work / f"old-{place.name}")
        made.rename(place)
        return _Object(place / "object.o", output)

    def _clean(self) -> None:
        """Forget objects that nobody used for long, and what a killed build left."""
        now = time.time()
        for entry in self._folder.iterdir():
            days = 1 if entry.name.startswith(_WORK) else _UNUSED_DAYS
            if now - entry.stat().st_mtime > days * 86400:
                shutil.rmtree(entry, ignore_errors=True)


class _Pool:
    """Compilers that run side by side, each in a session of its own so that it ends with its children."""

    def __init__(self, plan: _Plan, work: Path, jobs: int) -> None:
        self._plan = plan
        self._work = work
        self._jobs = jobs
        self._running: dict[Source, subprocess.Popen[bytes]] = {}
        self._started: dict[Source, float] = {}

    def run(self, sources: Sequence[Source]) -> Generator[Source]:
        """Compile, and yield each source as it is done.

        Raises:
            EngineError: One does not compile; the others are ended.
        """
        waiting = list(sources)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self._jobs:
                    self._start(waiting.pop(0))
                done = [source for source, process in self._running.items() if process.poll() is not None]
                for source in done:
                    process = self._running.pop(source)
                    self._check(source, process.returncode)
                    yield source
                if not done:
                    time.sleep(0.02)
        finally:
            self._end()

    def _start(self, source: Source) -> None:
        place = _workplace(self._work, source)
        place.mkdir(parents=True)
        temporary = place / "tmp"
        temporary.mkdir()
        # One source can take longer than all others together: its architectures are compiled side by side, too.
        command = self._plan.command(source, place / "object.o", threads=self._jobs)
        logger.debug("%s", " ".join(command))
        self._started[source] = time.monotonic()
        with (place / "output.txt").open("wb") as output:
            self._running[source] = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "TMPDIR": str(temporary)},
            )

    def _check(self, source: Source, code: int) -> None:
        place = _workplace(self._work, source)
        output = (place / "output.txt").read_text(encoding="utf-8", errors="replace")
        shutil.rmtree(place / "tmp", ignore_errors=True)
        logger.debug("%s: %s", source.name, output)
        if code == 0 and (place / "object.o").is_file():
            logger.info("compiled %s in %.1f s", source.name, time.monotonic() - self._started[source])
            return
        raise EngineError(f"{source.name} does not compile: {_first_error(output, code)} (FQONNX_DEBUG=1 shows everything)")

    def _end(self) -> None:
        for process in self._running.values():
            _signal(process, signal.SIGTERM)
        for process in self._running.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                process.wait()


def _work_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder for one build, on the file system of what it makes, and gone afterwards."""
    return tempfile.TemporaryDirectory(prefix=_WORK, dir=parent, ignore_cleanup_errors=True)


def _link(
    plan: _Plan, compiled: dict[str, _Object], destination: Path, kernels: dict[str, list[Usage]], left_out: tuple[str, ...], started: float
) -> Built:
    _make_folder(destination)
    with _work_folder(destination) as name:
        work = Path(name)
        out = work / library.LIBRARY
        folders = [f"-L{folder}" for folder in plan.toolchain.library_folders]
        exports = f"-Xlinker=--version-script={plan.folder / library.EXPORTS}"
        objects = [str(made.path) for made in compiled.values()]
        command = [str(plan.toolchain.nvcc), *_LINK_FLAGS, exports, *folders, *objects, "-o", str(out)]
        logger.debug("%s", " ".join(command))
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(work)}
        )
        if done.returncode or not out.is_file():
            raise EngineError(f"the library does not link: {_first_error(done.stderr + done.stdout, done.returncode)}")
        built = Built(
            path=destination / library.LIBRARY,
            sha256=_sha256(out),
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
        note.write_text(json.dumps({"format": _FORMAT, **built.to_dict()}, indent=1))
        # The hash in the note tells whether it is this library's, should the build end between the two.
        out.replace(built.path)
        note.replace(destination / note.name)
    return built


def _check_known(names: Sequence[str], toolchain: Toolchain) -> None:
    known = known_architectures(toolchain)
    unknown = [name for name in names if _number(name) not in known]
    if unknown:
        raise EngineError(
            f"nvcc {toolchain.version} ({toolchain.nvcc}) knows no {', '.join(unknown)}: "
            "install CUDA 12.8 or newer, or name the architectures you need with --arch"
        )


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


def _is_wanted(source: Source, architectures: Sequence[str], without: Sequence[str]) -> bool:
    return source.part not in without and (not source.architectures or bool(set(source.architectures) & set(architectures)))


def _first_error(output: str, code: int) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else f"the compiler ended with {code}")


def _workplace(work: Path, source: Source) -> Path:
    return work / source.name.replace("/", "-")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(f"{path} cannot be made: {error.strerror}: set XDG_CACHE_HOME to a folder that can be written") from error


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _order(usage: Usage) -> tuple[int, str]:
    return _number(usage.architecture), usage.function


def _number(architecture: str) -> int:
    return int(architecture.rstrip("af"))


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
