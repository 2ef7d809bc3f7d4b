"""Scoring of the 7B's shape: many sequences in packed passes, and one long sequence layer by layer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hyaena
from benchmarks.gpu.session import GpuSession
from benchmarks.registry import IncorrectError, Row, Step, Summary, Target
from hyaena.bench.clock import call_times, wall_seconds
from hyaena.bench.rates import measure_flops
from hyaena.bench.run import random_model
from hyaena.model import StripedHyena
from hyaena.ops import attention as attend
from hyaena.scoring import Score
from hyaena.sizes import ModelSizes
from hyaena.tokenizers import ByteTokenizer

SEQUENCES, SHORTEST, LONGEST = 2000, 200, 4000
BATCHES = 4
"""The sequences are scored in so many parts, each one sample between two measurements of the matrix product."""
LONG = (131_072, 1_000_000)
MOST_MEMORY = 45.0
WARM_UP = 131_072


def lengths(session: GpuSession) -> list[int]:
    """Of the sequences, uniform; the same ones each time."""
    count, low, high = (12, 3, 40) if session.quick else (SEQUENCES, SHORTEST, LONGEST)
    return random.Random(0).choices(range(low, high + 1), k=count)


def ids_of(config: hyaena.ModelConfig, length: int, seed: int = 0) -> list[int]:
    """Random ids, the same ones each time."""
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def scored(model: StripedHyena, texts: Sequence[list[int]], **options: Any) -> list[Score]:
    """Scores of token ids, of any length; log-probabilities only."""
    tokenizer = ByteTokenizer(model.config.vocab_size)  # wants no more than the number of ids
    options = {"entropy": False, "rank": False, "max_length": max(map(len, texts)), "output": "torch", **options}
    return [found for _, found in hyaena.iter_scores(model, tokenizer, texts, **options)]


# --- correctness


def correct(session: GpuSession) -> Iterator[Step]:
    """Four layers in float32, where a leak would show; the whole model in its dtype, where rounding shows."""
    yield Step("four layers, float32", partial(agrees, session, True))
    yield Step("the model", partial(agrees, session, False))


@torch.inference_mode()
def agrees(session: GpuSession, exact: bool) -> list[Row]:
    """Packed scores, and those of chunks layer by layer, are those of a pass over each sequence alone.

    Raises:
        IncorrectError: they are not.
    """
    if exact:
        config = replace(session.sizes.config, layer_types=("hyena", "attention") * 2, vocab_size=512, name="four")
        model, tolerance = random_model(config, session.device, torch.float32), 1e-3
    else:
        # two evaluations of 64 half layers in bfloat16: 64^0.5 · 2^-8 · 2^0.5 = 4 % of the spread of logits
        model, tolerance = session.model, 0.06
    texts = [ids_of(model.config, n, n) for n in ((5, 17, 3, 29) if session.quick else (700, 33, 2, 1900, 260, 64))]
    alone = [reference(model, ids) for ids in texts]
    spread = torch.cat(alone).std()
    chunk = 4 if session.quick else 512
    worst = 0.0
    for name, options in (("packed", {}), ("layer by layer", {"tokens_per_pass": chunk})):
        for found, expected in zip(scored(model, texts, **options), alone, strict=True):
            difference = found.logprobs[1:] - expected
            rms = float(difference.square().mean().sqrt() / spread)
            worst = max(worst, rms)
            if not rms <= tolerance:
                raise IncorrectError(f"{name}, {len(expected) + 1} tokens: rms difference {rms:.2g} of the spread")
    kind = "four layers, float32" if exact else "the model"
    what = f"log-probabilities of packed and of chunked passes against one pass, {kind}"
    note = f"Largest rms difference of a sequence: {worst:.2g} of the spread of log-probabilities; allowed {tolerance}."
    return [Row(what=what, unit="tests", ours=Summary.of([0]), target=Target("<=", 0), note=note)]


def reference(model: StripedHyena, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of all tokens but the first by one pass of the model."""
    given = torch.tensor([list(ids)], device=model.device)
    logp = model(given).log_softmax(-1, dtype=torch.float32)
    return logp[0, :-1].gather(1, given[0, 1:, None])[:, 0].cpu()


# --- attention


PAST = 524_288
CHUNKS = (8192, 16_384, 32_768, 65_536)


def attention(session: GpuSession) -> Iterator[Row]:
    """A chunk of queries after a long past: what decides the time of a long sequence, by the size of the chunk."""
    past, chunks = (48, (8, 16)) if session.quick else (PAST, CHUNKS)
    config = session.sizes.config
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shape: dict[str, Any] = {"dtype": session.dtype, "device": session.device}
    k, v = (torch.randn(1, groups, past + max(chunks), width, **shape) for _ in range(2))
    queries = torch.randn(1, max(chunks), heads, width, **shape).transpose(1, 2)
    sides: list[tuple[int, str, Callable[..., Tensor]]] = [(n, "as `ops.attention` chooses", attend) for n in chunks]
    if session.device.type == "cuda":
        sides.append((chunks[1], "FlashAttention-2 in one call", flash))
    for chunk, name, side in sides:
        run = partial(side, queries[:, :, :chunk], k[:, :, : past + chunk], v[:, :, : past + chunk])
        work = 4 * heads * width * (chunk * past + chunk * (chunk + 1) // 2)
        with torch.inference_mode():
            seconds = call_times(run, session.device, 2, warmup=1)
        yield Row(
            what=f"attention of {chunk:,} queries after {past:,} keys, {name}",
            unit="TFLOP/s",
            ours=Summary.of(work / s / 1e12 for s in seconds.values),
            baseline_name="large matrix product",
            baseline=Summary.of(rate / 1e12 for rate in session.flops.samples.values),
            ratio=Summary.of(work / s / session.flops.median for s in seconds.values),
            ratio_name="attention / product",
        )


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-2, causal to the last query and key."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


# --- speed


def packed(session: GpuSession) -> Iterator[Row]:
    """Many sequences of unequal length, in parts."""
    model, sizes = session.model, ModelSizes(session.sizes.config)
    texts = [ids_of(model.config, n, i) for i, n in enumerate(lengths(session))]
    scored(model, texts[: len(texts) // 50 + 1])  # compile
    count = BATCHES if len(texts) >= 100 else 2
    samples = [texts[i::count] for i in range(count)]
    for what, options, target in (
        ("log-probabilities", {}, 0.85),
        ("log-probabilities, entropies and ranks, a quarter of them", {"entropy": True, "rank": True}, None),
    ):
        parts = samples if target is not None else samples[:1]
        seconds, shares = [], []
        rate = measure_flops(session.device, session.dtype).median
        for part in parts:
            seconds.append(wall_seconds(partial(scored, model, part, **options)))
            later = measure_flops(session.device, session.dtype).median
            work = sum(sizes.scoring_flops(len(ids)) for ids in part)
            shares.append(work / ((rate + later) / 2) / seconds[-1])
            rate = later
        tokens = [sum(map(len, part)) for part in parts]
        speeds = [n / s for n, s in zip(tokens, seconds, strict=True)]
        yield Row(
            what=f"scoring {len(texts):,} sequences of {SHORTEST} to {LONGEST:,} tokens: {what}",
            unit="tokens/s",
            ours=Summary.of(speeds),
            baseline_name="bound by a matrix product",
            baseline=Summary.of(speed / share for speed, share in zip(speeds, shares, strict=True)),
            ratio=Summary.of(shares),
            ratio_name="ours / bound (mfu)",
            target=None if target is None else Target(">=", target),
            note=f"{sum(tokens):,} tokens in {sum(seconds):.1f} s, in {len(parts)} parts, tokenizing and results on "
            f"the host included.{peak_note(session)}",
        )


def long(session: GpuSession) -> Iterator[Step]:
    """One sequence at a time, layer by layer, and its memory."""
    lengths = (60, 90) if session.quick else LONG
    for length in lengths:
        goals = {"share": 0.75, "most_memory": MOST_MEMORY} if length == max(lengths) else {}
        yield Step(f"one sequence of {length:,} tokens", partial(long_sequence, session, None, length, **goals))


def long_sequence(
    session: GpuSession,
    config: hyaena.ModelConfig | None,
    length: int,
    *,
    share: float | None = None,
    most_memory: float | None = None,
) -> Iterator[Row]:
    """Time and peak memory of one sequence.

    Args:
        session: the run.
        config: of the model; that of the session unless given.
        length: tokens of the sequence.
        share: of the bound that has to be reached.
        most_memory: GB that may be allocated.
    """
    model = session.model if config is None else session.model_of(config)
    sizes = ModelSizes(model.config)
    options: dict[str, Any] = {"tokens_per_pass": 16} if session.quick else {}
    ids = ids_of(model.config, length)
    scored(model, [ids[:WARM_UP]], **options)  # compile, and plan attention to all the pasts of the shorter sequence
    session.release()
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(session.device)
    before = measure_flops(session.device, session.dtype)
    seconds = wall_seconds(partial(scored, model, [ids], **options))
    peak = torch.cuda.max_memory_allocated(session.device) / 1e9 if session.device.type == "cuda" else None
    after = measure_flops(session.device, session.dtype)
    bound = sizes.scoring_flops(length) / ((before.median + after.median) / 2)
    what = f"scoring one sequence of {length:,} tokens, layer by layer"
    what += "" if config is None else f", {config.name}"
    pairs = (sizes.scoring_flops(2 * length) - 2 * sizes.scoring_flops(length)) / 2  # what grows with T²
    yield Row(
        what=what,
        unit="tokens/s",
        ours=Summary.of([length / seconds]),
        baseline_name=f"bound by a {before.kernel}",
        baseline=Summary.of([length / bound]),
        ratio=Summary.of([bound / seconds]),
        ratio_name="ours / bound (mfu)",
        target=None if share is None else Target(">=", share),
        note=f"{seconds:.1f} s, one sample. Attention's pairs are "
        f"{pairs / sizes.scoring_flops(length):.0%} of the operations. The product: {before.median / 1e12:.0f} "
        f"TFLOP/s before, {after.median / 1e12:.0f} after.",
    )
    if peak is None:
        raise RuntimeError("there is no peak memory: it is known on CUDA devices only")
    yield Row(
        what=f"peak memory of {what}",
        unit="GB",
        ours=Summary.of([peak]),
        target=None if most_memory is None else Target("<=", most_memory),
        note=f"Weights {sizes.weight_bytes(2) / 1e9:.1f} GB, activations of all positions "
        f"{length * model.config.hidden_size * 2 / 1e9:.1f} GB.",
    )


def peak_note(session: GpuSession) -> str:
    """The peak of tensors' memory so far, as a sentence, where the device tells."""
    if session.device.type != "cuda":
        return ""
    return f" Peak memory {torch.cuda.max_memory_allocated(session.device) / 1e9:.1f} GB."
