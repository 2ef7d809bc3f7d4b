"""A prefill and a decoding step of a model, timed as ``hyaena.generate`` runs them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyaena.bench.rates import Rates, Samples, times
from hyaena.cache import Cache
from hyaena.decoding import Decoder, Decoding, StepOutput, pack_outputs, resolve_decoding
from hyaena.errors import NonFiniteError
from hyaena.generation import choose_chunk
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingParams, finite_rows, sample
from hyaena.sizes import ModelSizes


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """One prompt, read into a new cache.

    Attributes:
        length: tokens of the prompt.
        chunk: tokens of a pass.
        seconds: from the ids to the logits of the last position, the cache's allocation included.
        flops: operations that it cannot do without; see ``ModelSizes.prefill_flops``.
        peak_memory: the most bytes that tensors held meanwhile, weights and cache included; None off CUDA, where only
            the whole process can be observed.
    """

    length: int
    chunk: int
    seconds: Samples
    flops: int
    peak_memory: int | None

    @property
    def tokens_per_second(self) -> float:
        return self.length / self.seconds.median

    def of_floor(self, rates: Rates) -> float:
        """The floor's share of the time taken; 1 is as fast as this device multiplies."""
        return self.flops / rates.flops.median / self.seconds.median


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Decoding by single steps.

    Attributes:
        batch: rows, decoded together.
        context: tokens that each row remembers when the first step begins.
        decoding: how steps are evaluated: ``"eager"``, ``"static"`` or ``"cuda_graph"``.
        seconds: of one step, each the mean over a round of them; every token is read by the host.
        bytes: that a step at ``context`` cannot do without; see ``ModelSizes.decode_bytes``.
        first_step: seconds of the very first step, kernels compiled and graphs captured in it.
    """

    batch: int
    context: int
    decoding: Decoding
    seconds: Samples
    bytes: int
    first_step: float

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds.median

    def of_floor(self, rates: Rates) -> float:
        """The floor's share of the time taken; 1 is as fast as this device copies."""
        return self.bytes / rates.bandwidth.median / self.seconds.median


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
    """Read a random prompt of ``length`` tokens, at least twice; further repeats end with ``budget`` seconds.

    Raises:
        NonFiniteError: the logits are not finite, so that nothing is known about the work.
    """
    device, config = model.device, model.config
    chunk = choose_chunk(model, length) if chunk is None else chunk
    ids = torch.randint(config.vocab_size, (1, length), device=device)

    def read(ids: Tensor) -> Tensor:
        cache = model.make_cache(max_length=ids.shape[1], method=method)
        for part in ids.split(chunk, dim=1):
            logits = model(part, cache=cache, logits_to_keep=1, method=method)
        return logits[:, -1]

    # Compile, choose algorithms, wake the clocks: with a first, a later and a last chunk, and little attention.
    read(ids[:, : 2 * chunk + length % chunk])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    outputs: list[Tensor] = []
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < repeats and sum(taken) < budget):
        taken += times(lambda: outputs.append(read(ids)), device, 1).values
    if not all(bool(logits.isfinite().all()) for logits in outputs):
        raise NonFiniteError(f"the logits after {length} random tokens are not finite: measure in float32")
    return Prefill(
        length=length,
        chunk=chunk,
        seconds=Samples(tuple(taken)),
        flops=ModelSizes(config).prefill_flops(length),
        peak_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def measure_decode(
    model: StripedHyena,
    batch: int,
    context: int,
    *,
    decoding: Decoding = "auto",
    method: str = "auto",
    steps: int = 24,
    rounds: int = 6,
    budget: float = 10.0,
) -> Decode:
    """Decode greedily after ``context`` tokens, in at least two rounds of ``steps``; further ones end with ``budget``.

    What the tokens before left in the cache are random numbers: only their size matters to the time of a step.

    Raises:
        UnsupportedError: this way of decoding is not possible here.
        NonFiniteError: the logits are not finite.
    """
    decoding = resolve_decoding(model, decoding, method)
    cache = filled_cache(model, batch, context, room=1 + steps * (rounds + 1), method=method)
    run = _stepper(model, cache, decoding)
    first = _wall(lambda: run(1))
    run(steps)
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < rounds and sum(taken) < budget):
        taken.append(_wall(lambda: run(steps)))
    return Decode(
        batch=batch,
        context=context,
        decoding=decoding,
        seconds=Samples(tuple(taken)).map(lambda s: s / steps),
        bytes=ModelSizes(model.config).decode_bytes(batch, context, model.dtype.itemsize),
        first_step=first,
    )


@torch.inference_mode()
def filled_cache(model: StripedHyena, batch: int, context: int, *, room: int, method: str = "auto") -> Cache:
    """A cache as if ``context`` tokens had been read, with room for more: random keys, values and states."""
    cache = model.make_cache(batch, max_length=context + room, method=method)
    for tensor in cache.tensors():
        tensor.normal_()
    cache.lengths = [context] * batch
    return cache


def _stepper(model: StripedHyena, cache: Cache, decoding: Decoding) -> Callable[[int], None]:
    """What decodes so many tokens of every row, as ``hyaena.generate`` would: each is looked at by the host."""
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
                _look(StepOutput.unpack(pack_outputs(logits, ids, finite_rows(logits), 0)))

        return forward
    decoder = Decoder(model, cache.batch_size, cuda_graph=decoding == "cuda_graph")
    decoder.add(cache, ids, rows, generators)

    def ahead(count: int) -> None:
        decoder.launch()
        for _ in range(count - 1):
            decoder.launch()
            _look(decoder.fetch())
        _look(decoder.fetch())

    return ahead


def _look(choice: StepOutput) -> None:
    if not all(choice.finite):
        raise NonFiniteError("the logits of a decoding step are not finite: measure in float32")


def _wall(run: Callable[[], object]) -> float:
    """Seconds on the host's clock: a step ends when its token has arrived there."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
