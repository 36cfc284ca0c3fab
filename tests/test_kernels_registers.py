"""Operands that a kernel keeps in registers for good, in its machine code.

``flat_quantize_wgmma_f16.cu`` loads one factor into registers before its loop where shared memory has no room for it. ptxas 13.0 took such
registers for free after their first product when a branch followed it: nothing warned, rows after a block's first were wrong.
"""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.plugin_support import binary_tool, built_library

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_FUNCTION = re.compile(r"Function : (\S+)")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*[^;]*)")
_DESTINATION = re.compile(r"([A-Z][\w.]*) (?:U?P\w+, )*R(\d+)\b")
_WITHOUT_RESULT = ("ST", "RED", "BAR", "SYNCS", "R2UR", "CALL", "RET", "BRA", "UTMA")
_LOAD = "LDSM.16.MT88.4"


def kernel_listings(path: Path, part: str) -> dict[str, list[str]]:
    """Instructions with their operands, by function whose name holds ``part``, of a library's code for 9.0."""
    env = {**os.environ, "PATH": f"{binary_tool('nvdisasm').parent}:{os.environ['PATH']}"}
    command = [str(binary_tool("cuobjdump")), "-sass", "-arch", "sm_90a", str(path)]
    code: dict[str, list[str]] = {}
    current: list[str] | None = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if name := _FUNCTION.search(line):
                current = code.setdefault(name[1], []) if part in name[1] else None
            elif current is not None and (instruction := _INSTRUCTION.match(line)):
                current.append(instruction[1].strip())
    assert process.returncode == 0
    return code


def written(instruction: str) -> range:
    """Registers that an instruction writes."""
    destination = _DESTINATION.match(instruction)
    if destination is None or instruction.startswith(_WITHOUT_RESULT):
        return range(0)
    name, first = destination[1], int(destination[2])
    if name.startswith("HGMMA"):
        shape = re.match(r"HGMMA\.64x(\d+)x", name)
        assert shape is not None
        return range(first, first + int(shape[1]) // 2)
    parts = name.split(".")
    wide = 4 if "128" in parts or name == _LOAD else 2 if "64" in parts or "WIDE" in parts or parts[0] == "CS2R" else 1
    return range(first, first + wide)


def overwritten(instructions: Iterable[str]) -> list[str]:
    """Instructions that write a register which a transposing load filled and a product reads, after the last such load."""
    listing = list(instructions)
    loads = [i for i, instruction in enumerate(listing) if instruction.startswith(_LOAD)]
    if not loads:
        return []
    kept = {register for i in loads for register in written(listing[i])}
    assert any(re.search(rf", R{min(kept)},", entry) for entry in listing if entry.startswith("HGMMA")), "the products read what was loaded"
    return [entry for entry in listing[loads[-1] + 1 :] if kept & set(written(entry))]


def test_it_sees_a_register_that_was_given_away() -> None:
    load = ["LDSM.16.MT88.4 R140, [R0+0x3000]", "LDSM.16.MT88.4 R136, [R0+0x3800]"]
    loop = ["HGMMA.64x224x16.F32 R24, R136, gdesc[UR8].tnspB, R24, gsb0", "FMUL R24, R24, R15", "STG.E.128 desc[UR14][R136.64], R140"]
    assert overwritten([*load, *loop]) == []
    for bad in ("F2FP.F16.F32.PACK_AB R139, R135, R134", "LDS.128 R132, [R16]", "LDS.128 R133, [R16]", "IMAD.WIDE R142, R1, R2, R4"):
        expected = [] if bad.startswith("LDS.128 R132") else [bad]
        assert overwritten([*load, *loop, bad]) == expected
    assert overwritten(["FMUL R1, R2, R3"]) == []


@pytest.mark.slow
def test_a_factor_in_registers_stays_there() -> None:
    code = kernel_listings(built_library().path, "flat_quantize_wgmma_f16")
    with_loads = [name for name, listing in code.items() if any(entry.startswith(_LOAD) for entry in listing)]
    assert len(with_loads) == 2  # 128 x 224 in fp16 and bf16
    assert {name: overwritten(code[name]) for name in with_loads} == {name: [] for name in with_loads}
