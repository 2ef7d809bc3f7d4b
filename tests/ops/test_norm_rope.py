"""The two conventions of the norm, and rotary positions."""

import math

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


EXTREME = {  # dtype: numbers near its largest, whose squares overflow float32 (float64), but for float16
    torch.float32: [3e38, 1e30, 2e19, 1.8e19],
    torch.bfloat16: [3e38, 1e30, 2e19],
    torch.float16: [65504.0, 3e4],
    torch.float64: [1e308, 1e200, 1e155],
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", EXTREME)
def test_rms_norm_does_not_overflow(inside: bool, dtype: torch.dtype) -> None:
    """Rows whose squares overflow, of one large number or of many, beside ordinary ones, which keep every bit."""
    ordinary = torch.randn(3, 64).to(dtype)
    weight = torch.randn(64).to(dtype)
    alone = rms_norm(ordinary, weight, 1e-5, eps_inside_root=inside)
    # the scaled row, the division and the product with the weight each round once
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    for size in EXTREME[dtype]:
        many = size * (torch.rand(64, dtype=torch.float64) * 2 - 1)
        one = torch.zeros(64, dtype=torch.float64)
        one[5] = size
        rows = torch.stack([many, one]).to(dtype)
        got = rms_norm(torch.cat([rows, ordinary]), weight, 1e-5, eps_inside_root=inside)
        assert torch.equal(got[2:], alone)
        wide = rows.double() / size
        expected = wide / wide.pow(2).mean(-1, keepdim=True).sqrt() * weight.double()
        torch.testing.assert_close(got[:2].double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("inside", [True, False])
def test_gradients_of_large_rows(inside: bool) -> None:
    """The norm of s·x is that of x, so its gradient is that at x divided by s; in float64, where nothing overflows."""
    x, weight = torch.randn(2, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x.requires_grad_()
        return torch.autograd.grad(rms_norm(x, weight, 1e-12, eps_inside_root=inside).sin().sum(), x)[0]

    torch.testing.assert_close(gradient(x * 1e100) * 1e100, gradient(x.clone()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_rms_norm_of_what_is_not_finite_is_not_finite(inside: bool, bad: float) -> None:
    x = torch.randn(2, 8)
    x[1, 3] = bad
    y = rms_norm(x, torch.ones(8), 1e-5, eps_inside_root=inside)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_rms_norm_in_vmap_and_export() -> None:
    x, weight = torch.randn(3, 4, 8), torch.randn(8)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, 1e-5, backend="plain").sin().sum()

    rows = torch.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(rows[1], torch.func.grad(loss)(x[1]))


def test_tables_of_float64_models_are_float64() -> None:
    """Position 131,071, where float32 angles are off by 4e-3."""
    positions = torch.tensor([131_071])
    exact = [131_071 / 4 / 10_000.0 ** (2 * i / 8) for i in range(4)]
    for dtype, table_dtype, tolerance in (
        (torch.float64, torch.float64, 1e-10),  # 1e-16 of the angle
        (torch.float32, torch.float32, 1e-2),
        (torch.bfloat16, torch.float32, 1e-2),
    ):
        cos, sin = rotary_table(positions, 8, 1e4, scaling_factor=4.0, dtype=dtype)
        assert cos.dtype == sin.dtype == table_dtype
        for i, angle in enumerate(exact):
            assert abs(float(cos[0, i]) - math.cos(angle)) < tolerance
            assert abs(float(sin[0, i]) - math.sin(angle)) < tolerance
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64)
    assert rotate(x, rotary_table(positions, 8, 1e4, dtype=torch.float64)).dtype == torch.float64


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
