"""Load on ``hyaena serve``: how fast it answers many at once."""

from __future__ import annotations

from benchmarks.registry import Benchmark, Suite

METHOD = """\
Written by `python -m benchmarks.serve`; do not edit. cub, float32, `hyaena serve` in one process and the client in
another on the same machine, over loopback. Both sides of a row are asked in turns; a ratio is the median of the
pairwise ratios with [lowest … highest]. A prompt of 64k bytes is read in 1 to 2 minutes, one of 100k in 2 to 4."""

SUITE = Suite(
    name="serve",
    title="How fast hyaena serves on a CPU",
    method=METHOD,
    benchmarks=(
        Benchmark("throughput", "serve.load:throughput", "32 streams against one; HTTP against the engine", 2),
        Benchmark("beside", "serve.load:beside", "short requests beside one of 64k bytes", 3),
        Benchmark("turns", "serve.load:turns", "second turns of 16k and 100k bytes", 5),
        Benchmark("adapters", "serve.load:adapters", "streams with LoRA adapters against streams without", 1),
    ),
    packages=("fastapi", "uvicorn"),
    threads=2,
)
