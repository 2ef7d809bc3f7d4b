"""How much memory a prefill needs, measured in fresh processes (``benchmarks.memory_probe``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch

from benchmarks.machine import ROOT
from benchmarks.registry import Bar, Row, Spread

HOW = (
    "Each figure is a process of its own: the high-water mark of its resident size (VmHWM, reset before the prefill) "
    "less its resident size just before (interpreter, libraries and weights)"
)


FIXED_THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
"""Makes glibc return every larger block when it is freed, so that its free lists do not count as memory needed."""


def probe(model: str, tokens: int, chunk: int | None = None, allocator: dict[str, str] | None = None) -> dict[str, Any]:
    """Run one prefill in a fresh process and return what it says of itself."""
    command = [sys.executable, "-m", "benchmarks.memory_probe", model, str(tokens), str(torch.get_num_threads())]
    if chunk is not None:
        command.append(str(chunk))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(allocator or {})})
    if done.returncode:
        raise RuntimeError(f"the memory probe of {model} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def prefill_memory(quick: bool) -> list[Row]:
    """Peak growth during the 129M model's prefill, cache included; the peer's beside it."""
    tokens, chunk, repeats = (96, 32, 1) if quick else (8192, None, 2)
    names = ("tiny", "tiny-mistral") if quick else ("129m", "129m-mistral")
    ours = [probe(names[0], tokens, chunk) for _ in range(repeats)]
    theirs = probe(names[1], tokens)
    cache = ours[0]["cache"] / 1e6
    return [
        Row(
            what=f"peak memory growth during a prefill of {tokens:,} tokens, {names[0]} model",
            unit="MB",
            ours=Spread.of(p["growth"] / 1e6 for p in ours),
            bar=Bar("<=", 1000),
            note=f"{HOW}. The cache, {cache:.0f} MB, is in it.",
        ),
        Row(
            what=f"the same for {names[1]}",
            unit="MB",
            ours=Spread.of([theirs["growth"] / 1e6]),
            note="Read in one pass, as its users do; its cache is in it.",
        ),
    ]


def cub_memory(quick: bool) -> list[Row]:
    """What a prefill needs beyond weights and cache, at a long prompt and at a short one.

    Once as the process shows it, and once, at lengths that take less time, without the allocator's free lists.
    """
    short, long, few, many = (4096, 8192, 4096, 8192) if quick else (16_384, 262_144, 4096, 32_768)
    small = [probe("cub", short) for _ in range(1 if quick else 3)]
    large = probe("cub", long)
    return [
        _growth_row(
            large,
            small,
            long,
            short,
            Bar("<=", 1.1),
            f"{HOW}, less the bytes of the cache ({large['cache'] / 1e6:.0f} and {small[0]['cache'] / 1e6:.0f} MB). "
            f"The prefill took {large['seconds']:.0f} s. On its way: {_course(large, long)}. The bar, the same, allows "
            f"10 % for the allocator's free lists. The prompt's own {long:,} ids are in the long figure.",
        ),
        _growth_row(
            probe("cub", many, allocator=FIXED_THRESHOLD),
            [probe("cub", few, allocator=FIXED_THRESHOLD)],
            many,
            few,
            None,
            "The same with glibc's mmap threshold fixed at 256 KiB, so that freed blocks leave the process at once: "
            "what the prefill holds, without what the allocator keeps.",
        ),
    ]


def _beyond(p: dict[str, Any]) -> float:
    return (p["growth"] - p["cache"]) / 1e6


def _growth_row(
    large: dict[str, Any], small: list[dict[str, Any]], long: int, short: int, bar: Bar | None, note: str
) -> Row:
    return Row(
        what=f"memory of a prompt of {long:,} bytes beyond weights and cache, {large['model']}"
        + ("" if bar else ", fixed mmap threshold"),
        unit="MB",
        ours=Spread.of([_beyond(large)]),
        peer_name=f"a prompt of {short:,} bytes",
        peer=Spread.of(map(_beyond, small)),
        ratio=Spread.of(_beyond(large) / _beyond(p) for p in small),
        ratio_name="long / short",
        bar=bar,
        note=note,
    )


def _course(p: dict[str, Any], tokens: int) -> str:
    """The peak beyond weights and cache after powers of two of tokens; of the cache, what was written by then."""
    marks = {done: (peak - p["cache"] * done / tokens) / 1e6 for done, peak in p["course"] if not done & (done - 1)}
    return ", ".join(f"{value:.0f} MB after {done:,}" for done, value in marks.items())
