"""The kernels of a decoding step equal the plain operators: on a GPU if there is one, else on Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena import ops
from hyaena.ops import (
    Dense,
    ExplicitFilter,
    HyenaState,
    KVState,
    ModalFilter,
    RealModalFilter,
    RMSNormWeight,
    StepContext,
    rotary_table,
)
from hyaena.ops.step import DecodeOperators
from hyaena.ops.triton import can_overlap, decode_unsupported_reason
from hyaena.ops.triton.decode import embed_argmax, gemv
from hyaena.ops.triton.decode.operators import FusedDecodeOperators
from hyaena.quant import round_weight
from hyaena.schemes import SCHEMES

PLAIN = DecodeOperators()
# One rounding of the result to its own dtype, and in the reference one or two more on the way: 2^-24, 2^-11, 2^-8 each.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = list(TOLERANCE)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(got: Tensor, want: Tensor, dtype: torch.dtype, roundings: float = 1) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error <= roundings * TOLERANCE[dtype], error  # NaN fails too


def step_context(lengths: list[int], head_dim: int, operators: DecodeOperators = PLAIN) -> StepContext:
    """The context of a step in which the rows hold so many tokens."""
    table = rotary_table(torch.arange(max(lengths) + 1, device=DEVICE), head_dim, 10_000.0)
    on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return StepContext(operators, on_device, on_device + 1, table)


def kv_state(capacities: list[int], groups: int, head_dim: int, dtype: torch.dtype = torch.float32) -> KVState:
    """Random keys and values; rows of equal capacity share an allocation."""
    state = KVState.allocate(1, groups, 1, head_dim, dtype, DEVICE).select([0] * len(capacities))
    state = state.reserve(capacities)
    for tensor in state.tensors():
        tensor.normal_()
    return state


def qkv_of(rows: int, heads: int, groups: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(rows, (heads + 2 * groups) * head_dim, dtype=dtype)


def attend(fused: FusedDecodeOperators, qkv: Tensor, state: KVState, context: StepContext, dtype: torch.dtype) -> None:
    """Hold the kernel against the plain operators in float64: what it returns and what it writes, one slot a row."""
    lengths, before = context.lengths.tolist(), state.select(range(len(qkv)))
    reference = state.select(range(len(qkv)))
    for i, n in enumerate(lengths):
        state.keys(i)[:, n - 1 :] = torch.nan
        state.values(i)[:, n - 1 :] = torch.nan
    close(fused.attention(qkv, state, context), PLAIN.attention(qkv.double(), reference, context), dtype)
    for i, n in enumerate(lengths):
        for store, want, old in (
            (state.keys(i), reference.keys(i), before.keys(i)),
            (state.values(i), reference.values(i), before.values(i)),
        ):
            close(store[:, n - 1], want[:, n - 1], dtype)
            assert torch.equal(store[:, : n - 1], old[:, : n - 1]) and bool(store[:, n:].isnan().all())
            store[:, n - 1 :] = old[:, n - 1 :]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "capacities"),
    [([1, 1], [8, 8]), ([2, 1], [1200, 1200]), ([1, 3], [1, 1200]), ([63, 58], [63, 64]), ([1000, 63], [1200, 100])],
)
def test_attention_reads_the_valid_slots_and_writes_one(
    dtype: torch.dtype, lengths: list[int], capacities: list[int]
) -> None:
    state = kv_state(capacities, 2, 24, dtype)
    attend(FusedDecodeOperators(), qkv_of(2, 6, 2, 24, dtype), state, step_context(lengths, 24), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "groups", "head_dim"), [(1, 1, 16), (8, 1, 64), (3, 3, 80), (32, 8, 128), (2, 1, 256), (10, 2, 12)]
)
def test_attention_of_every_head_shape(dtype: torch.dtype, heads: int, groups: int, head_dim: int) -> None:
    state, context = kv_state([200], groups, head_dim, dtype), step_context([150], head_dim)
    attend(FusedDecodeOperators(), qkv_of(1, heads, groups, head_dim, dtype), state, context, dtype)


def test_attention_of_large_scores() -> None:
    """Splits whose normalisers differ by more than a float32 can hold."""
    state = kv_state([700], 1, 32)
    state.keys(0).mul_(30)
    attend(FusedDecodeOperators(), 30 * qkv_of(1, 1, 1, 32), state, step_context([700], 32), torch.float16)


def test_one_grid_serves_every_length() -> None:
    """What longer sequences left in the splits is not read: a captured graph keeps its buffers and counters."""
    state, fused = kv_state([3000], 1, 16), FusedDecodeOperators()
    for length in (3000, 2, 700, 64, 65):
        attend(fused, qkv_of(1, 2, 1, 16), state, step_context([length], 16), torch.float32)


def test_rows_join_their_splits_apart() -> None:
    """A counter for each row and key head, zero again after each call."""
    fused = FusedDecodeOperators(longest=200)
    for rows in (5, 1, 8, 5):
        state = kv_state([200] * rows, 2, 16)
        attend(
            fused, qkv_of(rows, 2, 2, 16), state, step_context([1 + 150 * (i % 2) for i in range(rows)], 16), DTYPES[0]
        )


def test_nan_of_a_split_stays_visible() -> None:
    """In the row and the heads that read it, and nowhere else."""
    state, qkv = kv_state([300, 300], 2, 16), qkv_of(2, 4, 2, 16)
    state.values(1)[1, 5, 3] = torch.nan
    wrong = FusedDecodeOperators().attention(qkv, state, step_context([250, 250], 16)).isnan()
    assert bool(wrong[1, 2:, 3].all()) and int(wrong.sum()) == 2


def test_kernels_see_the_rows_of_the_moment() -> None:
    """A row that is replaced is found through the same tables, so that a captured graph reads it."""
    source, other = kv_state([90], 2, 16), kv_state([300], 2, 16)
    state = source.blank(3)
    tables = [t.data_ptr() for t in state.first(2).pointers()]
    state.put(0, source, 0)
    state.put(1, other, 0)
    state = state.first(2)
    assert [t.data_ptr() for t in state.pointers()] == tables
    attend(FusedDecodeOperators(), qkv_of(2, 4, 2, 16), state, step_context([80, 280], 16), torch.float32)


NORMS = [None, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inside", NORMS)
@pytest.mark.parametrize(("batch", "rows", "width"), [(1, 17, 96), (1, 6, 2500), (1, 5, 1030), (3, 8, 32)])
def test_products(dtype: torch.dtype, inside: bool | None, batch: int, rows: int, width: int) -> None:
    fused = FusedDecodeOperators()
    x, bias, residual = randn(batch, width, dtype=dtype), randn(rows, dtype=dtype), randn(batch, rows, dtype=dtype)
    a, b = (randn(rows, width, dtype=dtype) / width**0.5 for _ in range(2))
    norm = None if inside is None else RMSNormWeight(randn(width, dtype=dtype), 1e-2, inside)
    exact_norm = None if norm is None else norm._replace(weight=norm.weight.double())
    exact = [t.double() for t in (x, a, b, bias, residual)]
    got = fused.linear(x, Dense(a), norm=norm)
    close(got, PLAIN.linear(exact[0], Dense(exact[1]), norm=exact_norm), dtype)
    got = fused.linear(x, Dense(a, bias), norm=norm, residual=residual)
    want = PLAIN.linear(exact[0], Dense(exact[1], exact[3]), norm=exact_norm, residual=exact[4])
    close(got, want, dtype)
    for activation in ("silu", "gelu", "identity"):
        got = fused.gate(x, Dense(a), Dense(b), norm=norm, activation=activation)
        want = PLAIN.gate(exact[0], Dense(exact[1]), Dense(exact[2]), norm=exact_norm, activation=activation)
        # one row: one rounding of the result; several: the norm, both products, the activation and the gate round
        close(got, want, dtype, roundings=1 if batch == 1 else 5**0.5)


@pytest.mark.parametrize(
    "tile",
    [
        gemv.Tile(1, 32, 4, 0),
        gemv.Tile(8, 64, 1, 1),
        gemv.Tile(2, 2048, 8, 4),
        gemv.Tile(4, 32, 1, 3),
        gemv.Tile(4, 64, 1, 9),
    ],
)
def test_products_in_any_tile(tile: gemv.Tile) -> None:
    x, a, b = randn(1, 96), randn(13, 96), randn(13, 96)
    norm = RMSNormWeight(randn(96), 1e-5, True)
    close(gemv.linear(x, Dense(a), norm=norm, tile=tile), PLAIN.linear(x, Dense(a), norm=norm), torch.float32)
    got = gemv.gate(x, a, b, norm=norm, activation="silu", tile=tile)
    close(got, PLAIN.gate(x, Dense(a), Dense(b), norm=norm, activation="silu"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("scale", [2.0**50, 2.0**63, 2.0**90, 2.0**110])
@pytest.mark.parametrize("width", [96, 1030])
def test_numbers_whose_squares_overflow_are_normalised(
    dtype: torch.dtype, inside: bool, scale: float, width: int
) -> None:
    x, a, b = (randn(n, width, dtype=dtype) for n in (1, 7, 7))
    a, b, norm = a / width**0.5, b / width**0.5, RMSNormWeight(randn(width, dtype=dtype), 1e-5, inside)
    x *= scale
    wide = norm._replace(weight=norm.weight.double())
    want = PLAIN.linear(x.double(), Dense(a.double()), norm=wide)
    close(gemv.linear(x, Dense(a), norm=norm), want, dtype)
    want = PLAIN.gate(x.double(), Dense(a.double()), Dense(b.double()), norm=wide, activation="silu")
    close(gemv.gate(x, a, b, norm=norm, activation="silu"), want, dtype)


@pytest.mark.parametrize("largest", [3e38, torch.inf, torch.nan])
def test_what_cannot_be_summed_is_not_finite(largest: float) -> None:
    """Near the end of float32, and beyond, there is no plausible number that nobody would notice."""
    x, a = torch.full((1, 96), 1.0, device=DEVICE), torch.ones(5, 96, device=DEVICE)
    x[:, ::2] = largest
    got = gemv.linear(x, Dense(a), norm=RMSNormWeight(torch.ones(96, device=DEVICE), 1e-5, True))
    assert not got.isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("modes", "taps"), [(2, 3), (8, 3), (1, 2), (3, 4)])
def test_the_hyena_step_moves_both_states(dtype: torch.dtype, modes: int, taps: int) -> None:
    channels = 40
    z, weight, bias = randn(2, 3 * channels, dtype=dtype), randn(3 * channels, taps), randn(3 * channels)
    poles = torch.polar(torch.rand(channels, modes), torch.randn(channels, modes)).to(DEVICE)
    residues = torch.complex(randn(channels, modes), randn(channels, modes))
    long_filter = ModalFilter(poles, residues, randn(channels, dtype=dtype))
    state = HyenaState(
        randn(2, 3 * channels, taps - 1, dtype=dtype),
        torch.complex(randn(2, channels, modes), randn(2, channels, modes)),
    )
    reference = HyenaState(*(t.clone() for t in state))
    fused = FusedDecodeOperators()
    for _ in range(3):
        got = fused.hyena(z, weight.to(dtype), bias.to(dtype), long_filter, state)
        wide = HyenaState(reference.short.float(), reference.long)
        skip = None if long_filter.skip is None else long_filter.skip.float()
        exact = long_filter._replace(skip=skip)
        want = PLAIN.hyena(z.float(), weight.to(dtype).float(), bias.to(dtype).float(), exact, wide)
        reference.short.copy_(wide.short)
        close(got, want, dtype)
        assert torch.equal(state.short, reference.short)
        close(torch.view_as_real(state.long), torch.view_as_real(reference.long), torch.float32)
        z = z.roll(1, dims=1)


FILTERS = {
    "7 taps": lambda: ExplicitFilter(randn(5, 7)),
    "128 taps": lambda: ExplicitFilter(randn(5, 128), randn(40)),
    "1 tap": lambda: ExplicitFilter(randn(40, 1)),
    "16 real modes": lambda: RealModalFilter(-randn(40, 16).abs(), randn(40, 16), randn(40)),
    "3 real modes": lambda: RealModalFilter(-randn(40, 3).abs(), randn(40, 3)),
}


@pytest.mark.parametrize("operators", [PLAIN, FusedDecodeOperators()], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*FILTERS, "2 complex modes"])
def test_the_hyena_step_on_states_at_places(operators: DecodeOperators, dtype: torch.dtype, kind: str) -> None:
    """Pages of a state, each with bytes of others around it: rows go from page to page, and nothing else changes."""
    poles = torch.polar(torch.rand(40, 2), torch.randn(40, 2)).to(DEVICE)
    complex_modes = ModalFilter(poles, torch.complex(randn(40, 2), randn(40, 2)), randn(40))
    long_filter = FILTERS[kind]() if kind in FILTERS else complex_modes
    z, weight = randn(3, 120, dtype=dtype), randn(120, 3).to(dtype)
    like = long_filter.initial_state(1, 40)
    shorts = randn(6, 120 * 2 + 32, dtype=dtype)
    longs = randn(6, 2 * 40 * 128 + 16)
    long = longs[:, 16 : 16 + like.numel() * (1 + like.is_complex())]
    pairs = long.unflatten(1, (*like.shape[1:], 2)) if like.is_complex() else long.unflatten(1, like.shape[1:])
    state = HyenaState(
        shorts[:, 16:256].unflatten(1, (120, 2)), torch.view_as_complex(pairs) if like.is_complex() else pairs
    )
    before, around = HyenaState(*(t.clone() for t in state)), (shorts.clone(), longs.clone())
    source, target = torch.tensor([[4, 5], [1, 1], [2, 3]], device=DEVICE).int().T
    got = operators.hyena_at(z, weight, None, long_filter, state, source, target)
    want = HyenaState(*(t[source.long()].contiguous() for t in before))
    y = operators.hyena(z, weight, None, long_filter, want)
    assert torch.equal(got, y)
    for mine, theirs, old in zip(state, want, before, strict=True):
        assert torch.equal(mine[target.long()], theirs)
        assert torch.equal(mine[[0, 2, 4]], old[[0, 2, 4]])
    for mine, theirs, part in zip((shorts, longs), around, (shorts[:, 16:256], long), strict=True):
        part.zero_()
        theirs[:, 16 : 16 + part.shape[1]] = 0
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FILTERS)
def test_the_hyena_step_with_other_filters(dtype: torch.dtype, kind: str) -> None:
    long_filter = FILTERS[kind]()
    z, weight = randn(2, 120, dtype=dtype), randn(120, 3).to(dtype)
    state = HyenaState(randn(2, 120, 2, dtype=dtype), torch.randn_like(long_filter.initial_state(2, 40)))
    reference = HyenaState(state.short.float().clone(), state.long.clone())
    fused, place = FusedDecodeOperators(), state.long.data_ptr()
    for _ in range(3):
        got = fused.hyena(z, weight, None, long_filter, state)
        want = PLAIN.hyena(z.float(), weight.float(), None, long_filter, reference)
        close(got, want, dtype)
        assert torch.equal(state.short.float(), reference.short)
        if state.long.numel():
            close(state.long, reference.long, torch.float32)
        z = z.roll(1, dims=1)
    assert state.long.data_ptr() == place


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_the_hyena_step_of_a_filter_that_many_channels_share(groups: int) -> None:
    """48 channels, in programs of 16: their filter is that of one program, of each, or of half a program."""
    long_filter = ExplicitFilter(randn(groups, 128), randn(48))
    z, weight = randn(2, 144), randn(144, 3)
    state, other = (
        HyenaState(torch.ones(2, 144, 2, device=DEVICE), torch.ones(2, 48, 127, device=DEVICE)) for _ in "ab"
    )
    for _ in range(2):
        got = FusedDecodeOperators().hyena(z, weight, None, long_filter, state)
        close(got, PLAIN.hyena(z, weight, None, long_filter, other), torch.float32)
        close(state.long, other.long, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_counts_a_token_and_looks_it_up(dtype: torch.dtype) -> None:
    table, ids = randn(11, 40, dtype=dtype), torch.tensor([10, 0, 3], device=DEVICE)
    for operators in (FusedDecodeOperators(), PLAIN):
        context = step_context([5, 0, 2], 16)
        context.limits[2] = 2
        assert torch.equal(operators.embed(ids, table, context), table[ids])
        assert context.lengths.tolist() == [6, 1, 2]  # the last row is full


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 32768])
def test_argmax(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int) -> None:
    monkeypatch.setattr(embed_argmax, "BLOCK", block)
    logits = 5 * randn(9, 50, dtype=dtype)
    logits[0, [7, 9, 40]] = 100.0  # the first of equals
    logits[1, 3:] = -torch.inf
    logits[2, :20] = -torch.inf
    logits[3, 30] = torch.nan
    logits[4, 49] = torch.inf
    logits[5] = -torch.inf
    logits[6] = torch.nan
    ids, other = (torch.full((9,), 77, device=DEVICE) for _ in range(2))
    got, want = FusedDecodeOperators().argmax(logits, ids), PLAIN.argmax(logits, other)
    assert torch.equal(ids, other) and ids[0] == 7 and ids[3:7].tolist() == [0] * 4
    assert got[:, 0].tolist() == ids.tolist()
    finite = want[:, 2] == 1
    assert finite.tolist() == [True] * 3 + [False] * 4 + [True] * 2
    assert torch.equal(got[:, 2], want[:, 2])
    torch.testing.assert_close(
        got[finite, 1], want[finite, 1], rtol=1e-6, atol=1e-5
    )  # the reference subtracts two large numbers


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((torch.float64, 64), "not torch.float64"), ((torch.float32, 320), "heads of at most 256 channels, not 320")],
)
def test_what_the_kernels_do_not_take_has_a_reason(sizes: tuple[torch.dtype, int], message: str) -> None:
    assert message in str(decode_unsupported_reason(*sizes, DEVICE))
    assert decode_unsupported_reason(torch.float32, 256, DEVICE) is None


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(
    ("batch", "rows", "width", "inside"),
    [(1, 5, 128, None), (1, 5, 128, True), (3, 19, 384, False), (2, 2, 2176, True)],
)
def test_narrow_products(name: str, batch: int, rows: int, width: int, inside: bool | None) -> None:
    dtype = torch.bfloat16 if rows == 19 else torch.float32
    x, bias, residual = (randn(*shape, dtype=dtype) for shape in ((batch, width), (rows,), (batch, rows)))
    a, b = (round_weight(randn(rows, width) / width**0.5 + 0.01, SCHEMES[name]) for _ in range(2))
    norm = None if inside is None else RMSNormWeight(randn(width, dtype=dtype), 1e-2, inside)
    wide = None if norm is None else norm._replace(weight=norm.weight.double())
    dense = [Dense(ops.widen(layer, torch.float64)) for layer in (a, b)]
    fused = FusedDecodeOperators(overlap=can_overlap(torch.device(DEVICE)))
    roundings = 2  # of the norm of several rows, and of the result
    if dtype == torch.float32:  # of x to 16 bits of the largest number beside it; of x and sums of eight to float16
        roundings = 1000 if name == "float8" else 200
    close(fused.linear(x, a, norm=norm), PLAIN.linear(x.double(), dense[0], norm=wide), dtype, roundings)
    got = fused.linear(x, a._replace(bias=bias), norm=norm, residual=residual)
    want = PLAIN.linear(x.double(), Dense(dense[0].weight, bias.double()), norm=wide, residual=residual.double())
    close(got, want, dtype, roundings)
    for activation in ("silu", "identity"):
        got = fused.gate(x, a, b, norm=norm, activation=activation)
        close(got, PLAIN.gate(x.double(), dense[0], dense[1], norm=wide, activation=activation), dtype, roundings)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_narrow_products_with_numbers_that_are_not_finite_are_not(name: str, number: float) -> None:
    x, layer = randn(1, 256), round_weight(randn(6, 256), SCHEMES[name])
    x[0, 77] = number
    assert not FusedDecodeOperators().linear(x, layer).isfinite().any()


def test_narrow_products_of_zeros_and_of_large_numbers() -> None:
    """In more blocks of rows than programs, so that some take two."""
    layer = round_weight(randn(11, 256), SCHEMES["int4"])
    assert not FusedDecodeOperators().linear(torch.zeros(1, 256, device=DEVICE), layer).any()
    for size in (1e-30, 1e30):
        x = randn(1, 256) * size
        close(FusedDecodeOperators().linear(x, layer), PLAIN.linear(x, layer), torch.float32, 200)


@pytest.mark.parametrize(("count", "roundings"), [(8, 200), (9, 1)])
def test_narrow_products_of_more_rows_are_widened(count: int, roundings: int) -> None:
    layer, x = round_weight(randn(2, 64), SCHEMES["int4"]), randn(count, 64)
    got, want = FusedDecodeOperators().linear(x, layer), PLAIN.linear(x, layer)
    close(got, want, torch.float32, roundings)
    assert torch.equal(got, want) == (roundings == 1)
