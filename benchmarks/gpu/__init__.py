"""The benchmarks of a GPU: all of them in one run of about twenty minutes."""

from __future__ import annotations

from benchmarks.registry import Benchmark, Suite

METHOD = """\
Written by `python -m benchmarks.gpu`; do not edit. Random weights, bfloat16; our model has the shape of
StripedHyena-Hessian-7B, the baseline is transformers' `MistralForCausalLM` in the same widths with attention in every
layer (Mistral-7B's shape), scaled-dot-product attention, no sliding window. Figures are medians.

Bounds come from a copy and a matrix product measured in the same run, in turns with decoding and with prefills
(`hyaena.bench`): 4·D numbers a token for the operator; weights, keys, values and states for a decoding step (its share
is the memory-bandwidth utilisation, mbu); products and causal scores that the last position's logits need for a prefill
(model FLOPs utilisation, mfu). The first benchmark runs the tests of the kernels and of decoding on the GPU, at 4,096
channels too; when one fails, nothing is timed.

The two models do not fit into one GPU's memory at batch 64, so they ran one after the other, the baseline in a process
of its own: a ratio is that of the medians, with [lowest … highest] from the extremes of both sides. The baseline reads
a prompt as its users do, in one pass with a DynamicCache, and computes logits of the last position; it decodes with a
StaticCache and `torch.compile(mode="reduce-overhead", fullgraph=True)`. Keys, values and states of decoding are random
numbers. Our steps hand every token to the host; the baseline's stay on the device within a round.

A training step is forward and backward of four layers of the 7B's width in bfloat16, with full activation checkpointing
(every layer is computed again in the backward pass) and a vocabulary of 512, so that layers are what is measured: two
Hyena and two attention layers, in turns with four attention layers. Packed documents have 256 to 8,192 tokens,
log-uniform. A LoRA step has rank 16 on all linear layers and keeps every activation; it is held against forward and
backward of the same frozen layers, which compute the gradient of their input alone.

Narrow weights are held against those in bfloat16 one right after the other; the bound of each is its own bytes. Evo 2's
7B has random weights, too, and input projections in bfloat16, unless a row says FP8: there the operations of those
products count half, since the tensor cores do twice as many in a second, and a weight of a step is one byte. Its
sequence of 1,000,000 tokens is scored layer by layer; the bound counts logits of every position. Targets in tokens/s
are those of an H100."""

SUITE = Suite(
    name="gpu",
    title="How fast hyaena is on a GPU",
    method=METHOD,
    benchmarks=(
        Benchmark("tests", "gpu.correctness:tests", "the tests of the kernels and of decoding", 2.5, required=True),
        Benchmark("rates", "gpu.operator:rates", "how fast the device copies and multiplies", 0.1),
        Benchmark("operator", "gpu.operator:operator", "the fused operator against its bound and the FFT", 0.1),
        Benchmark("decode", "gpu.model:decode", "the 7B's shape, decoding against its bound", 0.3),
        Benchmark("train", "gpu.train:train", "a training step, packed and not, against attention", 1.7),
        Benchmark("choices", "choices:gpu", "the 7B's shape, multiple choice against HFLM; needs lm_eval", 0.8),
        Benchmark("lora", "gpu.lora:lora", "a LoRA step against a pass without gradients of weights", 0.5),
        Benchmark("engine", "gpu.engine:engine", "the serving engine: first tokens, many requests", 1.5),
        Benchmark("continuous", "gpu.continuous:compare", "many requests, against transformers' generate_batch", 2.0),
        Benchmark("prefill", "gpu.model:prefill", "the 7B's shape, prefill against its bound", 0.5),
        Benchmark("baseline", "gpu.baseline:compare", "prefill and decoding against Mistral's shape", 1.8),
        Benchmark("narrow", "gpu.narrow:narrow", "weights of 8 and 4 bits against bfloat16, the 7B's shape", 1.5),
        Benchmark("evo2", "gpu.evo2:evo2", "Evo 2's 7B: prefill, decoding, a sequence of 1,000,000 tokens", 4.5),
    ),
    session="gpu.session:GpuSession",
    cuda=True,
)
