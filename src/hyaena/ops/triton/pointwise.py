"""Fused RMSNorm, gated activation, RoPE and rounding to e4m3 for prefill, one read and one write each.

For inference: no kernel here has a gradient. Arithmetic is float32, and the result is rounded once. The references are
the functions of the same names in ``ops.norm``, ``ops.gate``, ``ops.rope`` and ``ops.fp8``, which also choose between
the two.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.norm import BOUND
from hyaena.ops.triton.common import activate, rms_scale
from hyaena.ops.triton.pdl import gdc_launch_dependents, gdc_wait

GATE_BLOCK = 2048
"""Numbers of a program of the gate: 16 bytes of bfloat16 from each operand, twice, for each of 128 threads."""
ROTATE_HEADS = 16
"""Heads of a program of the rotation: with heads of 128 channels, 16 bytes of each half for each of 128 threads."""

QUANTIZE_BLOCK = 2048
"""Numbers of a program of the rounding to e4m3: 16 bytes of bfloat16, twice, for each of 128 threads."""


@triton.jit
def _rms_norm_kernel(x, weight, y, eps, WIDTH: tl.constexpr, PAD: tl.constexpr, EPS_INSIDE: tl.constexpr,
                     BOUND: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    gdc_wait(OVERLAP)
    gdc_launch_dependents(OVERLAP)
    start = tl.program_id(0).to(tl.int64) * WIDTH
    i = tl.arange(0, PAD)
    inside = i < WIDTH
    v = tl.load(x + start + i, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    v *= 1.0 / tl.maximum(tl.max(tl.abs(v), axis=0) / BOUND, 1.0)  # by exactly 1 where squares cannot overflow
    v *= rms_scale(v * v, eps, WIDTH, EPS_INSIDE)
    tl.store(y + start + i, (v * g).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(a, b, y, count, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    v = tl.load(a + i, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(b + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + i, (activate(v, ACTIVATION) * w).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"])  # one compilation for prompts of every length
def _rotate_kernel(x, cos, sin, y, length, x_row, x_head, x_time, table_row,
                   HEADS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
                   HALF_PAD: tl.constexpr):  # fmt: skip
    """Some heads of one position of one row; y is [B,T,HEADS,2·HALF]."""
    time = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    row = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, HALF_PAD)
    angle = row * table_row + time * HALF + i
    c = tl.load(cos + angle, mask=i < HALF, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=i < HALF, other=0.0)[None, :]
    inside = (head < HEADS) & (i < HALF)[None, :]
    source = x + row * x_row + time * x_time + head * x_head + i[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = y + ((row * length + time) * HEADS + head) * (2 * HALF) + i[None, :]
    tl.store(target, (first * c - second * s).to(y.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * c + first * s).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_kernel(x, scale, y, count, size, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32) * tl.load(scale)
    v = tl.clamp(v, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + i, v.to(tl.float8e4nv), mask=i < size)


@triton.jit
def _quantize_rows_kernel(x, y, scales, WIDTH: tl.constexpr, PAD: tl.constexpr, LARGEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PAD)
    v = tl.load(x + row * WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(v), axis=0) / LARGEST
    scale = tl.where(scale > 0, scale, 1.0)
    v = tl.clamp(v * (1.0 / scale), -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + row * WIDTH + i, v.to(tl.float8e4nv), mask=i < WIDTH)
    tl.store(scales + row, scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, eps_inside_root: bool = True, overlap: bool = False) -> Tensor:
    """Equals ``ops.rms_norm``: x [..., D], weight [D]. ``overlap``: as a kernel of a step, see ``ops.triton.pdl``."""
    x = x.contiguous()
    width = x.shape[-1]
    y = torch.empty_like(x)
    padded = triton.next_power_of_2(width)
    if x.numel():
        with _device(x):
            _rms_norm_kernel[(x.numel() // width,)](
                x, weight.contiguous(), y, eps, WIDTH=width, PAD=padded, EPS_INSIDE=eps_inside_root, BOUND=BOUND,
                OVERLAP=overlap, launch_pdl=overlap, num_warps=min(16, max(1, padded // 1024)),
            )  # fmt: skip
    return y


def gate(a: Tensor, b: Tensor, activation: str) -> Tensor:
    """Equals ``ops.gate``: a and b of one shape and dtype."""
    a, b = a.contiguous(), b.contiguous()
    y = torch.empty_like(a)
    if a.numel():
        with _device(a):
            _gate_kernel[(triton.cdiv(a.numel(), GATE_BLOCK),)](
                a, b, y, a.numel(), BLOCK=GATE_BLOCK, ACTIVATION=activation, num_warps=4
            )
    return y


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Equals ``ops.rotate``: x [B,heads,T,head_dim], of any strides, as a projection leaves it.

    The result is stored as [B,T,heads,head_dim]. Attention gives its own result the layout of the queries, and so its
    heads lie side by side again for the projection that follows.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, heads, length, width = x.shape
    cos, sin = (t.contiguous() for t in table)
    y = x.new_empty(batch, length, heads, width)
    block = min(ROTATE_HEADS, triton.next_power_of_2(heads))
    half = width // 2
    if x.numel():
        with _device(x):
            _rotate_kernel[(length, triton.cdiv(heads, block), batch)](
                x, cos, sin, y, length, x.stride(0), x.stride(1), x.stride(2), length * half if cos.ndim == 3 else 0,
                HEADS=heads, BLOCK=block, HALF=half, HALF_PAD=triton.next_power_of_2(half), num_warps=4,
            )  # fmt: skip
    return y.transpose(1, 2)


def quantize_fp8(x: Tensor, scale: Tensor, rows: int) -> Tensor:
    """``ops.quantize_fp8`` of x [T,K], with rows of zeros up to ``rows``."""
    y = torch.empty(rows, x.shape[1], dtype=torch.float8_e4m3fn, device=x.device)
    with _device(x):
        _quantize_kernel[(triton.cdiv(y.numel(), QUANTIZE_BLOCK),)](
            x.contiguous(), scale, y, x.numel(), y.numel(), BLOCK=QUANTIZE_BLOCK, LARGEST=448.0, num_warps=4
        )
    return y


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Equals ``ops.fp8.quantize_rows``: x [T,K]."""
    rows, width = x.shape
    y = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    padded = triton.next_power_of_2(width)
    with _device(x):
        _quantize_rows_kernel[(rows,)](
            x.contiguous(), y, scales, WIDTH=width, PAD=padded, LARGEST=448.0, num_warps=min(16, max(1, padded // 1024))
        )
    return y, scales


def _device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
