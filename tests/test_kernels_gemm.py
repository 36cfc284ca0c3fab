"""``fq_w4a4_gemm`` on a GPU: every kernel of the table that runs there and each of its tactics, against exact sums.

``pytest -m gpu -k sanitizer_subset`` is the part that is small enough for compute-sanitizer.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from fqonnx import kernels
from fqonnx.errors import EngineError, UsageError
from fqonnx.ops.kernels import KERNELS, Kernel
from fqonnx.ops.layout import LAYOUTS, to_layout
from fqonnx.ops.reference import pack_rows, w4a4_gemm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CAPABILITY = (
    sum(digit * part for digit, part in zip((10, 1), torch.cuda.get_device_capability(), strict=True)) if torch.cuda.is_available() else 90
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}
NUMBERS = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}

GUARD = 4096
POISON = 0xA5
MAX_K = 131_071


@dataclass(frozen=True)
class Form:
    """A kernel with operands it takes."""

    kernel: Kernel
    container: str
    layout: str

    @property
    def k_multiple(self) -> int:
        return int(np.lcm(self.kernel.k_multiple, LAYOUTS[self.layout].block))

    @property
    def widths(self) -> tuple[int, ...]:
        """Of activation codes, in bits."""
        return (4, 8) if self.container == "int8" else (4,)

    def group_sizes(self) -> tuple[int, ...]:
        if -1 in self.kernel.group_sizes:
            return (32, 64, 96, 128, 160, 256, 384)
        return tuple(size for size in self.kernel.group_sizes if size)

    def round_k(self, k: int) -> int:
        return -(-k // self.k_multiple) * self.k_multiple

    def __str__(self) -> str:
        return f"{self.kernel.name}-{self.container}-{self.layout}"


FORMS = [
    Form(kernel, container, layout)
    for kernel in KERNELS
    if kernel.op == "W4A4Gemm" and kernel.runs[0] <= CAPABILITY <= kernel.runs[1]
    for container in ((kernel.container,) if kernel.container else ("int8", "packed"))
    for layout in ((kernel.layout,) if kernel.layout else LAYOUTS)
]

each_form = pytest.mark.parametrize("form", FORMS, ids=str)


@dataclass(frozen=True)
class Problem:
    """Operands on the GPU, codes unpacked and in the order of K: q int8 [m, k], w int8 [n, k]."""

    q: torch.Tensor
    scale: torch.Tensor
    w: torch.Tensor
    w_scale: torch.Tensor
    bias: torch.Tensor | None


def chooser(seed: str) -> random.Random:
    return random.Random(seed)  # noqa: S311 - the same choices in every run


def make(m: int, n: int, k: int, *, bits: int = 4, groups: int = 1, bias: bool = True, seed: int = 0) -> Problem:
    generator = torch.Generator("cuda").manual_seed(seed)
    half = 2 ** (bits - 1)
    uniform = {"device": "cuda", "generator": generator}
    return Problem(
        q=torch.randint(-half, half, (m, k), dtype=torch.int8, **uniform),
        scale=torch.rand(m, **uniform) * 0.1 + 1e-3,
        w=torch.randint(-8, 8, (n, k), dtype=torch.int8, **uniform),
        w_scale=torch.rand(n, groups, **uniform) * 0.1 + 1e-3,
        bias=torch.randn(n, **uniform) if bias else None,
    )


def expected(problem: Problem, dtype: torch.dtype) -> torch.Tensor:
    """The reference's bits where there is one scale a channel: fp64 holds the sums exactly."""
    y = (problem.q.double() @ problem.w.double().T).float() * problem.w_scale[:, 0] * problem.scale[:, None]
    return (y + (0 if problem.bias is None else problem.bias)).to(dtype)


def expected_of_groups(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in fp64, and the sum of its terms' magnitudes."""
    n, k = problem.w.shape
    weights = (problem.w.double().reshape(n, problem.w_scale.shape[1], -1) * problem.w_scale.double()[:, :, None]).reshape(n, k)
    scale = problem.scale.double()[:, None]
    bias = torch.zeros(n, device="cuda", dtype=torch.double) if problem.bias is None else problem.bias.double()
    return problem.q.double() @ weights.T * scale + bias, problem.q.double().abs() @ weights.abs().T * scale + bias.abs()


def packed(codes: torch.Tensor) -> torch.Tensor:
    nibbles = codes.view(torch.uint8) & 15
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous()


def stored(w: torch.Tensor, layout: str) -> torch.Tensor:
    return packed(torch.from_numpy(to_layout(w.cpu().numpy(), layout)).to(w.device))


class Output:
    """Memory for y between guards; all of it is poisoned."""

    def __init__(self, m: int, n: int, dtype: torch.dtype) -> None:
        size = m * n * dtype.itemsize
        self.memory = torch.full((size + 2 * GUARD,), POISON, dtype=torch.uint8, device="cuda")
        self.y = self.memory[GUARD : GUARD + size].view(dtype).view(m, n)

    def check_guards(self) -> None:
        assert bool((self.memory[:GUARD] == POISON).all())
        assert bool((self.memory[-GUARD:] == POISON).all())


@dataclass(frozen=True)
class Call:
    """Operands as a kernel takes them. Holds the tensors, so that they live as long as it does."""

    form: Form
    problem: Problem
    q: torch.Tensor
    w: torch.Tensor
    out: Output

    @property
    def params(self) -> kernels.W4A4GemmParams:
        (m, k), n, bias = self.problem.q.shape, len(self.problem.w), self.problem.bias
        return kernels.W4A4GemmParams(
            q=self.q.data_ptr(),
            scale=self.problem.scale.data_ptr(),
            w=self.w.data_ptr(),
            w_scale=self.problem.w_scale.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            y=self.out.y.data_ptr(),
            m=m,
            n=n,
            k=k,
            groups=self.problem.w_scale.shape[1],
            dtype=NUMBERS[self.out.y.dtype],
            container=kernels.CONTAINERS[self.form.container],
            layout=kernels.LAYOUTS[self.form.layout],
            variant=kernels.variant_of("W4A4Gemm", self.form.kernel.name),
        )

    def tactics(self) -> range:
        """0, the choice from the shape, and all tiles."""
        count = kernels.library().fq_w4a4_gemm_tactics(self.params)
        assert count > 0, kernels.library().fq_last_error().decode()
        return range(count + 1)

    def launch(self, tactic: int = 0, stream: torch.cuda.Stream | None = None) -> torch.Tensor:
        params = self.params
        params.tactic = tactic
        kernels.call("fq_w4a4_gemm", params, stream=(stream or torch.cuda.current_stream()).cuda_stream)
        return self.out.y


def prepare(form: Form, problem: Problem, dtype: torch.dtype) -> Call:
    q = problem.q if form.container == "int8" else packed(problem.q)
    return Call(form, problem, q, stored(problem.w, form.layout), Output(len(q), len(problem.w), dtype))


def same_bits(actual: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8))


def check_exact(call: Call, tactic: int, wanted: torch.Tensor) -> None:
    call.out.memory.fill_(POISON)
    y = call.launch(tactic)
    shape = f"{call.form} tactic {tactic}: {tuple(call.problem.q.shape)} x {len(call.problem.w)}"
    assert same_bits(y, wanted), f"{shape}: {int((y != wanted).sum())} of {y.numel()} differ"
    call.out.check_guards()


# --- results ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_these_expectations_are_the_references(dtype: torch.dtype) -> None:
    problem = make(7, 48, 160, bits=8)
    arrays = [t.cpu().numpy() for t in (problem.q, problem.scale[:, None], problem.w, problem.w_scale, problem.bias)]
    wanted = w4a4_gemm(*arrays, dtype=NUMPY[dtype])
    assert np.array_equal(expected(problem, dtype).view(torch.uint8).cpu().numpy(), wanted.view(np.uint8))
    grouped = make(7, 48, 160, groups=5)
    arrays = [t.cpu().numpy() for t in (grouped.q, grouped.scale[:, None], grouped.w, grouped.w_scale, grouped.bias)]
    result, terms = (t.cpu().numpy() for t in expected_of_groups(grouped))
    assert (np.abs(result - w4a4_gemm(*arrays)) <= 1e-6 * terms).all()


@each_form
@pytest.mark.parametrize("m", [1, 3, 17, 63, 65, 127, 129, 2049])
def test_sums_are_exact_for_any_shape(form: Form, m: int) -> None:
    """N and K fit no tile, or just fit, or are the smallest there are."""
    choose = chooser(f"{form} {m}")
    for n, k in ((16, 16), (48, 80), (144, 112), (272, 1040), (528, 1152), (336, 3968), (1040, 512), (4096, 1024), (8192, 128)):
        dtype, bits = choose.choice(DTYPES), choose.choice(form.widths)
        problem = make(m, n, form.round_k(k), bits=bits, bias=choose.random() < 0.7, seed=choose.randrange(1000))
        call, wanted = prepare(form, problem, dtype), expected(problem, dtype)
        for tactic in call.tactics():
            check_exact(call, tactic, wanted)


@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(form: Form, dtype: torch.dtype) -> None:
    choose = chooser(f"{form} {dtype}")
    for _ in range(40):
        m, n = choose.randint(1, 700), 16 * choose.randint(1, 90)
        k = form.k_multiple * choose.randint(1, 4096 // form.k_multiple)
        problem = make(m, n, k, bits=choose.choice(form.widths), bias=choose.random() < 0.5, seed=choose.randrange(1000))
        call = prepare(form, problem, dtype)
        check_exact(call, choose.choice(call.tactics()), expected(problem, dtype))


@each_form
def test_extreme_codes_do_not_overflow(form: Form) -> None:
    k = MAX_K // form.k_multiple * form.k_multiple
    for bits in form.widths:
        half = 2 ** (bits - 1)
        signs = make(5, 64, k, bits=bits)
        q = torch.where(signs.q < 0, -half, half - 1).to(torch.int8)
        w = torch.where(signs.w < 0, -8, 7).to(torch.int8)
        q[0], q[1], w[0], w[1] = -half, half - 1, -8, 7
        problem = Problem(q, torch.ones(5, device="cuda"), w, torch.ones(64, 1, device="cuda"), None)
        sums = q.cpu().long() @ w.cpu().long().T
        assert int(sums[0, 0]) == 8 * half * k
        call = prepare(form, problem, torch.float32)
        for tactic in call.tactics():
            check_exact(call, tactic, sums.float().cuda())


@each_form
@pytest.mark.parametrize("m", [1, 16, 40, 129, 515])
def test_scales_per_group(form: Form, m: int) -> None:
    sizes = form.group_sizes()
    if not sizes:
        pytest.skip("one scale a channel only")
    choose = chooser(f"{form} {m}")
    for size, groups in product(sizes, (2, 4, 13, 28)):
        if size * groups % form.k_multiple:
            continue
        dtype = choose.choice(DTYPES)
        problem = make(
            m, 16 * choose.randint(1, 30), size * groups, bits=choose.choice(form.widths), groups=groups, bias=choose.random() < 0.5
        )
        call = prepare(form, problem, dtype)
        wanted, terms = expected_of_groups(problem)
        info = torch.finfo(dtype)
        rounding = 0 if dtype == torch.float32 else info.eps * (wanted.abs() + info.smallest_normal)
        for tactic in call.tactics():
            call.out.memory.fill_(POISON)
            error = (call.launch(tactic).double() - wanted).abs() - rounding
            worst = float((error / terms).max())
            assert worst <= 1e-6, f"{form} tactic {tactic}: {m} x {len(problem.w)} in {groups} groups of {size}: {worst:.2e}"
            call.out.check_guards()


@each_form
def test_a_nan_scale_makes_its_row_nan_and_no_other(form: Form) -> None:
    problem = make(20, 64, form.round_k(256))
    problem.scale[7] = torch.nan
    call = prepare(form, problem, torch.float16)
    for tactic in call.tactics():
        finite = ~call.launch(tactic).isnan()
        assert not finite[7].any()
        assert int(finite.sum()) == 19 * 64


@each_form
@pytest.mark.parametrize(("m", "n", "k"), [(70_001, 32_768, 128), (65_537, 16, 65_536)], ids=["y", "q"])
def test_offsets_beyond_32_bits(form: Form, m: int, n: int, k: int) -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("takes 24 GiB of memory")
    problem = make(m, n, k)
    call = prepare(form, problem, torch.float16)
    y = call.launch()
    for first in range(0, m, 2048):
        rows = slice(first, first + 2048)
        part = replace(problem, q=problem.q[rows], scale=problem.scale[rows])
        assert same_bits(y[rows], expected(part, torch.float16)), f"from row {first}"
    call.out.check_guards()


# --- errors -----------------------------------------------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("pointer", ["q", "w", "y"])
def test_a_misaligned_pointer_is_an_error_and_nothing_is_written(form: Form, pointer: str) -> None:
    call = prepare(form, make(16, 64, form.round_k(256)), torch.float16)
    params = call.params
    setattr(params, pointer, getattr(params, pointer) + 8)
    with pytest.raises(UsageError, match=pointer):
        kernels.call("fq_w4a4_gemm", params, stream=torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    assert bool((call.out.memory == POISON).all())


@each_form
def test_a_tactic_too_many_is_an_error(form: Form) -> None:
    call = prepare(form, make(16, 64, form.round_k(256)), torch.float16)
    with pytest.raises(UsageError, match="tactic"):
        call.launch(len(call.tactics()))


@each_form
def test_a_kernel_refuses_what_it_does_not_take(form: Form) -> None:
    call = prepare(form, make(16, 64, 512), torch.float16)
    params = call.params
    params.container = kernels.CONTAINERS["packed" if form.container == "int8" else "int8"]
    with pytest.raises(EngineError, match=form.kernel.name):
        kernels.call("fq_w4a4_gemm", params)


def test_no_rows_are_no_work() -> None:
    problem = make(1, 64, 256)
    params = prepare(FORMS[-1], problem, torch.float16).params
    params.m, params.q, params.y = 0, None, None
    kernels.call("fq_w4a4_gemm", params)


# --- streams, graphs, threads -----------------------------------------------------------------------------------------------------------


@each_form
def test_work_is_on_the_stream_it_is_given(form: Form) -> None:
    """The operands are written late on that very stream, so that a launch anywhere else would read the old ones."""
    before, after = (make(33, 272, form.round_k(512), seed=seed) for seed in (1, 2))
    late = prepare(form, after, torch.float32)
    for tactic in prepare(form, before, torch.float32).tactics():
        call = prepare(form, before, torch.float32)
        call.launch(tactic)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            for to, source in ((call.q, late.q), (call.w, late.w)):
                to.copy_(source)
            for name in ("scale", "w_scale", "bias"):
                getattr(before, name).copy_(getattr(after, name))
        call.launch(tactic, stream)
        stream.synchronize()
        assert same_bits(call.out.y, expected(after, torch.float32))


@each_form
def test_a_captured_graph_replays(form: Form) -> None:
    calls = [prepare(form, make(m, 272, form.round_k(640), seed=m), torch.float16) for m in (1, 16, 200)]
    launches = [(call, tactic) for call in calls for tactic in call.tactics()]
    for call, tactic in launches:
        call.launch(tactic)  # loads the code
    for call, tactic in launches:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call.launch(tactic)
        for seed in (5, 6):
            new = make(*call.problem.q.shape[:1], 272, call.problem.q.shape[1], seed=seed)
            call.q.copy_(new.q if form.container == "int8" else packed(new.q))
            call.out.memory.fill_(POISON)
            graph.replay()
            assert same_bits(call.out.y, expected(replace(call.problem, q=new.q), torch.float16))
            call.out.check_guards()


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("quantizer", ["mma_f16", "wgmma_f16"])
@pytest.mark.parametrize("m", [1, 16, 40, 64, 200])
def test_kernels_that_begin_early_wait(m: int, quantizer: str, captured: bool) -> None:
    """The products and quantizers of a decoder's second halves: each may begin while the one before it makes what it reads."""
    kernel = next(kernel for kernel in KERNELS if kernel.name == quantizer)
    if not kernel.runs[0] <= CAPABILITY <= kernel.runs[1]:
        pytest.skip("another GPU's kernel")
    width, inner, layers = 2048, 4096, 4
    generator = torch.Generator("cuda").manual_seed(m)

    def matrix(size: int) -> torch.Tensor:
        return (torch.randn(size, size, device="cuda", generator=generator) / size**0.5).half()

    def weights(n: int, k: int) -> torch.Tensor:
        return torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda", generator=generator)

    right, left, inner_left = matrix(128), matrix(width // 128), matrix(inner // 128)
    gamma = torch.ones(width, device="cuda", dtype=torch.float16)
    gate_up, down = ([weights(*size) for _ in range(layers)] for size in ((2 * inner, width), (width, inner)))
    scales = {n: torch.rand(n, device="cuda", generator=generator) * 1e-3 + 1e-4 for n in (2 * inner, width)}
    residual, x = (torch.empty(m, width, dtype=torch.float16, device="cuda") for _ in range(2))

    def decoder(*, early: bool) -> torch.Tensor:
        options: dict[str, Any] = {"kernel": quantizer, "constant_factors": early}
        y, total = x, residual
        for layer in range(layers):
            out = kernels.rms_norm_flat_quantize(y, gamma, left, right, epsilon=1e-5, residual=total, **options)
            assert out.sum is not None
            total = out.sum
            both = kernels.w4a4_gemm(out.q, out.scale, gate_up[layer], scales[2 * inner], layout="k128", constant_weights=early)
            q, scale = kernels.silu_mul_flat_quantize(*both.split(inner, dim=1), inner_left, right, **options)
            y = kernels.w4a4_gemm(q, scale, down[layer], scales[width], layout="k128", constant_weights=early)
        return y + total

    run = partial(decoder, early=True)
    if captured:
        for tensor in (x, residual):
            tensor.normal_(generator=generator)
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()

        def run() -> torch.Tensor:
            graph.replay()
            return y

    for _ in range(50):
        for tensor in (x, residual):
            tensor.normal_(generator=generator)
        wanted = decoder(early=False).clone()
        assert wanted.isfinite().all()
        assert same_bits(run(), wanted)


@each_form
def test_two_threads_with_two_streams(form: Form) -> None:
    def work(seed: int) -> None:
        stream = torch.cuda.Stream()
        calls = [prepare(form, make(m + seed, 16 * (17 + seed), form.round_k(768), seed=seed), torch.float16) for m in (1, 30, 150)]
        wanted = [expected(call.problem, torch.float16) for call in calls]
        torch.cuda.synchronize()
        for turn in range(300):
            index = turn % len(calls)
            call = calls[index]
            with torch.cuda.stream(stream):
                call.out.memory.fill_(POISON)
                call.launch(turn % len(call.tactics()), stream)
                stream.synchronize()
                assert same_bits(call.out.y, wanted[index]), f"turn {turn}"

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work, seed) for seed in (0, 1)]:
            future.result()


def test_ten_thousand_launches() -> None:
    """Shapes, kernels and tactics change from launch to launch; no result is wrong and no memory is taken."""
    choose = chooser("soak")
    cases = []
    for form in FORMS:
        for _ in range(16):
            m, n, k = choose.choice((1, 8, 16, 33, 64, 130, 300)), 16 * choose.randint(1, 64), form.round_k(choose.randint(16, 2048))
            problem = make(m, n, k, seed=choose.randrange(1000))
            call = prepare(form, problem, torch.float16)
            for tactic in call.tactics():
                call.launch(tactic)
            cases.append((call, len(call.tactics()), expected(problem, torch.float16).view(torch.int16)))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    for _ in range(10_000):
        call, tactics, wanted = choose.choice(cases)
        wrong += (call.launch(choose.randrange(tactics)).view(torch.int16) != wanted).any()
    assert int(wrong) == 0
    assert torch.cuda.mem_get_info()[0] >= free - (64 << 20)


# --- compute-sanitizer ------------------------------------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("scales", ["channel", "channel, K no multiple of 32", "smallest group", "largest group"])
def test_sanitizer_subset(form: Form, scales: str) -> None:
    """Each tactic once, with tails everywhere, against the reference itself."""
    groups = 2 if "group" in scales else 1
    if groups > 1 and not form.group_sizes():
        pytest.skip("one scale a channel only")
    if groups == 1:
        k = form.round_k(416 if scales == "channel" else 400)
    else:
        size = min(form.group_sizes()) if "smallest" in scales else max(form.group_sizes())
        k = int(np.lcm(2 * size, form.k_multiple))
        groups = k // size
    problem = make(19, 80, k, groups=groups)
    arrays = [t.cpu().numpy() for t in (problem.q, problem.scale[:, None], problem.w, problem.w_scale, problem.bias)]
    q, scale, w, w_scale, bias = arrays
    if form.container == "packed":
        q = pack_rows(q)
    wanted = w4a4_gemm(q, scale, to_layout(w, form.layout), w_scale, bias, packed=form.container == "packed", layout=form.layout)
    call = prepare(form, problem, torch.float32)
    for tactic in call.tactics():
        y = call.launch(tactic).cpu().numpy()
        if groups == 1:
            assert np.array_equal(y, wanted)
        else:
            np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-3)
        call.out.check_guards()
