"""The operator over several rows without padding against each row alone, step by step in float64."""

from __future__ import annotations

import pytest
import torch

from device import DEVICE
from hyaena.ops import HyenaState, ModalFilter, hyena
from hyaena.ops.hyena import RowTables
from hyaena.ops.triton import can_overlap
from hyaena.ops.triton.decode.packed_hyena import CHANNELS, TOGETHER, packed_hyena

# sums of float32; one rounding of the result, which the interpreter cuts off
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def tables(counts: list[int], stops: list[list[int]], ahead: int) -> RowTables:
    """The rows one after another behind ``ahead`` other places, parts of one tensor as a pass has them."""
    begins = [ahead + sum(counts[:row]) for row in range(len(counts))]
    ends = [sum(map(len, stops[:row])) for row in range(len(counts) + 1)]
    parts = [begins, counts, ends, [stop for row in stops for stop in row] or [0]]
    numbers = torch.tensor([n for part in parts for n in part], dtype=torch.int32, device=DEVICE)
    return RowTables(*numbers.split([len(part) for part in parts]))


def random_state(rows: int, channels: int, modes: int, taps: int, dtype: torch.dtype) -> HyenaState:
    short = torch.randn(rows, 3 * channels, taps - 1).to(DEVICE, dtype)
    return HyenaState(short, torch.randn(rows, channels, modes, dtype=torch.complex64).to(DEVICE))


@pytest.mark.parametrize(
    ("counts", "stops", "channels", "modes", "taps", "dtype"),
    [
        ([1], [[]], 5, 1, 1, torch.float32),
        ([TOGETHER, TOGETHER - 1, 2 * TOGETHER + 3], [[], [], []], CHANNELS + 3, 2, 3, torch.bfloat16),
        ([0, 5, TOGETHER + 1, 0], [[], [5], [1, TOGETHER, TOGETHER + 1], []], CHANNELS, 3, 4, torch.float32),
        ([3 * TOGETHER], [[TOGETHER - 1, 2 * TOGETHER + 1]], 7, 2, 3, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("bare", [False, True])
def test_rows_are_what_they_are_alone(
    counts: list[int], stops: list[list[int]], channels: int, modes: int, taps: int, dtype: torch.dtype, bare: bool
) -> None:
    """``bare`` leaves out all that may be None."""
    poles = torch.polar(torch.rand(channels, modes) * 0.5 + 0.5, torch.rand(channels, modes) * 3).to(DEVICE)
    residues = torch.randn(channels, modes, dtype=torch.complex64).to(DEVICE)
    skip = None if bare else torch.randn(channels).to(DEVICE)
    weight = torch.randn(3 * channels, taps).to(DEVICE)
    bias = None if bare else torch.randn(3 * channels).to(DEVICE)
    ahead = 3
    z = torch.randn(ahead + sum(counts), 3 * channels).to(DEVICE, dtype)
    state = random_state(len(counts), channels, modes, taps, dtype)
    copies = random_state(sum(map(len, stops)), channels, modes, taps, dtype) if any(stops) else None
    wide = ModalFilter(poles.to(torch.complex128), residues.to(torch.complex128), None if bare else skip.double())

    def alone(row: int, count: int) -> tuple[torch.Tensor, ...]:
        """y and both states of a row after so many tokens."""
        begin = ahead + sum(counts[:row])
        before = HyenaState(state.short[row : row + 1].double(), state.long[row : row + 1].to(torch.complex128))
        part = z[None, begin : begin + count].double()
        if count == 0:
            return part[0, :, :channels], *before.tensors()
        y, after = hyena(part, weight.double(), None if bare else bias.double(), wide, before, method="recurrence")
        return y[0], *after.tensors()

    expected = [alone(row, count) for row, count in enumerate(counts)]
    copied = [alone(row, stop)[1:] for row, places in enumerate(stops) for stop in places]
    y = packed_hyena(
        z, weight, bias, ModalFilter(poles, residues, skip), state, tables(counts, stops, ahead), copies,
        overlap=can_overlap(torch.device(DEVICE)),
    )  # fmt: skip
    got = [y[ahead:], state.short, state.long]
    want = [torch.cat(parts) for parts in zip(*expected, strict=True)]
    if copies is not None:
        got += copies.tensors()
        want += [torch.cat(parts) for parts in zip(*copied, strict=True)]
    for value, wanted in zip(got, want, strict=True):
        assert value.shape == wanted.shape
        if wanted.numel():
            error = float((value.to(wanted.dtype) - wanted).abs().max() / wanted.abs().max())
            assert error <= TOLERANCE[dtype if value.dtype == dtype else torch.float32], error  # NaN fails too
