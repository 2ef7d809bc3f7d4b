"""Every method against the float64 reference: output, final state, gradients; and the splitting law."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops import METHODS, ModalFilter, long_conv, taps
from hyaena.ops.long_conv.modes import powers
from watching import LargestResult

MODAL = list(ModalFilter.methods)
FAST = [name for name in MODAL if METHODS[name].exact and name != "reference"]
RESETTING = [name for name in FAST if METHODS[name].reset]

# float32 rounds each of T additions to 6e-8 of the running sum; the modes' own sums stay below 1e3 here.
OUTPUT = 2e-5
# a gradient sums over T steps once more, and the derivative of p^t carries a factor t
GRADIENT = 2e-4


def make_filter(channels: int, modes: int, *, largest: float = 1.0, phase: float = 0.95) -> ModalFilter:
    """Poles on rays with |Im p| up to ``phase``, one of them with |p| = ``largest``."""
    imaginary = (torch.rand(channels, modes) * 2 - 1) * phase
    imaginary[0, 0] = phase
    real = torch.sqrt(largest**2 - imaginary**2) * torch.rand(channels, modes)
    real[0, 0] = (largest**2 - phase**2) ** 0.5
    residues = torch.randn(channels, modes, dtype=torch.complex64) / modes**0.5
    return ModalFilter(torch.complex(real, imaginary), residues, torch.randn(channels))


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised memory with NaN."""

    def filled(make):
        def wrapped(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() or out.is_complex() else out

        return wrapped

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def close(value: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert torch.isfinite(torch.view_as_real(value) if value.is_complex() else value).all()
    error = (value - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    assert float(error) < tolerance


@pytest.mark.parametrize("length", [1, 2, 3, 63, 1000])
@pytest.mark.parametrize("method", FAST)
@pytest.mark.parametrize("modes", [1, 2, 8])
def test_equals_reference(monkeypatch: pytest.MonkeyPatch, method: str, length: int, modes: int) -> None:
    poison(monkeypatch)
    channels, batch = 6, 2
    filter = make_filter(channels, modes)
    inputs = [*filter, torch.randn(batch, length, channels), torch.randn(batch, channels, modes, dtype=torch.complex64)]
    weights = torch.randn(batch, length, channels), torch.randn(batch, channels, modes, dtype=torch.complex64)

    def run(method: str) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        y, state = long_conv(leaves[3], ModalFilter(*leaves[:3]), leaves[4], method=method)
        loss = (y * weights[0]).sum() + (state * weights[1]).real.sum()
        return [y.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]

    got, expected = run(method), run("reference")
    for value, want, tolerance in zip(got, expected, [OUTPUT] * 2 + [GRADIENT] * 5, strict=True):
        close(value, want, tolerance)


@pytest.mark.parametrize("method", FAST)
@pytest.mark.parametrize("largest", [0.3, 1.0, 1.001])
def test_bfloat16_activations_keep_float32_states(method: str, largest: float) -> None:
    filter = make_filter(4, 2, largest=largest, phase=0.2)
    x = torch.randn(2, 500, 4).bfloat16()
    y, state = long_conv(x, filter, method=method)
    expected_y, expected_state = long_conv(x.float(), filter, method="reference")
    assert y.dtype == torch.bfloat16 and state.dtype == torch.complex64
    close(y.float(), expected_y, 2**-8)  # half an ulp of bfloat16's 8 bits
    close(state, expected_state, OUTPUT)


@pytest.mark.parametrize("method", MODAL)
def test_autocast_leaves_the_arithmetic_alone(method: str) -> None:
    filter, x = make_filter(4, 2, largest=0.9, phase=0.8), torch.randn(2, 200, 4)
    expected = long_conv(x, filter, method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = long_conv(x, filter, method=method)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # bfloat16 would be off by 1e-3


@pytest.mark.parametrize("method", MODAL)
@given(data=st.data())
def test_splitting_law(method: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 150))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    torch.manual_seed(length)
    decaying = METHODS[method].state == "window"
    filter = make_filter(3, 2, largest=0.9, phase=0.8) if decaying else make_filter(3, 2)
    x = torch.randn(2, length, 3)
    whole, last = long_conv(x, filter, method=method)
    state, parts = None, []
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        y, state = long_conv(x[:, start:stop], filter, state, method=method)
        parts.append(y)
    close(torch.cat(parts, dim=1), whole, OUTPUT)
    assert state is not None
    close(state, last, OUTPUT)


@pytest.mark.parametrize("method", MODAL)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_state_keeps_no_more_than_itself(method: str, batch: int) -> None:
    """A cache must not keep the arrays alive that its states were cut from."""
    filter = make_filter(3, 2, largest=0.9, phase=0.8)
    _, state = long_conv(torch.randn(batch, 300, 3), filter, method=method)
    assert state.is_contiguous()
    assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


@pytest.mark.parametrize("method", FAST)
@given(data=st.data())
def test_reset_equals_documents_alone(method: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 150))
    starts = sorted(data.draw(st.sets(st.integers(0, length - 1), max_size=6)))
    torch.manual_seed(length)
    filter, x = make_filter(3, 2), torch.randn(1, length, 3)
    first = torch.randn(1, 3, 2, dtype=torch.complex64)
    reset = torch.zeros(1, length, dtype=torch.bool)
    reset[0, starts] = True
    y, state = long_conv(x, filter, first, method=method, reset=reset)
    bounds = sorted({0, *starts, length})
    remembered: torch.Tensor | None = first if 0 not in starts else None
    for start, stop in itertools.pairwise(bounds):
        alone, remembered = long_conv(x[:, start:stop], filter, remembered, method="reference")
        close(y[:, start:stop], alone, OUTPUT)
        if stop < length:
            remembered = None
    assert remembered is not None
    close(state, remembered, OUTPUT)


@pytest.mark.parametrize("method", RESETTING)
def test_nothing_leaks_over_a_reset(method: str) -> None:
    """A boundary is exact, not a subtraction: the first document may be as large as floats go."""
    filter, x = make_filter(3, 2), torch.randn(1, 100, 3)
    reset = torch.zeros(1, 100, dtype=torch.bool)
    reset[0, 45] = True
    quiet, _ = long_conv(x, filter, method=method, reset=reset)
    x[:, :45] *= 1e30
    loud, _ = long_conv(x, filter, method=method, reset=reset)
    assert torch.equal(quiet[:, 45:], loud[:, 45:])


def test_taps_are_the_impulse_response() -> None:
    filter = make_filter(5, 3)
    impulse = torch.zeros(1, 777, 5)
    impulse[:, 0] = 1
    expected, _ = long_conv(impulse, filter, method="reference")
    close(taps(filter, 777).T, expected[0], OUTPUT)
    assert taps(filter, 0).shape == (5, 0)


def test_the_filter_build_never_makes_all_powers() -> None:
    """Neither filter nor final state makes an array of the size D·N·T."""
    channels, modes, length = 8, 8, 4096
    filter, x = make_filter(channels, modes), torch.randn(1, length, channels)
    for method in (name for name in MODAL if METHODS[name].memory == "O(T)"):
        with LargestResult() as largest:
            long_conv(x, filter, method=method)
        assert 0 < largest.numel < channels * modes * length, method


def test_powers_are_accurate_far_out() -> None:
    p = torch.polar(torch.tensor([1.0, 0.9999]), torch.tensor([0.3, 1.1]))
    far = powers(p.to(torch.complex128), 100_000)[:, -1]
    assert torch.allclose(far, p.to(torch.complex128) ** 99_999, rtol=1e-9)


@pytest.mark.parametrize(
    ("x", "state", "method", "error", "words"),
    [
        (torch.zeros(1, 0, 4), None, "auto", InputError, "T>=1"),
        (torch.zeros(1, 5, 3), None, "auto", InputError, "3 channels cannot share 4 filters"),
        (torch.zeros(1, 5, 4), torch.zeros(2, 4, 2, dtype=torch.complex64), "auto", InputError, "state must be"),
        (torch.zeros(1, 5, 4), None, "magic", UnsupportedError, "recurrence"),
    ],
)
def test_bad_inputs(x: torch.Tensor, state: torch.Tensor | None, method: str, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        long_conv(x, make_filter(4, 2), state, method=method)


@pytest.mark.parametrize("method", MODAL)
def test_the_table_tells_the_state(method: str) -> None:
    """Methods that keep modes continue from each other; a window is another kind of state, and an error names it."""
    filter, x = make_filter(4, 2, largest=0.9, phase=0.8), torch.randn(1, 50, 4)
    _, state = long_conv(x[:, :20], filter, method=method)
    assert ("modes" if state.is_complex() else "window") == METHODS[method].state
    expected, last = long_conv(x, filter, method="reference")
    y, after = long_conv(x[:, 20:], filter, state)  # auto continues from any of them
    close(y, expected[:, 20:], OUTPUT)
    for other in MODAL:
        if METHODS[other].state != METHODS[method].state:
            with pytest.raises(InputError, match="window"):
                long_conv(x[:, 20:], filter, state, method=other)
        elif state.is_complex():
            y, after = long_conv(x[:, 20:], filter, state, method=other)
            close(y, expected[:, 20:], OUTPUT)
            close(after, last, OUTPUT)


@pytest.mark.parametrize("method", FAST)
def test_poles_far_outside_the_unit_circle(method: str) -> None:
    """|p| = 1.05 grows by 10^21 in 1,000 steps: still the reference, relative to the largest output."""
    filter, x = make_filter(4, 2, largest=1.05), torch.randn(1, 1000, 4)
    expected, last = long_conv(x, filter, method="reference")
    y, state = long_conv(x, filter, method=method)
    for channel in range(4):
        close(y[..., channel], expected[..., channel], OUTPUT)
    close(state, last, OUTPUT)


@pytest.mark.parametrize("method", FAST)
def test_repeated_and_crowded_poles(method: str) -> None:
    """Equal poles, poles at zero, and the crowd near 1 that S4D-Lin begins with."""
    step = 1e-3
    crowd = torch.polar(torch.full((8,), math.exp(-0.5 * step)), step * torch.pi * torch.arange(8))
    poles = torch.stack([crowd, crowd[:1].expand(8), torch.zeros(8), 0.9 * crowd.conj()])
    filter, x = ModalFilter(poles, torch.randn(4, 8, dtype=torch.complex64)), torch.randn(1, 700, 4)
    for value, want in zip(long_conv(x, filter, method=method), long_conv(x, filter, method="reference"), strict=True):
        close(value, want, OUTPUT)
