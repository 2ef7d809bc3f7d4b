"""The gate of an MLP, written out."""

import math

import pytest
import torch

from hyaena.ops import ACTIVATIONS, gate

WRITTEN_OUT = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "identity": lambda x: x,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_its_equation(activation: str) -> None:
    a, b = torch.linspace(-6, 6, 25, dtype=torch.float64), torch.randn(25, dtype=torch.float64)
    expected = [WRITTEN_OUT[activation](float(x)) * float(y) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(gate(a, b, activation), torch.tensor(expected, dtype=torch.float64))
