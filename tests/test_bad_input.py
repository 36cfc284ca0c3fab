"""What users get wrong, and what the machine does to them: one line that says what to do, the right exit code, and no half result."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fqonnx.artifact import open_artifact
from tests.cli_support import FAST, K, Run, command, environment, one_line, run, run_process, write_data, write_language_model, write_mlp


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_mlp(tmp_path / "mlp.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data.npz")


def refused(done: Run, words: str, code: int = 1) -> None:
    """One error line that holds ``words``, after warnings at most, and nothing on stdout."""
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("warning: ")]
    line = one_line("\n".join(lines))
    assert line.startswith("error: ")
    assert "internal error" not in line
    assert words in line
    assert done.code == code
    assert done.stdout == ""


def build(model: Path, data: Path | str, out: Path, *more: str | Path) -> Run:
    return run("build", model, "-o", out, "--calib-data", data, *FAST, "-q", *more)


# --- the model --------------------------------------------------------------------------------------------------------------------------


def no_file(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("once upon a time there was a model\n" * 20)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_file, "mlp.onnx"),
        (a_folder, "folder"),
        (empty, "empty"),
        (text, "ONNX"),
        (truncated, "ONNX"),
    ],
)
@pytest.mark.parametrize("name", ["inspect", "build", "verify"])
def test_a_file_that_is_no_model(model: Path, data: Path, tmp_path: Path, spoil: Any, words: str, name: str) -> None:
    spoil(model)
    done = {
        "inspect": lambda: run("inspect", model),
        "build": lambda: build(model, data, tmp_path / "out"),
        "verify": lambda: run("verify", model, model, "--data", data),
    }[name]()
    refused(done, words)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize(("spoil", "words"), [(no_file, "mlp.onnx.data"), (truncated, "mlp.onnx.data")])
def test_external_data_that_is_missing_or_cut_short(tmp_path: Path, data: Path, spoil: Any, words: str) -> None:
    model = write_mlp(tmp_path / "mlp.onnx", external=True)
    spoil(tmp_path / "mlp.onnx.data")
    refused(build(model, data, tmp_path / "out"), words)
    refused(run("inspect", model), words)


def test_a_model_that_is_quantized_already(model: Path, data: Path, tmp_path: Path) -> None:
    assert build(model, data, tmp_path / "out").code == 0
    refused(build(tmp_path / "out" / "model.onnx", data, tmp_path / "again"), "already quantized")


def one_node(path: Path, op_type: str, domain: str = "") -> Path:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", K]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(op_type, ["x"], ["y"], name="only", domain=domain)], "g", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_a_model_without_linears(tmp_path: Path, data: Path) -> None:
    refused(
        build(one_node(tmp_path / "relu.onnx", "Relu"), data, tmp_path / "out"), "has nothing to quantize: it contains no matrix product"
    )


def test_a_model_whose_linears_all_stay_in_float(model: Path, data: Path, tmp_path: Path) -> None:
    done = build(model, data, tmp_path / "out", "--keep", "layers")
    refused(done, "has nothing to quantize: 'layers.0.up' stays in float because")
    assert "(and 1 more, see `fqonnx inspect`)" in done.stderr


def test_an_unknown_custom_op(tmp_path: Path, data: Path) -> None:
    done = build(one_node(tmp_path / "custom.onnx", "Swizzle", "my.company"), data, tmp_path / "out")
    refused(done, "my.company")
    assert "Swizzle" in done.stderr


# --- the data ---------------------------------------------------------------------------------------------------------------------------


def with_nan() -> Any:
    x = np.zeros((5, K), np.float32)
    x[3, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"z": np.zeros((5, K), np.float32)}, "'z'"),
        ({"x": np.zeros((5, K), np.float32), "extra": np.zeros(5)}, "'extra'"),
        ({"x": np.zeros((5, K + 1), np.float32)}, str(K + 1)),
        ({"x": np.zeros((5, 2, 2, K), np.float32)}, "'x'"),
        ({"x": np.full((5, K), "word")}, "'x'"),
        ({"x": np.zeros((5, K), np.complex64)}, "complex64"),
        ({"x": with_nan()}, "NaN"),
        ({"x": np.full((5, K), np.inf, np.float32)}, "Inf"),
        ({"x": np.zeros((0, K), np.float32)}, "data.npz"),
        ({}, "data.npz"),
    ],
)
def test_data_that_do_not_fit(model: Path, tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, **arrays)
    refused(build(model, data, tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


def test_pickled_objects_are_refused(model: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    data = tmp_path / "data.npz"
    np.savez(data, x=np.array([Trap()], dtype=object))
    refused(build(model, data, tmp_path / "out"), "pickled")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"no zip archive", b"PK\x03\x04 half an archive"])
def test_a_broken_npz(model: Path, tmp_path: Path, content: bytes) -> None:
    data = tmp_path / "data.npz"
    data.write_bytes(content)
    refused(build(model, data, tmp_path / "out"), "data.npz")


def test_data_of_no_known_kind(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    refused(build(model, tmp_path / "data.parquet", tmp_path / "out"), "data.parquet is no kind of data known here", code=2)
    refused(build(model, tmp_path / "nowhere.npz", tmp_path / "out"), "nowhere.npz")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("def load_data():\n    raise RuntimeError('the database is down')\n    yield\n", "the database is down"),
        ("import no_such_module\n", "no_such_module"),
        ("def load_data(:\n", "loader.py"),
        ("x = 1\n", "load_data"),
        ("def load_data():\n    yield 3\n", "loader.py"),
        ("def load_data():\n    return []\n", "loader.py"),
    ],
)
def test_a_loader_script_that_fails(model: Path, tmp_path: Path, script: str, words: str) -> None:
    loader = tmp_path / "loader.py"
    loader.write_text(script)
    refused(build(model, loader, tmp_path / "out"), words)


def test_token_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    model = write_language_model(tmp_path / "lm.onnx")
    data = write_data(tmp_path / "ids.npz", input_ids=np.full((4, 8), 5000))
    refused(build(model, data, tmp_path / "out"), "5000")


# --- the request ------------------------------------------------------------------------------------------------------------------------


def test_no_data(model: Path, tmp_path: Path) -> None:
    done = run("build", model, "-o", tmp_path / "out")
    refused(done, "--calib-data DATA", code=2)
    assert "--random-calibration" in done.stderr
    refused(run("build", model, "-o", tmp_path / "out", "--random-calibration", "--calib-data", "x.npz"), "exclude each other", code=2)
    refused(run("verify", model, model), "--data", code=2)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--scheme", "w3a3", "'w4a4'"),
        ("--transform", "magic", "'flatquant'"),
        ("--weights", "guess", "'gptq'"),
        ("--engine", "abacus", "'onnxruntime'"),
        ("--device", "tpu", "'cuda'"),
        ("--group-size", "48", "'64'"),
        ("--target", "h200", "such as sm80, sm89 or sm90"),
        ("--target", "sm75", "choose sm80 to sm129"),
        ("--seed", "-1", "out of range"),
        ("--calib-samples", "0", "x>=1"),
        ("--max-error", "-1", "x>=0"),
        ("--keep", "(", "--keep '(' is not a regular expression"),
        ("--steps", "0", "give 1 or more"),
        ("--min-shapes", "x=1", "write NAME:1x3"),
        ("--recipe", "nowhere.toml", "nowhere.toml: No such file or directory"),
        ("--no-such-option", "x", "No such option"),
    ],
)
def test_a_choice_that_does_not_exist(model: Path, data: Path, tmp_path: Path, option: str, value: str, words: str) -> None:
    refused(build(model, data, tmp_path / "out", option, value), words, code=2)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_a_device_that_is_not_here(model: Path, data: Path, tmp_path: Path) -> None:
    refused(build(model, data, tmp_path / "out", "--device", "cuda"), "--device cpu")


def test_an_engine_that_is_not_installed(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before the work starts."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    done = build(model, data, tmp_path / "out", "--engine", "tensorrt-rtx")
    refused(done, "pip install 'fqonnx[tensorrt-rtx]'")
    assert not list(tmp_path.glob(".*.partial"))


def test_a_target_that_the_engine_does_not_know(model: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    refused(build(model, data, tmp_path / "out", "--engine", "tensorrt-rtx", "--target", "sm90"), "does not build for target 'sm90'")


def test_verify_with_another_model(model: Path, data: Path, tmp_path: Path) -> None:
    refused(run("verify", model, write_language_model(tmp_path / "lm.onnx"), "--data", data), "input")


def test_report_of_what_is_no_build(tmp_path: Path) -> None:
    refused(run("report", tmp_path), "is no fqonnx build")
    refused(run("report", tmp_path / "nowhere"), "no such build directory")


# --- the place --------------------------------------------------------------------------------------------------------------------------


def test_the_output_exists(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert build(model, data, out).code == 0
    refused(build(model, data, out), "out exists: pass --force to replace it, or choose another place with -o")
    assert build(model, data, out, "--force", "--seed", "1").code == 0
    assert open_artifact(out).recipe.seed == 1


def test_the_output_is_something_else(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    refused(build(model, data, tmp_path / "out", "--force"), "is no fqonnx build")
    assert (tmp_path / "out" / "thesis.tex").exists()
    refused(build(model, data, model), "mlp.onnx exists and is no fqonnx build")
    refused(build(model, data, model / "out"), "a part of the path is a file")


@pytest.fixture
def mounted(tmp_path: Path) -> Any:
    """Mounts a small file system in memory; skips where that is not allowed."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no right to mount a file system: {done.stderr.strip()}")
        places.append(place)
        return place

    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    yield mount
    for place in places:
        subprocess.run(["umount", place], check=True)


def test_a_read_only_disk(model: Path, data: Path, mounted: Any) -> None:
    place = mounted("ro,size=1m")
    refused(build(model, data, place / "out"), "the file system is read-only: choose another place with -o")


def test_a_disk_that_is_too_small_is_said_before_the_work(model: Path, data: Path, mounted: Any) -> None:
    place = mounted("size=16k")
    refused(build(model, data, place / "out"), "GB free and the build needs about")
    assert list(place.iterdir()) == []


def test_a_disk_that_fills_up(tmp_path: Path, data: Path, mounted: Any) -> None:
    """Enough for the estimate, which does not count block sizes and the page; those then fill the disk."""
    model = write_mlp(tmp_path / "mlp.onnx", layers=4)
    place = mounted("size=224k")
    done = run("build", model, "-o", place / "out", "--calib-data", data, "--transform", "hadamard", "--weights", "gptq", "-q")
    refused(done, "the disk is full: free space or choose another place with -o")
    assert not (place / "out").exists()


def test_a_folder_without_permission(model: Path, data: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o555)
    refused(build(model, data, tmp_path / "locked" / "out"), "permission denied: choose another place with -o")


def test_a_file_size_limit(model: Path, data: Path, tmp_path: Path) -> None:
    limit = 6000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run_process("build", model, "-o", tmp_path / "out", "--calib-data", data, *FAST, "-q", measured=False, preexec_fn=limited)
    refused(done, "the file size limit is reached")
    assert not (tmp_path / "out").exists()


# --- interruptions ----------------------------------------------------------------------------------------------------------------------

PATIENCE = 180
"""Seconds; a busy machine may need some."""

TRAINED = ("--transform", "flatquant", "--weights", "gptq", "--steps", "5", "--max-error", "9")
"""Random rotations, training and a Hessian: all that must come out the same after an interruption."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A folder with a model, data and a finished build in ``whole``; the seconds that took."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_mlp(folder / "mlp.onnx", layers=3)
    write_data(folder / "data.npz", samples=64)
    start = time.perf_counter()
    done = run_process(*trained(folder, folder / "whole"))
    assert done.code == 0, done.stderr
    return folder, time.perf_counter() - start


def trained(folder: Path, out: Path, *more: str) -> list[str | Path]:
    return ["build", folder / "mlp.onnx", "-o", out, "--calib-data", folder / "data.npz", *TRAINED, *more]


def start_build(folder: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """A build in a process group of its own, as a shell starts one."""
    return subprocess.Popen(
        command(*trained(folder, out, *more)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        # Background jobs of a script inherit the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no other thread forks here
    )


def wait_for_groups(out: Path, count: int) -> None:
    """Until ``count`` groups are solved."""
    deadline = time.monotonic() + PATIENCE
    while len(list((out.parent / f".{out.name}.partial" / "work" / "groups").glob("*.safetensors"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def resume(folder: Path, out: Path) -> None:
    """Finish the build and compare it with the one that was never interrupted."""
    done = run_process(*trained(folder, out, "--resume"))
    assert done.code == 0, done.stderr
    for name in ("calibration.safetensors", "model.onnx"):
        assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    assert not list(out.parent.glob(f".{out.name}.partial"))


@pytest.mark.parametrize(("number", "word", "code"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)])
def test_an_interrupted_build_says_how_to_go_on(
    uninterrupted: tuple[Path, float], tmp_path: Path, number: signal.Signals, word: str, code: int
) -> None:
    folder, _ = uninterrupted
    out = tmp_path / "out"
    process = start_build(folder, out, "-q")
    wait_for_groups(out, 2)
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    expected = f"error: {word}; what is finished is kept: repeat the command with --resume to go on"
    assert (one_line(stderr), stdout, process.returncode) == (expected, "", code)
    assert not out.exists()

    refused(run(*trained(folder, out, "-q")), "continue it with --resume, or start over with --force")
    refused(run(*trained(folder, out, "-q", "--resume", "--seed", "1")), "was started with --seed 0, this one with 1: ")
    if number == signal.SIGINT:
        resume(folder, out)


def test_an_interruption_before_any_result_leaves_nothing(uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    folder, _ = uninterrupted
    process = start_build(folder, tmp_path / "out", "-q")
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / ".out.partial").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert (one_line(stderr), process.returncode) == ("error: interrupted", 130)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_build_that_is_killed_again_and_again_gives_the_same_result(uninterrupted: tuple[Path, float], tmp_path: Path, seed: int) -> None:
    """SIGKILL, which nothing can handle, at random moments of the whole run; then ``--resume``."""
    folder, seconds = uninterrupted
    out = tmp_path / "out"
    rng = np.random.default_rng(seed)
    for _ in range(2):
        process = start_build(folder, out, "--resume", "-q")
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if out.exists():
            break
    if not out.exists():
        resume(folder, out)
    assert open_artifact(out).manifest["passed"] is True
    for name in ("calibration.safetensors", "model.onnx"):
        assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
