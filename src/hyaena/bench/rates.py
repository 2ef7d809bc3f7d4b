"""How fast a device moves bytes and multiplies: what a bound is computed with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyaena.bench.clock import Samples, call_times
from hyaena.ops import cpu
from hyaena.tensor_files import memory


@dataclass(frozen=True)
class Rate:
    """What a device can do, as one kernel shows it.

    Attributes:
        samples: bytes or operations per second.
        kernel: the kernel that reached it, with its size.
    """

    samples: Samples
    kernel: str

    @property
    def median(self) -> float:
        return self.samples.median


@dataclass(frozen=True)
class Sizes:
    """How much to move and to multiply: enough to fill the device.

    Attributes:
        moved: the most bytes of the source of a copy, more than caches take.
        side: of the square matrices.
        repeats: measurements of each.
    """

    moved: int
    side: int
    repeats: int

    @property
    def bytes(self) -> int:
        """The most that a measurement allocates, for matrices of at most four bytes a number."""
        return max(2 * self.moved, 3 * 4 * self.side**2)


SIZES = {"cpu": Sizes(128 * 2**20, 1024, 5), "cuda": Sizes(2**30, 8192, 10)}
LEAST = 2**20
"""Fewest bytes that are moved: below, the cost of the call itself would be measured."""


@torch.inference_mode()
def measure_bandwidth(device: torch.device, working_set: int | None = None) -> Rate:
    """Bytes per second of the fastest plain kernel: a copy (read and written bytes count), on a CPU sums as well.

    A processor that copies reads what it overwrites, so that on a CPU a step that only reads may be faster than a copy.
    There the fastest of several counts: a copy, torch's sum, and, where numba is installed, a sum of squares by the
    kernels of decoding, which wait for nothing but memory. And a step whose data stays in the processor's caches is
    faster than main memory: ``working_set``, the bytes of a step, limits the sizes there. On a CUDA device the size is
    fixed.
    """
    sizes = SIZES[device.type]
    count = sizes.moved
    if device.type == "cpu" and working_set is not None:
        count = max(min(LEAST, count), min(count, working_set))
    source, target = (_numbers(max(1, count // 4), device) for _ in range(2))
    kernels: dict[str, tuple[Callable[[], object], int]] = {"copy": (lambda: target.copy_(source), 2 * source.nbytes)}
    if device.type == "cpu":
        kernels |= {name: (lambda read=read: read(source), source.nbytes) for name, read in reading_kernels().items()}
    rates = [
        Rate(call_times(run, device, sizes.repeats).map(lambda s, n=n: n / s), f"{name} of {_size(source.nbytes)}")
        for name, (run, n) in kernels.items()
    ]
    return max(rates, key=lambda rate: rate.median)


def _numbers(count: int, device: torch.device) -> Tensor:
    """float32 numbers to read; on a CPU all the same, which takes less time, and on pages like those of weights."""
    if device.type == "cpu":
        return memory.empty((count,), torch.float32).fill_(1)
    return torch.rand(count, dtype=torch.float32, device=device)


def reading_kernels() -> dict[str, Callable[[Tensor], object]]:
    """What reads float32 numbers in a CPU's memory: torch's sum, and a kernel of ours where numba is installed."""
    kernels: dict[str, Callable[[Tensor], object]] = {"sum": torch.sum}
    if cpu.unsupported_reason(torch.float32) is None:
        from hyaena.ops.cpu.reading import sums_of_squares  # numba takes a second to import

        kernels["compiled sum of squares"] = sums_of_squares
    return kernels


@torch.inference_mode()
def measure_flops(device: torch.device, dtype: torch.dtype) -> Rate:
    """Operations per second of a large matrix product; a multiplication and an addition count as two."""
    sizes = SIZES[device.type]
    # Random numbers: zeros would draw less power, and multiply faster than any model's weights.
    a, b = (torch.randn(sizes.side, sizes.side, dtype=dtype, device=device) for _ in range(2))
    name = f"{str(dtype).removeprefix('torch.')} product of {sizes.side:,}×{sizes.side:,} matrices"
    return Rate(call_times(lambda: a @ b, device, sizes.repeats).map(lambda s: 2 * sizes.side**3 / s), name)


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
