"""The build directory: how it is written so that it is never half there, and how it is opened again.

A build of ``OUT`` works in ``.OUT.partial`` beside it: ``work/`` holds what ``--resume`` reuses, ``files/`` becomes ``OUT``. Everything is
flushed to the disk before one rename puts ``files/`` in place; a build that dies earlier leaves no ``OUT``, or the old one untouched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fqonnx.durable import sync
from fqonnx.errors import ArtifactError
from fqonnx.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

MODEL = "model.onnx"
ENGINE = "engine.plan"
CALIBRATION = "calibration.safetensors"
REPORT = "report.json"
PAGE = "report.html"
MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the manifest's layout; raised when a reader of the older one would misread it."""

RESUMABLE = ("stats", "groups")
"""Folders of ``work`` whose files took long to make: the statistics and the solutions of groups."""

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full: free space or choose another place with -o",
    errno.EDQUOT: "the disk quota is used up: free space or choose another place with -o",
    errno.EFBIG: "the file size limit is reached: raise it (ulimit -f) or choose another place with -o",
    errno.EROFS: "the file system is read-only: choose another place with -o",
    errno.EACCES: "permission denied: choose another place with -o, or mend the folder's permissions",
    errno.EPERM: "permission denied: choose another place with -o, or mend the folder's permissions",
    errno.ENOTDIR: "a part of the path is a file: choose another place with -o",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one with -o",
    errno.EIO: "the disk reports an input/output error: choose another place with -o",
}

_log = logging.getLogger(__name__)


def disk_error(error: BaseException, place: Path) -> ArtifactError | None:
    """What a failure to write means to the user, or None when ``error`` is of another kind.

    Libraries that write files in native code (safetensors, protobuf, torch) hide the errno in their message; it is read from there.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        text = str(error)
        number = next((n for n in _DISK_ERRORS if os.strerror(n) in text or f"(os error {n})" in text), None)
    if number not in _DISK_ERRORS:
        return None
    named = error.filename if isinstance(error, OSError) and error.filename else place
    return ArtifactError(f"cannot write {named}: {_DISK_ERRORS[number]}")


class Workspace:
    """A build in progress, as a context manager: entering locks the place, ``commit`` puts the result there, leaving cleans up.

    Attributes:
        out: The build directory to be, absolute.
        root: ``.OUT.partial``, in the same folder so that the rename is atomic.
        files: What becomes ``out``; always empty at the start.
        work: What a resumed build reuses.
    """

    def __init__(self, out: Path, *, force: bool = False, resume: bool = False) -> None:
        self.out = Path(out).expanduser().resolve()
        self.root = self.out.parent / f".{self.out.name}.partial"
        self.files = self.root / "files"
        self.work = self.root / "work"
        self._replaced = self.root / "replaced"
        self._force = force
        self._resume = resume
        self._lock: int | None = None
        self._committed = False

    def __enter__(self) -> Self:
        """Lock the place and make the folders.

        Raises:
            ArtifactError: ``out`` exists and may not be replaced, an unfinished build is in the way, another build is writing there,
                or the disk refuses.
        """
        self._check_out()
        try:
            self._acquire()
            self._prepare()
            return self  # noqa: TRY300 - within, so that no line is left on which an interruption leaves the folder behind
        except BaseException as error:
            self._abandon()
            if isinstance(error, OSError):
                raise disk_error(error, self.root) or error from error
            raise

    def _check_out(self) -> None:
        if not os.path.lexists(self.out):
            return
        ours = (self.out / MANIFEST).is_file() or (self.out.is_dir() and not any(self.out.iterdir()))
        if not ours:
            raise ArtifactError(f"{self.out} exists and is no fqonnx build (it has no {MANIFEST}): choose another place with -o")
        if not self._force:
            raise ArtifactError(f"{self.out} exists: pass --force to replace it, or choose another place with -o")

    def _acquire(self) -> None:
        while True:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                if self._take_lock(os.O_CREAT):
                    break
            except FileNotFoundError:  # the build that held it has just finished and removed the folder
                continue
            except BlockingIOError:
                assert self._lock is not None
                holder = os.read(self._lock, 20).decode() or "?"
                raise ArtifactError(
                    f"process {holder} is building {self.out} right now: wait for it, or choose another place with -o"
                ) from None
        assert self._lock is not None
        os.truncate(self._lock, 0)
        os.write(self._lock, str(os.getpid()).encode())

    def _take_lock(self, flags: int = 0) -> bool:
        """Lock the file ``lock`` of the folder; False where it is another one by now. Raises BlockingIOError where a build holds it."""
        path = self.root / "lock"
        self._lock = os.open(path, os.O_RDWR | flags, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            if os.stat(path).st_ino == os.fstat(self._lock).st_ino:  # noqa: PTH116 - the descriptor's twin
                return True
        except FileNotFoundError:
            pass
        self._release()
        return False

    def _abandon(self) -> None:
        """Undo an entering that failed or was interrupted, at whatever moment: the folder goes, unless it is another build's."""
        self._release()
        try:
            if self._take_lock():
                self._clear()
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                self.root.rmdir()
        except OSError:
            pass  # another build's, or the disk refuses, which is what the user is told anyway
        finally:
            self._release()

    def _prepare(self) -> None:
        if self._put_back():
            self._check_out()
        if self.work.exists() and not self._resume:
            if not self._force and self._has_finished_work():
                raise ArtifactError(
                    f"an unfinished build of {self.out} is in {self.root}: continue it with --resume, or start over with --force"
                )
            shutil.rmtree(self.work)
        for leftover in (self.files, self._replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        if self._resume and not self.work.exists():
            _log.info("nothing to resume in %s: starting from the beginning", self.root)
        self.files.mkdir()
        self.work.mkdir(exist_ok=True)

    def _has_finished_work(self) -> bool:
        return any(any((self.work / folder).glob("*.safetensors")) for folder in RESUMABLE)

    def settings(self, values: Mapping[str, Any]) -> None:
        """Note what the results in ``work`` depend on; on resume, refuse to mix them with others.

        Raises:
            ArtifactError: The unfinished build was started with other values; the message names the first that differs.
        """
        path = self.work / "settings.json"
        wanted: dict[str, Any] = json.loads(json.dumps(values))
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except ValueError:
                found = {}
            for key, value in wanted.items():
                if found.get(key) != value:
                    raise ArtifactError(
                        f"the unfinished build of {self.out} was started with {key} {_short(found.get(key))}, this one with "
                        f"{_short(value)}: repeat its command with --resume, or start over with --force"
                    )
        write_json(path, wanted)

    def require_space(self, needed: int) -> None:
        """Stop early where the disk cannot hold the build.

        Args:
            needed: Bytes that the whole build writes; what a resumed one has written already is taken off.

        Raises:
            ArtifactError: Fewer bytes are free.
        """
        needed -= sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise ArtifactError(
                f"{self.out.parent} has {free / 1e9:.2f} GB free and the build needs about {needed / 1e9:.2f} GB: "
                "free space or choose another place with -o"
            )

    def commit(self) -> None:
        """Flush ``files`` to the disk and rename it to ``out``, replacing an older build where that was allowed."""
        for path in sorted(self.files.rglob("*")):
            sync(path)
        sync(self.files)
        if self.out.exists():
            self.out.rename(self._replaced)
        self.files.rename(self.out)
        sync(self.out.parent)
        self._committed = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove the workspace, unless the build failed with finished work in it; turn failures to write into one clear line."""
        keep = self._clear()
        if error is None:
            return
        mended = disk_error(error, self.root) if isinstance(error, Exception) else None
        if keep and "--resume" not in str(error):
            (mended or error).add_note("what is finished is kept: repeat the command with --resume to go on")
        if mended is not None:
            raise mended from error

    def _put_back(self) -> bool:
        """Where a build ended between the two renames of ``commit``, the older one goes back to its place. Whether it did."""
        if not self._replaced.exists() or self.out.exists():
            return False
        self._replaced.rename(self.out)
        return True

    def _clear(self) -> bool:
        """Remove the folder unless there is finished work of an unfinished build in it; release the lock. Whether it stays."""
        with contextlib.suppress(OSError):  # the folder stays then, or the rename that failed is told of
            self._put_back()
        keep = self._replaced.exists() and not self.out.exists()
        keep |= not self._committed and self._has_finished_work()
        if not keep:
            shutil.rmtree(self.root, ignore_errors=True)
        self._release()
        return keep

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


@dataclass(frozen=True)
class Artifact:
    """A finished build directory.

    Attributes:
        path: The directory.
        manifest: The parsed ``manifest.json``.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def model(self) -> Path:
        """The quantized ONNX model."""
        return self.path / MODEL

    @property
    def engine(self) -> Path | None:
        """The serialized engine, or None where the build made none."""
        return self.path / ENGINE if ENGINE in self.manifest["files"] else None

    @property
    def report(self) -> Path:
        """``report.json``."""
        return self.path / REPORT

    @property
    def recipe(self) -> Recipe:
        """The choices it was built with."""
        return Recipe.from_dict(self.manifest["recipe"])

    @property
    def groups(self) -> list[dict[str, Any]]:
        """One entry per group: transform, bits, scales, kernel binding, metrics."""
        groups: list[dict[str, Any]] = self.manifest["groups"]
        return groups


def open_artifact(path: Path | str, *, check_hashes: bool = True) -> Artifact:
    """Open a build directory and make sure that it is what its manifest says.

    Args:
        path: The directory.
        check_hashes: Read every file and compare its SHA-256; False compares sizes only.

    Raises:
        ArtifactError: Not a build directory, a damaged manifest, or a file that is missing, truncated or changed.
    """
    folder = Path(path)
    if not folder.exists():
        raise ArtifactError(f"{folder}: no such build directory: give the -o of an `fqonnx build`")
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        raise ArtifactError(f"{folder} is no fqonnx build (it has no {MANIFEST}): give the -o of an `fqonnx build`")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{manifest_path} is damaged ({error}): build it again") from None
    _check_manifest(manifest_path, manifest)
    for name, entry in manifest["files"].items():
        _check_file(folder / name, entry, check_hashes=check_hashes)
    return Artifact(folder, manifest)


def _check_manifest(path: Path, manifest: object) -> None:
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise ArtifactError(f"{path} is no fqonnx manifest: give the -o of an `fqonnx build`")
    if manifest["format"] > FORMAT:
        raise ArtifactError(f"{path} was written by a newer fqonnx (format {manifest['format']}, known {FORMAT}): upgrade fqonnx")
    if "sensitivity" in manifest:
        raise ArtifactError(f"{path.parent} holds sensitivities, no build: give the -o of an `fqonnx build`")
    expected = {"files": dict, "recipe": dict, "groups": list}
    for key, kind in expected.items():
        if not isinstance(manifest.get(key), kind):
            raise ArtifactError(f"{path} is damaged ({key} is missing): build it again")
    for name, entry in manifest["files"].items():
        if Path(name).name != name or not isinstance(entry, dict) or {"bytes", "sha256"} - set(entry):
            raise ArtifactError(f"{path} is damaged (file entry {name!r}): build it again")
    if MODEL not in manifest["files"]:
        raise ArtifactError(f"{path} is damaged (it lists no {MODEL}): build it again")


def _check_file(path: Path, entry: dict[str, Any], *, check_hashes: bool) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: build it again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ArtifactError(f"{path} has {size} bytes where the manifest says {entry['bytes']}: copy it again or build it again")
    if check_hashes and file_hash(path) != entry["sha256"]:
        raise ArtifactError(f"{path} is not what was built (its SHA-256 differs from the manifest's): copy it again or build it again")


def write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """Write ``manifest.json``: ``values``, the format version, and size and SHA-256 of every other file in ``folder``."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in _regular_files(folder) if path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"format": FORMAT, **values, "files": files})


def _regular_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file())


def write_json(path: Path, value: object) -> None:
    """Write strict JSON (no NaN) through a temporary name, so that a reader never meets half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
