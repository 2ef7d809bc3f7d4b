"""The device's rates, and the fused Hyena operator against its memory bound and against the FFT."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.session import GpuSession
from benchmarks.kernels.hyena import inputs, leaves
from benchmarks.registry import Row, Step, Summary, Target, spanning
from hyaena.bench.clock import call_times
from hyaena.ops import ModalFilter, hyena
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
    """Forward at each length, and forward and backward at one."""
    for length in session.sizes.operator:
        yield Step(f"fused operator, T {length:,}", partial(forward, session, length))
    yield Step("fused operator, forward and backward", partial(gradients, session))


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
