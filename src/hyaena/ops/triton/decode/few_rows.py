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
from hyaena.ops.triton.common import activate
from hyaena.ops.triton.decode.attention import operand
from hyaena.ops.triton.decode.narrow import takes as takes_narrow
from hyaena.ops.triton.pdl import gdc_launch_dependents, gdc_wait
from hyaena.ops.triton.widen import numbers

MOST_ROWS = 128
"""Vectors that one program multiplies at the most."""
DTYPES = (torch.bfloat16, torch.float16)
"""Of matrices and vectors."""


@dataclass(frozen=True)
class Tile:
    """How a product is cut.

    Attributes:
        rows: of the matrix, in a program: a power of two, at least 16.
        width: of K in a piece, a power of two, at least 64; for 4 bits at least 128.
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
    take half of the traffic. Four for a narrow matrix, whose numbers wait for being widened, and two for two of them,
    which take twice the registers.
    """
    blocks = triton.cdiv(rows, 64)
    if narrow:
        if vectors > 32:
            return Tile(splits=divide(blocks, width, 528))
        if matrices == 2:
            return Tile(width=256, stages=2, splits=divide(blocks, width, 264))
        return Tile(width=256, stages=3, splits=divide(blocks, width, 528))
    if matrices == 2:
        if vectors > 64:
            return Tile(width=64, stages=3)
        return Tile(stages=3) if vectors <= 32 else Tile(width=64, stages=4)
    if vectors > 64 and blocks > 96:
        return Tile(rows=128, width=64, stages=4, warps=8)
    if vectors > 32 and blocks > 400:
        return Tile(rows=128, width=64, stages=4)
    tile = Tile(stages=4)
    if vectors > 64 and width < 8192:
        tile = Tile(width=64, stages=6)
    splits = divide(blocks, width, 264 if vectors <= 32 else 200 if vectors <= 64 else 132)
    if 32 < vectors <= 64 and splits * blocks > 132:
        tile = Tile(stages=3)
    return replace(tile, splits=splits)


def divide(blocks: int, width: int, most: int) -> int:
    """Programs that share the rows of a block, so that there are ``most`` in all, and each has enough to read."""
    splits = 1
    while splits < 8 and 2 * splits * blocks <= most and width // (2 * splits) >= 512:
        splits *= 2
    return splits


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
    """What makes operands, two of them in a register, of a word of 4-bit or e4m3 numbers.

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
        out.append(f"lop3.b32 {name}, {name}, 0x000F000F, {one}, 0xEA; fma.rn.{kind} {name}, {name}, f, l;")
        out.append(f"fma.rn.{kind} ${i}, {name}, $5, {'$6' if minima else 'z'};")
    return " ".join([*out, "}"])


@triton.jit
def read_groups(s, n, first, inside, UNITS, GROUPS, EACH: tl.constexpr, BU: tl.constexpr, WHOLE: tl.constexpr):
    """Numbers of the groups of units ``first`` and following, float32 [BN,BU]; a group has EACH units of 16 bytes."""
    u = first + tl.arange(0, BU)
    here = inside[:, None] & (u < UNITS)[None, :]
    place = n.to(tl.int64)[:, None] * GROUPS + (u // EACH)[None, :]
    return tl.load(s + place, mask=None if WHOLE else here, other=None if WHOLE else 0.0).to(tl.float32)


@triton.jit
def for_words(found, OPERAND: tl.constexpr, ASM: tl.constexpr):
    """[BN,BU] -> [BN,4*BU], for the words of each unit: rounded, and for instructions two of the same in a word."""
    found = found.to(OPERAND)
    if len(ASM) > 0:
        found = found.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        found = found | (found << 16)
    BN: tl.constexpr = found.shape[0]
    BU: tl.constexpr = found.shape[1]
    return tl.reshape(tl.broadcast_to(found[:, :, None], (BN, BU, 4)), (BN, 4 * BU))


@triton.jit
def in_turns(words):
    """[BN,BW] -> [BN,BW]: of sixteen words, the first of each four, then the second, and so on.

    A thread has words t and t + 4 of eight as operands, so those that it has are 16 bytes of memory.
    """
    BN: tl.constexpr = words.shape[0]
    BW: tl.constexpr = words.shape[1]
    return tl.reshape(tl.permute(tl.reshape(words, (BN, BW // 16, 4, 4)), (0, 1, 3, 2)), (BN, BW))


@triton.jit
def in_turns_columns(BW: tl.constexpr, i: tl.constexpr):
    """Columns of the numbers that ``operands`` makes of words, the i-th of its results: [2*BW]."""
    k = tl.arange(0, 2 * BW)
    return 32 * (k // 32 * 4 + k // 2 % 4) + 4 * (k // 8 % 4) + k % 2 + (2 * (i % 2) + 16 * (i // 2))


@triton.jit
def operands(words, scale, least, MINIMA: tl.constexpr, ASM: tl.constexpr, OPERAND: tl.constexpr):
    """4-bit numbers of words [BN,BW]: four tensors [BN,2*BW], of columns ``in_turns_columns``."""
    BN: tl.constexpr = words.shape[0]
    BW: tl.constexpr = words.shape[1]
    out = ()
    if len(ASM) > 0:
        found = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,r,r,r", [words, scale, least], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        for i in tl.static_range(4):
            pair = in_turns(found[i])
            low = (pair & 0xFFFF).to(tl.int16).to(OPERAND, bitcast=True)
            high = (pair >> 16).to(tl.int16).to(OPERAND, bitcast=True)
            out = out + (tl.reshape(tl.join(low, high), (BN, 2 * BW)),)
    else:
        words = in_turns(words)
        scale = in_turns(scale)
        least = in_turns(least)
        for i in tl.static_range(4):
            byte = words >> (16 * (i % 2) + 4 * (i // 2))
            low = (byte & 15).to(tl.float32)
            high = ((byte >> 8) & 15).to(tl.float32)
            if not MINIMA:
                low -= 8.0
                high -= 8.0
            pair = tl.join(low * scale + least, high * scale + least)
            out = out + (tl.reshape(pair, (BN, 2 * BW)).to(OPERAND),)
    return out


@triton.jit
def read_four_bits(w, s, m, n, first, inside, K, GROUPS: tl.constexpr, EACH: tl.constexpr, BW: tl.constexpr,
                   MINIMA: tl.constexpr, ASM: tl.constexpr, OPERAND: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Words ``first`` and following of the program's rows as ``operands``."""
    j = first + tl.arange(0, BW)
    here = inside[:, None] & (j < K // 8)[None, :]
    words = tl.load(w + n.to(tl.int64)[:, None] * (K // 8) + j[None, :], mask=None if WHOLE else here,
                    other=None if WHOLE else 0, eviction_policy="evict_first")  # fmt: skip
    scale = for_words(read_groups(s, n, first // 4, inside, K // 32, GROUPS, EACH, BW // 4, WHOLE), OPERAND, ASM)
    least = tl.zeros_like(scale)
    if MINIMA:
        least = for_words(read_groups(m, n, first // 4, inside, K // 32, GROUPS, EACH, BW // 4, WHOLE), OPERAND, ASM)
    return operands(words, scale, least, MINIMA, ASM, OPERAND)


@triton.jit
def read_eight_bits(w, s, n, first, inside, K, GROUPS: tl.constexpr, EACH: tl.constexpr, BJ: tl.constexpr,
                    FLOATING: tl.constexpr, ASM: tl.constexpr, OPERAND: tl.constexpr,
                    WHOLE: tl.constexpr):  # fmt: skip
    """Bytes ``first`` and following of the program's rows as operands [BN,BJ]."""
    j = first + tl.arange(0, BJ)
    here = inside[:, None] & (j < K)[None, :]
    codes = tl.load(w + n.to(tl.int64)[:, None] * K + j[None, :], mask=None if WHOLE else here,
                    other=None if WHOLE else 0, eviction_policy="evict_first")  # fmt: skip
    if FLOATING and len(ASM) > 0:
        return tl.inline_asm_elementwise(ASM, "=r,=r,r", [codes], dtype=OPERAND.value, is_pure=True, pack=4)
    wide = numbers(codes, 8, FLOATING, False)[0]
    if GROUPS > 1:
        scale = read_groups(s, n, first // 16, inside, K // 16, GROUPS, EACH, BJ // 16, WHOLE)
        BN: tl.constexpr = codes.shape[0]
        wide *= tl.reshape(tl.broadcast_to(scale[:, :, None], (BN, BJ // 16, 16)), (BN, BJ))
    return wide.to(OPERAND)


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
                 BITS: tl.constexpr, FLOATING: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr,
                 MINIMA: tl.constexpr, ASM: tl.constexpr, GATE: tl.constexpr, ACTIVATION: tl.constexpr,
                 HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr,
                 OVERLAP: tl.constexpr):  # fmt: skip
    """Rows BN of ``w·x``, or of ``act(w·x)·(v·x)`` with GATE. Grid: (rows of the matrix / BN, SPLITS).

    Args:
        scales: of narrow matrices (BITS 8 or 4): scales and minima of each.
    """
    gdc_wait(OVERLAP)
    block = tl.program_id(0)
    part = tl.program_id(1)
    n = block * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    inside = n < N
    line = tl.where(inside, n, 0)
    at = line.to(tl.int64)[:, None] * K
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
        elif BITS == 8:
            ws = read_eight_bits(w, scales[0], line, start, inside, K, GROUPS, EACH, BK, FLOATING, ASM, OPERAND,
                                 WHOLE)  # fmt: skip
            xs = tl.trans(read_vectors(x, row, start + tl.arange(0, BK), K, WHOLE)).to(OPERAND)
            sums = tl.dot(ws, xs, sums)
            if GATE:
                vs = read_eight_bits(v, scales[2], line, start, inside, K, GROUPS, EACH, BK, FLOATING, ASM, OPERAND,
                                     WHOLE)  # fmt: skip
                others = tl.dot(vs, xs, others)
        else:
            ws = read_four_bits(w, scales[0], scales[1], line, start // 8, inside, K, GROUPS, EACH, BK // 8, MINIMA,
                                ASM, OPERAND, WHOLE)  # fmt: skip
            if GATE:
                vs = read_four_bits(v, scales[2], scales[3], line, start // 8, inside, K, GROUPS, EACH, BK // 8, MINIMA,
                                    ASM, OPERAND, WHOLE)  # fmt: skip
            for i in tl.static_range(4):
                xs = tl.trans(read_vectors(x, row, start + in_turns_columns(BK // 8, i), K, WHOLE)).to(OPERAND)
                sums = tl.dot(ws[i], xs, sums)
                if GATE:
                    others = tl.dot(vs[i], xs, others)
    gdc_launch_dependents(OVERLAP)
    last = True
    if SPLITS > 1:
        place = n[:, None].to(tl.int64) * BM + m[None, :]
        size = tl.num_programs(0).to(tl.int64) * BN * BM
        tl.store(partial + part * size + place, sums)
        if GATE:
            tl.store(partial + (SPLITS + part) * size + place, others)
        tl.debug_barrier()
        last = tl.atomic_add(tickets + block, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(tickets + block, 0)
            sums = tl.zeros((BN, BM), tl.float32)
            others = tl.zeros((BN, BM), tl.float32)
            for other in tl.static_range(SPLITS):
                sums += tl.load(partial + other * size + place, cache_modifier=".cg")
                if GATE:
                    others += tl.load(partial + (SPLITS + other) * size + place, cache_modifier=".cg")
    if last:
        if BITS == 8 and GROUPS == 1:
            sums *= tl.load(scales[0] + n, mask=inside, other=0.0)[:, None]
            if GATE:
                others *= tl.load(scales[2] + n, mask=inside, other=0.0)[:, None]
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
        return self._launch(x, gate, up, None, activation)

    def _launch(
        self,
        x: Tensor,
        layer: Dense | Narrow,
        other: Dense | Narrow | None,
        residual: Tensor | None,
        activation: str,
    ) -> Tensor:
        w, scales, form = _operands(layer, x.dtype)
        v, more, _ = (w, (), None) if other is None else _operands(other, x.dtype)
        bias, matrices = layer.bias, 1 if other is None else 2
        vectors, width = x.shape
        rows = len(w)
        padded = max(16, triton.next_power_of_2(vectors))
        tile = self.tiles.get(("linear" if other is None else "gate", padded, rows, width))
        tile = tile or choose_tile(padded, matrices, rows, width, narrow=isinstance(layer, Narrow))
        blocks = triton.cdiv(rows, tile.rows)
        out = x.new_empty(vectors, rows)
        partial = tickets = out
        if tile.splits > 1:
            partial = x.new_empty(matrices * tile.splits * blocks * tile.rows * padded, dtype=torch.float32)
            tickets = self._counters(blocks, x.device)
        _rows_kernel[(blocks, tile.splits)](
            x, w, v, scales + more, w if bias is None else bias, x if residual is None else residual, out,
            partial, tickets, vectors, rows, width,
            BM=padded, BN=tile.rows, BK=tile.width, SPLITS=tile.splits,
            WHOLE=rows % tile.rows == 0 and width % (tile.width * tile.splits) == 0, **form,
            GATE=other is not None, ACTIVATION=activation, HAS_BIAS=bias is not None,
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
        return layer.weight, (), {"BITS": 16, "FLOATING": True, "GROUPS": 1, "EACH": 1, "MINIMA": False, "ASM": ""}
    codes, scale, minimum, _ = layer
    by_hand = not triton.knobs.runtime.interpret and (layer.floating or layer.bits == 4)
    asm = instructions(layer.floating, minimum is not None, dtype == torch.float16) if by_hand else ""
    units = codes.shape[1] // 16
    form = {"FLOATING": layer.floating, "GROUPS": scale.shape[1], "EACH": units // scale.shape[1]}
    form |= {"MINIMA": minimum is not None, "ASM": asm}
    numbers = codes.view(torch.int32) if layer.bits == 4 else codes.view(torch.int8)
    return numbers, (scale, scale if minimum is None else minimum), {"BITS": layer.bits, **form}
