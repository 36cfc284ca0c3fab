import torch

from fqonnx.calib.quantizers import codes, fake_quantize, levels, row_scale


def test_levels() -> None:
    assert levels(4) == (-8, 7)
    assert levels(8) == (-128, 127)


def test_codes_round_half_to_even_and_clamp() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.6, -9.0]])
    assert codes(x, torch.ones(1, 1), 4).tolist() == [[0, 2, 2, 0, -2, 7, -8]]


def test_row_scale_of_zero_and_underflowing_rows_is_one() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [7.0, -14.0]])
    assert row_scale(x, 4).flatten().tolist() == [1.0, 1.0, 2.0]
    assert row_scale(x, 4, 0.5)[2].item() == 1.0


def test_straight_through_gradients_match_their_definition() -> None:
    x = torch.tensor([[0.3, 5.2, -20.0, 20.0, 1.0]], requires_grad=True)
    scale = torch.tensor([[2.0]], requires_grad=True)
    grad = torch.tensor([[1.0, 2.0, 3.0, 5.0, 7.0]])
    out = fake_quantize(x, scale, 4)
    assert out.tolist() == [[0.0, 6.0, -16.0, 14.0, 0.0]]
    out.backward(grad)
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [[1.0, 2.0, 0.0, 0.0, 7.0]]
    # q - x/s of the three inside the range, the bound itself of the two outside.
    torch.testing.assert_close(scale.grad, torch.tensor([[-0.15 * 1 + 0.4 * 2 - 8 * 3 + 7 * 5 - 0.5 * 7]]))
