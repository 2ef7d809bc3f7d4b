"""Every kind of filter, every method, shared by groups: the oracle, the splitting law, resets, gradients."""

import itertools
import random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops import (
    CanonicalFilter,
    ExplicitFilter,
    Filter,
    ModalFilter,
    RealModalFilter,
    hyena,
    long_conv,
    to_canonical,
)
from hyaena.ops.long_conv import by_document, long_conv_states
from watching import LargestResult

CHANNELS = 6
GROUPS = [1, 2, CHANNELS]


def real_modes(groups: int, skip: Tensor | None) -> RealModalFilter:
    return RealModalFilter(-torch.rand(groups, 3), torch.randn(groups, 3), skip)


def complex_modes(groups: int, skip: Tensor | None) -> ModalFilter:
    poles = torch.polar(0.5 + 0.45 * torch.rand(groups, 2), 3 * torch.rand(groups, 2))
    return ModalFilter(poles, torch.randn(groups, 2, dtype=torch.complex64), skip)


def canonical(groups: int, skip: Tensor | None) -> CanonicalFilter:
    b, a, _ = to_canonical(complex_modes(groups, None))
    return CanonicalFilter(b, a, skip)  # float64, as converted: float32 coefficients lose digits of the poles


def taps(count: int):
    return lambda groups, skip: ExplicitFilter(torch.randn(groups, count) / count**0.5, skip)


MAKE = {
    "complex": complex_modes,
    "real": real_modes,
    "canonical": canonical,
    "taps-1": taps(1),
    "taps-7": taps(7),
    "taps-128": taps(128),
}
CASES = [(kind, method) for kind, make in MAKE.items() for method in make(1, None).methods]
# float32 sums of up to 150 terms of size 1, each rounded to 6e-8 of the sum
OUTPUT = 2e-5


def filter_of(kind: str, groups: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MAKE[kind](groups, torch.randn(CHANNELS))


def spread(filter: Any) -> Any:
    """The same filters, one for each channel, in float64."""
    *numbers, skip = filter
    wide = [t.repeat_interleave(CHANNELS // filter.groups, 0) for t in numbers]
    return type(filter)(*(t.to(torch.promote_types(t.dtype, torch.float64)) for t in wide), skip.double())


def some_state(filter: Filter, method: str) -> Tensor:
    return torch.randn_like(filter.initial_state(2, CHANNELS, method))


def close(value: Tensor, expected: Tensor, tolerance: float = OUTPUT) -> None:
    assert torch.isfinite(torch.view_as_real(value) if value.is_complex() else value).all()
    if expected.numel():
        assert float((value - expected).abs().max() / expected.abs().max().clamp(min=1e-6)) < tolerance


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_equals_the_reference_of_each_channel_alone(kind: str, method: str, groups: int) -> None:
    for length in (1, 15, 16, 130):
        filter, x = filter_of(kind, groups), torch.randn(2, length, CHANNELS)
        state = None if method == "truncated" else some_state(filter, method)
        y, after = long_conv(x, filter, state, method=method)
        expected, last = long_conv(x.double(), spread(filter), state, method="reference")
        assert y.dtype == torch.float32 and y.shape == x.shape
        close(y.double(), expected)
        if after.shape == last.shape:
            close(after, last)
        assert after.shape[:2] == (2, CHANNELS)
        assert after.dtype == filter.initial_state(2, CHANNELS, method).dtype


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_batch_of_no_rows_is_convolved_to_none(kind: str, method: str) -> None:
    filter, x = filter_of(kind, 2), torch.randn(0, 33, CHANNELS)
    for reset in (None, torch.ones(0, 33, dtype=torch.bool)):
        y, after = long_conv(x, filter, method=method, reset=reset)
        wanted = filter.initial_state(0, CHANNELS, method)
        assert y.shape == x.shape and (after.shape, after.dtype) == (wanted.shape, wanted.dtype)
    assert [state.shape for state in long_conv_states(x, filter, after, [1, 33])] == [after.shape] * 2


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("kind", "method"), [*CASES, *((kind, "auto") for kind in MAKE)])
def test_splitting_law(kind: str, method: str, groups: int) -> None:
    for length, count in ((2, 1), (random.randint(3, 40), 2), (random.randint(41, 150), 3)):
        cuts = sorted(random.sample(range(1, length), count))
        filter = filter_of(kind, groups, seed=length)
        x = torch.randn(2, length, CHANNELS)
        state = some_state(filter, method)
        whole, last = long_conv(x, filter, state, method=method)
        parts = []
        for start, stop in itertools.pairwise([0, *cuts, length]):
            y, state = long_conv(x[:, start:stop], filter, state, method=method)
            parts.append(y)
        close(torch.cat(parts, dim=1), whole)
        close(state, last)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_reset_equals_documents_alone(kind: str, method: str, groups: int) -> None:
    """Rows have boundaries of their own: none, at the first step, at neighbouring steps, anywhere."""
    alone = "truncated" if method == "truncated" else "reference"
    middle, length = random.randint(2, 60), random.randint(62, 120)
    for boundaries, steps in (([[0], []], 3), ([[middle, middle + 1], [0, random.randint(1, length - 1)]], length)):
        filter = filter_of(kind, groups, seed=steps)
        x, before = torch.randn(2, steps, CHANNELS), some_state(filter, method)
        reset = torch.zeros(2, steps, dtype=torch.bool)
        for row, starts in enumerate(boundaries):
            reset[row, starts] = True
        y, after = long_conv(x, filter, before, method=method, reset=reset)
        for row, starts in enumerate(boundaries):
            state = before[row : row + 1]
            for start, stop in itertools.pairwise(sorted({0, *starts, steps})):
                if start in starts:
                    state = torch.zeros_like(before[row : row + 1])
                expected, state = long_conv(x[row : row + 1, start:stop], filter, state, method=alone)
                close(y[row : row + 1, start:stop], expected)
            close(after[row : row + 1], state)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_nothing_leaks_over_a_reset(kind: str, method: str) -> None:
    """A boundary is a selection, not a subtraction: the document before it may overflow."""
    filter, x = filter_of(kind, 2), torch.randn(1, 100, CHANNELS)
    reset = torch.arange(100)[None] == 45
    quiet, last = long_conv(x, filter, method=method, reset=reset)
    for loud in (1e30, torch.inf):
        x[:, :45] = loud
        y, after = long_conv(x, filter, method=method, reset=reset)
        assert torch.equal(y[:, 45:], quiet[:, 45:]) and torch.equal(after, last)


@pytest.mark.parametrize(("kind", "method"), CASES)
@pytest.mark.parametrize("documents", [False, True])
def test_gradients(kind: str, method: str, documents: bool) -> None:
    """Of the input, the numbers of shared filters, the skip and the state, against float64 differences."""
    kind_of, length = type(filter_of(kind, 2)), 40
    numbers = [t.to(torch.promote_types(t.dtype, torch.float64)) for t in filter_of(kind, 2)]
    state = kind_of(*numbers).initial_state(1, CHANNELS, method)
    if method == "truncated" and kind in ("complex", "real"):
        state = state[..., :40]  # the window decides the number of taps; the default is long
    reset = torch.arange(length)[None] % 17 == 16 if documents else None
    x = torch.randn(1, length, CHANNELS, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, torch.randn_like(state), *numbers)]

    def run(x: Tensor, state: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
        y, after = long_conv(x, kind_of(*numbers), state, method=method, reset=reset)
        return y, torch.view_as_real(after) if after.is_complex() else after

    assert torch.autograd.gradcheck(run, leaves, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("method", [name for name in RealModalFilter.methods if name not in ("reference", "truncated")])
def test_slow_real_modes_keep_their_rate(method: str) -> None:
    """Poles of 1 - 1e-5 over 100,000 steps: float32 poles would be off by 3e-3 of their rate, and the states by 2e-3.

    The step loop, here over fewer steps, rounds its state at each: 3e-8·sqrt(T) of it, at random. Measured at 100,000:
    4e-6; other methods 6e-7.
    """
    rates = torch.tensor([[1e-5, 3e-5, 2e-4]], dtype=torch.float64)
    filter = RealModalFilter(torch.log1p(-rates).float(), torch.tensor([[1.0, -0.5, 2.0]]))
    x = torch.randn(1, 30_000 if method == "recurrence" else 100_000, 1)
    exact = RealModalFilter(filter.log_poles.double(), filter.residues.double())
    expected, last = long_conv(x.double(), exact, method="fft")
    y, after = long_conv(x, filter, method=method)
    tolerance = 2e-5 if method == "recurrence" else 2e-6
    close(y.double(), expected, tolerance)
    close(after.double(), last, tolerance)


def growing(kind: str, largest: float) -> Filter:
    sizes = torch.tensor([[largest, 0.9], [largest, 0.5], [0.99, 0.8]])
    if kind == "real":
        return RealModalFilter(sizes.double().log().float(), torch.randn(3, 2))
    poles = torch.polar(sizes, torch.tensor([[0.3, 1.0], [0.0, 2.0], [1.0, 2.0]]))
    return ModalFilter(poles, torch.randn(3, 2, dtype=torch.complex64))


GROWING = [
    (kind, method) for kind in ("complex", "real") for method in MAKE[kind](1, None).methods if method != "truncated"
]


@pytest.mark.parametrize(("largest", "length"), [(1.0, 4000), (1.003, 8000), (1.05, 1500)])
@pytest.mark.parametrize("kind", ["complex", "real"])
def test_errors_grow_with_the_outputs(kind: str, largest: float, length: int) -> None:
    """Outputs grow by 10^10 and 10^31. Errors are relative to the outputs so far, not to those to come.

    Measured: below 1e-5; through an undamped FFT, the first outputs of the second case would be off by 1e3.
    """
    filter, x = growing(kind, largest), torch.randn(1, length, 3)
    expected, last = long_conv(x.double(), filter, method="reference")
    scale = expected.abs().cummax(dim=1).values
    scale = scale.clamp(min=scale[:, 64:65])  # the first outputs may be small by chance
    for method in filter.methods:
        if method in ("reference", "truncated"):
            continue
        y, state = long_conv(x, filter, method=method)
        assert float(((y - expected).abs() / scale).max()) < OUTPUT, method
        assert float(((state - last).abs() / last.abs()).max()) < 1e-4, method  # a mode alone may cancel a digit


@pytest.mark.parametrize(("kind", "method"), GROWING)
def test_zeros_stay_zeros_where_powers_overflow(kind: str, method: str) -> None:
    """1.5^5000 is 10^880, beyond float64: padding contributes nothing all the same."""
    filter, x = growing(kind, 1.5), torch.randn(1, 20, 3)
    padded = torch.cat([torch.zeros(1, 5000, 3), x], dim=1)
    expected, last = long_conv(x, filter, method=method)
    y, state = long_conv(padded, filter, method=method)
    assert float(y[:, :5000].abs().max()) < 1e-5  # an FFT rounds before the first input, too
    close(y[:, 5000:], expected)
    close(state, last)


def test_spectra_and_matrices_are_made_once_for_a_group() -> None:
    """Nothing of the size of a filter for every channel, or of a matrix for every channel, is made."""
    channels, length = 64, 256
    for filter in (
        RealModalFilter(-torch.rand(1, 2), torch.randn(1, 2)),
        ExplicitFilter(torch.randn(1, 200)),
    ):
        for method in ("blocked", "fft"):
            with LargestResult() as largest:
                long_conv(torch.randn(1, length, channels), filter, method=method)
            assert largest.numel <= 8 * channels * length, (filter, method)  # the spectrum and padding of the input


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_taps_of_half_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    h, x = torch.randn(CHANNELS, 7).to(dtype), torch.randn(1, 50, CHANNELS).to(dtype)
    y, window = long_conv(x, ExplicitFilter(h))
    expected, _ = long_conv(x.double(), ExplicitFilter(h.double()))
    assert window.dtype == torch.float32 and torch.equal(window, x[:, -6:].transpose(1, 2).float())
    assert torch.equal(y, expected.float().to(dtype))  # one rounding


@pytest.mark.parametrize(
    ("filter", "state", "words"),
    [
        (RealModalFilter(torch.zeros(4, 2), torch.zeros(4, 2)), None, "6 channels cannot share 4 filters"),
        (RealModalFilter(torch.zeros(12, 2), torch.zeros(12, 2)), None, "6 channels cannot share 12 filters"),
        (ExplicitFilter(torch.zeros(2, 4), torch.zeros(2)), None, r"skip must be of shape \(6,\)"),
        (ExplicitFilter(torch.zeros(2, 4)), torch.zeros(1, 6, 4), r"must be \(1, 6, 3\)"),
        (ExplicitFilter(torch.zeros(2, 4)), torch.zeros(1, 6, 3) + 0j, "real window"),
        (RealModalFilter(torch.zeros(2, 4), torch.zeros(2, 4)), torch.zeros(1, 6, 4) + 0j, "real state"),
        (RealModalFilter(torch.zeros(2, 4), torch.zeros(2, 4)), torch.zeros(1, 2, 4), r"must be \(1, 6, 4\)"),
    ],
)
def test_mistakes_are_named(filter: Any, state: Tensor | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        long_conv(torch.zeros(1, 5, CHANNELS), filter, state)
    with pytest.raises(InputError, match="reset"):
        long_conv(torch.zeros(1, 5, 12), filter._replace(skip=None), reset=torch.zeros(5, dtype=torch.bool))


# --- kinds of this file's own ----------------------------------------------------------------------------------------


class LeakyIntegrator(NamedTuple):
    """``s[t] = decay·s[t-1] + x[t]``, ``y[t] = s[t]``."""

    decay: Tensor
    skip: Tensor | None = None

    @property
    def groups(self) -> int:
        return len(self.decay)

    @property
    def dtype(self) -> torch.dtype:
        return self.decay.dtype

    def initial_state(self, batch: int, channels: int, method: str = "auto") -> Tensor:
        return torch.zeros(batch, channels, dtype=self.dtype, device=self.decay.device)

    def check_state(self, state: Tensor, batch: int, channels: int, method: str = "auto") -> None:
        if state.shape != (batch, channels):
            raise InputError("not the state of an integrator")

    def choose_method(self, length: int, state: Tensor | None = None) -> str:
        return "steps"

    def steps(self, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(x.shape[1]):
            if reset is not None:
                state = torch.where(reset[:, t, None], 0, state)
            state = self.decay * state + x[:, t]
            outputs.append(state)
        return torch.stack(outputs, dim=1), state

    methods = {"steps": steps}  # noqa: RUF012


class Delay(NamedTuple):
    """``y[t] = gain·x[t-lag]``; it resets between documents only."""

    gain: Tensor
    lag: int
    skip: Tensor | None = None

    @property
    def groups(self) -> int:
        return len(self.gain)

    @property
    def dtype(self) -> torch.dtype:
        return self.gain.dtype

    def initial_state(self, batch: int, channels: int, method: str = "auto") -> Tensor:
        return torch.zeros(batch, channels, self.lag, dtype=self.dtype, device=self.gain.device)

    def check_state(self, state: Tensor, batch: int, channels: int, method: str = "auto") -> None:
        if state.shape != (batch, channels, self.lag):
            raise InputError("not the state of a delay")

    def choose_method(self, length: int, state: Tensor | None = None) -> str:
        return "shift"

    def shift(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        line = torch.cat([state, x.transpose(1, 2)], dim=-1)
        return self.gain * line[..., : x.shape[1]].transpose(1, 2), line[..., x.shape[1] :]

    methods = {"shift": by_document(shift)}  # noqa: RUF012


def as_modes(filter: LeakyIntegrator) -> RealModalFilter:
    return RealModalFilter(filter.decay.log().unsqueeze(-1), torch.ones(filter.groups, 1).double(), filter.skip)


def as_taps(filter: Delay) -> ExplicitFilter:
    return ExplicitFilter(torch.nn.functional.pad(filter.gain.unsqueeze(-1), (filter.lag, 0)), filter.skip)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", ["integrator", "delay"])
@settings(max_examples=8)
@given(data=st.data())
def test_a_kind_of_ones_own(kind: str, groups: int, data: st.DataObject) -> None:
    """In ``long_conv`` and ``hyena``, in pieces and with documents, it equals the same filter of a kind of the package.

    The latter are held to the oracle above.
    """
    length = data.draw(st.integers(2, 40))
    cut = data.draw(st.integers(1, length - 1))
    torch.manual_seed(length)
    skip = torch.randn(CHANNELS).double()
    if kind == "integrator":
        filter = LeakyIntegrator(0.1 + 0.8 * torch.rand(groups).double(), skip)
        known = as_modes(filter)
    else:
        filter = Delay(torch.randn(groups).double(), data.draw(st.integers(1, 9)), skip)
        known = as_taps(filter)
    reset = torch.rand(2, length) < 0.2 if data.draw(st.booleans()) else None
    z, weight, bias = (torch.randn(*shape).double() for shape in ((2, length, 18), (18, 3), (18,)))
    expected, last = hyena(z, weight, bias, known, reset=reset, method="reference")
    state, parts = None, []
    for part in (slice(0, cut), slice(cut, length)):
        y, state = hyena(z[:, part], weight, bias, filter, state, reset=None if reset is None else reset[:, part])
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)
    torch.testing.assert_close(state.long.flatten(), last.long.flatten())
    x = z[..., :CHANNELS]
    torch.testing.assert_close(long_conv(x, filter)[0], long_conv(x, known, method="reference")[0])


def test_a_kind_has_its_own_methods_only() -> None:
    with pytest.raises(UnsupportedError, match="'fft' takes no Delay: choose auto, shift"):
        long_conv(torch.zeros(1, 3, 2), Delay(torch.ones(1), 2), method="fft")
    with pytest.raises(UnsupportedError, match="'slide' is unknown: choose auto, shift"):
        long_conv(torch.zeros(1, 3, 2), Delay(torch.ones(1), 2), method="slide")
    with pytest.raises(InputError, match="not the state of a delay"):
        long_conv(torch.zeros(1, 3, 2), Delay(torch.ones(1), 2), torch.zeros(1, 2, 3))
