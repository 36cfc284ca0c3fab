"""The benchmarks' pure parts: operands, targets, tables. Their times are measured on a GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import attention, chain, flat_quantize, gemm
from benchmarks.results import Row, WrongResultError, document, label, report, show
from benchmarks.timing import Timer
from fqonnx import kernels
from fqonnx.ops.layout import LAYOUTS, pack_int4, to_layout

ROOT = Path(__file__).parents[1]
LARGE = gemm.Case(2048, 12288, 4096)
DECODE = gemm.Case(16, 12288, 4096)


def codes(rows: int, k: int) -> torch.Tensor:
    return torch.randint(-8, 8, (rows, k), dtype=torch.int8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_stored_as_the_passes_store_them(layout: str) -> None:
    weight = codes(6, 256)
    stored = gemm.pack(gemm.reorder(weight, layout))
    expected = pack_int4(to_layout(weight.numpy(), layout)).reshape(6, 128)
    assert np.array_equal(stored.numpy(), expected)


def test_traffic_and_operations_of_a_product() -> None:
    case = gemm.Case(16, 4096, 4096, 128)
    # Activations and weights, 16 scales of rows, 32 scales a channel, fp16 results.
    assert case.bytes == 16 * 4096 + 4096 * 4096 // 2 + 4 * 16 + 4 * 4096 * 32 + 2 * 16 * 4096
    assert case.operations == 2 * 16 * 4096**2
    assert label(case.sizes) == "16 4096x4096 g128"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (LARGE, 2 * 2048 * 12288 * 4096 / 1400e6),
        (gemm.Case(8192, 4096, 4096), 2 * 8192 * 4096**2 / 1250e6),
        (gemm.Case(2048, 4096, 4096, 128), 2 * 2048 * 4096**2 / 1050e6),
        (DECODE, 10.0),
        (gemm.Case(256, 12288, 4096), 30.0),
        (gemm.Case(1, 12288, 4096), 9.0),  # no slower than 16 rows
        (gemm.Case(64, 12288, 4096), 1.3 * 9.0),
        (gemm.Case(16, 12288, 4096, 128), 1.15 * 9.0),
        (gemm.Case(1, 4096, 4096), None),  # the case of 16 rows was not measured
        (gemm.Case(256, 4096, 4096), None),
    ],
    ids=lambda value: label(value.sizes) if isinstance(value, gemm.Case) else "",
)
def test_targets_of_products(case: gemm.Case, expected: float | None) -> None:
    found, why = gemm.target(case, {DECODE: 9.0, LARGE: 100.0})
    assert found == (expected if expected is None else pytest.approx(expected))
    assert bool(why) == (found is not None)


def test_every_case_of_a_product_is_held_against_a_target() -> None:
    ours = dict.fromkeys(gemm.CASES, 1.0)
    assert [case for case in gemm.CASES if gemm.target(case, ours)[0] is None] == []
    assert len(set(gemm.CASES)) == len(gemm.CASES) == 36


def test_targets_of_flat_quantize() -> None:
    targets = {label(case.sizes): flat_quantize.target(case) for case in flat_quantize.CASES}
    assert targets["2048 64x64"] == 8
    assert targets["8192 64x64"] == 28
    assert targets["2048 128x224"] == 85
    assert {targets[f"{rows} 112x128"] for rows in (1, 16, 64)} == {5}
    assert targets["2048 4096 plain"] is None
    assert targets["2048 86x128 gate"] is None


def test_traffic_of_flat_quantize_is_all_that_must_be_read_and_written() -> None:
    plain, gated, normed = (flat_quantize.Case(8, 4, 8, before) for before in ("", "gate", "norm"))
    assert (plain.bytes, gated.bytes, normed.bytes) == (8 * (3 * 32 + 4), 8 * (5 * 32 + 4), 8 * (7 * 32 + 4))
    assert plain.operations == 2 * 8 * 32 * 12
    assert flat_quantize.Case(8, 1, 1, plain=32).operations == 0


def row(time: float | None, target: float | None) -> Row:
    return Row({"m": 16}, {"ours": time, "peer": 30.0}, "ours", floor=2.0, bytes=8_000, operations=4_000_000, target=target)


def test_a_row_is_met_where_ours_is_fast_enough() -> None:
    assert [row(*pair).met for pair in ((7.0, 7.0), (7.1, 7.0), (7.0, None), (None, 7.0))] == [True, False, None, False]
    assert row(4.0, None).tops == pytest.approx(1.0)
    assert row(4.0, None).bandwidth == pytest.approx(2.0)
    assert row(None, None).tops is None


def test_a_table_shows_times_rates_and_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    show("Title", [row(4.0, 7.0), row(None, 7.0)], ["peer", "ours"], console=Console(width=100))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "Title"
    cells = [line.split() for line in lines if line.lstrip().startswith("16")]
    assert cells == [["16", "30.0", "4.0", "1", "2", "2.0", "7.0", "met"], ["16", "30.0", "–", "2.0", "7.0", "NOT", "met"]]


def test_json_holds_rows_and_what_the_run_was() -> None:
    written = json.loads(document([row(4.0, 7.0)], device="a GPU"))
    assert written["device"] == "a GPU"
    (only,) = written["rows"]
    assert (only["met"], only["tops"], only["microseconds"]) == (True, pytest.approx(1.0), {"ours": 4.0, "peer": 30.0})


def test_wrong_results_are_told_after_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = row(4.0, 7.0), row(None, 7.0)
    report("Title", [good], ["ours"], as_json=False, copy_gb_s=4200)
    assert "a copy's 4.20 TB/s" in capsys.readouterr().out
    bad.wrong = "ours at 16: 3 of 9 results are wrong"
    for as_json in (False, True):
        with pytest.raises(WrongResultError, match="1 wrong results, not timed: ours at 16: 3 of 9"):
            report("Title", [good, bad], ["ours"], as_json=as_json, copy_gb_s=4200)
        assert capsys.readouterr().out


def test_steps_of_attention_are_held_against_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = attention.Case("small", heads=4, kv_heads=2, batch=2, past=5, capacity=8, head=16)
    assert case.bytes == 2 * 2 * 2 * 2 * 6 * 16
    monkeypatch.setattr(attention, "_COLD_BYTES", 1)

    def decode(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        scales = options.get("scales") or (torch.ones(2, 16), torch.ones(2, 16))
        if "scales" not in options:
            key[:, :, 5], value[:, :, 5] = k.reshape(2, 2, 16), v.reshape(2, 2, 16)
        keys, values = (
            (cache[:, :, :6].float() * scale[:, None]).repeat_interleave(2, 1) for cache, scale in zip((key, value), scales, strict=True)
        )
        weights = torch.softmax(torch.einsum("bhd,bhtd->bht", q.reshape(2, 4, 16).float(), keys) / 4, -1)
        return factor * torch.einsum("bht,bhtd->bhd", weights, values).reshape(2, -1).half()

    monkeypatch.setattr(attention, "decode_attention", decode)
    factor = 1.0
    assert attention.Step(case, device="cpu").wrong() == ""
    factor = 1.1
    assert attention.Step(case, device="cpu").wrong().startswith("small, batch 2, fp16: relative error 0.1")


def test_a_chain_runs_what_a_decoder_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with stand-ins that note what they are given: operands fit, and all may begin early, or none."""
    calls: list[tuple[str, tuple[int, ...], bool]] = []

    def quantized(name: str, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, early: bool) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.shape[1] == len(left) * len(right)
        calls.append((name, tuple(x.shape), early))
        return x.to(torch.int8), torch.ones(len(x), 1)

    def norm(x: torch.Tensor, gamma: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **options: Any) -> kernels.NormedQuantized:
        assert gamma.shape == x.shape[1:]
        codes = quantized("norm", x, left, right, early=options["constant_factors"])
        return kernels.NormedQuantized(*codes, sum=x + options["residual"], normed=None)

    def product(q: torch.Tensor, scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, **options: Any) -> torch.Tensor:
        assert (w.shape[1] * 2, len(w)) == (q.shape[1], len(w_scale))
        assert len(scale) == len(q)
        calls.append(("product", (len(w), q.shape[1]), options["constant_weights"]))
        return torch.ones(len(q), len(w), dtype=torch.float16)

    monkeypatch.setattr(chain, "rms_norm_flat_quantize", norm)
    monkeypatch.setattr(chain, "flat_quantize", lambda x, a, b, constant_factors: quantized("plain", x, a, b, early=constant_factors))
    monkeypatch.setattr(
        chain, "silu_mul_flat_quantize", lambda x, up, a, b, constant_factors: quantized("gate", x * up, a, b, early=constant_factors)
    )
    monkeypatch.setattr(chain, "w4a4_gemm", product)
    shape = chain.Shape(hidden=256, intermediate=384, layers=2)
    layers = chain.Chain(3, shape, device="cpu")
    for early in (False, True):
        calls.clear()
        assert layers.run(early=early).shape == (3, 256)
        assert [(name, sizes) for name, sizes, _ in calls] == 2 * [
            ("norm", (3, 256)),
            ("product", (768, 256)),
            ("plain", (3, 256)),
            ("product", (256, 256)),
            ("norm", (3, 256)),
            ("product", (768, 256)),
            ("gate", (3, 384)),
            ("product", (256, 384)),
        ]
        assert {flag for *_, flag in calls} == {early}
    assert shape.bytes == sum(w.nbytes for layer in layers.layers for w in layer.values())


def test_wrong_results_are_no_times() -> None:
    expected = torch.tensor([[1.0, 2.0]], dtype=torch.float16)
    gemm.require_close(expected.clone(), expected, "kernel", exact=True)
    with pytest.raises(WrongResultError, match="kernel at 16: 1 of 2 results are wrong"):
        gemm.require_close(torch.nextafter(expected.float(), torch.tensor([[9.0, 2.0]])), expected.float(), "kernel at 16", exact=True)
    gemm.require_close(expected * (1 + 2**-10), expected, "kernel", exact=False)
    with pytest.raises(WrongResultError, match="2 of 2"):
        gemm.require_close(expected * 1.01, expected, "kernel", exact=False)


def test_wrong_codes_are_no_times() -> None:
    t = torch.linspace(-1, 1, 400).reshape(1, 400)
    scale = t.abs().amax(dim=1, keepdim=True) * flat_quantize.CLIP / flat_quantize.QMAX
    codes = torch.clamp(torch.round(t / scale), -8, 7).to(torch.int8)
    flat_quantize.require_close(codes, scale, t, scale, "kernel")
    moved = codes.clone()
    moved[0, 200] += 1
    flat_quantize.require_close(moved, scale, t, scale, "kernel")
    moved[0, 200] += 1
    with pytest.raises(WrongResultError, match="codes differ, by up to 2"):
        flat_quantize.require_close(moved, scale, t, scale, "kernel")
    with pytest.raises(WrongResultError, match="scales differ"):
        flat_quantize.require_close(codes, scale * 1.01, t, scale, "kernel")


@pytest.mark.parametrize("module", ["benchmarks.gemm", "benchmarks.flat_quantize", "benchmarks.chain", "benchmarks.attention"])
def test_without_a_gpu_one_line_says_so(module: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: PyTorch finds no CUDA device here: run the benchmark on a machine with one\n"


@pytest.mark.gpu
def test_a_timer_measures_what_a_copy_takes() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    timer = Timer(0.02)
    small, large = (torch.randn(size, device="cuda") for size in (1 << 20, 1 << 26))
    times = [timer(lambda x=x: x + 1) for x in (small, large)]
    assert 0 < times[0] < times[1]
    # 512 MB of traffic in no less than any GPU needs for it, and no more than a slow one.
    assert 0.2e12 < 2 * 4 * (1 << 26) / (times[1] * 1e-6) < 20e12
    assert math.isclose(timer.copy_bandwidth(), 2 * 4 * (1 << 26) / (times[1] * 1e-6), rel_tol=0.5)
