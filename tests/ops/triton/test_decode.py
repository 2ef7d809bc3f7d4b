"""The kernels of a decoding step equal their plain twins: on a GPU where there is one, else on Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena import ops
from hyaena.ops import HyenaState, ModalFilter, rotary_table
from hyaena.ops.step import DecodeOperators, Norm, Slots
from hyaena.ops.triton import decode_unsupported_reason
from hyaena.ops.triton.decode import embed_argmax, gemv
from hyaena.ops.triton.decode.operators import FusedDecodeOperators

PLAIN = DecodeOperators()
# One rounding of the result to its own dtype, and in the twin one or two more on the way: 2^-24, 2^-11, 2^-8 each.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = list(TOLERANCE)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error <= TOLERANCE[dtype], error  # NaN fails too


def slots(used: int, paddings: list[int], capacity: int, head_dim: int) -> Slots:
    """Where things stand, as the device knows it."""
    table = rotary_table(torch.arange(capacity, device=DEVICE), head_dim, 10_000.0)
    return Slots(
        torch.tensor([used], dtype=torch.int32, device=DEVICE),
        torch.tensor(paddings, dtype=torch.int32, device=DEVICE),
        table,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("used", "paddings", "capacity"),
    [
        (1, [0, 0], 8),
        (2, [0, 1], 1200),
        (3, [2, 0], 1200),
        (63, [0, 5], 63),
        (1000, [0, 937], 1200),
        (1000, [999, 63], 1000),
    ],
)
def test_attention_reads_the_valid_slots_and_no_other(
    dtype: torch.dtype, used: int, paddings: list[int], capacity: int
) -> None:
    q = randn(2, 6, 24, dtype=dtype)
    k, v = randn(2, 2, capacity, 24, dtype=dtype), randn(2, 2, capacity, 24, dtype=dtype)
    padding = torch.tensor(paddings, device=DEVICE)
    want = ops.attention(
        q[:, :, None].double(), k[:, :, :used].double(), v[:, :, :used].double(), padding=padding
    ).squeeze(2)
    for store in (k, v):
        store[:, :, used:] = torch.nan
        for row, first in enumerate(paddings):
            store[row, :, :first] = torch.nan
    fused = FusedDecodeOperators()
    close(fused.attend(q, k, v, slots(used, paddings, capacity, 24)), want, dtype)


@pytest.mark.parametrize(
    ("heads", "groups", "head_dim"), [(1, 1, 16), (8, 1, 64), (3, 3, 80), (32, 8, 128), (2, 1, 256)]
)
def test_attention_of_every_head_shape(heads: int, groups: int, head_dim: int) -> None:
    q, k, v = randn(1, heads, head_dim), randn(1, groups, 200, head_dim), randn(1, groups, 200, head_dim)
    where = slots(150, [0], 200, head_dim)
    fused = FusedDecodeOperators()
    close(fused.attend(q, k, v, where), PLAIN.attend(q, k, v, where), torch.float32)


def test_attention_of_large_scores() -> None:
    """Splits whose normalisers differ by more than a float32 can hold."""
    q, k, v = 30 * randn(1, 1, 32), 30 * randn(1, 1, 700, 32), randn(1, 1, 700, 32)
    where = slots(700, [0], 700, 32)
    want = PLAIN.attend(q.double(), k.double(), v.double(), where)
    close(FusedDecodeOperators().attend(q, k, v, where), want, torch.float16)  # scores of 1e4


def test_one_grid_serves_every_length() -> None:
    """What longer sequences left behind in the splits is not read: a captured graph keeps its buffers."""
    q, k, v = randn(1, 2, 16), randn(1, 1, 3000, 16), randn(1, 1, 3000, 16)
    fused = FusedDecodeOperators()
    for used in (3000, 2, 700, 64, 65):
        where = slots(used, [0], 3000, 16)
        close(fused.attend(q, k, v, where), PLAIN.attend(q, k, v, where), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 24, 128])
def test_remember_rotates_and_writes_one_slot(dtype: torch.dtype, head_dim: int) -> None:
    heads, groups, capacity = 6, 2, 40
    qkv = randn(2, (heads + 2 * groups) * head_dim, dtype=dtype)
    stores = [randn(2, groups, capacity, head_dim, dtype=dtype) for _ in range(2)]
    twins = [t.clone() for t in stores]
    where = slots(17, [0, 9], capacity, head_dim)
    got = FusedDecodeOperators().remember(qkv, stores[0], stores[1], where)
    close(got, PLAIN.remember(qkv, twins[0], twins[1], where), dtype)
    for store, twin in zip(stores, twins, strict=True):
        close(store[:, :, 16], twin[:, :, 16], dtype)
        store[:, :, 16] = twin[:, :, 16]
        assert torch.equal(store, twin)


NORMS = [None, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inside", NORMS)
@pytest.mark.parametrize(("batch", "rows", "width"), [(1, 17, 96), (1, 6, 2500), (1, 5, 1030), (3, 8, 32)])
def test_products(dtype: torch.dtype, inside: bool | None, batch: int, rows: int, width: int) -> None:
    fused = FusedDecodeOperators()
    x, bias, residual = randn(batch, width, dtype=dtype), randn(rows, dtype=dtype), randn(batch, rows, dtype=dtype)
    a, b = (randn(rows, width, dtype=dtype) / width**0.5 for _ in range(2))
    norm = None if inside is None else Norm(randn(width, dtype=dtype), 1e-2, inside)
    close(fused.project(x, a, norm=norm), PLAIN.project(x, a, norm=norm), dtype)
    whole = {"bias": bias, "norm": norm, "residual": residual}
    close(fused.project(x, a, **whole), PLAIN.project(x, a, **whole), dtype)
    for activation in ("silu", "gelu"):
        got = fused.gate(x, a, b, norm=norm, activation=activation)
        close(got, PLAIN.gate(x, a, b, norm=norm, activation=activation), dtype)


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
    norm = Norm(randn(96), 1e-5, True)
    close(gemv.project(x, a, norm=norm, tile=tile), PLAIN.project(x, a, norm=norm), torch.float32)
    got = gemv.gate(x, a, b, norm=norm, activation="silu", tile=tile)
    close(got, PLAIN.gate(x, a, b, norm=norm, activation="silu"), torch.float32)


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
    twin = HyenaState(*(t.clone() for t in state))
    fused = FusedDecodeOperators()
    for _ in range(3):
        got = fused.hyena(z, weight.to(dtype), bias.to(dtype), long_filter, state)
        wide = HyenaState(twin.short.float(), twin.long)
        skip = None if long_filter.skip is None else long_filter.skip.float()
        exact = long_filter._replace(skip=skip)
        want = PLAIN.hyena(z.float(), weight.to(dtype).float(), bias.to(dtype).float(), exact, wide)
        twin.short.copy_(wide.short)
        close(got, want, dtype)
        assert torch.equal(state.short, twin.short)
        close(torch.view_as_real(state.long), torch.view_as_real(twin.long), torch.float32)
        z = z.roll(1, dims=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_kernel_counts_a_slot_and_looks_tokens_up(dtype: torch.dtype) -> None:
    where, table = slots(5, [0, 0, 0], 9, 16), randn(11, 40, dtype=dtype)
    ids = torch.tensor([10, 0, 3], device=DEVICE)
    assert torch.equal(FusedDecodeOperators().begin(ids, table, where), table[ids])
    assert where.used.tolist() == [6]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 32768])
def test_the_greedy_choice(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int) -> None:
    monkeypatch.setattr(embed_argmax, "BLOCK", block)
    logits = 5 * randn(9, 50, dtype=dtype)
    logits[0, [7, 9, 40]] = 100.0  # the first of equals
    logits[1, 3:] = -torch.inf
    logits[2, :20] = -torch.inf
    logits[3, 30] = torch.nan
    logits[4, 49] = torch.inf
    logits[5] = -torch.inf
    logits[6] = torch.nan
    ids, twin = (torch.full((9,), 77, device=DEVICE) for _ in range(2))
    got, want = FusedDecodeOperators().greedy(logits, ids), PLAIN.greedy(logits, twin)
    assert torch.equal(ids, twin) and ids[0] == 7 and ids[3:7].tolist() == [0] * 4
    assert got[:, 0].tolist() == ids.tolist()
    finite = want[:, 2] == 1
    assert finite.tolist() == [True] * 3 + [False] * 4 + [True] * 2
    assert torch.equal(got[:, 2], want[:, 2])
    torch.testing.assert_close(
        got[finite, 1], want[finite, 1], rtol=1e-6, atol=1e-5
    )  # the twin's: of two large numbers


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((torch.float64, 64, 2, 3), "not torch.float64"),
        ((torch.float32, 320, 2, 3), "heads of at most 256 channels, not 320"),
        ((torch.float32, 64, 17, 3), "1 to 16 modes and 1 to 8 taps, not 17 and 3"),
        ((torch.float32, 64, 2, 9), "1 to 16 modes and 1 to 8 taps, not 2 and 9"),
    ],
)
def test_what_the_kernels_do_not_take_has_a_reason(sizes: tuple[torch.dtype, int, int, int], message: str) -> None:
    assert message in str(decode_unsupported_reason(*sizes, DEVICE))
    assert decode_unsupported_reason(torch.float32, 256, 16, 8, DEVICE) is None
