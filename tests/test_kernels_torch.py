"""The kernels on torch tensors: each function of ``fqonnx.kernels`` against the reference, and what the table refuses. Needs a GPU."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

from fqonnx import kernels
from fqonnx.errors import EngineError, UsageError
from fqonnx.ops import reference
from fqonnx.ops.kernels import KERNELS, kernel_for
from fqonnx.ops.layout import pack_int4, to_layout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def rows(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to("cuda", dtype)


def factors(n1: int, n2: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """An orthogonal pair, so that values keep their size."""
    generator = torch.Generator().manual_seed(n1 * 1000 + n2)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q.to("cuda", dtype).contiguous() for n in (n1, n2))
    return left, right


def array(tensor: torch.Tensor) -> np.ndarray:
    host = tensor.detach().cpu()
    return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if host.dtype == torch.bfloat16 else host.numpy()


def unpacked(q: torch.Tensor) -> np.ndarray:
    codes = array(q.view(torch.int8) if q.dtype != torch.int8 else q)
    return codes if q.dtype == torch.int8 else reference.unpack_rows(codes)


def close_codes(got: kernels.Quantized, wanted: tuple[np.ndarray, np.ndarray]) -> None:
    """Scales equal to the rounding of the transform's operands; codes at most one step away, and that rarely."""
    codes, scale = wanted
    np.testing.assert_allclose(array(got.scale), scale, rtol=4e-3)
    difference = np.abs(unpacked(got.q).astype(int) - codes.astype(int))
    assert difference.max() <= 1
    assert difference.mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("container", kernels.CONTAINERS)
def test_flat_quantize(dtype: torch.dtype, container: str) -> None:
    x, (left, right) = rows(3, 5, 256, dtype=dtype), factors(8, 32, dtype)
    got = kernels.flat_quantize(x, left, right, clip=0.9, container=container)
    assert got.scale.shape == (3, 5, 1)
    assert got.q.shape == (3, 5, {"int8": 256, "packed": 128, "int32x8": 32}[container])
    wanted = reference.flat_quantize(array(x), array(left.float()), array(right.float()), 0.9)
    close_codes(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantize(dtype: torch.dtype, bits: int) -> None:
    """Without a transform there is nothing to be rounded differently."""
    x = rows(7, 320, dtype=dtype)
    one = np.ones((1, 1), np.float32)
    codes, scale = reference.flat_quantize(array(x), one, one, 0.75, bits=bits)
    got = kernels.quantize(x, clip=0.75, bits=bits)
    np.testing.assert_array_equal(array(got.q), codes)
    np.testing.assert_array_equal(array(got.scale), scale)


def test_a_clip_on_the_device() -> None:
    x = rows(4, 128)
    held, given = kernels.quantize(x, clip=torch.tensor(0.5, device="cuda")), kernels.quantize(x, clip=0.5)
    assert torch.equal(held.q, given.q)
    assert torch.equal(held.scale, given.scale)


def test_rows_with_a_stride() -> None:
    wide = rows(2, 6, 512)
    half, (left, right) = wide[..., 256:], factors(16, 16, torch.float16)
    strided, whole = kernels.flat_quantize(half, left, right), kernels.flat_quantize(half.contiguous(), left, right)
    assert torch.equal(strided.q, whole.q)
    assert torch.equal(strided.scale, whole.scale)


@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_flat_quantize(residual: bool) -> None:
    x, gamma, (left, right) = rows(6, 512), rows(512, seed=1), factors(4, 128, torch.float16)
    added = rows(6, 512, seed=2) if residual else None
    got = kernels.rms_norm_flat_quantize(x, gamma, left, right, epsilon=1e-5, residual=added, want_normed=True)
    total = x + added if added is not None else x
    if residual:
        assert got.sum is not None
        assert torch.equal(got.sum, total)
    else:
        assert got.sum is None
    assert got.normed is not None
    wide = total.float()
    torch.testing.assert_close(
        got.normed, (gamma.float() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).half(), rtol=2e-3, atol=1e-5
    )
    close_codes(
        kernels.Quantized(got.q, got.scale), reference.flat_quantize(array(got.normed), array(left.float()), array(right.float()), 1.0)
    )
    assert kernels.rms_norm_flat_quantize(x, gamma, left, right, epsilon=1e-5).normed is None


def test_silu_mul_flat_quantize() -> None:
    merged, (left, right) = rows(6, 1024), factors(4, 128, torch.float16)
    gate, up = merged.chunk(2, dim=-1)
    got = kernels.silu_mul_flat_quantize(gate, up, left, right)
    product = (torch.nn.functional.silu(gate.float()) * up.float()).half()
    close_codes(got, reference.flat_quantize(array(product), array(left.float()), array(right.float()), 1.0))


@pytest.mark.parametrize("container", kernels.CONTAINERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(container: str, dtype: torch.dtype) -> None:
    q, scale = kernels.quantize(rows(3, 2, 264), container=container)
    y = kernels.dequantize(q, scale, dtype=dtype)
    assert y.shape == (3, 2, 264)
    wanted = torch.from_numpy(unpacked(q).astype(np.float32)).cuda() * scale
    assert torch.equal(y, wanted.to(dtype))


@pytest.mark.parametrize("pack_int32", [False, True])
def test_the_names_of_flatquant(pack_int32: bool) -> None:
    x = rows(9, 384)
    n1, n2 = kernels.get_decompose_dim(384)
    left, right = factors(n1, n2, torch.float16)
    q, scale = kernels.flatquant_dynamic_quantize(x, left, right, 0.95, pack_int32)
    assert (q.dtype, q.shape, scale.shape) == ((torch.int32, (9, 48), (9,)) if pack_int32 else (torch.int8, (9, 384), (9,)))
    close_codes(kernels.Quantized(q, scale[:, None]), reference.flat_quantize(array(x), array(left.float()), array(right.float()), 0.95))
    back = kernels.dequantize_int4(q, scale)
    assert back.dtype == torch.float32
    transformed = (left.float().T @ x.float().reshape(9, n1, n2) @ right.float()).reshape(9, 384)
    assert (back - transformed).abs().max() <= scale.max()


def gemm_operands(m: int, n: int, k: int, groups: int = 1) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(m + n + k)
    q, w = rng.integers(-8, 8, (m, k), np.int8), rng.integers(-8, 8, (n, k), np.int8)
    scale, w_scale = rng.uniform(0.01, 0.1, (m, 1)).astype(np.float32), rng.uniform(0.01, 0.1, (n, groups)).astype(np.float32)
    return q, scale, w, w_scale, rng.normal(size=n).astype(np.float32)


def on_gpu(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)).cuda() for array in arrays]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["plain", "k128"])
def test_w4a4_gemm(dtype: torch.dtype, layout: str) -> None:
    q, scale, w, w_scale, bias = gemm_operands(5, 48, 256)
    packed = pack_int4(to_layout(w, layout)).reshape(48, 128)
    tensors = on_gpu(q.reshape(5, 1, 256), scale, packed, w_scale, bias)
    y = kernels.w4a4_gemm(*tensors, dtype=dtype, layout=layout)
    assert y.shape == (5, 1, 48)
    number = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16, torch.float32: np.float32}[dtype]
    wanted = reference.w4a4_gemm(q, scale, w, w_scale, bias, dtype=number)
    np.testing.assert_array_equal(array(y.reshape(5, 48)), wanted)
    for tactic in range(1, 1 + kernels.gemm_tactics(*tensors, dtype=dtype, layout=layout)):
        assert torch.equal(kernels.w4a4_gemm(*tensors, dtype=dtype, layout=layout, tactic=tactic), y), tactic


def test_w4a4_gemm_on_packed_codes() -> None:
    """Where the table has no kernel for them, one is named: the emulated one."""
    q, scale, w, w_scale, bias = gemm_operands(7, 32, 192)
    tensors = on_gpu(reference.pack_rows(q).view(np.uint8), scale, pack_int4(w).reshape(32, 96), w_scale[:, 0], bias)
    y = kernels.w4a4_gemm(*tensors, kernel="mma_s4", dtype=torch.float32)
    np.testing.assert_array_equal(array(y), reference.w4a4_gemm(q, scale, w, w_scale, bias))
    assert torch.equal(kernels.w4a4_gemm(tensors[0].view(torch.int32), *tensors[1:], kernel="mma_s4", dtype=torch.float32), y)


def test_the_kernel_that_python_names_is_the_one_that_runs() -> None:
    """Both read one table: what ``kernel_for`` says can be named, and gives the same."""
    q, scale, w, w_scale, bias = gemm_operands(40, 64, 384)
    for layout in ("plain", "k128"):
        kernel = kernel_for("W4A4Gemm", capability=capability(), container="int8", layout=layout, k=384, n=64, group_size=0)
        tensors = on_gpu(q, scale, pack_int4(to_layout(w, layout)).reshape(64, 192), w_scale, bias)
        chosen, named = kernels.w4a4_gemm(*tensors, layout=layout), kernels.w4a4_gemm(*tensors, layout=layout, kernel=kernel.name)
        assert torch.equal(chosen, named)


def test_what_no_kernel_takes_says_why_for_each() -> None:
    q, scale, w, w_scale, bias = gemm_operands(4, 32, 288, groups=6)
    tensors = on_gpu(q, scale, pack_int4(w).reshape(32, 144), w_scale, bias)
    with pytest.raises(EngineError) as caught:
        kernels.w4a4_gemm(*tensors)
    message = str(caught.value)
    for kernel in KERNELS:
        if kernel.op == "W4A4Gemm":
            assert f"kernel {kernel.name}: " in message
    assert 'wants weight groups of "0 -1" columns' in message
    with pytest.raises(EngineError, match='kernel mma_s8: wants weight groups of "0 -1" columns') as caught:
        kernels.w4a4_gemm(*tensors, kernel="mma_s8")
    assert "mma_s4" not in str(caught.value)
    with pytest.raises(EngineError, match="kernel mma_s8: wants weight groups"):
        kernels.gemm_tactics(*tensors, kernel="mma_s8")


def test_a_tactic_that_is_not_there() -> None:
    q, scale, w, w_scale, bias = gemm_operands(4, 32, 256)
    tensors = on_gpu(q, scale, pack_int4(w).reshape(32, 128), w_scale, bias)
    count = kernels.gemm_tactics(*tensors)
    with pytest.raises(UsageError, match=f"tactic is {count + 1}, and kernel mma_s8 has 1 to {count}"):
        kernels.w4a4_gemm(*tensors, tactic=count + 1)


def test_empty_tensors() -> None:
    q, scale = kernels.quantize(rows(0, 64))
    assert (q.shape, scale.shape) == ((0, 64), (0, 1))
    assert kernels.dequantize(q, scale).shape == (0, 64)
    w = torch.zeros(16, 32, dtype=torch.uint8, device="cuda")
    assert kernels.w4a4_gemm(q, scale, w, torch.ones(16, device="cuda")).shape == (0, 16)


def test_torchs_current_stream_is_used() -> None:
    """Work is ordered after what the stream holds: a long wait, then the input's values."""
    x, stream = rows(64, 4096), torch.cuda.Stream()
    wanted = kernels.quantize(x)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        got = kernels.quantize(late)
    stream.synchronize()
    assert torch.equal(got.q, wanted.q)


def test_capture_and_replay() -> None:
    q, scale, w, w_scale, bias = gemm_operands(3, 32, 256)
    x, tensors = rows(3, 256), on_gpu(q, scale, pack_int4(w).reshape(32, 128), w_scale, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = kernels.quantize(x)
        y = kernels.w4a4_gemm(codes.q, codes.scale, *tensors[2:])
    x.copy_(rows(3, 256, seed=9))
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    expected = kernels.quantize(x)
    assert torch.equal(y, kernels.w4a4_gemm(expected.q, expected.scale, *tensors[2:]))


def test_the_first_call_of_a_process_may_be_captured() -> None:
    """It asks for the device's properties."""
    code = (
        "import torch\n"
        "from fqonnx import kernels\n"
        "x, graph = torch.randn(4, 256, device='cuda').half(), torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph):\n"
        "    q, scale = kernels.quantize(x)\n"
        "graph.replay()\n"
        "assert torch.equal(q, kernels.quantize(x).q)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_device_than_the_current_one() -> None:
    x = rows(4, 256)
    first, second = kernels.quantize(x), kernels.quantize(x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert second.q.device == torch.device("cuda:1")
    assert torch.equal(second.q.cpu(), first.q.cpu())
    with pytest.raises(UsageError, match="scale is on cuda:0 and other operands are on cuda:1"):
        kernels.dequantize(second.q, first.scale)


def test_a_failed_call_leaves_cuda_as_it_was() -> None:
    params = kernels.FlatQuantizeParams(bits=5)
    assert kernels.library().fq_flat_quantize(ctypes.byref(params), None) == kernels.INVALID_ARGUMENT
    assert torch.ones(3, device="cuda").sum().item() == 3
