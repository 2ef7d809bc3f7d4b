"""The operators of a decoding step compiled for the processor: they equal ``ops.step.DecodeOperators``."""

from __future__ import annotations

import math
import struct
from array import array
from functools import lru_cache

import torch
from torch import Tensor

from hyaena.ops.cpu import attention, narrow, products, team
from hyaena.ops.cpu import hyena as hyena_kernels
from hyaena.ops.cpu.memory import TOKENS
from hyaena.ops.hyena import HyenaState
from hyaena.ops.kv import KVState
from hyaena.ops.linear import Dense, Linear
from hyaena.ops.long_conv import ExplicitFilter, Filter, ModalFilter, RealModalFilter
from hyaena.ops.narrow import Narrow
from hyaena.ops.pages import PagedKVState
from hyaena.ops.step import DecodeOperators, Norm, RMSNormWeight, StepContext

MOST_ROWS = 16
"""Rows up to which products are computed here; above, a matrix product of torch reuses what it reads more often."""

GRAIN = 1 << 14
"""Numbers for which a thread is worth waking, above all where other processes want the cores."""


class CompiledOperators(DecodeOperators):
    """Every weight and every valid slot is read once, at the bandwidth of memory, by torch's own threads.

    The numbers of a row do not depend on other rows, nor on the number of threads. Layers that are not plain weights,
    other dtypes, other kinds of filters, and products of more than ``MOST_ROWS`` rows, are computed by the plain
    operators.
    """

    def linear(self, x: Tensor, layer: Linear, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        if isinstance(layer, Narrow):
            return self._narrow_linear(x, layer, norm, residual)
        if (
            len(x) > MOST_ROWS
            or not isinstance(layer, Dense)
            or not isinstance(norm, RMSNormWeight | None)
            or not _alike(x, layer.weight, layer.bias, residual, None if norm is None else norm.weight)
        ):
            return super().linear(x, layer, norm=norm, residual=residual)
        token, outputs = TOKENS[x.dtype], layer.weight.shape[0]
        y = x.new_empty(x.shape[0], outputs)
        bias, residual_ = (0 if t is None else t.data_ptr() for t in (layer.bias, residual))
        words = (*_product(x, layer.weight, norm), y.data_ptr(), layer.weight.data_ptr(), bias, residual_)
        _run(products.linear(token, token), words, layer.weight.numel())
        return y

    def gate(self, x: Tensor, gate: Linear, up: Linear, *, norm: Norm | None = None, activation: str) -> Tensor:
        if isinstance(gate, Narrow) and isinstance(up, Narrow):
            return self._narrow_gate(x, gate, up, norm, activation)
        if (
            len(x) > MOST_ROWS
            or not (isinstance(gate, Dense) and isinstance(up, Dense))
            or not (gate.bias is None and up.bias is None and isinstance(norm, RMSNormWeight | None))
            or not _alike(x, gate.weight, up.weight, None if norm is None else norm.weight)
        ):
            return super().gate(x, gate, up, norm=norm, activation=activation)
        token = TOKENS[x.dtype]
        y = x.new_empty(x.shape[0], gate.weight.shape[0])
        kind = products.ACTIVATION[activation]
        words = (
            *_product(x, gate.weight, norm),
            y.data_ptr(),
            gate.weight.data_ptr(),
            up.weight.data_ptr(),
            kind,
        )
        _run(products.gate(token, token), words, 2 * gate.weight.numel())
        return y

    def _narrow_linear(self, x: Tensor, layer: Narrow, norm: Norm | None, residual: Tensor | None) -> Tensor:
        form = _form(x, layer, norm, layer.bias, residual)
        if form is None or not isinstance(norm, RMSNormWeight | None):
            return super().linear(x, layer, norm=norm, residual=residual)
        y = x.new_empty(x.shape[0], layer.shape[0])
        bias, residual_ = (0 if t is None else t.data_ptr() for t in (layer.bias, residual))
        words = (*_narrow_product(x, layer, norm), y.data_ptr(), layer.codes.data_ptr(), bias, residual_)
        _run(narrow.linear(TOKENS[x.dtype]), (*words, *form, *_scales(layer)), math.prod(layer.shape))
        return y

    def _narrow_gate(self, x: Tensor, gate: Narrow, up: Narrow, norm: Norm | None, activation: str) -> Tensor:
        form = _form(x, gate, norm)
        alike = form is not None and form == _form(x, up, norm) and gate.bias is up.bias is None
        if not alike or form is None or not isinstance(norm, RMSNormWeight | None):
            return super().gate(x, gate, up, norm=norm, activation=activation)
        y = x.new_empty(x.shape[0], gate.shape[0])
        kind = products.ACTIVATION[activation]
        words = (*_narrow_product(x, gate, norm), y.data_ptr(), gate.codes.data_ptr(), up.codes.data_ptr(), kind)
        words = (*words, *form, *_scales(gate), *_scales(up))
        _run(narrow.gate(TOKENS[x.dtype]), words, 2 * math.prod(gate.shape))
        return y

    def rotate_and_cache(self, qkv: Tensor, state: KVState | PagedKVState, context: StepContext) -> Tensor:
        rows = state.through(context.pages)
        cos, sin = context.rotary
        if not _alike(qkv) or rows.dtype not in TOKENS or cos.dtype != torch.float32:
            return super().rotate_and_cache(qkv, state, context)
        groups, head_dim = rows.groups, rows.head_dim
        heads = qkv.shape[1] // head_dim - 2 * groups
        q = qkv.new_empty(qkv.shape[0], heads, head_dim)
        words = (*_attention(qkv, heads, rows, context), q.data_ptr(), cos.data_ptr(), sin.data_ptr())
        _run(attention.rotate_and_cache(TOKENS[qkv.dtype], TOKENS[rows.dtype]), words, qkv.numel())
        return q

    def attend(self, q: Tensor, state: KVState | PagedKVState, context: StepContext) -> Tensor:
        rows = state.through(context.pages)
        if not _alike(q) or rows.dtype not in TOKENS:
            return super().attend(q, state, context)
        batch, heads, head_dim = q.shape
        lengths = context.lengths.tolist()
        splits = -(-max(lengths) // attention.SPLIT)
        y = torch.empty_like(q)
        parts = torch.empty(batch * heads * splits * (head_dim + 2), dtype=torch.float32, device="cpu")
        tail = (y.data_ptr(), splits, parts.data_ptr(), _bits(head_dim**-0.5))
        words = (*_attention(q, heads, rows, context), *tail)
        _run(attention.attend(TOKENS[q.dtype], TOKENS[rows.dtype]), words, 2 * sum(lengths) * rows.groups * head_dim)
        return y

    def hyena(
        self, z: Tensor, short_weight: Tensor, short_bias: Tensor | None, long_filter: Filter, state: HyenaState
    ) -> Tensor:
        numbers = _filter(long_filter, state.long, z.dtype)
        short = state.short
        windows = short.dtype in TOKENS and short.is_contiguous()
        if numbers is None or not windows or not _alike(z, short_weight, short_bias, long_filter.skip):
            return super().hyena(z, short_weight, short_bias, long_filter, state)
        kind, a, b = numbers
        channels, skip = z.shape[1] // 3, long_filter.skip
        y = z.new_empty(z.shape[0], channels)
        words = (
            z.data_ptr(),
            z.shape[0],
            channels,
            short_weight.shape[1],
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
        _run(hyena_kernels.step(TOKENS[z.dtype], TOKENS[short.dtype], kind), words, z.numel() * (16 + a.shape[1]))
        return y


def _run(kernel, words: tuple[int, ...], work: int) -> None:
    """Run a kernel that handles so many numbers, on as many threads as have ``GRAIN`` of them, torch's at most."""
    threads = min(torch.get_num_threads(), max(1, work // GRAIN))
    team.run(kernel.address, array("q", (0, *words)), threads)


def _alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether tensors have one dtype that kernels take, on the CPU, each without gaps."""
    if x.dtype not in TOKENS or x.device.type != "cpu" or not x.is_contiguous():
        return False
    return all(t is None or (t.dtype == x.dtype and t.is_contiguous()) for t in others)


@lru_cache
def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def _form(x: Tensor, layer: Narrow, norm: Norm | None, *others: Tensor | None) -> tuple[int, int] | None:
    """The kind of a narrow weight for the kernels and its group; None where they do not take it or the others."""
    if len(x) > MOST_ROWS or not isinstance(norm, RMSNormWeight | None):
        return None
    if not _alike(x, *others, None if norm is None else norm.weight):
        return None
    if not all(t is None or t.is_contiguous() for t in layer[:3]):
        return None
    width = layer.shape[1]
    group = width // layer.scale.shape[1]
    if layer.bits == 8 and layer.scale.dtype == torch.float32 and group == width:
        return narrow.ROW8, group
    if layer.scale.dtype != torch.float16 or group % 32 or (layer.bits == 8 and layer.minimum is not None):
        return None
    if layer.bits == 8:
        return narrow.BLOCK8, group
    return (narrow.BLOCK4 if layer.minimum is None else narrow.AFFINE4), group


def _scales(layer: Narrow) -> tuple[int, int]:
    return layer.scale.data_ptr(), 0 if layer.minimum is None else layer.minimum.data_ptr()


def _narrow_product(x: Tensor, layer: Narrow, norm: RMSNormWeight | None) -> tuple[int, ...]:
    """The arguments of a narrow product before its result."""
    return _product(x, layer.codes, norm, layer.shape[1])


def _product(x: Tensor, weight: Tensor, norm: RMSNormWeight | None, width: int | None = None) -> tuple[int, ...]:
    """The arguments of a product before its result; ``width`` where it is not that of the tensor."""
    outputs, stored = weight.shape
    width = width or stored
    block = max(1, products.BLOCK_BYTES // (stored * weight.element_size()))
    if norm is None:
        return x.data_ptr(), x.shape[0], width, outputs, block, 0, 0, 0
    numbers = norm.weight.data_ptr(), _bits(norm.eps), int(norm.eps_inside_root)
    return x.data_ptr(), x.shape[0], width, outputs, block, *numbers


def _attention(q: Tensor, heads: int, rows, context: StepContext) -> tuple[int, ...]:
    """The arguments of both kernels of attention, up to the result."""
    keys, values, slots = rows.pointers()
    sizes = q.shape[0], heads, rows.groups, rows.head_dim
    tables = 0, q.data_ptr(), *sizes, context.lengths.data_ptr(), keys.data_ptr(), values.data_ptr()
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
        kind, b = hyena_kernels.REAL, long_filter.residues
        known = state.dtype == b.dtype == torch.float32 and state.shape[-1] == b.shape[1]
        a = torch.expm1(long_filter.log_poles.to(state.dtype))
    elif isinstance(long_filter, ExplicitFilter):
        kind, a, b = hyena_kernels.TAPS, long_filter.taps, long_filter.taps
        known = state.dtype == torch.float32 and a.dtype == dtype and state.shape[-1] == a.shape[1] - 1
    else:
        return None
    return (kind, a, b) if known and a.is_contiguous() and b.is_contiguous() else None
