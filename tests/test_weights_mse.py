import torch

from fqonnx.calib.quantizers import codes as round_codes
from fqonnx.calib.registry import weight_quantizer_named
from fqonnx.calib.weights.rtn import CLIP_GRID


def test_each_scale_has_the_smallest_squared_error_of_the_grid() -> None:
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 5] *= 4
    codes, scales = weight_quantizer_named("mse").quantize(weight, bits=4, group_size=32)
    assert scales.shape == (12, 2)
    rows = weight.reshape(12, 2, 32)
    found = (codes.reshape(rows.shape) * scales[..., None] - rows).square().sum(-1)
    for clip in CLIP_GRID:
        scale = rows.abs().amax(-1, keepdim=True) / 7 * clip
        assert bool((found <= (round_codes(rows, scale, 4) * scale - rows).square().sum(-1) * (1 + 1e-5)).all())


def test_clipping_is_better_than_the_largest_magnitude_on_bell_shaped_rows() -> None:
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    errors = {}
    for name in ("rtn", "mse"):
        codes, scales = weight_quantizer_named(name).quantize(weight, bits=4, group_size=0)
        errors[name] = float((codes * scales - weight).square().sum())
    assert errors["mse"] < 0.85 * errors["rtn"]


def test_a_learned_clip_is_taken_as_it_is() -> None:
    weight, clip = torch.randn(4, 32, generator=torch.Generator().manual_seed(2)), torch.tensor([[0.7], [0.8], [0.9], [1.0]])
    _, scales = weight_quantizer_named("mse").quantize(weight, bits=4, group_size=0, clip=clip)
    torch.testing.assert_close(scales, weight.abs().amax(1, keepdim=True) / 7 * clip)
