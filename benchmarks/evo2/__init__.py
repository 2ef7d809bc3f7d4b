"""Evo 2's 1B on two cores: apart from the benchmarks of ``benchmarks.cpu``, since its weights take 4.4 GB."""

from __future__ import annotations

from benchmarks.registry import Benchmark, Suite

METHOD = """\
Written by `python -m benchmarks.evo2`; do not edit. Random weights of `evo2-1b-base`, float32, random tokens, plain
products in place of FP8 ones. The bound of a prefill are the products of all matrices with as many vectors, in the same
chunks; of decoding, reading each matrix once, by the fastest of several kernels. Both sides run in turns in one
process; memory in fresh processes."""

SUITE = Suite(
    name="evo2",
    title="Evo 2's 1B on a CPU",
    method=METHOD,
    benchmarks=(
        Benchmark("prefill", "evo2.cpu:prefill", "1,024 tokens against the products of its matrices", 3),
        Benchmark("decode", "evo2.cpu:decode", "decoding at context 512 against reading its weights", 1.5),
        Benchmark("memory", "evo2.cpu:memory", "memory of a prefill of 4,096 tokens beside one of 1,024", 4),
    ),
    threads=2,
)
