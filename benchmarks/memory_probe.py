"""One prefill in a process of its own, which then says how much its resident size grew.

    python -m benchmarks.memory_probe MODEL TOKENS THREADS [CHUNK]

The kernel's high-water mark of *this* address space (``VmHWM``) is read, not ``ru_maxrss``: that one is inherited
across fork and exec, so a fresh process would begin with its parent's peak.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from benchmarks import models
from hyaena.cache import Cache
from hyaena.generation import PREFILL_CHUNK
from hyaena.model import StripedHyena

CHUNK = PREFILL_CHUNK["cpu"]


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM``."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the system does not tell {field}: memory is measured on Linux only")


def forget_peak() -> None:
    """Let ``VmHWM`` begin again at the current size."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def main(name: str, tokens: int, threads: int, chunk: int = CHUNK) -> None:
    """Print as JSON: growth and cache in bytes, seconds, the name of the model, and the growth after each pass."""
    torch.set_num_threads(threads)
    course: list[tuple[int, int]] = []
    if name.endswith("-mistral"):
        from benchmarks.mistral import Mistral
        from benchmarks.prefill_decode import prompt

        config = models.TINY if name.startswith("tiny") else models.STRIPED
        peer, ids, cache = Mistral(config), prompt(config, tokens), 0

        def run() -> None:
            with torch.inference_mode():
                peer.prefill(ids)
    else:
        from benchmarks.prefill_decode import prefill_ours, prompt

        model = models.cub() if name == "cub" else models.striped(quick=name == "tiny")
        ids = prompt(model.config, tokens) if name != "cub" else _text(tokens)
        cache = _cache_bytes(model, tokens + 1)

        def run() -> None:
            prefill_ours(model, ids, chunk, lambda done, total: course.append((done, resident("VmHWM"))))

    forget_peak()
    before = resident("VmRSS")
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    growth = resident("VmHWM") - before
    course = [(done, peak - before) for done, peak in course]
    print(json.dumps({"growth": growth, "cache": cache, "seconds": seconds, "model": name, "course": course}))


def _cache_bytes(model: StripedHyena, length: int) -> int:
    return Cache.create(model.config, max_length=length, dtype=model.dtype, device="meta").nbytes


def _text(count: int) -> torch.Tensor:
    """Bytes [1,count] that look like what cub reads: this package's source, over and over."""
    source = Path(models.__file__).read_bytes()
    return torch.frombuffer(bytearray((source * (count // len(source) + 1))[:count]), dtype=torch.uint8)[None]


if __name__ == "__main__":
    main(sys.argv[1], *(int(argument) for argument in sys.argv[2:]))
