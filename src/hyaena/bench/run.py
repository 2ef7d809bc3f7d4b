"""All of a plan: the prefills and the decoding steps of a model, each beside its bound."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from hyaena import ops
from hyaena.bench import memory
from hyaena.bench.clock import release
from hyaena.bench.measure import ROUNDS, Decode, Prefill, measure_decode, measure_prefill, rounds_at_most
from hyaena.bench.rates import SIZES
from hyaena.config import ModelConfig
from hyaena.decoding import Decoding, resolve_decoding
from hyaena.errors import InputError, UnsupportedError
from hyaena.generation import MIN_PREFILL_CHUNK, PREFILL_CHUNK
from hyaena.model import StripedHyena
from hyaena.sizes import ModelSizes
from hyaena.tensor_files.memory import Shelf

SH_7B = replace(ModelConfig.from_name("sh-7b"), name="7b", max_length=131_072, prefill_style="auto")
"""StripedHyena-Hessian-7B, to be filled with random weights, which take any length: four times its own."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        lengths: of prompts, in tokens; each is read by itself.
        contexts: tokens that a row has read when it is decoded.
        batches: rows that are decoded together, each number at each context.
        chunk: tokens of a prefill's pass; that of ``hyaena.generate`` unless given.
        method: how long convolutions of prompts are evaluated.
        decoding: how single steps are evaluated; see ``hyaena.generate``.
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
            raise UnsupportedError(f"{self.method!r} leaves work out, so that no bound holds: choose an exact method")


@dataclass(kw_only=True)
class Result:
    """What has been measured, on what; it grows figure by figure."""

    config: ModelConfig
    dtype: torch.dtype
    cache_dtype: torch.dtype
    device: torch.device
    prefills: list[Prefill] = field(default_factory=list)
    decodes: list[Decode] = field(default_factory=list)


def run(
    config: ModelConfig,
    make: Callable[[], StripedHyena],
    plan: Plan,
    *,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    progress: Callable[[str], object] = lambda text: None,
    found: Callable[[Result], object] = lambda result: None,
) -> Result:
    """Measure a model.

    Args:
        config: its configuration, from which the memory it needs is computed before it is made.
        make: makes it, on ``device`` in ``dtype``.
        plan: what to measure.
        device: a CPU or a CUDA device.
        dtype: of the weights.
        cache_dtype: of the keys and values of the model that ``make`` makes; ``dtype`` unless given.
        progress: called with what is about to be measured.
        found: called with all that is known after each figure, so that a later failure loses none of it.

    Raises:
        InputError, UnsupportedError: something in the plan cannot be measured.
        CapacityError: the memory is too small. All three are raised before anything is allocated.
        NonFiniteError: the model computed NaN or infinity.
    """
    if device.type not in SIZES:
        raise UnsupportedError(f"bench has timers for {' and '.join(SIZES)} devices, not {device}: choose one of these")
    plan.check(config)
    if plan.decoding == "cuda_graph" and device.type != "cuda":
        raise UnsupportedError(f"graphs are captured on CUDA devices, not on {device}: choose another decoding")
    cache_dtype = cache_dtype or dtype
    needed = _needed(config, plan, device, dtype.itemsize, cache_dtype.itemsize)
    memory.require_memory(needed, device, f"measuring {config.name}", _REMEDY)
    result = Result(config=config, dtype=dtype, cache_dtype=cache_dtype, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        progress(f"making {config.name}")
        model = make()
        if plan.contexts:
            resolve_decoding(model, plan.decoding, plan.method)  # raises what cannot be done before long work
        for figure in _figures(model, plan, progress):
            if isinstance(figure, Prefill):
                result.prefills.append(figure)
            else:
                result.decodes.append(figure)
            found(result)
    return result


_REMEDY = "choose a smaller model (--model cub), a narrower --dtype, or shorter --lengths and --contexts"


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> StripedHyena:
    """A model with fresh weights, made on its device in its dtype: no wider copy of it is ever allocated.

    On a CPU they lie on pages like those of a model that was loaded.
    """
    with torch.device("meta"):
        model = StripedHyena(config)
    model.to(dtype).to_empty(device=device)
    model.init_weights()
    return model._apply(Shelf().settled).eval()


def _needed(config: ModelConfig, plan: Plan, device: torch.device, itemsize: int, kv_itemsize: int) -> int:
    """The most bytes that a plan allocates together."""
    chunk = plan.chunk or PREFILL_CHUNK.get(device.type, MIN_PREFILL_CHUNK)  # the least that is chosen
    slots = max(plan.contexts, default=0) + 1 + rounds_at_most(ROUNDS) * plan.steps
    most = max(
        SIZES[device.type].bytes,
        memory.prefill_bytes(config, max(plan.lengths, default=1), chunk, itemsize, kv_itemsize),
        # a copy is measured between the steps, while the cache is there
        memory.decode_bytes(config, max(plan.batches, default=1), slots, itemsize, kv_itemsize)
        + SIZES[device.type].bytes,
    )
    return ModelSizes(config).weight_bytes(itemsize) + most


def _figures(model: StripedHyena, plan: Plan, progress: Callable[[str], object]) -> Iterator[Prefill | Decode]:
    for length in plan.lengths:
        progress(f"prefill of {length:,} tokens")
        release()
        yield measure_prefill(model, length, chunk=plan.chunk, method=plan.method)
    for batch in plan.batches:
        for context in plan.contexts:
            progress(f"decoding {batch:,} {'row' if batch == 1 else 'rows'} at context {context:,}")
            release()
            yield measure_decode(model, batch, context, decoding=plan.decoding, method=plan.method, steps=plan.steps)
