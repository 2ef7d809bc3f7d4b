"""Prefill and decoding of the 7B's shape, against their bounds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.gpu.session import GpuSession
from benchmarks.registry import Row, Step, Summary, Target
from hyaena.bench.measure import Decode, Figure, Prefill, measure_decode, measure_prefill
from hyaena.config import ModelConfig
from hyaena.model import StripedHyena
from hyaena.sizes import ModelSizes


def decode(session: GpuSession) -> Iterator[Step]:
    """Decoding at each batch and context."""
    for batch, context, target in session.sizes.decodes:
        run = partial(decode_at, session, batch, context, target)
        yield Step(f"decoding, batch {batch}, context {context:,}", run)


def decode_at(session: GpuSession, batch: int, context: int, target: float | None) -> list[Row]:
    """Our decoding against the bytes that it has to move."""
    found = session.decodes[batch, context] = time_decoding(session, session.model, batch, context)
    return [decoding_row(f"decoding, batch {batch}, context {context:,}", found, target)]


def time_decoding(session: GpuSession, model: StripedHyena, batch: int, context: int) -> Decode:
    """Captured steps, or static ones on a CPU."""
    how = "cuda_graph" if session.device.type == "cuda" else "static"
    return measure_decode(model, batch, context, decoding=how, steps=session.sizes.steps)


def decoding_row(what: str, found: Decode, target: float | None) -> Row:
    """Steps beside the bytes that they have to move."""
    note = (
        f"{found.seconds.median * 1e3:.3f} ms a step, {found.decoding}, greedy, every token read by the host; first "
        f"step after {found.first_step:.1f} s."
    )
    return _against_bound(what, found, found.batch, "mbu", target, note)


def prefill(session: GpuSession) -> Iterator[Step]:
    """Each prompt, and the memory of the longest."""
    for length in session.sizes.prompts:
        yield Step(f"prefill of {length:,} tokens", partial(prefill_of, session, length))
    yield Step("peak memory", partial(memory, session))


def prefill_of(session: GpuSession, length: int) -> list[Row]:
    """Our prefill against the operations that it needs."""
    found = session.prefills[length] = measure_prefill(session.model, length, budget=10)
    return [prefill_row(f"prefill of {length:,} tokens", found, session.sizes.config, 0.7)]


def prefill_row(what: str, found: Prefill, config: ModelConfig, target: float | None) -> Row:
    """A prefill beside the operations that it needs."""
    sizes = ModelSizes(config)
    spared = sizes.last_layer_savings(found.length) / sizes.prefill_flops(found.length)
    note = (
        f"Chunks of {found.chunk:,}. The last layer's output is needed at one position only: the bound leaves out the "
        f"{spared:.1%} of all operations that this spares."
    )
    return _against_bound(what, found, found.length, "mfu", target, note)


def _against_bound(what: str, found: Figure, tokens: int, share: str, target: float | None, note: str) -> Row:
    """Tokens per second beside those that the bound allows; ``tokens`` are those of one sample."""
    return Row(
        what=what,
        unit="tokens/s",
        ours=Summary.of(tokens / s for s in found.seconds.values),
        baseline_name=f"bound by a {found.kernel}",
        baseline=Summary.of(tokens / s for s in found.bounds.values),
        ratio=Summary.of(found.shares.values),
        ratio_name=f"ours / bound ({share})",
        target=None if target is None else Target(">=", target),
        note=note + (f" In doubt: {found.doubt}." if found.doubt else ""),
    )


def memory(session: GpuSession) -> list[Row]:
    """What the longest prefill allocated beside weights, keys and values."""
    length, sizes = max(session.sizes.prompts), ModelSizes(session.sizes.config)
    peak = session.prefills[length].peak_memory if length in session.prefills else None
    if peak is None:
        raise RuntimeError("there is no peak memory: it is known on CUDA devices only, after the prefill")
    weights = sizes.weight_bytes(session.dtype.itemsize)
    cache = length * sizes.kv_bytes_per_token(session.dtype.itemsize)
    return [
        Row(
            what=f"peak memory of a prefill of {length:,} tokens, less weights, keys and values",
            unit="GB",
            ours=Summary.of([(peak - weights - cache) / 1e9]),
            target=Target("<=", session.sizes.most_memory),
            note=f"Peak {peak / 1e9:.2f} GB, weights {weights / 1e9:.2f} GB, keys and values {cache / 1e9:.2f} GB.",
        )
    ]
