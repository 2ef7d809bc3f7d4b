"""Is what ``benchmarks.gpu`` times right? Each check stands by itself, so that several can compile at once.

A check returns what it compared, as (what, error, allowed), and raises at the first that is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_sizes import TINY
from benchmarks.hyena_op_gpu import DEVICE, LIMITS, distance, exact, exact_gradients, inputs, leaves
from benchmarks.registry import IncorrectError
from hyaena.bench.run import SH_7B, random_model
from hyaena.config import ModelConfig
from hyaena.decoding import Decoder
from hyaena.model import StripedHyena
from hyaena.ops import HyenaState, ModalFilter, hyena
from hyaena.ops.triton import hyena_step_
from hyaena.sampling import SamplingParams, sample

Found = list[tuple[str, float, float]]

SMALL = replace(TINY, hidden_size=128, num_attention_heads=8, intermediate_size=256)
WIDE = replace(SH_7B, layer_types=("hyena", "attention"), name="two layers of the 7B")
GREEDY = SamplingParams()
MIXED = (
    GREEDY,
    SamplingParams(temperature=0.8, top_k=9, seed=1),
    SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=2),
)
PARAMETERS = 5e-5
"""Of float32 gradients, which sum over T once more than outputs do."""
SAME = {torch.float32: 0.99, torch.bfloat16: 0.8}
"""Tokens that must be the same; in bfloat16 two of the best logits are often closer than rounding."""


@dataclass(frozen=True)
class Check:
    """What is compared, and the phases whose figures mean nothing when it is wrong."""

    run: Callable[[], Found]
    spoils: tuple[str, ...]


OPERATOR = ("operator", "prefill", "decode", "peer")
DECODING = ("decode", "peer")
PREFILL = ("prefill", "peer")


def checks(quick: bool) -> dict[str, Check]:
    """All checks by name; quick ones are small enough for Triton's interpreter."""
    width = SH_7B.hidden_size
    if quick:
        return {
            "operator": Check(partial(operator, 16, (40, 33)), OPERATOR),
            "gradients": Check(partial(gradients, 8, 12), ("operator",)),
            "operator step": Check(partial(operator_step, 16), DECODING),
            "decoding": Check(partial(decoding, TINY, torch.float32, (0, 7), MIXED[:2], 6, 3), DECODING),
            "prefill": Check(partial(prefill, TINY, torch.float32, 50, 16), PREFILL),
        }
    single, half, unequal = torch.float32, torch.bfloat16, (0, 7, 45)
    return {
        "operator": Check(partial(operator, width, (1000, 4000)), OPERATOR),
        "gradients": Check(partial(gradients, width, 1000), ("operator",)),
        "operator step": Check(partial(operator_step, width), DECODING),
        "decoding, float32": Check(partial(decoding, SMALL, single, unequal, MIXED, 160, 120), DECODING),
        "decoding, bfloat16": Check(partial(decoding, SMALL, half, unequal, MIXED, 160, 120), DECODING),
        "decoding, 7B's widths": Check(partial(decoding, WIDE, half, (0,), (GREEDY,), 40, 40), DECODING),
        "prefill, float32": Check(partial(prefill, SMALL, single, 1000, 300), PREFILL),
        "prefill, bfloat16": Check(partial(prefill, SMALL, half, 1000, 300), PREFILL),
    }


def run(check: Check) -> Found:
    """One check, from a state of the random numbers that is its own."""
    torch.manual_seed(0)
    return check.run()


def operator(width: int, lengths: Sequence[int]) -> Found:
    """The fused forward, from a state: padded rows at the first length, one long row at the others."""
    found: Found = []
    for length in lengths:
        padded = length == lengths[0]
        args = inputs(2 if padded else 1, length, width, 2, 3, torch.bfloat16, state=True)
        mask = torch.arange(length, device=DEVICE) >= torch.tensor([[0], [length // 3]], device=DEVICE)
        got = hyena(*args, mask=mask if padded else None, backend="triton")
        _compare(found, f"operator, T {length}", got, exact(*args, mask if padded else None))
    return found


def gradients(width: int, length: int) -> Found:
    """Every gradient of the fused operator, through its custom operators."""
    found: Found = []
    *args, past = inputs(2, length, width, 2, 3, torch.bfloat16, state=True)
    assert past is not None
    mask = torch.arange(length, device=DEVICE) >= torch.tensor([[0], [length // 3]], device=DEVICE)
    dy = torch.randn(2, length, width, device=DEVICE, dtype=torch.bfloat16)
    dpast = HyenaState(torch.randn_like(past.short), torch.randn_like(past.long))
    ours = [t.detach().clone().requires_grad_() for t in leaves(tuple(args), past)]
    filter = ModalFilter(torch.view_as_complex(ours[3]), torch.view_as_complex(ours[4]), ours[5])
    before = HyenaState(ours[6], torch.view_as_complex(ours[7]))
    y, state = hyena(*ours[:3], filter, before, mask=mask, backend="triton")
    outputs, given = (y, state.short, torch.view_as_real(state.long)), (dy, dpast.short, torch.view_as_real(dpast.long))
    got = torch.autograd.grad(outputs, ours, given)
    names = ("z", "short weight", "bias", "poles", "residues", "skip", "fir", "iir")
    for name, value, want in zip(names, got, exact_gradients(dy, dpast, tuple(args), past, mask), strict=True):
        limit = PARAMETERS if value.dtype == torch.float32 else LIMITS[value.dtype]
        _note(found, f"gradient of {name}", distance(value, want), limit)
    return found


def operator_step(width: int) -> Found:
    """The step of one token that updates its states in place."""
    found: Found = []
    for batch in (1, 5):
        z, weight, bias, filter, past = inputs(batch, 1, width, 2, 3, torch.bfloat16, state=True)
        assert past is not None
        want = exact(z, weight, bias, filter, past)
        y = hyena_step_(z, weight, bias, filter, past.short, past.long)
        _compare(found, f"step, {batch} rows", (y, past), want)
    return found


@torch.inference_mode()
def decoding(
    config: ModelConfig,
    dtype: torch.dtype,
    paddings: Sequence[int],
    params: Sequence[SamplingParams],
    steps: int,
    leave: int,
) -> Found:
    """The captured step against the model's own forward, over unequal prompts; the first row leaves after a while."""
    model = _decisive(config, dtype)
    mask = torch.arange(50, device=DEVICE) >= torch.tensor(paddings, device=DEVICE)[:, None]
    ids = torch.randint(config.vocab_size, mask.shape, device=DEVICE)
    caches = [model.make_cache(len(paddings), max_length=50 + steps) for _ in range(2)]
    _, last = (model(ids, cache=cache, mask=mask)[:, -1].argmax(-1) for cache in caches)
    seen = torch.zeros(len(paddings), config.vocab_size, dtype=torch.bool, device=DEVICE)
    decoder = Decoder(
        model,
        caches[0],
        last,
        params,
        [p.generator() for p in params],
        seen=seen.clone(),
        captured=DEVICE == "cuda",
    )
    generators, rows, cache = [p.generator() for p in params], list(range(len(paddings))), caches[1]
    same = total = 0
    for count in range(steps):
        if count == leave:
            rows = rows[1:]
            decoder.keep(rows)
            cache, last, seen = cache.select(rows), last[1:], seen[1:]
        decoder.launch()
        tokens = decoder.fetch().tokens
        logits = model(last[:, None], cache=cache)[:, -1]
        want = sample(logits, [params[i] for i in rows], [generators[i] for i in rows], seen=seen)
        same += sum(a == b for a, b in zip(tokens, want.tolist(), strict=True))
        total += len(rows)
        # Forward goes on with the decoder's choice, so that one near-tie does not make everything differ.
        last = torch.tensor(tokens, device=DEVICE)
        seen.scatter_(1, last[:, None], True)
    found: Found = []
    _note(found, f"share of {total} tokens that forward chooses otherwise, {dtype}", 1 - same / total, 1 - SAME[dtype])
    if dtype == torch.float32:  # in bfloat16 what layers are given differs by more than what a state could show
        for i, (one, other) in enumerate(zip(decoder.cache().layers, cache.layers, strict=True)):
            if isinstance(one, HyenaState) and isinstance(other, HyenaState):
                _note(found, f"state of layer {i} after {steps} steps", distance(one.long, other.long), 1e-4)
    return found


@torch.inference_mode()
def prefill(config: ModelConfig, dtype: torch.dtype, length: int, chunk: int) -> Found:
    """The logits after a prompt that was read in chunks against those of one pass."""
    model = _decisive(config, dtype)
    ids = torch.randint(config.vocab_size, (1, length), device=DEVICE)
    cache = model.make_cache(max_length=length)
    for part in ids.split(chunk, dim=1):
        logits = model(part, cache=cache, logits_to_keep=1)
    found: Found = []
    # Rounding of every layer's output, in another order of summation.
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    _note(found, f"logits in chunks, {dtype}", distance(logits, model(ids, logits_to_keep=1)), limit)
    return found


def _decisive(config: ModelConfig, dtype: torch.dtype) -> StripedHyena:
    """A model whose best logit stands out, as those of a trained one do."""
    torch.manual_seed(0)
    model = random_model(config, torch.device(DEVICE), dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "long_filter" not in name:
                p.normal_(std=2.3 / config.hidden_size**0.5)
    return model


def _compare(found: Found, what: str, got: tuple[Tensor, HyenaState], want: tuple[Tensor, HyenaState]) -> None:
    parts = zip(("output", "window", "modes"), (got[0], *got[1]), (want[0], *want[1]), strict=True)
    for part, value, expected in parts:
        limit = LIMITS[torch.float32 if value.is_complex() else value.dtype]
        _note(found, f"{what}, {part}", distance(value, expected), limit)


def _note(found: Found, what: str, error: float, allowed: float) -> None:
    found.append((what, error, allowed))
    if not error <= allowed:  # NaN fails too
        raise IncorrectError(f"{what}: the error is {error:.2g}, allowed {allowed:g}")


def main(name: str) -> None:
    """Run one check of full size and print what it compared, one line of JSON each."""
    for comparison in run(checks(quick=False)[name]):
        print(json.dumps(comparison))


if __name__ == "__main__":
    main(sys.argv[1])
