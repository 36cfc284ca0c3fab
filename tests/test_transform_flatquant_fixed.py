import pytest
import torch

from fqonnx.calib.block_training import FlatGroup, prepare
from fqonnx.calib.registry import transform_named
from fqonnx.calib.transforms.flatquant import BLOCK_ALPHA, FlatQuant
from fqonnx.calib.transforms.smooth import channel_scale
from tests.test_transforms import output_error, problem


def test_the_scale_stays_where_flatquant_starts_and_the_pair_is_trained() -> None:
    p = problem(steps=200)
    assert p.absmax is not None
    fixed, learned = transform_named("flatquant-fixed").fit(p), transform_named("flatquant").fit(p)
    start = channel_scale(p.absmax, p.weight, FlatQuant.training.alpha)
    assert fixed.channel_scale is not None
    assert learned.channel_scale is not None
    torch.testing.assert_close(fixed.channel_scale, start)
    assert float((learned.channel_scale / start).log().abs().max()) > 0.01
    errors = [output_error(p, transform_named(name).fit(p)) for name in ("hadamard", "flatquant-fixed")]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("name", ["flatquant", "flatquant-fixed"])
def test_blocks_train_the_pair_and_leave_a_fixed_scale(name: str) -> None:
    p, transform = problem(), transform_named(name)
    assert p.tokens is not None
    assert p.absmax is not None
    group = FlatGroup(p, transform)
    optimizer = torch.optim.AdamW(group.parameters(), lr=0.01, weight_decay=0.0)
    prepare([group], [transform])
    start = group.fitted()
    for _ in range(3):
        prepare([group], [transform])
        optimizer.zero_grad(set_to_none=True)
        (group(p.tokens) - p.tokens @ p.weight.mT).square().mean().backward()
        optimizer.step()
    prepare([group], [transform])
    fitted = group.fitted()
    assert fitted.left is not None
    assert start.left is not None
    assert not torch.equal(fitted.left, start.left)
    assert fitted.channel_scale is not None
    unchanged = torch.allclose(fitted.channel_scale, channel_scale(p.absmax, p.weight, BLOCK_ALPHA))
    assert unchanged == (name == "flatquant-fixed")
