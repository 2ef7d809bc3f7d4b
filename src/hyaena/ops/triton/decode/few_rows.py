"""Products of a matrix, wide or narrow, and 2 to 128 vectors, bound by the speed at which memory streams the matrix.

A program multiplies BN rows of the matrix with all vectors: ``W [BN,K] · x^T [K,M]``, so that the matrix is the operand
that tensor cores take 64 rows of, and M is padded to 16 only. Pieces of the matrix are on their way to shared memory
while earlier ones are multiplied. Narrow ones (``ops.Narrow``) are widened between the two: with scales and minima
where groups of a row have them, and otherwise as they are, so that a sum is scaled at the end. Two numbers of 4 bits in
a byte are 16 columns apart, and their halves are two products. Where a matrix has too few rows to occupy the device,
K is divided among SPLITS programs; the last of them to finish adds their sums, always in the same order. What stands
after the product costs no pass of its own: bias and residual, or a second matrix on the same x with ``act(a)·b`` (gate
and up of an MLP). Sums are float32, and a result is rounded once. A norm before it is a kernel of its own: x would have
to pass through registers on its way to the tensor cores, and pieces would wait for one another
(``docs/log/serving-gpu.md``).

For one vector ``gemv`` is faster, for many a library's product. The references are ``DecodeOperators.linear`` and
``.gate``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.linear import Dense, Linear
from hyaena.ops.narrow import Narrow
from hyaena.ops.triton import pointwise
from hyaena.ops.triton.common import activate
from hyaena.ops.triton.decode.attention import operand
from hyaena.ops.triton.decode.narrow import takes as takes_narrow
from hyaena.ops.triton.decode.pdl import gdc_launch_dependents, gdc_wait
from hyaena.ops.triton.widen import columns, numbers

MOST_ROWS = 128
"""Vectors that one program multiplies at the most."""
DTYPES = (torch.bfloat16, torch.float16)
"""Of matrices and vectors."""


@dataclass(frozen=True)
class Tile:
    """How a product is cut.

    Attributes:
        rows: of the matrix, in a program: a power of two, at least 16.
        width: of K in a piece, a power of two, at least 64.
        splits: programs that share a row.
        stages: pieces in flight, the one that is multiplied among them.
        warps: of a program.
    """

    rows: int = 64
    width: int = 128
    splits: int = 1
    stages: int = 4
    warps: int = 4


def choose_tile(vectors: int, matrices: int, rows: int, width: int, *, narrow: bool = False) -> Tile:
    """For so many vectors, and matrices of ``rows`` rows and ``width`` columns each.

    As many programs as run at the same time, two on each of 132 processors; one, with more in flight, where the vectors
    take half of the traffic. Four for a narrow matrix, whose numbers wait for being widened.
    """
    if matrices == 2:
        if vectors > 64:
            return Tile(width=64, stages=3)
        return Tile(stages=3) if vectors <= 32 else Tile(width=64, stages=4)
    blocks = triton.cdiv(rows, 64)
    if vectors > 64 and blocks > 96:
        return Tile(rows=128, width=64, stages=4, warps=8)
    if vectors > 32 and blocks > 400:
        return Tile(rows=128, width=64, stages=4)
    tile = Tile(stages=4)
    if vectors > 64 and width < 8192:
        tile = Tile(width=64, stages=6)
    splits, most = 1, 264 if vectors <= 32 else 200 if vectors <= 64 else 132
    if narrow:
        tile, most = Tile(stages=4), 528
    while splits < 8 and 2 * splits * blocks <= most and width // (2 * splits) >= 512:
        splits *= 2
    if 32 < vectors <= 64 and splits * blocks > 132:
        tile = Tile(stages=3)
    return replace(tile, splits=splits)


@triton.jit
def read_piece(w, at, k, inside, K, WHOLE: tl.constexpr):
    """A piece [BN,BK] of a matrix; WHOLE where nothing of it lies outside, so that no read is guarded."""
    if WHOLE:
        return tl.load(w + at + k[None, :], eviction_policy="evict_first")
    else:
        return tl.load(w + at + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0,
                       eviction_policy="evict_first")  # fmt: skip


@triton.jit
def read_vectors(x, row, k, K, WHOLE: tl.constexpr):
    """A piece [BM,BK] of the vectors."""
    if WHOLE:
        return tl.load(x + row + k[None, :])
    else:
        return tl.load(x + row + k[None, :], mask=(k < K)[None, :], other=0.0)


def instructions(floating: bool, minima: bool, half: bool) -> str:
    """What makes operands, two of them in a register, of four bytes of 4-bit or e4m3 numbers.

    A 4-bit number is put behind the leading one of 1 + q/128 in bfloat16, or of 1024 + q in float16, which a product
    and a sum make q, or q - 8; another product and sum scale it. Scales are rounded to the dtype of the operands.
    """
    kind = "f16x2" if half else "bf16x2"
    if floating:  # a float16 of the same bits is 2^8 times smaller, a bfloat16 2^120 times
        move, mask, power = (1, 0x3F803F80, 0x5C005C00) if half else (4, 0x07F007F0, 0x7B807B80)
        out = ["{.reg .b32 t, s, p, z;", f"mov.b32 p, {power}; mov.b32 z, 0x80008000;"]
        for i, bytes in enumerate((0x1404, 0x3424)):
            out.append(f"prmt.b32 t, $2, 0, {bytes}; and.b32 s, t, 0x80008000; shr.u32 t, t, {move};")
            out.append(f"and.b32 t, t, {mask}; or.b32 t, t, s; fma.rn.{kind} ${i}, t, p, z;")
        return " ".join([*out, "}"])
    one, factor, less, eight = (
        (0x64006400, 0x3C003C00, 0xE400E400, 0xE408E408) if half else (0x3F803F80, 0x43004300, 0xC300C300, 0xC308C308)
    )
    out = ["{.reg .b32 a, b, c, d, f, l, z;", "prmt.b32 a, $4, 0, 0x4140; prmt.b32 b, $4, 0, 0x4342;"]
    out.append(f"shr.u32 c, a, 4; shr.u32 d, b, 4; mov.b32 f, {factor}; mov.b32 l, {less if minima else eight};")
    out.append("mov.b32 z, 0x80008000;")
    for i, name in enumerate("abcd"):
        scale, least = f"${5 + i % 2}", f"${7 + i % 2}" if minima else "z"
        out.append(f"lop3.b32 {name}, {name}, 0x000F000F, {one}, 0xEA; fma.rn.{kind} {name}, {name}, f, l;")
        out.append(f"fma.rn.{kind} ${i}, {name}, {scale}, {least};")
    return " ".join([*out, "}"])


@triton.jit
def read_units(s, n, first, inside, LINE, GROUPS, BJ: tl.constexpr, WHOLE: tl.constexpr):
    """Of bytes ``first`` and following, the numbers of their groups, float32 [BN,BJ]; 16 bytes belong to one."""
    u = first // 16 + tl.arange(0, BJ // 16)
    place = n.to(tl.int64)[:, None] * GROUPS + (u // (LINE // 16 // GROUPS))[None, :]
    here = inside[:, None] & (u < LINE // 16)[None, :]
    found = tl.load(s + place, mask=None if WHOLE else here, other=None if WHOLE else 0.0).to(tl.float32)
    return tl.reshape(tl.broadcast_to(found[:, :, None], (n.shape[0], BJ // 16, 16)), (n.shape[0], BJ))


@triton.jit
def read_narrow(w, s, m, n, first, inside, LINE, GROUPS, BJ: tl.constexpr, BITS: tl.constexpr,
                FLOATING: tl.constexpr, GROUPED: tl.constexpr, MINIMA: tl.constexpr, ASM: tl.constexpr,
                OPERAND: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Bytes ``first`` and following of the program's rows as operands [BN,BJ]: a tuple of the numbers, or of halves."""
    j = first + tl.arange(0, BJ)
    here = inside[:, None] & (j < LINE)[None, :]
    codes = tl.load(w + n.to(tl.int64)[:, None] * LINE + j[None, :], mask=None if WHOLE else here,
                    other=None if WHOLE else 0, eviction_policy="evict_first")  # fmt: skip
    if FLOATING and len(ASM) > 0:
        return (tl.inline_asm_elementwise(ASM, "=r,=r,r", [codes], dtype=OPERAND.value, is_pure=True, pack=4),)
    if BITS == 4 and len(ASM) > 0:
        scale = read_units(s, n, first, inside, LINE, GROUPS, BJ, WHOLE).to(OPERAND)
        if MINIMA:
            least = read_units(m, n, first, inside, LINE, GROUPS, BJ, WHOLE).to(OPERAND)
            return tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r,r,r,r,r", [codes, scale, least],
                                             dtype=(OPERAND.value, OPERAND.value), is_pure=True, pack=4)  # fmt: skip
        else:
            return tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r,r,r", [codes, scale],
                                             dtype=(OPERAND.value, OPERAND.value), is_pure=True, pack=4)  # fmt: skip
    return widened(codes, s, m, n, first, inside, LINE, GROUPS, BJ, BITS, FLOATING, GROUPED, MINIMA, OPERAND, WHOLE)


@triton.jit
def widened(codes, s, m, n, first, inside, LINE, GROUPS, BJ: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr,
            GROUPED: tl.constexpr, MINIMA: tl.constexpr, OPERAND: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """What ``read_narrow`` returns, without instructions for it."""
    found = numbers(codes, BITS, FLOATING, MINIMA)
    scale, least = 1.0, 0.0
    if GROUPED:
        scale = read_units(s, n, first, inside, LINE, GROUPS, BJ, WHOLE)
        if MINIMA:
            least = read_units(m, n, first, inside, LINE, GROUPS, BJ, WHOLE)
    out = ()
    for i in tl.static_range(len(found)):
        wide = found[i]
        if GROUPED:
            wide = wide * scale + least
        out = out + (wide.to(OPERAND),)
    return out


@triton.jit
def finish(y, bias, residual, out, n, m, M, N, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """Add bias and residual to y [BN,BM] and store it as [M,N]."""
    inside = (n < N)[:, None] & (m < M)[None, :]
    place = m[None, :].to(tl.int64) * N + n[:, None]
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        y += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rows_kernel(x, w, v, scales, bias, residual, out, partial, tickets, M, N, K,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, WHOLE: tl.constexpr,
                 BITS: tl.constexpr, FLOATING: tl.constexpr, GROUPS: tl.constexpr, MINIMA: tl.constexpr,
                 ASM: tl.constexpr, GATE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
                 HAS_RESIDUAL: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr,
                 OVERLAP: tl.constexpr):  # fmt: skip
    """Rows BN of ``w·x``, or of ``act(w·x)·(v·x)`` with GATE. Grid: (rows of the matrix / BN, SPLITS).

    Args:
        scales: of a narrow matrix (BITS 8 or 4), which has no GATE: its scales and minima.
    """
    GROUPED: tl.constexpr = (GROUPS > 1) | MINIMA
    gdc_wait(OVERLAP)
    block = tl.program_id(0)
    part = tl.program_id(1)
    n = block * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    inside = n < N
    at = tl.where(inside, n, 0).to(tl.int64)[:, None] * K
    row = tl.where(m < M, m, 0).to(tl.int64)[:, None] * K
    width = tl.cdiv(tl.cdiv(K, SPLITS), BK) * BK
    begin = part * width
    sums = tl.zeros((BN, BM), tl.float32)
    others = tl.zeros((BN, BM), tl.float32)
    for start in tl.range(begin, tl.minimum(begin + width, K), BK, num_stages=STAGES):
        if BITS == 16:
            k = start + tl.arange(0, BK)
            ws = read_piece(w, at, k, inside, K, WHOLE)
            xs = tl.trans(read_vectors(x, row, k, K, WHOLE)).to(OPERAND)
            sums = tl.dot(ws.to(OPERAND), xs, sums)
            if GATE:
                vs = read_piece(v, at, k, inside, K, WHOLE)
                others = tl.dot(vs.to(OPERAND), xs, others)
        else:
            BJ: tl.constexpr = BK * BITS // 8
            first = start * BITS // 8
            ws = read_narrow(w, scales[0], scales[1], tl.where(inside, n, 0), first, inside, K * BITS // 8, GROUPS, BJ,
                             BITS, FLOATING, GROUPED, MINIMA, ASM, OPERAND, WHOLE)  # fmt: skip
            j = first + tl.arange(0, BJ)
            for i in tl.static_range(8 // BITS):
                xs = tl.trans(read_vectors(x, row, columns(j, i, BITS), K, WHOLE)).to(OPERAND)
                sums = tl.dot(ws[i], xs, sums)
    gdc_launch_dependents(OVERLAP)
    last = True
    if SPLITS > 1:
        place = n[:, None].to(tl.int64) * BM + m[None, :]
        size = tl.num_programs(0).to(tl.int64) * BN * BM
        tl.store(partial + part * size + place, sums)
        tl.debug_barrier()
        last = tl.atomic_add(tickets + block, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(tickets + block, 0)
            sums = tl.zeros((BN, BM), tl.float32)
            for other in tl.static_range(SPLITS):
                sums += tl.load(partial + other * size + place, cache_modifier=".cg")
    if last:
        if BITS < 16 and not GROUPED:
            sums *= tl.load(scales[0] + n, mask=inside, other=0.0)[:, None]
        if GATE:
            sums = activate(sums, ACTIVATION) * others
        finish(sums, bias, residual, out, n, m, M, N, HAS_BIAS, HAS_RESIDUAL)


class Products:
    """Launches the kernel, and owns what programs of one product tell one another.

    Args:
        overlap: kernels start before their predecessors end, see ``pdl``.
        tiles: measured tiles by kind (``linear`` or ``gate``), padded vectors, rows and columns of the matrix, in place
            of the rule's.
    """

    def __init__(self, *, overlap: bool = False, tiles: dict[tuple[str, int, int, int], Tile] | None = None) -> None:
        self.overlap = overlap
        self.tiles = tiles or {}
        self._tickets: Tensor | None = None

    def takes(self, x: Tensor, *layers: Linear) -> bool:
        """Whether the kernel multiplies these vectors [M,K] and matrices [N,K]."""

        def known(layer: Linear) -> bool:
            if isinstance(layer, Narrow):
                return takes_narrow(layer)
            return isinstance(layer, Dense) and layer.weight.dtype == x.dtype

        return x.shape[0] <= MOST_ROWS and x.dtype in DTYPES and all(known(layer) for layer in layers)

    def linear(self, x: Tensor, layer: Dense | Narrow, *, residual: Tensor | None = None) -> Tensor:
        """``residual + weight·x + bias``: x [M,K], weight [N,K] -> [M,N]."""
        return self._launch(x, layer, None, residual, "")

    def gate(self, x: Tensor, gate: Dense | Narrow, up: Dense | Narrow, *, activation: str) -> Tensor:
        """``act(gate·x) · (up·x)``: x [M,K], weights [N,K], of one kind and without biases -> [M,N]."""
        if isinstance(gate, Dense) and isinstance(up, Dense):
            return self._launch(x, gate, up.weight, None, activation)
        return pointwise.gate(self.linear(x, gate), self.linear(x, up), activation)

    def _launch(
        self,
        x: Tensor,
        layer: Dense | Narrow,
        v: Tensor | None,
        residual: Tensor | None,
        activation: str,
    ) -> Tensor:
        w, scales, form = _operands(layer, x.dtype)
        bias = layer.bias
        vectors, width = x.shape
        rows = len(w)
        padded = max(16, triton.next_power_of_2(vectors))
        tile = self.tiles.get(("linear" if v is None else "gate", padded, rows, width))
        tile = tile or choose_tile(padded, 1 if v is None else 2, rows, width, narrow=isinstance(layer, Narrow))
        assert tile.splits == 1 or v is None, "the sums of a gate are not divided"
        blocks = triton.cdiv(rows, tile.rows)
        out = x.new_empty(vectors, rows)
        partial = tickets = out
        if tile.splits > 1:
            partial = x.new_empty(tile.splits * blocks * tile.rows * padded, dtype=torch.float32)
            tickets = self._counters(blocks, x.device)
        _rows_kernel[(blocks, tile.splits)](
            x, w, w if v is None else v, scales, w if bias is None else bias, x if residual is None else residual, out,
            partial, tickets, vectors, rows, width,
            BM=padded, BN=tile.rows, BK=tile.width, SPLITS=tile.splits,
            WHOLE=rows % tile.rows == 0 and width % (tile.width * tile.splits) == 0, **form,
            GATE=v is not None, ACTIVATION=activation, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, OPERAND=operand(x.dtype), STAGES=tile.stages,
            OVERLAP=self.overlap, launch_pdl=self.overlap, num_warps=tile.warps,
        )  # fmt: skip
        return out

    def _counters(self, count: int, device: torch.device) -> Tensor:
        """Zeros, one for each block of rows: programs count there, and the last one puts the zero back."""
        if self._tickets is None or self._tickets.numel() < count:
            self._tickets = torch.zeros(max(1024, count), dtype=torch.int32, device=device)
        return self._tickets


def _operands(layer: Dense | Narrow, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...], dict[str, object]]:
    """The numbers of a matrix [N,…], scales and minima of narrow ones, and the constants that say what they are."""
    if isinstance(layer, Dense):
        return layer.weight, (), {"BITS": 16, "FLOATING": True, "GROUPS": 1, "MINIMA": False, "ASM": ""}
    codes, scale, minimum, _ = layer
    by_hand = not triton.knobs.runtime.interpret and (layer.floating or layer.bits == 4)
    asm = instructions(layer.floating, minimum is not None, dtype == torch.float16) if by_hand else ""
    form = {"FLOATING": layer.floating, "GROUPS": scale.shape[1], "MINIMA": minimum is not None, "ASM": asm}
    numbers = codes.view(torch.int8) if layer.floating else codes
    return numbers, (scale, scale if minimum is None else minimum), {"BITS": layer.bits, **form}
