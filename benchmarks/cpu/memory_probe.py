"""One prefill, or one batch, in a process of its own, which then prints how much its resident size grew.

    python -m benchmarks.cpu.memory_probe MODEL TOKENS THREADS [CHUNK]
    python -m benchmarks.cpu.memory_probe --prompts LENGTH,… NEW_TOKENS THREADS
    python -m benchmarks.cpu.memory_probe --embed LENGTH THREADS

The kernel's high-water mark of *this* address space (``VmHWM``) is read, not ``ru_maxrss``: that one is inherited
across fork and exec, so a fresh process would begin with its parent's peak.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import hyaena
from benchmarks.cpu import models
from benchmarks.cpu.prefill_decode import prefill_ours, prompt
from hyaena.bench.clock import wall_seconds
from hyaena.generation import PREFILL_CHUNK
from hyaena.model import StripedHyena
from hyaena.tokenizers import CharacterTokenizer

CHUNK = PREFILL_CHUNK["cpu"]


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM``."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"there is no {field} in /proc/self/status: memory is measured on Linux only")


def forget_peak() -> None:
    """Let ``VmHWM`` begin again at the current size."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def prefill(name: str, tokens: int, threads: int, chunk: int = CHUNK) -> None:
    """Print as JSON: growth and cache in bytes, seconds, the name of the model, and the growth after each pass."""
    torch.set_num_threads(threads)
    course: list[tuple[int, int]] = []
    if name.endswith("-mistral"):
        from benchmarks.mistral import Mistral

        config = models.TINY if name.startswith("tiny") else models.STRIPED
        baseline, ids, cache = Mistral(config), prompt(config, tokens), 0

        def run() -> None:
            with torch.inference_mode():
                baseline.prefill(ids)
    else:
        model = _model(name)
        ids = prompt(model.config, tokens) if name != "cub" else _text(tokens)
        cache = _cache_bytes(model, tokens + 1)

        def run() -> None:
            prefill_ours(model, ids, chunk, lambda done, total: course.append((done, resident("VmHWM"))))

    growth, seconds, before = measure(run)
    course = [(done, peak - before) for done, peak in course]
    print(json.dumps({"growth": growth, "cache": cache, "seconds": seconds, "model": name, "course": course}))


def batch(lengths: list[int], new_tokens: int, threads: int) -> None:
    """Generate from prompts of these lengths in one batch with cub.

    Prints as JSON: the growth in bytes, and how many tokens of prompts had been read when the shortest prompt got its
    first token.
    """
    torch.set_num_threads(threads)
    model, tokenizer = models.cub()
    prompts = [_text(length)[0].tolist() for length in lengths]
    shortest = lengths.index(min(lengths))
    read, waited = [0], []

    def run() -> None:
        options = {"max_new_tokens": new_tokens, "stop_at_eos": False, "prefill_chunk": CHUNK}
        events = hyaena.stream(model, tokenizer, prompts, progress=lambda done, total: read.append(done), **options)
        for event in events:
            if event.index == shortest and not waited:
                waited.append(read[-1])

    growth, seconds, _ = measure(run)
    print(json.dumps({"growth": growth, "seconds": seconds, "read": waited[0]}))


def embedding(length: int, threads: int) -> None:
    """Embed a sequence with a small model of Evo's kind, means of two layers; print growth and seconds as JSON."""
    torch.set_num_threads(threads)
    model, tokenizer = models.small_evo(), CharacterTokenizer(512)
    text = "GATTACA" * (length // 7 + 1)

    def run(count: int) -> None:
        hyaena.embed(model, tokenizer, text[:count], layers=[1, -1], pool="mean")

    run(min(length, 3000))  # what is loaded at the first call
    growth, seconds, _ = measure(lambda: run(length))
    print(json.dumps({"growth": growth, "seconds": seconds}))


def measure(run: Callable[[], None]) -> tuple[int, float, int]:
    """The growth of the resident size during a call, the seconds that it took, and the resident size before."""
    forget_peak()
    before = resident("VmRSS")
    seconds = wall_seconds(run)
    return resident("VmHWM") - before, seconds, before


def _model(name: str) -> StripedHyena:
    if name == "cub":
        return models.cub()[0]
    return (models.evo2 if name.endswith("evo2") else models.striped)(quick=name.startswith("tiny"))


def _cache_bytes(model: StripedHyena, length: int) -> int:
    return model.make_cache(max_length=length, device="meta").nbytes


def _text(count: int) -> torch.Tensor:
    """Bytes [1,count] that look like what cub reads: this package's source, over and over."""
    source = Path(models.__file__).read_bytes()
    return torch.frombuffer(bytearray((source * (count // len(source) + 1))[:count]), dtype=torch.uint8)[None]


if __name__ == "__main__":
    if sys.argv[1] == "--prompts":
        batch([int(length) for length in sys.argv[2].split(",")], int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1] == "--embed":
        embedding(int(sys.argv[2]), int(sys.argv[3]))
    else:
        prefill(sys.argv[1], *(int(argument) for argument in sys.argv[2:]))
