"""FlatQuantize and Dequantize on the GPU against the reference, for every kernel of the table that takes the problem.

What a code may be off by follows from the operands' rounding. The tensor cores multiply L, X, R and Y = Lᵀ X (or X R) rounded to a
significand of u = 2^-11 (fp16), 2^-8 (bf16) or, of fp32 split into two bf16, 2^-15. X is exact but for the latter, so that t is off by at
most 3 u |L|ᵀ |X| |R| (4 u where X is rounded too) and what fp32 sums add. Ties within that distance may go either way, nothing else.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fqonnx import kernels
from fqonnx.errors import EngineError, UsageError
from fqonnx.ops.kernels import KERNELS
from fqonnx.ops.reference import flat_quantize, unpack_rows

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = [kernel.name for kernel in KERNELS if kernel.op == "FlatQuantize"]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-15}
SUM_ROUNDING = 2.0**-20
"""Relative to |L|ᵀ |X| |R|: sums of up to 512 products in fp32."""
GUARD = 256
POISON = 0xA5
CODES_PER_BYTE = {"int8": 1, "packed": 2, "int32x8": 2}


@dataclass(frozen=True)
class Case:
    n1: int
    n2: int
    blocks: int = 1
    rows: int = 5
    dtype: str = "float16"
    factors: str = "float32"
    bits: int = 4
    container: str = "int8"
    clip: float = 1.0
    clip_on_device: bool = False
    padding: int = 0
    """Elements between rows of x and of up, a multiple of 16 bytes."""
    prologue: str = "none"
    """none, norm, residual (norm of x + residual) or silu."""
    seed: int = 0

    @property
    def k(self) -> int:
        return self.n1 * self.n2 * self.blocks

    @property
    def torch_dtype(self) -> Any:
        return DTYPES[self.dtype]


@dataclass
class Inputs:
    x: Any
    left: Any
    right: Any
    gamma: Any = None
    second: Any = None


@dataclass
class Result:
    codes: Any
    scale: Any
    sum: Any = None
    normed: Any = None


def strided(case: Case, generator: Any, scale: float = 1.0) -> Any:
    """[rows, k] in a wider matrix whose gaps hold NaN: nothing may be read there."""
    element = case.torch_dtype.itemsize
    width = -(-case.k * element // 16) * 16 // element + case.padding
    whole = torch.full((case.rows, width), float("nan"), dtype=case.torch_dtype, device="cuda")
    # Rows of different magnitudes, some columns larger than others.
    values = torch.randn(case.rows, case.k, generator=generator, device="cuda") * scale
    values *= 2.0 ** torch.randint(-3, 4, (case.rows, 1), generator=generator, device="cuda")
    values *= 1 + 9 * (torch.rand(case.k, generator=generator, device="cuda") < 0.02)
    whole[:, : case.k] = values.to(case.torch_dtype)
    return whole[:, : case.k]


def factor(n: int, dtype: str, generator: Any) -> Any:
    """Near an orthogonal matrix, as the learned ones are."""
    if n == 1:
        return torch.tensor([[-0.75]], dtype=DTYPES[dtype], device="cuda")
    matrix = torch.linalg.qr(torch.randn(n, n, generator=generator, device="cuda", dtype=torch.float64))[0]
    return (matrix + 0.1 / n**0.5 * torch.randn(n, n, generator=generator, device="cuda")).to(DTYPES[dtype]).contiguous()


def inputs_of(case: Case) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(case.seed)
    inputs = Inputs(strided(case, generator), factor(case.n1, case.factors, generator), factor(case.n2, case.factors, generator))
    if case.prologue in ("norm", "residual"):
        inputs.gamma = (1 + 0.3 * torch.randn(case.k, generator=generator, device="cuda")).to(case.torch_dtype)
    if case.prologue == "residual":
        inputs.second = torch.randn(case.rows, case.k, generator=generator, device="cuda").to(case.torch_dtype)
    if case.prologue == "silu":
        inputs.second = strided(case, generator)
    return inputs


class Guarded:
    """A poisoned buffer between guard bytes."""

    def __init__(self, size: int) -> None:
        self.whole = torch.full((size + 2 * GUARD,), POISON, dtype=torch.uint8, device="cuda")
        self.size = size

    @property
    def bytes(self) -> Any:
        return self.whole[GUARD : GUARD + self.size]

    def check(self) -> None:
        assert (self.whole[:GUARD] == POISON).all(), "written before the buffer"
        assert (self.whole[GUARD + self.size :] == POISON).all(), "written past the buffer"


EPSILON = 1e-5


class Launch:
    """A call with its buffers, which can be made many times."""

    def __init__(self, case: Case, inputs: Inputs, kernel: str | None = None, *, transform: bool = True) -> None:
        self.case, self.inputs = case, inputs
        self.q = Guarded(case.rows * case.k // CODES_PER_BYTE[case.container])
        self.scale = Guarded(4 * case.rows)
        self.clip = torch.tensor([case.clip], dtype=torch.float32, device="cuda")
        element = case.torch_dtype.itemsize
        self.params = kernels.FlatQuantizeParams(
            x=inputs.x.data_ptr(), left=inputs.left.data_ptr() if transform else None, right=inputs.right.data_ptr() if transform else None,
            clip_ptr=self.clip.data_ptr() if case.clip_on_device else None, q=self.q.bytes.data_ptr(), scale=self.scale.bytes.data_ptr(),
            rows=case.rows, k=case.k, x_stride=inputs.x.stride(0), n1=case.n1, n2=case.n2, dtype=kernels.DTYPES[case.dtype],
            factor_dtype=kernels.DTYPES[case.factors], bits=case.bits, container=kernels.CONTAINERS[case.container],
            clip=7.0 if case.clip_on_device else case.clip, variant=kernels.variant_of("FlatQuantize", kernel),
        )  # fmt: skip
        self.function, self.more = "fq_flat_quantize", ()
        self.sum = self.normed = None
        if case.prologue in ("norm", "residual"):
            self.function = "fq_rms_norm_flat_quantize"
            self.normed = Guarded(case.rows * case.k * element)
            if case.prologue == "residual":
                self.sum = Guarded(case.rows * case.k * element)
            self.more = (
                kernels.RmsNormParams(
                    inputs.gamma.data_ptr(), inputs.second.data_ptr() if case.prologue == "residual" else None,
                    self.sum.bytes.data_ptr() if self.sum else None, self.normed.bytes.data_ptr(), EPSILON,
                ),
            )  # fmt: skip
        elif case.prologue == "silu":
            self.function = "fq_silu_mul_flat_quantize"
            self.more = (kernels.SiluMulParams(inputs.second.data_ptr(), inputs.second.stride(0)),)

    def enqueue(self) -> None:
        kernels.call(self.function, self.params, *self.more, stream=torch.cuda.current_stream().cuda_stream)

    def poison(self) -> None:
        for buffer in (self.q, self.scale, self.sum, self.normed):
            if buffer is not None:
                buffer.whole.fill_(POISON)

    def result(self) -> Result:
        torch.cuda.synchronize()
        for buffer in (self.q, self.scale, self.sum, self.normed):
            if buffer is not None:
                buffer.check()
        case = self.case
        codes = self.q.bytes.view(torch.int8).reshape(case.rows, -1)
        if case.container != "int8":
            codes = torch.stack([codes << 4 >> 4, codes >> 4], dim=-1).reshape(case.rows, case.k)
        rows = [
            None if buffer is None else buffer.bytes.view(case.torch_dtype).reshape(case.rows, case.k) for buffer in (self.sum, self.normed)
        ]
        return Result(codes, self.scale.bytes.view(torch.float32), *rows)


def run(case: Case, inputs: Inputs, kernel: str | None, *, transform: bool = True) -> Result:
    launch = Launch(case, inputs, kernel, transform=transform)
    launch.enqueue()
    return launch.result()


def prologue(case: Case, inputs: Inputs) -> tuple[Any, Any]:
    """What is quantized before its rounding to x's type, in fp64; and the sum."""
    x = inputs.x.double()
    if case.prologue == "silu":
        return x / (1 + torch.exp(-x)) * inputs.second.double(), None
    total = None
    if case.prologue == "residual":
        total = (inputs.x.float() + inputs.second.float()).to(case.torch_dtype)
        x = total.double()
    return inputs.gamma.double() * (x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + EPSILON)), total


def transformed(case: Case, h: Any, left: Any, right: Any) -> Any:
    blocks = h.reshape(case.rows, case.blocks, case.n1, case.n2)
    return (left.double().T @ (blocks.double() @ right.double())).reshape(case.rows, case.k)


def check(case: Case, inputs: Inputs, result: Result, *, rows: slice = slice(None), absolute: float = 0.0) -> None:
    """Codes and scales within what the operands' rounding allows, element by element, and far fewer than that in number.

    Args:
        case: What ran.
        inputs: On what.
        result: What came out.
        rows: Those that are checked.
        absolute: Error of t that is allowed besides, for rows in the denormal range.
    """
    unit = ROUNDING[case.dtype]
    h, share_of_x = inputs.x.double(), unit if case.dtype == "float32" else 0.0
    if case.prologue != "none":
        h, total = prologue(case, inputs)
        if total is not None:
            assert torch.equal(result.sum, total)
        # Rounded to the type, of which the split operands of fp32 keep less; fp32 itself is 2^-18 off in silu.
        share_of_x = max(unit, 2.0**-17)
        if result.normed is not None:
            ulps = 1.01 * {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-21}[case.dtype]
            assert (result.normed.double() - h).abs().le(h.abs() * ulps + (2.0**-24 if case.dtype == "float16" else 0)).all()
            h, share_of_x = result.normed.double(), unit if case.dtype == "float32" else 0.0
    t = transformed(case, h, inputs.left, inputs.right)
    bound = transformed(case, h.abs(), inputs.left.abs(), inputs.right.abs()) * (3 * unit + share_of_x + SUM_ROUNDING) + absolute
    qmax = 2 ** (case.bits - 1) - 1
    step = t.abs().amax(dim=-1) * case.clip / qmax
    t, bound, step, scale, codes = (value[rows] for value in (t, bound, step, result.scale.double(), result.codes.double()))
    assert (scale - step).abs().le(bound.amax(dim=-1) * case.clip / qmax + 1e-7 * step).all(), "scales"
    nearest = (codes - torch.clamp(t / scale[:, None], -qmax - 1, qmax)).abs()
    excess = nearest - 0.5 - bound / scale[:, None] - 1e-5
    assert excess.le(0).all(), f"{int((excess > 0).sum())} codes are farther off than rounding explains, by up to {float(excess.max()):.3g}"
    expected = torch.clamp(torch.round(t / step[:, None]), -qmax - 1, qmax)
    off = (codes - expected).abs()
    # Rounding errors average out: about u qmax / 2 of the codes are that near to a tie in rows without outliers.
    allowed = 4 * max(unit, share_of_x) * qmax * off.numel() + 4 * off.numel() ** 0.5 * 0.1 + 3
    if not absolute:
        assert off.max() <= max(1, np.ceil(0.5 * unit * 128 * qmax)), "a code is off by more than 1"
        assert (off > 0).sum() <= allowed, f"{int((off > 0).sum())} of {off.numel()} codes differ"


def takes(case: Case, kernel: str) -> bool:
    """Whether the kernel takes the case; mma_f16 takes every one."""
    one = replace(case, rows=1)
    if kernel == "mma_f16":
        return True
    try:
        run(one, inputs_of(one), kernel)
    except EngineError:
        return False
    return True


PAIRS = [
    (16, 24), (24, 32), (32, 128), (40, 128), (64, 64), (64, 80), (64, 128), (86, 128), (112, 128), (128, 128), (128, 224),
    (3, 128), (8, 12),
]  # fmt: skip
ODD_PAIRS = [
    (1, 1), (1, 2), (2, 1), (3, 5), (7, 9), (1, 255), (255, 1), (13, 100), (33, 17), (100, 13), (65, 66), (129, 64), (17, 136), (256, 256),
    (250, 129), (129, 250), (256, 16), (16, 256), (2, 200),
]  # fmt: skip


@pytest.fixture(params=NAMES)
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def checked(case: Case, kernel: str) -> None:
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    check(case, inputs, run(case, inputs, kernel))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n1", "n2"), PAIRS)
def test_pairs_of_models(kernel: str, n1: int, n2: int, dtype: str) -> None:
    checked(Case(n1, n2, rows=301, dtype=dtype, factors=dtype, seed=1), kernel)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n1", "n2"), ODD_PAIRS)
def test_odd_pairs(kernel: str, n1: int, n2: int, dtype: str) -> None:
    checked(Case(n1, n2, rows=7, dtype=dtype, seed=2), kernel)


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 64, 65, 133, 1000])
@pytest.mark.parametrize(("n1", "n2"), [(64, 64), (32, 128), (86, 128), (128, 224)])
def test_numbers_of_rows(kernel: str, n1: int, n2: int, rows: int) -> None:
    checked(Case(n1, n2, rows=rows, factors="float16", seed=3), kernel)


TRANSPOSED_PAIRS = [(65, 128), (66, 80), (86, 128), (95, 112), (96, 128)]
"""Those that ``wgmma_f16`` computes transposed where rows are many and codes are bytes."""


@pytest.mark.parametrize("prologue", ["none", "silu"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("n1", "n2"), TRANSPOSED_PAIRS)
def test_many_rows_between_tiles(kernel: str, n1: int, n2: int, dtype: str, prologue: str) -> None:
    case = Case(n1, n2, rows=1100, dtype=dtype, prologue=prologue, seed=18)
    checked(case, kernel)
    checked(replace(case, rows=1024, factors=dtype, bits=8, clip=0.8, clip_on_device=True, padding=8), kernel)
    checked(replace(case, container="packed", factors=dtype, clip=0.37), kernel)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e5])
@pytest.mark.parametrize(("n1", "n2"), TRANSPOSED_PAIRS[1:3])
def test_values_of_many_rows_between_tiles(kernel: str, n1: int, n2: int, scale: float) -> None:
    case = Case(n1, n2, rows=1030, seed=19)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    inputs.left *= scale
    # One that is no multiple of a vector behind the beginning of its buffer.
    inputs.right = torch.cat([inputs.right.new_zeros(1), inputs.right.flatten()])[1:].view(n2, n2)
    place = case.k // 3
    inputs.x[1], inputs.x[2] = 0, 65504
    inputs.x[3, place], inputs.x[1029, place], inputs.x[134, case.k - 1] = float("nan"), float("inf"), float("-inf")
    inputs.x[7] *= 2.0**-10
    result = run(case, inputs, kernel)
    assert result.scale[1] == 1
    assert (result.codes[1] == 0).all()
    bad = torch.tensor([3, 134, 1029], device="cuda")
    assert torch.isnan(result.scale[bad]).all()
    good = torch.ones(case.rows, dtype=torch.bool, device="cuda")
    good[bad] = good[1] = False
    kept = Result(result.codes[good], result.scale[good])
    # Entries round to fp16, which keeps fewer digits of those below 2^-14.
    absolute = 0.05 if scale < 1 else 0.0
    check(replace(case, rows=int(good.sum())), Inputs(inputs.x[good], inputs.left, inputs.right), kept, absolute=absolute)


def random_cases(count: int) -> list[Case]:
    generator = np.random.default_rng(20)
    cases = []
    while len(cases) < count:
        n1, n2 = (
            int(generator.choice([generator.integers(1, 257), 8 * generator.integers(1, 33), 2 ** generator.integers(0, 9)])) for _ in "12"
        )
        dtype = str(generator.choice(list(DTYPES)))
        bits = int(generator.choice([4, 8]))
        case = Case(
            n1, n2, blocks=int(generator.choice([1, 1, 2, 3, 5, 12])), rows=int(generator.choice([1, 2, 3, 8, 31, 64, 200])), dtype=dtype,
            factors=str(generator.choice([dtype, "float32"])), bits=bits,
            container=str(generator.choice(["int8", "packed", "int32x8"])) if bits == 4 else "int8",
            clip=float(generator.choice([1.0, 0.9, 0.37])), clip_on_device=bool(generator.integers(2)),
            padding=int(generator.choice([0, 8, 64])), prologue=str(generator.choice(["none", "none", "norm", "residual", "silu"])),
            seed=len(cases),
        )  # fmt: skip
        if case.k % {"int8": 1, "packed": 2, "int32x8": 8}[case.container] == 0 and case.k * case.rows < 4_000_000 and case.k > 1:
            cases.append(case)
    return cases


@pytest.mark.parametrize("case", random_cases(300), ids=str)
def test_random_cases(kernel: str, case: Case) -> None:
    checked(case, kernel)


@pytest.mark.parametrize("container", ["int8", "packed"])
@pytest.mark.parametrize(("n1", "n2", "blocks"), [(129, 3, 8), (131, 67, 4), (255, 5, 6), (7, 255, 12), (1, 3, 400)])
def test_blocks_of_an_odd_number_of_columns(kernel: str, n1: int, n2: int, blocks: int, container: str) -> None:
    checked(Case(n1, n2, blocks, rows=5, container=container, seed=4), kernel)


@pytest.mark.parametrize("prologue", ["norm", "residual", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n1", "n2", "blocks"), [(64, 64, 1), (32, 128, 1), (86, 128, 1), (128, 224, 1), (64, 32, 3), (5, 7, 3), (200, 144, 2)]
)
def test_prologues(kernel: str, n1: int, n2: int, blocks: int, dtype: str, prologue: str) -> None:
    for rows in (1, 9, 150):
        checked(Case(n1, n2, blocks, rows=rows, dtype=dtype, prologue=prologue, padding=8, seed=5), kernel)


def test_sum_in_the_place_of_the_residual(kernel: str) -> None:
    case = Case(64, 64, rows=40, prologue="residual", seed=6)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    launch = Launch(case, inputs, kernel)
    expected = run(case, inputs, kernel)
    launch.more[0].sum = inputs.second.data_ptr()
    launch.enqueue()
    result = launch.result()
    assert torch.equal(inputs.second, expected.sum)
    assert torch.equal(result.codes, expected.codes)
    assert torch.equal(result.scale, expected.scale)


def test_normed_is_optional(kernel: str) -> None:
    case = Case(32, 128, rows=9, prologue="norm", seed=7)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    launch = Launch(case, inputs, kernel)
    launch.more[0].normed = None
    launch.enqueue()
    assert torch.equal(launch.result().codes, run(case, inputs, kernel).codes)
    assert (launch.normed.bytes == POISON).all()


# ---- no transform: exact ----


def exact(case: Case, h: Any, result: Result) -> None:
    one = np.ones((1, 1), np.float32)
    q, scale = flat_quantize(h.float().cpu().numpy(), one, one, case.clip, bits=case.bits)
    finite = np.isfinite(scale[:, 0])
    np.testing.assert_array_equal(result.scale.cpu().numpy(), scale[:, 0])
    np.testing.assert_array_equal(result.codes.cpu().numpy()[finite], q[finite])


@pytest.mark.parametrize(("bits", "container"), [(4, "int8"), (4, "packed"), (8, "int8")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 7, 8, 62, 96, 100, 255, 1023, 1024, 4096, 4098, 11008, 14336, 16384, 16392, 28672, 50001, 100000])
def test_plain_is_exact(kernel: str, k: int, dtype: str, bits: int, container: str) -> None:
    if container == "packed" and k % 2:
        pytest.skip("an odd number of codes is not packed")
    case = Case(1, 1, k, rows=11, dtype=dtype, bits=bits, container=container, clip=0.81, padding=8, seed=k)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    exact(case, inputs.x, run(case, inputs, kernel, transform=False))


def test_plain_ties_are_exact(kernel: str) -> None:
    # Quotients at ties and at their neighbours, for steps that are no power of two.
    values = torch.arange(-7 * 64, 7 * 64 + 1, dtype=torch.float32, device="cuda") / 64
    steps = torch.linspace(0.1, 3.7, 61, device="cuda")
    x = steps[:, None] * values[None, :896]
    x = torch.stack([x, torch.nextafter(x, torch.full_like(x, 1e9)), torch.nextafter(x, torch.full_like(x, -1e9))], dim=1).reshape(-1, 896)
    case = Case(1, 1, 896, rows=len(x), dtype="float32")
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    one = torch.ones(1, 1, device="cuda")
    exact(case, x, run(case, Inputs(x, one, one), kernel, transform=False))


@pytest.mark.parametrize("prologue", ["norm", "residual"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [96, 1001, 4096, 14336, 20000, 40001])
def test_plain_prologues(kernel: str, k: int, dtype: str, prologue: str) -> None:
    case = Case(1, 1, k, rows=13, dtype=dtype, prologue=prologue, seed=8)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    inputs.left = inputs.right = torch.ones(1, 1, device="cuda")
    result = run(case, inputs, kernel, transform=False)
    check(case, inputs, result)
    exact(case, result.normed, result)


# ---- values ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n1", "n2"), [(1, 1), (64, 64), (86, 128), (3, 5), (128, 224)])
def test_rows_of_zeros_and_of_what_is_not_finite(kernel: str, n1: int, n2: int, dtype: str) -> None:
    case = Case(n1, n2, blocks=4096 if n1 == 1 else 1, rows=8, dtype=dtype, seed=9)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    place = case.k // 3
    inputs.x[1] = 0
    inputs.x[3, place] = float("nan")
    inputs.x[4, place] = float("inf")
    inputs.x[6, place] = float("-inf")
    result = run(case, inputs, kernel)
    assert result.scale[1] == 1
    assert (result.codes[1] == 0).all()
    assert torch.isnan(result.scale[[3, 4, 6]]).all()
    for row in (0, 2, 5, 7):
        check(replace(case, rows=8), Inputs(inputs.x.nan_to_num(0, 0, 0), inputs.left, inputs.right), result, rows=slice(row, row + 1))


@pytest.mark.parametrize(("n1", "n2"), [(1, 1), (64, 64), (86, 128), (3, 5), (128, 224)])
def test_largest_fp16_does_not_overflow(kernel: str, n1: int, n2: int) -> None:
    case = Case(n1, n2, blocks=4096 if n1 == 1 else 1, rows=4, seed=10)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    inputs.x[0] = 65504
    inputs.x[1] = torch.where(torch.rand(case.k, device="cuda") < 0.5, -65504.0, 65504.0).half()
    if n1 > 1:
        # All of one sign, so that nothing cancels: the largest sums that there can be.
        inputs.left, inputs.right = inputs.left.abs(), inputs.right.abs()
    result = run(case, inputs, kernel)
    assert torch.isfinite(result.scale).all()
    check(case, inputs, result)


def test_fp32_beyond_fp16(kernel: str) -> None:
    case = Case(64, 64, rows=6, dtype="float32", seed=11)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    inputs.x *= torch.tensor([1e-30, 1e-12, 1e5, 1e12, 1e30, 2e35], device="cuda")[:, None]
    check(case, inputs, run(case, inputs, kernel))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_massive_outliers(kernel: str, dtype: str) -> None:
    case = Case(86, 128, rows=20, dtype=dtype, factors=dtype, seed=12)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    inputs.x[:, 777] = 30000.0
    inputs.x[:, 8001] = -12000.0
    check(case, inputs, run(case, inputs, kernel))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n1", "n2"), [(1, 1), (64, 64)])
def test_rows_below_the_smallest_scale(kernel: str, n1: int, n2: int, dtype: str) -> None:
    case = Case(n1, n2, blocks=512 if n1 == 1 else 1, rows=3, dtype=dtype, seed=13)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    smallest = {"float16": 2.0**-24, "bfloat16": 1e-39, "float32": 1e-39}[dtype]
    inputs.x[1] = smallest
    result = run(case, inputs, kernel)
    if dtype == "float16":
        check(case, inputs, result, absolute=2.0**-24 * 2.0**-11)
    else:
        assert result.scale[1] == 1
        assert (result.codes[1] == 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_factors_of_another_magnitude(kernel: str, scale: float) -> None:
    case = Case(64, 96, rows=10, seed=14)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    inputs.left *= scale
    # Entries round to fp16, which keeps fewer digits of those below 2^-14.
    check(case, inputs, run(case, inputs, kernel), absolute=0.05 if scale < 1 else 0)


def test_against_the_numpy_reference(kernel: str) -> None:
    case = Case(24, 40, blocks=2, rows=50, container="packed", clip=0.9, seed=15)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    launch = Launch(case, inputs, kernel)
    launch.enqueue()
    result = launch.result()
    left, right = inputs.left.cpu().numpy(), inputs.right.cpu().numpy()
    packed, scale = flat_quantize(inputs.x.cpu().numpy(), left, right, 0.9, packed=True)
    np.testing.assert_allclose(result.scale.cpu().numpy(), scale[:, 0], rtol=2e-3)
    mine = unpack_rows(launch.q.bytes.view(torch.int8).reshape(case.rows, -1).cpu().numpy())
    assert np.array_equal(mine, result.codes.cpu().numpy())
    assert (mine != unpack_rows(packed)).mean() < 0.01


def test_containers_hold_the_same_codes(kernel: str) -> None:
    case = Case(40, 48, rows=21, seed=16)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    first = run(case, inputs, kernel)
    for container in ("packed", "int32x8"):
        other = run(replace(case, container=container), inputs, kernel)
        assert torch.equal(first.codes, other.codes)
        assert torch.equal(first.scale, other.scale)


# ---- calls ----


@pytest.mark.parametrize("operand", ["x", "q", "scale", "left", "right"])
def test_misaligned_pointers_are_errors(kernel: str, operand: str) -> None:
    case = Case(32, 64)
    launch = Launch(case, inputs_of(case), kernel)
    setattr(launch.params, operand, getattr(launch.params, operand) + 2)
    with pytest.raises(UsageError, match=rf"{operand} is 0x\w+, which is not aligned"):
        launch.enqueue()
    torch.cuda.synchronize()
    assert (launch.q.whole == POISON).all()


def test_factors_may_begin_anywhere(kernel: str) -> None:
    case = Case(32, 64, rows=9, factors="float16", seed=17)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    expected = run(case, inputs, kernel)
    for name in ("left", "right"):
        matrix = getattr(inputs, name)
        moved = torch.zeros(matrix.numel() + 1, dtype=matrix.dtype, device="cuda")[1:]
        moved.copy_(matrix.reshape(-1))
        setattr(inputs, name, moved.reshape(matrix.shape))
    assert torch.equal(run(case, inputs, kernel).codes, expected.codes)


def some_launches(kernel: str) -> list[Launch]:
    shapes = [(64, 64, 1), (32, 128, 1), (1, 1, 4096), (86, 128, 1), (3, 5, 4), (128, 224, 1), (17, 24, 2)]
    prologues = ["none", "norm", "residual", "silu"]
    launches = []
    for (n1, n2, blocks), (prologue, rows) in itertools.product(shapes, zip(prologues, (1, 7, 33, 70), strict=True)):
        case = Case(n1, n2, blocks, rows=rows, prologue=prologue, container="packed" if n1 * n2 * blocks % 2 == 0 else "int8", seed=18)
        if takes(case, kernel):
            launches.append(Launch(case, inputs_of(case), kernel))
    if not launches:
        pytest.skip(f"{kernel} takes none of these")
    return launches


def results(launches: list[Launch]) -> list[tuple[Any, Any]]:
    return [(result.codes.clone(), result.scale.clone()) for result in (launch.result() for launch in launches)]


def same(first: list[tuple[Any, Any]], second: list[tuple[Any, Any]]) -> bool:
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True))


def test_stream_and_graph(kernel: str) -> None:
    launches = some_launches(kernel)
    for launch in launches:
        launch.enqueue()
    expected = results(launches)
    for launch in launches:
        launch.poison()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch.enqueue()
    assert same(results(launches), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch.enqueue()
    for _ in range(3):
        for launch in launches:
            launch.poison()
        graph.replay()
        assert same(results(launches), expected)


def test_work_is_on_the_stream_it_was_given(kernel: str) -> None:
    case = Case(32, 64, rows=64, seed=19)
    if not takes(case, kernel):
        pytest.skip(f"{kernel} does not take this")
    inputs = inputs_of(case)
    expected = run(case, inputs, kernel)
    source = inputs.x.clone()
    inputs.x.zero_()
    launch = Launch(case, inputs, kernel)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        inputs.x.copy_(source)
        launch.enqueue()
    assert torch.equal(launch.result().codes, expected.codes)


def test_two_threads(kernel: str) -> None:
    sets = [some_launches(kernel) for _ in range(2)]
    for launch in sets[0]:
        launch.enqueue()
    expected = results(sets[0])
    errors: list[BaseException] = []

    def work(launches: list[Launch]) -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(50):
                    for launch in launches:
                        launch.enqueue()
                stream.synchronize()
        except BaseException as error:  # noqa: BLE001 - shown by the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(launches,)) for launches in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert same(results(sets[0]), expected)
    assert same(results(sets[1]), expected)


def test_soak(kernel: str) -> None:
    launches = some_launches(kernel)
    for launch in launches:
        launch.enqueue()
    expected = results(launches)
    order = np.random.default_rng(21).integers(len(launches), size=10_000)
    for index in order:
        launches[index].enqueue()
    assert same(results(launches), expected)


SANITIZED = [
    Case(64, 64, rows=3, factors="float16"), Case(16, 24, blocks=2, rows=2, prologue="residual", container="packed"),
    Case(3, 5, blocks=2, rows=2, dtype="bfloat16", container="packed"), Case(33, 128, rows=2, prologue="silu"),
    Case(20, 40, rows=2, dtype="float32"), Case(40, 136, rows=2), Case(1, 1, 1000, rows=2), Case(1, 1, 1001, rows=2, dtype="float32"),
    Case(130, 40, blocks=3, rows=2),
    Case(128, 224, rows=1, factors="float16"),
]  # fmt: skip


@pytest.mark.parametrize("case", SANITIZED, ids=str)
def test_sanitizer_subset(kernel: str, case: Case) -> None:
    """Small, and every path once: what compute-sanitizer is run on."""
    checked(case, kernel)


# ---- dequantize ----


@pytest.mark.parametrize("container", ["int8", "packed", "int32x8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k"), [(1, 8), (3, 40), (5, 4096), (129, 11008), (3, 2), (7, 1), (9, 1001), (6, 514)])
def test_dequantize(rows: int, k: int, dtype: str, container: str) -> None:
    if k % {"int8": 1, "packed": 2, "int32x8": 8}[container]:
        pytest.skip("rows do not fill the container")
    generator = torch.Generator("cuda").manual_seed(k)
    data = torch.randint(0, 256, (rows * k // CODES_PER_BYTE[container],), generator=generator, device="cuda").to(torch.uint8)
    codes = data.view(torch.int8)
    if container != "int8":
        codes = torch.stack([codes << 4 >> 4, codes >> 4], dim=-1)
    scale = torch.rand(rows, generator=generator, device="cuda") * 3
    scale[-1] = float("nan")
    expected = (codes.reshape(rows, k).float() * scale[:, None]).to(DTYPES[dtype])
    # Where vectors can be loaded, and from a byte on where they cannot.
    for shift in (0, 1) if container != "int32x8" else (0,):
        source = torch.zeros(data.numel() + 16, dtype=torch.uint8, device="cuda")[shift : shift + data.numel()]
        source.copy_(data)
        target = Guarded(rows * k * DTYPES[dtype].itemsize)
        params = kernels.DequantizeParams(
            q=source.data_ptr(), scale=scale.data_ptr(), y=target.bytes.data_ptr(), rows=rows, k=k, container=kernels.CONTAINERS[container],
            dtype=kernels.DTYPES[dtype],
        )  # fmt: skip
        kernels.call("fq_dequantize", params, stream=torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        target.check()
        got = target.bytes.view(DTYPES[dtype]).reshape(rows, k)
        assert torch.equal(got[:-1], expected[:-1])
        assert torch.isnan(got[-1]).all()


def test_structures_are_those_of_the_header() -> None:
    assert ctypes.sizeof(kernels.FlatQuantizeParams) == 9 * 8 + 10 * 4  # the last four bytes are padding
