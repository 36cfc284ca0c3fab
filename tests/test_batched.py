"""Linear equations in batches, on several threads and on a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fqonnx.calib import batched

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])]

PROGRAM = """
import torch
from fqonnx.calib import batched
torch.manual_seed(0)
torch.set_num_threads(2)
raw = (torch.randn(3, {n}, {n}) * 0.1).requires_grad_()
rotation = batched.cayley(raw)
rotation.square().sum().backward()
assert torch.isfinite(raw.grad).all()
eye = torch.eye({n})
print(float((rotation @ rotation.mT - eye).abs().max()), float((batched.inverse(rotation.detach()) - rotation.mT).abs().max()))
"""


@pytest.mark.parametrize("n", [16, 256])
def test_rotations_on_two_threads(n: int) -> None:
    """In a process of its own, as a library that fails here may not come back."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(n=n)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(float(error) < 1e-4 for error in done.stdout.split())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [1, 5, 128, 129, 256])
def test_cayley_and_its_gradient(n: int, device: str) -> None:
    raw = (torch.randn(2, n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * 0.3).requires_grad_()
    found = batched.cayley(placed := raw.detach().to(device).requires_grad_())
    skew = raw.triu(1) - raw.triu(1).mT
    eye = torch.eye(n, dtype=torch.float64)
    wanted = torch.stack([torch.linalg.solve(eye + one, eye - one) for one in skew])
    torch.testing.assert_close(found.detach().cpu(), wanted.detach(), rtol=1e-9, atol=1e-9)
    weights = torch.arange(n * n, dtype=torch.float64).reshape(n, n).cos()
    (wanted * weights).sum().backward()
    (found * weights.to(device)).sum().backward()
    assert placed.grad is not None
    torch.testing.assert_close(placed.grad.cpu(), raw.grad, rtol=1e-8, atol=1e-8)


def test_blocks_by_themselves() -> None:
    """What a GPU does, on a CPU: two by two blocks of blocks."""
    raw = torch.randn(2, 11, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = torch.eye(11, dtype=torch.float64) + raw - raw.mT
    torch.testing.assert_close(batched.inverse_by_blocks(a, 3), torch.linalg.inv(a), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
def test_inverse(device: str) -> None:
    a = torch.tensor([[[2.0, 0.0], [0.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]], device=device)
    assert batched.inverse(a).tolist() == [[[0.5, 0.0], [0.0, 0.25]], [[0.0, 1.0], [1.0, 0.0]]]
    with pytest.raises(RuntimeError, match="singular"):
        batched.inverse(torch.zeros(1, 2, 2, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("n", [128, 256])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_graph_takes_it(n: int, count: int) -> None:
    raw = (torch.randn(count, n, n, device="cuda") * 0.1).requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            batched.cayley(raw).square().sum().backward()
        raw.grad = None
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        batched.cayley(raw).square().sum().backward()
        graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    assert raw.grad is not None
    assert torch.isfinite(raw.grad).all()
