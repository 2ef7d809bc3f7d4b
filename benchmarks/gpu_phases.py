"""The parts of a run of ``benchmarks.gpu``: what each of them does, step by step.

A step measures one or a few rows of the table and stands by itself: one that fails takes no other with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_checks
from benchmarks.gpu_sizes import Claim, Sizes, claims
from benchmarks.hyena_op_gpu import inputs, leaves
from benchmarks.machine import ROOT
from benchmarks.registry import IncorrectError, Row, Spread
from hyaena.bench.measure import Decode, Prefill, measure_decode, measure_prefill
from hyaena.bench.rates import SIZES, Rates, Samples, measure_rates, warm_times
from hyaena.bench.run import random_model, release
from hyaena.model import StripedHyena
from hyaena.ops import ModalFilter, hyena
from hyaena.sizes import ModelSizes

DTYPE = torch.bfloat16
GRACE = 20.0
"""Seconds that a child process has at least, however late it is."""


@dataclass
class Bench:
    """A run: what it measures, with what, until when, and what later steps need of earlier ones.

    ``wrong`` holds the phases that checks have spoiled, each with the reason.
    """

    sizes: Sizes
    quick: bool
    deadline: float
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    prefills: dict[int, Prefill] = field(default_factory=dict)
    decodes: dict[tuple[int, int], Decode] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    _model: StripedHyena | None = None

    @cached_property
    def claims(self) -> dict[str, Claim]:
        """The rows of the table."""
        return claims(self.sizes)

    @cached_property
    def rates(self) -> Rates:
        """The device's rates, measured when they are first asked for."""
        return measure_rates(self.device, DTYPE, SIZES["cpu" if self.quick else self.device.type])

    @property
    def model(self) -> StripedHyena:
        """Our model with random weights, made when it is first asked for."""
        if self._model is None:
            torch.manual_seed(0)
            self._model = random_model(self.sizes.config, self.device, DTYPE)
        return self._model

    def forget_model(self) -> None:
        """Give its memory back."""
        self._model = None
        self.release()

    def release(self) -> None:
        """Give back what the last step held."""
        release()

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.perf_counter()


Rows = Mapping[str, Row | str]
"""Rows by the names of their claims; text where one could not be measured, and why."""


@dataclass(frozen=True)
class Step:
    """One measurement: the claims that it answers, and what does."""

    claims: tuple[str, ...]
    run: Callable[[Bench], Rows]


def phases(sizes: Sizes) -> dict[str, list[Step]]:
    """All of a run, in order."""
    known = claims(sizes)
    return {
        "checks": [Step((), check)],
        "rates": [Step(("copy", "product"), rates)],
        "operator": [
            *(Step((f"operator {n} floor", f"operator {n} fft"), partial(operator, length=n)) for n in sizes.operator),
            Step(("training",), training),
        ],
        "prefill": [
            *(Step((f"prefill {n} floor",), partial(prefill, length=n)) for n in sizes.prompts),
            Step(("memory",), memory),
        ],
        "decode": [Step((f"decode {b} {c} floor",), partial(decode, batch=b, context=c)) for b, c, _ in sizes.decodes],
        "peer": [Step(tuple(name for name, claim in known.items() if claim.phase == "peer"), peer)],
    }


# --- correctness -----------------------------------------------------------------------------------------------------


def check(bench: Bench) -> Rows:
    """Every check; what one that fails spoils will not be timed.

    Each runs in a process of its own, and the peer compiles beside them: nothing is timed meanwhile, and what compiles
    does so side by side. Quick checks are small and run here.
    """
    found = bench.raw.setdefault("checks", {})
    if bench.quick:
        for name, one in gpu_checks.checks(quick=True).items():
            try:
                found[name], error = gpu_checks.run(one), ""
            except IncorrectError as wrong:
                found[name], error = [], str(wrong)
            _judge(bench, name, one, error)
        return {}
    rehearsal = _start("benchmarks.gpu_peer", "--rehearse")
    children = {name: _start("benchmarks.gpu_checks", name) for name in gpu_checks.checks(quick=False)}
    for name, one in gpu_checks.checks(quick=False).items():
        found[name], error = _finish(children[name], bench.left / 2)
        _judge(bench, name, one, error)
    _, error = _finish(rehearsal, bench.left / 4)
    print(f"    the peer compiles: {error or 'yes'}", flush=True)
    return {}


def _judge(bench: Bench, name: str, one: gpu_checks.Check, error: str) -> None:
    compared = len(bench.raw["checks"][name])
    print(f"    {name}: {error or f'{compared} comparisons'}", flush=True)
    if error:
        bench.wrong |= dict.fromkeys(one.spoils, f"the check of {name} failed: {error}")


# --- the machine and the operator ------------------------------------------------------------------------------------


def rates(bench: Bench) -> Rows:
    """What floors are divided by."""
    copy, product = bench.rates.bandwidth, bench.rates.flops
    return {
        "copy": bench.claims["copy"].row(_spread(copy.map(lambda v: v / 1e12))),
        "product": bench.claims["product"].row(_spread(product.map(lambda v: v / 1e12))),
    }


@torch.inference_mode()
def operator(bench: Bench, length: int) -> Rows:
    """The fused operator against reading its input and writing its output, and against the FFT."""
    config, repeats = bench.sizes.config, bench.sizes.repeats
    args = inputs(1, length, config.hidden_size, config.state_size, config.short_filter_length, DTYPE)
    ours = warm_times(lambda: hyena(*args, **_fused(bench)), bench.device, repeats)
    fft = warm_times(lambda: hyena(*args, method="fft"), bench.device, max(2, repeats // 3))
    floor = ModelSizes(config).operator_bytes(length, DTYPE.itemsize) / bench.rates.bandwidth.median
    name = f"operator {length}"
    return {
        f"{name} floor": bench.claims[f"{name} floor"].row(_spread(ours), Spread.of([floor])),
        f"{name} fft": bench.claims[f"{name} fft"].row(_spread(ours), _spread(fft)),
    }


def training(bench: Bench) -> Rows:
    """Forward and backward of the operator, by its own kernels and by autograd through the FFT."""
    config, repeats, length = bench.sizes.config, bench.sizes.repeats, bench.sizes.trained
    *args, _ = inputs(1, length, config.hidden_size, config.state_size, config.short_filter_length, DTYPE)
    dy = torch.randn(1, length, config.hidden_size, device=bench.device, dtype=DTYPE)
    wanting = [t.detach().requires_grad_() for t in leaves(tuple(args), None)]

    def train(choice: dict[str, str]) -> tuple[Tensor, ...]:
        filter = ModalFilter(torch.view_as_complex(wanting[3]), torch.view_as_complex(wanting[4]), wanting[5])
        y, _ = hyena(*wanting[:3], filter, **choice)
        return torch.autograd.grad(y, wanting, dy)

    ours = warm_times(lambda: train(_fused(bench)), bench.device, repeats)
    fft = warm_times(lambda: train({"method": "fft"}), bench.device, max(2, repeats // 3))
    note = "Gradients of the input, short filter, bias, poles, residues and skip."
    return {"training": bench.claims["training"].row(_spread(ours), _spread(fft), note)}


def _fused(bench: Bench) -> dict[str, str]:
    """The kernels by name, so that nothing else is ever timed in their place; a CPU has none."""
    return {"backend": "triton"} if bench.device.type == "cuda" else {"method": "blocked"}


# --- the model -------------------------------------------------------------------------------------------------------


def prefill(bench: Bench, length: int) -> Rows:
    """Our prefill against the operations that it cannot do without."""
    found = bench.prefills[length] = measure_prefill(bench.model, length, budget=12)
    floor = length * bench.rates.flops.median / found.flops
    spared = ModelSizes(bench.sizes.config).last_layer_savings(length) / found.flops
    part = found.of_floor(bench.rates)
    note = (
        f"Chunks of {found.chunk:,}. The floor counts every layer in full; the last one computes its output at the last"
        f" position only, which spares {spared:.1%} of it: less that, {part:.1%} become {part * (1 - spared):.1%}."
    )
    ours = _spread(found.seconds.map(lambda s: length / s))
    return {f"prefill {length} floor": bench.claims[f"prefill {length} floor"].row(ours, Spread.of([floor]), note)}


def memory(bench: Bench) -> Rows:
    """What the longest prefill held beside weights, keys and values."""
    length, config = max(bench.sizes.prompts), bench.sizes.config
    if length not in bench.prefills:
        return {"memory": "the prefill was not measured"}
    peak = bench.prefills[length].peak_memory
    if peak is None:
        return {"memory": "peak memory can be told on CUDA devices only"}
    sizes = ModelSizes(config)
    weights = sizes.weight_bytes(DTYPE.itemsize)
    cache = length * sizes.kv_bytes_per_token(DTYPE.itemsize)
    note = f"Peak {peak / 1e9:.2f} GB, weights {weights / 1e9:.2f} GB, keys and values {cache / 1e9:.2f} GB."
    return {"memory": bench.claims["memory"].row(Spread.of([(peak - weights - cache) / 1e9]), note=note)}


def decode(bench: Bench, batch: int, context: int) -> Rows:
    """Our decoding against the bytes that it cannot do without."""
    how = "cuda_graph" if bench.device.type == "cuda" else "static"
    found = measure_decode(bench.model, batch, context, decoding=how, steps=bench.sizes.steps)
    bench.decodes[batch, context] = found
    floor = batch * bench.rates.bandwidth.median / found.bytes
    note = (
        f"{found.seconds.median * 1e3:.3f} ms a step, {how}, greedy, every token read by the host; first step after "
        f"{found.first_step:.1f} s."
    )
    ours = _spread(found.seconds.map(lambda s: batch / s))
    name = f"decode {batch} {context} floor"
    return {name: bench.claims[name].row(ours, Spread.of([floor]), note)}


# --- the peer --------------------------------------------------------------------------------------------------------


def peer(bench: Bench) -> Rows:
    """The peer in a process of its own, with the whole device; ours was measured before, on the same device."""
    bench.forget_model()
    child = _start("benchmarks.gpu_peer", *(["--quick"] if bench.quick else []))
    lines, error = _finish(child, bench.left)
    bench.raw["peer"] = lines
    theirs = {line["name"]: line for line in lines}
    rows: dict[str, Row | str] = {}
    for length in (n for n in bench.sizes.prompts if n >= bench.sizes.long):
        mine = bench.prefills.get(length)
        rows[f"prefill {length} peer"] = _duel(bench, f"prefill {length}", mine, length, theirs, error)
    for batch, context, _ in bench.sizes.duels:
        mine = bench.decodes.get((batch, context))
        rows[f"decode {batch} {context} peer"] = _duel(bench, f"decode {batch} {context}", mine, batch, theirs, error)
    return rows


def _duel(
    bench: Bench, name: str, mine: Prefill | Decode | None, tokens: int, theirs: Mapping[str, Any], error: str
) -> Row | str:
    """Tokens per second of both sides, or why there are none; ``tokens`` are those of one sample."""
    other = theirs.get(name)
    if other is None or "error" in other:
        return f"the peer: {other['error'] if other else error or 'it said nothing'}"
    if mine is None:
        return "our side was not measured in this run"
    ours, peer = _spread(mine.seconds.map(lambda s: tokens / s)), Spread.of(tokens / s for s in other["seconds"])
    memory = f", peak memory {other['peak_memory'] / 1e9:.1f} GB" if other.get("peak_memory") else ""
    return bench.claims[f"{name} peer"].row(ours, peer, f"The peer: {other['note']}{memory}.")


def _spread(samples: Samples) -> Spread:
    return Spread.of(samples.values)


def _start(module: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(child: subprocess.Popen[str], seconds: float) -> tuple[list[Any], str]:
    """The lines of JSON that a child has printed, and what went wrong with it; one that takes too long is ended."""
    late = ""
    try:
        out, err = child.communicate(timeout=max(seconds, GRACE))
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        late = "its time was up"
    lines = [json.loads(line) for line in out.splitlines() if line.startswith(("{", "["))]
    last = err.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
    return lines, late or (last[0] if child.returncode else "")
