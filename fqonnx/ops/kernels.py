"""The table of kernels, ``plugins/kernels/kernels.def``, as Python reads it: what there is, and which kernel an operation gets where.

The library reads the same file, so that what a build writes into a model and its manifest is what will run.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from importlib.resources import files

from fqonnx.errors import EngineError

TABLE = files("fqonnx.plugins") / "kernels" / "kernels.def"
"""The table's file, part of the package."""

ANY_GROUP = 32
"""A kernel for any group size takes multiples of this."""

_ENTRY = re.compile(r"^FQ_KERNEL\((.*)\)\s*$")
_FIELDS = 12


@dataclass(frozen=True)
class Kernel:
    """One entry.

    Attributes:
        op: ``FlatQuantize``, ``W4A4Gemm`` or ``GroupQueryAttention``.
        name: Such as ``wgmma_s8``.
        container: ``int8`` or ``packed``; None where it takes both.
        layout: A key of ``fqonnx.ops.layout.LAYOUTS``; None where it takes any, or reads no weight.
        chosen: Lowest and highest compute capability it is chosen for, such as ``(90, 90)``.
        runs: Lowest and highest compute capability where it runs when it is asked for by name.
        k_multiple: K (of ``GroupQueryAttention`` the size of a head) is a multiple of this.
        n_multiple: N is a multiple of this; 0 where there is no N.
        group_sizes: Columns per weight scale: 0 is whole channels, -1 any multiple of ``ANY_GROUP``; empty where there is no weight.
        instruction: Of its inner loop.
    """

    op: str
    name: str
    container: str | None
    layout: str | None
    chosen: tuple[int, int]
    runs: tuple[int, int]
    k_multiple: int
    n_multiple: int
    group_sizes: tuple[int, ...]
    instruction: str

    def why_not(
        self,
        capability: int,
        *,
        container: str | None = None,
        layout: str | None = None,
        k: int | None = None,
        n: int | None = None,
        group_size: int | None = None,
    ) -> str | None:
        """Why this kernel is not chosen for such an operation; None where it can be. What is None is not asked about."""
        if not self.chosen[0] <= capability <= self.chosen[1]:
            return f"is for compute capability {_span(self.chosen)}, not {dotted(capability)}"
        if container is not None and self.container not in (None, container):
            return f"wants container {self.container}, not {container}"
        if layout is not None and self.layout not in (None, layout):
            return f"wants weight layout {self.layout}, not {layout}"
        if k is not None and k % self.k_multiple:
            return f"wants a K that is a multiple of {self.k_multiple}, not {k}"
        if n is not None and self.n_multiple and n % self.n_multiple:
            return f"wants an N that is a multiple of {self.n_multiple}, not {n}"
        if group_size is not None and not self._takes_group(group_size):
            return f"wants weight groups of {_groups(self.group_sizes)}, not {group_size or 'whole channels'}"
        return None

    def _takes_group(self, size: int) -> bool:
        return size in self.group_sizes or not self.group_sizes or (size > 0 and -1 in self.group_sizes and size % ANY_GROUP == 0)


def read_table(text: str) -> tuple[Kernel, ...]:
    """The entries of a ``kernels.def``, in the order of choice.

    Raises:
        ValueError: A line that begins like an entry is none; the message quotes it.
    """
    lines = (line for line in text.splitlines() if line.startswith("FQ_KERNEL"))
    return tuple(map(_entry, lines))


def kernel_for(
    op: str,
    *,
    capability: int,
    container: str | None = None,
    layout: str | None = None,
    k: int | None = None,
    n: int | None = None,
    group_size: int | None = None,
) -> Kernel:
    """The kernel that an operation gets: the first entry that takes it, as in the library.

    What is None is open: without ``container`` and ``layout`` the answer says how operands are best stored.

    Args:
        op: ``FlatQuantize``, ``W4A4Gemm`` or ``GroupQueryAttention``.
        capability: Compute capability without the dot, such as 90.
        container: How activation codes are stored, ``int8`` or ``packed``.
        layout: Order of the weight's codes, a key of ``fqonnx.ops.layout.LAYOUTS``.
        k: Columns of the activation; of ``GroupQueryAttention`` the size of a head.
        n: Output channels.
        group_size: Columns per weight scale; 0 is one scale per channel.

    Raises:
        EngineError: None takes it; the message says why for each.
        ValueError: ``op`` has no kernels.
    """
    candidates = [kernel for kernel in KERNELS if kernel.op == op]
    if not candidates:
        raise ValueError(f"no kernels for op {op!r}: choose from {', '.join(dict.fromkeys(kernel.op for kernel in KERNELS))}")
    reasons = []
    for kernel in candidates:
        reason = kernel.why_not(capability, container=container, layout=layout, k=k, n=n, group_size=group_size)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name} {reason}")
    raise EngineError(f"no kernel for this {op} on compute capability {dotted(capability)}: {'; '.join(reasons)}")


def dotted(capability: int) -> str:
    """``90`` as ``9.0``."""
    return f"{capability // 10}.{capability % 10}"


def _entry(line: str) -> Kernel:
    whole = _ENTRY.match(line)
    fields = next(csv.reader([whole[1]], skipinitialspace=True)) if whole else []
    if len(fields) != _FIELDS:
        raise ValueError(f"not an entry of {_FIELDS} fields: {line}")
    op, name, container, layout, *numbers = fields[:10]
    low, high, runs_low, runs_high, k_multiple, n_multiple = map(int, numbers)
    return Kernel(
        op,
        name,
        container=None if container == "ANY" else container.lower(),
        layout=None if layout == "ANY" else layout.lower(),
        chosen=(low, high),
        runs=(runs_low, runs_high),
        k_multiple=k_multiple,
        n_multiple=n_multiple,
        group_sizes=tuple(map(int, fields[10].split())),
        instruction=fields[11],
    )


def _span(capabilities: tuple[int, int]) -> str:
    low, high = capabilities
    return dotted(low) if low == high else f"{dotted(low)} to {dotted(high)}"


def _groups(sizes: tuple[int, ...]) -> str:
    words = {0: "whole channels", -1: f"any multiple of {ANY_GROUP}"}
    return " or ".join(words.get(size, str(size)) for size in sizes)


KERNELS = read_table(TABLE.read_text(encoding="utf-8"))
"""The table, in the order of choice."""
