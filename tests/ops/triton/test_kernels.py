"""Every kernel against the plain operator in float64: outputs, both states, all gradients, at awkward sizes."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena.ops import HyenaState, ModalFilter, RealModalFilter, hyena
from hyaena.ops.triton.decode.operators import FusedDecodeOperators
from hyaena.ops.triton.hyena import launch, modal_launch
from hyaena.ops.triton.hyena.launch import (
    BackwardTiling,
    Operands,
    Tiling,
    age,
    backward,
    choose_stages,
    choose_tiling,
    find_boundaries,
    forward,
    segment_bits,
)

# float32 sums of up to a thousand terms, and the rounding of the output's own type: half an ulp of float16's 11 bits,
# and of bfloat16's 8; the interpreter cuts bfloat16 off where the device rounds, which is up to a whole ulp
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2 ** (-8 if DEVICE == "cuda" else -7)}
# a gradient sums over T steps once more, and the derivative of p^t carries a factor t
GRADIENT = 1e-5

# Several tiles, segments and blocks of channels from few steps.
SMALL = Tiling(channels=4, segments=2, steps=4, group=2)

AWKWARD = (1, 2, 3, 63, 1000)


def exact(problem: Operands) -> tuple[list[Tensor | None], Tensor, Tensor, Tensor]:
    """Leaves in float64 (all but mask and reset), and what the plain operator makes of them."""
    wide = [None if t is None else t.double().requires_grad_() for t in problem[:8]]
    z, weight, bias, poles, residues, skip, short, long = wide
    assert z is not None and weight is not None and poles is not None and residues is not None
    if problem.real:
        filter = RealModalFilter(poles.flatten(1), residues.flatten(1), skip)
    else:
        filter = ModalFilter(torch.view_as_complex(poles), torch.view_as_complex(residues), skip)
    if short is None:
        short = z.new_zeros(z.shape[0], z.shape[2], weight.shape[1] - 1)
    if long is None:
        long = z.new_zeros(z.shape[0], *poles.shape)
    state = HyenaState(short, long.flatten(2) if problem.real else torch.view_as_complex(long))
    y, state = hyena(z, weight, bias, filter, state, mask=problem.mask, reset=problem.reset, method="recurrence")
    after = state.long.unflatten(2, (-1, 2)) if problem.real else torch.view_as_real(state.long)
    return wide, y, state.short, after


def boundaries(length: int, *rows: tuple[int, ...]) -> Tensor:
    """reset [B,T], True at the given steps of each row."""
    reset = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, steps in zip(reset, rows, strict=True):
        row[list(steps)] = True
    return reset.to(DEVICE)


def make(
    length: int,
    channels: int = 5,
    modes: int = 2,
    taps: int = 3,
    *,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    padded: bool = False,
    bare: bool = False,
    documents: bool = False,
    real: bool = False,
) -> Operands:
    """A random problem, one pole on the unit circle; ``bare`` leaves out all that may be None.

    With ``documents`` about every seventh step begins a document, the last one among them.
    """
    size = torch.rand(channels, modes) * 0.5 + 0.5
    size[0, 0] = 1.0
    poles = torch.view_as_real(torch.polar(size, torch.rand(channels, modes) * 3))
    if real:
        poles = -(torch.rand(channels, modes, 2) ** 3)
        poles[0, 0] = 0.0
    mask = None
    if padded:
        mask = torch.arange(length) >= torch.randint(0, length, (batch, 1))
    reset = None
    if documents:
        reset = torch.rand(batch, length) < 0.15
        reset[0, -1] = True
    problem = Operands(
        torch.randn(batch, length, 3 * channels).to(dtype),
        torch.randn(3 * channels, taps),
        torch.randn(3 * channels),
        poles,
        torch.randn(channels, modes, 2),
        torch.randn(channels),
        torch.randn(batch, 3 * channels, taps - 1).to(dtype),
        torch.randn(batch, channels, modes, 2),
        mask,
        reset,
    )
    if bare:
        problem = problem._replace(bias=None, skip=None, short=None, long=None)
    return Operands(*(None if t is None else t.to(DEVICE) for t in problem[:-1]), real=real)


# (dtype, padded; None: packed documents) and (modes, channels, parts of time): every type with every number of modes,
# in the tiling that a device is given. Compiling each pair takes long, so the rest varies along.
KINDS = ((torch.float32, False), (torch.bfloat16, True), (torch.float16, False), (torch.bfloat16, None))
SIZES = ((1, 100, 1), (2, 100, None), (3, 33, 1), (4, 100, 1), (8, 33, 1), (16, 100, 1))


@pytest.fixture(params=itertools.product(KINDS, SIZES), ids=lambda p: f"{p[0][0]}-{p[1][0]}".removeprefix("torch."))
def compiled(request: pytest.FixtureRequest) -> tuple[Operands, Tiling]:
    if DEVICE == "cpu":
        pytest.skip("minutes under the interpreter")
    (dtype, padded), (modes, channels, parts) = request.param
    problem = make(sum(AWKWARD), channels, modes, dtype=dtype, padded=bool(padded))
    if padded is None:
        problem = problem._replace(reset=torch.rand(2, sum(AWKWARD), device=DEVICE) < 0.02)
    return problem, replace(choose_tiling(modes, dtype), parts=parts)


def close(value: Tensor, expected: Tensor, tolerance: float) -> None:
    expected = expected.detach()
    assert value.shape == expected.shape
    assert torch.isfinite(value).all()
    if expected.numel():
        error = (value - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        assert float(error) < tolerance


def check_forward(problem: Operands, tiling: Tiling | None) -> None:
    got = forward(problem, tiling)
    _, *expected = exact(problem)
    for value, want in zip(got, expected, strict=True):
        close(value, want, TOLERANCE[value.dtype])


@pytest.mark.parametrize("length", [1, 2, 3, 63, 130])
def test_forward_at_awkward_lengths(length: int) -> None:
    check_forward(make(length), None)


@pytest.mark.parametrize("length", [7, 8, 9, 31])
def test_forward_over_several_tiles(length: int) -> None:
    check_forward(make(length, padded=length == 31), SMALL)


@pytest.mark.parametrize(("parts", "length"), [(2, 17), (3, 40)])
def test_forward_in_parts_of_time(parts: int, length: int) -> None:
    check_forward(make(length, channels=3, batch=1), Tiling(4, 2, 4, 1, parts=parts))


@pytest.mark.parametrize("group", [1, 4])
def test_forward_gathers_steps(group: int) -> None:
    check_forward(make(30, batch=1), Tiling(8, 4, 8, group=group))


@pytest.mark.parametrize("modes", [1, 3, 8, 16])
def test_forward_with_any_number_of_modes(modes: int) -> None:
    check_forward(make(11, modes=modes, batch=1), Tiling(8, 2, 4, 1))


@pytest.mark.parametrize("modes", [3, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_in_the_tiling_of_its_modes(modes: int, dtype: torch.dtype) -> None:
    check_forward(make(150, channels=2, modes=modes, batch=1, dtype=dtype), None)


@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("documents", [False, True])
def test_forward_with_real_modes(length: int, documents: bool) -> None:
    check_forward(make(length, modes=3, real=True, documents=documents), SMALL)


def test_forward_where_padding_is_anywhere() -> None:
    problem = make(29, channels=3, padded=True)
    check_forward(problem._replace(mask=torch.rand(2, 29, device=DEVICE) > 0.4), SMALL)


def test_padding_is_handed_over_by_segments() -> None:
    mask = torch.rand(2, 23) > 0.5
    for row, bits in zip(mask.tolist(), segment_bits(mask, 8, 2).tolist(), strict=True):
        assert len(bits) == 3
        for segment, word in enumerate(bits):
            for i in range(10):
                step = 8 * segment + i - 2
                assert (word >> i) & 1 == (step < 0 or (step < 23 and row[step]))


@pytest.mark.parametrize(("room", "stages"), [(232_448, 3), (101_376, 2), (49_152, 1)])
def test_no_more_tiles_are_under_way_than_fit(monkeypatch: pytest.MonkeyPatch, room: int, stages: int) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(shared_memory_per_block_optin=room)
    )
    assert choose_stages(Tiling(), 3, 2, torch.device("cuda")) == stages


@pytest.mark.parametrize("taps", [1, 2, 8])
def test_forward_with_any_number_of_taps(taps: int) -> None:
    check_forward(make(11, taps=taps, batch=1, padded=True), SMALL)


@pytest.mark.parametrize("channels", [33, 64])
def test_forward_over_blocks_of_channels(channels: int) -> None:
    check_forward(make(20, channels=channels, padded=True), Tiling(16, 4, 8, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [5, 6])
def test_forward_in_narrow_types(dtype: torch.dtype, channels: int) -> None:
    """An even number of channels is packed, two in a lane."""
    check_forward(make(50, channels, dtype=dtype), None)


def test_forward_whole_and_in_parts_of_awkward_lengths(compiled: tuple[Operands, Tiling]) -> None:
    problem, tiling = compiled
    _, *expected = exact(problem)
    whole = forward(problem, tiling)
    y, short, long = [], problem.short, problem.long
    for start, length in zip(itertools.accumulate(AWKWARD, initial=0), AWKWARD, strict=False):
        here = slice(start, start + length)
        mask, reset = (None if t is None else t[:, here] for t in (problem.mask, problem.reset))
        now = problem._replace(z=problem.z[:, here], short=short, long=long, mask=mask, reset=reset)
        part, short, long = forward(now, tiling)
        y.append(part)
    for got in (whole, (torch.cat(y, dim=1), short, long)):
        for value, want in zip(got, expected, strict=True):
            close(value, want, TOLERANCE[value.dtype])


def test_forward_of_what_may_be_left_out() -> None:
    check_forward(make(20, bare=True), SMALL)


def test_a_long_sum_keeps_its_precision() -> None:
    """The state of a pole on the unit circle holds every step since the first, through a thousand segments."""
    problem = make(4096, channels=1, batch=1, modes=1)
    got = forward(problem, Tiling(1, 16, 4, group=1))
    _, y, _, long = exact(problem)
    close(got[0], y, 5e-6)
    close(got[2], long, 5e-6)


@pytest.mark.parametrize("cut", [1, 2, 12])
def test_splitting_law(cut: int) -> None:
    z, weight, bias, poles, residues, skip, *_ = make(13)
    filter = ModalFilter(torch.view_as_complex(poles), torch.view_as_complex(residues), skip)
    whole, last = hyena(z, weight, bias, filter, backend="triton")
    first, state = hyena(z[:, :cut], weight, bias, filter, backend="triton")
    rest, state = hyena(z[:, cut:], weight, bias, filter, state, backend="triton")
    close(torch.cat([first, rest], dim=1), whole, TOLERANCE[torch.float32])
    assert torch.equal(state.short, last.short)
    close(torch.view_as_real(state.long), torch.view_as_real(last.long), TOLERANCE[torch.float32])


def test_padding_contributes_exactly_nothing() -> None:
    problem = make(12, bare=True)
    y, short, long = forward(problem, SMALL)
    garbage = torch.full((2, 5, 15), torch.nan, device=DEVICE)
    mask = (torch.arange(17, device=DEVICE) >= 5).expand(2, 17)
    padded = problem._replace(z=torch.cat([garbage, problem.z], dim=1), mask=mask)
    y_padded, short_padded, long_padded = forward(padded, SMALL)
    assert not y_padded[:, :5].any()
    close(y_padded[:, 5:], y, TOLERANCE[torch.float32])
    close(long_padded, long, TOLERANCE[torch.float32])
    assert torch.equal(short_padded, short)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("modes", "taps"), [(2, 3), (5, 1)])
def test_a_step_moves_its_states_in_place(dtype: torch.dtype, modes: int, taps: int) -> None:
    problem = make(1, channels=70, modes=modes, taps=taps, batch=3, dtype=dtype)
    _, y, short, long = exact(problem)
    filter = ModalFilter(torch.view_as_complex(problem.poles), torch.view_as_complex(problem.residues), problem.skip)
    assert problem.short is not None and problem.long is not None and problem.bias is not None
    state = HyenaState(problem.short, torch.view_as_complex(problem.long))
    got = FusedDecodeOperators().hyena(problem.z.squeeze(1), problem.weight, problem.bias, filter, state)
    close(got, y.squeeze(1), TOLERANCE[dtype])
    close(torch.view_as_real(state.long), long, TOLERANCE[torch.float32])
    assert torch.equal(state.short.double(), short)


def check_backward(problem: Operands, tiling: BackwardTiling | None, *, of_states: bool = True) -> None:
    wide, *outputs = exact(problem)
    slopes = [
        torch.randn(t.shape).to(DEVICE, problem.z.dtype if i < 2 else torch.float32) for i, t in enumerate(outputs)
    ]
    if not of_states:
        outputs, slopes = outputs[:1], [slopes[0], None, None]
    loss = sum((t * slope).sum() for t, slope in zip(outputs, slopes, strict=False))
    leaves = [t for t in wide if t is not None]
    expected = iter(torch.autograd.grad(loss, leaves))
    got = backward(*slopes, problem, tiling)
    for i, (value, leaf) in enumerate(zip(got, wide, strict=True)):
        if leaf is not None:
            close(value, next(expected), max(GRADIENT, TOLERANCE[value.dtype]) if i == 0 else GRADIENT)


@pytest.mark.parametrize("length", [1, 2, 3, 63])
def test_backward_at_awkward_lengths(length: int) -> None:
    check_backward(make(length, batch=1), None)


@pytest.mark.parametrize("length", [8, 9, 10, 23])
def test_backward_over_several_chunks(length: int) -> None:
    """Around the end of a chunk, where the adjoint passes on inside the window of the short filter."""
    check_backward(make(length, channels=3, padded=length == 23), BackwardTiling(chunk=4, batch=2, channels=4, run=2))


@pytest.mark.parametrize(("modes", "taps"), [(1, 1), (16, 3), (3, 8)])
def test_backward_with_any_filter(modes: int, taps: int) -> None:
    check_backward(make(9, channels=2, modes=modes, taps=taps, batch=1), BackwardTiling(8, 1, 2))


@pytest.mark.parametrize(("modes", "documents"), [(1, False), (3, True), (8, False)])
def test_backward_with_real_modes(modes: int, documents: bool) -> None:
    problem = make(13, channels=2, modes=modes, real=True, documents=documents)
    check_backward(problem, BackwardTiling(chunk=4, batch=2, channels=2, run=2))


def test_backward_over_blocks_of_channels() -> None:
    check_backward(make(6, channels=33, padded=True), BackwardTiling(4, 4, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_in_narrow_types(dtype: torch.dtype) -> None:
    check_backward(make(20, batch=1, dtype=dtype), None)


def test_backward_of_many_steps(compiled: tuple[Operands, Tiling]) -> None:
    check_backward(compiled[0], None)


def test_backward_of_what_may_be_left_out() -> None:
    check_backward(make(7, bare=True), BackwardTiling(4, 2, 8), of_states=False)


# Where documents begin in two rows of 19 steps, for tiles of 2 segments of 4 steps (SMALL) and chunks of 4: at the
# first and the last step, at ends of segments, tiles and chunks and beside them, and one after another.
EDGES = ((0, 4, 8, 9, 15, 18), (1, 2, 3, 7, 12, 13))
CHUNKS = BackwardTiling(chunk=4, batch=2, channels=4, run=2)


@pytest.mark.parametrize("rows", [EDGES, ((0, 18), (7, 8, 9)), (tuple(range(19)), ())])
def test_documents_at_every_edge(rows: tuple[tuple[int, ...], ...]) -> None:
    problem = make(19, channels=3)._replace(reset=boundaries(19, *rows))
    check_forward(problem, SMALL)
    check_backward(problem, CHUNKS)


@pytest.mark.parametrize(("modes", "taps", "padded"), [(1, 1, True), (2, 8, False), (16, 3, True)])
def test_documents_with_any_filter(modes: int, taps: int, padded: bool) -> None:
    problem = make(19, channels=2, modes=modes, taps=taps, batch=1, padded=padded)
    problem = problem._replace(reset=boundaries(19, EDGES[0]))
    check_forward(problem, Tiling(channels=2, segments=2, steps=8, group=2))
    check_backward(problem, BackwardTiling(chunk=8, batch=4, channels=2, run=3))


@pytest.mark.parametrize(
    ("length", "dtype"),
    [(1, torch.float32), (2, torch.bfloat16), (63, torch.float32), (300, torch.bfloat16), (130, torch.float16)],
)
def test_documents_at_awkward_lengths(length: int, dtype: torch.dtype) -> None:
    """In the tiling that is chosen; an even number of channels is packed."""
    problem = make(length, channels=4, batch=1, dtype=dtype, documents=True)
    check_forward(problem, None)
    if length <= 63:
        check_backward(problem, None)


def test_documents_in_parts_of_time() -> None:
    """Every row has a part in which no document begins."""
    problem = make(39, channels=3)._replace(reset=boundaries(39, (0, 20, 21), (38,)))
    check_forward(problem, Tiling(4, 2, 4, 1, parts=3))


def test_documents_in_runs_of_segments() -> None:
    """Several runs of four segments; documents begin in a run's first, its last and no segment, and not in a tile."""
    reset = boundaries(80, (0, 9, 14, 79), (35, 36, 60))
    check_forward(make(80, channels=2)._replace(reset=reset), Tiling(channels=4, segments=16, steps=2, group=2))


def test_documents_without_a_state_nor_gradients_of_states() -> None:
    problem = make(9, channels=3, bare=True)._replace(reset=boundaries(9, (2,), (8,)))
    check_forward(problem, SMALL)
    check_backward(problem, CHUNKS, of_states=False)


def test_packed_documents_equal_documents_alone() -> None:
    lengths = (3, 1, 1, 9, 5)
    z, *rest = make(sum(lengths), channels=3, bare=True, batch=1)
    starts = list(itertools.accumulate(lengths, initial=0))[:-1]
    packed = Operands(z, *rest)._replace(reset=boundaries(sum(lengths), tuple(starts)))
    y, short, long = forward(packed, SMALL)
    alone = [forward(Operands(part, *rest), SMALL) for part in z.split(lengths, dim=1)]
    close(y, torch.cat([part[0] for part in alone], dim=1), TOLERANCE[torch.float32])
    close(long, alone[-1][2], TOLERANCE[torch.float32])
    assert torch.equal(short, alone[-1][1])


@pytest.mark.parametrize("cut", [8, 14])
def test_the_splitting_law_with_documents(cut: int) -> None:
    problem = make(19, channels=3)._replace(reset=boundaries(19, *EDGES))
    assert problem.reset is not None
    whole = forward(problem, SMALL)
    first, short, long = forward(problem._replace(z=problem.z[:, :cut], reset=problem.reset[:, :cut]), SMALL)
    now = problem._replace(z=problem.z[:, cut:], reset=problem.reset[:, cut:], short=short, long=long)
    rest, short, long = forward(now, SMALL)
    close(torch.cat([first, rest], dim=1), whole[0], TOLERANCE[torch.float32])
    close(long, whole[2], TOLERANCE[torch.float32])
    assert torch.equal(short, whole[1])


def test_boundaries_by_segments_tiles_and_parts() -> None:
    """Segments of 4 steps with 2 steps before them, tiles of 2 segments, parts of 2 tiles."""
    found = find_boundaries(boundaries(19, (0, 7, 17), (12,)), 4, 2, 2, 2)
    assert found.segments.tolist() == [[0b000100, 0b100000, 0b000010, 0, 0b001000], [0, 0, 0, 0b000100, 0]]
    assert found.tiles.tolist() == [[0b11, 0, 0b01], [0, 0b10, 0]]
    assert found.parts.tolist() == [[True, True], [True, False]]
    assert found.tails.tolist() == [1, 2]


def test_the_age_of_a_step() -> None:
    reset = torch.tensor([[False, True, False, False, True], [True, False, False, False, False]])
    first, second = age(reset)
    assert first[0] >= 2**30 and first[1:].tolist() == [0, 1, 2, 0]
    assert second.tolist() == [0, 1, 2, 3, 4]


PRODUCTS = modal_launch.Tiling(segments=8, chunk=16, steps=8, words=4)
OF_PRODUCTS = {
    "one step": dict(length=1),
    "shorter than the window": dict(length=2, taps=4),
    "within a segment": dict(length=9),
    "a whole tile": dict(length=128),
    "within a later tile": dict(length=300),
    "whole segments": dict(length=160, batch=1),
    "one tap": dict(length=20, taps=1),
    "eight taps": dict(length=20, taps=8),
    "nine modes": dict(length=140, modes=9),
    "sixteen modes": dict(length=20, modes=16),
    "real": dict(length=150, real=True),
    "sixteen pairs of real modes": dict(length=20, modes=16, real=True),
    "padded": dict(length=150, padded=True),
    "bare": dict(length=150, bare=True),
    "blocks of channels": dict(length=20, channels=9),
    "float16": dict(length=20, channels=6, dtype=torch.float16),
}


@pytest.mark.parametrize("name", OF_PRODUCTS)
def test_products(name: str) -> None:
    problem = make(**({"modes": 8} | OF_PRODUCTS[name]))
    _, *expected = exact(problem)
    for value, want in zip(modal_launch.forward_products(problem, PRODUCTS), expected, strict=True):
        close(value, want, TOLERANCE[value.dtype])


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no products of bfloat16")
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("modes", [8, 9, 16])
@pytest.mark.parametrize("length", [1000, 1024, 1337])
def test_products_in_bfloat16(length: int, modes: int, real: bool) -> None:
    problem = make(length, 100, modes, dtype=torch.bfloat16, real=real, padded=length == 1000)
    y, short, long = modal_launch.forward_products(problem, modal_launch.choose_tiling(modes))
    _, *expected = exact(problem)
    close(y, expected[0], 2 * TOLERANCE[torch.bfloat16])  # factors are rounded too
    close(short, expected[1], TOLERANCE[torch.bfloat16])
    close(long, expected[2], 1e-4)


@pytest.mark.parametrize("change", ["documents", "few modes", "short", "float32"])
def test_other_problems_take_the_recurrence(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(
        8 if change == "short" else 1024,
        modes=2 if change == "few modes" else 8,
        dtype=torch.float32 if change == "float32" else torch.bfloat16,
        documents=change == "documents",
    )
    monkeypatch.setattr(launch, "forward", lambda operands: "recurrence")
    assert modal_launch.forward(problem) == "recurrence"
