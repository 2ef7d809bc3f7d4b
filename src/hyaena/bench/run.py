"""All of a plan: the machine's rates, then the model's prefills and decoding steps beside their roofline."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from hyaena import ops
from hyaena.bench import memory
from hyaena.bench.measure import Decode, Prefill, measure_decode, measure_prefill
from hyaena.bench.rates import SIZES, Rates, measure_rates
from hyaena.config import ModelConfig
from hyaena.decoding import Decoding, resolve_decoding
from hyaena.errors import InputError, UnsupportedError
from hyaena.generation import MIN_PREFILL_CHUNK, PREFILL_CHUNK
from hyaena.model import StripedHyena
from hyaena.sizes import ModelSizes

SH_7B = replace(ModelConfig.from_name("sh-7b"), name="7b", max_length=131_072, prefill_style="auto")
"""StripedHyena-Hessian-7B, to be filled with random weights, which take any length: four times its own."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        lengths: of prompts, in tokens; each is read by itself.
        contexts: tokens that rows remember when they are decoded.
        batches: rows that are decoded together, each number at each context.
        chunk: tokens of a prefill's pass; that of ``hyaena.generate`` unless given.
        method: how long convolutions of prompts are evaluated.
        decoding: how single steps are evaluated, in the words of ``hyaena.generate``.
        steps: of a round of decoding, each of which is one sample.
    """

    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    chunk: int | None = None
    method: str = "auto"
    decoding: Decoding = "auto"
    steps: int = 24

    def check(self, config: ModelConfig) -> None:
        """Refuse what cannot be measured with a model.

        Raises:
            InputError, UnsupportedError: with the fix.
        """
        for name, values in (("lengths", self.lengths), ("contexts", self.contexts)):
            if values and max(values) > config.max_length:
                raise InputError(
                    f"{name} go up to {max(values):,} and {config.name} to {config.max_length:,} tokens: shorten them"
                )
        if not ops.capabilities(self.method).exact:
            raise UnsupportedError(f"{self.method!r} leaves work out, so no floor is one: choose an exact method")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured, on what."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    rates: Rates
    prefills: tuple[Prefill, ...]
    decodes: tuple[Decode, ...]


def run(
    config: ModelConfig,
    make: Callable[[], StripedHyena],
    plan: Plan,
    *,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], object] = lambda text: None,
) -> Result:
    """Measure a model.

    Args:
        config: its configuration, from which the memory it needs is computed before it is made.
        make: makes it, on ``device`` in ``dtype``.
        plan: what to measure.
        device: a CPU or a CUDA device.
        dtype: of the weights.
        say: told what is about to be measured.

    Raises:
        InputError, UnsupportedError: something in the plan cannot be measured.
        CapacityError: the memory is too small. All three are raised before anything is allocated.
        NonFiniteError: the model computed NaN or infinity.
    """
    if device.type not in SIZES:
        raise UnsupportedError(f"bench knows the clocks of {' and '.join(SIZES)} devices, not {device}: choose one")
    plan.check(config)
    memory.require_memory(_needed(config, plan, device, dtype.itemsize), device, f"measuring {config.name}", _REMEDY)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        say(f"making {config.name}")
        model = make()
        if plan.contexts:
            resolve_decoding(model, plan.decoding, plan.method)  # what cannot be done is said before long work
        say("copying and multiplying")
        rates = measure_rates(device, dtype, SIZES[device.type])
        return Result(
            config=config,
            dtype=dtype,
            device=device,
            rates=rates,
            prefills=tuple(_prefills(model, plan, say)),
            decodes=tuple(_decodes(model, plan, say)),
        )


_REMEDY = "choose a smaller model (--model cub), a narrower --dtype, or shorter --lengths and --contexts"


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> StripedHyena:
    """A model with fresh weights, made where and as narrow as it will be used: no copy of it is ever wider."""
    with torch.device("meta"):
        model = StripedHyena(config)
    model.to(dtype).to_empty(device=device)
    model.init_weights()
    return model.eval()


def _needed(config: ModelConfig, plan: Plan, device: torch.device, itemsize: int) -> int:
    """The most bytes that a plan holds at once."""
    chunk = plan.chunk or PREFILL_CHUNK.get(device.type, MIN_PREFILL_CHUNK)  # the least that is chosen
    slots = max(plan.contexts, default=0) + 8 * plan.steps
    most = max(
        SIZES[device.type].bytes,
        memory.prefill_bytes(config, max(plan.lengths, default=1), chunk, itemsize),
        memory.decode_bytes(config, max(plan.batches, default=1), slots, itemsize),
    )
    return ModelSizes(config).weight_bytes(itemsize) + most


def _prefills(model: StripedHyena, plan: Plan, say: Callable[[str], object]) -> Iterator[Prefill]:
    for length in plan.lengths:
        say(f"prefill of {length:,} tokens")
        release()
        yield measure_prefill(model, length, chunk=plan.chunk, method=plan.method)


def _decodes(model: StripedHyena, plan: Plan, say: Callable[[str], object]) -> Iterator[Decode]:
    for batch in plan.batches:
        for context in plan.contexts:
            say(f"decoding {batch:,} {'row' if batch == 1 else 'rows'} at context {context:,}")
            release()
            yield measure_decode(model, batch, context, decoding=plan.decoding, method=plan.method, steps=plan.steps)


def release() -> None:
    """Give back what the last measurement held: graphs and caches, and the allocator's blocks of their sizes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
