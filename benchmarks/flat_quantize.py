"""``FlatQuantize``, alone and behind a norm or a gated activation, beside the same in PyTorch as FlatQuant's models run it.

    python -m benchmarks.flat_quantize
    python -m benchmarks.flat_quantize --only 2048

Inputs are random fp16 with outlier channels, factors random orthogonal fp32 as a build stores them (fp16 for PyTorch), codes int8. Before
anything is timed, each of our kernels' results is compared with the operation in fp32.
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

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

PRODUCTS, UNFUSED = "2 matmuls", "unfused torch"
"""The two products without any quantization, and all of the operation."""

QMAX = 7
CLIP = 0.9
EPSILON = 1e-5

PAIRS = ((64, 64), (64, 128), (86, 128), (112, 128), (128, 224))
ROWS = (1, 16, 64, 256, 2048, 8192)

_TARGETS = {
    (64, 64, 2048): 8.0,
    (64, 64, 8192): 28.0,
    (64, 128, 2048): 17.0,
    (86, 128, 2048): 26.0,
    (112, 128, 2048): 30.0,
    (128, 224, 2048): 85.0,
}
"""Microseconds on an H200 by n1, n2 and rows."""
_FEW_ROWS, _FEW_TARGET = 64, 5.0


@dataclass(frozen=True)
class Case:
    """``rows`` rows of ``n1 n2`` columns; ``before`` is ``norm``, ``gate`` or nothing. A pair of ones is no transform of ``k`` columns."""

    rows: int
    n1: int
    n2: int
    before: str = ""
    plain: int = 0

    @property
    def k(self) -> int:
        """Columns."""
        return self.plain or self.n1 * self.n2

    @property
    def sizes(self) -> dict[str, Any]:
        """For people and JSON."""
        pair = f"{self.plain} plain" if self.plain else f"{self.n1}x{self.n2}"
        return {"rows": self.rows, "pair": pair, "before": self.before}

    @property
    def operations(self) -> int:
        """Multiplications and additions of the transform."""
        return 0 if self.plain else 2 * self.rows * self.k * (self.n1 + self.n2)

    @property
    def bytes(self) -> int:
        """Traffic: fp16 in (twice with a gate; with a norm the residual in and the sum out too), int8 codes and scales out."""
        values = {"": 2, "gate": 4, "norm": 6}[self.before]
        return self.rows * (self.k * (values + 1) + 4)


CASES = (
    *(Case(rows, n1, n2) for n1, n2 in PAIRS for rows in ROWS),
    *(Case(rows, 1, 1, plain=4096) for rows in (16, 2048)),
    *(Case(rows, 32, 128, before="norm") for rows in (16, 2048)),
    *(Case(rows, n1, 128, before="gate") for n1 in (86, 112) for rows in (16, 2048)),
)


def target(case: Case) -> float | None:
    """Microseconds that a case should take at most on an H200."""
    if case.before or case.plain:
        return None
    return _FEW_TARGET if case.rows <= _FEW_ROWS else _TARGETS.get((case.n1, case.n2, case.rows))


class Operands:
    """Random operands of one case."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        import torch

        self.case, self._torch = case, torch
        random = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", generator=random)

        outliers = 1 + 20 * (torch.rand(case.k, device="cuda", generator=random) < 0.01)
        self.x, self.residual, self.up = ((normal(case.rows, case.k) * outliers).half() for _ in range(3))
        self.gamma = (1 + 0.1 * normal(case.k)).half()
        self.left, self.right = (torch.linalg.qr(normal(n, n)).Q.contiguous() for n in (case.n1, case.n2))

    def ours(self, kernel: str) -> Callable[[], Any]:
        """A call of ours; its result begins with codes and scales."""
        from fqonnx.kernels import flat_quantize, quantize, rms_norm_flat_quantize, silu_mul_flat_quantize

        options: dict[str, Any] = {"clip": CLIP, "kernel": kernel}
        match self.case.before:
            case "norm":
                options |= {"epsilon": EPSILON, "residual": self.residual}
                return lambda: rms_norm_flat_quantize(self.x, self.gamma, self.left, self.right, **options)
            case "gate":
                return lambda: silu_mul_flat_quantize(self.x, self.up, self.left, self.right, **options)
        if self.case.plain:
            return lambda: quantize(self.x, **options)
        return lambda: flat_quantize(self.x, self.left, self.right, **options)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Transformed rows and their scales, in fp32 from the same rounded input."""
        torch, case = self._torch, self.case
        h = self._input(self.x.float(), torch.float32).half().float()
        t = h if case.plain else (self.left.T.double() @ (h.double().reshape(-1, case.n1, case.n2) @ self.right.double())).float()
        t = t.reshape(case.rows, case.k)
        return t, t.abs().amax(dim=1, keepdim=True) * CLIP / QMAX

    def products(self) -> Callable[[], object]:
        """The transform alone, in fp16."""
        case, left, right = self.case, self.left.half(), self.right.half()
        if case.plain or case.before:
            raise EngineError("no transform alone in this case")
        return lambda: left.T @ (self.x.view(-1, case.n1, case.n2) @ right)

    def unfused(self) -> Callable[[], object]:
        """The whole operation in PyTorch, one step after the other, as FlatQuant's models run it without their kernel."""
        torch, case, left, right = self._torch, self.case, self.left.half(), self.right.half()

        def call() -> object:
            h = self._input(self.x, torch.float16)
            t = h if case.plain else (left.T @ (h.view(-1, case.n1, case.n2) @ right)).view(case.rows, case.k)
            scale = t.abs().amax(dim=1, keepdim=True).float() * (CLIP / QMAX)
            return torch.clamp(torch.round(t / scale), -QMAX - 1, QMAX).to(torch.int8), scale

        return call

    def _input(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        torch = self._torch
        match self.case.before:
            case "norm":
                total = (x + self.residual.to(dtype)).half().to(dtype)
                return torch.nn.functional.rms_norm(total, (self.case.k,), self.gamma.to(dtype), EPSILON)
            case "gate":
                return torch.nn.functional.silu(x) * self.up.to(dtype)
        return x


def require_close(q: torch.Tensor, scale: torch.Tensor, t: torch.Tensor, expected_scale: torch.Tensor, what: str) -> None:
    """Raise where codes or scales are off: a fp16 operand's rounding may move a scale by 2⁻⁹ and a code across one step, not further."""
    import torch

    if not torch.allclose(scale, expected_scale, rtol=2**-8):
        raise WrongResultError(f"{what}: scales differ by up to {float((scale / expected_scale - 1).abs().max()):.1e}")
    codes = torch.clamp(torch.round(t / expected_scale), -QMAX - 1, QMAX)
    off = (q.float() - codes).abs()
    if float(off.max()) > 1 or float((off > 0).float().mean()) > 0.02:
        raise WrongResultError(f"{what}: {float((off > 0).float().mean()):.1%} of the codes differ, by up to {int(off.max())}")


def measure(case: Case, timer: Timer, bandwidth: float) -> Row:
    """All contenders on one case.

    Raises:
        EngineError: There is no library.
    """
    operands = Operands(case)
    t, expected_scale = operands.expected()
    times: dict[str, float | None] = {}
    notes: dict[str, Any] = {}
    wrong = ""
    for kernel in KERNELS:
        if kernel.op != "FlatQuantize" or not kernel.runs[0] <= timer.capability <= kernel.runs[1]:
            continue
        call = operands.ours(kernel.name)
        try:
            q, scale, *_ = call()
        except EngineError as error:
            times[kernel.name], notes[kernel.name] = None, str(error)
            continue
        try:
            require_close(q, scale, t, expected_scale, f"{kernel.name} at {label(case.sizes)}")
        except WrongResultError as error:
            times[kernel.name], wrong = None, str(error)
            continue
        times[kernel.name] = timer(call)
    taken = [name for name, time in times.items() if time is not None]
    chosen = kernel_for("FlatQuantize", capability=timer.capability, k=case.k).name
    chosen = chosen if chosen in taken or not taken else taken[0]  # the table's next entry where the first does not take the case
    times[PRODUCTS], times[UNFUSED] = attempt(timer, operands.products), attempt(timer, operands.unfused)
    return Row(case.sizes, times, chosen, case.bytes / bandwidth * 1e6, case.bytes, case.operations, target(case), notes=notes, wrong=wrong)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@only_option
@seconds_option
@json_option
def main(only: str | None, seconds: float, as_json: bool) -> None:
    """Time FlatQuantize beside PyTorch."""
    timer = Timer(seconds)
    bandwidth = timer.copy_bandwidth()
    rows = [measure(case, timer, bandwidth) for case in CASES if only is None or re.search(only, label(case.sizes))]
    contenders = [PRODUCTS, UNFUSED, *(kernel.name for kernel in KERNELS if kernel.op == "FlatQuantize")]
    report(f"FlatQuantize on {timer.device}, µs", rows, contenders, as_json=as_json, **about(timer, bandwidth))


if __name__ == "__main__":
    run(main)
