"""Load on ``hyaena serve``: how fast it answers many at once."""

from __future__ import annotations

from benchmarks.registry import Benchmark, Suite

METHOD = """\
Written by `python -m benchmarks.serve`; do not edit. cub, float32, `hyaena serve` in one process and the client in
another on the same machine, over loopback. Both sides of a row are asked in turns; a ratio is the median of the
pairwise ratios with [lowest … highest]."""

SUITE = Suite(
    name="serve",
    title="How fast hyaena serves on a CPU",
    method=METHOD,
    benchmarks=(
        Benchmark("throughput", "serve.load:throughput", "32 streams against one; HTTP against the engine", 2),
        Benchmark("long_prompts", "serve.load:long_prompts", "short requests beside a long one; second turns", 6),
        Benchmark("adapters", "serve.load:adapters", "streams with LoRA adapters against streams without", 2),
    ),
    packages=("fastapi", "uvicorn"),
    threads=2,
)
