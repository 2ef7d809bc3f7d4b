"""The fused Hyena operator on one GPU: how far each tiling and each method is from the memory bound.

    python -m benchmarks.kernels.hyena --output FOLDER

For whoever changes these kernels; ``tests/ops/triton`` shows that they are right, and ``benchmarks.gpu`` measures what
the operator reaches. Against bounds from the bandwidth of the same run: the forward of all tilings and of the plain
methods, forward and backward, and the step of one token. About two minutes on an H100. ``--quick`` runs it at tiny
sizes on any device.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.log import Log
from hyaena.bench.clock import Call, Samples, call_times, graph_times, release
from hyaena.bench.rates import measure_bandwidth
from hyaena.ops import HyenaState, ModalFilter, hyena
from hyaena.ops.triton.hyena import launch, step_launch
from hyaena.ops.triton.hyena.launch import BackwardTiling, Operands, Tiling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
WIDTH, MODES, TAPS = 4096, 2, 3
LENGTHS = (8192, 32_768, 131_072)
QUICK = (16, (20, 40), 2)
"""Width, lengths and repeats of ``--quick``."""

Arguments = tuple[Tensor, Tensor, Tensor, ModalFilter]
"""The operator's: z, the short filter's weight and bias, the long filter."""

TILINGS = {
    "default": Tiling(),
    "groups of 2": Tiling(group=2),
    "2 stages": Tiling(stages=2),
    "4 stages": Tiling(stages=4),
    "L 8": Tiling(steps=8),
    "one channel a thread": Tiling(segments=8, packed=False),
    "64 channels, 2 parts": Tiling(channels=64, segments=8, parts=2),
}

BACKWARD = {
    "chunks 64": BackwardTiling(),
    "chunks 32": BackwardTiling(chunk=32),
    "chunks 128": BackwardTiling(chunk=128),
    "64 channels": BackwardTiling(channels=64),
    "64 channels, batch 2": BackwardTiling(channels=64, batch=2),
    "256 channels": BackwardTiling(channels=256),
}


def inputs(
    batch: int, length: int, width: int, modes: int, taps: int, dtype: torch.dtype, device: torch.device
) -> Arguments:
    """Random arguments of the operator; poles up to the unit circle."""
    size = 1 - torch.rand(width, modes, device=device) ** 4 * 0.9
    poles = torch.polar(size, torch.rand(width, modes, device=device) * 3)
    residues = torch.randn(width, modes, dtype=torch.complex64, device=device) * (1 - size + 1e-3).sqrt()
    z = torch.randn(batch, length, 3 * width, device=device, dtype=dtype)
    weight = torch.randn(3 * width, taps, device=device, dtype=dtype)
    bias = torch.randn(3 * width, device=device, dtype=dtype)
    return z, weight, bias, ModalFilter(poles, residues, torch.randn(width, device=device))


def leaves(args: Arguments) -> list[Tensor]:
    """Everything that has a gradient: z, weight, bias, poles and residues as real pairs, skip."""
    z, weight, bias, filter = args
    assert filter.skip is not None
    return [z, weight, bias, torch.view_as_real(filter.poles), torch.view_as_real(filter.residues), filter.skip]


# --- the launchers: all that is known here of their arguments


def _operands(args: Arguments) -> Operands:
    return Operands(*leaves(args), short=None, long=None, mask=None, reset=None)


def forward_call(args: Arguments, tiling: Tiling | None) -> Call:
    """The forward kernel in a tiling, without states."""
    return partial(launch.forward, _operands(args), tiling)


def backward_call(args: Arguments, dy: Tensor, tiling: BackwardTiling | None) -> Call:
    """The backward kernels in a tiling, without states."""
    return partial(launch.backward, dy, None, None, _operands(args), tiling)


def step_call(args: Arguments, state: HyenaState) -> Call:
    """The kernel of one token, which updates the states in place."""
    states = (state.short, torch.view_as_real(state.long))
    return partial(step_launch.step_modes, *leaves(args), *states, *states)


# --- what is measured


class Bench:
    """The sizes of a run, its bandwidth, and the file that its figures go to."""

    def __init__(self, log: Log, quick: bool) -> None:
        self.log = log
        self.width, self.lengths, self.repeats = QUICK if quick else (WIDTH, LENGTHS, 30)
        self.bandwidth = measure_bandwidth(DEVICE)
        log.note(device=log.device, bandwidth=self.bandwidth.median, kernel=self.bandwidth.kernel, width=self.width)

    def inputs(self, batch: int, length: int) -> Arguments:
        return inputs(batch, length, self.width, MODES, TAPS, DTYPE, DEVICE)

    def times(self, run: Call) -> Samples:
        return call_times(run, DEVICE, self.repeats, warmup=3 if DEVICE.type == "cuda" else 0)

    def record(self, seconds: Samples, count: int, **what: Any) -> None:
        """A figure beside the time that ``count`` bytes take."""
        self.log.figure(seconds, count / self.bandwidth.median, **what)


def compare_forward(bench: Bench) -> None:
    """Every tiling and the plain methods, at every length."""
    for length in bench.lengths:
        args, moved = bench.inputs(1, length), 4 * bench.width * length * DTYPE.itemsize
        calls: dict[str, Call] = {name: forward_call(args, tiling) for name, tiling in TILINGS.items()}
        calls |= {method: partial(hyena, *args, method=method) for method in ("blocked", "fft")}
        for name, call in calls.items():
            try:
                bench.record(bench.times(call), moved, what="forward", T=length, name=name)
            except torch.cuda.OutOfMemoryError:
                print(f"  {name} at {length}: out of memory", flush=True)
            release()


def compare_backward(bench: Bench) -> None:
    """Every tiling of the backward kernels, then forward and backward by every method."""
    length = bench.lengths[1]
    args = bench.inputs(1, length)
    dy = torch.randn(1, length, bench.width, device=DEVICE, dtype=DTYPE)
    moved = bench.width * length * DTYPE.itemsize
    for name, tiling in BACKWARD.items():
        bench.record(bench.times(backward_call(args, dy, tiling)), 7 * moved, what="backward", T=length, name=name)
    wanting = [t.detach().requires_grad_() for t in leaves(args)]

    def train(**options: str) -> tuple[Tensor, ...]:
        filter = ModalFilter(torch.view_as_complex(wanting[3]), torch.view_as_complex(wanting[4]), wanting[5])
        y, _ = hyena(*wanting[:3], filter, **options)
        return torch.autograd.grad(y, wanting, dy)

    ways = {"triton": {"backend": "triton"}, "blocked": {"method": "blocked"}, "fft": {"method": "fft"}}
    for name, options in ways.items():
        bench.record(bench.times(partial(train, **options)), 11 * moved, what="both", T=length, name=name)
        release()


@torch.inference_mode()
def compare_steps(bench: Bench) -> None:
    """One token: the kernel and the recurrence."""
    for batch in (1, 64):
        args = bench.inputs(batch, 1)
        shape = (batch, bench.width, MODES)
        state = HyenaState(
            torch.randn(batch, 3 * bench.width, TAPS - 1, device=DEVICE, dtype=DTYPE),
            torch.randn(*shape, dtype=torch.complex64, device=DEVICE),
        )
        moved = args[0].nbytes * 4 // 3 + 2 * sum(t.nbytes for t in state) + sum(t.nbytes for t in leaves(args)[1:])
        calls = {"step kernel": step_call(args, state), "recurrence": partial(hyena, *args, state, method="recurrence")}
        for name, call in calls.items():
            bench.record(
                graph_times([call] * (20 if DEVICE.type == "cuda" else 1), DEVICE, bench.repeats),
                moved,
                what="step",
                B=batch,
                name=name,
            )


def compile_one(tiling: Tiling | BackwardTiling) -> None:
    """Compile one tiling, in a process of its own, into Triton's cache on disk."""
    if isinstance(tiling, BackwardTiling):
        args = inputs(1, 100, WIDTH, MODES, TAPS, DTYPE, DEVICE)
        backward_call(args, torch.randn(1, 100, WIDTH, device=DEVICE, dtype=DTYPE), tiling)()
    else:
        args = inputs(1, 2 * tiling.segments * tiling.steps + 1, WIDTH, MODES, TAPS, DTYPE, DEVICE)
        forward_call(args, tiling)()
    torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options = Log.options(parser).parse_args(argv)
    torch.manual_seed(0)
    began = time.perf_counter()
    if not options.quick:
        with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
            list(pool.map(compile_one, [*TILINGS.values(), *BACKWARD.values()]))
        print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
    parts: tuple[Callable[[Bench], None], ...] = (compare_forward, compare_backward, compare_steps)
    bench = Bench(Log(options, "hyena", DEVICE), options.quick)
    for part in parts:
        part(bench)
    print(f"done after {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
