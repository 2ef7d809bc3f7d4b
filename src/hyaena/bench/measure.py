"""A prefill and a decoding step of a model, timed as ``hyaena.generate`` runs them, beside the device's own rate."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyaena.bench.clock import Samples, call_times, wall_seconds
from hyaena.bench.rates import Rate, measure_bandwidth, measure_flops
from hyaena.cache import Cache
from hyaena.decoding import Decoding, StepOutput, make_decoder, pack_outputs, resolve_decoding
from hyaena.errors import NonFiniteError
from hyaena.fp8 import FP8Linear
from hyaena.generation import choose_chunk
from hyaena.model import StripedHyena
from hyaena.ops.slots import slots_of
from hyaena.ops.step import DecodeOperators
from hyaena.sampling import SamplingParams, finite_rows, sample
from hyaena.sizes import ModelSizes

STEADY = 0.25
"""Most that the middle half of the samples may vary, as a share of their median."""
MARGIN = 1.05
"""Most of the bound that can be reached; more means that the bound is none."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Repeated measurements of one piece of work, each beside the rate that the device had just then.

    Attributes:
        seconds: of each sample.
        rates: operations or bytes per second of a plain kernel, before and after each sample (their mean).
        kernel: the plain kernel.
        work: operations or bytes that the result needs; see ``hyaena.sizes``.
    """

    seconds: Samples
    rates: Samples
    kernel: str
    work: int

    @property
    def bounds(self) -> Samples:
        """Seconds that the work takes at the rate beside each sample."""
        return self.rates.map(lambda rate: self.work / rate)

    @property
    def shares(self) -> Samples:
        """The bound over the time taken, sample by sample; 1.0 is as fast as the plain kernel."""
        return Samples.of(b / s for b, s in zip(self.bounds.values, self.seconds.values, strict=True))

    @property
    def doubt(self) -> str:
        """Why the share of the bound means nothing, or nothing."""
        shares = self.shares
        if shares.middle_spread > STEADY:
            return (
                f"the machine is busy: between {shares.count} samples the share of the bound went from "
                f"{shares.min:.0%} to {shares.max:.0%}; measure again when nothing else runs"
            )
        if shares.median > MARGIN:
            return (
                f"{shares.median:.0%} of the bound is more than a bound allows: the machine was busy while the "
                f"{self.kernel} ran, or the work is faster than that kernel"
            )
        return ""

    @property
    def share(self) -> float | None:
        """The median of ``shares``; None where there is a doubt."""
        return None if self.doubt else self.shares.median


@dataclass(frozen=True, kw_only=True)
class Prefill(Figure):
    """One prompt, read into a new cache; its share of the bound is the model FLOPs utilisation (mfu).

    Attributes:
        length: tokens of the prompt.
        chunk: tokens of a pass.
        seconds: from the ids to the logits of the last position, the cache's allocation included.
        peak_memory: the most bytes that tensors held meanwhile, weights and cache included; None off CUDA, where only
            the whole process can be observed.
    """

    length: int
    chunk: int
    peak_memory: int | None

    @property
    def tokens_per_second(self) -> float:
        return self.length / self.seconds.median

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: 1.0 is the rate of a large matrix product. None where there is a doubt."""
        return self.share


@dataclass(frozen=True, kw_only=True)
class Decode(Figure):
    """Decoding by single steps; its share of the bound is the memory-bandwidth utilisation (mbu).

    Attributes:
        batch: rows, decoded together.
        context: tokens that each row remembers when the first step begins.
        decoding: how steps are evaluated: ``"eager"``, ``"static"`` or ``"cuda_graph"``.
        seconds: of one step, each the mean over a round of them; every token is read by the host.
        first_step: seconds of the very first step, kernels compiled and graphs captured in it.
    """

    batch: int
    context: int
    decoding: Decoding
    first_step: float

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds.median

    @property
    def mbu(self) -> float | None:
        """Memory-bandwidth utilisation: 1.0 is the measured bandwidth. None where there is a doubt."""
        return self.share


def in_turns(work: int, run: Callable[[], float], rate: Callable[[], Rate], *, repeats: int, budget: float) -> Figure:
    """Take samples of a piece of work and of the device's rate in turns.

    At least two samples, at most ``repeats``, ending with ``budget`` seconds; three times as many and three times as
    long while their shares of the bound vary too much, as they do on a busy machine.

    Args:
        work: operations or bytes that one run needs.
        run: does it and returns the seconds that it took.
        rate: measures the device's rate.
        repeats, budget: see above.
    """
    seconds: list[float] = []
    rates = [rate()]
    while True:
        seconds.append(run())
        rates.append(rate())
        beside = [(a.median + b.median) / 2 for a, b in itertools.pairwise(rates)]
        figure = Figure(seconds=Samples.of(seconds), rates=Samples.of(beside), kernel=rates[0].kernel, work=work)
        more = 1 if figure.shares.middle_spread <= STEADY else 3
        if len(seconds) >= 2 and (len(seconds) >= more * repeats or sum(seconds) >= more * budget):
            return figure


@torch.inference_mode()
def measure_prefill(
    model: StripedHyena,
    length: int,
    *,
    chunk: int | None = None,
    method: str = "auto",
    repeats: int = 5,
    budget: float = 10.0,
) -> Prefill:
    """Read a random prompt of ``length`` tokens, in turns with a matrix product; see ``in_turns``.

    Operations of FP8 products count half: tensor cores do twice as many of them in a second.

    Raises:
        NonFiniteError: the logits are not finite, so that nothing is known about the work.
    """
    device, config, sizes = model.device, model.config, ModelSizes(model.config)
    chunk = choose_chunk(model, length) if chunk is None else chunk
    ids = torch.randint(config.vocab_size, (1, length), device=device)
    peaks: list[int] = []

    def read(ids: Tensor) -> Tensor:
        cache = model.make_cache(max_length=ids.shape[1], method=method)
        for part in ids.split(chunk, dim=1):
            logits = model(part, cache=cache, logits_to_keep=1, method=method)
        return logits[:, -1]

    def sample() -> float:
        outputs: list[Tensor] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = call_times(lambda: outputs.append(read(ids)), device, 1, warmup=0).median
        if device.type == "cuda":
            peaks.append(torch.cuda.max_memory_allocated(device))
        if not bool(outputs[0].isfinite().all()):
            raise NonFiniteError(f"the logits after {length} random tokens are not finite: measure in float32")
        return seconds

    # Compile, choose algorithms, wake the clocks: with a first, a later and a last chunk, and little attention.
    read(ids[:, : 2 * chunk + length % chunk])
    figure = in_turns(
        sizes.prefill_flops(length) - sizes.last_layer_savings(length) - fp8_numbers(model) * length,
        sample,
        lambda: measure_flops(device, model.dtype),
        repeats=repeats,
        budget=budget,
    )
    return Prefill(**vars(figure), length=length, chunk=chunk, peak_memory=max(peaks, default=None))


ROUNDS = 6
"""Rounds of decoding, each one sample; three times as many on a busy machine, see ``in_turns``."""


def rounds_at_most(rounds: int) -> int:
    """Rounds that a cache needs room for, the one that warms up included."""
    return 3 * rounds + 1


def measure_decode(
    model: StripedHyena,
    batch: int,
    context: int,
    *,
    decoding: Decoding = "auto",
    method: str = "auto",
    steps: int = 24,
    rounds: int = ROUNDS,
    budget: float = 10.0,
) -> Decode:
    """Decode greedily after ``context`` tokens, rounds of ``steps`` in turns with a copy; see ``in_turns``.

    What the tokens before left in the cache are random numbers: only their size matters to the time of a step.

    Raises:
        UnsupportedError: this way of decoding is not possible here.
        NonFiniteError: the logits are not finite.
    """
    decoding = resolve_decoding(model, decoding, method)
    cache = filled_cache(model, batch, context, room=1 + steps * rounds_at_most(rounds), method=method)
    run = stepper(model, cache, decoding)
    first = wall_seconds(lambda: run(1))
    run(steps)
    work = ModelSizes(model.config).decode_bytes(batch, context, model.dtype.itemsize, model.cache_dtype.itemsize)
    work -= fp8_numbers(model) * (model.dtype.itemsize - 1)
    figure = in_turns(
        work,
        lambda: wall_seconds(lambda: run(steps)) / steps,
        lambda: measure_bandwidth(model.device, work),
        repeats=rounds,
        budget=budget / steps,
    )
    return Decode(**vars(figure), batch=batch, context=context, decoding=decoding, first_step=first)


def fp8_numbers(model: StripedHyena) -> int:
    """Weights that are read, and multiplied, as FP8 numbers here: a byte each, and operations at twice the rate."""
    layers = [module for module in model.modules() if isinstance(module, FP8Linear)]
    return sum(layer.weight.numel() for layer in layers if not layer.is_plain())


@torch.inference_mode()
def filled_cache(
    model: StripedHyena,
    batch: int,
    context: int,
    *,
    room: int,
    method: str = "auto",
    dtype: str | torch.dtype | None = None,
) -> Cache:
    """A cache as if ``context`` tokens had been read, with room for more: random keys, values and states."""
    cache = model.make_cache(batch, max_length=context + room, method=method, dtype=dtype)
    for tensor in cache.tensors():
        randomise(tensor)
    cache.lengths = [context] * batch
    return cache


def randomise(tensor: Tensor) -> None:
    """Fill with random numbers, or with slots of them."""
    if tensor.dtype != torch.int8:
        tensor.normal_()
        return
    slots = slots_of(tensor.dtype)
    for row in tensor:  # one at a time: the numbers are wider than the slots
        shape = (*row.shape[:-1], slots.head_dim(row.shape[-1]))
        row.copy_(slots.encode(torch.randn(shape, device=row.device)))


def stepper(
    model: StripedHyena, cache: Cache, decoding: Decoding, operators: DecodeOperators | None = None
) -> Callable[[int], None]:
    """Return a function that decodes so many tokens of every row; the host reads each, as ``hyaena.generate`` does.

    The only use of ``Decoder`` in benchmarks.
    """
    rows = [SamplingParams()] * cache.batch_size
    generators = [row.generator() for row in rows]
    ids = torch.ones(len(rows), dtype=torch.int64, device=model.device)
    if decoding == "eager":

        @torch.inference_mode()
        def forward(count: int) -> None:
            nonlocal ids
            for _ in range(count):
                logits = model(ids[:, None], cache=cache, logits_to_keep=1)[:, -1]
                ids = sample(logits, rows, generators)
                _require_finite(StepOutput.unpack(pack_outputs(logits, ids, finite_rows(logits), 0)))

        return forward
    decoder = make_decoder(model, cache.batch_size, decoding, operators=operators)
    decoder.add(cache, ids, rows, generators)

    def ahead(count: int) -> None:
        decoder.launch()
        for _ in range(count - 1):
            decoder.launch()
            _require_finite(decoder.fetch())
        _require_finite(decoder.fetch())

    return ahead


def _require_finite(choice: StepOutput) -> None:
    if not all(choice.finite):
        raise NonFiniteError("the logits of a decoding step are not finite: measure in float32")
