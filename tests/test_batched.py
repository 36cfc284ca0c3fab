"""Linear equations in batches, on several threads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fqonnx.calib import batched

PROGRAM = """
import torch
from fqonnx.calib import batched
torch.manual_seed(0)
torch.set_num_threads(2)
skew = torch.randn(3, {n}, {n}) * 0.1
skew = (skew - skew.mT).requires_grad_()
eye = torch.eye({n})
rotation = batched.solve(eye + skew, eye - skew)
rotation.square().sum().backward()
assert torch.isfinite(skew.grad).all()
print(float((rotation @ rotation.mT - eye).abs().max()), float((batched.inverse(rotation.detach()) - rotation.mT).abs().max()))
"""


@pytest.mark.parametrize("n", [16, 256])
def test_rotations_on_two_threads(n: int) -> None:
    """In a process of its own, as a library that fails here may not come back."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(n=n)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(float(error) < 1e-4 for error in done.stdout.split())


def test_what_solve_and_inverse_give() -> None:
    a = torch.tensor([[[2.0, 0.0], [0.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]])
    b = torch.tensor([[[2.0], [4.0]], [[5.0], [6.0]]])
    assert batched.solve(a, b).tolist() == [[[1.0], [1.0]], [[6.0], [5.0]]]
    assert batched.inverse(a).tolist() == [[[0.5, 0.0], [0.0, 0.25]], [[0.0, 1.0], [1.0, 0.0]]]
    with pytest.raises(RuntimeError, match="singular"):
        batched.inverse(torch.zeros(1, 2, 2))
