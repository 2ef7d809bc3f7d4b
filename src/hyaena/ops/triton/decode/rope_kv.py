"""Rotary positions and the write to the key/value store, between the projection and attention of a decoding step.

The plain twin is ``DecodeOperators.remember``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.step import Slots
from hyaena.ops.triton.decode.pdl import release, wait


@triton.jit
def _remember_kernel(qkv, keys, values, q, used, padding, cos, sin, capacity,
                     HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
                     HALF_PAD: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One head of one row. Heads: queries, keys, values, in the order of the projection."""
    wait(OVERLAP)
    release(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = WIDTH // 2
    i = tl.arange(0, HALF_PAD)
    inside = i < HALF
    slot = tl.load(used).to(tl.int64) - 1
    start = qkv + (row * (HEADS + 2 * GROUPS) + head) * WIDTH
    a = tl.load(start + i, mask=inside, other=0.0)
    b = tl.load(start + HALF + i, mask=inside, other=0.0)
    if head >= HEADS + GROUPS:
        target = values + ((row * GROUPS + head - HEADS - GROUPS) * capacity + slot) * WIDTH
        tl.store(target + i, a, mask=inside)
        tl.store(target + HALF + i, b, mask=inside)
    else:
        angle = (slot - tl.load(padding + row)) * HALF + i
        c = tl.load(cos + angle, mask=inside, other=0.0)
        s = tl.load(sin + angle, mask=inside, other=0.0)
        first = a.to(tl.float32)
        second = b.to(tl.float32)
        if head < HEADS:
            target = q + (row * HEADS + head) * WIDTH
        else:
            target = keys + ((row * GROUPS + head - HEADS) * capacity + slot) * WIDTH
        tl.store(target + i, (first * c - second * s).to(q.dtype.element_ty), mask=inside)
        tl.store(target + HALF + i, (second * c + first * s).to(q.dtype.element_ty), mask=inside)


def remember(qkv: Tensor, keys: Tensor, values: Tensor, slots: Slots, *, overlap: bool = False) -> Tensor:
    """Rotate queries and keys of qkv [B,(H+2G)·head_dim], store keys and values at slot ``used - 1``.

    Returns:
        The queries [B,H,head_dim].
    """
    groups, capacity, width = keys.shape[1:]
    batch, heads = qkv.shape[0], qkv.shape[1] // width - 2 * groups
    q = torch.empty(batch, heads, width, dtype=qkv.dtype, device=qkv.device)
    _remember_kernel[(batch, heads + 2 * groups)](
        qkv, keys, values, q, slots.used, slots.padding, *slots.rotary, capacity,
        HEADS=heads, GROUPS=groups, WIDTH=width, HALF_PAD=triton.next_power_of_2(width // 2), OVERLAP=overlap,
        launch_pdl=overlap, num_warps=1,
    )  # fmt: skip
    return q
