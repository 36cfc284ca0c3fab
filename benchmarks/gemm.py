"""``W4A4Gemm``: every kernel of the table that runs here, beside cuBLAS fp16, cuBLASLt int8 and fp8 with a scale per row.

    python -m benchmarks.gemm
    python -m benchmarks.gemm --only '^16 ' --tactics

Weights are random 4-bit codes with a scale per channel (or per group of 128), activations random 4-bit codes with a scale per token, and
outputs fp16 (fp8: bf16, the only one it has). Before anything is timed, each of our kernels' results is compared with exact integer sums.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from benchmarks.results import Row, WrongResultError, json_option, label, only_option, report, run, seconds_option
from benchmarks.timing import Timer, about, attempt
from fqonnx.errors import EngineError
from fqonnx.ops.kernels import KERNELS, kernel_for
from fqonnx.ops.layout import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

PEERS = ("cuBLAS fp16", "int_mm", "fp8 rowwise")
INT_MM_ROWS = 32
"""``torch._int_mm`` takes no fewer than 17 rows; with fewer it gets so many."""

LAYERS = ((4096, 4096), (12288, 4096), (28672, 4096), (4096, 14336), (8192, 28672))
"""N and K."""

_DECODE = {(4096, 4096): 7.0, (12288, 4096): 10.0, (28672, 4096): 20.0, (4096, 14336): 12.0, (8192, 28672): 38.0}
"""Microseconds for 16 rows, by N and K, on an H200."""
_LARGE, _LARGE_SQUARE, _LARGE_GROUPED = 1400.0, 1250.0, 1050.0
"""TOP/s for 2,048 rows and more: per channel, at 4096 x 4096, and with a scale per group of 128."""


@dataclass(frozen=True)
class Case:
    """``m`` rows times a weight ``[n, k]`` with a scale per ``group`` columns, 0: per channel."""

    m: int
    n: int
    k: int
    group: int = 0

    @property
    def sizes(self) -> dict[str, Any]:
        """For people and JSON."""
        return {"m": self.m, "nk": f"{self.n}x{self.k}", "group": f"g{self.group}" if self.group else ""}

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """Traffic with int8 activations, 4-bit weights and fp16 results, each once."""
        groups = self.k // self.group if self.group else 1
        return self.m * self.k + 4 * self.m + self.n * self.k // 2 + 4 * self.n * groups + 2 * self.m * self.n


CASES = (
    *(Case(m, n, k) for n, k in LAYERS for m in (1, 16, 64)),
    Case(256, 12288, 4096),
    *(Case(m, n, k) for n, k in LAYERS for m in (2048, 8192)),
    *(Case(m, n, k, 128) for n, k in LAYERS for m in (16, 2048)),
)


def target(case: Case, ours: Mapping[Case, float | None]) -> tuple[float | None, str]:
    """Microseconds that a case should take at most on an H200, and why; ``ours`` holds what the other cases took."""

    def times(other: Case, factor: float) -> tuple[float | None, str]:
        measured = ours.get(other)
        return (None, "") if measured is None else (measured * factor, f"{factor:g} x {label(other.sizes)}")

    if case.m >= 2048:
        rate = _LARGE_GROUPED if case.group else _LARGE_SQUARE if (case.n, case.k) == (4096, 4096) else _LARGE
        return case.operations / rate * 1e-6, f"{rate:g} TOP/s"
    if case.group:
        return times(Case(case.m, case.n, case.k), 1.15)
    if case.m == 16 and (case.n, case.k) in _DECODE:
        return _DECODE[case.n, case.k], "absolute"
    if case.m == 256 and (case.n, case.k) == (12288, 4096):
        return 30.0, "absolute"
    factors = {1: 1.0, 64: 1.3}
    return times(Case(16, case.n, case.k), factors[case.m]) if case.m in factors else (None, "")


class Operands:
    """Random operands of one case, in every form that a contender wants, each made when asked for."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        import torch

        self.case, self._torch = case, torch
        self._random = torch.Generator("cuda").manual_seed(seed)
        groups = case.k // case.group if case.group else 1
        self.codes = torch.randint(-8, 8, (case.m, case.k), dtype=torch.int8, device="cuda", generator=self._random)
        self.scale = self._uniform(case.m, 1)
        self.weight = torch.randint(-8, 8, (case.n, case.k), dtype=torch.int8, device="cuda", generator=self._random)
        self.w_scale = self._uniform(case.n, groups)

    def container(self, name: str) -> torch.Tensor:
        """The activation's codes."""
        return self.codes if name == "int8" else pack(self.codes)

    def layout(self, name: str) -> torch.Tensor:
        """The weight's codes, two a byte."""
        return pack(reorder(self.weight, name))

    def expected(self) -> torch.Tensor:
        """What the operation gives, from exact sums: int8 products in int32, or in fp64 where groups have their own scales."""
        torch, case = self._torch, self.case
        if case.group:
            shares = self.w_scale.double().repeat_interleave(case.group, dim=1)
            return ((self.codes.double() @ (self.weight * shares).T) * self.scale).to(torch.float16)
        padded = torch.zeros(max(case.m, INT_MM_ROWS), case.k, dtype=torch.int8, device="cuda")
        padded[: case.m] = self.codes
        sums = torch._int_mm(padded, self.weight.T)[: case.m]
        return (sums.float() * self.w_scale.T * self.scale).to(torch.float16)

    def peer(self, name: str) -> Callable[[], object]:
        """A call of a peer's product of the same sizes."""
        torch, case = self._torch, self.case
        if name == "int_mm":
            rows = max(case.m, INT_MM_ROWS)
            q = torch.randint(-8, 8, (rows, case.k), dtype=torch.int8, device="cuda", generator=self._random)
            return lambda: torch._int_mm(q, self.weight.T)
        x = torch.randn(case.m, case.k, device="cuda", generator=self._random)
        w = torch.randn(case.n, case.k, device="cuda", dtype=torch.float16, generator=self._random)
        if name == "cuBLAS fp16":
            x16 = x.half()
            return lambda: torch.matmul(x16, w.T)
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        w_scale = self._uniform(1, case.n)
        return lambda: torch._scaled_mm(x8, w8.T, scale_a=self.scale, scale_b=w_scale, out_dtype=torch.bfloat16)

    def _uniform(self, *shape: int) -> torch.Tensor:
        return self._torch.rand(shape, device="cuda", generator=self._random) * 0.01 + 0.001


def pack(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes two a byte, the even index in the low nibble: uint8 ``[rows, K / 2]``."""
    import torch

    nibbles = codes.view(torch.uint8)
    return ((nibbles[:, 0::2] & 15) | (nibbles[:, 1::2] << 4)).contiguous()


def reorder(codes: torch.Tensor, layout: str) -> torch.Tensor:
    """``fqonnx.ops.layout.to_layout`` on the GPU."""
    chosen = LAYOUTS[layout]
    if not chosen.digits:
        return codes
    logical = [chosen.digits[axis] for axis in chosen.order]
    inverse = sorted(range(len(chosen.perm)), key=lambda axis: chosen.perm[axis])
    return codes.reshape(len(codes), -1, *logical).permute(inverse).reshape(codes.shape).contiguous()


def measure(case: Case, timer: Timer, bandwidth: float, *, tactics: bool = False) -> Row:
    """All contenders on one case.

    Raises:
        EngineError: There is no library.
    """
    from fqonnx.kernels import gemm_tactics, w4a4_gemm

    operands = Operands(case)
    expected = operands.expected()
    times: dict[str, float | None] = {}
    notes: dict[str, Any] = {}
    wrong = ""
    chosen = kernel_for("W4A4Gemm", capability=timer.capability, k=case.k, n=case.n, group_size=case.group).name
    for kernel in KERNELS:
        if kernel.op != "W4A4Gemm" or not kernel.runs[0] <= timer.capability <= kernel.runs[1]:
            continue
        q, w = operands.container(kernel.container or "int8"), operands.layout(kernel.layout or "plain")
        arguments = (q, operands.scale, w, operands.w_scale)
        options = {"layout": kernel.layout or "plain", "kernel": kernel.name}
        try:
            y = w4a4_gemm(*arguments, **options)
        except EngineError as error:
            times[kernel.name], notes[kernel.name] = None, str(error)
            continue
        try:
            require_close(y, expected, f"{kernel.name} at {label(case.sizes)}", exact=not case.group)
        except WrongResultError as error:
            times[kernel.name], wrong = None, str(error)
            continue
        times[kernel.name] = timer(lambda a=arguments, o=options: w4a4_gemm(*a, **o))
        if tactics and kernel.name == chosen:
            count = gemm_tactics(*arguments, **options)
            notes["tactics"] = {
                number: attempt(timer, lambda a=arguments, o=options, t=number: lambda: w4a4_gemm(*a, **o, tactic=t))
                for number in range(1, count + 1)
            }
    for peer in PEERS:
        times[peer] = attempt(timer, lambda name=peer: operands.peer(name))
    return Row(case.sizes, times, chosen, case.bytes / bandwidth * 1e6, case.bytes, case.operations, notes=notes, wrong=wrong)


def require_close(y: torch.Tensor, expected: torch.Tensor, what: str, *, exact: bool) -> None:
    """Raise where a result is not the expected: to the bit, or within two roundings to fp16 where sums of groups may be ordered freely."""
    import torch

    near = y == expected if exact else torch.isclose(y.float(), expected.float(), rtol=2**-10, atol=1e-5)
    wrong = int((~near).sum())
    if wrong:
        raise WrongResultError(f"{what}: {wrong} of {y.numel()} results are wrong")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@only_option
@click.option("--tactics", is_flag=True, help="Time every tile of the chosen kernel too (in the JSON's notes).")
@seconds_option
@json_option
def main(only: str | None, tactics: bool, seconds: float, as_json: bool) -> None:
    """Time W4A4Gemm beside its peers."""
    import torch

    timer = Timer(seconds)
    bandwidth = timer.copy_bandwidth()
    rows: dict[Case, Row] = {}
    for case in CASES:
        if only is None or re.search(only, label(case.sizes)):
            rows[case] = measure(case, timer, bandwidth, tactics=tactics)
            torch.cuda.empty_cache()
    ours = {case: row.best for case, row in rows.items()}
    for case, row in rows.items():
        row.target, row.why = target(case, ours)
    if tactics and not as_json:
        for row in rows.values():
            found = {number: time for number, time in row.notes.get("tactics", {}).items() if time is not None}
            click.echo(f"{label(row.case)}: " + ", ".join(f"{number}: {time:.1f}" for number, time in found.items()))
    contenders = [*PEERS, *(kernel.name for kernel in KERNELS if kernel.op == "W4A4Gemm")]
    title = f"W4A4Gemm on {timer.device}, µs (int_mm gets {INT_MM_ROWS} rows at least)"
    report(title, list(rows.values()), contenders, as_json=as_json, **about(timer, bandwidth))


if __name__ == "__main__":
    run(main)
