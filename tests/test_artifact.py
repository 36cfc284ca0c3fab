"""The build directory: appears whole or not at all, and is checked when it is opened."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fqonnx.artifact import MANIFEST, MODEL, Artifact, Workspace, disk_error, open_artifact, write_json, write_manifest
from fqonnx.errors import ArtifactError
from fqonnx.recipe import Recipe

if TYPE_CHECKING:
    from types import FrameType

    from _typeshed import TraceFunction

VALUES = {"recipe": Recipe(transform="none").to_dict(), "groups": [{"name": "g"}]}


def finish(workspace: Workspace, content: str = "model") -> None:
    (workspace.files / MODEL).write_text(content)
    write_manifest(workspace.files, VALUES)
    workspace.commit()


def make(out: Path, content: str = "model", **options: bool) -> Artifact:
    with Workspace(out, **options) as workspace:
        finish(workspace, content)
    return open_artifact(out)


def fail(out: Path, error: BaseException, *, solved: bool = True, **options: bool) -> None:
    """A build that dies of ``error``, with or without a finished result."""
    with Workspace(out, **options) as workspace:
        (workspace.files / MODEL).write_text("half")
        if solved:
            (workspace.work / "groups").mkdir()
            (workspace.work / "groups" / "0000.safetensors").write_text("solved")
            workspace.settings({"seed": 0})
        raise error


def interrupt(out: Path) -> None:
    """Leave an unfinished build of ``out`` with one finished result in it."""
    with pytest.raises(KeyboardInterrupt):
        fail(out, KeyboardInterrupt())


def test_a_finished_build_opens_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    artifact = make(tmp_path / "out")
    assert artifact.model.read_text() == "model"
    assert artifact.recipe == Recipe(transform="none")
    assert artifact.groups == [{"name": "g"}]
    assert artifact.engine is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    make(tmp_path / "a" / "b" / "out")


def test_an_existing_build_is_replaced_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")
    with pytest.raises(ArtifactError, match=r"out exists: pass --force to replace it"), Workspace(out):
        pass
    assert make(out, "new", force=True).model.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_what_is_not_a_build_is_never_replaced(tmp_path: Path, force: bool) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("text")
    for place in (folder, file):
        with pytest.raises(ArtifactError, match="is no fqonnx build"), Workspace(place, force=force):
            pass
    assert (folder / "thesis.tex").read_text() == "years of work"
    assert file.read_text() == "text"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "out", ZeroDivisionError(), solved=False)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_leaves_the_old_build(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")
    with pytest.raises(ZeroDivisionError):
        fail(out, ZeroDivisionError(), solved=False, force=True)
    assert open_artifact(out).model.read_text() == "old"


def test_a_build_killed_between_the_two_renames_is_restored(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    out.rename(partial / "replaced")
    with pytest.raises(ArtifactError, match="exists: pass --force"), Workspace(out):
        pass
    assert open_artifact(out).model.read_text() == "old"


def test_finished_work_is_kept_and_must_be_resumed_or_discarded(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(out)
    with pytest.raises(ArtifactError, match=r"unfinished build .* --resume, or start over with --force"), Workspace(out):
        pass
    with Workspace(out, resume=True) as workspace:
        assert (workspace.work / "groups" / "0000.safetensors").read_text() == "solved"
        finish(workspace)
    assert not (tmp_path / ".out.partial").exists()

    interrupt(tmp_path / "other")
    with Workspace(tmp_path / "other", force=True) as workspace:
        assert list(workspace.work.iterdir()) == []


def test_an_interrupted_build_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        fail(tmp_path / "out", KeyboardInterrupt())
    assert caught.value.__notes__ == ["what is finished is kept: repeat the command with --resume to go on"]


def test_resume_refuses_other_settings(tmp_path: Path) -> None:
    interrupt(tmp_path / "out")
    with (
        pytest.raises(ArtifactError, match=r"started with seed 0, this one with 1: .* --force"),
        Workspace(tmp_path / "out", resume=True) as workspace,
    ):
        workspace.settings({"seed": 1})
    with Workspace(tmp_path / "out", resume=True) as workspace:
        workspace.settings({"seed": 0})
        finish(workspace)


def test_resume_without_an_unfinished_build_starts_from_the_beginning(tmp_path: Path) -> None:
    assert make(tmp_path / "out", resume=True).model.read_text() == "model"


def test_two_builds_into_one_place_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = f"from pathlib import Path; from fqonnx.artifact import Workspace\nwith Workspace(Path({str(out)!r})): pass"
    with Workspace(out) as workspace:
        second = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert f"process {os.getpid()} is building {out} right now" in second.stderr
        finish(workspace)
    assert open_artifact(out).model.read_text() == "model"


ENTERING = ("__enter__", "_check_out", "_acquire", "_take_lock", "_prepare", "_has_finished_work", "_put_back")


def interrupting(step: int, *functions: str) -> TraceFunction:
    """A trace function that interrupts at the ``step``-th line that runs in some of the workspace's functions."""
    steps = 0

    def trace(frame: FrameType, event: str, _argument: object) -> TraceFunction | None:
        nonlocal steps
        if frame.f_code.co_filename != sys.modules[Workspace.__module__].__file__ or frame.f_code.co_name not in functions:
            return None
        if event == "line":
            steps += 1
            if steps == step:
                raise KeyboardInterrupt
        return trace

    return trace


def interrupted_at(step: int, out: Path, **options: bool) -> bool:
    """Enter a workspace and interrupt it at the ``step``-th line that runs; whether there were so many."""
    workspace, before = Workspace(out, **options), sys.gettrace()
    sys.settrace(interrupting(step, *ENTERING))
    try:
        workspace.__enter__()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    workspace.__exit__(None, None, None)
    return False


@pytest.mark.parametrize("unfinished", [False, True], ids=["new", "unfinished"])
def test_an_interruption_while_the_place_is_locked_leaves_what_was_there(tmp_path: Path, unfinished: bool) -> None:
    """Raised at each line in turn, as a signal comes between any two."""
    out, options = tmp_path / "out", {"resume": unfinished}
    if unfinished:
        interrupt(out)
    step = 1
    while interrupted_at(step, out, **options):
        left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors"))
        assert left == [".out.partial/work/groups/0000.safetensors"] * unfinished, step
        assert unfinished or not list(tmp_path.iterdir()), step
        step += 1
    assert step > 15
    make(out, **options)


def test_an_interruption_while_a_build_is_put_in_place_leaves_it_or_the_older_one(tmp_path: Path) -> None:
    out, step = tmp_path / "out", 0
    finished = False
    while not finished:
        step += 1
        make(out, "old", force=True)
        workspace, before = Workspace(out, force=True), sys.gettrace()
        trace = interrupting(step, "commit", "_put_back")
        with contextlib.suppress(KeyboardInterrupt), workspace:
            (workspace.files / MODEL).write_text("new")
            write_manifest(workspace.files, VALUES)
            sys.settrace(trace)
            try:
                workspace.commit()
                finished = True
            finally:
                sys.settrace(before)
        assert open_artifact(out).model.read_text() in (["new"] if finished else ["old", "new"]), step
        assert [path.name for path in tmp_path.iterdir()] == ["out"], step
    assert step > 5


def test_a_build_that_was_killed_while_it_was_put_in_place_is_not_lost_to_an_interruption(tmp_path: Path) -> None:
    out, step = tmp_path / "out", 1
    make(out, "old")
    replaced = tmp_path / ".out.partial" / "replaced"
    while True:
        replaced.parent.mkdir(exist_ok=True)
        if out.exists():
            out.rename(replaced)
        interrupted = interrupted_at(step, out, force=True)
        assert open_artifact(out if out.exists() else replaced).model.read_text() == "old", step
        if not interrupted:
            break
        step += 1
    assert out.exists()
    assert step > 15


def test_an_interruption_leaves_the_folder_of_another_build(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Workspace(out) as workspace:
        for step in range(1, 30):
            with contextlib.suppress(ArtifactError):
                interrupted_at(step, out)
            assert workspace.files.is_dir(), step
        finish(workspace)
    assert open_artifact(out).model.read_text() == "model"


def test_too_small_a_disk_is_said_before_the_work(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"GB free and the build needs about 1000000\.00 GB: free space"),
        Workspace(tmp_path / "out") as workspace,
    ):
        workspace.require_space(10**15)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "f"), "cannot write f: the disk is full"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "cannot write place: the file system is read-only"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "cannot write place: the disk is full"),
        (RuntimeError("write failed: Read-only file system"), "read-only"),
    ],
)
def test_disk_errors_are_told_in_one_line(error: Exception, words: str) -> None:
    told = disk_error(error, Path("place"))
    assert told is not None
    assert words in str(told)
    assert "\n" not in str(told)


def test_other_errors_are_not_disk_errors() -> None:
    assert disk_error(ValueError("bad value"), Path("place")) is None
    assert disk_error(FileNotFoundError(errno.ENOENT, "No such file", "f"), Path("place")) is None


def test_a_full_disk_becomes_an_artifact_error_and_keeps_finished_work(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the disk is full") as caught:
        fail(tmp_path / "out", OSError(errno.ENOSPC, "No space left on device", "model.onnx"))
    assert "--resume" in caught.value.__notes__[0]
    assert not (tmp_path / "out").exists()


def test_json_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"error": float("nan")})
    assert not (tmp_path / "x.json").exists()


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out: truncate(out / MODEL), r"model\.onnx has 2 bytes where the manifest says 5: copy it again"),
        (lambda out: (out / MODEL).write_text("nodel"), r"model\.onnx is not what was built"),
        (lambda out: (out / MODEL).unlink(), r"model\.onnx is missing: build it again"),
        (lambda out: truncate(out / MANIFEST), r"manifest\.json is damaged .*: build it again"),
        (lambda out: (out / MANIFEST).write_bytes(b"\xff\xfe"), r"manifest\.json is damaged"),
        (lambda out: (out / MANIFEST).write_text("[]"), r"is no fqonnx manifest"),
        (lambda out: edit(out / MANIFEST, format=99), r"newer fqonnx \(format 99, known 1\): upgrade"),
        (lambda out: edit(out / MANIFEST, groups=None), r"damaged \(groups is missing\)"),
        (
            lambda out: edit(out / MANIFEST, files={"../../etc/passwd": {"bytes": 1, "sha256": ""}}),
            r"damaged \(file entry '../../etc/passwd'\)",
        ),
        (lambda out: edit(out / MANIFEST, files={}), r"lists no model\.onnx"),
        (lambda out: (out / MANIFEST).unlink(), r"is no fqonnx build"),
    ],
)
def test_a_damaged_build_is_refused(tmp_path: Path, damage: Any, words: str) -> None:
    out = tmp_path / "out"
    make(out)
    damage(out)
    with pytest.raises(ArtifactError, match=words) as caught:
        open_artifact(out)
    assert "\n" not in str(caught.value)


def test_sizes_alone_can_be_checked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    (out / MODEL).write_text("nodel")
    assert open_artifact(out, check_hashes=False).path == out


def test_a_missing_build_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such build directory"):
        open_artifact(tmp_path / "nowhere")
