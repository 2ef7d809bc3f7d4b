"""The device's rates, and the fused Hyena operator against its memory bound and against the FFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.session import GpuSession
from benchmarks.kernels.hyena import inputs, leaves
from benchmarks.registry import Row, Step, Summary, Target, spanning
from hyaena.bench.clock import call_times, graph_times
from hyaena.ops import ExplicitFilter, Filter, ModalFilter, RealModalFilter, hyena
from hyaena.sizes import ModelSizes


def rates(session: GpuSession) -> Iterator[Row]:
    """What bounds are computed with."""
    for what, unit, rate in (
        ("bandwidth, read and written bytes", "TB/s", session.bandwidth),
        ("large matrix product", "TFLOP/s", session.flops),
    ):
        values = rate.samples.map(lambda v: v / 1e12).values
        yield Row(what=what, unit=unit, ours=Summary.of(values), note=f"{rate.kernel}.")


def operator(session: GpuSession) -> Iterator[Step]:
    """Forward at each length, forward and backward at one, and every kind of filter."""
    for length in session.sizes.operator:
        yield Step(f"fused operator, T {length:,}", partial(forward, session, length))
    yield Step("fused operator, forward and backward", partial(gradients, session))
    for length in session.sizes.operator_kinds:
        for kind in KINDS:
            yield Step(f"fused operator, {kind.name}, T {length:,}", partial(of_kind, session, kind, length))


class Kind(NamedTuple):
    """A kind of filter, and how many times its memory bound forward, and forward and backward, may take."""

    name: str
    make: Callable[[int, torch.device, torch.dtype], Filter]
    forward: float
    both: float


def taps(count: int, width: int, device: torch.device, dtype: torch.dtype) -> ExplicitFilter:
    """Taps that decay, in groups of 16 channels; a skip from 128 taps on, as in Evo 2."""
    decay = 0.98 ** torch.arange(count, device=device)
    h = torch.randn(max(1, width // 16), count, device=device) * decay
    return ExplicitFilter(h.to(dtype), torch.randn(width, device=device, dtype=dtype) if count >= 128 else None)


def real_modes(count: int, width: int, device: torch.device, dtype: torch.dtype) -> RealModalFilter:
    """Poles between 1/e and 1, most of them slow."""
    log_poles = -(torch.rand(width, count, device=device) ** 4)
    residues = torch.randn(width, count, device=device) * (1e-3 - log_poles).sqrt()
    return RealModalFilter(log_poles, residues, torch.randn(width, device=device))


def complex_modes(count: int, width: int, device: torch.device, dtype: torch.dtype) -> ModalFilter:
    """Poles up to the unit circle."""
    return inputs(1, 1, width, count, 3, dtype, device)[3]


KINDS = (
    Kind("7 taps", partial(taps, 7), 1.25, 2.0),
    Kind("128 taps", partial(taps, 128), 1.25, 2.0),
    Kind("16 real modes", partial(real_modes, 16), 1.5, 2.5),
    Kind("2 complex modes", partial(complex_modes, 2), 1.25, 2.0),
    Kind("4 complex modes", partial(complex_modes, 4), 1.25, 2.0),
    Kind("8 complex modes", partial(complex_modes, 8), 1.5, 2.5),
    Kind("16 complex modes", partial(complex_modes, 16), 1.5, 2.5),
)


def of_kind(session: GpuSession, kind: Kind, length: int) -> list[Row]:
    """The operator with a filter of one kind, replayed as a CUDA graph, against the bytes that it has to move."""
    width, device, dtype = session.sizes.config.hidden_size, session.device, session.dtype
    z = torch.randn(1, length, 3 * width, device=device, dtype=dtype)
    weight = torch.randn(3 * width, 3, device=device, dtype=dtype)
    dy = torch.randn(1, length, width, device=device, dtype=dtype)
    filter = kind.make(width, device, dtype)
    given = [t for t in filter if t is not None]  # type: ignore[attr-defined]
    leaves = [t.detach().requires_grad_() for t in (z, weight, *given)]

    def forward() -> None:
        with torch.inference_mode():
            hyena(z, weight, None, filter, **session.fused)

    def both() -> tuple[Tensor, ...]:
        own = type(filter)(*leaves[2:])  # type: ignore[call-arg]
        y, _ = hyena(leaves[0], leaves[1], None, own, **session.fused)
        return torch.autograd.grad(y, leaves, dy)

    numbers = length * width * dtype.itemsize
    rows = []
    for run, what, moved, target in (
        (forward, "forward", 4 * numbers, kind.forward),
        (both, "forward and backward", 11 * numbers, kind.both),
    ):
        ours = Summary.of(graph_times([run], device, session.sizes.repeats).values)
        bound = Summary.of([moved / session.bandwidth.median])
        rows.append(
            Row(
                what=f"{kind.name}, {what}, T {length:,}",
                unit="s",
                ours=ours,
                baseline_name="memory bound",
                baseline=bound,
                ratio=spanning(ours, bound),
                ratio_name="ours / bound",
                target=Target("<=", target),
            )
        )
    return rows


@torch.inference_mode()
def forward(session: GpuSession, length: int) -> list[Row]:
    """The fused operator against reading its input and writing its output, and against the FFT."""
    config, repeats = session.sizes.config, session.sizes.repeats
    args = inputs(
        1, length, config.hidden_size, config.state_size, config.short_filter_length, session.dtype, session.device
    )
    ours = Summary.of(call_times(lambda: hyena(*args, **session.fused), session.device, repeats).values)
    count = max(2, repeats // 3)
    fft = Summary.of(call_times(lambda: hyena(*args, method="fft"), session.device, count).values)
    bound = Summary.of([ModelSizes(config).operator_bytes(length, session.dtype.itemsize) / session.bandwidth.median])
    name = str(session.dtype).removeprefix("torch.")
    what = f"fused operator, T {length:,}, B 1, D {config.hidden_size}, {name}"
    return [
        Row(
            what=what,
            unit="s",
            ours=ours,
            baseline_name="memory bound",
            baseline=bound,
            ratio=spanning(ours, bound),
            ratio_name="ours / bound",
            target=Target("<=", 1.5),
        ),
        Row(
            what=what,
            unit="s",
            ours=ours,
            baseline_name="fft",
            baseline=fft,
            ratio=spanning(fft, ours),
            ratio_name="baseline / ours",
            target=Target(">=", 10),
        ),
    ]


def gradients(session: GpuSession) -> list[Row]:
    """Forward and backward of the operator, by its own kernels and by autograd through the FFT."""
    config, repeats, length = session.sizes.config, session.sizes.repeats, session.sizes.operator_gradients
    args = inputs(
        1, length, config.hidden_size, config.state_size, config.short_filter_length, session.dtype, session.device
    )
    dy = torch.randn(1, length, config.hidden_size, device=session.device, dtype=session.dtype)
    wanting = [t.detach().requires_grad_() for t in leaves(args)]

    def train(**options: str) -> tuple[Tensor, ...]:
        filter = ModalFilter(torch.view_as_complex(wanting[3]), torch.view_as_complex(wanting[4]), wanting[5])
        y, _ = hyena(*wanting[:3], filter, **options)
        return torch.autograd.grad(y, wanting, dy)

    ours = Summary.of(call_times(lambda: train(**session.fused), session.device, repeats).values)
    fft = Summary.of(call_times(lambda: train(method="fft"), session.device, max(2, repeats // 3)).values)
    return [
        Row(
            what=f"forward and backward of it, T {length:,}",
            unit="s",
            ours=ours,
            baseline_name="autograd through fft",
            baseline=fft,
            ratio=spanning(fft, ours),
            ratio_name="baseline / ours",
            target=Target(">=", 5),
            note="Gradients of the input, short filter, bias, poles, residues and skip.",
        )
    ]
