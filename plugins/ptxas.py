"""What ptxas says about a kernel (``-Xptxas -v``), and what of it must not be."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ALLOWED: Mapping[str, str] = {}
"""Demangled name of a kernel that may use local memory -> why. A hot kernel has no business in here."""

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+)(?:\+\d+)? bytes smem)?")
_ADVICE = re.compile(r"\(?\bC75\d\d\)?:?")


@dataclass(frozen=True)
class Usage:
    """The resources of one kernel on one architecture.

    Attributes:
        function: Its name; as the linker knows it until ``demangled``.
        architecture: Such as ``90a``.
        registers: Per thread.
        shared: Bytes of static shared memory; what is asked for at the launch comes on top.
        stack: Bytes of local memory per thread, of the kernel and of the functions it calls.
        spill_stores: Bytes that are stored because registers ran out.
        spill_loads: Bytes that are loaded back.
    """

    function: str
    architecture: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def problem(self) -> str | None:
        """What must not be in a hot kernel: local memory; None where all is well."""
        if not (self.stack or self.spill_stores or self.spill_loads) or self.function in ALLOWED:
            return None
        spills = f" and spills {self.spill_stores} bytes" if self.spill_stores or self.spill_loads else ""
        return f"{self.function} for {self.architecture} keeps {self.stack} bytes in local memory{spills}"

    def to_dict(self) -> dict[str, str | int]:
        """For JSON."""
        return asdict(self)


def usages(output: str) -> list[Usage]:
    """The kernels that a compiler's output tells of, in its order."""
    found: list[Usage] = []
    for line in output.splitlines():
        if entry := _ENTRY.search(line):
            found.append(Usage(entry[1], entry[2]))
        elif found and (frame := _FRAME.search(line)):
            last, (stack, stores, loads) = found[-1], map(int, frame.groups())
            # Functions that were not inlined have frames of their own, told after that of the kernel.
            found[-1] = replace(
                last, stack=last.stack + stack, spill_stores=last.spill_stores + stores, spill_loads=last.spill_loads + loads
            )
        elif found and not found[-1].registers and (used := _USED.search(line)):
            found[-1] = replace(found[-1], registers=int(used[1]), shared=int(used[2] or 0))
    return found


def advice(output: str) -> list[str]:
    """Lines by which ptxas says that it had to serialize wgmma or the like (C75xx): a silent loss of half the speed."""
    return [line.strip() for line in output.splitlines() if _ADVICE.search(line)]


def demangled(found: Iterable[Usage]) -> list[Usage]:
    """The same with readable names, without return types and arguments; unchanged where the host has no ``c++filt``."""
    found = list(found)
    tool = shutil.which("c++filt")
    if tool is None or not found:
        return found
    names = "\n".join(usage.function for usage in found)
    done = subprocess.run([tool, "--no-params"], input=names, capture_output=True, text=True, check=False)  # noqa: S603
    readable = done.stdout.splitlines()
    if done.returncode or len(readable) != len(found):
        return found
    return [
        replace(usage, function=name.removeprefix("void ").replace("(anonymous namespace)::", ""))
        for usage, name in zip(found, readable, strict=True)
    ]
