"""The benchmarks of a CPU."""

from __future__ import annotations

from benchmarks.registry import Benchmark, Suite

METHOD = """\
Written by `make bench` (`python -m benchmarks.cpu`); do not edit. Both sides of a row run in turns in one process
(memory: in fresh processes); figures are medians, a ratio is the median of the pairwise ratios with [lowest … highest].
Before it is timed, each benchmark checks that both sides compute what they should."""

SUITE = Suite(
    name="cpu",
    title="How fast hyaena is on a CPU, and how much memory it takes",
    method=METHOD,
    benchmarks=(
        Benchmark("startup", "cpu.startup:command_help", "`hyaena --help`: torch stays out; its wall time", 0.5),
        Benchmark("long_conv", "cpu.long_conv:blocked_against_fft", "long convolution, `blocked` against `fft`", 0.5),
        Benchmark("prefill", "cpu.prefill_decode:prefill", "129M model, prefill of 8,192 tokens against Mistral", 3.5),
        Benchmark("prefill_chunks", "cpu.prefill_decode:prefill_chunks", "the same prefill in other chunk sizes", 2),
        Benchmark("prefill_memory", "cpu.memory:prefill_memory", "the same prefill, how much memory it needs", 1),
        Benchmark("decode_8k", "cpu.prefill_decode:decode_long", "129M model, decoding at 8,192 against Mistral", 1.5),
        Benchmark(
            "decode_512",
            "cpu.prefill_decode:decode_short",
            "129M model, decoding at 512 in float32 and bfloat16 against reading its weights",
            1,
        ),
        Benchmark("llama_prefill_float32", "cpu.llama:prefill_float32", "129M model, prefill against llama.cpp F32", 4),
        Benchmark("llama_decode_float32", "cpu.llama:decode_float32", "129M model, decoding against llama.cpp F32", 2),
        Benchmark(
            "llama_prefill_bfloat16", "cpu.llama:prefill_bfloat16", "129M model, prefill against llama.cpp BF16", 4
        ),
        Benchmark(
            "llama_decode_bfloat16", "cpu.llama:decode_bfloat16", "129M model, decoding against llama.cpp BF16", 2
        ),
        Benchmark("llama_prefill_int8", "cpu.llama:prefill_int8", "129M model, prefill against llama.cpp Q8_0", 4),
        Benchmark("llama_decode_int8", "cpu.llama:decode_int8", "129M model, decoding against llama.cpp Q8_0", 2),
        Benchmark("llama_prefill_int4", "cpu.llama:prefill_int4", "129M model, prefill against llama.cpp Q4_0", 4),
        Benchmark("llama_decode_int4", "cpu.llama:decode_int4", "129M model, decoding against llama.cpp Q4_0", 2),
        Benchmark("scoring", "cpu.scoring:unequal", "cub, 256 texts of unequal length, packed and one by one", 1),
        Benchmark("embedding", "cpu.scoring:long_embedding", "memory of embedding 100,000 characters", 1),
        Benchmark("variants", "scoring.variants:on_cpu", "11M model, SNVs in shared windows against full ones", 2),
        Benchmark("mixed_batch", "cpu.memory:mixed_batch", "cub, short prompts and a long one in one batch", 1),
        Benchmark("choices", "choices:cpu", "multiple choice in lm-evaluation-harness against HFLM; needs lm_eval", 3),
        Benchmark("cub_memory", "cpu.memory:cub_memory", "cub, memory of 262,144 bytes against 16,384", 9.5),
    ),
    packages=("transformers", "numpy", "numba", "llama-cpp-python"),
    appendix="cpu.predictions:appendix",
    threads=2,
)
