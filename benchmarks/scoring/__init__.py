"""The benchmarks of scoring on a GPU: apart from those of ``benchmarks.gpu``, since a long sequence takes minutes."""

from __future__ import annotations

from benchmarks.registry import Benchmark, Suite

METHOD = """\
Written by `python -m benchmarks.scoring`; do not edit. Random weights of StripedHyena-Hessian-7B's shape, or of the
model that a row names, bfloat16, random tokens; `hyaena.score` from token ids to log-probabilities on the host, without
entropies and ranks unless a row names them. The bound is two operations per weight and token, logits of every predicted
position and the causal half of all pairs in attention (`ModelSizes.scoring_flops`), over the rate of a large matrix
product measured before and after each sample."""

SUITE = Suite(
    name="scoring",
    title="How fast hyaena scores on a GPU",
    method=METHOD,
    benchmarks=(
        Benchmark("correct", "scoring.gpu:correct", "packed and layer by layer against one pass", 0.5, required=True),
        Benchmark("attention", "scoring.gpu:attention", "attention of a chunk after a long past, by kernel", 0.3),
        Benchmark("packed", "scoring.gpu:packed", "2,000 sequences of 200 to 4,000 tokens", 2.5),
        Benchmark("variants", "scoring.variants:on_gpu", "SNVs in shared windows against full ones, Evo 2 7B", 1.2),
        Benchmark("long", "scoring.gpu:long", "one sequence of 131,072 and one of 1,000,000 tokens", 5.5),
    ),
    session="gpu.session:GpuSession",
    packages=("numpy",),
    cuda=True,
    limit=560.0,
)
