"""Wheel and sdist: each source file once, importable without the repository, dependencies pinned without naming a registry."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from fqonnx.plugins.library import cache_folder
from tests.plugin_support import built_library

ROOT = Path(__file__).parents[1]
LINKED = ("passes", "calib", "cli", "plugins")
SOURCES = (".cu", ".cuh", ".cpp", ".h", ".def", ".map", "sources.txt", "CMakeLists.txt")
"""What the kernels' library is made of: `fqonnx plugin build` works from an installed package."""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, built from a clean copy of what git tracks."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    source.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z", "--cached"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    archive = folder / "source.tar"
    subprocess.run(["tar", "-cf", archive, "--null", "-T", "-"], cwd=ROOT, input=listed.stdout, check=True)
    subprocess.run(["tar", "-xf", archive, "-C", source], check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def tracked() -> set[str]:
    """The Python and data files of the package, as they are called inside it."""
    listed = subprocess.run(["git", "ls-files", "fqonnx", *LINKED], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    suffixes = (".py", ".typed", ".html", ".css", ".js", *SOURCES)
    return {name if name.startswith("fqonnx/") else f"fqonnx/{name}" for name in listed if name.endswith(suffixes)}


def test_the_wheel_holds_every_file_once(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert set(names) == tracked()
    assert Counter(names).most_common(1)[0][1] == 1


def test_the_sdist_holds_every_file_once(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = [member.name.partition("/")[2] for member in members if member.isfile()]
    assert not [member.name for member in members if member.issym() or member.islnk()]
    assert tracked() <= set(names)
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "docs/architecture.md"} <= set(names)
    assert not [name for name in names if name.startswith((*(f"{folder}/" for folder in LINKED), "tests/"))]
    assert Counter(names).most_common(1)[0][1] == 1


def test_the_wheel_is_built_from_the_sdist(dist: Path) -> None:
    """``build`` makes the wheel out of the unpacked sdist, so the links' content has to be in there."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive, zipfile.ZipFile(wheel) as files:
        root = archive.getnames()[0].partition("/")[0]
        for name in tracked():
            found = archive.extractfile(f"{root}/{name}")
            assert found is not None
            assert found.read() == files.read(name), name


FROM_THE_WHEEL = (
    "import sys; sys.path = [p for p in sys.path if 'editable' not in p and p != sys.argv[2]]\n"
    "sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '') and 'editable' not in repr(f)]\n"
    "sys.path.insert(0, sys.argv[1])\n"
)


def test_the_wheel_works_without_the_repository(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site")  # noqa: S202 - our own wheel
    code = FROM_THE_WHEEL + (
        "import fqonnx, fqonnx.build, fqonnx.cli.main, fqonnx.passes.pipeline, fqonnx.calib.solve, fqonnx.kernels, fqonnx.plugins.show\n"
        "from fqonnx.report.html import render\n"
        "from fqonnx.report import Report\n"
        "assert '<html' in render(Report(model='a', candidate='b', passed=True))\n"
        "print(fqonnx.__file__, fqonnx.calib.solve.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site"), str(ROOT)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert all(Path(path).is_relative_to(tmp_path / "site") for path in done.stdout.split())


def test_the_library_builds_from_the_wheel(dist: Path, tmp_path: Path) -> None:
    """From the same objects as in the repository, which do not depend on where sources are: it links without compiling anew."""
    expected = built_library()
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site")  # noqa: S202 - our own wheel
    (tmp_path / "cache" / "fqonnx").mkdir(parents=True)
    (tmp_path / "cache" / "fqonnx" / "objects").symlink_to(cache_folder() / "objects")
    code = FROM_THE_WHEEL + (
        "from fqonnx.plugins.build import build\n"
        f"built = build(without={[] if 'onnxruntime' in expected.parts else ['onnxruntime']})\n"
        "print(built.path, built.key, built.sources)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "site"), str(ROOT)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    path, key, sources = done.stdout.split()
    assert Path(path).is_relative_to(tmp_path / "cache")
    assert (key, sources) == (expected.key, expected.sources)


def test_the_entry_point_and_the_metadata(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        info = next(name.partition("/")[0] for name in files.namelist() if ".dist-info/" in name)
        entry_points = files.read(f"{info}/entry_points.txt").decode()
        metadata = files.read(f"{info}/METADATA").decode()
    assert "fqonnx = fqonnx.cli.main:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata
    assert "# fqonnx" in metadata  # the README


def test_links_point_to_the_top_level_folders() -> None:
    for name in LINKED:
        assert (ROOT / "fqonnx" / name).readlink() == Path("..") / name


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): pinned for name, pinned in (line.split("==") for line in lines)}


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(line for extra in ("cuda-build", "dev", "samples", "tensorrt-rtx", "text") for line in optional[extra]),
    ]
    pinned = constraints()
    for line in wanted:
        found = re.match(r"[\w.-]+", line)
        assert found is not None
        assert re.sub(r"[-_.]+", "-", found[0]).lower() in pinned, line


def test_the_pins_name_no_place_and_no_local_build() -> None:
    for name, pinned in constraints().items():
        assert re.fullmatch(r"\d[\w.]*", pinned), (name, pinned)
    text = "".join(
        (ROOT / file).read_text() for file in ("constraints.txt", "Makefile", "pyproject.toml", ".ci/run", ".pre-commit-config.yaml")
    )
    assert not re.search(r"https?://|index-url|find-links", text)
