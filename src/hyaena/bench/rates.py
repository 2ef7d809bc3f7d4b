"""How fast a device copies and multiplies: what floors are divided by."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one quantity, in the order in which they were taken."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median."""
        return (max(self.values) - min(self.values)) / self.median

    def map(self, function: Callable[[float], float]) -> Samples:
        """The same measurements in another unit."""
        return Samples(tuple(map(function, self.values)))


@dataclass(frozen=True)
class Rates:
    """What a device can do.

    Attributes:
        bandwidth: bytes per second of a large copy on the device, read and written bytes both counted.
        flops: operations per second of a large matrix product, a multiplication and an addition counted as two.
    """

    bandwidth: Samples
    flops: Samples


@dataclass(frozen=True)
class Sizes:
    """How much to move and to multiply: more than caches hold, and enough to fill the device.

    Attributes:
        copied: bytes of the source of the copy.
        side: of the square matrices.
        repeats: measurements of each.
    """

    copied: int
    side: int
    repeats: int

    @property
    def bytes(self) -> int:
        """The most that measuring holds at once, for matrices of at most four bytes a number."""
        return max(2 * self.copied, 3 * 4 * self.side**2)


SIZES = {"cpu": Sizes(128 * 2**20, 1024, 5), "cuda": Sizes(2**30, 8192, 20)}


def measure_rates(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Rates:
    """Measure a device, with matrices of a dtype."""
    return Rates(_bandwidth(device, sizes), _flops(device, dtype, sizes))


def times(run: Callable[[], object], device: torch.device, repeats: int) -> Samples:
    """How long each of several calls keeps a device busy, in seconds.

    On a CUDA device all calls are queued before any is waited for, so that the host's share of a launch hides behind
    the call before.
    """
    if device.type != "cuda":
        stamps = [time.perf_counter()]
        for _ in range(repeats):
            run()
            stamps.append(time.perf_counter())
        return Samples(tuple(end - begin for begin, end in itertools.pairwise(stamps)))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return Samples(tuple(begin.elapsed_time(end) / 1e3 for begin, end in events))


def warm_times(run: Callable[[], object], device: torch.device, repeats: int) -> Samples:
    """The same after a few calls off the clock, which compile, choose algorithms and wake the device."""
    for _ in range(3):
        run()
    return times(run, device, repeats)


@torch.inference_mode()
def _bandwidth(device: torch.device, sizes: Sizes) -> Samples:
    source = torch.randint(-128, 128, (sizes.copied,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return warm_times(lambda: target.copy_(source), device, sizes.repeats).map(lambda s: 2 * sizes.copied / s)


@torch.inference_mode()
def _flops(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Samples:
    # Random numbers: zeros would draw less power, and multiply faster than any model's weights.
    a, b = (torch.randn(sizes.side, sizes.side, dtype=dtype, device=device) for _ in range(2))
    return warm_times(lambda: a @ b, device, sizes.repeats).map(lambda s: 2 * sizes.side**3 / s)
