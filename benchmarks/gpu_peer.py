"""The peer on a GPU, in a process of its own: transformers' Mistral in the widths of our 7B, as its users run it.

    python -m benchmarks.gpu_peer [--quick] [--rehearse]

Prints one line of JSON per measurement. Prefill: one pass, DynamicCache, scaled-dot-product attention, logits of the
last position. Decoding: StaticCache and ``torch.compile(mode="reduce-overhead", fullgraph=True)``, greedy, tokens
kept on the device within a round. ``--rehearse`` runs the decoding once, unmeasured, so that the compiler's caches on
disk are filled while nothing is being timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_sizes import FULL, QUICK, Sizes
from benchmarks.mistral import Mistral
from hyaena.bench.rates import times
from hyaena.bench.run import release

CHUNK = 16_384
"""Of a prompt that does not fit through in one pass."""

MOST_SECONDS = 30.0
"""A third run of a prefill is left out when the first two took as long."""

ROUNDS = 5
"""Of decoding."""


def main() -> None:
    """Build the peer, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--rehearse", action="store_true", help="only compile, and fill the compiler's caches")
    options = parser.parse_args()
    for line in measure(QUICK if options.quick else FULL, rehearse=options.rehearse):
        print(json.dumps(line), flush=True)


def measure(sizes: Sizes, *, rehearse: bool = False) -> Iterator[dict[str, Any]]:
    """One record per measurement: its name with seconds and a note, or with an error."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peer = Mistral(sizes.config, dtype=torch.bfloat16, device=device)
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    if not rehearse:
        for length in (n for n in sizes.prompts if n >= sizes.long):
            jobs[f"prefill {length}"] = lambda length=length: prefill(peer, length, device)
    for batch, context, _ in sizes.duels:
        rounds = 0 if rehearse else ROUNDS
        jobs[f"decode {batch} {context}"] = lambda b=batch, c=context, r=rounds: decode(peer, b, c, sizes.steps, r)
    for name, job in jobs.items():
        try:
            yield {"name": name, **job()}
        except Exception as error:
            yield {"name": name, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        peer.cache = None
        torch._dynamo.reset()  # a compiled step belongs to one cache, and holds it
        release()


@torch.inference_mode()
def prefill(peer: Mistral, length: int, device: torch.device) -> dict[str, Any]:
    """Seconds of reading a random prompt, two or three times; in chunks where one pass needs too much memory."""
    ids = torch.randint(peer.config.vocab_size, (1, length), device=device)
    note = "one pass"
    peer.prefill(ids[:, : length // 8])
    try:
        taken = _prefills(lambda: peer.prefill(ids), peer, device)
    except torch.cuda.OutOfMemoryError:
        peer.cache = None
        gc.collect()
        torch.cuda.empty_cache()
        note = f"one pass runs out of memory, so chunks of {CHUNK:,}"
        taken = _prefills(lambda: peer.prefill(ids, chunk=CHUNK), peer, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"seconds": taken, "note": note, "peak_memory": peak}


def _prefills(read: Callable[[], object], peer: Mistral, device: torch.device) -> list[float]:
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < 3 and sum(taken) < MOST_SECONDS):
        peer.cache = None
        taken += times(read, device, 1).values
    return taken


def decode(peer: Mistral, batch: int, context: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step, each the mean over a round, at a context of random keys and values."""
    device = next(peer.model.parameters()).device
    ids = torch.ones(batch, 1, dtype=torch.int64, device=device)
    # Not in inference mode: the compiler wants a cache of ordinary tensors. And always of the same size: what was
    # compiled for another one would be compiled again.
    step = static_steps(peer, batch, context, room=steps * (ROUNDS + 1) + 16, compiled=device.type == "cuda")
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
    peer: Mistral, batch: int, context: int, *, room: int, compiled: bool, cache: Any = None
) -> Callable[[Tensor], Tensor]:
    """What reads one token per row [B,1] and returns the most probable next ones.

    Without a ``cache`` that has read ``context`` tokens, one of random keys and values is made.
    """
    if cache is None:
        cache = peer.static_cache(batch, context + room)
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
    position = torch.full((batch, 1), context, device=cache.layers[0].keys.device)
    forward: Any = peer.model.forward
    if compiled:
        forward = torch.compile(forward, mode="reduce-overhead", fullgraph=True)

    def step(ids: Tensor) -> Tensor:
        logits = forward(input_ids=ids, past_key_values=cache, position_ids=position, use_cache=True).logits
        position.add_(1)
        return logits[:, -1:].argmax(-1).clone()  # the next replay overwrites what a captured step returned

    return step


if __name__ == "__main__":
    main()
