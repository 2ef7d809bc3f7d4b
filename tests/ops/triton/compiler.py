"""Compiles kernels for an NVIDIA GPU on a machine without one, at the sizes of a 7B model; nothing is launched.

    python tests/ops/triton/compiler.py 90 decoding

The interpreter knows no types of the device, and takes what the compiler refuses: whoever changes a kernel without a
GPU runs this. Prints a line of JSON for every kernel: its name, and the shared memory that a program takes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

WIDTH, LENGTH = 4096, 512


class Driver:
    """As much of a driver as the compiler asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def numbers(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def taps() -> None:
    """Taps of a short and of a long filter: forward and backward."""
    from hyaena.ops.triton.hyena import explicit_launch

    z, short = numbers(1, LENGTH, 3 * WIDTH), numbers(1, 3 * WIDTH, 2)
    weight, dy = numbers(3 * WIDTH, 3), numbers(1, LENGTH, WIDTH)
    for given in (numbers(256, 7), numbers(256, 128), torch.zeros(256, 128)):
        skip = numbers(WIDTH) if given.shape[1] == 128 else None
        long = torch.zeros(1, WIDTH, given.shape[1] - 1)
        operands = explicit_launch.Operands(z, weight, None, given, skip, short, long, None, None)
        explicit_launch.forward(operands)
        explicit_launch.backward(dy, None, None, operands)


def many_modes() -> None:
    """Complex and real modes by products: forward and backward."""
    from hyaena.ops.triton.hyena import modal_backward_launch, modal_launch, segments_launch

    overlap = driver.active.get_current_target().arch >= 90
    segments_launch.can_overlap = lambda device: overlap
    z, weight, short = numbers(1, LENGTH, 3 * WIDTH), numbers(3 * WIDTH, 3), numbers(1, 3 * WIDTH, 2)
    for modes, real in ((8, True), (16, False)):
        pairs = torch.zeros(WIDTH, modes, 2)
        state = torch.zeros(1, WIDTH, modes, 2)
        operands = modal_launch.Operands(z, weight, None, pairs, pairs, numbers(WIDTH), short, state, None, None, real)
        modal_launch.forward_products(operands)
        modal_backward_launch.backward_products(numbers(1, LENGTH, WIDTH), None, operands)
        segments_launch.forward_in_registers(operands)
    pairs = torch.zeros(WIDTH, 4, 2)
    operands = modal_launch.Operands(z, weight, None, pairs, pairs, numbers(WIDTH), None, None, None, None, False)
    segments_launch.backward_in_registers(numbers(1, LENGTH, WIDTH), None, operands)


def packed() -> None:
    """Rows without padding, with and without copies of their states."""
    from hyaena.ops import HyenaState, ModalFilter
    from hyaena.ops.hyena import RowTables
    from hyaena.ops.triton.decode.packed_hyena import packed_hyena

    modes = torch.zeros(WIDTH, 2, dtype=torch.complex64)
    filter = ModalFilter(modes, modes, torch.zeros(WIDTH))
    state = HyenaState(numbers(2, 3 * WIDTH, 2), torch.zeros(2, WIDTH, 2, dtype=torch.complex64))
    rows = RowTables(*torch.zeros(8, dtype=torch.int32).split([2, 2, 3, 1]))
    for copies in (state, None):
        for overlap in (False, True):
            z, weight = numbers(LENGTH, 3 * WIDTH), numbers(3 * WIDTH, 3)
            packed_hyena(z, weight, numbers(3 * WIDTH), filter, state, rows, copies, overlap=overlap)


def decoding() -> None:
    """Products of one row, of several, and of narrow weights, with every activation."""
    from hyaena.ops import ACTIVATIONS, Dense, Narrow, RMSNormWeight
    from hyaena.ops.triton.decode import few_rows, gemv, narrow, row_tiles
    from hyaena.ops.triton.widen import widen

    weight, norm = numbers(512, WIDTH), RMSNormWeight(numbers(WIDTH), 1e-6, False)
    layer = Narrow(
        torch.zeros(512, WIDTH // 2, dtype=torch.uint8), *(torch.zeros(512, WIDTH // 32).half() for _ in range(2))
    )
    products = few_rows.Products(overlap=True)
    narrow.linear(numbers(8, WIDTH).float(), layer, residual=numbers(8, 512).float(), overlap=True)
    narrow.linear(numbers(1, WIDTH), layer, norm=norm, residual=numbers(1, 512), overlap=True)
    products.linear(numbers(16, WIDTH), layer, residual=numbers(16, 512))
    eight = torch.zeros(512, WIDTH, dtype=torch.int8), torch.zeros(512, 1)
    for other in (Narrow(*eight), Narrow(eight[0].view(torch.float8_e4m3fn), eight[1])):
        narrow.linear(numbers(1, WIDTH), other, overlap=True)
        products.linear(numbers(16, WIDTH), other)
        widen(other, torch.bfloat16)
    for rows in (16, 96):
        products.linear(numbers(rows, WIDTH), Dense(weight), residual=numbers(rows, 512))
    gemv.linear(numbers(1, WIDTH), Dense(weight), norm=norm, overlap=True)
    for rows in (2, 4, 8):
        row_tiles.linear(numbers(rows, WIDTH), Dense(weight), norm=norm, residual=numbers(rows, 512), overlap=True)
    for activation in ACTIVATIONS:
        narrow.gate(numbers(1, WIDTH), layer, layer, norm=norm, activation=activation, overlap=True)
        products.gate(numbers(16, WIDTH), Dense(weight), Dense(weight), activation=activation)
        gemv.gate(numbers(1, WIDTH), weight, weight, norm=norm, activation=activation, overlap=True)
        row_tiles.gate(numbers(2, WIDTH), *2 * [Dense(weight)], norm=norm, activation=activation, overlap=True)


def streamed() -> None:
    """Products of 33 to 64 rows on Hopper, with parts of one, two and three sizes."""
    from hyaena.ops import ACTIVATIONS, Dense
    from hyaena.ops.triton.decode.streamed import StreamedProducts

    products = StreamedProducts(overlap=True)
    for rows in (WIDTH, 3 * WIDTH):
        products.linear(numbers(64, WIDTH), Dense(numbers(rows, WIDTH), numbers(rows)), residual=numbers(64, rows))
    for activation in ACTIVATIONS:
        gate = Dense(numbers(14_336, WIDTH))
        products.gate(numbers(33, WIDTH), gate, gate, activation=activation)


PARTS: dict[str, Callable[[], None]] = {
    "taps": taps,
    "many_modes": many_modes,
    "packed": packed,
    "decoding": decoding,
    "streamed": streamed,
}


def main(capability: int, part: str) -> None:
    """Compile what a part launches."""
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        print(json.dumps({"kernel": self.fn.__name__, "shared": kernel.metadata.shared}), flush=True)
        return kernel

    driver.set_active(Driver(capability))
    JITFunction.run = compile_only
    PARTS[part]()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
