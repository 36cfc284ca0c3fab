"""Objects: each source compiled once, side by side, and kept under the hash of all that it depends on."""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fqonnx.errors import EngineError
from fqonnx.plugins import library
from fqonnx.plugins.toolchain import Toolchain, find_ort_headers, find_tensorrt_headers

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from fqonnx.plugins.sources import Source
    from fqonnx.progress import Task

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of what is kept; a change makes what was there before unknown."""

LINK_FLAGS = ("-shared", "--no-device-link", "-cudart=static", "-Xlinker=-z,defs", "-Xlinker=-s")

TENSORRT = "tensorrt"
_HEADERS: dict[str, Callable[[], Path | None]] = {"onnxruntime": find_ort_headers, TENSORRT: find_tensorrt_headers}
"""By part of the library, how to find the headers that are not ours; None: there are none, and it does without."""

_COMMON_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
_DEVICE_FLAGS = ("-Xptxas=-v",)
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_ERROR = re.compile(r"\berror\b|undefined reference|cannot find", re.IGNORECASE)
_UNUSED_DAYS = 30
_WORK = ".work-"


class Plan:
    """What is compiled, how, and the key of each object.

    Args:
        folder: Of the sources.
        toolchain: That compiles them.
        architectures: That are wanted.
        sources: That are compiled, all or some of the list.
        source_hash: Of all sources, which the library tells.

    Raises:
        EngineError: ONNX Runtime's headers are needed and missing, or those that ``TENSORRT_INCLUDE_DIR`` names.
    """

    def __init__(self, folder: Path, toolchain: Toolchain, architectures: tuple[str, ...], sources: list[Source], source_hash: str) -> None:
        self.folder = folder
        self.toolchain = toolchain
        self.architectures = architectures
        self.sources = sources
        self.source_hash = source_hash
        self.includes = [folder, folder / "kernels"]
        self.compiler = f"nvcc-{toolchain.version}"
        parts = {source.part for source in sources}
        self.headers = {part: there for part, find in _HEADERS.items() if part in parts and (there := find()) is not None}
        self.keys = {source.name: self._key(source) for source in sources}
        exports = (folder / library.EXPORTS).read_text(encoding="utf-8")
        self.key = hash_of(FORMAT, self.keys, LINK_FLAGS, exports)

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
        elif source.part == TENSORRT and TENSORRT in self.headers:
            flags.append("-DFQ_TENSORRT_SDK")
        elif source.part == "kernels":
            told = {"ARCHITECTURES": ",".join(self.architectures), "COMPILER": self.compiler, "SOURCES": self.source_hash}
            flags += [f'-DFQ_{name}="{value}"' for name, value in told.items()]
        return flags

    def command(self, source: Source, out: Path, threads: int) -> list[str]:
        """The command line that compiles a source; ``threads`` is how many architectures at a time."""
        paths = [f"-I{folder}" for folder in self.includes]
        if source.part in self.headers:
            paths += ["-isystem", str(self.headers[source.part])]
        path = str(self.folder / source.name)
        return [str(self.toolchain.nvcc), *self.flags(source), f"--threads={threads}", *paths, "-c", path, "-o", str(out)]

    def _key(self, source: Source) -> str:
        seen: dict[Path, str] = {}
        self._read(self.folder / source.name, seen)
        if source.part in self.headers:
            seen.update((path, sha256_of(path)) for path in _headers_of_others(self.headers[source.part], source.part))
        content = sorted((path.name, digest) for path, digest in seen.items())
        return hash_of(FORMAT, self.toolchain.identity, self.flags(source), content)

    def _read(self, path: Path, seen: dict[Path, str]) -> None:
        """The hashes of a file and of all it includes of ours."""
        if path in seen:
            return
        seen[path] = sha256_of(path)
        for name in _INCLUDE.findall(path.read_text(encoding="utf-8")):
            found = next((place / name for place in (path.parent, *self.includes) if (place / name).is_file()), None)
            if found is not None:
                self._read(found.resolve(), seen)


def _headers_of_others(folder: Path, part: str) -> Iterable[Path]:
    """What an object of that part may include from that folder; TensorRT's headers may lie among all of the system's."""
    return sorted(folder.glob("Nv*.h") if part == TENSORRT else folder.rglob("*.h"))


@dataclass(frozen=True)
class Object:
    """A compiled source.

    Attributes:
        path: The file.
        output: What the compiler said.
    """

    path: Path
    output: str


class Objects:
    """Objects by key: a folder each, of the object and a note of its hash and of what the compiler said.

    Args:
        folder: Where they are kept.
        plan: What to compile.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder = folder
        self._plan = plan

    def get(self, sources: Sequence[Source], jobs: int, *, force: bool, task: Task) -> dict[str, Object]:
        """The objects of all sources, compiled where they are not there.

        Args:
            sources: Of the plan.
            jobs: Compilers at a time.
            force: Compile those that are there, too.
            task: Where to tell how far it is, in the plan's ``units``.

        Raises:
            EngineError: One does not compile.
        """
        made = {} if force else {source.name: there for source in sources if (there := self._read(source)) is not None}
        task.advance(sum(self._plan.units(source) for source in sources if source.name in made))
        # The longest first, so that the last to end is a short one.
        todo = sorted((source for source in sources if source.name not in made), key=self._effort, reverse=True)
        if todo:
            make_folder(self._folder)
            self._clean()
            with work_folder(self._folder) as name, closing(_Pool(self._plan, work := Path(name), jobs).run(todo)) as done:
                for source in done:
                    made[source.name] = self._keep(source, work)
                    task.advance(self._plan.units(source))
        return {source.name: made[source.name] for source in sources}

    def _effort(self, source: Source) -> int:
        return (self._plan.folder / source.name).stat().st_size * self._plan.units(source)

    def _place(self, source: Source) -> Path:
        return self._folder / self._plan.keys[source.name][:32]

    def _read(self, source: Source) -> Object | None:
        place = self._place(source)
        try:
            note = json.loads((place / "note.json").read_text(encoding="utf-8"))
            if sha256_of(place / "object.o") != note["sha256"]:
                return None
            os.utime(place)  # used just now: not to be cleaned away
            return Object(place / "object.o", note["output"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _keep(self, source: Source, work: Path) -> Object:
        made, place = _workplace(work, source), self._place(source)
        output = (made / "output.txt").read_text(encoding="utf-8", errors="replace")
        (made / "note.json").write_text(json.dumps({"source": source.name, "sha256": sha256_of(made / "object.o"), "output": output}))
        if place.exists():
            place.rename(work / f"old-{place.name}")
        made.rename(place)
        return Object(place / "object.o", output)

    def _clean(self) -> None:
        """Forget objects that nobody used for long, and what a killed build left."""
        now = time.time()
        for entry in self._folder.iterdir():
            days = 1 if entry.name.startswith(_WORK) else _UNUSED_DAYS
            if now - entry.stat().st_mtime > days * 86400:
                shutil.rmtree(entry, ignore_errors=True)


class _Pool:
    """Compilers that run side by side, each in a session of its own so that it ends with its children."""

    def __init__(self, plan: Plan, work: Path, jobs: int) -> None:
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
        raise EngineError(f"{source.name} does not compile: {first_error(output, code)} (FQONNX_DEBUG=1 shows everything)")

    def _end(self) -> None:
        for process in self._running.values():
            _signal(process, signal.SIGTERM)
        for process in self._running.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                process.wait()


def work_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder for one build, on the file system of what it makes, and gone afterwards."""
    return tempfile.TemporaryDirectory(prefix=_WORK, dir=parent, ignore_cleanup_errors=True)


def first_error(output: str, code: int) -> str:
    """The line of a compiler's output that tells why it failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else f"the compiler ended with {code}")


def make_folder(path: Path) -> None:
    """Make a folder in the cache.

    Raises:
        EngineError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(f"{path} cannot be made: {error.strerror}: set XDG_CACHE_HOME to a folder that can be written") from error


def hash_of(*parts: object) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _workplace(work: Path, source: Source) -> Path:
    return work / source.name.replace("/", "-")


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
