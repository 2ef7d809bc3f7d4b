"""The canonical form: there and back within the stated bound, refused beyond it; its step and its transform."""

import cmath
from importlib import import_module

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops import CanonicalFilter, ModalFilter, long_conv, taps, to_canonical, to_canonical_state, to_modal

canonical = import_module("hyaena.ops.long_conv.canonical")

LENGTHS = [1, 2, 3, 15, 16, 63, 1000]


def roots(filter: ModalFilter) -> torch.Tensor:
    """The poles of a filter of one channel, conjugates included, those at zero left out."""
    poles = filter.poles[0][filter.poles[0] != 0]
    return torch.cat([poles, poles[poles.imag != 0].conj()]).unsqueeze(0)


def make_filter(channels: int = 5, modes: int = 2, largest: float = 1.0) -> ModalFilter:
    """Channels of complex poles, of real ones, and of both."""
    phase = 0.3 + 2.5 * torch.rand(channels, modes, dtype=torch.float64)
    poles = torch.polar(largest * torch.rand(channels, modes).double() ** 0.1, phase)
    poles[1] = torch.linspace(-0.9, 0.8, modes, dtype=torch.float64)
    poles[2, 0] = 0.7
    residues = torch.randn(channels, modes, dtype=torch.complex128)
    return ModalFilter(poles, residues, torch.randn(channels).double())


pole = st.tuples(st.floats(0.01, 1.02), st.floats(-3.14, 3.14), st.booleans())


@given(
    poles=st.lists(pole, min_size=1, max_size=6),
    spread=st.sampled_from([1.0, 0.1]),
    seed=st.integers(0, 2**16),
)
def test_there_and_back(poles: list[tuple[float, float, bool]], spread: float, seed: int) -> None:
    """Within the bound the filter comes back; beyond it, nothing does."""
    torch.manual_seed(seed)
    values = [complex(size) if real else cmath.rect(size, spread * phase) for size, phase, real in poles]
    residues = torch.randn(1, len(poles), dtype=torch.complex128)
    filter = ModalFilter(torch.tensor([values], dtype=torch.complex128), residues)
    condition = float(canonical.condition(roots(filter)))
    if condition > canonical.CONDITION:
        with pytest.raises(UnsupportedError, match=r"channel 0 has poles so close .* the bound 1e\+07"):
            to_canonical(filter)
        return
    form = to_canonical(filter)
    assert form.numerator.dtype == form.denominator.dtype == torch.float64
    assert form.denominator.shape[1] == sum(1 if value.imag == 0 else 2 for value in values)
    assume(condition < canonical.CONDITION / 2)  # at the bound itself either answer is right
    back = to_modal(form)
    # float64 knows the coefficients to 1e-16; Bauer & Fike: poles then move by that times the condition (and the order)
    upper = torch.complex(filter.poles.real, filter.poles.imag.abs())
    assert float((upper.unsqueeze(-1) - back.poles.unsqueeze(-2)).abs().amin(-1).max()) < 2e-15 * condition
    expected = taps(filter, 100)
    error = (taps(back, 100) - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert float(error) < 2e-13 * condition  # p^t multiplies a pole's error by t, up to 100


def test_a_batch_of_channels_of_all_kinds() -> None:
    filter = make_filter(6, 3)
    filter.poles[3] = 0  # an instantaneous gain
    filter.poles[4, 1:] = 0
    form = to_canonical(filter)
    assert form.denominator.shape == (6, 6) and not form.denominator[3].any()
    back = to_modal(form)
    torch.testing.assert_close(taps(back, 50), taps(filter, 50))
    torch.testing.assert_close(taps(to_modal(to_canonical(back)), 50), taps(filter, 50))
    x = torch.randn(2, 40, 6).double()
    torch.testing.assert_close(long_conv(x, form)[0], long_conv(x, filter)[0])


@pytest.mark.parametrize("method", ["recurrence", "canonical-fft"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("largest", [0.9, 1.0, 1.01])
def test_equals_the_modal_form(method: str, length: int, largest: float) -> None:
    filter = make_filter(largest=largest)
    form = to_canonical(filter)
    x, state = torch.randn(2, length, 5).double(), torch.randn(2, 5, 2, dtype=torch.complex128)
    expected, last = long_conv(x, filter, state, method="reference")
    order = form.denominator.shape[1]
    y, after = long_conv(x, form, to_canonical_state(filter, state, order), method=method)
    for value, want in ((y, expected), (after, to_canonical_state(filter, last, order))):
        # e^(24.5/2)·1e-16 times the condition of the division, 1/|A|
        assert float((value - want).abs().max() / want.abs().max()) < 1e-7


@pytest.mark.parametrize("largest", [0.5, 1.0, 1.05])
def test_the_transform_of_a_modal_filter_keeps_float64(largest: float) -> None:
    """Eight modes within 0.03 of each other, which no polynomial can hold, on, in and around the unit circle."""
    step = 1e-3
    crowd = torch.polar(torch.full((8,), largest).double(), step * torch.pi * torch.arange(8).double())
    filter = ModalFilter(crowd.expand(3, 8), torch.randn(3, 8, dtype=torch.complex128))
    x, state = torch.randn(1, 1000, 3).double(), torch.randn(1, 3, 8, dtype=torch.complex128)
    expected, last = long_conv(x, filter, state, method="reference")
    y, after = long_conv(x, filter, state, method="canonical-fft")
    for value, want in ((y, expected), (after, last)):
        # 1e-16 times (T/2)²: near the real axis a pole and its conjugate are both 2/T away from the circle
        assert float((value - want).abs().max() / want.abs().max()) < 1e-9


@pytest.mark.parametrize("method", ["auto", "recurrence", "canonical-fft"])
@given(data=st.data())
def test_splitting_law(method: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 100))
    cut = data.draw(st.integers(1, length - 1))
    torch.manual_seed(length)
    form, x = to_canonical(make_filter()), torch.randn(1, length, 5).double()
    whole, last = long_conv(x, form, method=method)
    first, state = long_conv(x[:, :cut], form, method=method)
    second, state = long_conv(x[:, cut:], form, state, method=method)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(state, last, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["recurrence", "canonical-fft"])
def test_gradients(method: str) -> None:
    form = to_canonical(make_filter(largest=0.9))
    leaves = [torch.randn(1, 20, 5).double(), *form, torch.randn(1, 5, 4).double()]
    leaves = [t.detach().requires_grad_() for t in leaves if t is not None]
    assert torch.autograd.gradcheck(
        lambda x, b, a, skip, state: long_conv(x, CanonicalFilter(b, a, skip), state, method=method),
        leaves,
        atol=1e-4,
        fast_mode=True,
    )


def test_documents_start_from_zero() -> None:
    form, x = to_canonical(make_filter()), torch.randn(1, 30, 5).double()
    reset = torch.arange(30)[None] == 11
    y, state = long_conv(x, form, method="recurrence", reset=reset)
    alone, last = long_conv(x[:, 11:], form, method="recurrence")
    assert torch.equal(y[:, 11:], alone) and torch.equal(state, last)


@pytest.mark.parametrize("value", [0.9, 0.5 + 0.5j, 1.0])
def test_repeated_poles_are_refused_both_ways(value: complex) -> None:
    filter = make_filter()
    filter.poles[3] = value
    with pytest.raises(UnsupportedError, match="channel 3 has poles so close"):
        to_canonical(filter)
    form = to_canonical(make_filter())
    linear, quadratic = -2 * complex(value).real, abs(value) ** 2  # (1 + linear z⁻¹ + quadratic z⁻²)², or its root
    square = [2 * linear, linear**2 + 2 * quadratic, 2 * linear * quadratic, quadratic**2]
    coefficients = square if complex(value).imag else [linear, quadratic, 0, 0]
    form.denominator[3] = torch.tensor(coefficients, dtype=torch.float64)
    form.numerator[3] = torch.tensor([1.0, 0.3, 0.0, 0.0])
    with pytest.raises(UnsupportedError, match="channel 3 has poles so close"):
        to_modal(form)


def test_what_no_modes_make_is_refused() -> None:
    form = to_canonical(make_filter())
    form.denominator[2] = 0
    with pytest.raises(InputError, match="numerator of channel 2 has a higher order"):
        to_modal(form)
    form.numerator[1, 0] = torch.inf
    with pytest.raises(InputError, match="channel 1 are not finite"):
        to_modal(form)
    filter = make_filter()
    filter.residues[4, 1] = torch.nan
    with pytest.raises(InputError, match="channel 4 are not finite"):
        to_canonical(filter)
    with pytest.raises(
        UnsupportedError, match="takes no CanonicalFilter: choose auto, reference, recurrence, canonical-fft"
    ):
        long_conv(torch.zeros(1, 3, 5), form, method="blocked")
