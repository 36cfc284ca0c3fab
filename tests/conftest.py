"""Options and fixtures that the tests share."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.graph_text import graph_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import onnx_ir as ir

_GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regen-golden", action="store_true", help="write tests/golden/*.txt anew instead of comparing with them")


@pytest.fixture(scope="session", autouse=True)
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No engine of an earlier run: it would be taken where it should be built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FQONNX_ENGINE_CACHE", str(tmp_path_factory.mktemp("engines")))
        yield


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, ir.Model | str], None]:
    """``golden(name, model_or_text)`` compares with ``tests/golden/<name>.txt``; ``--regen-golden`` writes that file instead."""
    regenerate = request.config.getoption("--regen-golden")

    def check(name: str, what: ir.Model | str) -> None:
        text = what if isinstance(what, str) else graph_text(what)
        path = _GOLDEN / f"{name}.txt"
        if regenerate:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            return
        assert path.exists(), f"{path} is missing: run pytest with --regen-golden and look at it"
        expected = path.read_text()
        if text != expected:
            diff = "\n".join(difflib.unified_diff(expected.splitlines(), text.splitlines(), "golden", "now", lineterm=""))
            pytest.fail(f"{path.name} differs; if the change is meant, run pytest with --regen-golden\n{diff}")

    return check
