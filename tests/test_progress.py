from __future__ import annotations

import io

import pytest
from rich.console import Console

from fqonnx.progress import Progress, RichProgress, Silent


def work(progress: Progress, total: int | None) -> None:
    with progress.task("Observing", total) as task:
        for _ in range(3):
            task.advance()


@pytest.mark.parametrize("total", [3, None])
def test_rich_progress_shows_name_and_count(total: int | None) -> None:
    text = io.StringIO()
    work(RichProgress(Console(file=text, width=100)), total)
    assert "Observing" in text.getvalue()
    assert f"3/{total or '?'}" in text.getvalue()


def test_progress_leaves_standard_output_alone(capfd: pytest.CaptureFixture[str]) -> None:
    work(RichProgress(), 3)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Observing" in err


def test_silence(capfd: pytest.CaptureFixture[str]) -> None:
    work(Silent(), None)
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_bar_lets_the_exception_through() -> None:
    progress = RichProgress(Console(file=io.StringIO()))
    with pytest.raises(KeyboardInterrupt), progress.task("Observing", 5):
        raise KeyboardInterrupt
