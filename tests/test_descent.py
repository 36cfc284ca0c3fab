from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from fqonnx.calib.descent import WARM_STEPS, Descent, side_stream

if TYPE_CHECKING:
    from collections.abc import Mapping

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
STEPS = 30


def trained(device: str, *, capture: bool = True, shapes: tuple[int, ...] = (16,)) -> tuple[torch.Tensor, Descent]:
    """A linear layer on noisy outputs of another, a factor of its learned by its own rate; and what trained it."""
    where = torch.device(device)
    random = torch.Generator().manual_seed(0)
    wanted = torch.randn(8, 8, generator=random).to(where)
    weight = nn.Parameter(torch.zeros(8, 8, device=where))
    factor = nn.Parameter(torch.ones((), device=where))

    def loss(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return (inputs["x"] @ weight.mT * factor - inputs["x"] @ wanted.mT).square().mean()

    with side_stream(where):
        descent = Descent([([weight], 0.1), ([factor], 1e-3), ([], 1.0)], STEPS, loss, where, capture=capture)
        for step in range(STEPS):
            descent.step({"x": torch.randn(shapes[step % len(shapes)], 8, generator=random).to(where)})
        assert descent.finite
    return torch.cat([(weight * factor).detach().flatten(), wanted.flatten()]).reshape(2, 8, 8).cpu(), descent


def test_it_descends_on_the_schedule_of_a_cosine() -> None:
    (found, wanted), _ = trained("cpu")
    assert float((found - wanted).norm() / wanted.norm()) < 0.7
    reference = nn.Parameter(torch.zeros(3))
    mine = nn.Parameter(torch.zeros(3))
    target = torch.tensor([1.0, -2.0, 0.5])
    optimizer = torch.optim.AdamW([reference], lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    descent = Descent([([mine], 0.1)], 9, lambda _: (mine - target).square().sum(), torch.device("cpu"))
    for _ in range(9):
        optimizer.zero_grad()
        (reference - target).square().sum().backward()
        optimizer.step()
        schedule.step()
        descent.step({})
    torch.testing.assert_close(mine, reference)


def test_a_loss_that_is_not_finite_is_remembered() -> None:
    weight = nn.Parameter(torch.ones(1))
    descent = Descent([([weight], 0.1)], 3, lambda inputs: (weight * inputs["x"]).sum(), torch.device("cpu"))
    descent.step({"x": torch.ones(1)})
    assert descent.finite
    descent.step({"x": torch.full((1,), float("inf"))})
    descent.step({"x": torch.ones(1)})
    assert not descent.finite


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("shapes", [(16,), (16, 8)])
def test_captured_steps_are_those_that_are_launched(shapes: tuple[int, ...]) -> None:
    captured, descent = trained("cuda", shapes=shapes)
    assert descent.captured == len(shapes)
    launched, other = trained("cuda", capture=False, shapes=shapes)
    assert other.captured == 0
    assert torch.equal(captured, launched)


@pytest.mark.gpu
@GPU
def test_what_cannot_be_captured_is_said_and_trained(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    weight = nn.Parameter(torch.ones(4, device=device))

    def asks_the_host(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return (weight * inputs["x"]).square().sum() * (1 + float(inputs["x"].sum()) * 0)

    with side_stream(device), caplog.at_level(logging.WARNING):
        descent = Descent([([weight], 0.1)], 20, asks_the_host, device)
        for _ in range(20):
            descent.step({"x": torch.ones(4, device=device)})
    assert sum("cannot be captured" in message for message in caplog.messages) == 1
    assert descent.captured == 0
    assert WARM_STEPS < 20
    assert bool((weight < 0.5).all())
    assert torch.randn(2, device=device).isfinite().all()  # the generator is not left in the capture that was broken off
