"""The short filter against torch's convolution, its window as a state, and its boundaries."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyaena.errors import InputError
from hyaena.ops import short_conv


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 3, 50])
def test_equals_conv1d(taps: int, length: int) -> None:
    z = torch.randn(2, length, 6, dtype=torch.float64)
    weight, bias = torch.randn(6, taps, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    u, _ = short_conv(z, weight, bias)
    padded = torch.nn.functional.pad(z.transpose(1, 2), (taps - 1, 0))
    expected = torch.nn.functional.conv1d(padded, weight.unsqueeze(1), bias, groups=6).transpose(1, 2)
    torch.testing.assert_close(u, expected)


@given(length=st.integers(2, 12), taps=st.integers(1, 5), data=st.data())
def test_splitting_law(length: int, taps: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, length - 1))
    z, weight, bias = torch.randn(2, length, 6), torch.randn(6, taps), torch.randn(6)
    whole, last = short_conv(z, weight, bias)
    first, state = short_conv(z[:, :cut], weight, bias)
    second, state = short_conv(z[:, cut:], weight, bias, state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(state, last)
    assert state.shape == (2, 6, taps - 1)


def test_a_single_step_leaves_a_whole_window() -> None:
    """The original leaves a window one step wide, which broadcasts, silently wrong."""
    z = torch.randn(1, 1, 6)
    _, state = short_conv(z, torch.randn(6, 3), None)
    assert state.shape == (1, 6, 2)
    assert torch.equal(state[0, :, 0], torch.zeros(6)) and torch.equal(state[0, :, 1], z[0, 0])


@given(length=st.integers(1, 12), taps=st.integers(1, 5), data=st.data())
def test_reset_equals_documents_alone(length: int, taps: int, data: st.DataObject) -> None:
    starts = data.draw(st.sets(st.integers(0, length - 1)))
    z, weight, bias = torch.randn(1, length, 4), torch.randn(4, taps), torch.randn(4)
    before = torch.randn(1, 4, taps - 1)
    reset = torch.tensor([[t in starts for t in range(length)]])
    u, last = short_conv(z, weight, bias, before, reset=reset)
    bounds = sorted({0, *starts, length})
    for start, stop in itertools.pairwise(bounds):
        memory = before if start == 0 and 0 not in starts else None
        alone, state = short_conv(z[:, start:stop], weight, bias, memory)
        torch.testing.assert_close(u[:, start:stop], alone)
    torch.testing.assert_close(last, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("taps", [3, 8])
def test_half_precision_is_rounded_once(dtype: torch.dtype, taps: int) -> None:
    """The sum of exact products, rounded: equal, but where float32's own rounding of 6e-8 crosses a half."""
    z, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((2, 200, 6), (6, taps), (6,)))
    state = torch.randn(2, 6, taps - 1).to(dtype)
    reset = torch.rand(2, 200) < 0.05
    for boundaries in (None, reset):
        u, last = short_conv(z, weight, bias, state, reset=boundaries)
        wide = (t.double() for t in (z, weight, bias, state))
        expected, window = short_conv(*wide, reset=boundaries)
        assert u.dtype == last.dtype == dtype and torch.equal(last.double(), window)
        assert float((u != expected.to(dtype)).float().mean()) < 1e-3
        torch.testing.assert_close(u.double(), expected, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-6)


def test_a_state_keeps_no_more_than_itself() -> None:
    _, state = short_conv(torch.randn(1, 300, 6), torch.randn(6, 3), None)
    assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


def test_a_state_of_another_width_is_refused() -> None:
    with pytest.raises(InputError, match="state must be"):
        short_conv(torch.zeros(1, 4, 6), torch.zeros(6, 3), None, torch.zeros(1, 6, 1))
