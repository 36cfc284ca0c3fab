"""The list of the library's sources, ``sources.txt``, and the architectures they are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fqonnx.errors import EngineError, UsageError
from fqonnx.plugins import library

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

HOST = "host"


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
    known = sorted({name for source in sources for name in source.architectures}, key=number_of)
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


def number_of(architecture: str) -> int:
    """The compute capability of an architecture, such as 90 of ``90a``."""
    return int(architecture.rstrip("af"))
