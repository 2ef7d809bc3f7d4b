"""The operators of a decoding step compiled for the processor: they equal ``ops.step.DecodeOperators``."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from hyaena.ops.cpu import attention, multiplies_tiles, products, team, tokens
from hyaena.ops.cpu import hyena as hyena_kernels
from hyaena.ops.cpu.filters import MOST_TAPS
from hyaena.ops.cpu.matrices import Matrix
from hyaena.ops.cpu.memory import SLOT_TOKENS, TOKENS
from hyaena.ops.cpu.program import Program, Recorder
from hyaena.ops.hyena import HyenaState
from hyaena.ops.kv import KVState
from hyaena.ops.linear import Dense, Linear
from hyaena.ops.long_conv import ExplicitFilter, Filter, ModalFilter, RealModalFilter
from hyaena.ops.narrow import Narrow
from hyaena.ops.pages import PagedKVState
from hyaena.ops.step import DecodeOperators, Norm, RMSNormWeight, StepContext

MOST_ROWS = 64
"""Rows up to which products are computed here; above, a matrix product of torch reuses what it reads more often."""

TILED_ROWS, TILED_NARROW_ROWS = (8, 9 << 20), (16, 1 << 25)
"""Where the processor multiplies tiles of bfloat16, torch's products win over the calls of an unrecorded step above so
many rows and numbers of a matrix times rows; of a dense matrix, and of a narrow one, which is widened first."""

GRAIN = 1 << 14
"""Numbers for which a thread is worth waking, above all where other processes want the cores."""


class CompiledOperators(DecodeOperators):
    """Every weight and every valid slot is read once, at the bandwidth of memory, by torch's own threads.

    The numbers of a row do not depend on other rows, nor on the number of threads. Layers that are not plain weights,
    other dtypes, other kinds of filters, and products of more rows than ``_most_rows``, are computed by the plain
    operators.
    """

    def __init__(self) -> None:
        self._program: Program | None = None  # while a step is recorded
        self._parts = torch.empty(0, device="cpu")  # of attention: every layer uses the same memory

    def record(self, step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], Tensor]]:
        """Take a step; what repeats it is one call, or the step itself where torch computes something in it."""
        with Recorder() as recorder:
            self._program = recorder.program
            try:
                result = step()
            finally:
                self._program = None
        program = recorder.program
        if program is None:
            return result, step

        def again() -> Tensor:
            program.run(_threads(program.work // max(1, program.count)))
            return result

        return result, again

    def embed(self, ids: Tensor, table: Tensor | Callable[[Tensor], Tensor], context: StepContext) -> Tensor:
        if not isinstance(table, Tensor) or not _alike(table) or ids.dtype != torch.int64 or not ids.is_contiguous():
            return super().embed(ids, table, context)
        x = table.new_empty(len(ids), table.shape[1])
        counts = context.lengths.data_ptr(), context.limits.data_ptr()
        words = (ids.data_ptr(), *x.shape, table.data_ptr(), *counts, x.data_ptr())
        self._run(tokens.embed(TOKENS[x.dtype]), words, x.numel())
        return x

    def argmax(self, logits: Tensor, ids: Tensor) -> Tensor:
        if not _alike(logits) or ids.dtype != torch.int64 or not ids.is_contiguous():
            return super().argmax(logits, ids)
        outputs = logits.new_empty(len(logits), 3, dtype=torch.float64)
        words = (logits.data_ptr(), *logits.shape, ids.data_ptr(), outputs.data_ptr())
        self._run(tokens.choose(TOKENS[logits.dtype]), words, len(logits) * GRAIN)  # a row is the work of one thread
        return outputs

    def linear(self, x: Tensor, layer: Linear, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        if not isinstance(layer, Dense | Narrow) or not _multiplies(x, norm, layer.bias, residual):
            return super().linear(x, layer, norm=norm, residual=residual)
        matrix = Matrix.of(layer, x)
        if matrix is None or len(x) > _most_rows(x.dtype, matrix):
            return super().linear(x, layer, norm=norm, residual=residual)
        y = x.new_empty(x.shape[0], matrix.outputs)
        bias, residual_ = (0 if t is None else t.data_ptr() for t in (layer.bias, residual))
        words = (*_product(x, matrix, norm), y.data_ptr(), *matrix.addresses, bias, residual_)
        self._run(products.linear(TOKENS[x.dtype], matrix.form), words, matrix.outputs * matrix.width)
        return y

    def gate(self, x: Tensor, gate: Linear, up: Linear, *, norm: Norm | None = None, activation: str) -> Tensor:
        known = isinstance(gate, Dense | Narrow) and isinstance(up, Dense | Narrow) and gate.bias is up.bias is None
        first, second = (Matrix.of(gate, x), Matrix.of(up, x)) if known and _multiplies(x, norm) else (None, None)
        if first is None or second is None or first[:-1] != second[:-1] or len(x) > _most_rows(x.dtype, first):
            return super().gate(x, gate, up, norm=norm, activation=activation)
        y = x.new_empty(x.shape[0], first.outputs)
        words = (*_product(x, first, norm), y.data_ptr(), *first.addresses, *second.addresses)
        kernel = products.gate(TOKENS[x.dtype], first.form)
        self._run(kernel, (*words, products.ACTIVATION[activation]), 2 * first.outputs * first.width)
        return y

    def rotate_and_cache(self, qkv: Tensor, state: KVState | PagedKVState, context: StepContext) -> Tensor:
        rows = state.through(context.pages)
        cos, sin = context.rotary
        if not _alike(qkv) or rows.dtype not in SLOT_TOKENS or cos.dtype != torch.float32:
            return super().rotate_and_cache(qkv, state, context)
        groups, head_dim = rows.groups, rows.head_dim
        heads = qkv.shape[1] // head_dim - 2 * groups
        q = qkv.new_empty(qkv.shape[0], heads, head_dim)
        words = (*_attention(qkv, heads, rows, context), q.data_ptr(), cos.data_ptr(), sin.data_ptr())
        self._run(attention.rotate_and_cache(TOKENS[qkv.dtype], SLOT_TOKENS[rows.dtype]), words, qkv.numel())
        return q

    def attend(self, q: Tensor, state: KVState | PagedKVState, context: StepContext) -> Tensor:
        rows = state.through(context.pages)
        if not _alike(q) or rows.dtype not in SLOT_TOKENS:
            return super().attend(q, state, context)
        batch, heads, head_dim = q.shape
        y, parts = torch.empty_like(q), self._room(batch * heads * attention.MOST_SPLITS * (head_dim + 2))
        tail = y.data_ptr(), parts.data_ptr(), _bits(head_dim**-0.5)
        words = (*_attention(q, heads, rows, context), *tail)
        work = 2 * sum(context.lengths.tolist()) * rows.groups * head_dim
        kernel = attention.attend(TOKENS[q.dtype], SLOT_TOKENS[rows.dtype], attention.together_of(heads // rows.groups))
        self._run(kernel, words, work)
        return y

    def hyena(
        self, z: Tensor, short_weight: Tensor, short_bias: Tensor | None, long_filter: Filter, state: HyenaState
    ) -> Tensor:
        numbers = _filter(long_filter, state.long, z.dtype)
        short = state.short
        windows = short.dtype in TOKENS and short.is_contiguous() and short_weight.shape[1] <= MOST_TAPS
        if numbers is None or not windows or not _alike(z, short_weight, short_bias, long_filter.skip):
            return super().hyena(z, short_weight, short_bias, long_filter, state)
        kind, a, b = numbers
        channels, skip = z.shape[1] // 3, long_filter.skip
        y = z.new_empty(z.shape[0], channels)
        words = (
            z.data_ptr(),
            z.shape[0],
            channels,
            short_weight.data_ptr(),
            0 if short_bias is None else short_bias.data_ptr(),
            short.data_ptr(),
            state.long.data_ptr(),
            a.shape[0],
            a.shape[1],
            a.data_ptr(),
            b.data_ptr(),
            0 if skip is None else skip.data_ptr(),
            y.data_ptr(),
        )
        kernel = hyena_kernels.step(TOKENS[z.dtype], TOKENS[short.dtype], kind, short_weight.shape[1])
        self._run(kernel, words, z.numel() * (16 + a.shape[1]))
        return y

    def _room(self, count: int) -> Tensor:
        """Memory for the pieces of attention, the same for every layer."""
        if count > len(self._parts):
            self._parts = torch.empty(count, dtype=torch.float32, device="cpu")
        if self._program is not None:
            self._program.kept.append(self._parts)
        return self._parts

    def _run(self, kernel, words: tuple[int, ...], work: int) -> None:
        """Run a kernel that handles so many numbers, and record it while a step is recorded."""
        arguments = array("q", (0, 0, *words))
        if self._program is not None:
            self._program.add(kernel.address, arguments, work)
        team.run(kernel.address, arguments, _threads(work))


def few_rows(x: Tensor, layer: Narrow) -> Tensor | None:
    """``weight·x``: x [...,D] -> [...,E], without bias; None where ``CompiledOperators`` would not compute it."""
    rows = x.reshape(-1, x.shape[-1])
    matrix = Matrix.of(layer, rows) if _multiplies(rows, None) else None
    if matrix is None or len(rows) > _most_rows(x.dtype, matrix):
        return None
    y = CompiledOperators().linear(rows, layer._replace(bias=None))
    return y.view(*x.shape[:-1], y.shape[1])


def _threads(work: int) -> int:
    """As many threads as have ``GRAIN`` of so many numbers, torch's at most."""
    return min(torch.get_num_threads(), max(1, work // GRAIN))


def _multiplies(x: Tensor, norm: Norm | None, *others: Tensor | None) -> bool:
    """Whether the kernels of products take x, a norm, and what is added."""
    return isinstance(norm, RMSNormWeight | None) and _alike(x, *others, None if norm is None else norm.weight)


def _most_rows(dtype: torch.dtype, matrix: Matrix) -> int:
    """Rows up to which the kernels multiply with a matrix: a choice of speed, measured with whole steps."""
    if dtype != torch.bfloat16 or not multiplies_tiles():
        return MOST_ROWS
    rows, work = TILED_ROWS if matrix.form is TOKENS[dtype] else TILED_NARROW_ROWS
    return min(MOST_ROWS, max(rows, work // (matrix.outputs * matrix.width)))


def _alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether tensors have one dtype that kernels take, on the CPU, each without gaps."""
    if x.dtype not in TOKENS or x.device.type != "cpu" or not x.is_contiguous():
        return False
    return all(t is None or (t.dtype == x.dtype and t.is_contiguous()) for t in others)


@lru_cache
def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def _product(x: Tensor, matrix: Matrix, norm: Norm | None) -> tuple[int, ...]:
    """The arguments of a product before its result."""
    least = max(1, products.LEAST_BYTES // matrix.row_bytes)
    words = x.data_ptr(), x.shape[0], matrix.width, matrix.outputs, least, torch.get_num_threads()
    if not isinstance(norm, RMSNormWeight):
        return *words, 0, 0, 0
    return *words, norm.weight.data_ptr(), _bits(norm.eps), int(norm.eps_inside_root)


def _attention(q: Tensor, heads: int, rows, context: StepContext) -> tuple[int, ...]:
    """The arguments of both kernels of attention, up to the result."""
    keys, values, slots = rows.pointers()
    sizes = q.shape[0], heads, rows.groups, rows.head_dim
    tables = q.data_ptr(), *sizes, context.lengths.data_ptr(), keys.data_ptr(), values.data_ptr()
    if context.pages is None or isinstance(rows, KVState):
        return *tables, slots.data_ptr(), 0, 0
    numbers = context.pages.numbers
    return *tables, slots, numbers.data_ptr(), numbers.stride(0)


def _filter(long_filter: Filter, state: Tensor, dtype: torch.dtype) -> tuple[int, Tensor, Tensor] | None:
    """The kind of a long filter and its numbers, [F,N] each; None where the kernels do not take it or its state."""
    if not state.is_contiguous():
        return None
    if isinstance(long_filter, ModalFilter):
        kind, a, b = hyena_kernels.COMPLEX, long_filter.poles, long_filter.residues
        known = state.dtype == a.dtype == b.dtype == torch.complex64
    elif isinstance(long_filter, RealModalFilter):
        kind, a, b = hyena_kernels.REAL, long_filter.log_poles, long_filter.residues
        known = state.dtype == a.dtype == b.dtype == torch.float32 and state.shape[-1] == b.shape[1]
    elif isinstance(long_filter, ExplicitFilter):
        kind, a, b = hyena_kernels.TAPS, long_filter.taps, long_filter.taps
        known = state.dtype == torch.float32 and a.dtype == dtype and state.shape[-1] == a.shape[1] - 1
    else:
        return None
    return (kind, a, b) if known and a.is_contiguous() and b.is_contiguous() else None
