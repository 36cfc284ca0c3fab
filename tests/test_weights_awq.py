import pytest
import torch

from fqonnx.calib.quantizers import codes as round_codes
from fqonnx.calib.registry import weight_quantizer_named
from fqonnx.calib.weights.awq import CLIPS


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, inputs whose channels go together, and their second moment."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=g) @ (torch.eye(64) + 0.3 * torch.randn(64, 64, generator=g))
    return torch.randn(24, 64, generator=g), x, x.mT @ x / len(x)


@pytest.mark.parametrize("group_size", [0, 32])
def test_each_scale_has_the_smallest_output_error_of_the_grid(group_size: int) -> None:
    """Measured on the inputs themselves, for the weights that share a scale."""
    weight, x, hessian = case()
    codes, scales = weight_quantizer_named("awq").quantize(weight, bits=4, group_size=group_size, hessian=hessian)
    size = group_size or 64
    for start in range(0, 64, size):
        part = slice(start, start + size)
        w, rows = weight[:, part], x[:, part]
        found = (rows @ (codes[:, part] * scales[:, start // size, None] - w).mT).square().sum(0)
        for clip in CLIPS:
            scale = w.abs().amax(1, keepdim=True) / 7 * clip
            assert bool((found <= (rows @ (round_codes(w, scale, 4) * scale - w).mT).square().sum(0) * (1 + 1e-3)).all())


def test_it_is_nearer_to_the_output_than_clips_that_do_not_know_it() -> None:
    weight, x, hessian = case()
    errors = {}
    for name in ("rtn", "mse", "awq"):
        codes, scales = weight_quantizer_named(name).quantize(weight, bits=4, group_size=0, hessian=hessian)
        errors[name] = float((x @ (codes * scales - weight).mT).norm())
    assert errors["awq"] < 0.97 * min(errors["rtn"], errors["mse"])


def test_a_learned_clip_is_taken_where_it_is_the_best() -> None:
    weight = torch.full((2, 8), 0.3)
    weight[:, 0] = 7.0
    hessian = torch.eye(8)
    hessian[0, 0] = 0  # the large weight does not matter: 0.3 / 7 · 7 makes the others exact
    clip = torch.tensor([[0.3 / 7], [1.0]])
    codes, scales = weight_quantizer_named("awq").quantize(weight, bits=4, group_size=0, hessian=hessian, clip=clip)
    torch.testing.assert_close((codes[0] * scales[0])[1:], weight[0, 1:])
    assert float(scales[1]) > float(scales[0])
