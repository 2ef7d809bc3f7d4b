"""Evo 2's 7B: prefill and decoding against their bounds, FP8 projections, and one long sequence.

Its input projections are products in the model's dtype, so that a matrix product of that dtype is their bound; a Hopper
GPU computes them in FP8 unless told otherwise, and those rows say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.gpu.model import decoding_row, prefill_row, time_decoding
from benchmarks.gpu.session import GpuSession
from benchmarks.registry import Row, Step, Target
from benchmarks.scoring.gpu import long_sequence
from hyaena.bench.measure import measure_prefill
from hyaena.config import ModelConfig
from hyaena.fp8 import set_fp8


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        config: the model.
        prompts: lengths of prefills, each with the tokens/s that an H100 has to reach.
        decodes: batch and context.
        sequence: tokens of the sequence that is scored.
    """

    config: ModelConfig
    prompts: tuple[tuple[int, float], ...]
    decodes: tuple[tuple[int, int], ...]
    sequence: int


EVO2_7B = ModelConfig.from_name("evo2-7b")
FULL = Sizes(
    config=EVO2_7B,
    prompts=((8192, 35_000), (32_768, 30_000), (131_072, 18_000)),
    decodes=((1, 4096), (96, 4096)),
    sequence=1_000_000,
)
QUICK = Sizes(
    config=replace(
        EVO2_7B,
        hidden_size=64,
        layer_types=("hyena_se", "hyena_mr", "hyena_li", "attention"),
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=4,
        se_filter_groups=8,
        mr_filter_groups=8,
        name="tiny evo2",
    ),
    prompts=((24, 35_000), (140, 30_000)),
    decodes=((1, 130), (3, 24)),
    sequence=90,
)

OF_FLOPS, OF_BANDWIDTH, MOST_MEMORY = 0.75, 0.9, 55.0
"""Shares of the bounds of a prefill and of a decoding step; GB of scoring the sequence."""


def evo2(session: GpuSession) -> Iterator[Step]:
    """Each prompt, each batch, and the sequence; one model."""
    sizes = QUICK if session.quick else FULL
    config = sizes.config
    for length, speed in sizes.prompts:
        run = partial(prefill, session, config, length, "off", speed)
        yield Step(f"{config.name}, prefill of {length:,} tokens", run)
    length = sizes.prompts[0][0]
    yield Step(f"{config.name}, prefill in FP8", partial(prefill, session, config, length, "auto", None))
    for batch, context in sizes.decodes:
        run = partial(decoding, session, config, batch, context)
        yield Step(f"{config.name}, decoding, batch {batch}, context {context:,}", run)
    yield Step(f"{config.name}, one sequence", partial(sequence, session, config, sizes.sequence))


def prefill(session: GpuSession, config: ModelConfig, length: int, fp8: str, speed: float | None) -> list[Row]:
    """A prompt against the operations that it needs, and its tokens per second against those of a target."""
    model = session.model_of(config)
    set_fp8(model, fp8)
    what = f"{config.name}, prefill of {length:,} tokens" + (", FP8 as the device has it" if fp8 == "auto" else "")
    row = prefill_row(what, measure_prefill(model, length, budget=10), config, None if speed is None else OF_FLOPS)
    if speed is None:
        return [row]
    rate = Row(what=f"{what}, rate", unit="tokens/s", ours=row.ours, target=Target(">=", speed), note="Of an H100.")
    return [row, rate]


def decoding(session: GpuSession, config: ModelConfig, batch: int, context: int) -> list[Row]:
    """Steps against the bytes that they have to move."""
    model = session.model_of(config)
    set_fp8(model, "off")
    found = time_decoding(session, model, batch, context)
    return [decoding_row(f"{config.name}, decoding, batch {batch}, context {context:,}", found, OF_BANDWIDTH)]


def sequence(session: GpuSession, config: ModelConfig, length: int) -> Iterator[Row]:
    """Time and peak memory of scoring a sequence."""
    set_fp8(session.model_of(config), "off")
    yield from long_sequence(session, config, length, most_memory=MOST_MEMORY)
    session.forget_model()
