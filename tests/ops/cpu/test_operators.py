"""The compiled operators of a decoding step equal the plain ones, and a row's bits do not depend on its neighbours."""

from __future__ import annotations

import errno
import os
import select
import signal
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyaena import ops
from hyaena.ops import (
    Dense,
    ExplicitFilter,
    HyenaState,
    KVState,
    ModalFilter,
    PagePool,
    PageTable,
    RealModalFilter,
    RMSNormWeight,
    StepContext,
    rotary_table,
)
from hyaena.ops.step import DecodeOperators
from hyaena.quant import round_weight
from hyaena.schemes import SCHEMES

pytest.importorskip("numba", reason="the kernels are compiled by numba")

from hyaena.ops.cpu import memory, operators, team
from hyaena.ops.cpu.matrices import Matrix
from hyaena.ops.cpu.memory import take as memory_take
from hyaena.ops.cpu.operators import CompiledOperators
from hyaena.ops.cpu.reading import BLOCK, sums_of_squares

PLAIN, COMPILED = DecodeOperators(), CompiledOperators()
# One rounding of the result to its own dtype, and sums in another order: as for the operators of GPUs.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = list(TOLERANCE)
INTEGERS = [name for name, scheme in SCHEMES.items() if not scheme.floating]
ROUNDED = 1e-4
"""Of products with narrow weights: what they are multiplied with is rounded to 16 bits, each number by 2e-5 of most."""


def close(got: Tensor, want: Tensor, dtype: torch.dtype, least: float = 0.0) -> None:
    assert got.shape == want.shape
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error <= max(TOLERANCE[dtype], least), error  # NaN fails too


def step_context(lengths: list[int], head_dim: int, pages: PageTable | None = None) -> StepContext:
    """The context of a step in which the rows hold so many tokens."""
    counts = torch.tensor(lengths, dtype=torch.int32)
    return StepContext(COMPILED, counts, counts + 1, rotary_table(torch.arange(max(lengths) + 1), head_dim, 1e4), pages)


def kv_state(capacities: list[int], groups: int, head_dim: int, dtype: torch.dtype = torch.float32) -> KVState:
    """Random keys and values; rows of equal capacity share an allocation."""
    state = KVState.allocate(1, groups, 1, head_dim, dtype, "cpu").select([0] * len(capacities)).reserve(capacities)
    for tensor in state.tensors():
        tensor.normal_()
    return state


NORMS = [None, True, False]


def norm_of(width: int, inside: bool | None, dtype: torch.dtype) -> RMSNormWeight | None:
    return None if inside is None else RMSNormWeight(torch.randn(width).to(dtype), 1e-2, inside)


def widened(norm: RMSNormWeight | None) -> RMSNormWeight | None:
    return None if norm is None else norm._replace(weight=norm.weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inside", NORMS)
@pytest.mark.parametrize(("batch", "rows", "width"), [(1, 17, 96), (1, 6, 2500), (2, 5, 1030), (7, 90, 32), (4, 1, 1)])
def test_products(threads: int, dtype: torch.dtype, inside: bool | None, batch: int, rows: int, width: int) -> None:
    x, bias, residual = (torch.randn(*shape).to(dtype) for shape in ((batch, width), (rows,), (batch, rows)))
    a, b = ((torch.randn(rows, width) / width**0.5).to(dtype) for _ in range(2))
    norm = norm_of(width, inside, dtype)
    exact, wide = [t.double() for t in (x, a, b, bias, residual)], widened(norm)
    close(COMPILED.linear(x, Dense(a), norm=norm), PLAIN.linear(exact[0], Dense(exact[1]), norm=wide), dtype)
    got = COMPILED.linear(x, Dense(a, bias), norm=norm, residual=residual)
    close(got, PLAIN.linear(exact[0], Dense(exact[1], exact[3]), norm=wide, residual=exact[4]), dtype)
    for activation in ("silu", "gelu", "identity"):
        got = COMPILED.gate(x, Dense(a), Dense(b), norm=norm, activation=activation)
        want = PLAIN.gate(exact[0], Dense(exact[1]), Dense(exact[2]), norm=wide, activation=activation)
        close(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_beside_others_and_on_any_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "GRAIN", 1)
    width, rows = 530, 301
    x, a, b = (torch.randn(n, width).to(dtype) for n in (11, rows, rows))
    norm = norm_of(width, True, dtype)

    def compute(x: Tensor) -> list[Tensor]:
        linear = COMPILED.linear(x, Dense(a), norm=norm)
        return [linear, COMPILED.gate(x, Dense(a), Dense(b), norm=norm, activation="silu")]

    before = torch.get_num_threads()
    together = compute(x)
    try:
        torch.set_num_threads(3)
        for row in range(len(x)):
            for one, all_ in zip(compute(x[row : row + 1]), together, strict=True):
                assert torch.equal(one[0], all_[row])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scale", [2.0**50, 2.0**63, 2.0**110])
def test_numbers_whose_squares_overflow_are_normalised(scale: float) -> None:
    x, a, norm = torch.randn(1, 96) * scale, torch.randn(7, 96), norm_of(96, True, torch.float32)
    close(
        COMPILED.linear(x, Dense(a), norm=norm),
        PLAIN.linear(x.double(), Dense(a.double()), norm=widened(norm)),
        a.dtype,
    )


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(value: float) -> None:
    x, a = torch.ones(1, 96), torch.ones(5, 96)
    x[:, 3] = value
    assert not COMPILED.linear(x, Dense(a), norm=norm_of(96, True, x.dtype)).isfinite().any()
    assert not COMPILED.linear(x, Dense(a)).isfinite().any()
    low = torch.full((1, 4), torch.nan, dtype=torch.bfloat16)
    low.view(torch.int16)[0, 0] = 0x7FFF  # the NaN with the largest payload
    assert COMPILED.linear(low, Dense(torch.eye(4, dtype=torch.bfloat16))).isnan().all()
    q, state = torch.randn(1, 2, 16), kv_state([40], 1, 16)
    state.keys(0)[0, 3] = value
    assert not COMPILED.attend(q, state, step_context([20], 16)).isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "capacities"),
    [([1, 1], [8, 8]), ([2, 1], [1200, 1200]), ([1, 3], [1, 1200]), ([63, 58], [63, 64]), ([1000, 256], [1200, 256])],
)
def test_attention_reads_the_valid_slots_and_no_other(
    threads: int, dtype: torch.dtype, lengths: list[int], capacities: list[int]
) -> None:
    q, state = torch.randn(2, 6, 24).to(dtype), kv_state(capacities, 2, 24, dtype)
    want = [
        ops.attention(
            q[i, :, None][None].double(), state.keys(i)[None, :, :n].double(), state.values(i)[None, :, :n].double()
        )
        for i, n in enumerate(lengths)
    ]
    for i, n in enumerate(lengths):
        state.keys(i)[:, n:] = torch.nan
        state.values(i)[:, n:] = torch.nan
    got = COMPILED.attend(q, state, step_context(lengths, 24))
    close(got, torch.cat(want).squeeze(2), dtype)
    for i, n in enumerate(lengths):  # and alone, in the same bits
        alone = KVState([state.rows[i]])
        assert torch.equal(COMPILED.attend(q[i : i + 1], alone, step_context([n], 24))[0], got[i])


@pytest.mark.parametrize(
    ("heads", "groups", "head_dim"),
    [(1, 1, 16), (8, 1, 64), (3, 3, 80), (32, 8, 128), (2, 1, 256), (5, 1, 24), (7, 1, 40), (9, 3, 32), (22, 2, 16)],
)
def test_attention_of_every_head_shape(heads: int, groups: int, head_dim: int) -> None:
    q, state = torch.randn(1, heads, head_dim), kv_state([700], groups, head_dim)
    context = step_context([650], head_dim)
    close(COMPILED.attend(q, state, context), PLAIN.attend(q, state, context), torch.float32)


def test_attention_of_large_scores() -> None:
    """Pieces whose largest scores differ by more than an exponential can hold."""
    q, state = 30 * torch.randn(1, 1, 32), kv_state([700], 1, 32)
    state.keys(0).mul_(30)
    want = PLAIN.attend(q.double(), state, step_context([700], 32))
    close(COMPILED.attend(q, state, step_context([700], 32)), want, torch.float16)  # scores of 1e4


@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_keys_and_values_of_another_dtype(kv_dtype: torch.dtype) -> None:
    q, state, context = torch.randn(1, 4, 16), kv_state([300], 2, 16, kv_dtype), step_context([290], 16)
    close(COMPILED.attend(q, state, context), PLAIN.attend(q, state, context), torch.float32)
    qkv, reference = torch.randn(1, 8 * 16), state.select([0])
    q = COMPILED.rotate_and_cache(qkv, state, context)
    close(q, PLAIN.rotate_and_cache(qkv, reference, context), torch.float32)
    close(state.keys(0), reference.keys(0), kv_dtype)
    assert torch.equal(state.values(0), reference.values(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 24, 128])
def test_rotate_and_cache_writes_one_slot_per_row(dtype: torch.dtype, head_dim: int) -> None:
    heads, groups = 6, 2
    qkv = torch.randn(2, (heads + 2 * groups) * head_dim).to(dtype)
    state = kv_state([40, 25], groups, head_dim, dtype)
    reference, context = state.select([0, 1]), step_context([17, 8], head_dim)
    close(COMPILED.rotate_and_cache(qkv, state, context), PLAIN.rotate_and_cache(qkv, reference, context), dtype)
    for row, slot in enumerate((16, 7)):
        for store, want in ((state.keys(row), reference.keys(row)), (state.values(row), reference.values(row))):
            close(store[:, slot], want[:, slot], dtype)
            store[:, slot] = want[:, slot]
            assert torch.equal(store, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_hold_what_rows_of_their_own_hold(threads: int, dtype: torch.dtype) -> None:
    heads, groups, head_dim, lengths = 4, 2, 16, [300, 65]
    pool = PagePool(9, [(groups, head_dim)], dtype, "cpu")
    keys, values = pool.layers[0]
    paged = ops.PagedKVState(keys, values)
    keys.normal_(), values.normal_()
    rows = [[8, 2, 5, 0, 7], [3, 1]]
    table = torch.full((2, 6), pool.scratch, dtype=torch.int32)
    for row, numbers in enumerate(rows):
        table[row, : len(numbers)] = torch.tensor(numbers)
    context = step_context(lengths, head_dim, PageTable(table, rows))
    own = KVState.allocate(2, groups, 320, head_dim, dtype, "cpu")
    for row, numbers in enumerate(rows):
        for store, page in ((own.keys(row), keys), (own.values(row), values)):
            store[:, : 64 * len(numbers)] = page[:, numbers].flatten(1, 2)
    qkv = torch.randn(2, (heads + 2 * groups) * head_dim).to(dtype)
    q, same = (COMPILED.rotate_and_cache(qkv, state, context) for state in (paged, own))
    assert torch.equal(q, same)
    assert torch.equal(COMPILED.attend(q, paged, context), COMPILED.attend(q, own, context))
    close(COMPILED.attend(q, paged, context), PLAIN.attend(q.double(), own, context), dtype)


def filters(kind: str, channels: int, modes: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """A long filter shared by pairs of channels, and a state of two rows."""
    shape, skip = (channels // 2, modes), torch.randn(channels).to(dtype)
    if kind == "complex":
        poles = torch.polar(torch.rand(shape), torch.randn(shape))
        residues = torch.complex(torch.randn(shape), torch.randn(shape))
        return ModalFilter(poles, residues, skip), torch.randn(2, channels, modes, dtype=torch.complex64)
    if kind == "real":
        return RealModalFilter(-torch.rand(shape), torch.randn(shape), skip), torch.randn(2, channels, modes)
    return ExplicitFilter(torch.randn(shape).to(dtype), skip), torch.randn(2, channels, modes - 1)


def as_real(state: Tensor) -> Tensor:
    return torch.view_as_real(state) if state.is_complex() else state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "modes", "taps"),
    [
        ("complex", 2, 3),
        ("complex", 1, 1),
        ("complex", 8, 4),
        ("complex", 19, 20),
        ("real", 16, 4),
        ("taps", 1, 2),
        ("taps", 7, 7),
        ("taps", 128, 3),
    ],
)
def test_the_hyena_step_moves_both_states(threads: int, dtype: torch.dtype, kind: str, modes: int, taps: int) -> None:
    channels = 140
    z, weight, bias = (torch.randn(*s).to(dtype) for s in ((2, 3 * channels), (3 * channels, taps), (3 * channels,)))
    long_filter, long = filters(kind, channels, modes, dtype)
    state = HyenaState(torch.randn(2, 3 * channels, taps - 1).to(dtype), long)
    reference = HyenaState(*(t.clone() for t in state))
    exact = long_filter._replace(skip=long_filter.skip.float())
    if kind == "taps":
        exact = exact._replace(taps=exact.taps.float())
    for short_bias in (bias, None, bias):
        got = COMPILED.hyena(z, weight, short_bias, long_filter, state)
        wide = HyenaState(reference.short.float(), reference.long)
        want = PLAIN.hyena(z.float(), weight.float(), None if short_bias is None else bias.float(), exact, wide)
        reference.short.copy_(wide.short)
        close(got, want, dtype)
        assert torch.equal(state.short, reference.short)
        if long.numel():
            close(as_real(state.long), as_real(reference.long), torch.float32)
        z = z.roll(1, dims=1)
    alone = HyenaState(*(t[1:].clone() for t in state))
    both = COMPILED.hyena(z, weight, bias, long_filter, state)
    assert torch.equal(COMPILED.hyena(z[1:].contiguous(), weight, bias, long_filter, alone)[0], both[1])


def test_what_the_kernels_do_not_take_is_computed_by_the_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyaena.ops.cpu.team.run", lambda *_: pytest.fail("a kernel ran"))
    x, a = torch.randn(2, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    assert torch.equal(COMPILED.linear(x, Dense(a)), PLAIN.linear(x, Dense(a)))
    single = torch.randn(2, 8)
    strided = torch.randn(8, 5).T
    assert torch.equal(COMPILED.linear(single, Dense(strided)), PLAIN.linear(single, Dense(strided)))
    mixed = Dense(torch.randn(5, 8))
    call = lambda x: mixed.weight @ x[0]  # noqa: E731
    assert torch.equal(COMPILED.linear(single, call), PLAIN.linear(single, call))
    long_filter, state = filters("complex", 4, 2, torch.float32)
    z, weight = torch.randn(2, 12), torch.randn(12, 1025)
    got, want = (
        by.hyena(z, weight, None, long_filter, HyenaState(torch.zeros(2, 12, 1024), state.clone()))
        for by in (COMPILED, PLAIN)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_looked_up_and_counted(dtype: torch.dtype) -> None:
    table, ids = torch.randn(50, 33).to(dtype), torch.tensor([7, 0, 49])
    context = step_context([4, 9, 1], 16)
    context.limits.copy_(torch.tensor([5, 9, 30], dtype=torch.int32))
    assert torch.equal(COMPILED.embed(ids, table, context), table[ids])
    assert context.lengths.tolist() == [5, 9, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_most_probable_token(threads: int, dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(6, 5000)).to(dtype)
    logits[1, [77, 78, 4000]] = 40  # the first of equals
    logits[2, 4999], logits[3, 17], logits[4] = torch.inf, -torch.nan, -torch.inf
    logits[5, :-1] = -torch.inf
    got_ids, want_ids = torch.empty(6, dtype=torch.int64), torch.empty(6, dtype=torch.int64)
    got, want = COMPILED.argmax(logits, got_ids), PLAIN.argmax(logits, want_ids)
    assert got_ids.tolist() == want_ids.tolist() == [*logits[:2].argmax(-1).tolist(), 0, 0, 0, 4999]
    finite = [0, 1, 5]
    assert torch.equal(got[:, 2], want[:, 2]) and got[:, 2].tolist() == [1, 1, 0, 0, 0, 1]
    torch.testing.assert_close(got[finite], want[finite], rtol=1e-6, atol=1e-5)


def test_logits_that_are_all_nan_with_a_sign(threads: int) -> None:
    """What infinity less infinity is on x86: a search for the largest must not go on behind the logits."""
    logits = torch.full((3, 700), -torch.nan)
    assert logits.signbit().all()
    got = COMPILED.argmax(logits, ids := torch.ones(3, dtype=torch.int64))
    assert ids.tolist() == [0, 0, 0] and got[:, 2].tolist() == [0, 0, 0]


def test_reading_reads_every_block() -> None:
    x = torch.randn(5 * BLOCK)
    torch.testing.assert_close(sums_of_squares(x), x.square().view(5, BLOCK).sum(1))


def test_kernels_are_compiled_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba refuses ``cache=True`` with a RuntimeError in an installation and a home that are read-only."""
    compile_ = memory.cfunc

    def refusing(signature: Any, **options: Any) -> Any:
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return compile_(signature, **options)

    monkeypatch.setattr(memory, "cfunc", refusing)
    counter = array("q", [41])
    team.run(memory.kernel(count).address, counter, 1)
    assert counter[0] == 42


@pytest.mark.parametrize("left", [0, 20])
def test_files_that_were_cut_off_are_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    memory.kernel(count)
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert len(files) == 2
    sizes = [path.stat().st_size for path in files]
    for path in files:
        os.truncate(path, left)
    for _ in range(2):  # the second time from whole files
        counter = array("q", [41])
        team.run(memory.kernel(count).address, counter, 1)
        assert counter[0] == 42
    assert [path.stat().st_size for path in files] == sizes


def test_a_full_disk_costs_nothing_but_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._open_for_write", full)
    counter = array("q", [41])
    team.run(memory.kernel(count).address, counter, 1)
    assert counter[0] == 42


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded")  # Python's own, from 3.12 on
def test_a_fork_of_a_process_with_threads_computes(threads: int) -> None:
    team.compute_alone_behind_forks()  # as every model does
    x = torch.ones(1 << 17).exp()  # on all threads
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of the tests may run here again
        counter = array("q", [41])
        team.run(memory.kernel(count).address, counter, torch.get_num_threads())
        os.write(writer, bytes([counter[0], bool((x.exp() > 1).all())]))
        os._exit(0)
    os.close(writer)
    came = select.select([reader], [], [], 100)[0]  # as long as a busy machine may take
    if not came:
        os.kill(child, signal.SIGKILL)
    assert os.read(reader, 2) == bytes([42, 1])
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0


def count(p):  # what numba compiles
    memory_take(p, 0)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inside", NORMS)
@pytest.mark.parametrize(("batch", "rows", "width"), [(1, 17, 128), (3, 6, 2560), (2, 5, 896), (7, 90, 128)])
def test_narrow_products(
    threads: int, name: str, dtype: torch.dtype, inside: bool | None, batch: int, rows: int, width: int
) -> None:
    x, bias, residual = (torch.randn(*shape).to(dtype) for shape in ((batch, width), (rows,), (batch, rows)))
    a, b = (round_weight(torch.randn(rows, width) / width**0.5 + 0.01, SCHEMES[name]) for _ in range(2))
    norm = norm_of(width, inside, dtype)
    exact, wide = [t.double() for t in (x, bias, residual)], widened(norm)
    dense = [Dense(ops.widen(layer, torch.float64)) for layer in (a, b)]
    close(COMPILED.linear(x, a, norm=norm), PLAIN.linear(exact[0], dense[0], norm=wide), dtype, ROUNDED)
    got = COMPILED.linear(x, a._replace(bias=bias), norm=norm, residual=residual)
    want = PLAIN.linear(exact[0], dense[0]._replace(bias=exact[1]), norm=wide, residual=exact[2])
    close(got, want, dtype, ROUNDED)
    for activation in ("silu", "gelu", "identity"):
        got = COMPILED.gate(x, a, b, norm=norm, activation=activation)
        want = PLAIN.gate(exact[0], dense[0], dense[1], norm=wide, activation=activation)
        close(got, want, dtype, ROUNDED)


@pytest.mark.parametrize("name", INTEGERS)
def test_what_narrow_weights_are_multiplied_with_is_rounded_to_16_bits_of_its_block(name: str) -> None:
    """Products with rows that have a single weight of 1 show the rounded numbers."""
    width = 384
    x = torch.randn(1, width) * torch.logspace(-6, 6, width // 32).repeat_interleave(32)
    x[:, 64:96] = 0
    layer = round_weight(torch.eye(width), SCHEMES[name])
    layer = layer._replace(bias=None)
    exact = x.double() @ ops.widen(layer, torch.float64).T
    most = x.abs().unflatten(1, (-1, 32)).amax(-1).repeat_interleave(32, dim=1).double()
    error = (COMPILED.linear(x, layer).double() - exact).abs()
    # other blocks of a row with minima hold weights that are not quite 0
    rest = 0 if layer.minimum is None else 1e-6 * float(most.max()) * width
    assert bool((error <= most / 65534 + 1e-6 * exact.abs() + rest).all())


@pytest.mark.parametrize("name", INTEGERS)
def test_a_narrow_row_has_the_same_bits_beside_others_and_on_any_threads(name: str, threads: int) -> None:
    x, layer = torch.randn(7, 384), round_weight(torch.randn(301, 384), SCHEMES[name])
    together = COMPILED.linear(x, layer)
    for row in range(7):
        assert torch.equal(COMPILED.linear(x[row : row + 1], layer)[0], together[row])


@pytest.mark.parametrize("rows", [1, 40])
def test_a_narrow_product_that_is_no_kernel_of_the_step_is_repeated_with_it(rows: int) -> None:
    """As in a mixer of one's own: the step is then not recorded."""
    layer, x = round_weight(torch.randn(64, 128), SCHEMES["int8"]), torch.randn(rows, 128).bfloat16()
    _, again = CompiledOperators().record(lambda: ops.linear(x, layer))
    x.copy_(torch.randn(rows, 128))
    close(again(), ops.linear(x, layer), torch.bfloat16)


def test_processors_that_multiply_tiles_leave_many_rows_of_large_matrices_to_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def most(dtype: torch.dtype, *shape: int, scheme: str | None = None) -> int:
        dense = Dense(torch.zeros(*shape, dtype=dtype))
        layer = dense if scheme is None else round_weight(torch.ones(*shape), SCHEMES[scheme])
        matrix = Matrix.of(layer, torch.zeros(1, shape[1], dtype=dtype))
        assert matrix is not None
        return operators._most_rows(dtype, matrix)

    monkeypatch.setattr(operators, "multiplies_tiles", lambda: True)
    assert most(torch.bfloat16, 1024, 1024) == 9 and most(torch.bfloat16, 64, 64) == operators.MOST_ROWS
    assert most(torch.bfloat16, 4096, 1024) == 8 and most(torch.bfloat16, 1024, 1024, scheme="q8_0") == 32
    assert most(torch.float32, 1024, 1024) == operators.MOST_ROWS
    monkeypatch.setattr(operators, "multiplies_tiles", lambda: False)
    assert most(torch.bfloat16, 4096, 1024) == operators.MOST_ROWS


def test_weights_of_8_bit_floating_point_are_widened() -> None:
    x, layer = torch.randn(2, 128), round_weight(torch.randn(8, 128), SCHEMES["float8"])
    assert torch.equal(COMPILED.linear(x, layer), PLAIN.linear(x, layer))


def test_narrow_products_are_computed_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodeOperators, "linear", None)
    monkeypatch.setattr(DecodeOperators, "gate", None)
    for scheme in (SCHEMES[name] for name in INTEGERS):
        layer = round_weight(torch.randn(8, 128), scheme)
        COMPILED.linear(torch.randn(1, 128), layer)
        COMPILED.gate(torch.randn(1, 128), layer, layer, activation="silu")
