"""The command line: what it parses, prints and returns. What it refuses is in ``test_bad_input``."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from fqonnx.artifact import open_artifact
from fqonnx.cli import main as main_module
from fqonnx.cli import options, terminal
from fqonnx.cli.main import program
from fqonnx.engines import Profile
from fqonnx.errors import DataError, UsageError
from fqonnx.recipe import Recipe
from tests import rewriting
from tests.cli_support import FAST, K, environment, one_line, run, run_process, write_data, write_language_model, write_mlp

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and a build of them in ``out``."""
    folder = tmp_path_factory.mktemp("built")
    model, data = write_mlp(folder / "mlp.onnx"), write_data(folder / "data.npz")
    done = run("build", model, "-o", folder / "out", "--calib-data", data, "--transform", "hadamard", "--weights", "rtn", "--json")
    assert done.code == 0, done.stderr
    (folder / "stdout.json").write_text(done.stdout)
    return folder


# --- start-up ---------------------------------------------------------------------------------------------------------------------------


def test_help_answers_at_once() -> None:
    """In processor time, which other work on the machine does not stretch much; the best of three."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_process("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.code == 0
        assert "build" in done.stdout
    assert min(seconds) < 0.3


def test_parsing_imports_nothing_heavy() -> None:
    heavy = ("torch", "onnxruntime", "onnx", "onnx_ir", "polygraphy", "numpy", "rich")
    code = f"import sys, fqonnx.cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version() -> None:
    assert run("--version").stdout.startswith("fqonnx 0.")


@pytest.mark.parametrize("name", sorted(program.commands))
def test_every_command_and_option_is_explained(name: str) -> None:
    command = program.commands[name]
    assert command.help
    assert run(name, "--help").code == 0
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name


def test_without_a_command_the_help_is_shown() -> None:
    done = run()
    assert done.code == 2
    assert "Usage: fqonnx" in done.stderr


# --- errors -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes ``fqonnx inspect`` fail with an error of choice."""

    def fail_with(error: BaseException) -> None:
        def inspect(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("fqonnx.inspect.inspect", inspect)

    return fail_with


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (DataError("bad data: mend it"), "error: bad data: mend it", 1),
        (UsageError("bad request"), "error: bad request", 2),
        (KeyboardInterrupt(), "error: interrupted", 130),
        (OSError(13, "Permission denied", "/some/file"), "error: /some/file: Permission denied: check the path and its permissions", 1),
        (MemoryError(), "error: out of memory: lower --calib-samples or --batch-size, or use a larger machine", 1),
        (
            ZeroDivisionError("first\nsecond"),
            "error: internal error, ZeroDivisionError: first (set FQONNX_DEBUG=1 for the traceback, and please report it)",
            1,
        ),
    ],
)
def test_every_failure_is_one_line(failing: Any, error: BaseException, line: str, code: int) -> None:
    failing(error)
    done = run("inspect", "model.onnx")
    assert (one_line(done.stderr), done.code, done.stdout) == (line, code, "")


def test_notes_follow_on_the_same_line(failing: Any) -> None:
    error = KeyboardInterrupt()
    error.add_note("go on with --resume")
    failing(error)
    assert one_line(run("inspect", "model.onnx").stderr) == "error: interrupted; go on with --resume"


def test_debugging_shows_the_traceback(failing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FQONNX_DEBUG", "1")
    failing(ZeroDivisionError("oops"))
    done = run("inspect", "model.onnx")
    assert done.code == 1
    assert "Traceback" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: internal error, ZeroDivisionError: oops")


def test_libraries_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    def inspect(*_: object, **__: object) -> None:
        warnings.warn("some library's warning", stacklevel=1)
        logging.getLogger("some.library").warning("some library's log")
        logging.getLogger("fqonnx.somewhere").warning("ours")
        logging.getLogger("fqonnx.somewhere").info("details")
        raise DataError("end")

    monkeypatch.setattr("fqonnx.inspect.inspect", inspect)
    assert run("inspect", "m").stderr.splitlines() == ["warning: ours", "error: end"]
    assert run("inspect", "-v", "m").stderr.splitlines() == ["warning: ours", "info: details", "error: end"]
    assert run("inspect", "-q", "m").stderr.splitlines() == ["error: end"]


def test_sigterm_ends_like_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main_module._message(main_module._Terminated()) == ("terminated", 143)


# --- options ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["scheme = 'w4a8'\nseed = 3\nkeep = ['head']\n", '{"scheme": "w4a8", "seed": 3, "keep": ["head"]}'])
def test_flags_win_over_the_recipe_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / ("r.json" if text.startswith("{") else "r.toml")
    file.write_text(text)
    assert options.read_recipe(file, {"seed": None, "keep": ()}) == Recipe(scheme="w4a8", seed=3, keep=("head",))
    assert options.read_recipe(file, {"seed": 0, "keep": ("a", "b")}) == Recipe(scheme="w4a8", seed=0, keep=("a", "b"))
    assert options.read_recipe(None, {"group_size": 0, "quantize_head": False}) == Recipe()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("r.json", "{", "is not valid JSON"),
        ("r.toml", "=", "is not valid TOML"),
        ("r.json", "[1]", "holds no table of choices"),
        ("r.json", '{"shceme": "w4a4"}', "unknown recipe key 'shceme': choose from scheme"),
        ("r.json", '{"scheme": "w3a3"}', "unknown scheme 'w3a3': choose from w4a4"),
        ("r.json", '{"scheme": ["w4a4"]}', "recipe key 'scheme' is ['w4a4']: give a name"),
        ("r.json", '{"seed": "zero"}', "recipe key 'seed' is 'zero': give an integer"),
        ("r.json", '{"keep": "head"}', "recipe key 'keep' is 'head': give a list of regular expressions"),
    ],
)
def test_a_bad_recipe_file_is_a_usage_error(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    done = run("inspect", "model.onnx", "--recipe", tmp_path / name)
    assert done.code == 2
    assert words in one_line(done.stderr)


def parse_shapes(*args: str) -> dict[str, Any]:
    @click.command(cls=options.ShapesCommand)
    @click.argument("model", required=False)
    @options.shape_options
    @click.option("--force", is_flag=True)
    def command(**values: Any) -> dict[str, Any]:
        return values

    result: dict[str, Any] = command.main(list(args), standalone_mode=False)
    return result


def test_shapes_are_read_as_polygraphy_writes_them() -> None:
    assert parse_shapes("--min-shapes", "x:1x3", "a/b:0:[1,3]", "s:[]", "--force", "--max-shapes", "x:[8, 3]", "model.onnx") == {
        "min_shapes": ({"x": (1, 3), "a/b:0": (1, 3), "s": ()},),
        "opt_shapes": (),
        "max_shapes": ({"x": (8, 3)},),
        "force": True,
        "model": "model.onnx",
    }
    assert parse_shapes("--opt-shapes=x:1x3", "--opt-shapes", "x:2x3", "y:2")["opt_shapes"] == ({"x": (1, 3)}, {"x": (2, 3), "y": (2,)})


@pytest.mark.parametrize("text", ["x", "x:", "x:1xa", "x:-1", "x:[1,3", ":1x3"])
def test_a_malformed_shape_is_a_usage_error(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is no shape: write NAME:1x3 or NAME:\[1,3\]"):
        parse_shapes("--min-shapes", text)


def test_profiles_are_completed() -> None:
    assert options.read_profiles((), (), ()) == []
    assert options.read_profiles([{"x": (1, 3)}], (), [{"x": (8, 3)}]) == [{"x": Profile((1, 3), (8, 3), (8, 3))}]
    assert options.read_profiles((), [{"x": (4, 3)}], ()) == [{"x": Profile((4, 3), (4, 3), (4, 3))}]
    assert options.read_profiles((), [{"x": (4,)}, {"x": (9,)}], [{"x": (8,)}]) == [
        {"x": Profile((4,), (4,), (8,))},
        {"x": Profile((9,), (9,), (9,))},
    ]


@pytest.mark.parametrize(("low", "high"), [((2, 3), (1, 3)), ((1,), (1, 3))])
def test_profiles_must_be_in_order(low: tuple[int, ...], high: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="shapes of 'x' are not in order"):
        options.read_profiles([{"x": low}], (), [{"x": high}])


# --- inspect ----------------------------------------------------------------------------------------------------------------------------


def test_inspect_shows_groups_and_reasons(tmp_path: Path) -> None:
    done = run("inspect", write_language_model(tmp_path / "lm.onnx"))
    assert done.code == 0
    assert "input input_ids: int64 [batch, seq]" in done.stdout
    assert "mix" in done.stdout
    assert "lm_head" in done.stdout
    assert "--quantize-head takes it too" in " ".join(done.stdout.split())


def test_inspect_folds_layers_that_are_alike(tmp_path: Path) -> None:
    done = run("inspect", write_mlp(tmp_path / "mlp.onnx", layers=12))
    assert "24 groups to quantize" in done.stdout
    assert "layers.*.up" in done.stdout
    assert "layers.3" not in done.stdout


def test_inspect_json(tmp_path: Path) -> None:
    done = run("inspect", write_mlp(tmp_path / "mlp.onnx", layers=2), "--json", "--keep", r"layers\.1", "--group-size", "32")
    found = json.loads(done.stdout)
    assert [group["name"] for group in found["groups"]] == ["layers.0.up", "layers.0.down"]
    assert {left["name"] for left in found["left_in_float"]} == {"layers.1.up", "layers.1.down"}
    assert all("layers\\.1" in left["reason"] for left in found["left_in_float"])
    assert found["groups"][0]["float_bytes"] == 32 * 64 * 4
    assert found["groups"][0]["quantized_bytes"] == 32 * 64 // 2 + 64 * 4
    assert found["quantized_share"] == 0.5
    assert found["size"]["float_bytes"] - found["size"]["quantized_bytes"] == 2 * (32 * 64 * 4 - 32 * 64 // 2) - (64 + 2 * 32) * 4


def test_quiet_inspect_prints_nothing(tmp_path: Path) -> None:
    done = run("inspect", "-q", write_mlp(tmp_path / "mlp.onnx"))
    assert (done.code, done.stdout, done.stderr) == (0, "", "")


# --- build ------------------------------------------------------------------------------------------------------------------------------


def test_build_writes_a_whole_directory(built: Path) -> None:
    artifact = open_artifact(built / "out")
    assert {path.name for path in artifact.path.iterdir()} == {
        "model.onnx", "calibration.safetensors", "manifest.json", "report.json", "report.html",
    }  # fmt: skip
    assert artifact.recipe == Recipe(transform="hadamard", weights="rtn")
    for group in artifact.groups:
        kernel = group["kernel"]
        assert (kernel["op"], kernel["kernel"], kernel["container"], kernel["layout"]) == ("fqonnx.W4A4Gemm", "mma_s8", "int8", "plain")
        assert kernel["instruction"].startswith("mma.m16n8k32")
    assert artifact.manifest["calibration"]["samples"] == 18
    assert artifact.manifest["calibration"]["held_out"] == 2
    assert not list(built.glob(".*.partial"))


def test_build_json_is_the_report(built: Path) -> None:
    assert json.loads((built / "stdout.json").read_text()) == json.loads((built / "out" / "report.json").read_text())


def test_the_result_runs_without_fqonnx(built: Path) -> None:
    """The same figures from a plain ONNX Runtime session as the report has."""
    onnx.checker.check_model(str(built / "out" / "model.onnx"), full_check=True)
    x = np.load(built / "data.npz")["x"][18:]
    wanted, found = (
        ort.InferenceSession(str(built / name), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for name in ("mlp.onnx", "out/model.onnx")
    )
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    report = json.loads((built / "out" / "report.json").read_text())
    assert report["outputs"]["y"]["rel_l2"] == pytest.approx(error, rel=1e-5)
    assert 0.01 < error < 0.5


def test_calibration_record_reads_as_safetensors(built: Path) -> None:
    from safetensors import safe_open

    with safe_open(built / "out" / "calibration.safetensors", framework="numpy") as file:
        names = set(file.keys())
        up = file.get_tensor("layers.0.up.weight_scale")
        left, right = (file.get_tensor(f"layers.0.up.{part}") for part in ("left", "right"))
        assert json.loads(file.metadata()["recipe"])["transform"] == "hadamard"
    assert "layers.0.down.clip" in names
    assert up.shape == (64, 1)
    assert left.shape[0] * right.shape[0] == K


def test_report_shows_the_build(built: Path) -> None:
    done = run("report", built / "out")
    assert done.code == 0
    assert "PASSED" in done.stdout.splitlines()[-1]
    assert f"fqonnx build {built / 'mlp.onnx'} -o {built / 'out'} --calib-data" in done.stdout.splitlines()[-1]
    assert json.loads(run("report", built / "out", "--json").stdout) == json.loads((built / "out" / "report.json").read_text())


def test_report_opens_the_page(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(click, "launch", lambda url: opened.append(url) or 0)
    assert run("report", built / "out", "--html", "-q").code == 0
    assert opened == [(built / "out" / "report.html").resolve().as_uri()]
    monkeypatch.setattr(click, "launch", lambda _url: 1)
    assert f"the page is {built / 'out' / 'report.html'}" in run("report", built / "out", "--html", "-q").stderr


def test_above_max_error_the_build_is_written_and_fails(tmp_path: Path) -> None:
    model, data = write_mlp(tmp_path / "mlp.onnx"), write_data(tmp_path / "data.npz")
    done = run("build", model, "-o", tmp_path / "out", "--calib-data", data, *FAST, "--max-error", "0.0001")
    assert done.code == 1
    assert "FAILED" in done.stdout
    assert open_artifact(tmp_path / "out").manifest["passed"] is False


def test_one_sample_is_used_for_both_and_that_is_said(tmp_path: Path) -> None:
    model, data = write_mlp(tmp_path / "mlp.onnx"), write_data(tmp_path / "data.npz", samples=1)
    done = run("build", model, "-o", tmp_path / "out", "--calib-data", data, *FAST)
    assert done.code == 0
    assert "has one sample, which calibration saw and verification runs on" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any("one sample" in note for note in report["notes"])


def test_random_calibration_is_said_in_the_report(tmp_path: Path) -> None:
    done = run(
        "build", write_language_model(tmp_path / "lm.onnx"), "-o", tmp_path / "out", "--random-calibration", "--calib-samples", "4", *FAST
    )
    assert done.code == 0, done.stderr
    assert "random inputs" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["language"] is None
    assert report["max_error"] is None


def test_a_ruined_model_fails_without_being_asked(tmp_path: Path) -> None:
    """Data whose one large channel leaves nothing of the others in four bits."""
    x = np.random.default_rng(0).normal(size=(20, K)).astype(np.float32)
    x[:, 0] *= 1000
    model = write_mlp(tmp_path / "mlp.onnx", dead_channel=0)
    data = write_data(tmp_path / "data.npz", x=x)
    done = run("build", model, "-o", tmp_path / "out", "--calib-data", data, "--transform", "none", "--weights", "rtn")
    assert done.code == 1
    assert "above the bound of 0.5" in done.stdout


def test_quiet_build_prints_nothing(tmp_path: Path) -> None:
    model, data = write_mlp(tmp_path / "mlp.onnx"), write_data(tmp_path / "data.npz")
    done = run_process("build", model, "-o", tmp_path / "out", "--calib-data", data, *FAST, "-q")
    assert (done.code, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8", "w4a16", "w8a16"])
def test_every_scheme_builds(tmp_path: Path, scheme: str) -> None:
    model, data = write_mlp(tmp_path / "mlp.onnx"), write_data(tmp_path / "data.npz")
    arguments = ("--scheme", scheme, "--transform", "hadamard", "--weights", "rtn", "--group-size", "32")
    done = run("build", model, "-o", tmp_path / "out", "--calib-data", data, *arguments, "--json")
    assert done.code == 0, done.stderr
    error = json.loads(done.stdout)["outputs"]["y"]["rel_l2"]
    assert error < (0.02 if scheme.startswith("w8") else 0.3)


def test_an_external_data_model_builds(tmp_path: Path) -> None:
    model, data = write_mlp(tmp_path / "mlp.onnx", external=True), write_data(tmp_path / "data.npz")
    assert run("build", model, "-o", tmp_path / "out", "--calib-data", data, *FAST).code == 0


def test_a_target_stores_operands_for_its_kernels(tmp_path: Path) -> None:
    model, data = write_mlp(tmp_path / "mlp.onnx"), write_data(tmp_path / "data.npz")
    done = run("build", model, "-o", tmp_path / "out", "--calib-data", data, "--transform", "none", "--weights", "rtn", "--target", "sm86")
    assert done.code == 0, done.stderr
    kernels = [group["kernel"] for group in open_artifact(tmp_path / "out").groups]
    assert {(kernel["kernel"], kernel["container"], kernel["layout"], kernel["why"]) for kernel in kernels} == {
        ("mma_s4", "packed", "plain", None)
    }


@pytest.mark.parametrize(("transform", "code"), [("hadamard", 1), ("dfrot", 1), ("none", 0), ("smooth", 0)])
def test_a_group_that_the_target_has_no_kernel_for_is_told_before_the_work(tmp_path: Path, transform: str, code: int) -> None:
    """263 is a prime: its only pair of factors is wider than kernels take."""
    builder = rewriting.Builder()
    builder.output(builder.linear(builder.input("x", ["batch", 263]), 263, 40, "fc"), ["batch", 40])
    onnx.save(builder.model(), tmp_path / "model.onnx")
    options = ("--random-calibration", "--calib-samples", "2", "--transform", transform, "--weights", "rtn", "--target", "sm90")
    done = run("build", tmp_path / "model.onnx", "-o", tmp_path / "out", *options)
    assert done.code == code, done.stderr
    if code:
        assert "group 'fc': no kernel transforms K = 263 by 1 x 263, factors are at most 256: leave it in float (--keep)" in done.stderr
        assert not (tmp_path / "out").exists()
    else:
        (group,) = open_artifact(tmp_path / "out").groups
        assert {key: group["kernel"][key] for key in ("kernel", "layout", "n", "k")} == {
            "kernel": "mma_s8",
            "layout": "plain",
            "n": 48,
            "k": 272,
        }


def test_an_engine_is_built_for_the_shapes_of_the_data(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model, data = write_mlp(tmp_path / "mlp.onnx"), write_data(tmp_path / "data.npz")
    arguments = ("--transform", "hadamard", "--weights", "rtn", "--engine", "tensorrt-rtx", "--max-shapes", "x:8x32")
    done = run("build", model, "-o", tmp_path / "out", "--calib-data", data, *arguments)
    assert done.code == 0, done.stderr
    engine = open_artifact(tmp_path / "out").engine
    assert engine is not None
    assert engine.stat().st_size > 10_000


def test_the_same_command_gives_the_same_files(tmp_path: Path) -> None:
    model, data = write_mlp(tmp_path / "mlp.onnx"), write_data(tmp_path / "data.npz", samples=80)
    for name in ("a", "b"):
        done = run("build", model, "-o", tmp_path / name, "--calib-data", data, "--transform", "hadamard", "--weights", "gptq")
        assert done.code == 0, done.stderr
    for file in ("model.onnx", "calibration.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# --- verify -----------------------------------------------------------------------------------------------------------------------------


def test_verify_a_build(built: Path) -> None:
    arguments = ("verify", built / "mlp.onnx", built / "out", "--data", built / "data.npz", "--json")
    done = run(*arguments, "--layers", "--max-error", "0.5")
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert all(0 < group["layer"]["rel_l2"] < 0.5 for group in report["groups"])
    assert run(*arguments, "--max-error", "0.001").code == 1


def test_verify_a_model_with_itself(built: Path) -> None:
    done = run("verify", built / "mlp.onnx", built / "mlp.onnx", "--random-data", "--samples", "3", "--json", "--max-error", "0")
    report = json.loads(done.stdout)
    assert (done.code, report["data"]["samples"], report["outputs"]["y"]["max_abs"]) == (0, 3, 0.0)


def test_the_environment_keeps_workers_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os; from fqonnx.cli.main import main\ntry: main()\nexcept SystemExit: print(os.environ['PYTHONWARNINGS'])"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.splitlines()[-1] == "ignore"


def test_verbosity_levels() -> None:
    assert terminal._LEVELS == {-1: 40, 0: 30, 1: 20}
