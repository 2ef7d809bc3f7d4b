"""The two conventions of the norm, and rotary positions."""

import pytest
import torch

from hyaena.ops import rms_norm, rotary_table, rotate


@pytest.mark.parametrize("inside", [True, False])
def test_rms_norm_conventions(inside: bool) -> None:
    x, weight, eps = torch.randn(3, 16) * 1e-2, torch.randn(16), 1e-2  # an epsilon large enough to tell them apart
    mean = x.double().pow(2).mean(-1, keepdim=True)
    scale = (mean + eps).sqrt() if inside else mean.sqrt() + eps
    torch.testing.assert_close(rms_norm(x, weight, eps, eps_inside_root=inside).double(), x / scale * weight.double())


@pytest.mark.parametrize("inside", [True, False])
def test_rms_norm_of_bfloat16_is_computed_in_float32(inside: bool) -> None:
    x = torch.full((1, 4096), 300.0).bfloat16()  # the sum of squares overflows bfloat16's 8 bits of precision
    y = rms_norm(x, torch.ones(4096).bfloat16(), 1e-5, eps_inside_root=inside)
    assert y.dtype == torch.bfloat16 and torch.equal(y, torch.ones_like(y))


def test_rotary_is_half_split_and_relative() -> None:
    table = rotary_table(torch.arange(50), 8, 10_000.0)
    x = torch.randn(1, 1, 50, 8)
    turned = rotate(x, table)
    frequency = 10_000.0 ** -(2 / 8)
    expected = x[0, 0, 7, 1] * torch.cos(torch.tensor(7 * frequency)) - x[0, 0, 7, 5] * torch.sin(
        torch.tensor(7 * frequency)
    )
    torch.testing.assert_close(turned[0, 0, 7, 1], expected)
    q, k = torch.randn(2, 1, 1, 1, 8)
    products = [
        (rotate(q, rotary_table(torch.tensor([m]), 8, 1e4)) * rotate(k, rotary_table(torch.tensor([n]), 8, 1e4))).sum()
        for m, n in ((3, 1), (43, 41))
    ]
    torch.testing.assert_close(products[0], products[1])


def test_interpolation_divides_positions() -> None:
    fine = rotary_table(torch.tensor([32]), 8, 1e4, scaling_factor=16.0)
    torch.testing.assert_close(fine[0], rotary_table(torch.tensor([2]), 8, 1e4)[0])


def test_rows_have_their_own_positions() -> None:
    x = torch.randn(2, 3, 4, 8)
    positions = torch.stack([torch.arange(4), torch.arange(10, 14)])
    both = rotate(x, rotary_table(positions, 8, 1e4))
    for row in range(2):
        torch.testing.assert_close(both[row], rotate(x[row : row + 1], rotary_table(positions[row], 8, 1e4))[0])
