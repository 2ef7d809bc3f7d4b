"""The baseline on a GPU: transformers' Mistral in the widths of our 7B, as its users run it.

    python -m benchmarks.gpu.baseline [--quick] [--rehearse]

It runs in a process of its own, with the whole device, and prints one line of JSON per measurement. Prefill: one pass,
DynamicCache, scaled-dot-product attention, logits of the last position. Decoding: StaticCache and
``torch.compile(mode="reduce-overhead", fullgraph=True)``, greedy, tokens kept on the device within a round.
``--rehearse`` runs the decoding once, unmeasured, so that the compiler's caches on disk are filled while nothing is
being timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.session import GpuSession
from benchmarks.gpu.sizes import FULL, QUICK, Sizes
from benchmarks.machine import ROOT
from benchmarks.mistral import Mistral
from benchmarks.registry import Row, Step, Summary, Target, spanning
from hyaena.bench.clock import call_times, release
from hyaena.bench.measure import Figure

GRACE = 20.0
"""Seconds that a child process has at least, however late it is."""

CHUNK = 16_384
"""Of a prompt that does not fit through in one pass."""

MOST_SECONDS = 30.0
"""A third run of a prefill is left out when the first two took as long."""

ROUNDS = 5
"""Of decoding."""


def main() -> None:
    """Build the baseline, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--rehearse", action="store_true", help="only compile, and fill the compiler's caches")
    options = parser.parse_args()
    for line in measure(QUICK if options.quick else FULL, rehearse=options.rehearse):
        print(json.dumps(line), flush=True)


def measure(sizes: Sizes, *, rehearse: bool = False) -> Iterator[dict[str, Any]]:
    """One record per measurement: its name with seconds and a note, or with an error."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    baseline = Mistral(sizes.config, dtype=torch.bfloat16, device=device)
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    if not rehearse:
        for length in (n for n in sizes.prompts if n >= sizes.long):
            jobs[f"prefill {length}"] = lambda length=length: prefill(baseline, length, device)
    for batch, context, _ in sizes.baseline_decodes:
        rounds = 0 if rehearse else ROUNDS
        jobs[f"decode {batch} {context}"] = lambda b=batch, c=context, r=rounds: decode(baseline, b, c, sizes.steps, r)
    for name, job in jobs.items():
        try:
            yield {"name": name, **job()}
        except Exception as error:
            yield {"name": name, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        baseline.cache = None
        torch._dynamo.reset()  # a compiled step belongs to one cache, and holds it
        release()


@torch.inference_mode()
def prefill(baseline: Mistral, length: int, device: torch.device) -> dict[str, Any]:
    """Seconds of reading a random prompt, two or three times; in chunks where one pass needs too much memory."""
    ids = torch.randint(baseline.config.vocab_size, (1, length), device=device)
    note = "one pass"
    baseline.prefill(ids[:, : length // 8])
    try:
        taken = _prefills(lambda: baseline.prefill(ids), baseline, device)
    except torch.cuda.OutOfMemoryError:
        baseline.cache = None
        gc.collect()
        torch.cuda.empty_cache()
        note = f"one pass runs out of memory, so chunks of {CHUNK:,}"
        taken = _prefills(lambda: baseline.prefill(ids, chunk=CHUNK), baseline, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"seconds": taken, "note": note, "peak_memory": peak}


def _prefills(read: Callable[[], object], baseline: Mistral, device: torch.device) -> list[float]:
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < 3 and sum(taken) < MOST_SECONDS):
        baseline.cache = None
        taken += call_times(read, device, 1, warmup=0).values
    return taken


def decode(baseline: Mistral, batch: int, context: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step, each the mean over a round, at a context of random keys and values."""
    device = next(baseline.model.parameters()).device
    ids = torch.ones(batch, 1, dtype=torch.int64, device=device)
    # Not in inference mode: the compiler wants a cache of ordinary tensors. And always of the same size: what was
    # compiled for another one would be compiled again.
    step = static_steps(baseline, batch, context, room=steps * (ROUNDS + 1) + 16, compiled=device.type == "cuda")
    began = time.perf_counter()
    with torch.inference_mode():
        for _ in range(4):
            ids = step(ids)
        ids.tolist()
        first = time.perf_counter() - began
        taken = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            for _ in range(steps):
                ids = step(ids)
            ids.tolist()
            taken.append((time.perf_counter() - began) / steps)
    return {"seconds": taken[1:], "first_steps": first, "note": f"start-up {first:.0f} s"}


def static_steps(
    baseline: Mistral, batch: int, context: int, *, room: int, compiled: bool, cache: Any = None
) -> Callable[[Tensor], Tensor]:
    """Return a function that reads one token per row [B,1] and returns the most probable next ones.

    Without a ``cache`` that has read ``context`` tokens, one of random keys and values is made.
    """
    if cache is None:
        cache = baseline.static_cache(batch, context + room)
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
    position = torch.full((batch, 1), context, device=cache.layers[0].keys.device)
    forward: Any = baseline.model.forward
    if compiled:
        forward = torch.compile(forward, mode="reduce-overhead", fullgraph=True)

    def step(ids: Tensor) -> Tensor:
        logits = forward(input_ids=ids, past_key_values=cache, position_ids=position, use_cache=True).logits
        position.add_(1)
        return logits[:, -1:].argmax(-1).clone()  # the next replay overwrites what a captured step returned

    return step


# --- beside ours -----------------------------------------------------------------------------------------------------


def compare(session: GpuSession) -> Iterator[Step]:
    """The baseline in a process of its own; our side was measured before, on the same device."""

    def run() -> Iterator[Row]:
        session.forget_model()
        lines, error = finish(start(*(["--quick"] if session.quick else [])), session.left)
        theirs.update({line["name"]: line for line in lines})
        ended.append(error)
        yield from ()

    theirs: dict[str, Any] = {}
    ended: list[str] = []
    yield Step("the baseline's process", run)

    def beside(what: str, name: str, ours: Figure | None, tokens: int, target: Target) -> Iterator[Row]:
        yield row(what, name, ours, tokens, target, theirs, "; ".join(ended))

    sizes = session.sizes
    for length in (n for n in sizes.prompts if n >= sizes.long):
        what, ours = f"prefill of {length:,} tokens", session.prefills.get(length)
        yield Step(what, partial(beside, what, f"prefill {length}", ours, length, Target(">", 1)))
    for batch, context, target in sizes.baseline_decodes:
        what, ours = f"decoding, batch {batch}, context {context:,}", session.decodes.get((batch, context))
        yield Step(what, partial(beside, what, f"decode {batch} {context}", ours, batch, target))


def row(
    what: str, name: str, ours: Figure | None, tokens: int, target: Target, theirs: Mapping[str, Any], error: str
) -> Row:
    """Tokens per second of both sides; ``tokens`` are those of one sample.

    Raises:
        RuntimeError: one side was not measured, and why.
    """
    other = theirs.get(name)
    if other is None or "error" in other:
        raise RuntimeError(f"the baseline: {other['error'] if other else error or 'it printed nothing'}")
    if ours is None:
        raise RuntimeError("our side was not measured in this run")
    mine = Summary.of(tokens / s for s in ours.seconds.values)
    baseline = Summary.of(tokens / s for s in other["seconds"])
    memory = f", peak memory {other['peak_memory'] / 1e9:.1f} GB" if other.get("peak_memory") else ""
    return Row(
        what=what,
        unit="tokens/s",
        ours=mine,
        baseline_name="Mistral's shape" + (", compiled" if name.startswith("decode") else ""),
        baseline=baseline,
        ratio=spanning(mine, baseline),
        ratio_name="ours / baseline",
        target=target,
        note=f"The baseline: {other['note']}{memory}.",
    )


def start(*arguments: str, module: str = "benchmarks.gpu.baseline") -> subprocess.Popen[str]:
    """Start this file, or another that prints lines of JSON, as a process of its own."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str], seconds: float) -> tuple[list[Any], str]:
    """The lines of JSON that a child has printed, and what went wrong with it; one that takes too long is ended."""
    late = ""
    try:
        out, err = child.communicate(timeout=min(max(seconds, GRACE), 3600))
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        late = "it did not end in time"
    lines = [json.loads(line) for line in out.splitlines() if line.startswith(("{", "["))]
    last = err.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
    return lines, late or (last[0] if child.returncode else "")


if __name__ == "__main__":
    main()
