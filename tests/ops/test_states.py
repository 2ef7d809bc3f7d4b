"""States inside a sequence, without its outputs, are those that a shorter sequence leaves."""

from __future__ import annotations

import pytest
import torch

from hyaena import ops
from hyaena.ops.long_conv import long_conv, long_conv_states, long_conv_with_states

FILTERS = {
    "complex": lambda n: ops.ModalFilter(
        torch.polar(torch.rand(n, 3) * 0.4 + 0.6, torch.randn(n, 3)), torch.randn(n, 3, dtype=torch.complex64)
    ),
    "real": lambda n: ops.RealModalFilter(-torch.rand(n, 4) * 0.1, torch.randn(n, 4)),
    "taps": lambda n: ops.ExplicitFilter(torch.randn(n, 7)),
    "canonical": lambda n: ops.to_canonical(
        ops.ModalFilter(torch.polar(torch.rand(n, 2) * 0.3 + 0.5, torch.randn(n, 2)), torch.randn(n, 2) + 0j)
    ),
}


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("stops", [[1], [64, 128, 192, 200], [3, 4, 150]])
@pytest.mark.parametrize("past", [False, True])
def test_states_of_a_filter(kind: str, groups: int, stops: list[int], past: bool) -> None:
    made = FILTERS[kind](groups)
    x = torch.randn(2, 200, 6)
    state = None
    if past:
        _, state = long_conv(torch.randn(2, 9, 6), made, None)
    for stop, found in zip(stops, long_conv_states(x, made, state, stops), strict=True):
        _, want = long_conv(x[:, :stop], made, state)
        assert found.dtype == want.dtype
        torch.testing.assert_close(found, want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize(
    ("length", "stops"), [(200, [64, 128, 192]), (200, [3, 64, 65, 199, 200]), (20, [7]), (5, [2])]
)
def test_states_beside_the_outputs(kind: str, groups: int, length: int, stops: list[int]) -> None:
    made, x = FILTERS[kind](groups), torch.randn(2, length, 6)
    _, state = long_conv(torch.randn(2, 9, 6), made, None)
    y, after, found = long_conv_with_states(x, made, state, stops)
    want = long_conv(x, made, state)
    assert torch.equal(y, want[0]) and torch.equal(after, want[1])
    for one, other in zip(found, long_conv_states(x, made, state, stops), strict=True):
        assert one.dtype == other.dtype and one.is_contiguous()
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


def test_the_window_of_a_cut_filter_has_states_too() -> None:
    made = FILTERS["complex"](6)
    x = torch.randn(1, 90, 6)
    _, state = long_conv(torch.randn(1, 5, 6), made, None, method="truncated")
    (found,) = long_conv_states(x, made, state, [64])
    _, want = long_conv(x[:, :64], made, state)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize(("length", "stops"), [(200, [1, 31, 32, 33, 199, 200]), (160, [160, 5, 7]), (9, [2, 9, 1])])
def test_states_of_rows_after_numbers_of_their_own(kind: str, groups: int, length: int, stops: list[int]) -> None:
    """What follows in a row is nothing to its state, be it not finite."""
    made, x = FILTERS[kind](groups), torch.randn(len(stops), length, 6)
    _, state = long_conv(torch.randn(len(stops), 9, 6), made, None)
    want = [long_conv(x[row, None, :n], made, state[row, None])[1] for row, n in enumerate(stops)]
    (found,) = long_conv_states(x, made, state, [torch.tensor(stops)])
    torch.testing.assert_close(found, torch.cat(want), atol=2e-4, rtol=2e-4)
    if kind != "canonical":  # whose rows are read one by one
        for row, n in enumerate(stops):
            x[row, n:] = torch.nan
    y, _, (beside,) = long_conv_with_states(x, made, state, [torch.tensor(stops)], method="recurrence")
    torch.testing.assert_close(beside, torch.cat(want), atol=2e-4, rtol=2e-4)
    assert all(bool(y[row, :n].isfinite().all()) for row, n in enumerate(stops))


@pytest.mark.parametrize("masked", [False, True])
def test_states_of_the_operator(masked: bool) -> None:
    made, weight, bias = FILTERS["complex"](6), torch.randn(18, 3), torch.randn(18)
    z = torch.randn(2, 100, 18)
    mask = None
    if masked:
        mask = torch.ones(2, 100, dtype=torch.bool)
        mask[1, :10] = False
    stops = [1, 2, 64, 99]
    y, last, states = ops.hyena_states(z, weight, bias, made, None, stops, mask=mask, backend="plain")
    whole = ops.hyena(z, weight, bias, made, mask=mask, backend="plain")
    assert torch.equal(y, whole[0]) and all(map(torch.equal, last, whole[1]))
    for stop, found in zip(stops, states, strict=True):
        cut = None if mask is None else mask[:, :stop]
        _, want = ops.hyena(z[:, :stop], weight, bias, made, mask=cut, backend="plain")
        for mine, theirs in zip(found, want, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
