"""Products of a dense matrix and 33 to 64 vectors on Hopper GPUs, whose memory is kept busy between two kernels.

``few_rows`` reads nothing before its vectors exist, and copies with the threads that multiply. Here one warp of a
program asks for pieces of the matrix before it waits for the predecessor, and for more as they are used, as many as a
ring in shared memory holds. The tensor memory accelerator (TMA) copies them. Four other warps multiply them from shared
memory on the tensor cores: ``x [64,64] · W^T [64,BN]``. A program has whole rows of the matrix, about as many as make
one program for each processor, so no two programs share a sum.

Written in Gluon, Triton's language with explicit layouts, which neither its interpreter nor other GPUs run. What this
kernel does not take ``few_rows`` computes, which is as fast for fewer vectors (``docs/log/serving-gpu.md``).

Source: PTX ISA, ``cp.async.bulk.tensor``, ``wgmma``, ``griddepcontrol``; the rules of ``pdl``.
"""

# Gluon's decorators and ranges have no types:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hyaena.ops.linear import Dense
from hyaena.ops.triton.common import activate
from hyaena.ops.triton.pdl import gdc_launch_dependents, gdc_wait

FEWEST_ROWS, MOST_ROWS = 33, 64
"""Vectors: MOST_ROWS are the rows of one instruction of the tensor cores."""
DTYPES = (torch.bfloat16, torch.float16)
"""Of matrices and vectors."""
PANEL = 64
"""Columns of a panel: 128 bytes, as wide as shared memory is swizzled."""


@dataclass(frozen=True)
class Ring:
    """How a matrix is cut, and what of it is in flight.

    Attributes:
        parts: rows of the matrix in a program, as falling powers of two from 16 to 128.
        panels: of a piece.
        stages: pieces of the matrix in flight.
        ahead: pieces of the vectors in flight, at most as many.
        early: pieces of the matrix that are prefetched before the wait. More would delay the few reads of a small
            kernel before the product.
    """

    parts: tuple[int, ...]
    panels: int = 2
    stages: int = 4
    ahead: int = 4
    early: int = 4


def choose_ring(matrices: int, rows: int, programs: int) -> Ring:
    """A ring that takes almost all shared memory of a processor.

    Args:
        matrices: that are read together, 1 or 2.
        rows: of each.
        programs: that run concurrently.
    """
    each = min(8, -(-rows // (16 * programs)))
    parts = tuple(16 << i for i in (3, 2, 1, 0) if each >> i & 1)
    ring = Ring(parts)
    piece = sum(parts) * matrices * ring.panels * PANEL * 2
    vectors = MOST_ROWS * ring.panels * PANEL * 2
    room = 216 << 10
    ahead = min(8, room // (piece + vectors))
    stages = (room - ahead * vectors) // piece
    return Ring(parts, ring.panels, stages, ahead, min(ring.early, stages))


@gluon.jit
def ask_matrix(w, ring, bar, row, piece, slot, PANELS: gl.constexpr):
    """Let rows ``row`` and following of a piece be copied to a slot of the ring of each part."""
    BOX: gl.constexpr = w.block_shape[0]
    for i in gl.static_range(len(ring)):
        for j in gl.static_range(ring[i].shape[1] // BOX):
            for h in gl.static_range(PANELS):
                to = ring[i].index(slot * PANELS + h).slice(j * BOX, BOX)
                tma.async_copy_global_to_shared(w, [row, (piece * PANELS + h) * 64], bar, to)
            row += BOX


@gluon.jit
def ask_matrices(w, v, ws, vs, full, first, piece, slot, PANELS: gl.constexpr, BYTES: gl.constexpr):
    """Let a piece of both matrices be copied, or of the only one, where vs is empty."""
    bar = full.index(slot)
    mbarrier.expect(bar, BYTES)
    ask_matrix(w, ws, bar, first, piece, slot, PANELS)
    ask_matrix(v, vs, bar, first, piece, slot, PANELS)


@gluon.jit
def ask_vectors(x, xs, x_full, piece, slot, PANELS: gl.constexpr):
    """Let a piece of the vectors be copied to a slot of their ring."""
    bar = x_full.index(slot)
    mbarrier.expect(bar, x.block_shape[0] * PANELS * 128)
    for h in gl.static_range(PANELS):
        at = [0, (piece * PANELS + h) * 64]
        tma.async_copy_global_to_shared(x, at, bar, xs.index(slot * PANELS + h))


@gluon.jit
def following(slot, phase, COUNT: gl.constexpr):
    """The next slot of a ring, and the phase of its barrier."""
    slot += 1
    if slot == COUNT:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def bring(w, v, x, ws, vs, xs, full, x_full, free, first, pieces, PANELS: gl.constexpr, STAGES: gl.constexpr,
          AHEAD: gl.constexpr, EARLY: gl.constexpr, BYTES: gl.constexpr, OVERLAP: gl.constexpr):  # fmt: skip
    """One warp: ask for pieces, some of the matrix before the wait, and more as slots of the rings become free."""
    for slot in gl.static_range(EARLY):
        if slot < pieces:
            ask_matrices(w, v, ws, vs, full, first, slot, slot, PANELS, BYTES)
    gdc_wait(OVERLAP)
    for slot in gl.static_range(AHEAD):
        if slot < pieces:
            ask_vectors(x, xs, x_full, slot, slot, PANELS)
    for slot in gl.static_range(EARLY, STAGES):
        if slot < pieces:
            ask_matrices(w, v, ws, vs, full, first, slot, slot, PANELS, BYTES)
    if pieces <= STAGES:
        gdc_launch_dependents(OVERLAP)
    slot = 0
    phase = 0
    x_slot = 0
    x_phase = 0
    for piece in range(pieces - AHEAD):
        mbarrier.wait(free.index(slot), phase)
        ask_vectors(x, xs, x_full, piece + AHEAD, x_slot, PANELS)
        if piece + STAGES < pieces:
            ask_matrices(w, v, ws, vs, full, first, piece + STAGES, slot, PANELS, BYTES)
        if piece + STAGES == pieces - 1:
            gdc_launch_dependents(OVERLAP)
        slot, phase = following(slot, phase, STAGES)
        x_slot, x_phase = following(x_slot, x_phase, AHEAD)


@gluon.jit
def multiply_panel(sums, panel, ring, at):
    """Begin to add ``panel·rows^T`` to the sums of every part."""
    out = ()
    for i in gl.static_range(len(ring)):
        rows = ring[i].index(at).permute((1, 0))
        out = out + (hopper.warpgroup_mma(panel, rows, sums[i], is_async=True),)
    return out


@gluon.jit
def wait_for(sums, others, PENDING: gl.constexpr):
    """Wait until all products but the last PENDING are in the sums."""
    both = sums + others
    done = hopper.warpgroup_mma_wait(PENDING, deps=both)
    if len(both) == 1:
        return (done,), ()
    else:
        return done[: len(sums)], done[len(sums) :]


@gluon.jit
def multiply(ws, vs, xs, full, x_full, free, bias, residual, out, first, M, N, pieces, PANELS: gl.constexpr,
             STAGES: gl.constexpr, AHEAD: gl.constexpr, ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr,
             HAS_RESIDUAL: gl.constexpr, OVERLAP: gl.constexpr):  # fmt: skip
    """Four warps: multiply pieces as they arrive, and store the sums."""
    gdc_wait(OVERLAP)
    sums = ()
    others = ()
    row = first
    for i in gl.static_range(len(ws)):
        y = gl.full((xs.shape[1], ws[i].shape[1]), 0.0, gl.float32, layout=sum_layout(ws[i].shape[1]))
        if len(vs) > 0:
            others = others + (y,)
        m = gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, y.type.layout))[:, None]
        n = row + gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, y.type.layout))
        if HAS_BIAS:
            y += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[None, :]
        if HAS_RESIDUAL:
            y += gl.load(residual + m * N + n[None, :], mask=(m < M) & (n < N)[None, :], other=0.0).to(gl.float32)
        sums = sums + (y,)
        row += ws[i].shape[1]
    slot = 0
    phase = 0
    x_slot = 0
    x_phase = 0
    before = 0
    for piece in range(pieces):
        mbarrier.wait(full.index(slot), phase)
        mbarrier.wait(x_full.index(x_slot), x_phase)
        for h in gl.static_range(PANELS):
            panel = xs.index(x_slot * PANELS + h)
            sums = multiply_panel(sums, panel, ws, slot * PANELS + h)
            others = multiply_panel(others, panel, vs, slot * PANELS + h)
        sums, others = wait_for(sums, others, (len(ws) + len(vs)) * PANELS)  # those of the piece before have ended
        if piece > 0:
            mbarrier.arrive(free.index(before), count=1)
        before = slot
        slot, phase = following(slot, phase, STAGES)
        x_slot, x_phase = following(x_slot, x_phase, AHEAD)
    sums, others = wait_for(sums, others, 0)
    row = first
    for i in gl.static_range(len(ws)):
        y = sums[i]
        if len(vs) > 0:
            y = activate(y, ACTIVATION) * others[i]
        m = gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, y.type.layout))[:, None]
        n = row + gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, y.type.layout))[None, :]
        gl.store(out + m * N + n, y.to(out.dtype.element_ty), mask=(m < M) & (n < N))
        row += ws[i].shape[1]


@gluon.constexpr_function
def sum_layout(rows):
    """Of sums [64,rows] on the tensor cores."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, rows, 16])


@gluon.constexpr_function
def total(parts):
    """Rows of all parts."""
    return sum(parts)


@gluon.jit
def _streamed_kernel(w, v, x, bias, residual, out, M, N, K, PARTS: gl.constexpr, PANELS: gl.constexpr,
                     STAGES: gl.constexpr, AHEAD: gl.constexpr, EARLY: gl.constexpr, GATE: gl.constexpr,
                     ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
                     OVERLAP: gl.constexpr):  # fmt: skip
    """Rows of ``w·x``, or of ``act(w·x)·(v·x)`` with GATE. Grid: (programs,).

    Args:
        w, v, x: descriptors of boxes of the smallest part, of the same, and of 64 vectors; one panel each.
    """
    ws = ()
    vs = ()
    for i in gl.static_range(len(PARTS)):
        ws = ws + (gl.allocate_shared_memory(w.dtype, [STAGES * PANELS, PARTS[i], 64], w.layout),)
        if GATE:
            vs = vs + (gl.allocate_shared_memory(w.dtype, [STAGES * PANELS, PARTS[i], 64], w.layout),)
    xs = gl.allocate_shared_memory(x.dtype, [AHEAD * PANELS, 64, 64], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=1)
    for slot in gl.static_range(AHEAD):
        mbarrier.init(x_full.index(slot), count=1)
    hopper.fence_async_shared()
    first = gl.program_id(0) * total(PARTS)
    pieces = gl.cdiv(K, PANELS * 64)
    BYTES: gl.constexpr = total(PARTS) * (2 if GATE else 1) * PANELS * 128
    gl.warp_specialize(
        [
            (multiply, (ws, vs, xs, full, x_full, free, bias, residual, out, first, M, N, pieces, PANELS, STAGES, AHEAD,
                        ACTIVATION, HAS_BIAS, HAS_RESIDUAL, OVERLAP)),
            (bring, (w, v, x, ws, vs, xs, full, x_full, free, first, pieces, PANELS, STAGES, AHEAD, EARLY, BYTES,
                     OVERLAP)),
        ],
        [1],
        [24],
    )  # fmt: skip


class StreamedProducts:
    """Launches the kernel.

    Args:
        overlap: kernels start before their predecessors end, see ``pdl``.
    """

    def __init__(self, *, overlap: bool = False) -> None:
        self.overlap = overlap

    def takes(self, x: Tensor, *layers: Dense) -> bool:
        """Whether the kernel multiplies these vectors [M,K] and matrices [N,K]: TMA copies units of 16 bytes."""
        fits = FEWEST_ROWS <= len(x) <= MOST_ROWS and x.dtype in DTYPES and aligned(x)
        return fits and all(layer.weight.dtype == x.dtype and aligned(layer.weight) for layer in layers)

    def linear(self, x: Tensor, layer: Dense, *, residual: Tensor | None = None) -> Tensor:
        """``residual + weight·x + bias``: x [M,K], weight [N,K] -> [M,N]."""
        return self._launch(x, layer, None, residual, "")

    def gate(self, x: Tensor, gate: Dense, up: Dense, *, activation: str) -> Tensor:
        """``act(gate·x) · (up·x)``: x [M,K], weights [N,K], without biases -> [M,N]."""
        return self._launch(x, gate, up, None, activation)

    def _launch(self, x: Tensor, layer: Dense, other: Dense | None, residual: Tensor | None, activation: str) -> Tensor:
        rows, width = layer.weight.shape
        ring = choose_ring(1 if other is None else 2, rows, processors(x.device))
        box = ring.parts[-1]
        out = x.new_empty(len(x), rows)
        w = describe(layer.weight, box)
        _streamed_kernel[(-(-rows // sum(ring.parts)),)](
            w, w if other is None else describe(other.weight, box), describe(x, MOST_ROWS),
            x if layer.bias is None else layer.bias, x if residual is None else residual, out, len(x), rows, width,
            PARTS=ring.parts, PANELS=ring.panels, STAGES=ring.stages, AHEAD=ring.ahead, EARLY=ring.early,
            GATE=other is not None, ACTIVATION=activation, HAS_BIAS=layer.bias is not None,
            HAS_RESIDUAL=residual is not None, OVERLAP=self.overlap, launch_pdl=self.overlap, num_warps=4, maxnreg=128,
        )  # fmt: skip
        return out


def describe(tensor: Tensor, rows: int) -> TensorDescriptor:
    """A tensor [M,K] in boxes of so many rows and one panel."""
    kind = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    box = [rows, PANEL]
    return TensorDescriptor.from_tensor(tensor, box, gl.NVMMASharedLayout.get_default_for(box, kind))


def aligned(tensor: Tensor) -> bool:
    """Whether TMA can copy boxes of a tensor [M,K]."""
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 and tensor.shape[1] % 8 == 0


def processors(device: torch.device) -> int:
    """Of the device; of an H100 where there is none, as the compiler's tests want."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
