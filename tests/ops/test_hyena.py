"""The composed operator against its definition, under padding and at its edges."""

import pytest
import torch

from hyaena.errors import InputError
from hyaena.ops import ModalFilter, hyena


def parts(channels: int = 5, modes: int = 2) -> tuple[torch.Tensor, torch.Tensor, ModalFilter]:
    poles = torch.polar(torch.rand(channels, modes) * 0.9, torch.rand(channels, modes) * 3)
    residues = torch.randn(channels, modes, dtype=torch.complex64)
    return torch.randn(3 * channels, 3), torch.randn(3 * channels), ModalFilter(poles, residues, torch.randn(channels))


def test_equals_its_definition() -> None:
    weight, bias, filter = parts()
    z = torch.randn(1, 40, 15)
    y, _ = hyena(z, weight, bias, filter)
    padded = torch.cat([torch.zeros(1, 2, 15), z], dim=1).double()
    u = bias + sum(padded[:, k : k + 40] * weight[:, k] for k in range(3))
    x2, x1, v = u.split(5, dim=-1)
    w = (x1 * v)[0]
    s = torch.zeros(5, 2, dtype=torch.complex128)
    for t in range(40):
        s = filter.poles * s + w[t, :, None]
        expected = ((filter.residues * s).real.sum(-1) + filter.skip * w[t]) * x2[0, t]
        torch.testing.assert_close(y[0, t].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ModalFilter.methods)
@pytest.mark.parametrize("padding", [1, 2, 7])
def test_padding_contributes_exactly_nothing(method: str, padding: int) -> None:
    weight, bias, filter = parts()
    z = torch.randn(1, 30, 15)
    y, state = hyena(z, weight, bias, filter, method=method)
    padded = torch.cat([torch.randn(1, padding, 15) * 1e6, z], dim=1)
    mask = torch.arange(30 + padding)[None] >= padding
    y_padded, state_padded = hyena(padded, weight, bias, filter, mask=mask, method=method)
    assert torch.equal(y_padded[:, :padding], torch.zeros(1, padding, 5))
    torch.testing.assert_close(y_padded[:, padding:], y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state_padded.long, state.long, rtol=1e-4, atol=1e-4)
    assert torch.equal(state_padded.short, state.short)


def test_a_projection_of_another_width_is_refused() -> None:
    weight, bias, filter = parts()
    with pytest.raises(InputError, match="10"):
        hyena(torch.zeros(1, 4, 10), weight, bias, filter)
