"""A frozen layer with an update of low rank: against the equation, and its gradients against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hyaena.ops import Dense, lora_linear


def operands(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Tensor, Dense, Tensor, Tensor]:
    x, weight = torch.randn(2, 7, 5, dtype=dtype), torch.randn(6, 5, dtype=dtype)
    layer = Dense(weight, torch.randn(6, dtype=dtype) if bias else None)
    return x, layer, torch.randn(3, 5, dtype=dtype), torch.randn(6, 3, dtype=dtype)


def written_out(x: Tensor, layer: Dense, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return nn.functional.linear(x, layer.weight + scale * b @ a, layer.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_equals_its_equation(bias: bool) -> None:
    x, layer, a, b = operands(bias=bias)
    torch.testing.assert_close(lora_linear(x, layer, a, b, 0.7), written_out(x, layer, a, b, 0.7))
    torch.testing.assert_close(
        lora_linear(x, lambda t: nn.functional.linear(t, *layer), a, b, 0.7), written_out(x, layer, a, b, 0.7)
    )


@pytest.mark.parametrize("trained", ["xab", "ab", "x", "a", "b"])
def test_gradients_equal_those_of_the_equation(trained: str) -> None:
    x, layer, a, b = operands()
    leaves = [t.requires_grad_() for name, t in zip("xab", (x, a, b), strict=True) if name in trained]
    dy = torch.randn(2, 7, 6, dtype=torch.float64)
    got = torch.autograd.grad(lora_linear(x, layer, a, b, 0.7), leaves, dy)
    expected = torch.autograd.grad(written_out(x, layer, a, b, 0.7), leaves, dy)
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want)


def test_a_trained_layer_and_a_trained_bias_get_gradients() -> None:
    x, layer, a, b = operands()
    for frozen in (layer.weight, None):
        leaves = [t.requires_grad_() for t in layer if t is not frozen]
        got = torch.autograd.grad(lora_linear(x, layer, a, b, 0.7).square().sum(), leaves)
        expected = torch.autograd.grad(written_out(x, layer, a, b, 0.7).square().sum(), leaves)
        for value, want in zip(got, expected, strict=True):
            torch.testing.assert_close(value, want)
        layer.weight.requires_grad_(False)


def test_a_narrow_layer_has_float32_gradients_of_a_and_b() -> None:
    """Rounding of the activations to 8 bits of mantissa: 1 % of the largest entry of sums of seven to fourteen."""
    x, layer, a, b = operands(torch.float32)
    a.requires_grad_()
    b.requires_grad_()
    expected = torch.autograd.grad(written_out(x, layer, a, b, 0.7).sum(), (a, b))
    narrow = Dense(*(t.bfloat16() for t in layer))
    got = torch.autograd.grad(lora_linear(x.bfloat16(), narrow, a, b, 0.7).sum(), (a, b))
    for value, want in zip(got, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, want, rtol=0, atol=0.02 * float(want.abs().max()))


def test_autocast_computes_in_its_dtype() -> None:
    x, layer, a, b = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, layer, a.requires_grad_(), b, 0.7)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), written_out(x, layer, a, b, 0.7), rtol=0.05, atol=0.1)
    y.sum().backward()
    assert a.grad is not None and a.grad.dtype == torch.float32
