"""Filters cut to a window: what is dropped, how the window is chosen, and that what is left is the convolution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops import ExplicitFilter, ModalFilter, choose_window, dropped_energy, long_conv, taps, truncate


def make_filter(channels: int = 4, modes: int = 2, largest: float = 0.95) -> ModalFilter:
    poles = torch.polar(largest * torch.rand(channels, modes).double(), 3 * torch.randn(channels, modes).double())
    residues = torch.randn(channels, modes, dtype=torch.complex128)
    return ModalFilter(poles, residues, torch.randn(channels).double())


def by_definition(x: torch.Tensor, filter: ExplicitFilter) -> torch.Tensor:
    y = torch.zeros_like(x) if filter.skip is None else filter.skip * x
    for k in range(min(filter.taps.shape[-1], x.shape[1])):
        y[:, k:] += filter.taps[:, k] * x[:, : x.shape[1] - k]
    return y


@pytest.mark.parametrize("window", [1, 2, 7, 40, 200])
@pytest.mark.parametrize("length", [1, 3, 15, 16, 100])
def test_equals_its_definition(window: int, length: int) -> None:
    filter = ExplicitFilter(torch.randn(3, window).double(), torch.randn(3).double())
    x = torch.randn(2, length, 3).double()
    y, state = long_conv(x, filter)
    torch.testing.assert_close(y, by_definition(x, filter))
    padded = torch.nn.functional.pad(x, (0, 0, window, 0))
    torch.testing.assert_close(state, padded[:, length + 1 :].transpose(1, 2))


@given(data=st.data(), window=st.integers(1, 60), length=st.integers(2, 80))
def test_splitting_law(data: st.DataObject, window: int, length: int) -> None:
    torch.manual_seed(length)
    cut = data.draw(st.integers(1, length - 1))
    filter = ExplicitFilter(torch.randn(3, window).double())
    x = torch.randn(2, length, 3).double()
    whole, last = long_conv(x, filter)
    first, state = long_conv(x[:, :cut], filter)
    second, state = long_conv(x[:, cut:], filter, state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    assert torch.equal(state, last)


@pytest.mark.parametrize("length", [5, 50])
def test_gradients(length: int) -> None:
    shapes = ((1, length, 2), (2, 4), (2,), (1, 2, 3))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda x, h, skip, state: long_conv(x, ExplicitFilter(h, skip), state), leaves)


@pytest.mark.parametrize("window", [1, 3, 20, 90])
def test_the_closed_form_is_the_sum(window: int) -> None:
    filter = make_filter()
    energy = taps(ModalFilter(*filter[:2]), 4000) ** 2
    expected = energy[:, window:].sum(-1) / energy.sum(-1)
    torch.testing.assert_close(dropped_energy(filter, window), expected, rtol=1e-9, atol=1e-15)
    cut, report = truncate(filter, window=window)
    assert report.window == window and torch.equal(report.dropped, dropped_energy(filter, window))
    torch.testing.assert_close(cut.taps, taps(ModalFilter(*filter[:2]), window))
    assert cut.skip is filter.skip


@given(st.floats(1e-14, 0.9), st.integers(0, 1000))
def test_the_window_is_the_shortest_that_keeps_to_the_tolerance(tolerance: float, seed: int) -> None:
    torch.manual_seed(seed)
    filter = make_filter()
    window = choose_window(filter, tolerance)
    assert float(dropped_energy(filter, window).max()) <= tolerance
    assert window == 1 or float(dropped_energy(filter, window - 1).max()) > tolerance
    assert truncate(filter, tolerance=tolerance)[1].window == window


def test_the_error_is_what_was_dropped() -> None:
    """White noise through the filter loses the share of its power that the report names."""
    filter = ModalFilter(*make_filter(largest=0.99)[:2])
    x = torch.randn(1, 20_000, 4).double()
    exact, _ = long_conv(x, filter, method="fft")
    cut, report = truncate(filter, window=12)
    lost = ((long_conv(x, cut)[0] - exact) ** 2).sum((0, 1)) / (exact**2).sum((0, 1))
    torch.testing.assert_close(lost, report.dropped, rtol=0.2, atol=1e-4)


def test_a_modal_filter_is_cut_below_what_float32_resolves() -> None:
    filter = make_filter()
    x = torch.randn(2, 300, 4).double()
    expected, _ = long_conv(x, filter, method="reference")
    y, state = long_conv(x, filter, method="truncated")
    assert float((y - expected).abs().max() / expected.abs().max()) < 1e-5  # 1e-6 of the amplitude, ten standard errors
    assert state.shape == (2, 4, choose_window(filter) - 1)


def test_modes_that_say_nothing_do_not_count() -> None:
    poles = torch.tensor([[0.5, 1.5], [0.0, 0.0]], dtype=torch.complex128)
    residues = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.complex128)
    assert dropped_energy(ModalFilter(poles, residues), 3).tolist() == [0.25**3, 0.0]


@pytest.mark.parametrize("size", [1.0, 1.001, float("nan")])
def test_filters_that_never_fade_are_refused(size: float) -> None:
    filter = ModalFilter(torch.full((2, 1), 0.5j), torch.ones(2, 1, dtype=torch.complex64))
    filter.poles[1] = size
    calls = (
        choose_window,
        lambda f: truncate(f, window=9),
        lambda f: long_conv(torch.ones(1, 3, 2), f, method="truncated"),
    )
    for call in calls:
        with pytest.raises(UnsupportedError, match="channel 1 has a pole of"):
            call(filter)


def test_windows_without_end_and_other_mistakes() -> None:
    slow = ModalFilter(torch.full((1, 1), 1 - 1e-7 + 0j, dtype=torch.complex128), torch.ones(1, 1) + 0j)
    with pytest.raises(UnsupportedError, match="larger tolerance"):
        choose_window(slow)
    assert truncate(slow, window=5)[1].dropped.item() == pytest.approx((1 - 1e-7) ** 10)
    filter = make_filter()
    for options, words in (
        ({"tolerance": 0.1, "window": 3}, "both"),
        ({"tolerance": 0.0}, "between 0 and 1"),
        ({"window": 0}, "at least one tap"),
    ):
        with pytest.raises(InputError, match=words):
            truncate(filter, **options)
    cut, _ = truncate(filter, window=5)
    with pytest.raises(InputError, match=r"must be \(1, 4, 4\)"):
        long_conv(torch.zeros(1, 3, 4), cut, torch.zeros(1, 4, 5))
    with pytest.raises(UnsupportedError, match="takes no ExplicitFilter: choose auto, reference"):
        long_conv(torch.zeros(1, 3, 4), cut, method="scan")
