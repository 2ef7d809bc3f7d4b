"""Prefill, decoding and memory of Evo 2's 1B in float32 on a CPU, each against what it cannot go below."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.cpu import memory as probes
from benchmarks.cpu import models
from benchmarks.cpu.prefill_decode import CHUNK, check_decoding, decode_against_weights, prefill_ours, prompt
from benchmarks.registry import Row, Session, Summary, Target, pairwise
from hyaena.bench.clock import Side, take_turns
from hyaena.sizes import ModelSizes


def prefill(session: Session) -> list[Row]:
    """A prompt to its first token, against the products of all matrices with as many vectors."""
    length, rounds = (96, 2) if session.quick else (1024, 2)
    model = models.evo2(session.quick)
    ids = prompt(model.config, length)
    check_decoding(model, ids[:, : min(length, 160)])  # longer than the window of the longest filter
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    chunks = [len(part) for part in torch.empty(length).split(CHUNK)]
    inputs = {(n, w.shape[1]): torch.randn(n, w.shape[1]) for n in chunks for w in matrices}

    @torch.inference_mode()
    def products() -> None:
        for n in chunks:
            for w in matrices:
                nn.functional.linear(inputs[n, w.shape[1]], w)

    seconds = take_turns({"ours": Side(lambda: prefill_ours(model, ids)), "bound": Side(products)}, rounds)
    flops = ModelSizes(model.config).prefill_flops(length)
    return [
        Row(
            what=f"prefill of {length:,} tokens, {models.size_of(model)}",
            unit="s",
            ours=Summary.of(seconds["ours"].values),
            baseline_name=f"the products of {len(matrices)} matrices",
            baseline=Summary.of(seconds["bound"].values),
            ratio=pairwise(seconds["bound"].values, seconds["ours"].values),
            ratio_name="bound / ours",
            note=f"{length / seconds['ours'].median:.0f} tokens/s, {flops / seconds['ours'].median / 1e9:.0f} GFLOP/s. "
            "The bound leaves out attention, filters, norms and gates.",
        )
    ]


def decode(session: Session) -> list[Row]:
    """Single steps at a short context, against reading every weight matrix of a step once."""
    context, steps, rounds = (64, 4, 2) if session.quick else (512, 8, 5)
    return decode_against_weights(models.evo2(session.quick), context, steps, rounds)


def memory(session: Session) -> list[Row]:
    """What a prefill needs beyond weights and cache, at a long prompt and at a short one."""
    short, long = (96, 384) if session.quick else (1024, 4096)
    name = "tiny-evo2" if session.quick else "evo2"
    small, large = (probes.prefill(name, tokens, allocator=probes.FIXED_THRESHOLD) for tokens in (short, long))
    return [probes.growth_row(large, [small], long, short, Target("<=", 1.1), probes.HOW, unit="tokens")]
