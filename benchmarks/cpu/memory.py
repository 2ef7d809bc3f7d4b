"""How much memory a prefill needs, measured in fresh processes (``benchmarks.cpu.memory_probe``)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import torch

from benchmarks.cpu.memory_probe import CHUNK
from benchmarks.machine import ROOT
from benchmarks.registry import Row, Session, Summary, Target

HOW = (
    "Each figure is a process of its own: the high-water mark of its resident size (VmHWM, reset before the prefill) "
    "less its resident size just before (interpreter, libraries and weights)"
)


FIXED_THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
"""Makes glibc return every larger block when it is freed, so that its free lists do not count as memory needed."""


def probe(*arguments: object, allocator: dict[str, str] | None = None) -> dict[str, Any]:
    """Run ``memory_probe`` in a fresh process and return what it prints."""
    command = [sys.executable, "-m", "benchmarks.cpu.memory_probe", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(allocator or {})})
    if done.returncode:
        raise RuntimeError(f"the memory probe failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def prefill(
    model: str, tokens: int, chunk: int | None = None, allocator: dict[str, str] | None = None
) -> dict[str, Any]:
    """The memory of one prefill; see ``memory_probe.prefill``."""
    extra = () if chunk is None else (chunk,)
    return probe(model, tokens, torch.get_num_threads(), *extra, allocator=allocator)


def prefill_memory(session: Session) -> list[Row]:
    """Peak growth during the 129M model's prefill, cache included; the baseline's beside it."""
    tokens, chunk, repeats = (96, 32, 1) if session.quick else (8192, None, 2)
    names = ("tiny", "tiny-mistral") if session.quick else ("129m", "129m-mistral")
    ours = [prefill(names[0], tokens, chunk) for _ in range(repeats)]
    theirs = prefill(names[1], tokens)
    cache = ours[0]["cache"] / 1e6
    return [
        Row(
            what=f"peak memory growth during a prefill of {tokens:,} tokens, {names[0]} model",
            unit="MB",
            ours=Summary.of(p["growth"] / 1e6 for p in ours),
            target=Target("<=", 1000),
            note=f"{HOW}. The cache, {cache:.0f} MB, is in it.",
        ),
        Row(
            what=f"the same for {names[1]}",
            unit="MB",
            ours=Summary.of([theirs["growth"] / 1e6]),
            note="Read in one pass, as its users do; its cache is in it.",
        ),
    ]


def cub_memory(session: Session) -> list[Row]:
    """What a prefill needs beyond weights and cache, at a long prompt and at a short one.

    Once as the process shows it, and once, at lengths that take less time, without the allocator's free lists.
    """
    short, long, few, many = (4096, 8192, 4096, 8192) if session.quick else (16_384, 262_144, 4096, 32_768)
    small = [prefill("cub", short) for _ in range(1 if session.quick else 3)]
    large = prefill("cub", long)
    return [
        growth_row(
            large,
            small,
            long,
            short,
            Target("<=", 1.1),
            f"{HOW}, less the bytes of the cache ({large['cache'] / 1e6:.0f} and {small[0]['cache'] / 1e6:.0f} MB). "
            f"The prefill took {large['seconds']:.0f} s. On its way: {_course(large, long)}. The target allows "
            f"10 % for the allocator's free lists. The prompt's own {long:,} ids are in the long figure.",
        ),
        growth_row(
            prefill("cub", many, allocator=FIXED_THRESHOLD),
            [prefill("cub", few, allocator=FIXED_THRESHOLD)],
            many,
            few,
            None,
            "The same with glibc's mmap threshold fixed at 256 KiB, so that freed blocks leave the process at once: "
            "what the prefill holds, without what the allocator keeps.",
        ),
    ]


def mixed_batch(session: Session) -> list[Row]:
    """Short prompts and a long one in one batch: memory against the two apart, and how long the short ones wait."""
    count, short, long, new = (3, 10, 1500, 2) if session.quick else (15, 10, 24_000, 8)

    def batch(lengths: list[int]) -> dict[str, Any]:
        lengths_text = ",".join(map(str, lengths))
        return probe("--prompts", lengths_text, new, torch.get_num_threads(), allocator=FIXED_THRESHOLD)

    together = batch([short] * count + [long])
    apart = [batch([short] * count), batch([long])]
    passes = math.ceil(max(0, together["read"] - count * short) / CHUNK)
    what = f"{count} prompts of {short} bytes and one of {long:,}, cub"
    return [
        Row(
            what=f"peak memory growth of one batch of {what}",
            unit="MB",
            ours=Summary.of([together["growth"] / 1e6]),
            baseline_name="the short ones and the long one apart, summed",
            baseline=Summary.of([sum(p["growth"] for p in apart) / 1e6]),
            ratio=Summary.of([together["growth"] / sum(p["growth"] for p in apart)]),
            ratio_name="together / apart",
            target=Target("<=", 1.2),
            note=f"{HOW}; glibc's mmap threshold fixed at 256 KiB. {new} new tokens a row. Apart: "
            + " and ".join(f"{p['growth'] / 1e6:.0f} MB" for p in apart)
            + ".",
        ),
        Row(
            what=f"passes of the long prompt before a short one gets its first token, {what}",
            unit="passes",
            ours=Summary.of([passes]),
            target=Target("<=", 1),
            note=f"Of {math.ceil(long / CHUNK)} passes of {CHUNK} tokens. Counted, not timed.",
        ),
    ]


def _beyond(p: dict[str, Any]) -> float:
    return (p["growth"] - p["cache"]) / 1e6


def growth_row(
    large: dict[str, Any],
    small: list[dict[str, Any]],
    long: int,
    short: int,
    target: Target | None,
    note: str,
    unit: str = "bytes",
) -> Row:
    """The memory of two prompts beyond weights and cache, the long one against the short."""
    return Row(
        what=f"memory of a prompt of {long:,} {unit} beyond weights and cache, {large['model']}"
        + ("" if target else ", fixed mmap threshold"),
        unit="MB",
        ours=Summary.of([_beyond(large)]),
        baseline_name=f"a prompt of {short:,} {unit}",
        baseline=Summary.of(map(_beyond, small)),
        ratio=Summary.of(_beyond(large) / _beyond(p) for p in small),
        ratio_name="long / short",
        target=target,
        note=note,
    )


def _course(p: dict[str, Any], tokens: int) -> str:
    """The peak beyond weights and cache after powers of two of tokens; of the cache, what was written by then."""
    marks = {done: (peak - p["cache"] * done / tokens) / 1e6 for done, peak in p["course"] if not done & (done - 1)}
    return ", ".join(f"{value:.0f} MB after {done:,}" for done, value in marks.items())
